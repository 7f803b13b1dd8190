"""The chunked cross-entropy is torch's own, and the schedule a pure function of the step."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from model.train.config import TrainConfig
from model.train.loss import NO_TARGET, cross_entropy_sum, token_losses
from model.train.optimizer import build_optimizer, learning_rate


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_chunked_cross_entropy_is_torchs(chunk: int) -> None:
    torch.manual_seed(0)
    h = torch.randn(50, 16, requires_grad=True)
    w = torch.randn(33, 16, requires_grad=True)
    target = torch.randint(0, 33, (50,))
    expected = F.cross_entropy(h @ w.T, target, reduction="sum")
    expected_grads = torch.autograd.grad(expected / 3, (h, w))
    got = cross_entropy_sum(h, w, target, chunk).total
    torch.testing.assert_close(got, expected)
    for a, b in zip(torch.autograd.grad(got / 3, (h, w)), expected_grads, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        token_losses(h, w, target, chunk), F.cross_entropy(h @ w.T, target, reduction="none").detach()
    )


def test_bfloat16_products_and_float32_softmax() -> None:
    torch.manual_seed(0)
    h, w = torch.randn(9, 8).bfloat16().requires_grad_(), torch.randn(5, 8).bfloat16().requires_grad_()
    target = torch.arange(9) % 5
    found = cross_entropy_sum(h, w, target, 4)
    found.total.backward()
    exact = cross_entropy_sum(h.detach().float(), w.detach().float(), target, 4)
    assert found.total.dtype == torch.float32
    assert found.total.item() != exact.total.item()
    assert found.total.item() == pytest.approx(exact.total.item(), rel=0.02)
    assert w.grad is not None
    assert w.grad.dtype == torch.bfloat16


def test_tokens_without_target_count_nothing_and_z_loss_is_its_definition() -> None:
    torch.manual_seed(0)
    h, w = torch.randn(12, 8, requires_grad=True), torch.randn(5, 8, requires_grad=True)
    target = torch.arange(12) % 5
    target[[0, 7]] = NO_TARGET
    found = cross_entropy_sum(h, w, target, 5, 0.1)
    kept = target != NO_TARGET
    logits = (h @ w.T)[kept]
    z = logits.logsumexp(dim=-1).square()
    expected = F.cross_entropy(logits, target[kept], reduction="sum") + 0.1 * z.sum()
    torch.testing.assert_close(found.total, expected)
    torch.testing.assert_close(found.z_N[kept], z.detach())
    assert not found.loss_N[~kept].any()
    for a, b in zip(torch.autograd.grad(found.total, (h, w)), torch.autograd.grad(expected, (h, w)), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


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
