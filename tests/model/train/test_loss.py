"""The chunked cross-entropy is torch's own, and the schedule a pure function of the step."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from model.train.config import TrainConfig
from model.train.journal import load_metrics
from model.train.loss import cross_entropy_sum, token_losses
from model.train.optimizer import build_optimizer, learning_rate


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_chunked_cross_entropy_is_torchs(chunk: int) -> None:
    torch.manual_seed(0)
    h = torch.randn(50, 16, requires_grad=True)
    w = torch.randn(33, 16, requires_grad=True)
    target = torch.randint(0, 33, (50,))
    expected = F.cross_entropy(h @ w.T, target, reduction="sum")
    expected_grads = torch.autograd.grad(expected / 3, (h, w))
    got = cross_entropy_sum(h, w, target, chunk)
    torch.testing.assert_close(got, expected)
    for a, b in zip(torch.autograd.grad(got / 3, (h, w)), expected_grads, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        token_losses(h, w, target, chunk), F.cross_entropy(h @ w.T, target, reduction="none").detach()
    )


def test_chunked_cross_entropy_follows_autocast() -> None:
    torch.manual_seed(0)
    h, w = torch.randn(9, 8, requires_grad=True), torch.randn(5, 8, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = cross_entropy_sum(h, w, torch.arange(9) % 5, 4)
    loss.backward()
    exact = cross_entropy_sum(h, w, torch.arange(9) % 5, 4)
    assert loss.dtype == torch.float32
    assert loss.item() != exact.item()
    assert loss.item() == pytest.approx(exact.item(), rel=0.02)
    assert w.grad is not None
    assert w.grad.dtype == torch.float32


def test_schedules_warm_up_and_come_down() -> None:
    common = {"steps": 100, "warmup_steps": 10, "learning_rate": 1.0, "final_learning_rate_fraction": 0.1}
    cosine = TrainConfig(schedule="cosine", **common)
    rates = [learning_rate(cosine, s) for s in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[10] == 1.0
    assert rates[99] == pytest.approx(0.1)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    wsd = [learning_rate(TrainConfig(schedule="wsd", decay_fraction=0.2, **common), s) for s in range(100)]
    assert set(wsd[10:80]) == {1.0}
    assert wsd[99] == pytest.approx(0.1)
    assert wsd[79:] == sorted(wsd[79:], reverse=True)
    assert learning_rate(TrainConfig(steps=1, warmup_steps=0), 0) > 0


def test_only_matrices_decay() -> None:
    layer = torch.nn.LayerNorm(4, bias=False)
    matrix = torch.nn.Linear(4, 4, bias=False)
    optimizer = build_optimizer([*layer.parameters(), *matrix.parameters()], TrainConfig(weight_decay=0.5))
    assert [(g["weight_decay"], [p.ndim for p in g["params"]]) for g in optimizer.param_groups] == [
        (0.5, [2]),
        (0.0, [1]),
    ]


def test_load_metrics_of_even_and_collapsed_routers() -> None:
    even = load_metrics(torch.full((2, 4), 0.25))
    assert even["expert_load_max_worst"] == pytest.approx(1.0)
    assert even["expert_entropy"] == pytest.approx(1.0)
    assert even["dead_experts"] == 0
    collapsed = load_metrics(torch.tensor([[1.0, 0, 0, 0], [0.25, 0.25, 0.25, 0.25]]))
    assert collapsed["expert_load_max"] == pytest.approx([4.0, 1.0])
    assert collapsed["dead_experts"] == 3
