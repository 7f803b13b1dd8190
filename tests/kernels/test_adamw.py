"""AdamW over split float32 weights: the split loses no bit, and the update is torch's own in float32."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.adamw import adamw_step, join_float32, split_float32

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]


@settings(deadline=None)
@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=64))
def test_a_split_joins_to_the_same_bits_and_its_weight_is_nearest(values: list[float]) -> None:
    master = torch.tensor(values, dtype=torch.float32)
    weight, remainder = split_float32(master)
    assert torch.equal(join_float32(weight, remainder).view(torch.int32), master.view(torch.int32))
    rounded = master.to(torch.bfloat16)
    # Only ties differ from torch's rounding (to even), by which neither is nearer; the largest round up to infinity.
    finite = weight.isfinite() & rounded.isfinite()
    ours, torchs = (weight.double() - master.double()).abs(), (rounded.double() - master.double()).abs()
    assert torch.equal(ours[finite], torchs[finite])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(1,), (3, 2049), (2, 64, 80)])
def test_updates_are_torchs_in_float32(device: str, shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    master = torch.randn(shape, generator=generator).to(device)
    expected = torch.nn.Parameter(master.clone())
    hyper = {"lr": 3e-3, "eps": 1e-8, "weight_decay": 0.1}
    torchs = torch.optim.AdamW([expected], betas=(0.9, 0.95), **hyper)
    weight, remainder = split_float32(master)
    exp_avg, exp_avg_sq = torch.zeros_like(master), torch.zeros_like(master)
    scale = torch.tensor(0.25, device=device)
    for step in range(1, 6):
        gradient = torch.randn(shape, generator=generator).to(device, torch.bfloat16)
        expected.grad = gradient.float() * 0.25
        torchs.step()
        adamw_step(weight, remainder, exp_avg, exp_avg_sq, gradient, scale, step=step, beta1=0.9, beta2=0.95, **hyper)
    torch.testing.assert_close(join_float32(weight, remainder), expected.detach(), atol=2e-6, rtol=2e-6)
    torch.testing.assert_close(exp_avg, torchs.state[expected]["exp_avg"], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(exp_avg_sq, torchs.state[expected]["exp_avg_sq"], atol=1e-6, rtol=1e-5)
    assert not torch.equal(join_float32(weight, remainder), weight.float()), "the remainder holds something"


@pytest.mark.parametrize("device", DEVICES)
def test_bfloat16_moments_stay_near_float32s(device: str) -> None:
    generator = torch.Generator().manual_seed(0)
    master = torch.randn(4096, generator=generator).to(device)
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        weight, remainder = split_float32(master)
        exp_avg, exp_avg_sq = (torch.zeros(4096, device=device, dtype=dtype) for _ in range(2))
        draw = torch.Generator().manual_seed(1)
        for step in range(1, 21):
            gradient = torch.randn(4096, generator=draw).to(device, torch.bfloat16)
            adamw_step(
                weight, remainder, exp_avg, exp_avg_sq, gradient, torch.ones((), device=device),
                step=step, lr=1e-3, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.0,
            )  # fmt: skip
        results.append(join_float32(weight, remainder) - master)
    difference = (results[1] - results[0]).norm() / results[0].norm()
    assert 0 < float(difference) < 0.01


def test_small_updates_add_up_where_bfloat16_would_lose_them() -> None:
    weight, remainder = split_float32(torch.ones(4))
    moments = torch.zeros(4), torch.zeros(4)
    for step in range(1, 101):
        adamw_step(
            weight, remainder, *moments, torch.ones(4, dtype=torch.bfloat16), torch.ones(()),
            step=step, lr=1e-5, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.0,
        )  # fmt: skip
    assert torch.equal(weight, torch.ones(4, dtype=torch.bfloat16))
    torch.testing.assert_close(join_float32(weight, remainder), torch.full((4,), 1 - 1e-3), atol=5e-6, rtol=0)


def test_wrong_arguments_are_named() -> None:
    weight, remainder = split_float32(torch.ones(2, 3))
    a, b, g, scale = torch.zeros(2, 3), torch.zeros(2, 3), torch.ones(2, 3), torch.ones(())
    numbers = {"step": 1, "lr": 1e-3, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.0}
    with pytest.raises(ValueError, match="gradient must be"):
        adamw_step(weight, remainder, a, b, g.half(), scale, **numbers)
    with pytest.raises(ValueError, match="exp_avg must be contiguous"):
        adamw_step(weight, remainder, torch.zeros(3, 2).T, b, g.bfloat16(), scale, **numbers)
    with pytest.raises(ValueError, match="master"):
        split_float32(torch.ones(2, dtype=torch.float64))
