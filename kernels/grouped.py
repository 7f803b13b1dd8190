"""Triton kernels of the dropless mixture of experts: matrix products over rows that are sorted by expert.

    forward    h = x[tok] w1^T,  u = x[tok] v1^T,  a = act(h) * u,  out = a w2,  y_t = sum_k weight_tk out[inverse_tk]
    backward   g = dy[tok] w2^T,  dweight = <g, a>,  da = weight g,  dh = da u act'(h),  du = da act(h)
               dx_t = sum_k (dh w1 + du v1)[inverse_tk]
               dw1 = dh^T x[tok],  dv1 = du^T x[tok],  dw2 = (weight a)^T dy[tok]

Data movement: rows of x and dy are gathered by the product that reads them, never copied; products go tile by tile of
the routing's tile map, whose length the host knows from shapes, and tiles past the last do nothing. Sums over k and
over a row run in one program in a fixed order: no atomics, the same bits every run. Backward needs x, h, u, routing.

This is a first, portable path (pointer loads, activation in its own pass); it needs a CUDA device or the interpreter.

Legend: T tokens, D model width, F expert width, E experts, K chosen experts a token, N = T*K assignments.
"""

# mypy: disable-error-code="no-untyped-def"
# Triton gives meaning to a kernel's annotations: a parameter without one is a run-time value.
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.routing import Routing


@triton.jit
def _activate(h, ACTIVATION: tl.constexpr):
    """act(h) and act'(h), h in float32."""
    if ACTIVATION == "silu":
        s = tl.sigmoid(h)
        value = h * s
        slope = s * (1 + h * (1 - s))
    elif ACTIVATION == "gelu":
        cdf = 0.5 * (1 + tl.erf(h * 0.7071067811865476))
        value = h * cdf
        slope = cdf + h * 0.3989422804014327 * tl.exp(-0.5 * h * h)
    else:
        # (1 + tanh(z)) / 2 = sigmoid(2 z)
        s = tl.sigmoid(1.5957691216057308 * (h + 0.044715 * h * h * h))
        value = h * s
        slope = s + h * s * (1 - s) * 1.5957691216057308 * (1 + 0.134145 * h * h)
    return value, slope


@triton.jit
def _multiply(
    acc, a_ptr, b_ptr, start, row_mask, col_mask, DEPTH, a_depth, b_depth, BK: tl.constexpr, PRECISION: tl.constexpr
):
    """acc plus the product of BK columns of a, from ``start`` on, with those rows of b."""
    d = start + tl.arange(0, BK)
    a_tile = tl.load(a_ptr + d.to(tl.int64)[None, :] * a_depth, row_mask[:, None] & (d < DEPTH)[None, :], other=0.0)
    b_tile = tl.load(b_ptr + d.to(tl.int64)[:, None] * b_depth, (d < DEPTH)[:, None] & col_mask[None, :], other=0.0)
    return tl.dot(a_tile, b_tile, acc, input_precision=PRECISION)


