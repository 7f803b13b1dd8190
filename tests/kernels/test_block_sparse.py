"""sdd, dsd and dds against dense products in float64 of the same matrices, zeros included.

The same tests run on the CPU's reference, in Triton's interpreter (tests/kernels/test_interpreter.py runs this file
again with TRITON_INTERPRET=1, at fewer shapes) and on a GPU when there is one.
"""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.block_sparse import BlockSparse, dds, dsd, sdd
from kernels.moe import dropless_moe
from kernels.routing import route
from kernels.topology import Topology

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
CUDA = pytest.param(
    "cuda",
    marks=[pytest.mark.gpu, pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="no CUDA device")],
)
DEVICES = ["cpu", CUDA]
DTYPES = [torch.float32, torch.float16] if INTERPRETED else [torch.float32, torch.float16, torch.bfloat16]


class Case:
    """A topology with inert entries, a sparse s [M, N] and dense a [M, K], b [K, N] over it, of unit scale."""

    def __init__(
        self, rows: int, columns: int, K: int, block: int, dtype: torch.dtype, device: str = "cpu", *,
        density: float = 0.5, turned: tuple[bool, bool] = (False, False), spare: int = 2, seed: int = 0,
    ) -> None:  # fmt: skip
        self.generator = torch.Generator().manual_seed(seed)
        self.device, self.dtype = device, dtype
        mask = torch.rand(rows, columns, generator=self.generator) < density
        self.topology = Topology.from_mask(mask.to(device), block, int(mask.sum()) + spare)
        self.mask = mask.repeat_interleave(block, 0).repeat_interleave(block, 1).to(device)
        M, N = self.topology.shape
        self.a, self.b = self.dense(M, K, turned[0]), self.dense(K, N, turned[1])
        self.s = self.dense(M, N) * self.mask

    def dense(self, rows: int, columns: int, turned: bool = False) -> Tensor:
        """A dense matrix, as the view of its transpose if `turned`."""
        shape = (columns, rows) if turned else (rows, columns)
        matrix = torch.randn(*shape, generator=self.generator).to(self.device, self.dtype)
        return matrix.t() if turned else matrix

    def sparse(self, values_of: Tensor) -> BlockSparse:
        """The matrix at the topology, with numbers in the inert entries that must never be read."""
        values = BlockSparse.from_dense(values_of, self.topology).values.clone()
        values[int(self.topology.row_offsets[-1]) :] = torch.nan
        return BlockSparse(values.requires_grad_(), self.topology)


def close(found: Tensor, plain: Tensor, truth: Tensor) -> None:
    """The error against float64, relative to the largest entry, is about that of the dense product in the dtype."""
    assert found.shape == truth.shape
    assert found.dtype == plain.dtype
    scale = truth.abs().max() if truth.numel() else 0
    if scale == 0:
        assert (found == 0).all()
        return
    # In float32 only the order of summation differs, which is luck of a few units in the last place either way.
    slack = torch.finfo(found.dtype).eps * (4 if found.dtype == torch.float32 else 1)
    error, allowed = ((t.double() - truth).abs().max() / scale for t in (found, plain))
    assert error <= 1.5 * allowed + slack, f"{error:.2e}, dense {allowed:.2e}"


def check_sdd(case: Case) -> None:
    a, b = (t.detach().requires_grad_() for t in (case.a, case.b))
    ds = case.dense(*case.topology.shape)
    s = sdd(a, b, case.topology)
    assert (s.values[int(case.topology.row_offsets[-1]) :] == 0).all()
    # The gradient comes by the values, with numbers in the inert entries that must not count.
    found = torch.autograd.grad(s.values, (a, b), case.sparse(ds).values.detach())
    masked = ds * case.mask
    wide_a, wide_b, wide_ds = (t.detach().double() for t in (a, b, masked))
    close(s.to_dense().detach(), (a @ b).detach() * case.mask, (wide_a @ wide_b) * case.mask)
    close(found[0], masked @ b.detach().t(), wide_ds @ wide_b.t())
    close(found[1], a.detach().t() @ masked, wide_a.t() @ wide_ds)


