"""Shingle sets, MinHash signatures and LSH bands of a batch of texts, vectorised with Arrow and NumPy.

A document's shingles are its runs of ``size`` consecutive words (text: split on Unicode white space) or tokens (code:
runs of letters, digits and underscores, as BigCode's deduplication takes them); a document with fewer words has one
shingle of all its words, one without words has none. Shingles are 64-bit hashes that depend on nothing but the words,
so that signatures made in different runs meet. Left out: segmentation of languages written without spaces.

MinHash: Broder, "On the resemblance and containment of documents" (1997). Banding: Leskovec, Rajaraman and Ullman,
"Mining of Massive Datasets", section 3.4.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.hashing import BASE, Int64, Ragged, UInt64, hash_words, mix, rolling

NOT_A_CODE_TOKEN = r"[^\p{L}\p{N}_]+"


def word_hashes(texts: pa.Array, is_code: npt.NDArray[np.bool_]) -> Ragged:
    """The hash of every word (text) or token (code) of every document, in order."""
    texts = texts.cast(pa.large_string())
    if is_code.any():
        mask = pa.array(is_code)
        tokens = pc.replace_substring_regex(texts.filter(mask), pattern=NOT_A_CODE_TOKEN, replacement=" ")
        texts = pc.replace_with_mask(texts, mask, tokens)
    return hash_words(texts)


def shingle_hashes(words: Ragged, size: int) -> Ragged:
    """The hash of every shingle of ``size`` words, in order, repeats included."""
    counts = np.diff(words.offsets)
    n = len(words.values)
    _, rolled = next(rolling(words.values, [size]))
    starts = np.arange(n) - np.repeat(words.offsets[:-1], counts)
    keep = starts + size <= np.repeat(counts, counts)
    short = np.flatnonzero((counts > 0) & (counts < size))
    for i in short.tolist():
        value = np.zeros(1, np.uint64)
        for word in words.row(i):
            value = value * BASE + word
        rolled[words.offsets[i]] = value[0]
    keep[words.offsets[short]] = True
    before = np.concatenate([[0], np.cumsum(keep)]).astype(np.int64)
    return Ragged(mix(rolled[keep]), before[words.offsets])


def shingle_sets(texts: pa.Array, is_code: npt.NDArray[np.bool_], size: int) -> list[UInt64]:
    """Every document's set of shingles, sorted, each once."""
    shingles = shingle_hashes(word_hashes(texts, is_code), size)
    return [np.unique(shingles.row(i)) for i in range(len(shingles))]


def signatures(shingles: Ragged, permutations: int) -> UInt64:
    """MinHash signatures [documents, permutations]; every document must have a shingle.

    Permutation j maps x to a_j x + b_j modulo 2^64 with odd a_j: the shingles are mixed hashes already.
    """
    out = np.empty((len(shingles), permutations), np.uint64)
    if not len(shingles):
        return out
    draws = mix(np.arange(1, 2 * permutations + 1, dtype=np.uint64) * BASE)
    starts = shingles.offsets[:-1]
    hashed = np.empty_like(shingles.values)
    for j in range(permutations):
        np.multiply(shingles.values, draws[2 * j] | np.uint64(1), out=hashed)
        hashed += draws[2 * j + 1]
        out[:, j] = np.minimum.reduceat(hashed, starts)
    return out


def band_buckets(signature: UInt64, bands: int, rows: int) -> Int64:
    """The bucket of every band, [documents, bands]: a hash of the band's ``rows`` minima and its number."""
    out = np.empty((len(signature), bands), np.uint64)
    for band in range(bands):
        bucket = np.full(len(signature), band + 1, np.uint64)
        for row in range(rows):
            bucket = mix((bucket ^ signature[:, band * rows + row]) + BASE)
        out[:, band] = bucket
    return out.view(np.int64)


def lsh(texts: pa.Array, is_code: npt.NDArray[np.bool_], *, size: int, bands: int, rows: int) -> tuple[Int64, Int64]:
    """The positions of the documents that have shingles, and their buckets [those documents, bands]."""
    shingles = shingle_hashes(word_hashes(texts, is_code), size)
    having = np.flatnonzero(np.diff(shingles.offsets))
    # Documents without shingles own no value, so leaving their offset out leaves the values as they are.
    offsets = np.concatenate([shingles.offsets[having], shingles.offsets[-1:]])
    return having, band_buckets(signatures(Ragged(shingles.values, offsets), bands * rows), bands, rows)
