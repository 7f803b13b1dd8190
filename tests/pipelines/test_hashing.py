"""Rolling hashes: equal words hash equally, at every size of one sweep."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
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
