"""The router: choice and weights, what is counted, the losses, the bias, jitter, and that nothing counts twice."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from model.config import ModelConfig
from model.network.moe import MoE
from model.network.router import (
    Router,
    RouterSums,
    choose,
    count_assignments,
    load_metrics,
    move_biases,
    router_losses,
)
from model.network.transformer import Transformer

SMALL: dict[str, Any] = {
    "vocab_size": 50, "layers": 2, "width": 16, "heads": 2, "kv_heads": 1, "head_width": 8,
    "experts": 4, "experts_chosen": 2, "expert_width": 8, "init_std": 0.3,
}  # fmt: skip


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def router(seed: int = 0, **fields: Any) -> Router:
    torch.manual_seed(seed)
    return Router(ModelConfig(**{**SMALL, **fields}))


def sums_of(logits: Tensor, chosen: int) -> RouterSums:
    routing = choose(logits, chosen, "l1")
    counts = count_assignments(routing.expert_index_TK, logits.shape[1])
    return RouterSums(counts, routing.probability_TE.sum(dim=0), logits.logsumexp(dim=1).square().sum())


def test_softmax_weights_of_the_chosen_by_both_variants() -> None:
    logits = numbers(50, 8)
    probability = logits.softmax(dim=-1)
    plain, normalised = choose(logits, 3, "none"), choose(logits, 3, "l1")
    torch.testing.assert_close(plain.expert_weight_TK, probability.gather(1, plain.expert_index_TK))
    torch.testing.assert_close(normalised.expert_weight_TK.sum(dim=1), torch.ones(50))
    # Softmax, top-k, sum (Mixtral's paper writes top-k, softmax) are the same numbers.
    torch.testing.assert_close(normalised.expert_weight_TK, logits.topk(3).values.softmax(dim=-1))


def test_sigmoid_with_bias_is_deepseeks_gate() -> None:
    """Beside transformers' own DeepSeek-V3 router with one group of experts."""
    modeling = pytest.importorskip("transformers.models.deepseek_v3.modeling_deepseek_v3")
    configuration = pytest.importorskip("transformers.models.deepseek_v3.configuration_deepseek_v3")
    theirs = modeling.DeepseekV3TopkRouter(
        configuration.DeepseekV3Config(
            hidden_size=16, n_routed_experts=8, num_experts_per_tok=3, n_group=1, topk_group=1,
            norm_topk_prob=True, routed_scaling_factor=1.0,
        )
    )  # fmt: skip
    ours = router(experts=8, experts_chosen=3, router_score="sigmoid", router_bias_rate=0.001)
    bias = numbers(8, seed=1) * 0.2
    x = numbers(40, 16, seed=2)
    with torch.no_grad():
        theirs.weight.copy_(ours.weight)
        theirs.e_score_correction_bias.copy_(bias)
        assert ours.expert_bias is not None
        ours.expert_bias.copy_(bias)
        routing, _ = ours(x)
        _, weight, index = theirs(x)
    assert not torch.equal(choose(x @ ours.weight.T, 3, "l1", "sigmoid").expert_index_TK, routing.expert_index_TK)
    order, our_order = index.argsort(dim=1), routing.expert_index_TK.argsort(dim=1)
    assert torch.equal(index.gather(1, order), routing.expert_index_TK.gather(1, our_order))
    torch.testing.assert_close(weight.gather(1, order), routing.expert_weight_TK.gather(1, our_order))


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_bias_moves_the_choice_and_not_the_weights_nor_the_gradient(score: Any) -> None:
    logits = numbers(30, 6).requires_grad_()
    bias = torch.tensor([0.0, 0, 9.0, 0, 0, 0], requires_grad=True)
    routing = choose(logits, 2, "none", score, bias)
    assert (routing.expert_index_TK == 2).any(dim=1).all()
    scores = logits.softmax(dim=-1) if score == "softmax" else logits.sigmoid()
    torch.testing.assert_close(routing.expert_weight_TK, scores.gather(1, routing.expert_index_TK))
    routing.expert_weight_TK.sum().backward()
    assert bias.grad is None
    assert logits.grad is not None


