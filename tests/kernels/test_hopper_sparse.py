"""The block-sparse products for Hopper where programs take many tiles, or cannot all run at once.

test_block_sparse.py has them at every transposition, in torch.compile and in a CUDA graph.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from kernels import sparse_products
from kernels.block_sparse import BlockSparse, dds, dsd, sdd
from kernels.topology import Topology
from tests.kernels.test_block_sparse import Case, check_products, check_sdd
from tests.kernels.test_hopper import HALF, beside_another_kernel, on_hopper


@pytest.fixture
def three_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that small matrices are many tiles for each."""
    from kernels import hopper_sparse

    monkeypatch.setattr(hopper_sparse, "programs", lambda _, tiles: max(1, min(tiles, 3)))


@on_hopper
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("size", [(13, 9), (9, 13)], ids=str)
@pytest.mark.parametrize("K", [1, 48, 1100])
@pytest.mark.parametrize("turned", [(False, True), (True, False)], ids=str)
def test_programs_that_take_many_tiles(
    three_programs: None, dtype: torch.dtype, size: tuple[int, int], K: int, turned: tuple[bool, bool]
) -> None:
    case = Case(*size, K, 128, dtype, "cuda", density=0.4, turned=turned, spare=9)
    assert case.topology.pairs.shape[0] > 9
    check_sdd(case)
    for transposed in (False, True):
        check_products(case, transposed, turned[0])


def every(case: Case, s: BlockSparse, x: Tensor) -> tuple[Tensor, ...]:
    return sdd(case.a, case.b, case.topology).values, dsd(s, x), dds(x.t(), s.t())


@on_hopper
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_the_same_bits_with_few_programs_and_many(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    from kernels import hopper_sparse

    case = Case(40, 33, 700, 128, dtype, "cuda", density=0.5, spare=20)
    s, x = case.sparse(case.s), case.dense(case.s.shape[1], 700)
    first = every(case, s, x)
    for programs in (132, 132, 60, 7):
        monkeypatch.setattr(hopper_sparse, "programs", lambda _, tiles, most=programs: min(tiles, most))
        assert all(torch.equal(a, b) for a, b in zip(first, every(case, s, x), strict=True))


@on_hopper
def test_it_goes_on_where_its_programs_cannot_all_run_at_once() -> None:
    case = Case(40, 33, 4096, 128, torch.bfloat16, "cuda", density=0.5, spare=300)
    s, x = case.sparse(case.s), case.dense(case.s.shape[1], 2048)
    expected = every(case, s, x)
    found = beside_another_kernel(lambda: every(case, s, x))
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


@on_hopper
def test_what_is_not_stored_multiplies_nothing() -> None:
    topology = Topology.from_mask(torch.eye(2, dtype=torch.bool, device="cuda"), 128, 3)
    values = torch.ones(3, 128, 128, device="cuda", dtype=torch.bfloat16)
    values[2] = torch.nan
    s, x = BlockSparse(values, topology), torch.ones(256, 40, device="cuda", dtype=torch.bfloat16)
    x[200] = torch.nan
    assert (dsd(s, x)[:128] == 128).all()
    assert (dds(x.t(), s)[:, :128] == 128).all()
    assert not dsd(s, x)[128:].isfinite().any()
    assert sparse_products.hopper(values)
