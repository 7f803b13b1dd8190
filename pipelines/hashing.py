"""Words and runs of words as 64-bit hashes, vectorised with Arrow and NumPy: what dedup and decontaminate share.

Hashes depend on nothing but the words, so that those made in different runs and processes meet. Left out: what a word
is; a caller hands texts over whose words stand between white space.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

UInt64 = npt.NDArray[np.uint64]
Int64 = npt.NDArray[np.int64]

# Odd: multiplication by it is a bijection modulo 2^64. The bits are those of the golden ratio's fraction.
BASE = np.uint64(0x9E3779B97F4A7C15)


def mix(x: UInt64) -> UInt64:
    """SplitMix64's finaliser (Steele, Lea and Flood 2014): a bijection of 64-bit words that spreads every bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@dataclass(frozen=True)
class Ragged:
    """One list of 64-bit hashes a document: document i's are ``values[offsets[i]:offsets[i + 1]]``."""

    values: UInt64
    offsets: Int64

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def row(self, i: int) -> UInt64:
        return self.values[self.offsets[i] : self.offsets[i + 1]]


def hash_words(texts: pa.Array) -> Ragged:
    """The hash of every word of every text, in order; texts: large_string, words between Unicode white space."""
    # pyarrow (25.0) reads a byte beyond its buffer where the last text ends in white space, and where that is garbage
    # takes the white space for a word (apache/arrow#37757).
    split = pc.utf8_split_whitespace(pc.utf8_rtrim_whitespace(texts))
    words = split.flatten().dictionary_encode()
    # Each distinct word is hashed once; pandas' string hash is keyed by a constant, unlike Python's.
    distinct = pd.util.hash_array(words.dictionary.to_numpy(zero_copy_only=False).astype(object), categorize=False)
    distinct = mix(distinct.astype(np.uint64))
    codes = words.indices.to_numpy()
    hashes = distinct[codes] if len(codes) else np.empty(0, np.uint64)
    # White space at the beginning of a text gives an empty word there, and so does a text without words.
    empty = pc.equal(words.dictionary, "").to_numpy(zero_copy_only=False)
    real = ~empty[codes] if len(codes) else np.empty(0, bool)
    before = np.concatenate([[0], np.cumsum(real)]).astype(np.int64)
    offsets = split.offsets.to_numpy() - split.offsets[0].as_py()
    return Ragged(hashes[real], before[offsets])


def rolling(words: UInt64, sizes: Iterable[int]) -> Iterator[tuple[int, UInt64]]:
    """(size, hashes [N]) by ascending size: element i is the polynomial hash of ``words[i:i + size]``.

    Where fewer than ``size`` words follow, it is the hash of those that do. All sizes share one sweep and one array: a
    yielded array holds until the next is asked for.
    """
    n = len(words)
    rolled = np.zeros(n, np.uint64)
    done = 0
    for size in sorted(sizes):
        for k in range(done, min(size, n)):
            rolled[: n - k] *= BASE
            rolled[: n - k] += words[k:]
        done = size
        yield size, rolled
