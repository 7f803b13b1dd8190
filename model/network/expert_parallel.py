"""Experts on several ranks: each token's vector goes to the ranks that hold its experts and the results come back.

    dispatch    assignments sorted by expert, and so by rank; one all-to-all of the counts, then of vectors and weights
    compute     the layer of kernels/moe.py with one weighted choice a row, over the experts that lie here
    combine     the same all-to-all backwards; each token adds up its K rows, which come weighted

With several chunks of tokens, each has all-to-alls of its own, on a stream of their own: while one chunk's experts
compute, another's rows travel (as Tutel's pipelining, Hwang et al. 2023, section 3.3). Autograd runs a node's backward
on the stream of its forward and waits for what the node needs alone, so backward overlaps in the same way. On GPUs of
one host that costs more than it hides (benchmarks/README.md, "Several GPUs").

Nothing is dropped or padded: each rank receives as many rows as were sent (GShard's layer, Lepikhin et al. 2021,
without its capacity). The counts of rows must be known to the host, the one copy to it in a layer, of all chunks
together. Backward runs the all-to-alls the other way and needs no copy. Kept for backward are the rows that were
received and what the experts keep of them; the rows as they were sent and as they came back are not.

Legend: T tokens of a chunk, D width, E experts in all, K chosen, F expert width, P ranks of the group, C chunks,
H = E/P experts here, N = T*K rows sent, R rows received.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed import ProcessGroup

from kernels.moe import dropless_moe
from kernels.permute import permute, unpermute
from kernels.routing import route
from model.network.distributed import local_part


@torch.compiler.disable
def expert_parallel_moe(
    x_TD: Tensor,
    expert_index_TK: Tensor,
    expert_weight_TK: Tensor,
    w1: Tensor,
    v1: Tensor,
    w2: Tensor,
    activation: str,
    group: ProcessGroup,
    chunks: int = 1,
) -> Tensor:
    """What dropless_moe gives where all experts are: [T, D] of this rank's tokens.

    Every rank of the group calls it with as many chunks, of its own tokens, which may be more or fewer than others'.
    w1, v1, w2: this rank's experts, [E / P, F, D] each, plain or the local part of distributed tensors; rank p holds
    the experts p * E / P to (p + 1) * E / P - 1.
    """
    w1, v1, w2 = map(local_part, (w1, v1, w2))
    ranks, here, K = group.size(), w1.shape[0], expert_index_TK.shape[1]
    parts = [x_TD.tensor_split(chunks), expert_index_TK.tensor_split(chunks), expert_weight_TK.tensor_split(chunks)]
    routings = [route(index_TK, here * ranks) for index_TK in parts[1]]
    sent_PCH = torch.stack([routing.tokens_per_expert.view(ranks, here) for routing in routings], 1)
    received_PCH = torch.empty_like(sent_PCH)
    dist.all_to_all_single(received_PCH, sent_PCH, group=group)
    # Both at once: the only wait for the device.
    sent_CP, received_CP = torch.stack((sent_PCH.sum(2), received_PCH.sum(2))).transpose(1, 2).tolist()
    travelling = []
    for x, weight_TK, routing, sent, received in zip(parts[0], parts[2], routings, sent_CP, received_CP, strict=True):
        rows = permute(x, routing.inverse), permute(weight_TK.float().reshape(-1, 1), routing.inverse)
        travelling.append(_exchange(rows, received, sent, group, beside=chunks > 1))
    # Of each sending rank the rows come sorted by expert.
    experts_PH = torch.arange(here, device=x_TD.device).repeat(ranks)
    returning = []
    for number, (arrived, (x_RD, weight_R1)) in enumerate(travelling):
        sent, received = sent_CP[number], received_CP[number]
        counts = received_PCH[:, number].flatten()
        expert_R = experts_PH.repeat_interleave(counts, output_size=sum(received))
        _wait(arrived)
        y_RD = dropless_moe(x_RD, expert_R[:, None], weight_R1, w1, v1, w2, activation=activation)
        returning.append(_exchange((y_RD,), sent, received, group, beside=chunks > 1))
    del travelling
    out = []
    for routing, (arrived, (y_ND,)) in zip(routings, returning, strict=True):
        _wait(arrived)
        out.append(unpermute(y_ND, routing.inverse, K))
    return torch.cat(out)


class _AllToAll(torch.autograd.Function):
    """Rows to and from every rank of the group, ``output`` and ``input`` of them; the gradient goes the other way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, output: list[int], input: list[int], group: ProcessGroup) -> Tensor:
        ctx.sizes = output, input, group
        found = x.new_empty(sum(output), *x.shape[1:])
        dist.all_to_all_single(found, x.contiguous(), output, input, group)
        return found

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        output, input, group = ctx.sizes
        found = grads[0].new_empty(sum(input), *grads[0].shape[1:])
        dist.all_to_all_single(found, grads[0].contiguous(), input, output, group)
        return found, None, None, None


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def _exchange(
    tensors: tuple[Tensor, ...], output: list[int], input: list[int], group: ProcessGroup, *, beside: bool
) -> tuple[torch.cuda.Event | None, tuple[Tensor, ...]]:
    """All-to-alls of each, and when they are done where that is not at once.

    beside: on a GPU, on the communication's stream, behind all that was asked for so far.
    """
    device = tensors[0].device
    if not beside or device.type != "cuda":
        return None, tuple(_AllToAll.apply(x, output, input, group) for x in tensors)
    main, side = torch.cuda.current_stream(device), _side_stream(device)
    side.wait_stream(main)
    with torch.cuda.stream(side):
        found = tuple(_AllToAll.apply(x, output, input, group) for x in tensors)
        done = side.record_event()
    # Memory belongs to the stream that it was made on, and may be made anew there while the other still uses it.
    for x, y in zip(tensors, found, strict=True):
        x.record_stream(side)
        y.record_stream(main)
    return done, found


def _wait(done: torch.cuda.Event | None) -> None:
    if done is not None:
        torch.cuda.current_stream().wait_event(done)