def check_products(case: Case, transposed: bool, turned: bool) -> None:
    """s x and y s and their gradients, of s or its transpose."""
    stored = case.sparse(case.s)
    s, dense = (stored.t(), case.s.t()) if transposed else (stored, case.s)
    assert s.shape == tuple(dense.shape)
    wide, mask = dense.double(), case.mask.t() if transposed else case.mask
    for product, x in ((dsd, case.dense(dense.shape[1], 20, turned)), (dds, case.dense(24, dense.shape[0], turned))):
        left = product is dsd
        x = x.detach().requires_grad_()
        y = dsd(s, x) if left else dds(x, s)
        dy = case.dense(*y.shape, turned)
        dvalues, dx = torch.autograd.grad(y, (stored.values, x), dy)
        plain, exact, gradient = x.detach(), x.detach().double(), dy.double()
        close(y.detach(), dense @ plain if left else plain @ dense, wide @ exact if left else exact @ wide)
        close(dx, dense.t() @ dy if left else dy @ dense.t(), wide.t() @ gradient if left else gradient @ wide.t())
        ds = BlockSparse(dvalues, case.topology, transposed).to_dense()
        close(
            ds,
            (dy @ plain.t() if left else plain.t() @ dy) * mask,
            (gradient @ exact.t() if left else exact.t() @ gradient) * mask,
        )


@st.composite
def cases(draw: st.DrawFn, device: str = "cpu", block: tuple[int, ...] = (16, 32)) -> Case:
    return Case(
        draw(st.integers(1, 3 if INTERPRETED else 6)),
        draw(st.integers(1, 3 if INTERPRETED else 6)),
        draw(st.sampled_from([1, 16, 20, 48])),
        draw(st.sampled_from(block)),
        draw(st.sampled_from(DTYPES)),
        device,
        density=draw(st.sampled_from([0.0, 0.3, 0.7, 1.0])),
        turned=draw(st.tuples(st.booleans(), st.booleans())),
        spare=draw(st.integers(0, 2)),
        seed=draw(st.integers(0, 1000)),
    )


@settings(max_examples=8 if INTERPRETED else 25, deadline=None)
@given(cases(), st.booleans(), st.booleans())
def test_any_topology(case: Case, transposed: bool, turned: bool) -> None:
    check_sdd(case)
    check_products(case, transposed, turned)


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="no CUDA device")
@settings(max_examples=25, deadline=None)
@given(cases("cuda", (16, 32, 64, 128)), st.booleans(), st.booleans())
def test_any_topology_on_a_gpu(case: Case, transposed: bool, turned: bool) -> None:
    check_sdd(case)
    check_products(case, transposed, turned)


@pytest.mark.parametrize("device", [CUDA])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("turned", [(False, False), (True, False), (False, True), (True, True)], ids=str)
@pytest.mark.parametrize("size", [(24, 17), (17, 24)], ids=str)
def test_larger_matrices_on_a_gpu(
    device: str, dtype: torch.dtype, turned: tuple[bool, bool], size: tuple[int, int]
) -> None:
    case = Case(*size, 1000, 128, dtype, device, density=0.3, turned=turned, spare=20)
    check_sdd(case)
    for transposed in (False, True):
        check_products(case, transposed, turned[0])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("turned", [False, True])
def test_every_transposition(device: str, transposed: bool, turned: bool) -> None:
    case = Case(3, 2, 24, 16, torch.float16, device, turned=(turned, not turned))
    check_sdd(case)
    check_products(case, transposed, turned)


@pytest.mark.parametrize("device", DEVICES)
def test_operands_of_any_strides_give_the_same_result(device: str) -> None:
    case = Case(3, 2, 24, 16, torch.float32, device)

    def gaps(t: Tensor) -> Tensor:
        return torch.stack([t, t.new_full(t.shape, torch.nan)], -1)[..., 0]

    def shifted(t: Tensor) -> Tensor:  # no row begins on 16 bytes
        return F.pad(t, (1, 2), value=torch.nan)[:, 1:-2]

    def row(t: Tensor) -> Tensor:
        return t[:1].expand(t.shape)

    s = case.sparse(case.s)
    for change in (gaps, shifted, row):
        a, b = change(case.a), change(case.b)
        assert not a.is_contiguous()
        same = sdd(a.contiguous(), b.contiguous(), case.topology).values
        assert torch.equal(sdd(a, b, case.topology).values, same)
        x = case.dense(s.shape[1], 12)
        beside = F.pad(s.values.detach().reshape(-1), (1, 0))[1:].view(s.values.shape)
        turned = s.values.detach().transpose(1, 2).contiguous().transpose(1, 2)
        for values in (beside, turned):
            assert torch.equal(dsd(BlockSparse(values, case.topology), x), dsd(s, x))
        assert torch.equal(dsd(s, change(x)), dsd(s, change(x).contiguous()))
        assert torch.equal(dds(change(x.t()), s.t()), dds(change(x.t()).contiguous(), s.t()))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("size", [(0, 2, 16), (2, 0, 16), (2, 2, 0), (0, 0, 0)], ids=str)
