"""Character counts of repeated word n-grams, for all documents of a batch in one sweep.

An n-gram can repeat only where both (n-1)-grams in it repeat, so every length sorts only what is left of the length
before; the identity of an n-gram is the exact pair of its (n-1)-grams' numbers, no hash. Counting follows datatrove
0.10 (`find_top_duplicate`, `find_all_duplicate`), which settles what Rae et al. 2021, section A1.1, leave open: the top
n-gram is counted with its spaces and even when it occurs once, ties go to the earliest; a repeated n-gram counts
without spaces, and the n-grams that overlap a counted repetition are passed over.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from pipelines.clean.words import Ints, WordBatch


@dataclass(frozen=True, kw_only=True)
class Repeated:
    """The n-grams that occur more than once in their document: R occurrences in G groups.

    positions: [R] ascending index of the n-gram's first word; group: [R]; first: [G] earliest position; counts: [G].
    """

    n: int
    positions: Ints
    group: Ints
    first: Ints
    counts: Ints


def repeated_ngrams(words: WordBatch, largest: int) -> Iterator[Repeated]:
    """The repeated n-grams for n = 2 to ``largest``, by document."""
    total = len(words.ids)
    document = words.document()
    positions = np.flatnonzero(document[:-1] == document[1:]) if total else np.zeros(0, np.int64)
    size = len(words.vocabulary)
    keys = (document[positions] * size + words.ids[positions]) * size + words.ids[positions + 1]
    # -1 where the n-gram that starts there occurs once; one more than there are words, so that p + 1 is always inside.
    number = np.full(total + 1, -1, np.int64)
    shorter = positions[:0]
    for n in range(2, largest + 1):
        found = _group(n, positions, keys)
        yield found
        number[shorter] = -1
        number[found.positions] = found.group
        shorter = found.positions
        positions = found.positions[number[found.positions + 1] >= 0]
        keys = number[positions] * len(found.first) + number[positions + 1]


def _group(n: int, positions: Ints, keys: Ints) -> Repeated:
    """Keep the positions whose key occurs more than once."""
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    starts = np.flatnonzero(np.concatenate(([True], ordered[1:] != ordered[:-1]))) if len(keys) else order
    counts = np.diff(np.concatenate((starts, [len(keys)])))
    several = counts > 1
    numbers = np.where(several, np.cumsum(several) - 1, -1)
    group = np.empty(len(keys), np.int64)
    group[order] = np.repeat(numbers, counts)
    kept = group >= 0
    return Repeated(
        n=n,
        positions=positions[kept],
        group=group[kept],
        first=positions[order[starts[several]]],
        counts=counts[several],
    )


def top_characters(words: WordBatch, found: Repeated) -> Ints:
    """Characters covered by the most frequent n-gram of each document, [D]; 0 where it has fewer than n words."""
    document = words.document()
    ends = _ends(words)
    first = words.starts[:-1].copy()
    times = np.ones(len(first), np.int64)
    best = np.lexsort((found.first, -found.counts, document[found.first]))
    owners, index = np.unique(document[found.first][best], return_index=True)
    first[owners] = found.first[best][index]
    times[owners] = found.counts[best][index]
    enough = words.counts >= found.n
    at = first[enough]
    characters = np.zeros(len(first), np.int64)
    characters[enough] = (ends[at + found.n] - ends[at] + found.n - 1) * times[enough]
    return characters


def duplicated_characters(words: WordBatch, found: Repeated) -> Ints:
    """Characters of each document in repeated n-grams, each character once, [D]."""
    n = found.n
    seen: set[int] = set()
    counted: list[int] = []
    free = 0
    for position, group in zip(found.positions.tolist(), found.group.tolist(), strict=True):
        if position < free:
            continue
        if group in seen:
            counted.append(position)
            free = position + n
        else:
            seen.add(group)
    at = np.array(counted, np.int64)
    ends = _ends(words)
    document = np.searchsorted(words.starts, at, side="right") - 1
    characters = np.zeros(len(words.starts) - 1, np.int64)
    np.add.at(characters, document, ends[at + n] - ends[at])
    return characters


def _ends(words: WordBatch) -> Ints:
    """Characters of all words before each word, [N + 1]."""
    return np.concatenate(([0], np.cumsum(words.lengths[words.ids])))
