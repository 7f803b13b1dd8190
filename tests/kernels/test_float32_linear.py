"""The product in three parts against float64, with gradients, beside a plain float32 product's errors."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.float32_linear import float32_linear, in_three

NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
COMPILER = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=COMPILER)])
def test_three_parts_are_the_number(compiled: bool) -> None:
    split = torch.compile(in_three) if compiled else in_three
    x = torch.randn(100_000, generator=torch.Generator().manual_seed(0)) * 10.0 ** torch.arange(100_000).remainder(9)
    parts = split(x)
    assert all(part.dtype == torch.bfloat16 for part in parts)
    total = sum(part.double() for part in reversed(parts))
    assert torch.equal(total, x.double())


@pytest.mark.parametrize(
    ("device", "compiled"),
    [("cpu", False), *(pytest.param("cuda", compiled, marks=NEEDS_CUDA) for compiled in (False, True))],
)
@pytest.mark.parametrize("shape", [(1, 8, 1), (300, 64, 5), (2048, 2048, 64)])
def test_results_and_gradients_are_a_float32_product_s(
    device: str, compiled: bool, shape: tuple[int, int, int]
) -> None:
    product = torch.compile(float32_linear, dynamic=False) if compiled else float32_linear
    T, D, E = shape
    generator = torch.Generator().manual_seed(T)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator).to(device)

    x, weight, grad = draw(T, D).bfloat16(), draw(E, D) * D**-0.5, draw(T, E)

    def run(dtype: torch.dtype | None) -> list[Tensor]:
        a, b = (t.clone() if dtype is None else t.to(dtype) for t in (x, weight))
        a.requires_grad_(), b.requires_grad_()
        y = product(a, b) if dtype is None else F.linear(a, b)
        return [y.detach(), *torch.autograd.grad(y, (a, b), grad.to(y.dtype))]

    exact, plain, ours = run(torch.float64), run(torch.float32), run(None)
    assert [t.dtype for t in ours] == [torch.float32, torch.bfloat16, torch.float32]
    for name, right, theirs, found in zip(("y", "dx", "dw"), exact, plain, ours, strict=True):
        scale = float(right.abs().max())
        error, other = (float((t.double() - right).abs().max()) / scale for t in (found, theirs))
        # dx is rounded to bfloat16 at the end; the others are as near as tensor cores add up (measured: 3e-6 over 2048
        # products, where two parts for three would be 1e-5 off).
        assert error <= (2.0**-8 if name == "dx" else max(2 * other, 2.0**-18)), (name, error, other)