def test_empty_matrices(device: str, size: tuple[int, int, int]) -> None:
    check_sdd(Case(*size, 16, torch.float32, device))
    case = Case(size[0], size[1], 4, 16, torch.float32, device, density=0)
    s = case.sparse(case.s)
    for matrix in (s, s.t()):
        M, N = matrix.shape
        for columns in (0, 5):
            assert torch.equal(dsd(matrix, case.dense(N, columns)), torch.zeros(M, columns, device=device))
            assert torch.equal(dds(case.dense(columns, M), matrix), torch.zeros(columns, N, device=device))


@pytest.mark.parametrize("device", DEVICES)
def test_what_is_not_stored_multiplies_nothing(device: str) -> None:
    case = Case(2, 2, 16, 16, torch.float32, device, density=0)
    topology = Topology.from_mask(torch.tensor([[True, False], [False, True]], device=device), 16)
    s = BlockSparse.from_dense(torch.ones(32, 32, device=device), topology)
    x = torch.ones(32, 16, device=device)
    x[20] = torch.nan
    assert dsd(s, x)[:16].isfinite().all()
    assert dds(x.t(), s)[:, :16].isfinite().all()
    assert not dsd(s, x)[16:].isfinite().any()
    none = case.sparse(case.s)
    assert (dsd(none, x) == 0).all()
    assert (none.to_dense() == 0).all()


@pytest.mark.parametrize("device", DEVICES)
def test_to_dense_and_from_dense_are_inverse_and_differentiate(device: str) -> None:
    case = Case(3, 4, 16, 16, torch.float32, device)
    s = case.sparse(case.s)
    assert torch.equal(s.to_dense(), case.s)
    assert torch.equal(s.t().to_dense(), case.s.t())
    assert torch.equal(s.t().t().to_dense(), case.s)
    weight = case.dense(*case.topology.shape)
    (dvalues,) = torch.autograd.grad((s.to_dense() * weight).sum(), s.values)
    assert torch.equal(dvalues, BlockSparse.from_dense(weight, case.topology).values)
    full = case.dense(*case.topology.shape).requires_grad_()
    (dfull,) = torch.autograd.grad((BlockSparse.from_dense(full, case.topology).to_dense() * weight).sum(), full)
    assert torch.equal(dfull, weight * case.mask)


