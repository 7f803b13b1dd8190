"""Routing metadata of a dropless mixture of experts: which row of the sorted token list belongs to which expert.

Everything is computed on the index's own device, from shapes that the host knows: nothing is copied to the host and
nothing waits. On a GPU three kernels do it (kernels/sorting.py), elsewhere torch. It does not choose experts (the
router is the model's) and it computes no products.

Legend: T tokens, E experts, K chosen experts a token.
"""

from __future__ import annotations

import os
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from kernels.backend import interpreted

# order to tile_count of a Routing, in its order
Sorted: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
_BLOCK = 512  # assignments that one program of the sort places


class Routing(NamedTuple):
    """Assignments sorted by expert. An assignment is the pair (token t, choice k), numbered t*K + k.

    All tensors are int32 on the index's device; T*K must stay below 2^31.
    """

    order: Tensor
    """[T*K] assignment at each sorted position; stable, so assignments of one expert keep their order."""
    inverse: Tensor
    """[T*K] sorted position of each assignment: order[inverse[i]] == i."""
    token: Tensor
    """[T*K] token of each sorted position: order // K."""
    tokens_per_expert: Tensor
    """[E] assignments of each expert."""
    offsets: Tensor
    """[E+1] expert e owns sorted positions offsets[e] to offsets[e+1]."""
    tile_expert: Tensor
    """[cdiv(T*K, tile_rows) + E] expert of each tile of rows; E marks an inert tile past the last."""
    tile_row: Tensor
    """[same] first sorted position of each tile; a tile never spans two experts."""
    tile_count: Tensor
    """[1] tiles that are not inert."""
    tile_rows: int
    """Rows of a tile, a power of two from 16 to 128, chosen from the mean load T*K/E."""


def route(expert_index_TK: Tensor, num_experts: int) -> Routing:
    """Sort assignments by expert.

    Args:
        expert_index_TK: [T, K] int32 or int64, chosen experts in [0, num_experts); the range is checked only with
            the environment variable LAKEMOE_DEBUG=1, because that waits for the device.
        num_experts: E, at least K.

    Raises:
        ValueError: the index has a wrong shape, dtype or (debug) range, or K > E.
    """
    if expert_index_TK.dim() != 2:
        raise ValueError(f"expert_index_TK must have shape [T, K], not {list(expert_index_TK.shape)}")
    if expert_index_TK.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"expert_index_TK must be int32 or int64, not {expert_index_TK.dtype}")
    T, K = expert_index_TK.shape
    if num_experts < 1:
        raise ValueError(f"num_experts must be at least 1, not {num_experts}")
    if not 1 <= K <= num_experts:
        raise ValueError(f"expert_index_TK chooses K={K} experts a token, which must be from 1 to E={num_experts}")
    if T * K >= 2**31:
        raise ValueError(f"expert_index_TK holds T*K={T * K} assignments, which must be fewer than 2^31")
    if os.environ.get("LAKEMOE_DEBUG") == "1" and T > 0:
        low, high = int(expert_index_TK.min()), int(expert_index_TK.max())
        if low < 0 or high >= num_experts:
            raise ValueError(f"expert_index_TK holds {low} to {high}, which must lie in 0 to {num_experts - 1}")

    found: Sorted = _sort(expert_index_TK, num_experts)
    return Routing(*found, tile_rows=_tile_rows(T * K, num_experts))


