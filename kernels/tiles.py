"""How large the tiles of each product are, and how they are spread over a GPU: a table, and a rule beyond it."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Tile:
    """One product's tile: rows x columns of the result, `depth` summed over at a time.

    warps, stages: of one program, and how many depths are in flight. group: row tiles that walk through the columns
    together. programs: of one multiprocessor. flatten: the next tile's loads start while this one is stored.
    copy: the tokens' rows are gathered by a copy beforehand, instead of by the product.
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    group: int = 8
    programs: int = 1
    flatten: bool = True
    copy: bool = False


@dataclass(frozen=True)
class Tiles:
    """The tiles of a layer's products: forward up and down; backward through down, to x, and to the weights."""

    up: Tile
    down: Tile
    down_backward: Tile
    to_x: Tile
    to_weights_up: Tile
    to_weights_down: Tile


# Measured by benchmarks/tune_moe.py on an H200, 2026-11-24 (torch 2.11, Triton 3.6, bfloat16), at the six shapes of
# benchmarks/README.md. Where a tile's sum is long, its store is a small part of its time, and a plain loop runs faster
# than one whose loads run ahead into the next tile.
_WIDE = Tiles(
    up=Tile(128, 256, 64, 8, 3, group=16, copy=True),
    down=Tile(128, 256, 64, 8, 3, flatten=False),
    down_backward=Tile(128, 256, 64, 8, 3, group=16, copy=True),
    to_x=Tile(128, 256, 64, 8, 3, flatten=False),
    to_weights_up=Tile(128, 256, 64, 8, 3, flatten=False, copy=True),
    to_weights_down=Tile(128, 256, 64, 8, 3, copy=True),
)
_NARROW = Tiles(
    up=Tile(128, 256, 64, 8, 3, copy=True),
    down=Tile(128, 256, 64, 8, 3),
    down_backward=Tile(128, 256, 64, 8, 3, copy=True),
    to_x=Tile(128, 256, 64, 8, 3),
    to_weights_up=Tile(128, 256, 64, 8, 3, copy=True),
    to_weights_down=Tile(128, 256, 64, 8, 3, copy=True),
)
_WIDE_FROM = 4096  # expert width
# Few tokens an expert: the weights' way from memory is all that counts, and more of it is under way in narrow tiles;
# narrower ones yet where those are fewer than multiprocessors (same card, 2026-11-26).
_FEW = Tile(128, 128, 64, 4, 6)
_FEWER = Tile(128, 64, 64, 4, 8)
_MULTIPROCESSORS = 132  # of that card
# Below this expert width a copy of the tokens' rows costs more than gathering them in the product that reads them.
_COPY_FROM = 512


def _fit(tile: Tile, rows: int, columns: int, depth: int, small: bool) -> Tile:
    """The tile no larger than the product, and of fewer columns and less depth where an entry has four bytes."""
    size = tile.columns if small else min(tile.columns, 64)
    columns = power_of_two(columns)
    return replace(
        tile,
        rows=min(tile.rows, rows),
        columns=min(size, columns),
        depth=min(tile.depth if small else 32, power_of_two(depth)),
        warps=tile.warps if small and rows >= 128 else 4,
        stages=tile.stages if small else 2,
    )


def power_of_two(size: int) -> int:
    """The least power of two that is at least `size`, and at least 16."""
    return max(16, 1 << (size - 1).bit_length())


def tiles(D: int, F: int, tile_rows: int, element_size: int, gated: bool, busy: int) -> Tiles:
    """The tiles for a layer of width D and expert width F.

    Its routing has tiles of `tile_rows` rows, and `busy` experts at most have tokens.
    """
    small = element_size < 4
    large = _WIDE if F >= _WIDE_FROM else _NARROW
    if F < _COPY_FROM:
        # Pointers of the gathered operand need less shared memory than its tiles would: one more stage fits.
        large = replace(large, up=replace(large.up, copy=False, stages=4))

    def of_rows(tile: Tile, columns: int, depth: int) -> Tile:
        if tile_rows < 128:
            tile = _FEW if busy * -(-columns // _FEW.columns) >= _MULTIPROCESSORS else _FEWER
        return _fit(tile, tile_rows, columns, depth, small)

    return Tiles(
        up=of_rows(large.up, 2 * F if gated else F, D),
        down=of_rows(large.down, D, F),
        down_backward=of_rows(large.down_backward, F, D),
        to_x=of_rows(large.to_x, D, F),
        to_weights_up=_fit(large.to_weights_up, power_of_two(F), D, tile_rows, small),
        to_weights_down=_fit(large.to_weights_down, power_of_two(F), D, tile_rows, small),
    )