def test_scores_that_underflow_give_finite_weights() -> None:
    logits = torch.full((3, 4), -200.0, requires_grad=True)
    weight = choose(logits, 2, "l1", "sigmoid").expert_weight_TK
    weight.sum().backward()
    assert torch.isfinite(weight).all()
    assert torch.isfinite(logits.grad).all()  # type: ignore[arg-type]


@pytest.mark.parametrize("chosen", [1, 2, 4])
def test_auxiliary_loss_is_one_when_balanced(chosen: int) -> None:
    experts = 8
    logits = torch.full((experts, experts), -30.0)
    for token in range(experts):
        for k in range(chosen):
            logits[token, (token + k) % experts] = 0.0
    sums = sums_of(logits, chosen)
    assert sums.assignments.tolist() == [chosen] * experts
    torch.testing.assert_close(router_losses(sums, chosen).balance, torch.tensor(1.0))


def test_auxiliary_loss_is_the_number_of_experts_when_one_has_all() -> None:
    logits = torch.full((16, 8), -30.0)
    logits[:, 5] = 0.0
    sums = sums_of(logits, 1)
    torch.testing.assert_close(router_losses(sums, 1).balance, torch.tensor(8.0))
    assert sums.assignments.tolist() == [0, 0, 0, 0, 0, 16, 0, 0]


def test_auxiliary_loss_pushes_towards_balance() -> None:
    logits = numbers(64, 4, seed=1) + torch.tensor([2.0, 0, 0, 0])
    shift = torch.zeros(4, requires_grad=True)
    router_losses(sums_of(logits + shift, 2), 2).balance.backward()
    assert shift.grad is not None
    assert shift.grad[0] > 0


def test_transformers_auxiliary_loss_is_the_factor_of_the_docstring() -> None:
    modeling = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    logits = numbers(40, 8, seed=2)
    theirs = modeling.load_balancing_loss_func((logits,), 8, 2)
    torch.testing.assert_close(2 * router_losses(sums_of(logits, 2), 2).balance, theirs)


def test_z_loss_is_the_papers_and_is_only_computed_where_it_is_asked_for() -> None:
    x = numbers(20, 16)
    with_z = router(router_z_loss_weight=0.001)
    _, sums = with_z(x)
    logits = (x @ with_z.weight.detach().T).double()
    expected = sum(float(row.exp().sum().log() ** 2) for row in logits) / 20  # equation 5, as it stands
    assert float(router_losses(sums, 2).z.detach()) == pytest.approx(expected, rel=1e-5)
    assert float(router()(x)[1].z) == 0


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_padding_counts_nowhere_whatever_it_holds(score: str) -> None:
    fields = {"router_score": score, "router_z_loss_weight": 0.1 if score == "softmax" else 0.0}
    gate, x = router(**fields), numbers(10, 16, seed=3)
    valid = torch.arange(10) < 6
    x[6:] *= float("nan")
    for part, alone in zip(gate(x, valid)[1], gate(x[:6])[1], strict=True):
        torch.testing.assert_close(part, alone)
    nothing = gate(x[:6], torch.zeros(6, dtype=torch.bool))[1]
    assert [float(loss.detach()) for loss in router_losses(nothing, 2)] == [0, 0]


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_parts_add_up_to_the_whole(data: st.DataObject) -> None:
    """Micro-batches and ranks: sums add up; with the whole's load and tokens, losses and gradients add up, too."""
    tokens, experts = data.draw(st.integers(2, 40)), data.draw(st.integers(2, 9))
    chosen, cut = data.draw(st.integers(1, experts)), data.draw(st.integers(1, tokens - 1))
    logits = numbers(tokens, experts, seed=data.draw(st.integers(0, 99)))
    at_once, in_parts = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    whole = sums_of(at_once, chosen)
    parts = [sums_of(part, chosen) for part in (in_parts[:cut], in_parts[cut:])]
    assert torch.equal(whole.assignments, parts[0].assignments + parts[1].assignments)
    torch.testing.assert_close(whole.probability, parts[0].probability + parts[1].probability)
    expected = router_losses(whole, chosen)
    losses = [router_losses(part, chosen, assignments=whole.assignments, tokens=tokens) for part in parts]
    torch.testing.assert_close(sum(one.balance for one in losses), expected.balance)
    torch.testing.assert_close(sum(one.z for one in losses), expected.z)
    (expected.balance + expected.z).backward()
    sum(one.balance + one.z for one in losses).backward()  # type: ignore[union-attr]
    torch.testing.assert_close(at_once.grad, in_parts.grad, rtol=1e-4, atol=1e-6)