@torch.library.custom_op("lakemoe::route", mutates_args=())
def _sort(
    expert_index_TK: Tensor, num_experts: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Everything of a Routing but tile_rows, which follows from shapes."""
    T, K = expert_index_TK.shape
    tile_rows = _tile_rows(T * K, num_experts)
    on_gpu = expert_index_TK.is_cuda or interpreted()
    sort = _by_triton if on_gpu and T * K else _by_torch
    return sort(expert_index_TK.contiguous(), num_experts, tile_rows)


@_sort.register_fake
def _(expert_index_TK: Tensor, num_experts: int) -> tuple[Tensor, ...]:
    T, K = expert_index_TK.shape
    tiles = _tiles(T * K, num_experts, _tile_rows(T * K, num_experts))
    sizes = (T * K, T * K, T * K, num_experts, num_experts + 1, tiles, tiles, 1)
    return tuple(expert_index_TK.new_empty(size, dtype=torch.int32) for size in sizes)


def _tiles(assignments: int, num_experts: int, tile_rows: int) -> int:
    # Each expert wastes less than one tile, which bounds the tiles from shapes alone.
    return -(-assignments // tile_rows) + num_experts


def _by_torch(expert_index_TK: Tensor, num_experts: int, tile_rows: int) -> Sorted:
    T, K = expert_index_TK.shape
    device = expert_index_TK.device
    sorted_expert, order = torch.sort(expert_index_TK.reshape(-1).to(torch.int32), stable=True)
    order = order.to(torch.int32)
    inverse = torch.empty_like(order)
    inverse.scatter_(0, order.long(), torch.arange(T * K, dtype=torch.int32, device=device))
    experts = torch.arange(num_experts + 1, dtype=torch.int32, device=device)
    offsets = torch.searchsorted(sorted_expert, experts, out_int32=True)
    tokens_per_expert = offsets[1:] - offsets[:-1]
    tiles_per_expert = (tokens_per_expert + (tile_rows - 1)) // tile_rows
    tile_end = torch.cumsum(tiles_per_expert, 0, dtype=torch.int32)
    tile = torch.arange(_tiles(T * K, num_experts, tile_rows), dtype=torch.int32, device=device)
    tile_expert = torch.searchsorted(tile_end, tile, right=True, out_int32=True)
    first = torch.nn.functional.pad(tile_end, (1, 0))[tile_expert]
    tile_row = offsets[tile_expert] + (tile - first) * tile_rows
    return order, inverse, order // K, tokens_per_expert, offsets, tile_expert, tile_row, tile_end[-1:].clone()


def _by_triton(expert_index_TK: Tensor, num_experts: int, tile_rows: int) -> Sorted:
    from kernels.sorting import count_kernel, place_kernel, scan_kernel

    N, K = expert_index_TK.numel(), expert_index_TK.shape[1]
    tiles = _tiles(N, num_experts, tile_rows)
    blocks = -(-N // _BLOCK)
    bins = 1 << num_experts.bit_length()
    chunk = max(1, min(_BLOCK, 8192 // bins))

    def new(*size: int) -> Tensor:
        return torch.empty(size, dtype=torch.int32, device=expert_index_TK.device)

    order, inverse, token, counts = new(N), new(N), new(N), new(blocks, num_experts)
    tokens_per_expert, offsets, tile_end = new(num_experts), new(num_experts + 1), new(num_experts)
    tile_expert, tile_row, tile_count = new(tiles), new(tiles), new(1)
    with torch.cuda.device_of(expert_index_TK):  # Triton launches on the current device
        count_kernel[(blocks,)](expert_index_TK, counts, N, num_experts, BINS=bins, BLOCK=_BLOCK)
        scan_kernel[(1,)](
            counts, tokens_per_expert, offsets, tile_end, tile_count, blocks, num_experts,
            TILE_ROWS=tile_rows, BINS=bins, CHUNK=chunk, num_warps=8,
        )  # fmt: skip
        place_kernel[(blocks + -(-tiles // _BLOCK),)](
            expert_index_TK, counts, offsets, tile_end, order, inverse, token, tile_expert, tile_row,
            N, num_experts, blocks, tiles, K, TILE_ROWS=tile_rows, BINS=bins, BLOCK=_BLOCK, CHUNK=chunk,
        )  # fmt: skip
    return order, inverse, token, tokens_per_expert, offsets, tile_expert, tile_row, tile_count


def _tile_rows(assignments: int, num_experts: int) -> int:
    # Most loads are within two standard deviations of the mean: an expert's weights are then read by one tile of rows.
    mean = assignments / num_experts
    for rows in (16, 32, 64):
        if mean + 2 * mean**0.5 <= rows:
            return rows
    return 128
