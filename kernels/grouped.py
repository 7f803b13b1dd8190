"""The dropless mixture of experts on a GPU: which products run, in which order, on which memory.

    forward    h = x[tok] w1^T,  u = x[tok] v1^T,  a = act(h) * u,  out = a w2,  y_t = sum_k weight_tk out[inverse_tk]
    backward   g = dy[tok] w2^T,  dweight = <g, a>,  da = weight g,  dh = da u act'(h),  du = da act(h)
               dx_t = sum_k (dh w1 + du v1)[inverse_tk]
               dw1 = dh^T x[tok],  dv1 = du^T x[tok],  dw2 = (weight a)^T dy[tok]

Data movement: forward is two products and a sum. The first reads the tokens' rows, by pointers or from a sorted copy,
and leaves h, u and a; the second leaves one row an assignment, which the sum weighs and adds up token by token.
Backward is four products, a pass between the first and the others that makes a again from h and u, and a sum; only x,
h, u and the routing are kept for it. No atomics: every sum has a fixed order.

Legend: T tokens, D model width, F expert width, E experts, K chosen experts a token, N = T*K assignments.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
from torch import Tensor
from triton.tools.ragged_tma import create_ragged_descriptor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.backend import precision
from kernels.products import activate_backward_kernel, combine_kernel, copy_kernel, rows_kernel, weights_kernel
from kernels.routing import Routing
from kernels.tiles import Tile, Tiles, power_of_two, tiles

_ALIGNMENT = 16  # bytes, of what a TMA descriptor points to and of its strides
_FARTHEST = 2**40  # bytes, the largest stride of a TMA descriptor


@cache
def _multiprocessors(device: torch.device) -> int:
    # The interpreter runs one program after the other: a few of them still walk over several tiles each.
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


def _describable(tensor: Tensor) -> Tensor:
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
    return max(1, min(most, tile.programs * _multiprocessors(device)))


class Layer:
    """One layer's routing and tiles, and the products over its sorted rows."""

    def __init__(self, routing: Routing, top_k: int, tiles: Tiles) -> None:
        self.routing, self.top_k, self.tiles = routing, top_k, tiles

    def rows(
        self,
        tile: Tile,
        a: Tensor,
        b: Halves,
        c: Tensor,
        *,
        by_depth: bool = False,
        gather: bool = False,
        activation: str = "",
        c2: Tensor | None = None,
        c3: Tensor | None = None,
    ) -> None:
        """c [N, columns] of b and a: tokens [T, depth] (gather), rows [N, depth], or two halves of rows [2, N, depth].

        b is [E, ., columns, depth], or by_depth [E, ., depth, columns]. What the rest is, rows_kernel says.
        """
        N, columns = c.shape
        if N == 0:
            return
        routing, depth = self.routing, a.shape[-1]
        gated = c2 is not None
        width = tile.columns // 2 if gated else tile.columns
        if a.dim() == 2 and not gather:
            a = a.unsqueeze(0)

        def stored(r: Tensor | None) -> TensorDescriptor | None:
            return None if r is None else create_ragged_descriptor(r, [tile.rows, width])

        programs = _programs(tile, routing.tile_expert.shape[0] * triton.cdiv(columns, width), c.device)
        rows_kernel[(programs,)](
            a if gather else TensorDescriptor.from_tensor(a, [1, tile.rows, tile.depth]),
            b.descriptor([1, 1, tile.depth, width] if by_depth else [1, 2 if gated else 1, width, tile.depth]),
            stored(c), stored(c2), stored(c3), routing.token, routing.offsets, routing.tile_expert, routing.tile_row,
            routing.tile_count, a.stride(-2), columns, depth, b.swap,
            EVEN_DEPTH=depth % tile.depth == 0, GATHER=gather, BY_DEPTH=by_depth, PAIR=a.dim() == 3 and a.shape[0] == 2,
            GATED=gated, ACTIVATION=activation, PRECISION=precision(),
            RUNS=c.dtype == torch.float32, BM=tile.rows, BN=tile.columns, BK=tile.depth, GROUP=tile.group,
            FLATTEN=tile.flatten,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip

    def weights(self, tile: Tile, left: Tensor, right: Tensor, *results: Tensor, gather: bool) -> None:
        """results, one or two of [E, left's width, right's width]: left [1 or 2, N, .] times right's rows.

        right holds tokens [T, .] (gather) or sorted rows [N, .].
        """
        E, rows, columns = results[0].shape
        if left.shape[1] == 0:
            for result in results:
                result.zero_()
            return
        c = Halves(*results)
        count = E * len(results) * triton.cdiv(rows, tile.rows) * triton.cdiv(columns, tile.columns)
        weights_kernel[(_programs(tile, count, right.device),)](
            create_ragged_descriptor(left, [1, tile.depth, tile.rows], ragged_dim=1),
            right if gather else create_ragged_descriptor(right, [tile.depth, tile.columns]),
            c.descriptor([1, 1, tile.rows, tile.columns]),
            self.routing.token, self.routing.offsets, right.stride(0), E, rows, columns, c.swap,
            HALVES=len(results), EVEN_COLUMNS=columns % tile.columns == 0, GATHER=gather, PRECISION=precision(),
            RUNS=right.dtype == torch.float32, BF=tile.rows, BD=tile.columns, BR=tile.depth, GROUP=tile.group,
            FLATTEN=tile.flatten, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
        if c.tensor.dim() == 4:  # too far apart for one descriptor
            for half, result in enumerate(results):
                result.copy_(c.tensor[:, half])

    def gathered(self, x: Tensor) -> Tensor:
        """[N, D]: each sorted row's token."""
        N, D = self.routing.order.shape[0], x.shape[1]
        y = x.new_empty(N, D)
        if N:
            block = min(1024, power_of_two(D))
            copy_kernel[(x.shape[0], triton.cdiv(D, block))](
                x, self.routing.inverse, y, x.stride(0), D, TOP_K=self.top_k, BLOCK=block
            )
        return y

    def combined(self, rows: Tensor, weight: Tensor | None) -> Tensor:
        """[T, D]: each token's rows added up, weighed where there is a weight [T, K]."""
        N, D = rows.shape
        y = rows.new_empty(N // self.top_k, D)
        if N:
            block = min(1024, power_of_two(D))
            combine_kernel[(N // self.top_k, triton.cdiv(D, block))](
                rows, weight, self.routing.inverse, y, D, TOP_K=self.top_k, WEIGHTED=weight is not None, BLOCK=block
            )
        return y

    def through(
        self, g: Tensor, h: Tensor, u: Tensor | None, weight: Tensor, activation: str, du: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Backward through a = act(h) u: writes dh over g, and du; returns weight * a [N, F] and dweight [T, K]."""
        N, F = g.shape
        wa, dweight = torch.empty_like(g), torch.empty_like(weight, memory_format=torch.contiguous_format)
        if N:
            block = min(512, power_of_two(F))
            rows = 2048 // block
            activate_backward_kernel[(triton.cdiv(N, rows),)](
                g, h, u, du, wa, weight.contiguous(), dweight, self.routing.order, N, F,
                GATED=u is not None, ACTIVATION=activation, ROWS=rows, BLOCK=block,
            )  # fmt: skip
        return wa, dweight


def _layer(x_TD: Tensor, weight_TK: Tensor, w1_EFD: Tensor, gated: bool, routing: Routing) -> Layer:
    _, F, D = w1_EFD.shape
    return Layer(routing, weight_TK.shape[1], tiles(D, F, routing.tile_rows, x_TD.element_size(), gated))


def forward(
    x_TD: Tensor,
    weight_TK: Tensor,
    w1_EFD: Tensor,
    v1_EFD: Tensor | None,
    w2_EFD: Tensor,
    routing: Routing,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y [T, D], h = x w1^T and u = x v1^T (both [N, F] in sorted order; u is empty without v1)."""
    layer = _layer(x_TD, weight_TK, w1_EFD, v1_EFD is not None, routing)
    N, F, D = routing.order.shape[0], w1_EFD.shape[1], x_TD.shape[1]
    x, w1, w2 = _describable(x_TD), _describable(w1_EFD), _describable(w2_EFD)
    v1 = None if v1_EFD is None else _describable(v1_EFD)
    tile = layer.tiles.up
    with torch.cuda.device_of(x):  # Triton launches on the current device
        h, a, out = x.new_empty(N, F), x.new_empty(N, F), x.new_empty(N, D)
        u = None if v1 is None else x.new_empty(N, F)
        rows = layer.gathered(x) if tile.copy else x
        layer.rows(
            tile, rows, Halves(w1, v1), h, gather=not tile.copy, activation=activation, c2=u, c3=a
        )  # fmt: skip
        layer.rows(layer.tiles.down, a, Halves(w2), out, by_depth=True)
        y = layer.combined(out, weight_TK.contiguous())
    return y, h, x.new_empty(0, F) if u is None else u


def backward(
    dy_TD: Tensor,
    x_TD: Tensor,
    weight_TK: Tensor,
    w1_EFD: Tensor,
    v1_EFD: Tensor | None,
    w2_EFD: Tensor,
    h_NF: Tensor,
    u_NF: Tensor,
    routing: Routing,
    activation: str,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x, weight, w1, v1, w2; `needs` says which, the others are empty tensors."""
    gated = v1_EFD is not None
    layer = _layer(x_TD, weight_TK, w1_EFD, gated, routing)
    tiles = layer.tiles
    N, F = h_NF.shape
    none = x_TD.new_empty(0)
    dy, x, w1, w2 = (_describable(t) for t in (dy_TD, x_TD, w1_EFD, w2_EFD))
    v1 = None if v1_EFD is None else _describable(v1_EFD)
    with torch.cuda.device_of(x):
        dhu = x.new_empty(2 if gated else 1, N, F)
        # The sorted copy of dy is made once where either product wants it.
        copied = tiles.down_backward.copy or (needs[4] and tiles.to_weights_down.copy)
        dy_rows = layer.gathered(dy) if copied else dy
        layer.rows(tiles.down_backward, dy_rows, Halves(w2), dhu[0], gather=not copied)
        wa, dweight = layer.through(
            dhu[0], h_NF, u_NF if gated else None, weight_TK, activation, dhu[1] if gated else None
        )
        dw1 = dv1 = dw2 = dx = none
        if needs[4]:
            dw2 = torch.empty_like(w2, memory_format=torch.contiguous_format)
            layer.weights(tiles.to_weights_down, wa.unsqueeze(0), dy_rows, dw2, gather=not copied)
        del wa, dy_rows
        if needs[2] or needs[3]:
            wanted = [half for half, needed in enumerate(needs[2:4]) if needed]
            results = [torch.empty_like(w1, memory_format=torch.contiguous_format) for _ in wanted]
            left = dhu if len(wanted) == dhu.shape[0] else dhu[wanted[0] : wanted[0] + 1]
            copy = tiles.to_weights_up.copy
            layer.weights(tiles.to_weights_up, left, layer.gathered(x) if copy else x, *results, gather=not copy)
            dw1, dv1 = (results[wanted.index(half)] if half in wanted else none for half in (0, 1))
        if needs[0]:
            rows = x.new_empty(N, x.shape[1])
            layer.rows(tiles.to_x, dhu, Halves(w1, v1), rows, by_depth=True)
            dx = layer.combined(rows, None)
    return dx, dweight if needs[1] else dweight.new_empty(0), dw1, dv1, dw2
