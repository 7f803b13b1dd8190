"""Evaluation items as hashed runs of words, and the documents of a batch that share one with them; Spark-free.

A document is contaminated by a set when it shares n words in a row with an item of the set, or all the words of an item
shorter than that which has eight and more. Words are compared as Brown et al. 2020 (GPT-3), appendix C, do: in lower
case and without punctuation. That paper removes the match and 200 characters around it and gives up a document cut
into more than ten; here the whole document is rejected, once, so that its verdict can be traced and does not depend on
other documents. It may reject a long document for one quotation; `ngram` is the dial.

Settled here: text is in NFKC and lower case; apostrophes, underscores and invisible format characters are deleted
within a word, and every other character that is no letter, mark or digit parts words, so that prose is compared
whatever its dashes and quotes, code whatever its layout. In scripts that are written without spaces a character with
its marks is a word, so that n of them are a shorter run than n words elsewhere.

Matching is by 64-bit hash and is not verified: with G runs of words in the sets and T in the corpus, about G T / 2^64
of them match by chance, half a document for ten million against a trillion words, 5e-4 against a billion.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.hashing import Int64, Ragged, UInt64, hash_words, rolling

# GPT-3's least n: shorter items are common phrases.
SHORTEST = 8

_WITHIN_A_WORD = r"['’_\p{Cf}]+"
_UNSPACED = r"([\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Myanmar}\p{Khmer}]\p{M}*)"
_BETWEEN_WORDS = r"[^\p{L}\p{M}\p{N}]+"


def comparable(texts: pa.Array) -> pa.Array:
    """The texts as they are compared: the words alone, white space between them (large_string)."""
    texts = pc.utf8_lower(pc.utf8_normalize(texts.cast(pa.large_string()), form="NFKC"))
    texts = pc.replace_substring_regex(texts, pattern=_WITHIN_A_WORD, replacement="")
    texts = pc.replace_substring_regex(texts, pattern=_UNSPACED, replacement=r" \1 ")
    return pc.replace_substring_regex(texts, pattern=_BETWEEN_WORDS, replacement=" ")


@dataclass(frozen=True, kw_only=True)
class Relation:
    """Numbers related to rows 0 to R - 1: those of row r are ``values[offsets[r]:offsets[r + 1]]``, ascending."""

    values: Int64
    offsets: Int64

    @classmethod
    def of(cls, rows: Int64, values: Int64, size: int) -> Relation:
        """From pairs in any order, each once in the result; size: the number of rows."""
        order = np.lexsort((values, rows))
        rows, values = rows[order], values[order]
        new = np.ones(len(rows), bool)
        new[1:] = (rows[1:] != rows[:-1]) | (values[1:] != values[:-1])
        return cls(values=values[new], offsets=np.searchsorted(rows[new], np.arange(size + 1)))

    def at(self, rows: Int64) -> tuple[Int64, Int64]:
        """(index into ``rows``, value) of every pair of the rows asked for, in their order."""
        counts = self.offsets[rows + 1] - self.offsets[rows]
        index = np.repeat(np.arange(len(rows)), counts)
        within = np.arange(len(index)) - np.repeat(np.cumsum(counts) - counts, counts)
        return index, self.values[self.offsets[rows][index] + within]


@dataclass(frozen=True, kw_only=True)
class Index:
    """The n-grams of all sets: G distinct ones of I items in S sets.

    sets: names [S]; sizes: the lengths that occur, ascending (words); hashes: [G], ascending; set_of: the set of each
    item [I]; items_of, sets_of: the items and the sets of each n-gram.
    """

    sets: tuple[str, ...]
    sizes: tuple[int, ...]
    hashes: UInt64
    set_of: Int64
    items_of: Relation
    sets_of: Relation


def build(sets: Iterable[tuple[str, Iterable[pa.Array]]], ngram: int) -> Index:
    """The index of (name, arrays of item texts); items are numbered in order through all sets.

    ngram: words; an item of fewer words counts whole, from ``min(SHORTEST, ngram)`` words up.
    """
    names: list[str] = []
    sizes: set[int] = set()
    set_of: list[Int64] = [np.empty(0, np.int64)]
    hashes: list[UInt64] = [np.empty(0, np.uint64)]
    items: list[Int64] = [np.empty(0, np.int64)]
    total = 0
    for number, (name, arrays) in enumerate(sets):
        names.append(name)
        for texts in arrays:
            set_of.append(np.full(len(texts), number, np.int64))
            for size, values, item in _item_ngrams(hash_words(comparable(texts)), ngram):
                sizes.add(size)
                hashes.append(values)
                items.append(item + total)
            total += len(texts)
    distinct, gram = np.unique(np.concatenate(hashes), return_inverse=True)
    item, owner = np.concatenate(items), np.concatenate(set_of)
    return Index(
        sets=tuple(names),
        sizes=tuple(sorted(sizes)),
        hashes=distinct,
        set_of=owner,
        items_of=Relation.of(gram, item, len(distinct)),
        sets_of=Relation.of(gram, owner[item], len(distinct)),
    )


def _item_ngrams(words: Ragged, ngram: int) -> Iterator[tuple[int, UInt64, Int64]]:
    """(size, hashes, the item of each) for every size that items of these words have."""
    counts = np.diff(words.offsets)
    for size, rolled in rolling(words.values, range(min(SHORTEST, ngram), ngram + 1)):
        having = np.flatnonzero(counts >= ngram if size == ngram else counts == size)
        if not len(having):
            continue
        runs = counts[having] - size + 1
        item = np.repeat(having, runs)
        within = np.arange(len(item)) - np.repeat(np.cumsum(runs) - runs, runs)
        yield size, rolled[words.offsets[item] + within], item


def match(texts: pa.Array, index: Index) -> tuple[Int64, Int64]:
    """(document, n-gram) of every n-gram of the index that a document holds: distinct pairs, ascending."""
    words = hash_words(comparable(texts))
    total = len(index.hashes)
    pairs: list[Int64] = [np.empty(0, np.int64)]
    for size, rolled in rolling(words.values, index.sizes):
        held = _common(rolled, index.hashes)
        if not len(held):
            continue
        near = np.minimum(np.searchsorted(held, rolled), len(held) - 1)
        at = np.flatnonzero(held[near] == rolled)
        document = np.searchsorted(words.offsets, at, side="right") - 1
        # A run of words that goes on into the next document is none.
        inside = at + size <= words.offsets[document + 1]
        gram = np.searchsorted(index.hashes, rolled[at[inside]])
        pairs.append(document[inside] * total + gram)
    found = np.unique(np.concatenate(pairs))
    return found // max(1, total), found % max(1, total)


def _common(values: UInt64, table: UInt64) -> UInt64:
    """The elements of the ascending ``table`` that are among ``values``.

    Sorted values walk through the table from left to right: on a million of each, ten times faster than searching for
    them in the order of the text, which misses the caches at every step.
    """
    values = np.sort(values)
    at = np.searchsorted(table, values)
    at = at[at < len(table)]
    return np.unique(table[at[table[at] == values[: len(at)]]])
