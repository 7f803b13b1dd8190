"""Words of Arrow's buffers whatever lies behind them; rolling hashes of equal words are equal, at every size."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.hashing import hash_words, rolling


@given(st.lists(st.sampled_from("abc"), max_size=40), st.sets(st.integers(1, 9), min_size=1, max_size=4))
def test_runs_hash_equally_exactly_where_their_words_are_equal(words: list[str], sizes: set[int]) -> None:
    hashed = hash_words(pa.array([" ".join(words)], pa.large_string()))
    assert len(hashed.values) == len(words)
    asked = []
    for size, hashes in rolling(hashed.values, sizes):
        asked.append(size)
        assert len(hashes) == len(words)
        runs = [tuple(words[i : i + size]) for i in range(len(words) - size + 1)]
        for i, one in enumerate(runs):
            assert [bool(h == hashes[i]) for h in hashes[: len(runs)]] == [one == other for other in runs]
    assert asked == sorted(sizes)


def test_a_slice_of_an_array_hashes_as_the_array() -> None:
    texts = pa.array(["one two", " two  three ", "", "four"], pa.large_string())
    whole, part = hash_words(texts), hash_words(texts.slice(1, 2))
    assert np.array_equal(whole.row(1), part.row(0))
    assert len(part.row(1)) == 0
    assert part.row(0)[0] == whole.row(0)[1]


@pytest.mark.parametrize("text", ["a b", "a \t", "\t\t \t", "a\u2003 ", " a ", "", " "])
@pytest.mark.parametrize("behind", [b"", b"xx", b"\xc3\xa9", b"\xff\xff", b"  "])
def test_what_lies_behind_the_last_text_makes_no_word(text: str, behind: bytes) -> None:
    raw = text.encode()
    values = pa.py_buffer(raw + behind).slice(0, len(raw))
    texts = pa.LargeStringArray.from_buffers(1, pa.py_buffer(np.array([0, len(raw)], np.int64)), values)
    found = hash_words(texts)
    assert len(found.row(0)) == len(text.split())
    assert (found.row(0) == hash_words(pa.array([text], pa.large_string())).row(0)).all()