def test_losses_of_all_layers_are_the_mean_of_each_layers() -> None:
    layers = [sums_of(numbers(30, 4, seed=seed), 2) for seed in range(3)]
    stacked = RouterSums(*(torch.stack(values) for values in zip(*layers, strict=True)))
    for name in ("balance", "z"):
        each = torch.stack([getattr(router_losses(layer, 2), name) for layer in layers])
        torch.testing.assert_close(getattr(router_losses(stacked, 2), name), each.mean())


def test_biases_move_by_the_rate_towards_balance() -> None:
    model = Transformer(ModelConfig(**SMALL, router_bias_rate=0.25))
    move_biases(model, torch.tensor([[8, 2, 5, 5], [0, 0, 0, 20]]))
    move_biases(model, torch.tensor([[5, 5, 5, 5], [0, 0, 0, 20]]))
    state = model.state_dict()
    assert state["blocks.0.moe.router.expert_bias"].tolist() == [-0.25, 0.25, 0, 0]
    assert state["blocks.1.moe.router.expert_bias"].tolist() == [0.5, 0.5, 0.5, -0.5]
    assert not any("bias" in name for name, _ in model.named_parameters())
    buffer = io.BytesIO()
    torch.save(state, buffer)
    again = Transformer(ModelConfig(**SMALL, router_bias_rate=0.0))
    again.load_state_dict(torch.load(io.BytesIO(buffer.getvalue())))
    move_biases(again, torch.tensor([[20, 0, 0, 0]] * 2))  # a rate of 0 keeps them
    assert torch.equal(again.blocks[1].moe.router.expert_bias, torch.tensor([0.5, 0.5, 0.5, -0.5]))
    move_biases(Transformer(ModelConfig(**SMALL)), torch.tensor([[8, 2, 5, 5]] * 2))  # none to move
    again.initialize()
    assert float(again.blocks[1].moe.router.expert_bias.abs().sum()) == 0


def test_bias_evens_out_a_router_that_prefers_two_experts() -> None:
    gate = router(router_score="sigmoid", router_bias_rate=0.002)
    x = numbers(400, 16)
    x[:, 0] = 3.0
    with torch.no_grad():
        gate.weight[:, 0] = torch.tensor([1.0, 1.0, -1.0, -1.0])
        before = load_metrics(gate(x)[1].assignments[None])["expert_load_max_worst"]
        for _ in range(400):
            move_biases(gate, gate(x)[1].assignments[None])
        after = load_metrics(gate(x)[1].assignments[None])["expert_load_max_worst"]
    assert before > 1.8
    assert after < 1.1


def test_jitter_is_in_training_alone_within_its_bounds_and_exact_from_the_random_state() -> None:
    plain, noisy = router(), router(router_jitter=0.1, router_z_loss_weight=0.1)
    x = numbers(50, 16)
    assert torch.equal(noisy.eval()(x)[0].expert_weight_TK, plain.eval()(x)[0].expert_weight_TK)
    noisy.train()
    state = torch.get_rng_state()
    first, other = noisy(x)[0].probability_TE, noisy(x)[0].probability_TE
    torch.set_rng_state(state)
    assert torch.equal(noisy(x)[0].probability_TE, first)
    assert not torch.equal(first, other)
    with torch.no_grad():  # one feature, weight 1: the logit is the noise
        noisy.weight.zero_()[0, 0] = 1.0
        logits = noisy(torch.ones(5000, 16))[0].probability_TE.log()
    noise = logits[:, 0] - logits[:, 1]
    assert 0.899 < float(noise.min()) < 0.905
    assert 1.095 < float(noise.max()) < 1.101