@triton.jit
def _accumulate(
    acc, a, b, row, row_mask, col, expert, COLS, DEPTH, a_row, a_depth, b_expert, b_col, b_depth,
    BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc[i, j] += sum over d of a[row_i, d] * b[expert, col_j, d]; what lies past a mask counts as zero."""
    a_ptr = a + row.to(tl.int64)[:, None] * a_row
    b_ptr = b + expert.to(tl.int64) * b_expert + col.to(tl.int64)[None, :] * b_col
    col_mask = col < COLS
    if a.dtype.element_ty == tl.float32:
        # In runs: one long float32 sum rounds by its length, and the unfused products' blocked sums do not.
        for first in range(0, DEPTH, 8 * BK):
            part = tl.zeros_like(acc)
            for start in range(first, tl.minimum(first + 8 * BK, DEPTH), BK):
                part = _multiply(part, a_ptr, b_ptr, start, row_mask, col_mask, DEPTH, a_depth, b_depth, BK, PRECISION)
            acc += part
    else:
        for start in range(0, DEPTH, BK):
            acc = _multiply(acc, a_ptr, b_ptr, start, row_mask, col_mask, DEPTH, a_depth, b_depth, BK, PRECISION)
    return acc


@triton.jit
def _rows_kernel(
    a, b, a2, b2, c, order, offsets, tile_expert, tile_row, tiles, E, COLS, DEPTH, top_k,
    a_row, a_depth, b_expert, b_col, b_depth, b2_expert, b2_col, b2_depth,
    GATHER: tl.constexpr, TWO: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    GROUP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # GROUP row tiles walk through the columns together, so that they share the expert's weights in L2.
    pid = tl.program_id(0)
    group_size = GROUP * tl.cdiv(COLS, BN)
    first = (pid // group_size) * GROUP
    height = tl.minimum(tiles - first, GROUP)
    tile = first + (pid % group_size) % height
    col = ((pid % group_size) // height) * BN + tl.arange(0, BN)

    expert = tl.load(tile_expert + tile)
    if expert < E:
        n = tl.load(tile_row + tile) + tl.arange(0, BM)
        n_mask = n < tl.load(offsets + expert + 1)
        row = n
        if GATHER:
            row = tl.load(order + n, n_mask, other=0) // top_k
        acc = tl.zeros((BM, BN), tl.float32)
        acc = _accumulate(
            acc, a, b, row, n_mask, col, expert, COLS, DEPTH, a_row, a_depth, b_expert, b_col, b_depth, BK, PRECISION
        )
        if TWO:
            acc = _accumulate(
                acc, a2, b2, row, n_mask, col, expert, COLS, DEPTH, a_row, a_depth, b2_expert, b2_col, b2_depth,
                BK, PRECISION,
            )  # fmt: skip
        c_ptr = c + n.to(tl.int64)[:, None] * COLS + col[None, :]
        tl.store(c_ptr, acc.to(c.dtype.element_ty), n_mask[:, None] & (col < COLS)[None, :])


@triton.jit
def _multiply_rows(
    acc, left, right, order, start, end, f, d, F, D, top_k, right_row, right_col,
    BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc plus the outer products of BN rows, from ``start`` on; rows from ``end`` on count as zero."""
    n = start + tl.arange(0, BN)
    token = tl.load(order + n, n < end, other=0) // top_k
    l_ptr = left + n.to(tl.int64)[None, :] * F + f[:, None]
    l_tile = tl.load(l_ptr, (n < end)[None, :] & (f < F)[:, None], other=0.0)
    r_ptr = right + token.to(tl.int64)[:, None] * right_row + d.to(tl.int64)[None, :] * right_col
    r_tile = tl.load(r_ptr, (n < end)[:, None] & (d < D)[None, :], other=0.0)
    return tl.dot(l_tile, r_tile, acc, input_precision=PRECISION)


@triton.jit
def _weights_kernel(
    left, right, dw, order, offsets, F, D, top_k, right_row, right_col,
    BF: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dw[e, f, d] = sum over the rows n of e of left[n, f] * right[token(n), d]; zeros for an expert without rows."""
    pid = tl.program_id(0)
    expert = tl.program_id(1)
    f = (pid // tl.cdiv(D, BD)) * BF + tl.arange(0, BF)
    d = (pid % tl.cdiv(D, BD)) * BD + tl.arange(0, BD)
    begin = tl.load(offsets + expert)
    end = tl.load(offsets + expert + 1)
    acc = tl.zeros((BF, BD), tl.float32)
    if left.dtype.element_ty == tl.float32:
        for first in range(begin, end, 8 * BN):  # in runs, as _accumulate's sums
            part = tl.zeros_like(acc)
            for start in range(first, tl.minimum(first + 8 * BN, end), BN):
                part = _multiply_rows(
                    part, left, right, order, start, end, f, d, F, D, top_k, right_row, right_col, BN, PRECISION
                )
            acc += part
    else:
        for start in range(begin, end, BN):
            acc = _multiply_rows(
                acc, left, right, order, start, end, f, d, F, D, top_k, right_row, right_col, BN, PRECISION
            )
    dw_ptr = dw + (expert.to(tl.int64) * F + f.to(tl.int64)[:, None]) * D + d[None, :]
    tl.store(dw_ptr, acc.to(dw.dtype.element_ty), (f < F)[:, None] & (d < D)[None, :])


@triton.jit
def _activate_kernel(h, u, a, F, GATED: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    f = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at = tl.program_id(0).to(tl.int64) * F + f
    value, _ = _activate(tl.load(h + at, f < F, other=0.0).to(tl.float32), ACTIVATION)
    if GATED:
        value *= tl.load(u + at, f < F, other=0.0).to(tl.float32)
    tl.store(a + at, value.to(a.dtype.element_ty), f < F)


@triton.jit
def _activate_backward_kernel(
    h, u, g, dh, du, weight, dweight, order, F,
    GATED: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row n: writes dh, du and dweight, and weight * a over g."""
    n = tl.program_id(0)
    assignment = tl.load(order + n)
    scale = tl.load(weight + assignment).to(tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, F, BLOCK):
        f = start + tl.arange(0, BLOCK)
        at = n.to(tl.int64) * F + f
        a, slope = _activate(tl.load(h + at, f < F, other=0.0).to(tl.float32), ACTIVATION)
        da = tl.load(g + at, f < F, other=0.0).to(tl.float32)
        if GATED:
            up = tl.load(u + at, f < F, other=0.0).to(tl.float32)
            tl.store(du + at, (scale * da * a).to(du.dtype.element_ty), f < F)
            a *= up
            slope *= up
        total += da * a
        tl.store(dh + at, (scale * da * slope).to(dh.dtype.element_ty), f < F)
        tl.store(g + at, (scale * a).to(g.dtype.element_ty), f < F)
    tl.store(dweight + assignment, tl.sum(total, 0).to(dweight.dtype.element_ty))


@triton.jit
def _combine_kernel(rows, weight, inverse, y, D, top_k, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr):
    """y[t] = sum over k of weight[t, k] * rows[inverse[t, k]]"""
    t = tl.program_id(0)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), tl.float32)
    for k in range(top_k):
        assignment = t * top_k + k
        n = tl.load(inverse + assignment).to(tl.int64)
        value = tl.load(rows + n * D + d, d < D, other=0.0).to(tl.float32)
        if WEIGHTED:
            value *= tl.load(weight + assignment).to(tl.float32)
        acc += value
    tl.store(y + t.to(tl.int64) * D + d, acc.to(y.dtype.element_ty), d < D)