@pytest.mark.parametrize("device", DEVICES)
def test_a_dropless_layer_is_two_sparse_products(device: str) -> None:
    """MegaBlocks' layer: rows of each expert padded to whole blocks, sdd up, dsd down."""
    T, D, W, E, K, block = 21, 32, 32, 4, 2, 16
    g = torch.Generator().manual_seed(0)
    x, *weights = (torch.randn(*size, generator=g).to(device) for size in ((T, D), *[(E, W, D)] * 3))
    leaves = [t.requires_grad_() for t in (x, *(w / 6 for w in weights))]
    x, w1, v1, w2 = leaves
    index = torch.rand(T, 3, generator=g).argsort(1)[:, :K].to(device)  # the last expert has no token
    weight = torch.rand(T, K, generator=g).to(device)
    routing = route(index, E)
    topology = Topology.block_diagonal(routing.tokens_per_expert, W, block, T * K)
    begins = F.pad(((routing.tokens_per_expert + block - 1) // block * block).cumsum(0), (1, 0))
    expert = index.reshape(-1)[routing.order.long()]
    slot = begins[expert] + torch.arange(T * K, device=device) - routing.offsets[expert]
    rows = x.new_zeros(topology.shape[0], D).index_copy(0, slot, x[routing.order.long() // K])
    h = sdd(rows, w1.flatten(0, 1).t(), topology)
    u = sdd(rows, v1.flatten(0, 1).t(), topology)
    out = dsd(BlockSparse(F.silu(h.values) * u.values, topology), w2.flatten(0, 1))
    y = (out[slot][routing.inverse.long()].view(T, K, D) * weight.unsqueeze(-1)).sum(1)
    expected = dropless_moe(x, index, weight, w1, v1, w2)
    dy = torch.randn(T, D, generator=g).to(device)
    for found, right in zip(
        [y, *torch.autograd.grad(y, leaves, dy)], [expected, *torch.autograd.grad(expected, leaves, dy)], strict=True
    ):
        torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(INTERPRETED, reason="the reference only")
def test_the_reference_passes_gradcheck_in_float64() -> None:
    case = Case(2, 2, 1, 16, torch.float64, spare=1, density=0.6)
    a, b, x = (t.detach().requires_grad_() for t in (case.a, case.b, case.dense(32, 1)))

    def chain(a: Tensor, b: Tensor, x: Tensor) -> Tensor:
        s = sdd(a, b, case.topology)
        return dds(dsd(s.t(), x).t(), s.t())

    assert torch.autograd.gradcheck(chain, (a, b, x), fast_mode=True)


@pytest.mark.parametrize("device", DEVICES)
def test_gradients_differentiate_again(device: str) -> None:
    case = Case(2, 2, 16, 16, torch.float32, device)

    def penalty(product: Any, a: Tensor, b: Tensor) -> list[Tensor]:
        a, b = (t.detach().requires_grad_() for t in (a, b))
        first = torch.autograd.grad(product(a, b).pow(2).sum(), (a, b), create_graph=True)
        return list(torch.autograd.grad(sum(g.pow(2).sum() for g in first), (a, b)))

    found = penalty(lambda a, b: sdd(a, b, case.topology).values, case.a, case.b)
    for f, e in zip(found, penalty(lambda a, b: a @ b * case.mask, case.a, case.b), strict=True):
        torch.testing.assert_close(f, e, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES[::2], ids=str)  # on a GPU of two paths
def test_the_same_bits_every_time(device: str, dtype: torch.dtype) -> None:
    size = (16, 16, 256, 128) if device == "cuda" else (3, 3, 24, 16)
    case = Case(*size, dtype, device)
    s, x = case.sparse(case.s), case.dense(case.s.shape[1], 40)
    first = sdd(case.a, case.b, case.topology).values, dsd(s, x), dds(x.t(), s.t())
    for _ in range(20 if device == "cuda" else 2):
        again = sdd(case.a, case.b, case.topology).values, dsd(s, x), dds(x.t(), s.t())
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


S = BlockSparse(torch.zeros(2, 16, 16), Topology.from_mask(torch.eye(2, dtype=torch.bool), 16))


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("a_MK", lambda: sdd(torch.zeros(16, 8), torch.zeros(8, 32), S.topology)),
        ("a_MK", lambda: sdd(torch.zeros(2, 32, 8), torch.zeros(8, 32), S.topology)),
        ("a_MK", lambda: sdd(torch.zeros(32, 8).int(), torch.zeros(8, 32), S.topology)),
        ("a_MK", lambda: sdd(torch.zeros(32, 8, device="meta"), torch.zeros(8, 32), S.topology)),
        ("b_KN", lambda: sdd(torch.zeros(32, 8), torch.zeros(9, 32), S.topology)),
        ("b_KN", lambda: sdd(torch.zeros(32, 8), torch.zeros(8, 16), S.topology)),
        ("b_KN", lambda: sdd(torch.zeros(32, 8), torch.zeros(8, 32).half(), S.topology)),
        ("b_KN", lambda: sdd(torch.zeros(32, 8), torch.zeros(8, 32, device="meta"), S.topology)),
        ("b_KN", lambda: dsd(S, torch.zeros(31, 8))),
        ("b_KN", lambda: dsd(S, torch.zeros(32))),
        ("b_KN", lambda: dsd(S, torch.zeros(32, 8).half())),
        ("b_KN", lambda: dsd(S, torch.zeros(32, 8, device="meta"))),
        ("a_MK", lambda: dds(torch.zeros(8, 31), S)),
        ("a_MK", lambda: dds(torch.zeros(8, 32).double(), S)),
        ("values", lambda: BlockSparse(torch.zeros(3, 16, 16), S.topology)),
        ("values", lambda: BlockSparse(torch.zeros(2, 16, 16, device="meta"), S.topology)),
        ("dense", lambda: BlockSparse.from_dense(torch.zeros(32, 16), S.topology)),
        ("dense", lambda: BlockSparse.from_dense(torch.zeros(32, 32, device="meta"), S.topology)),
    ],
)
def test_a_wrong_argument_is_named(name: str, call: Any) -> None:
    with pytest.raises(ValueError, match=f"^{name} "):
        call()


@pytest.mark.skipif(INTERPRETED, reason="one run is enough")
def test_the_module_imports_and_runs_where_triton_is_missing() -> None:
    program = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch; from kernels.block_sparse import *; from kernels.topology import Topology\n"
        "s = sdd(torch.ones(32, 3), torch.ones(3, 32), Topology.from_mask(torch.eye(2) > 0, 16))\n"
        "assert dsd(s, torch.ones(32, 1)).sum() == 32 * 48\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=300)


@pytest.mark.parametrize("device", DEVICES)
def test_the_operators_pass_opcheck(device: str) -> None:
    if device == "cpu" and not INTERPRETED:
        pytest.skip("the operators belong to the Triton path")
    from kernels import block_sparse

    case = Case(2, 3, 16, 16, torch.float32, device)
    utils = ("test_schema", "test_autograd_registration", "test_faketensor")
    a, b = (t.detach().requires_grad_() for t in (case.a, case.b))
    torch.library.opcheck(block_sparse._sdd, (a, b, *case.topology.tensors, 16), test_utils=utils)
    values = BlockSparse.from_dense(case.s, case.topology).values.requires_grad_()
    for transposed in (False, True):
        for left in (False, True):
            rows, columns = case.s.t().shape if transposed else case.s.shape
            x = case.dense(*((columns, 8) if left else (8, rows))).requires_grad_()
            arguments = (values, x, *case.topology.tensors, 16, transposed, left)
            torch.library.opcheck(block_sparse._product, arguments, test_utils=utils)


def step(tokens: Tensor, x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    """A layer without a gate on rows that are padded already: the topology is part of what is compiled."""
    topology = Topology.block_diagonal(tokens, w1.shape[1] // len(tokens), 128, 512)
    h = sdd(x, w1, topology)
    return dsd(BlockSparse(F.silu(h.values), topology), w2)


@pytest.mark.parametrize("device", [CUDA])
def test_it_compiles_whole_and_runs_in_a_cuda_graph_without_waiting(device: str) -> None:
    tokens = torch.tensor([130, 0, 382], device=device)
    x, w1, w2 = (
        torch.randn(*size, device=device, dtype=torch.bfloat16, requires_grad=True)
        for size in ((896 - 128, 256), (256, 3 * 256), (3 * 256, 256))
    )

    def run(function: Any = step) -> list[Tensor]:
        y = function(tokens, x, w1, w2)
        return [y.detach(), *torch.autograd.grad(y.sum(), (x, w1, w2))]

    expected = run()
    compiled = run(torch.compile(step, fullgraph=True))
    for found, right in zip(compiled, expected, strict=True):  # the compiler may round the activation once less
        torch.testing.assert_close(found, right, rtol=2e-2, atol=1e-1)

    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    tokens.copy_(torch.tensor([300, 12, 200], device=device))  # other loads, the same graph
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(run(), captured, strict=True))


@pytest.mark.parametrize("device", [CUDA])
def test_offsets_pass_two_to_the_31(device: str) -> None:
    dtype, block = torch.bfloat16, 128
    # The values: 2^31 elements and some more, all ones but for the last block.
    mask = torch.ones(2**9, 2**8 + 1, dtype=torch.bool, device=device)
    topology = Topology.from_mask(mask, block, mask.numel())
    assert topology.entries * block * block > 2**31
    M, N = topology.shape
    a, b = torch.ones(M, 16, device=device, dtype=dtype), torch.ones(16, N, device=device, dtype=dtype)
    a[-1], b[:, -1] = 2, 3
    s = sdd(a, b, topology)
    assert s.values[-1, -1, -1] == 96
    assert s.values[-1, 0, 0] == 16
    x = torch.zeros(N, 16, device=device, dtype=dtype)
    x[-1] = 1
    assert (dsd(s, x)[-1] == 96).all()
    assert (dds(a[-1:].new_zeros(1, M).index_fill(1, torch.tensor(M - 1, device=device), 1), s)[0, -1]) == 96
    del s
    # A dense operand of as many.
    one = Topology.from_mask(torch.ones(1, 1, dtype=torch.bool, device=device), block)
    wide = torch.zeros(block, 2**24 + 16, device=device, dtype=dtype)
    wide[:, -1] = 1
    single = BlockSparse(torch.ones(1, block, block, device=device, dtype=dtype), one)
    y = dsd(single, wide)
    assert (y[:, -1] == block).all()
    assert y.sum() == block * block
