from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.topology import Topology

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
CUDA = pytest.param(
    "cuda",
    marks=[pytest.mark.gpu, pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="no CUDA device")],
)


def random_mask(rows: int, columns: int, density: float, seed: int) -> Tensor:
    return torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < density


def check(topology: Topology, mask: Tensor) -> None:
    """Every list is what its definition says of the mask."""
    R, C = mask.shape
    Z, found = topology.entries, int(mask.sum())
    places = [(r, c) for r in range(R) for c in range(C) if mask[r, c]]
    columns_first = [(r, c) for c in range(C) for r in range(R) if mask[r, c]]
    inert = Z - found
    assert inert >= 0
    assert topology.shape == (R * topology.block, C * topology.block)
    assert all(t.dtype == torch.int32 for t in topology.tensors)
    assert topology.row_offsets.tolist() == [sum(r < n for r, _ in places) for n in range(R + 1)]
    assert topology.column_offsets.tolist() == [sum(c < n for _, c in places) for n in range(C + 1)]
    assert topology.row_indices.tolist() == [r for r, _ in places] + [R] * inert
    assert topology.column_indices.tolist() == [c for _, c in places] + [C] * inert
    assert topology.row_indices_t.tolist() == [r for r, _ in columns_first] + [R] * inert
    assert topology.places_t.tolist()[:found] == [places.index(place) for place in columns_first]
    assert sorted(topology.places_t.tolist()) == list(range(Z))
    assert sorted(topology.walk.tolist()) == list(range(Z))
    assert topology.walk.tolist()[found:] == list(range(found, Z))
    check_pairs(topology, places)
    lengths = [sum(r == n for r, _ in places) for n in range(R)], [sum(c == n for _, c in places) for n in range(C)]
    for order, length in zip((topology.row_order, topology.column_order), lengths, strict=True):
        assert order.tolist() == sorted(range(len(length)), key=lambda n: -length[n])


def check_pairs(topology: Topology, places: list[tuple[int, int]]) -> None:
    """Each entry stands in one pair, real ones first; of a line only the last of an odd number is alone."""
    pairs = topology.pairs.tolist()
    assert sorted(entry for pair in pairs for entry in pair if entry >= 0) == list(range(topology.entries))
    firsts = [first for first, _ in pairs]
    none = [first < 0 for first in firsts]
    assert none == sorted(none)
    assert all(second < 0 for first, second in pairs if first < 0)
    real = [first < len(places) for first in firsts if first >= 0]
    assert real == sorted(real, reverse=True)
    axis = 1 if topology.pairs_share_columns else 0
    alone = []
    for first, second in pairs:
        if 0 <= first < len(places):
            line = places[first][axis]
            if second < 0:
                alone.append(line)
            else:
                assert places[second][axis] == line
                assert places[second] > places[first]
    lines = [place[axis] for place in places]
    assert sorted(alone) == [line for line in sorted(set(lines)) if lines.count(line) % 2]


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(0, 11),
    columns=st.integers(0, 11),
    density=st.sampled_from([0.0, 0.2, 0.7, 1.0]),
    spare=st.none() | st.integers(0, 5),
    seed=st.integers(0, 1000),
)
def test_a_masks_blocks_are_listed_in_both_orders(
    rows: int, columns: int, density: float, spare: int | None, seed: int
) -> None:
    mask = random_mask(rows, columns, density, seed)
    most = None if spare is None else int(mask.sum()) + spare
    topology = Topology.from_mask(mask, 16, most)
    assert topology.entries == (int(mask.sum()) if most is None else min(most, rows * columns))
    check(topology, mask)


def test_blocks_beyond_the_most_are_dropped_from_both_orders() -> None:
    mask = random_mask(5, 6, 0.6, 0)
    kept = mask & (mask.reshape(-1).cumsum(0).view(5, 6) <= 7)
    assert int(mask.sum()) > int(kept.sum()) == 7
    check(Topology.from_mask(mask, 32, 7), kept)


@st.composite
def loads(draw: st.DrawFn) -> tuple[list[int], int, int]:
    tokens = draw(st.lists(st.integers(0, 90), min_size=1, max_size=6))
    return tokens, draw(st.integers(1, 4)), sum(tokens) + draw(st.sampled_from([0, 0, 1, 50]))