def test_activation_checkpointing_counts_once_and_draws_the_same_noise() -> None:
    """The forward pass of a block runs twice and leaves what it leaves when it runs once."""
    config = ModelConfig(**SMALL, router_jitter=0.3, router_bias_rate=0.1, router_z_loss_weight=0.1)
    x = numbers(24, 16)
    found = []
    for again in (False, True):
        torch.manual_seed(0)
        moe = MoE(config)
        for parameter in moe.parameters():
            torch.nn.init.normal_(parameter)
        runs = []
        moe.router.register_forward_hook(lambda *_, runs=runs: runs.append(1))
        y, sums = checkpoint(moe, x, use_reentrant=False) if again else moe(x)
        losses = router_losses(sums, 2)
        (y.sum() + losses.balance + losses.z).backward()
        assert len(runs) == (2 if again else 1)
        found.append([y, *sums, moe.router.expert_bias, torch.get_rng_state(), *(p.grad for p in moe.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert int(found[1][1].sum()) == 2 * 12 * 2


@pytest.mark.parametrize(
    "fields",
    [
        {"router_z_loss_weight": 0.1, "router_jitter": 0.1},
        {"router_score": "sigmoid", "router_bias_rate": 0.1},
    ],
)
def test_router_compiles_whole(fields: dict[str, Any]) -> None:
    gate, x = router(**fields).eval(), numbers(20, 16)
    valid = torch.arange(20) < 15
    compiled = torch.compile(gate, fullgraph=True, backend="aot_eager")
    for found, expected in zip(compiled(x, valid), gate(x, valid), strict=True):
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b)
    gate.train()
    routing, sums = compiled(x, valid)
    (routing.expert_weight_TK.sum() + sums.probability[0]).backward()
    assert gate.weight.grad is not None


class Launches(TorchDispatchMode):
    """The operators that write something, which is a kernel each on a GPU, and the bytes that they write."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.written = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view and "empty" not in func.name() and func is not torch.ops.aten.detach.default:
            self.names.append(func.name())
            outputs = result if isinstance(result, tuple | list) else [result]
            self.written += sum(t.nbytes for t in outputs if isinstance(t, Tensor))
        return result


@pytest.mark.parametrize(
    ("fields", "most"),
    [
        ({}, 14),
        ({"router_score": "sigmoid", "router_bias_rate": 0.1}, 19),
        ({"router_z_loss_weight": 0.1, "router_jitter": 0.1}, 20),
    ],
)
def test_routing_takes_few_launches_and_no_wide_one_hot(fields: dict[str, Any], most: int) -> None:
    tokens, experts, chosen = 512, 64, 8
    gate = router(experts=experts, experts_chosen=chosen, **fields)
    x, valid = numbers(tokens, 16), torch.ones(tokens, dtype=torch.bool)
    with Launches() as launches:
        gate(x, valid)
    assert len(launches.names) <= most, launches.names
    assert launches.written < 8 * tokens * chosen * experts


def test_load_metrics_of_even_and_collapsed_layers() -> None:
    found = load_metrics(torch.tensor([[5, 5, 5, 5], [20, 0, 0, 0]]))
    assert found == {
        "expert_tokens": [[5, 5, 5, 5], [20, 0, 0, 0]],
        "expert_load_max": [1.0, 4.0],
        "expert_load_max_worst": 4.0,
        "layer_entropy": pytest.approx([1.0, 0.0]),
        "expert_entropy": pytest.approx(0.5),
        "layer_dead_experts": [0, 3],
        "dead_experts": 3,
    }
    assert load_metrics(torch.tensor([[7]]))["expert_entropy"] == 1
    assert load_metrics(torch.tensor([[0, 0]]))["dead_experts"] == 2


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"router_score": "sigmoid", "router_z_loss_weight": 0.1}, "sigmoid scores have none"),
        ({"experts_chosen": 4, "router_bias_rate": 0.1}, "all are chosen: leave it out"),
        ({"experts_chosen": 1}, "take router_normalize none"),
    ],
)
def test_settings_that_make_no_sense_together_are_refused(fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        ModelConfig(**{**SMALL, **fields})
    ModelConfig(**{**SMALL, "experts": 1, "experts_chosen": 1})
