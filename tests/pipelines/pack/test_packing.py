"""The laws of packing: every token in exactly one sequence, order within a document, little waste."""

from __future__ import annotations

import hashlib
import random
from typing import Any

import numpy as np
import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.pack.config import PackConfig
from pipelines.pack.packing import best_fit, concat, cut
from pipelines.pack.pieces import cut_documents
from pipelines.pack.sequences import Edition
from pipelines.pack.stage import FEW_SEQUENCES, thin_validation

LENGTHS = st.lists(st.integers(1, 40), max_size=30)
END, PAD = 0, 1


@given(st.integers(1, 200), st.integers(2, 17))
def test_a_document_is_cut_only_where_it_does_not_fit(length: int, sequence_length: int) -> None:
    pieces = cut(length, sequence_length)
    assert [offset for offset, _ in pieces] == list(range(0, length, sequence_length))
    assert sum(n for _, n in pieces) == length
    assert all(n == sequence_length for _, n in pieces[:-1])
    assert 0 < pieces[-1][1] <= sequence_length


@settings(max_examples=300)
@given(LENGTHS, st.integers(2, 17), st.booleans())
def test_every_token_is_in_exactly_one_sequence(lengths: list[int], sequence_length: int, whole: bool) -> None:
    lengths = [min(n, sequence_length) for n in lengths] if whole else lengths
    sequences = (best_fit if whole else concat)(lengths, sequence_length)
    placed: dict[int, list[tuple[int, int]]] = {}
    for parts in sequences:
        assert 0 < sum(p.length for p in parts) <= sequence_length
        for part in parts:
            placed.setdefault(part.piece, []).append((part.start, part.length))
    assert set(placed) == set(range(len(lengths)))
    for piece, parts_of in placed.items():
        at = 0
        for start, length in sorted(parts_of):
            assert start == at
            assert length > 0
            at += length
        assert at == lengths[piece]
    if whole:
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
    sequences = best_fit([n for length in lengths for _, n in cut(length, 2048)], 2048)
    assert len(sequences) * 2048 <= sum(lengths) * 1.01 + 2048


def documents(lengths: list[int]) -> pa.RecordBatch:
    ids = [f"d{i}" for i in range(len(lengths))]
    tokens = [np.arange(2, 2 + n, dtype="<u4").tobytes() for n in lengths]
    same = {"split": ["train"] * len(ids), "domain": ["text"] * len(ids)}
    return pa.record_batch({"document_id": ids, **same, "tokens": tokens})


def packed(documents: pa.RecordBatch, sequence_length: int, mode: str = "best_fit") -> list[dict[str, Any]]:
    config = PackConfig.model_validate({"sequence_length": sequence_length, "mode": mode})
    edition = Edition(config=config, tokenizer_id="t", end=END, pad=PAD)
    pieces = cut_documents(documents, config, END)
    draw = [hashlib.sha256(d.encode()).hexdigest() for d in pieces["document_id"].to_pylist()]
    table = pa.table(pieces).append_column("draw", pa.array(draw))
    return pa.Table.from_batches(edition.sequences("train", "text", table)).to_pylist()


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=12), st.integers(2, 12), st.sampled_from(["best_fit", "concat"])
)
def test_sequences_give_the_documents_back(lengths: list[int], sequence_length: int, mode: str) -> None:
    table = documents(lengths)
    rows = packed(table, sequence_length, mode)
    shuffled = table.take(pa.array(reversed(range(len(lengths)))))
    assert rows == packed(shuffled, sequence_length, mode)
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
    table = documents([3, 9])
    first = np.frombuffer(table["tokens"][0].as_py(), "<u4") + 1
    tokens = pa.array([first.tobytes(), table["tokens"][1].as_py()], pa.binary())
    other = table.set_column(table.schema.get_field_index("tokens"), "tokens", tokens)
    before, after = packed(table, 8), packed(other, 8)
    for one, two in zip(before, after, strict=True):
        assert (one["sequence_id"] == two["sequence_id"]) == (one["tokens"] == two["tokens"])
    assert before != after


def test_a_thin_validation_split_is_said() -> None:
    train = {("train", "text"): 900, ("train", "code"): 50}
    words = "The validation split is too thin for an evaluation"
    [few] = thin_validation({**train, ("validation", "text"): 3, ("validation", "code"): FEW_SEQUENCES - 4})
    assert few.startswith(f"{words} (sequences: 7): raise --tokenize.validation-fraction")
    [none] = thin_validation({**train, ("validation", "text"): 90})
    assert none.startswith(f"{words} (sequences: 90, none of code): raise")
    assert thin_validation({**train, ("validation", "text"): 4, ("validation", "code"): FEW_SEQUENCES - 4}) == ()
    assert thin_validation({}) == ()
