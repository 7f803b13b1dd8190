"""A training step of our model beside transformers' own, on one GPU: tokens a second, MFU, memory, where time goes.

    python benchmarks/training.py                                    # three shapes, ours and transformers'
    python benchmarks/training.py --shapes dbrx --sides ours --profile
    python benchmarks/training.py --device cpu --quick               # tries the script out; no measurement

Each shape is a few blocks of a published model with its whole vocabulary: sequences of 4,096 tokens, 16,384 tokens a
step, forward, backward, clipping and AdamW, without activation checkpointing unless --checkpointing. Ours is the
trainer's own step (model/train/step.py): bfloat16 products, float32 master weights and moments, documents kept apart,
every block compiled. Transformers' is its model class as it ships, bfloat16 throughout (weights and moments too), with
its grouped products where it has them, compiled where that runs, and torch's fused AdamW.

MFU is (6 * active parameters without the input embedding + 6 * layers * S * D) * tokens a second / 989e12, the peak of
an H100 and H200 in bfloat16 without sparsity. Times are of whole steps by the host's clock, from loss to loss, for each
of which the host waits, as a training does; the median and the least and greatest of --steps after three that are not
counted. Both sides run in this process, one after the other, because both together do not fit one GPU.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

from benchmarks import gpu
from model.config import ModelConfig, load_preset
from model.network.transformer import Transformer
from model.train.config import TrainConfig
from model.train.optimizer import build_optimizer
from model.train.parallel import build
from model.train.step import compute_gradients, to_device, update
from model.train.world import World

if TYPE_CHECKING:
    from model.loader.loader import Batch

PEAK = 989e12
SEQUENCE = 4096
SHAPES: dict[str, tuple[ModelConfig, float]] = {
    "dbrx": (load_preset("dbrx", layers=2), 0.55),
    "mixtral": (load_preset("mixtral-8x7b", layers=4), 0.55),
    # Transformers' figure in the design is for experts of width 2048; with float32 master weights 16 such blocks do not
    # fit one GPU, 8 do.
    "olmoe-2048": (load_preset("olmoe", layers=8, expert_width=2048), 0.45),
    "olmoe": (load_preset("olmoe", layers=16), 0.45),
}


@dataclass(frozen=True)
class Tokens:
    """What the trainer's step takes of a loader's batch: one document a sequence, or several."""

    tokens: Tensor
    positions: Tensor
    segment_ids: Tensor
    loss_mask: Tensor

    def __len__(self) -> int:
        return len(self.tokens)

    def slice(self, start: int, end: int) -> Tokens:
        return Tokens(*(t[start:end] for t in (self.tokens, self.positions, self.segment_ids, self.loss_mask)))


def batch(config: ModelConfig, sequences: int, length: int, documents: int) -> Tokens:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, config.vocab_size, (sequences, length), generator=generator)
    at = torch.arange(length)
    segment = (at * documents // length).expand(sequences, -1).contiguous()
    first = torch.searchsorted(segment[0], segment[0])
    positions = (at - first).expand(sequences, -1).contiguous()
    return Tokens(tokens, positions, segment, positions > 0)


def mfu(config: ModelConfig, length: int, rate: float) -> float:
    """Of a rate in tokens a second."""
    active = config.active_parameters - (0 if config.tied_head else config.vocab_size * config.width)
    return (6 * active + 6 * config.layers * length * config.width) * rate / PEAK


def draw_on_device(model: Transformer) -> None:
    """Initial weights that take no time. Which ones does not matter here, and the trainer draws on the CPU."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, model.config.init_std)
            else:
                parameter.fill_(1)


def trainer_step(config: ModelConfig, data: Tokens, train: TrainConfig, world: World) -> Callable[[], float]:
    """The trainer's own step on a model of its making, as a function that returns the loss. Waits for it."""
    with torch.device("meta"):
        model = Transformer(config)
    with mock.patch.object(Transformer, "initialize", draw_on_device):
        model = build(train, model, world)
    optimizer = build_optimizer(model.parameters(), train)

    def step() -> float:
        batch = to_device(cast("Batch", data), world.device)
        figures = compute_gradients(model, optimizer, batch, train, world)
        loss = float(figures.loss)
        update(model, optimizer, figures, train)
        return loss

    return step


def ours(config: ModelConfig, data: Tokens, device: torch.device, flags: argparse.Namespace) -> Callable[[], float]:
    train = TrainConfig(loss_chunk=flags.loss_chunk, moments=flags.moments, compile=not flags.eager)
    train = train.model_copy(update={"activation_checkpointing": "block" if flags.checkpointing else "none"})
    return trainer_step(config, data, train, World(device=device))


