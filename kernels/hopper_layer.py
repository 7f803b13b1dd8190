"""A layer's products on Hopper: the launches of kernels/hopper.py, in the place of the portable ones.

Legend: T tokens, D model width, F expert width, E experts, K chosen experts a token, N = T*K assignments.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from kernels.hopper import COLUMNS, DEPTH, QUARTER, RAGGED, ROWS, rows_kernel
from kernels.hopper_launch import OPTIONS, descriptor, programs, tiles_a_meeting
from kernels.hopper_weights import weights_kernel
from kernels.portable import Portable, Tokens
from kernels.routing import Routing
from kernels.tiles import Tiles

_GROUP = 8
_MOST = 0x7FFF0000
# Gathering tokens slows a product of rows by 7 % (15 at F > 10,000) and one of weights by a quarter. A sorted copy
# costs the same at any F: at K = 8 as much as gathering does at F = 1600 to 1700 forward and 500 backward, at K = 4 and
# 2 at half of that (an H200; both were measured at all six shapes).
_GATHER_UP_BELOW = 1536
_GATHER_BACKWARD_BELOW = 512


def _rows(x: Tokens, gather: bool) -> Tokens | Tensor:
    """Tokens to gather, where that pays and their rows are regular enough for copies of 16 bytes; else the sorted copy.

    Triton knows of a number that it is a multiple of 16, or nothing.
    """
    return x if gather and x.x.shape[1] % 16 == 0 and x.x.stride(0) % 16 == 0 else x.sorted()


def _ragged(t: Tensor, block: list[int]) -> Any:
    """Of [N, columns], as triton.tools.ragged_tma makes it: a window of rows that ends where its caller says."""
    if t.shape[0] > RAGGED.value:
        raise ValueError(
            f"T*K={t.shape[0]} assignments (twice as many with a gate) are more than 2^30: split the batch"
        )
    row = t.stride(0)
    return descriptor(t, [1, 1, *block], [_MOST, _MOST, RAGGED.value, t.shape[1]], [2**34 - row, row, row, 1])


class Hopper(Portable):
    """The products of bfloat16 and float16 on compute capability 9.0, for tiles of 128 rows.

    For one forward or one backward: each product, of which these have four at most, uses up a counter.
    """

    def __init__(self, routing: Routing, top_k: int, tiles: Tiles, device: torch.device) -> None:
        super().__init__(routing, top_k, tiles)
        self._device = device
        # 16 bytes each, so that Triton compiles a kernel once, whichever counter it gets.
        self._counters = list(torch.zeros(6, 4, dtype=torch.int32, device=device))

    def up(self, x: Tokens, w1: Tensor, v1: Tensor | None, activation: str) -> tuple[Tensor, Tensor | None, Tensor]:
        N, F = self.routing.order.shape[0], w1.shape[1]
        h, a = w1.new_empty(N, F), w1.new_empty(N, F)
        u = None if v1 is None else w1.new_empty(N, F)
        self._launch(_rows(x, F < _GATHER_UP_BELOW), w1, v1, h, u, a, activation=activation)
        return h, u, a

    def down(self, a: Tensor, w2: Tensor) -> Tensor:
        out = a.new_empty(a.shape[0], w2.shape[2])
        self._launch(a, w2, None, out, by_depth=True)
        return out

    def _gradient_of_a(self, dy: Tokens, w2: Tensor, g: Tensor) -> None:
        self._launch(_rows(dy, w2.shape[1] < _GATHER_BACKWARD_BELOW), w2, None, g)

    def to_x(self, dhu: Tensor, w1: Tensor, v1: Tensor | None) -> Tensor:
        rows = dhu.new_empty(dhu.shape[1], w1.shape[2])
        self._launch(dhu, w1, v1, rows, by_depth=True)
        return rows

    def to_up(self, dhu: Tensor, x: Tokens, E: int) -> list[Tensor]:
        return self._launch_weights(dhu, x, E)

    def to_down(self, wa: Tensor, dy: Tokens, E: int) -> Tensor:
        return self._launch_weights(wa.unsqueeze(0), dy, E)[0]

    def _launch(
        self,
        a: Tensor | Tokens,
        b: Tensor,
        b2: Tensor | None,
        c: Tensor,
        c2: Tensor | None = None,
        c3: Tensor | None = None,
        *,
        by_depth: bool = False,
        activation: str = "",
    ) -> None:
        """rows_kernel: its operands as tensors, a of tokens, sorted rows or one or two halves of these."""
        (N, columns), routing = c.shape, self.routing
        if N == 0:
            return
        rows = a.x if isinstance(a, Tokens) else a.reshape(-1, a.shape[-1])
        depth, gather = rows.shape[1], isinstance(a, Tokens)
        pair = 1 if gather else rows.shape[0] // N
        gated = c2 is not None
        width = COLUMNS.value // 2 if gated else COLUMNS.value
        block = [1, DEPTH.value, COLUMNS.value] if by_depth else [1, width, DEPTH.value]
        stored, tile = [64, QUARTER.value], [64, DEPTH.value]
        rows_kernel[(programs(self._device, routing.tile_expert.shape[0] * triton.cdiv(columns, width)),)](
            rows if gather else descriptor(rows, tile), routing.token, rows.stride(0),
            descriptor(b, block), descriptor(b if b2 is None else b2, block),
            *(_ragged(c if t is None else t, stored) for t in (c, c2, c3)),
            self._counters.pop(), routing.offsets, routing.tile_expert, routing.tile_row, routing.tile_count,
            columns, depth, N,
            PAIR=pair, BY_DEPTH=by_depth, GATED=gated, GATHER=gather, EVEN=depth % DEPTH.value == 0,
            ACTIVATION=activation, GROUP=_GROUP, **OPTIONS,
        )  # fmt: skip

    def _launch_weights(self, left: Tensor, right: Tokens, E: int) -> list[Tensor]:
        (halves, N, rows), columns = left.shape, right.x.shape[1]
        results = [left.new_empty(E, rows, columns) for _ in range(halves)]
        if N == 0:
            return [result.zero_() for result in results]
        b = _rows(right, rows < _GATHER_BACKWARD_BELOW)
        tiles = E * halves * triton.cdiv(rows, ROWS.value) * triton.cdiv(columns, COLUMNS.value)
        weights_kernel[(programs(self._device, tiles),)](
            _ragged(left.reshape(-1, rows), [DEPTH.value, 64]),
            b.x if isinstance(b, Tokens) else _ragged(b, [DEPTH.value, COLUMNS.value]),
            self.routing.token, right.x.stride(0),
            *(descriptor(r, [1, 64, QUARTER.value]) for r in (results[0], results[-1])), self._counters.pop(),
            self.routing.offsets, E, rows, columns, N, tiles_a_meeting(N // E),
            HALVES=halves, GATHER=isinstance(b, Tokens), EVEN=columns % COLUMNS.value == 0, GROUP=_GROUP,
            **OPTIONS,
        )  # fmt: skip
        return results
