from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.routing import route


@st.composite
def indices(draw: st.DrawFn) -> tuple[torch.Tensor, int]:
    experts = draw(st.integers(1, 40))
    chosen = draw(st.integers(1, min(experts, 16)))
    tokens = draw(st.integers(0, 200))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    index = torch.rand(tokens, experts, generator=generator).argsort(1)[:, :chosen]
    if draw(st.booleans()):
        index = index.clamp(max=experts // 2)  # several experts without tokens, one with many
    index = index.to("cuda" if torch.cuda.is_available() else "cpu")
    return index.to(draw(st.sampled_from([torch.int32, torch.int64]))), experts


@settings(max_examples=60, deadline=None)
@given(indices())
def test_routing_sorts_stably_and_counts(case: tuple[torch.Tensor, int]) -> None:
    index, experts = case
    routing = route(index, experts)
    flat = index.reshape(-1).tolist()
    assert routing.order.tolist() == sorted(range(len(flat)), key=lambda i: flat[i])
    assert routing.inverse[routing.order.long()].tolist() == list(range(len(flat)))
    assert routing.tokens_per_expert.tolist() == [flat.count(e) for e in range(experts)]
    assert routing.offsets.tolist() == [sum(x < e for x in flat) for e in range(experts + 1)]


@settings(max_examples=60, deadline=None)
@given(indices())
def test_tiles_cover_every_row_once_with_its_expert(case: tuple[torch.Tensor, int]) -> None:
    index, experts = case
    routing = route(index, experts)
    offsets = routing.offsets.tolist()
    owner: dict[int, int] = {}
    for expert, row in zip(routing.tile_expert.tolist(), routing.tile_row.tolist(), strict=True):
        if expert < experts:
            for n in range(row, min(row + routing.tile_rows, offsets[expert + 1])):
                assert n not in owner
                owner[n] = expert
    flat = index.reshape(-1)
    assert [owner[n] for n in range(len(owner))] == flat[routing.order.long()].tolist()


def test_routing_refuses_more_choices_than_experts() -> None:
    with pytest.raises(ValueError, match="expert_index_TK"):
        route(torch.zeros(3, 5, dtype=torch.int64), 4)


def test_routing_refuses_other_shapes_and_dtypes() -> None:
    with pytest.raises(ValueError, match="expert_index_TK"):
        route(torch.zeros(3, dtype=torch.int64), 4)
    with pytest.raises(ValueError, match="expert_index_TK"):
        route(torch.zeros(3, 2), 4)
    with pytest.raises(ValueError, match="num_experts"):
        route(torch.zeros(3, 2, dtype=torch.int64), 0)


@pytest.mark.parametrize("expert", [-1, 4])
def test_debug_checks_the_range(expert: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAKEMOE_DEBUG", "1")
    with pytest.raises(ValueError, match="expert_index_TK"):
        route(torch.tensor([[0, expert]]), 4)
    assert route(torch.tensor([[0, 3]]), 4).tokens_per_expert.tolist() == [1, 0, 0, 1]
