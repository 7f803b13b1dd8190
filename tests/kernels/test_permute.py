"""Rows to the order of their experts and back, against plain indexing, with gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.permute import permute, unpermute
from kernels.routing import Routing, route

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")),
]


def chosen(tokens: int, experts: int, top_k: int, seed: int, device: str) -> Routing:
    generator = torch.Generator().manual_seed(seed)
    index = torch.rand(tokens, experts, generator=generator).topk(top_k, dim=1).indices
    return route(index.to(device), experts)


@pytest.mark.parametrize("device", DEVICES)
@given(
    tokens=st.integers(0, 40), top_k=st.integers(1, 4), width=st.integers(1, 70), seed=st.integers(0, 1000),
    strided=st.booleans(),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_each_is_the_others_gradient_and_plain_indexing(
    device: str, tokens: int, top_k: int, width: int, seed: int, strided: bool
) -> None:
    routing = chosen(tokens, 5, top_k, seed, device)
    generator = torch.Generator().manual_seed(seed)

    def draw(rows: int) -> Tensor:
        whole = torch.randn(rows, 2 * width, generator=generator).to(device)
        return (whole[:, ::2] if strided else whole[:, :width].contiguous()).requires_grad_()

    x, rows = draw(tokens), draw(tokens * top_k)
    permuted = permute(x, routing.inverse)
    assert torch.equal(permuted, x[routing.token.long()])
    added = unpermute(rows, routing.inverse, top_k)
    torch.testing.assert_close(added, rows[routing.inverse.long()].view(tokens, top_k, width).sum(1))
    if not tokens:
        return
    dx, drows = torch.autograd.grad([permuted, added], [x, rows], [rows.detach(), x.detach()])
    assert torch.equal(dx, unpermute(rows.detach(), routing.inverse, top_k))
    assert torch.equal(drows, permute(x.detach(), routing.inverse))
    # Rows of assignments go to the same places.
    assert torch.equal(permute(rows.detach(), routing.inverse), rows.detach()[routing.order.long()])


@pytest.mark.parametrize("device", DEVICES)
def test_sums_are_of_float32(device: str) -> None:
    routing = chosen(64, 8, 8, 0, device)
    rows = (torch.full((512, 16), 2.0**-9) + torch.eye(512, 16)).to(device, torch.bfloat16)
    expected = rows[routing.inverse.long()].view(64, 8, 16).float().sum(1).to(torch.bfloat16)
    assert torch.equal(unpermute(rows, routing.inverse, 8), expected)
