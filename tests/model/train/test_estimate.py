"""Estimates: counts by hand, laws, the measured figures that they were fitted to, and suggestions that hold."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields
from math import ceil

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from model.config import ModelConfig, load_preset, preset_names
from model.errors import ModelError
from model.network.transformer import Transformer
from model.train.estimate import changes, estimate, fastest, largest, suggest
from model.train.machine import GIB, MACHINES
from model.train.memory import TrainShape, held, kept, moments, peak, whole
from model.train.speed import expert_seconds, flops_per_token, step_time

H200 = MACHINES["h200"]
EVEN = H200.model_copy(update={"imbalance": 1.0})
# Every dimension divides by 8 GPUs, so that shards are equal.
SMALL = ModelConfig(
    layers=3, width=64, heads=4, kv_heads=2, head_width=16, experts=8, experts_chosen=2, expert_width=32, vocab_size=128
)
WHOLE = 3 * (8 * 64 + 2 * 64) + 64  # routers and norms, which every GPU has whole

configs = st.builds(
    lambda layers, width, heads, experts, chosen, hidden, tied, qk, post, clip: ModelConfig(
        layers=layers, width=width, heads=heads, kv_heads=1, head_width=16, experts=experts,
        experts_chosen=min(chosen, experts), expert_width=hidden, vocab_size=1000, tied_head=tied, qk_norm=qk,
        post_norm=post, qkv_clip=clip, router_normalize="none",
    ),
    st.integers(1, 4), st.sampled_from([48, 64, 200]), st.integers(1, 4), st.sampled_from([1, 4, 6, 16]),
    st.integers(1, 4), st.sampled_from([32, 100]), st.booleans(), st.booleans(), st.booleans(),
    st.sampled_from([None, 8.0]),
)  # fmt: skip
shapes = st.builds(
    lambda nodes, ep, micro, times, blocks: TrainShape(
        gpus=nodes * ep, expert_parallel=ep, micro_batch_size=micro, accumulation=times, sequence_length=128,
        activation_checkpointing=blocks,
    ),
    st.integers(1, 40), st.sampled_from([1, 2, 4]), st.integers(1, 4), st.integers(1, 3),
    st.sampled_from(["none", "block"]),
)  # fmt: skip


def allocated(config: ModelConfig, shape: TrainShape) -> int:
    return peak(config, shape, EVEN)[1].allocated


@settings(max_examples=15)
@given(configs)
def test_counts_are_the_network_s(config: ModelConfig) -> None:
    model = Transformer(config)
    counts = held(config, TrainShape())
    assert counts.all(config.layers) == config.parameters == sum(p.numel() for p in model.parameters())
    block = model.blocks[0]
    assert counts.block == sum(p.numel() for p in block.parameters())
    assert counts.experts == sum(p.numel() for name, p in block.named_parameters() if p.dim() == 3)
    floats = [p for name, p in block.named_parameters() if p.dim() == 1 or name.endswith("router.weight")]
    assert counts.floats == sum(p.numel() for p in floats)


def test_states_of_one_gpu_by_hand() -> None:
    # Attention 64 * (64 + 2 * 32) + 64 * 64, router 8 * 64, two norms, 8 experts of 3 * 32 * 64.
    block = 8192 + 4096 + 512 + 128 + 49152
    parameters = 3 * block + 2 * 128 * 64 + 64
    memory = moments(SMALL, TrainShape(), H200)["optimizer"]
    assert memory.weights == 4 * parameters
    assert memory.moments == 8 * parameters
    # bfloat16 gradients, but for norms and routers.
    assert memory.gradients == 2 * parameters + 2 * (3 * (512 + 128) + 64)
    assert memory.allocated == memory.weights + memory.moments + memory.gradients


def test_accumulation_adds_up_in_float32_beside_the_pass_s_gradients() -> None:
    for gpus in (1, 8):
        once = TrainShape(gpus=gpus)
        alone, adding = (moments(SMALL, shape, H200) for shape in (once, once.model_copy(update={"accumulation": 2})))
        sums = 4 * (SMALL.parameters - WHOLE) // gpus
        for name, memory in adding.items():
            assert memory.gradients == alone[name].gradients + sums, name


def test_states_of_eight_gpus_by_hand() -> None:
    memory = moments(SMALL, TrainShape(gpus=8), H200)["optimizer"]
    each = (SMALL.parameters + 7 * WHOLE) // 8
    assert (memory.weights, memory.moments, memory.gradients) == (4 * each, 8 * each, 2 * each + 2 * WHOLE)


def test_activations_of_a_block_by_hand() -> None:
    # bfloat16: block input, attention's input, its projection, the stream after it, experts' input; queries, keys and
    # values; the result and its log-sum-exp; the router's 8 probabilities and 2 choices; 2 x 2 rows of 32.
    token = 5 * 2 * 64 + 2 * 128 + 2 * 64 + 4 * 4 + 4 * 8 + 24 * 2 + 2 * 2 * 2 * 32
    shape = TrainShape(sequence_length=10, micro_batch_size=3)
    assert kept(SMALL, shape, H200) == 30 * token
    memory = moments(SMALL, shape, H200)
    assert memory["backward of the last block"].activations == 3 * 30 * token
    checkpointed = moments(SMALL, shape.model_copy(update={"activation_checkpointing": "block"}), H200)
    assert checkpointed["backward of the last block"].activations == 30 * (2 * 2 * 64 + token)
    assert kept(SMALL, shape.model_copy(update={"gpus": 8}), H200) == 30 * token
    # Expert parallelism keeps the rows that came, of 64, and none of those that it sent.
    shared = shape.model_copy(update={"gpus": 8, "expert_parallel": 2})
    assert kept(SMALL, shared, EVEN) == 30 * (token + 2 * 2 * 64)


def test_kernels_keep_what_their_readme_says() -> None:
    dbrx = load_preset("dbrx")
    rows = 8192 * 4 * 2 * 2 * dbrx.expert_width + 8192 * 2 * dbrx.width
    assert rows / GIB == pytest.approx(1.41, abs=0.01)
    shape = TrainShape(sequence_length=8192)
    assert rows < kept(dbrx, shape, H200) < 1.8 * rows


@given(configs, shapes)
def test_every_byte_lies_somewhere(config: ModelConfig, shape: TrainShape) -> None:
    assume(config.experts % shape.expert_parallel == 0)
    shard = held(config, shape).all(config.layers)
    assert shard * shape.gpus >= config.parameters
    # At most a row of each matrix more on the fullest GPU (experts: of each expert's three).
    rows = config.layers * (
        config.experts * config.width
        + 9
        + 5 * config.width
        + 3 * config.experts * config.width
        + 4 * config.query_width
    )
    experts = config.layers * (config.expert_parameters if config.experts % shape.gpus else 0)
    assert shard <= ceil(config.parameters / shape.gpus) + rows + 2 * config.width + 1 + experts


@pytest.mark.parametrize("ep", [1, 2, 4, 8])
def test_expert_parallelism_moves_experts_and_loses_none(ep: int) -> None:
    shape = TrainShape(gpus=8, expert_parallel=ep)
    assert held(SMALL, shape).all(3) * 8 == SMALL.parameters + 7 * WHOLE
    assert whole(SMALL, shape).experts * ep == whole(SMALL, TrainShape()).experts


@given(configs, shapes)
def test_more_gpus_need_no_more_memory_each(config: ModelConfig, shape: TrainShape) -> None:
    assume(config.experts % shape.expert_parallel == 0 and shape.sharded)
    # Where the experts' width does not divide, whole experts are dealt out: see the next test.
    config = config.model_copy(update={"expert_width": 2 * shape.gpus})
    more = shape.model_copy(update={"gpus": 2 * shape.gpus})
    assert allocated(config, more) <= allocated(config, shape)


def test_an_expert_width_that_does_not_divide_is_dear() -> None:
    # 3,072 = 3 * 1,024 does not divide Mixtral's 14,336: eight GPUs hold an expert each, the others none.
    mixtral = load_preset("mixtral-8x7b")
    assert held(mixtral, TrainShape(gpus=3072)).experts == mixtral.expert_parameters
    assert held(mixtral, TrainShape(gpus=2048)).experts == mixtral.experts * mixtral.expert_parameters // 2048


@given(configs, shapes)
def test_larger_micro_batches_need_more_and_checkpointing_less(config: ModelConfig, shape: TrainShape) -> None:
    assume(config.experts % shape.expert_parallel == 0)
    more = shape.model_copy(update={"micro_batch_size": shape.micro_batch_size + 1})
    assert allocated(config, more) >= allocated(config, shape)
    assert kept(config, more, EVEN) > kept(config, shape, EVEN)
    by_block = {way: shape.model_copy(update={"activation_checkpointing": way}) for way in ("none", "block")}
    assert allocated(config, by_block["block"]) <= allocated(config, by_block["none"])
    times = {way: step_time(config, s, EVEN).step for way, s in by_block.items()}
    assert times["block"] > times["none"] * 0.999


def test_without_expert_parallelism_nothing_is_exchanged() -> None:
    for gpus in (1, 8):
        shape = TrainShape(gpus=gpus)
        uneven = H200.model_copy(update={"imbalance": 3.0})
        assert step_time(SMALL, shape, H200).all_to_all == 0
        assert step_time(SMALL, shape, uneven) == step_time(SMALL, shape, H200)
        assert moments(SMALL, shape, uneven) == moments(SMALL, shape, H200)
    exchanging = step_time(SMALL, TrainShape(gpus=8, expert_parallel=2), H200)
    assert exchanging.all_to_all > 0


def test_a_slower_network_is_slower_across_nodes_only() -> None:
    dbrx, slow = load_preset("dbrx"), H200.with_network(100)
    assert step_time(dbrx, TrainShape(gpus=8), slow) == step_time(dbrx, TrainShape(gpus=8), H200)
    assert step_time(dbrx, TrainShape(gpus=512), slow).step > step_time(dbrx, TrainShape(gpus=512), H200).step


def test_parts_add_up() -> None:
    found = estimate(load_preset("dbrx"), TrainShape(gpus=512), H200)
    assert found.memory.allocated == sum(getattr(found.memory, f.name) for f in fields(found.memory))
    assert found.time.step == pytest.approx(sum(getattr(found.time, f.name) for f in fields(found.time)))
    assert found.tokens_per_second * found.time.step == pytest.approx(512 * 4096)
    assert found.total + found.spare == H200.memory
    assert found.days(found.tokens_per_second * 86400) == pytest.approx(1)


# kernels/README.md: tokens, width, expert width, experts, chosen, TFLOP/s forward, forward and backward.
MEASURED = {
    "dbrx": (8192, 6144, 10752, 16, 4, 720, 653),
    "mixtral": (16384, 4096, 14336, 8, 2, 751, 665),
    "olmoe": (32768, 2048, 1024, 64, 8, 621, 609),
    "qwen3moe": (32768, 2048, 768, 128, 8, 567, 570),
    "30b": (32768, 4096, 1024, 128, 8, 633, 603),
    "7b": (32768, 1536, 256, 128, 8, 376, 425),
}


@pytest.mark.parametrize("name", MEASURED)
def test_expert_rates_are_those_measured(name: str) -> None:
    T, D, F, E, K, forward, both = MEASURED[name]
    config = ModelConfig(width=D, expert_width=F, experts=E, experts_chosen=K)
    one = expert_seconds(T * K, E, config, H200, backward=False)
    two = one + expert_seconds(T * K, E, config, H200, backward=True)
    assert 6 * T * K * D * F / one / 1e12 == pytest.approx(forward, rel=0.05)
    assert 18 * T * K * D * F / two / 1e12 == pytest.approx(both, rel=0.05)


def test_mfu_is_the_design_s() -> None:
    # transformers' DBRX of two blocks there: 25,094 tokens/s are an MFU of 0.37.
    config = load_preset("dbrx", layers=2)
    assert flops_per_token(config, 4096) * 25094 / 989e12 == pytest.approx(0.37, abs=0.005)
    tied = config.model_copy(update={"tied_head": True})
    assert flops_per_token(tied, 4096) == flops_per_token(config, 4096)


@pytest.mark.parametrize("gpus", [8, 16, 512])
@pytest.mark.parametrize("name", ["dbrx", "grok-1"])
def test_a_suggestion_fits_and_differs(name: str, gpus: int) -> None:
    config = load_preset(name)
    found = estimate(config, TrainShape(gpus=gpus, micro_batch_size=8), H200)
    better = suggest(found)
    assert (better is None) == found.fits
    if better is not None:
        assert better.fits
        assert changes(found.shape, better.shape)
        assert better.shape.gpus >= gpus


def test_checkpointing_is_suggested_before_more_gpus() -> None:
    deep = load_preset("olmoe", layers=16)
    found = estimate(deep, TrainShape(micro_batch_size=16), H200)
    better = suggest(found)
    assert not found.fits
    assert better is not None
    assert better.shape.gpus == 1
    assert better.shape.tokens_per_step == found.shape.tokens_per_step


@pytest.mark.parametrize("name", preset_names())
def test_largest_is_the_largest(name: str) -> None:
    config = load_preset(name)
    length = min(4096, config.max_seq_len)
    found = largest(config, 8, H200, length)
    assert found.best.fits == (found.layers >= config.layers)
    for layers, fits in ((found.layers, True), (found.layers + 1, False)):
        deep = config.model_copy(update={"layers": layers}) if layers else None
        assert deep is None or (fastest(deep, 8, H200, length) is not None) == fits


def test_what_cannot_be_is_an_error() -> None:
    with pytest.raises(ValidationError, match="must divide the number of GPUs"):
        TrainShape(gpus=6, expert_parallel=4)
    with pytest.raises(ModelError, match="8 experts cannot be spread over 3"):
        estimate(SMALL, TrainShape(gpus=3, expert_parallel=3), H200)


def test_torch_is_not_needed() -> None:
    block = "import sys; sys.modules['torch'] = None; import model.train.estimate, model.train.config"
    subprocess.run([sys.executable, "-c", block], check=True, timeout=60)
