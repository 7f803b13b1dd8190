"""Triton kernels of the routing: a stable counting sort of assignments by expert, and the map of row tiles.

    count_kernel    counts[b, e] = assignments of expert e in block b
    scan_kernel     sums of these over earlier blocks, and of their totals over earlier experts; tiles likewise
    place_kernel    position = offsets[e] + the sum over earlier blocks + the rank in the block

Three launches, whose grids follow from shapes alone. Counting sort: Knuth, TAOCP volume 3, section 5.2, algorithm D.

Legend: N assignments, E experts, B blocks of assignments.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

# What follows from the number of tokens is not specialised: no new number compiles anything again.


@triton.jit(do_not_specialize=["N"])
def count_kernel(index, counts, N, E, BINS: tl.constexpr, BLOCK: tl.constexpr):
    """BINS: a power of two above E, whose bin takes what lies past the end."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    expert = tl.load(index + i, i < N, other=E).to(tl.int32)
    bins = tl.arange(0, BINS)
    tl.store(counts + tl.program_id(0) * E + bins, tl.histogram(expert, BINS), bins < E)


@triton.jit(do_not_specialize=["blocks"])
def scan_kernel(
    counts, tokens_per_expert, offsets, tile_end, tile_count, blocks, E,
    TILE_ROWS: tl.constexpr, BINS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One program: counts become the sums over earlier blocks; totals, offsets and tiles by expert."""
    bins = tl.arange(0, BINS)
    total = tl.zeros((BINS,), tl.int32)
    for start in range(0, blocks, CHUNK):
        b = start + tl.arange(0, CHUNK)
        mask = (b < blocks)[:, None] & (bins < E)[None, :]
        at = counts + b[:, None] * E + bins[None, :]
        here = tl.load(at, mask, other=0)
        tl.store(at, total[None, :] + tl.cumsum(here, 0) - here, mask)
        total += tl.sum(here, 0)
    tl.store(tokens_per_expert + bins, total, bins < E)
    tl.store(offsets + bins + 1, tl.cumsum(total, 0), bins < E)
    tl.store(offsets, 0)
    tiles = tl.cdiv(total, TILE_ROWS)
    tl.store(tile_end + bins, tl.cumsum(tiles, 0), bins < E)
    tl.store(tile_count, tl.sum(tiles, 0))


@triton.jit(do_not_specialize=["N", "blocks", "tiles"])
def place_kernel(
    index, counts, offsets, tile_end, order, inverse, token, tile_expert, tile_row, N, E, blocks, tiles, top_k,
    TILE_ROWS: tl.constexpr, BINS: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The first `blocks` programs place a block of assignments each, the others map tiles to experts and rows."""
    pid = tl.program_id(0)
    bins = tl.arange(0, BINS)
    if pid < blocks:
        before = tl.load(counts + pid * E + bins, bins < E, other=0) + tl.load(offsets + bins, bins < E, other=0)
        for start in range(0, BLOCK, CHUNK):
            i = pid * BLOCK + start + tl.arange(0, CHUNK)
            expert = tl.load(index + i, i < N, other=E).to(tl.int32)
            is_expert = (expert[:, None] == bins[None, :]).to(tl.int32)
            position = tl.sum(is_expert * (before[None, :] + tl.cumsum(is_expert, 0) - 1), 1)
            tl.store(inverse + i, position, i < N)
            tl.store(order + position, i, i < N)
            tl.store(token + position, i // top_k, i < N)
            before += tl.sum(is_expert, 0)
    else:
        for start in range(0, BLOCK, CHUNK):
            tile = (pid - blocks) * BLOCK + start + tl.arange(0, CHUNK)
            end = tl.load(tile_end + bins, bins < E, other=2147483647)
            expert = tl.sum((end[None, :] <= tile[:, None]).to(tl.int32), 1)
            own = expert < E
            first = tl.load(tile_end + expert - 1, own & (expert > 0), other=0)
            row = tl.load(offsets + expert, own, other=N) + (tile - first) * TILE_ROWS
            tl.store(tile_expert + tile, expert, tile < tiles)
            tl.store(tile_row + tile, row, tile < tiles)