def transformers(
    config: ModelConfig, data: Tokens, device: torch.device, flags: argparse.Namespace
) -> Callable[[], float]:
    from transformers import AutoConfig, AutoModelForCausalLM

    common: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_seq_len,
        "use_cache": False,
        # DBRX's class fails with it (transformers 5.17).
        "output_router_logits": config.name != "dbrx",
        "router_aux_loss_coef": config.balance_loss_weight,
    }
    if config.name == "dbrx":
        theirs = AutoConfig.for_model(
            "dbrx",
            d_model=config.width,
            n_heads=config.heads,
            n_layers=config.layers,
            max_seq_len=config.max_seq_len,
            attn_config={"clip_qkv": config.qkv_clip, "kv_n_heads": config.kv_heads, "rope_theta": config.rope_base},
            ffn_config={
                "ffn_hidden_size": config.expert_width,
                "moe_num_experts": config.experts,
                "moe_top_k": config.experts_chosen,
                "moe_loss_weight": config.balance_loss_weight,
            },
            **{k: v for k, v in common.items() if k != "max_position_embeddings"},
        )
    else:
        experts = "num_local_experts" if config.name == "mixtral-8x7b" else "num_experts"
        theirs = AutoConfig.for_model(
            "mixtral" if config.name == "mixtral-8x7b" else "olmoe",
            hidden_size=config.width,
            intermediate_size=config.expert_width,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.kv_heads,
            num_experts_per_tok=config.experts_chosen,
            **{experts: config.experts},
            **common,
        )
    theirs._attn_implementation = "sdpa"
    with torch.device(device):
        torch.set_default_dtype(torch.bfloat16 if device.type == "cuda" else torch.float32)
        try:
            model = AutoModelForCausalLM.from_config(theirs)  # type: ignore[no-untyped-call]
        finally:
            torch.set_default_dtype(torch.float32)
    if hasattr(model, "set_experts_implementation") and config.name != "dbrx":
        model.set_experts_implementation("grouped_mm")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    tokens = data.tokens.to(device)
    call = torch.compile(model) if flags.compile_peer and device.type == "cuda" else model

    def step() -> float:
        loss = call(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        value = float(loss.detach())
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return value

    return step


KINDS = (
    ("experts", r"rows_kernel|weights_kernel|grouped|hopper|activation|sum_kernel|gather|sorted|place_|scan_|count_"),
    ("attention", r"flex|flash|fmha|sdpa|cudnn"),
    ("optimizer", r"adamw|adam|multi_tensor|foreach|lpnorm"),
    ("cuBLAS", r"nvjet|gemm|cutlass|xmma|sm90"),
    ("compiled", r"triton_"),
)


def by_kind(rows: Sequence[tuple[str, int, float]]) -> list[tuple[str, float]]:
    """(kind of kernel, milliseconds), the most first."""
    kinds: dict[str, float] = {}
    for name, _, took in rows:
        kind = next((k for k, pattern in KINDS if re.search(pattern, name, re.IGNORECASE)), "other")
        kinds[kind] = kinds.get(kind, 0.0) + took
    return sorted(kinds.items(), key=lambda item: -item[1])


def measure(make: Callable[[], Callable[[], float]], steps: int, clock: gpu.Clock) -> dict[str, Any]:
    """Seconds a step, losses, peak bytes; the step itself for a profile."""
    if clock.cuda:
        torch.cuda.reset_peak_memory_stats()
    step = make()
    losses, seconds = [], []
    compile_s = 0.0
    for number in range(3 + steps):
        begin = time.perf_counter()
        losses.append(step())
        if number == 0:
            clock.wait()
            compile_s = time.perf_counter() - begin
        if number >= 3:
            seconds.append(time.perf_counter() - begin)
    clock.wait()
    peak = torch.cuda.max_memory_allocated() if clock.cuda else 0
    return {"seconds": seconds, "losses": losses, "peak": peak, "first": compile_s, "step": step}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="dbrx,mixtral,olmoe-2048,olmoe", help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--sides", default="ours,transformers")
    parser.add_argument("--steps", type=int, default=10, help="timed steps (count)")
    parser.add_argument("--documents", type=int, default=1, help="documents a sequence, ours (count)")
    parser.add_argument(
        "--loss-chunk", type=int, default=4096, help="tokens whose logits exist at a time, ours (tokens)"
    )
    parser.add_argument("--moments", choices=("float32", "bfloat16"), default="float32", help="ours")
    parser.add_argument("--checkpointing", action="store_true", help="recompute blocks, ours")
    parser.add_argument("--eager", action="store_true", help="do not compile ours")
    parser.add_argument("--compile-peer", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--profile", action="store_true", help="print where a step's time goes")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, to try the script out")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, default=gpu.OUT)
    flags = parser.parse_args()
    device = torch.device(flags.device)
    clock = gpu.Clock(device)
    length = 64 if flags.quick else SEQUENCE
    results: dict[str, Any] = {}
    for shape in flags.shapes.split(","):
        config, target = SHAPES[shape]
        if flags.quick:
            small = {"layers": 2, "width": 64, "head_width": 16, "expert_width": 32, "vocab_size": 97}
            config = config.model_copy(update=small | {"heads": 4, "kv_heads": min(config.kv_heads, 4)})
        data = batch(config, 4, length, flags.documents)
        for side in flags.sides.split(","):
            make = partial({"ours": ours, "transformers": transformers}[side], config, data, device, flags)
            found, why = gpu.attempt(partial(measure, make, flags.steps, clock))
            if found is None:
                print(f"{shape:11} {side:13} failed: {why}", flush=True)
                continue
            spread = gpu.Spread.of([4 * length / s for s in found["seconds"]])
            reached = mfu(config, length, spread.median)
            print(
                f"{shape:11} {side:13} {spread.show('{:,.0f}')} tokens/s  MFU {reached:.3f} (wanted {target})  "
                f"peak {found['peak'] / 2**30:.1f} GiB  first step {found['first']:.0f} s  "
                f"losses {' '.join(f'{x:.3f}' for x in found['losses'][:5])}",
                flush=True,
            )
            results[f"{shape}/{side}"] = {k: v for k, v in found.items() if k != "step"} | {"mfu": reached}
            if flags.profile and clock.cuda:
                rows = gpu.profile(found["step"], clock, rows=10_000)
                for kind, took in by_kind(rows):
                    print(f"    {took:9.2f} ms  {kind}", flush=True)
                gpu.print_profile(f"{shape} {side}", rows[:25])
            del found
            torch._dynamo.reset()
            gpu.release()
    report = {"machine": gpu.machine(device), "flags": vars(flags) | {"out": str(flags.out)}, "results": results}
    print(f"The figures are in {gpu.write(flags.out, 'training', report)}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