def _block(size: int, largest: int) -> int:
    return min(largest, max(16, triton.next_power_of_2(size)))


def _precision() -> str:
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def _rows(
    a: Tensor,
    b_ECD: Tensor,
    routing: Routing,
    top_k: int = 0,
    second: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """[N, C]: each sorted row of `a` times its expert's b[e]^T, plus those of a second pair of equal shapes.

    With top_k, `a` holds tokens [T, depth] and a row's token is gathered; else it holds sorted rows [N, depth].
    `b_ECD` is [E, columns, depth] with any strides: a transposed view gives the product without transposition.
    """
    E, C, depth = b_ECD.shape
    c_NC = a.new_empty(routing.order.shape[0], C)
    if c_NC.shape[0] == 0:
        return c_NC
    a2, b2 = second or (a, b_ECD)
    small = a.element_size() < 4
    BN, BK = _block(C, 128 if small else 64), _block(depth, 64 if small else 32)
    tiles = routing.tile_expert.shape[0]
    _rows_kernel[(tiles * triton.cdiv(C, BN),)](
        a, b_ECD, a2, b2, c_NC, routing.order, routing.offsets, routing.tile_expert, routing.tile_row,
        tiles, E, C, depth, top_k, *a.stride(), *b_ECD.stride(), *b2.stride(),
        GATHER=top_k > 0, TWO=second is not None, BM=routing.tile_rows, BN=BN, BK=BK, GROUP=8, PRECISION=_precision(),
        num_warps=8 if routing.tile_rows * BN >= 128 * 128 else 4, num_stages=3,
    )  # fmt: skip
    return c_NC


def _weights(left_NF: Tensor, right_TD: Tensor, routing: Routing, top_k: int) -> Tensor:
    """[E, F, D]: sum over each expert's rows of left[n] (outer) right[token(n)]."""
    E, F, D = routing.tokens_per_expert.shape[0], left_NF.shape[1], right_TD.shape[1]
    dw_EFD = left_NF.new_empty(E, F, D)
    small = left_NF.element_size() < 4
    BF, BD = _block(F, 128), _block(D, 128 if small else 64)
    _weights_kernel[(triton.cdiv(F, BF) * triton.cdiv(D, BD), E)](
        left_NF, right_TD, dw_EFD, routing.order, routing.offsets, F, D, top_k, *right_TD.stride(),
        BF=BF, BD=BD, BN=min(routing.tile_rows, 64 if small else 32), PRECISION=_precision(),
        num_warps=8 if BF * BD >= 128 * 128 else 4, num_stages=3,
    )  # fmt: skip
    return dw_EFD


def _combine(rows_ND: Tensor, weight_TK: Tensor | None, routing: Routing, tokens: int) -> Tensor:
    D = rows_ND.shape[1]
    y_TD = rows_ND.new_empty(tokens, D)
    if tokens:
        block = _block(D, 1024)
        _combine_kernel[(tokens, triton.cdiv(D, block))](
            rows_ND, rows_ND if weight_TK is None else weight_TK, routing.inverse, y_TD, D, rows_ND.shape[0] // tokens,
            WEIGHTED=weight_TK is not None, BLOCK=block,
        )  # fmt: skip
    return y_TD


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
    T, K = weight_TK.shape
    with torch.cuda.device_of(x_TD):  # Triton launches on the current device
        h_NF = _rows(x_TD, w1_EFD, routing, K)
        u_NF = h_NF.new_empty(0, h_NF.shape[1]) if v1_EFD is None else _rows(x_TD, v1_EFD, routing, K)
        a_NF = torch.empty_like(h_NF)
        N, F = h_NF.shape
        if N:
            block = _block(F, 1024)
            _activate_kernel[(N, triton.cdiv(F, block))](
                h_NF, u_NF, a_NF, F, GATED=v1_EFD is not None, ACTIVATION=activation, BLOCK=block
            )
        y_TD = _combine(_rows(a_NF, w2_EFD.transpose(1, 2), routing), weight_TK.contiguous(), routing, T)
    return y_TD, h_NF, u_NF


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
    T, K = weight_TK.shape
    N, F = h_NF.shape
    unused = x_TD.new_empty
    with torch.cuda.device_of(x_TD):
        g_NF = _rows(dy_TD, w2_EFD, routing, K)
        dh_NF = torch.empty_like(h_NF)
        du_NF = torch.empty_like(u_NF)
        dweight_TK = torch.empty(T, K, dtype=weight_TK.dtype, device=x_TD.device)
        if N:
            _activate_backward_kernel[(N,)](
                h_NF, u_NF, g_NF, dh_NF, du_NF, weight_TK.contiguous(), dweight_TK, routing.order, F,
                GATED=v1_EFD is not None, ACTIVATION=activation, BLOCK=_block(F, 1024),
            )  # fmt: skip
        dx_TD, dw1_EFD, dv1_EFD, dw2_EFD = unused(0), unused(0), unused(0), unused(0)
        if needs[0]:
            up = None if v1_EFD is None else (du_NF, v1_EFD.transpose(1, 2))
            dx_TD = _combine(_rows(dh_NF, w1_EFD.transpose(1, 2), routing, second=up), None, routing, T)
        if needs[2]:
            dw1_EFD = _weights(dh_NF, x_TD, routing, K)
        if needs[3]:
            dv1_EFD = _weights(du_NF, x_TD, routing, K)
        if needs[4]:
            dw2_EFD = _weights(g_NF, dy_TD, routing, K)
    return dx_TD, dweight_TK if needs[1] else dweight_TK.new_empty(0), dw1_EFD, dv1_EFD, dw2_EFD
