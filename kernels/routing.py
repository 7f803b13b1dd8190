"""Routing metadata of a dropless mixture of experts: which row of the sorted token list belongs to which expert.

Everything is computed by torch operations on the index's own device, from shapes that the host knows: nothing is copied
to the host and nothing waits. It does not choose experts (the router is the model's) and it computes no products.

Legend: T tokens, E experts, K chosen experts a token.
"""

from __future__ import annotations

import os
from typing import NamedTuple

import torch
from torch import Tensor


class Routing(NamedTuple):
    """Assignments sorted by expert. An assignment is the pair (token t, choice k), numbered t*K + k.

    All tensors are int32 on the index's device; T*K must stay below 2^31.
    """

    order: Tensor
    """[T*K] assignment at each sorted position; stable, so assignments of one expert keep their order."""
    inverse: Tensor
    """[T*K] sorted position of each assignment: order[inverse[i]] == i."""
    tokens_per_expert: Tensor
    """[E] assignments of each expert."""
    offsets: Tensor
    """[E+1] expert e owns sorted positions offsets[e] to offsets[e+1]."""
    tile_expert: Tensor
    """[cdiv(T*K, tile_rows) + E] expert of each tile of rows; E marks an inert tile past the last."""
    tile_row: Tensor
    """[same] first sorted position of each tile; a tile never spans two experts."""
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

    device = expert_index_TK.device
    sorted_expert, order = torch.sort(expert_index_TK.reshape(-1).to(torch.int32), stable=True)
    inverse = torch.empty_like(order, dtype=torch.int32)
    inverse.scatter_(0, order, torch.arange(T * K, dtype=torch.int32, device=device))
    # Searching the sorted list counts without bincount, which would copy the largest index to the host.
    experts = torch.arange(num_experts + 1, dtype=torch.int32, device=device)
    offsets = torch.searchsorted(sorted_expert, experts, out_int32=True)
    tokens_per_expert = offsets[1:] - offsets[:-1]

    tile_rows = _tile_rows(T * K, num_experts)
    tiles_per_expert = (tokens_per_expert + (tile_rows - 1)) // tile_rows
    tile_end = torch.cumsum(tiles_per_expert, 0, dtype=torch.int32)
    # Each expert wastes less than one tile, which bounds the tiles from shapes alone.
    tile = torch.arange(-(-T * K // tile_rows) + num_experts, dtype=torch.int32, device=device)
    tile_expert = torch.searchsorted(tile_end, tile, right=True, out_int32=True)
    owner = tile_expert.clamp(max=num_experts - 1)
    tile_row = offsets[owner] + (tile - (tile_end - tiles_per_expert)[owner]) * tile_rows
    return Routing(order.to(torch.int32), inverse, tokens_per_expert, offsets, tile_expert, tile_row, tile_rows)


def _tile_rows(assignments: int, num_experts: int) -> int:
    mean_load = -(-assignments // num_experts)
    for rows in (16, 32, 64):
        if mean_load <= rows:
            return rows
    return 128
