"""The layers that lakemoe's is measured beside: each takes the chosen experts and multiplies, from plain PyTorch up.

    dense                 one unfused SwiGLU by cuBLAS with the same multiply-adds: T tokens through width K*F
    grouped_mm            rows sorted by expert, torch's grouped_mm, rows returned; _compiled: the same by torch.compile
    padded                every expert padded to the fullest one's load, torch.bmm (Tutel's way); waits for a count
    loop                  a loop over the experts, each with its own rows
    lakemoe               kernels.moe.dropless_moe
    megablocks, scattermoe, sonicmoe    where they can be imported (benchmarks/moe_others.py)

The peers get what a careful user would write: gathers whose backward is a gather too (PyTorch's own would add rows by
atomics), and weights in the layout that their product takes without a copy.

Legend: T tokens, D model width, F expert width, E experts, K chosen experts a token, N = T*K, C capacity.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.moe import dropless_moe

# (x [T, D], index [T, K], weight [T, K], the leaves that `prepare` made) -> y [T, D]
Experts = Callable[..., Tensor]


def as_they_are(w1_EFD: Tensor, v1_EFD: Tensor, w2_EFD: Tensor) -> tuple[Tensor, ...]:
    return w1_EFD, v1_EFD, w2_EFD


def gradients_as_they_are(gradients: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return tuple(gradients)


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """A layer. `prepare` brings w1, v1, w2 into its own layout, outside the clock; `gradients` brings theirs back."""

    name: str
    experts: Experts
    prepare: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]] = as_they_are
    gradients: Callable[[Sequence[Tensor]], tuple[Tensor, ...]] = gradients_as_they_are


class _Take(torch.autograd.Function):
    """rows[index // copies], where index is a permutation of the rows' copies; both ways are gathers."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor, inverse: Tensor, copies: int) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.copies = copies
        return rows.index_select(0, index // copies if copies > 1 else index)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (inverse,) = ctx.saved_tensors
        rows = gradients[0].index_select(0, inverse)
        if ctx.copies > 1:
            rows = rows.view(-1, ctx.copies, rows.shape[1]).sum(1)
        return rows, None, None, None


def take(rows: Tensor, index: Tensor, inverse: Tensor, copies: int = 1) -> Tensor:
    result: Tensor = _Take.apply(rows, index, inverse, copies)
    return result


def sort(index_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """(order [N], inverse [N], ends [E] int32) of the assignments sorted by expert, without waiting for the device."""
    expert, order = index_TK.reshape(-1).sort(stable=True)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.numel(), device=order.device)
    experts = torch.arange(num_experts, device=order.device)
    return order, inverse, torch.searchsorted(expert, experts, right=True, out_int32=True)


def combine(out_ND: Tensor, order: Tensor, inverse: Tensor, weight_TK: Tensor) -> Tensor:
    """Each token's sorted rows, weighted and added in float32."""
    T, K = weight_TK.shape
    out_TKD = take(out_ND, inverse, order).view(T, K, -1)
    return (out_TKD * weight_TK.unsqueeze(-1)).sum(1).to(out_ND.dtype)


def dense(x_TD: Tensor, index: Tensor, weight: Tensor, w1_FD: Tensor, v1_FD: Tensor, w2_FD: Tensor) -> Tensor:
    """One expert for all tokens; `index` and `weight` have nothing to say."""
    return (F.silu(x_TD @ w1_FD.t()) * (x_TD @ v1_FD.t())) @ w2_FD


def grouped_mm(x: Tensor, index: Tensor, weight: Tensor, w1_EFD: Tensor, v1_EFD: Tensor, w2_EFD: Tensor) -> Tensor:
    order, inverse, ends = sort(index, w1_EFD.shape[0])
    x_ND = take(x, order, inverse, index.shape[1])
    h_NF = F.grouped_mm(x_ND, w1_EFD.transpose(1, 2), offs=ends)
    u_NF = F.grouped_mm(x_ND, v1_EFD.transpose(1, 2), offs=ends)
    return combine(F.grouped_mm(F.silu(h_NF) * u_NF, w2_EFD, offs=ends), order, inverse, weight)


class _Spread(torch.autograd.Function):
    """Rows to their slots of a buffer of zeros; the gradient takes them from there."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, slot: Tensor, slots: int) -> Tensor:
        ctx.save_for_backward(slot)
        return rows.new_zeros(slots, rows.shape[1]).index_copy_(0, slot, rows)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return gradients[0].index_select(0, ctx.saved_tensors[0]), None, None


class _Collect(torch.autograd.Function):
    """Rows from their slots; the gradient is zero in the slots that no row has."""

    @staticmethod
    def forward(ctx: Any, buffer: Tensor, slot: Tensor) -> Tensor:
        ctx.save_for_backward(slot)
        ctx.slots = buffer.shape[0]
        return buffer.index_select(0, slot)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        gradient = gradients[0]
        buffer = gradient.new_zeros(ctx.slots, gradient.shape[1])
        return buffer.index_copy_(0, ctx.saved_tensors[0], gradient), None


def padded(x: Tensor, index: Tensor, weight: Tensor, w1_EFD: Tensor, v1_EFD: Tensor, w2_EFD: Tensor) -> Tensor:
    E, _, D = w1_EFD.shape
    order, inverse, ends = sort(index, E)
    begins = F.pad(ends[:-1], (1, 0))
    C = int((ends - begins).max())
    expert_N = index.reshape(-1)[order]
    slot_N = expert_N * C + torch.arange(order.numel(), device=x.device) - begins[expert_N]
    x_ECD = _Spread.apply(take(x, order, inverse, index.shape[1]), slot_N, E * C).view(E, C, D)
    a_ECF = F.silu(torch.bmm(x_ECD, w1_EFD.transpose(1, 2))) * torch.bmm(x_ECD, v1_EFD.transpose(1, 2))
    out_ND: Tensor = _Collect.apply(torch.bmm(a_ECF, w2_EFD).view(E * C, D), slot_N)
    return combine(out_ND, order, inverse, weight)


def loop(x: Tensor, index: Tensor, weight: Tensor, w1_EFD: Tensor, v1_EFD: Tensor, w2_EFD: Tensor) -> Tensor:
    y_TD = torch.zeros(x.shape, dtype=weight.dtype, device=x.device)
    # unbind: indexing in the loop would make and add up E gradients of all experts' size.
    for e, (w1_FD, v1_FD, w2_FD) in enumerate(zip(w1_EFD.unbind(), v1_EFD.unbind(), w2_EFD.unbind(), strict=True)):
        t, k = torch.nonzero(index == e, as_tuple=True)
        x_nD = x[t]
        out_nD = (F.silu(x_nD @ w1_FD.t()) * (x_nD @ v1_FD.t())) @ w2_FD
        y_TD = y_TD.index_add(0, t, weight[t, k].unsqueeze(1) * out_nD)
    return y_TD.to(x.dtype)


def contestants() -> dict[str, Contestant]:
    """All that can be imported here, `dense` first."""
    from benchmarks import moe_others

    layers: dict[str, Experts] = {
        "grouped_mm": grouped_mm,
        # For the shape at hand, which is the compiler's best case.
        "grouped_mm_compiled": torch.compile(grouped_mm, fullgraph=True, dynamic=False),
        "padded": padded,
        "loop": loop,
        "lakemoe": dropless_moe,
    }
    only = Contestant(
        name="dense",
        experts=dense,
        # Indexing within the layer would put a copy of each gradient on dense's clock.
        prepare=lambda w1, v1, w2: (w1[0], v1[0], w2[0]),
        gradients=lambda found: tuple(gradient.unsqueeze(0) for gradient in found),
    )
    ours = {name: Contestant(name=name, experts=experts) for name, experts in layers.items()}
    return {"dense": only} | ours | moe_others.importable()
