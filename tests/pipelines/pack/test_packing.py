"""The laws of packing: every token in exactly one sequence, order within a document, little waste."""

from __future__ import annotations

import random

import numpy as np
import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.pack.config import PackConfig
from pipelines.pack.packing import best_fit, concat
from pipelines.pack.stage import Packer

LENGTHS = st.lists(st.integers(0, 40), max_size=30)
END, PAD = 0, 1


@settings(max_examples=300, deadline=None)
@given(LENGTHS, st.integers(2, 17), st.sampled_from([best_fit, concat]))
def test_every_token_is_in_exactly_one_sequence(lengths: list[int], sequence_length: int, arrange: object) -> None:
    sequences = arrange(lengths, sequence_length)  # type: ignore[operator]
    placed: dict[int, list[tuple[int, int]]] = {}
    for pieces in sequences:
        assert 0 < sum(p.length for p in pieces) <= sequence_length
        for piece in pieces:
            placed.setdefault(piece.document, []).append((piece.offset, piece.length))
    assert set(placed) == {i for i, n in enumerate(lengths) if n}
    for document, parts in placed.items():
        at = 0
        for offset, length in sorted(parts):
            assert offset == at
            assert length > 0
            at += length
        assert at == lengths[document]


@settings(max_examples=200, deadline=None)
@given(LENGTHS, st.integers(2, 17))
def test_best_fit_cuts_only_what_does_not_fit(lengths: list[int], sequence_length: int) -> None:
    sequences = best_fit(lengths, sequence_length)
    pieces = [p for s in sequences for p in s]
    assert len(pieces) == sum(-(-n // sequence_length) for n in lengths)
    # Two sequences less than half full would have been one.
    assert sum(2 * sum(p.length for p in s) <= sequence_length for s in sequences) <= 1


def test_best_fit_equals_a_plain_search() -> None:
    rng = random.Random(0)
    lengths = [rng.randrange(1, 64) for _ in range(400)]
    bins: list[list[int]] = []
    for length in sorted(lengths, reverse=True):
        fitting = [b for b in bins if sum(b) + length <= 64]
        if fitting:
            max(fitting, key=sum).append(length)
        else:
            bins.append([length])
    ours = best_fit(lengths, 64)
    assert sorted(sum(b) for b in bins) == sorted(sum(p.length for p in s) for s in ours)


def test_waste_is_small_on_skewed_lengths() -> None:
    rng = random.Random(0)
    lengths = [int(rng.lognormvariate(6, 1.2)) + 1 for _ in range(3000)]
    sequences = best_fit(lengths, 2048)
    assert len(sequences) * 2048 <= sum(lengths) * 1.01 + 2048


def documents(lengths: list[int]) -> pa.Table:
    rng = random.Random(3)
    return pa.table(
        {
            "document_id": [f"d{i}" for i in range(len(lengths))],
            "tokens": [np.arange(2, 2 + n, dtype="<u4").tobytes() for n in lengths],
            "draw": [f"{rng.random():.12f}" for _ in lengths],
        }
    )


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=12), st.integers(2, 12), st.sampled_from(["best_fit", "concat"])
)
def test_sequences_give_the_documents_back(lengths: list[int], sequence_length: int, mode: str) -> None:
    config = PackConfig.model_validate({"sequence_length": sequence_length, "mode": mode})
    packer = Packer(config, tokenizer_id="t", end=END, pad=PAD)
    table = documents(lengths)
    rows = pa.Table.from_batches(packer.sequences("train", "text", table)).to_pylist()
    shuffled = table.take(list(reversed(range(len(lengths)))))
    assert rows == pa.Table.from_batches(packer.sequences("train", "text", shuffled)).to_pylist()
    assert len({r["sequence_id"] for r in rows}) == len(rows)
    found: dict[str, list[list[int]]] = {}
    for row in rows:
        tokens = np.frombuffer(row["tokens"], "<u4").tolist()
        assert len(tokens) == sequence_length == sum(row["segment_lengths"])
        assert tokens[sequence_length - row["pad_count"] :] == [PAD] * row["pad_count"]
        assert len(row["segment_lengths"]) == len(row["document_ids"]) + (row["pad_count"] > 0)
        for document, length in zip(row["document_ids"], row["segment_lengths"], strict=False):
            found.setdefault(document, []).append(tokens[:length])
            tokens = tokens[length:]
    for i, n in enumerate(lengths):
        # Tokens rise through a document, so its pieces are put in order by their first; its end token alone comes last.
        pieces = sorted(found[f"d{i}"], key=lambda piece: (piece[0] == END, piece[0]))
        assert [t for piece in pieces for t in piece] == [*range(2, 2 + n), END]


def test_other_tokens_of_equal_number_are_another_sequence() -> None:
    packer = Packer(PackConfig.model_validate({"sequence_length": 8}), tokenizer_id="t", end=END, pad=PAD)
    table = documents([3, 9])
    first = np.frombuffer(table["tokens"][0].as_py(), "<u4") + 1
    tokens = pa.array([first.tobytes(), table["tokens"][1].as_py()], pa.binary())
    other = table.set_column(table.schema.get_field_index("tokens"), "tokens", tokens)
    before, after = (pa.Table.from_batches(packer.sequences("train", "text", t)).to_pylist() for t in (table, other))
    for one, two in zip(before, after, strict=True):
        assert (one["sequence_id"] == two["sequence_id"]) == (one["tokens"] == two["tokens"])
    assert before != after
