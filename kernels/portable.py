"""A layer's products as any GPU runs them, and the interpreter: the launches of kernels/products.py.

One object holds what all products of a layer share, its routing and its tiles; each method is one step of
`kernels.grouped`. It allocates what it returns. `kernels.hopper_layer` overrides the products for Hopper.

Legend: T tokens, D model width, F expert width, E experts, K chosen experts a token, N = T*K assignments.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
from torch import Tensor
from triton.tools.ragged_tma import create_ragged_descriptor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.backend import left_multiprocessors, precision
from kernels.products import activate_backward_kernel, combine_kernel, copy_kernel, rows_kernel, weights_kernel
from kernels.routing import Routing
from kernels.tiles import Tile, Tiles, power_of_two

_ALIGNMENT = 16  # bytes, of what a TMA descriptor points to and of its strides
_FARTHEST = 2**40  # bytes, the largest stride of a TMA descriptor


def multiprocessors(device: torch.device) -> int:
    """How many programs of one a multiprocessor run at once, beside what is left to others (kernels/backend.py)."""
    return max(1, _multiprocessors(device) - left_multiprocessors())


@cache
def _multiprocessors(device: torch.device) -> int:
    # The interpreter runs one program after the other: a few of them still walk over several tiles each.
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


def describable(tensor: Tensor) -> Tensor:
    """The tensor, or a contiguous copy where its memory has not the form that TMA can address."""
    size = tensor.element_size()
    regular = tensor.stride(-1) == 1 and all(s * size % _ALIGNMENT == 0 and s > 0 for s in tensor.stride()[:-1])
    if regular and tensor.data_ptr() % _ALIGNMENT == 0:
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


class Halves:
    """One or two tensors [E, X, Y] as one [E, 1 or 2, X, Y]: two lie as far apart as they happen to.

    swap: 1 where the second comes first in memory.
    """

    def __init__(self, first: Tensor, second: Tensor | None = None) -> None:
        self.swap = 0
        E, X, Y = first.shape
        if second is None:
            self.tensor, self.shape, self.strides = first, [E, 1, X, Y], [first.stride(0), *first.stride()]
            return
        distance = second.data_ptr() - first.data_ptr()
        if first.stride() != second.stride() or distance % _ALIGNMENT or abs(distance) >= _FARTHEST:
            self.tensor = torch.stack([first, second], 1)
            self.shape, self.strides = list(self.tensor.shape), list(self.tensor.stride())
            return
        self.swap = int(distance < 0)
        self.tensor, self.shape = second if self.swap else first, [E, 2, X, Y]
        self.strides = [first.stride(0), abs(distance) // first.element_size(), *first.stride()[1:]]

    def descriptor(self, block: list[int]) -> TensorDescriptor:
        return TensorDescriptor(self.tensor, self.shape, self.strides, block)


def _programs(tile: Tile, most: int, device: torch.device) -> int:
    return max(1, min(most, tile.programs * multiprocessors(device)))


def sorted_copy(x: Tensor, inverse: Tensor) -> Tensor:
    """A copy [N, D] of the rows of x [T, D], each to all of its sorted places; a row's elements lie side by side."""
    (T, D), N = x.shape, inverse.shape[0]
    rows = x.new_empty(N, D)
    if N:
        block = min(1024, power_of_two(D))
        grid = (T, triton.cdiv(D, block))
        copy_kernel[grid](x, inverse, rows, x.stride(0), D, TOP_K=N // T, BLOCK=block)
    return rows


def combined(rows: Tensor, weight: Tensor | None, inverse: Tensor, top_k: int) -> Tensor:
    """[T, D] of contiguous rows [N, D]: each token's added up, weighed where there is a weight [T, K]."""
    N, D = rows.shape
    y = rows.new_empty(N // top_k, D)
    if N:
        block = min(1024, power_of_two(D))
        combine_kernel[(N // top_k, triton.cdiv(D, block))](
            rows, weight, inverse, y, D, TOP_K=top_k, WEIGHTED=weight is not None, BLOCK=block
        )
    return y


class Tokens:
    """The rows of tokens x [T, D], and from the first use of `sorted` on a copy [N, D] of them in sorted order."""

    def __init__(self, x: Tensor, routing: Routing) -> None:
        self.x, self._routing = x, routing
        self._sorted: Tensor | None = None

    def sorted(self) -> Tensor:
        if self._sorted is None:
            self._sorted = sorted_copy(self.x, self._routing.inverse)
        return self._sorted


class Portable:
    """One layer's routing and tiles, and its products. Experts' weights are as `describable` leaves them."""

    def __init__(self, routing: Routing, top_k: int, tiles: Tiles) -> None:
        self.routing, self.top_k, self.tiles = routing, top_k, tiles

    def tokens(self, x: Tensor) -> Tokens:
        return Tokens(x, self.routing)

    def up(self, x: Tokens, w1: Tensor, v1: Tensor | None, activation: str) -> tuple[Tensor, Tensor | None, Tensor]:
        """h = x w1^T, u = x v1^T and act(h) u, each [N, F]; x [T, D], w1 and v1 [E, F, D]."""
        tile, N, F = self.tiles.up, self.routing.order.shape[0], w1.shape[1]
        h, a = w1.new_empty(N, F), w1.new_empty(N, F)
        u = None if v1 is None else w1.new_empty(N, F)
        self._rows(tile, x.sorted() if tile.copy else x, Halves(w1, v1), h, activation=activation, c2=u, c3=a)
        return h, u, a

    def down(self, a: Tensor, w2: Tensor) -> Tensor:
        """a w2 [N, D]; a [N, F], w2 [E, F, D]."""
        out = a.new_empty(a.shape[0], w2.shape[2])
        self._rows(self.tiles.down, a, Halves(w2), out, by_depth=True)
        return out

    def through(
        self, dy: Tokens, w2: Tensor, h: Tensor, u: Tensor | None, weight: Tensor, activation: str
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Backward through a = act(h) u: dh and du as [1 or 2, N, F], weight a [N, F], dweight [T, K] as weight."""
        N, F = h.shape
        dhu, wa = h.new_empty(1 if u is None else 2, N, F), torch.empty_like(h)
        dweight = torch.empty_like(weight)
        self._gradient_of_a(dy, w2, dhu[0])
        if N:
            block = min(512, power_of_two(F))
            rows = 2048 // block
            activate_backward_kernel[(triton.cdiv(N, rows),)](
                dhu[0], h, u, None if u is None else dhu[1], wa, weight, dweight, self.routing.order, N, F,
                GATED=u is not None, ACTIVATION=activation, ROWS=rows, BLOCK=block,
            )  # fmt: skip
        return dhu, wa, dweight

    def _gradient_of_a(self, dy: Tokens, w2: Tensor, g: Tensor) -> None:
        """g = dy w2^T [N, F]."""
        tile = self.tiles.down_backward
        self._rows(tile, dy.sorted() if tile.copy else dy, Halves(w2), g)

    def to_x(self, dhu: Tensor, w1: Tensor, v1: Tensor | None) -> Tensor:
        """dh w1 + du v1 [N, D]."""
        rows = dhu.new_empty(dhu.shape[1], w1.shape[2])
        self._rows(self.tiles.to_x, dhu, Halves(w1, v1), rows, by_depth=True)
        return rows

    def to_up(self, dhu: Tensor, x: Tokens, E: int) -> list[Tensor]:
        """Each of dhu's halves [N, F], transposed, times the rows of x, by expert: one or two of [E, F, D]."""
        return self._to_weights(self.tiles.to_weights_up, dhu, x, E)

    def to_down(self, wa: Tensor, dy: Tokens, E: int) -> Tensor:
        """(weight a)^T dy by expert: [E, F, D]."""
        return self._to_weights(self.tiles.to_weights_down, wa.unsqueeze(0), dy, E)[0]

    def combined(self, rows: Tensor, weight: Tensor | None) -> Tensor:
        """[T, D]: each token's rows added up, weighed where there is a weight [T, K]."""
        return combined(rows, weight, self.routing.inverse, self.top_k)

    def _rows(
        self,
        tile: Tile,
        a: Tensor | Tokens,
        b: Halves,
        c: Tensor,
        *,
        by_depth: bool = False,
        activation: str = "",
        c2: Tensor | None = None,
        c3: Tensor | None = None,
    ) -> None:
        """c [N, columns] of b and a: tokens, sorted rows [N, depth], or one or two halves of rows [., N, depth].

        b is [E, ., columns, depth], or by_depth [E, ., depth, columns]. What the rest is, rows_kernel says.
        """
        N, columns = c.shape
        if N == 0:
            return
        gather = isinstance(a, Tokens)
        rows = a.x if isinstance(a, Tokens) else a if a.dim() == 3 else a.unsqueeze(0)
        routing, depth = self.routing, rows.shape[-1]
        gated = c2 is not None
        width = tile.columns // 2 if gated else tile.columns

        def stored(r: Tensor | None) -> TensorDescriptor | None:
            return None if r is None else create_ragged_descriptor(r, [tile.rows, width])

        programs = _programs(tile, routing.tile_expert.shape[0] * triton.cdiv(columns, width), c.device)
        rows_kernel[(programs,)](
            rows if gather else TensorDescriptor.from_tensor(rows, [1, tile.rows, tile.depth]),
            b.descriptor([1, 1, tile.depth, width] if by_depth else [1, 2 if gated else 1, width, tile.depth]),
            stored(c), stored(c2), stored(c3), routing.token, routing.offsets, routing.tile_expert, routing.tile_row,
            routing.tile_count, rows.stride(-2), columns, depth, b.swap,
            EVEN_DEPTH=depth % tile.depth == 0, GATHER=gather, BY_DEPTH=by_depth, PAIR=not gather and len(rows) == 2,
            GATED=gated, ACTIVATION=activation, PRECISION=precision(),
            RUNS=c.dtype == torch.float32, BM=tile.rows, BN=tile.columns, BK=tile.depth, GROUP=tile.group,
            FLATTEN=tile.flatten,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip

    def _to_weights(self, tile: Tile, left: Tensor, right: Tokens, E: int) -> list[Tensor]:
        """left [1 or 2, N, rows], each half transposed, times right's rows [., columns]: as many [E, rows, columns]."""
        halves, N, rows = left.shape
        columns = right.x.shape[1]
        results = [left.new_empty(E, rows, columns) for _ in range(halves)]
        if N == 0:
            return [result.zero_() for result in results]
        c = Halves(*results)
        count = E * halves * triton.cdiv(rows, tile.rows) * triton.cdiv(columns, tile.columns)
        weights_kernel[(_programs(tile, count, left.device),)](
            create_ragged_descriptor(left, [1, tile.depth, tile.rows], ragged_dim=1),
            create_ragged_descriptor(right.sorted(), [tile.depth, tile.columns]) if tile.copy else right.x,
            c.descriptor([1, 1, tile.rows, tile.columns]),
            self.routing.token, self.routing.offsets, right.x.stride(0), E, rows, columns, c.swap,
            HALVES=halves, EVEN_COLUMNS=columns % tile.columns == 0, GATHER=not tile.copy, PRECISION=precision(),
            RUNS=left.dtype == torch.float32, BF=tile.rows, BD=tile.columns, BR=tile.depth, GROUP=tile.group,
            FLATTEN=tile.flatten, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
        if c.tensor.dim() == 4:  # too far apart for one descriptor
            for half, result in enumerate(results):
                result.copy_(c.tensor[:, half])
        return results