@settings(max_examples=60, deadline=None)
@given(loads(), st.sampled_from([torch.int32, torch.int64]))
def test_a_block_diagonal_equals_the_one_made_from_its_mask(
    case: tuple[list[int], int, int], dtype: torch.dtype
) -> None:
    tokens, width, most = case
    topology = Topology.block_diagonal(torch.tensor(tokens, dtype=dtype), width * 16, 16, most)
    R, C = (side // 16 for side in topology.shape)
    heights = [-(-n // 16) for n in tokens]
    assert sum(heights) <= R
    assert len(tokens) * width == C
    mask = torch.zeros(R, C, dtype=torch.bool)
    for e in range(len(heights)):
        mask[sum(heights[:e]) : sum(heights[: e + 1]), e * width : (e + 1) * width] = True
    check(topology, mask)
    same = Topology.from_mask(mask, 16, topology.entries)
    assert all(torch.equal(a, b) for a, b in zip(topology.tensors, same.tensors, strict=True))


def test_the_most_tokens_fit_however_they_fall() -> None:
    for tokens in ([33, 0, 0], [1, 1, 31], [16, 16, 1], [0, 17, 16], [1, 1, 0]):
        most = sum(tokens)
        rows = Topology.block_diagonal(torch.tensor(tokens), 16, 16, most).shape[0]
        assert rows >= sum(-(-n // 16) * 16 for n in tokens)
        assert rows <= most + 3 * 15


@pytest.mark.parametrize("device", [CUDA])
def test_a_topology_is_made_without_waiting_for_the_device(device: str) -> None:
    tokens = torch.tensor([300, 0, 17, 128], device=device)
    mask = torch.rand(20, 30, device=device) < 0.3
    Topology.from_mask(mask, 128, 400)
    torch.cuda.set_sync_debug_mode("error")
    try:
        diagonal = Topology.block_diagonal(tokens, 256, 128, 512)
        bounded = Topology.from_mask(mask, 128, 400)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    on_cpu = Topology.block_diagonal(tokens.cpu(), 256, 128, 512)
    assert all(torch.equal(a.cpu(), b) for a, b in zip(diagonal.tensors, on_cpu.tensors, strict=True))
    check(bounded, mask.cpu())


MASK = torch.ones(2, 2, dtype=torch.bool)
TOKENS = torch.tensor([3, 4])


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("mask", lambda: Topology.from_mask(MASK.int(), 16)),
        ("mask", lambda: Topology.from_mask(MASK[0], 16)),
        ("block", lambda: Topology.from_mask(MASK, 48)),
        ("max_blocks", lambda: Topology.from_mask(MASK, 16, -1)),
        ("mask .*2\\^31", lambda: Topology.from_mask(torch.zeros(1, 2**24, dtype=torch.bool), 128)),
        ("tokens_per_expert", lambda: Topology.block_diagonal(TOKENS.float(), 32, 16, 7)),
        ("tokens_per_expert", lambda: Topology.block_diagonal(TOKENS.view(1, 2), 32, 16, 7)),
        ("tokens_per_expert", lambda: Topology.block_diagonal(TOKENS[:0], 32, 16, 7)),
        ("columns_per_expert", lambda: Topology.block_diagonal(TOKENS, 40, 16, 7)),
        ("columns_per_expert", lambda: Topology.block_diagonal(TOKENS, 0, 16, 7)),
        ("block", lambda: Topology.block_diagonal(TOKENS, 32, 8, 7)),
        ("max_tokens", lambda: Topology.block_diagonal(TOKENS, 32, 16, -1)),
    ],
)
def test_a_wrong_argument_is_named(name: str, make: Any) -> None:
    with pytest.raises(ValueError, match=name):
        make()


def test_debug_names_a_bound_that_is_too_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAKEMOE_DEBUG", "1")
    with pytest.raises(ValueError, match="max_tokens"):
        Topology.block_diagonal(TOKENS, 32, 16, 6)
    with pytest.raises(ValueError, match="max_blocks"):
        Topology.from_mask(MASK, 16, 3)
    Topology.from_mask(MASK, 16, 4)
