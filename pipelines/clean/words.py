"""The one split into words that every family of signals shares, and a batch of documents as integers.

A word is a maximal run of characters between Unicode white space, as the papers count. In scripts that are written
without spaces (Han, Kana, Thai, Lao, Burmese, Khmer) every character with the marks that it carries is a word of its
own, about an extended grapheme cluster of UAX 29: a vowel sign alone would be a word without a letter, and half of a
Burmese text would seem to be none. A dictionary segmenter would be better for them and is not here. Documents are split
once; their distinct words are numbered once a batch, so that every later count is arithmetic on integers.
"""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

_UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u31f0-\u31ff"
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
_UNSPACED_CHAR = re.compile(f"[{_UNSPACED}]")
# Vowel signs, tone marks and viramas of Thai, Lao, Burmese, Khmer, and the voicing marks of Kana.
_MARKS = "".join(c for c in map(chr, (*range(0x0E00, 0x3100), 0xFE0E, 0xFE0F)) if unicodedata.category(c)[0] == "M")
_WORD = re.compile(f"[{_UNSPACED}][{_MARKS}]*|[^\\s{_UNSPACED}]+")


def split_words(text: str) -> list[str]:
    """The words of a text, in order."""
    if text.isascii() or not _UNSPACED_CHAR.search(text):
        return text.split()
    return _WORD.findall(text)


def ratio(part: Floats, whole: Floats) -> Floats:
    """part / whole; NaN, not measured, where there is no whole."""
    return np.divide(part, whole, out=np.full(len(part), np.nan), where=whole > 0)


def has_letter(word: str) -> bool:
    """Whether a word has a character of a Unicode letter category."""
    return word.isalpha() or any(map(str.isalpha, word))


def is_symbol(word: str) -> bool:
    """Whether a word is punctuation and symbols alone (Unicode categories P and S)."""
    return not any(map(str.isalnum, word)) and all(unicodedata.category(c)[0] in "PS" for c in word)


@dataclass(frozen=True, kw_only=True)
class WordBatch:
    """The words of D documents, N in all: ``vocabulary[ids[starts[d]:starts[d + 1]]]`` are those of document d.

    ids: int64 [N]; starts: int64 [D + 1]; vocabulary: the distinct words; lengths: int64 [V], in characters.
    """

    ids: Ints
    starts: Ints
    vocabulary: list[str]
    lengths: Ints

    @property
    def counts(self) -> Ints:
        """Words of each document, [D]."""
        return np.diff(self.starts)

    def document(self) -> Ints:
        """The document of each word, [N]."""
        return np.repeat(np.arange(len(self.starts) - 1), self.counts)

    def sums(self, of_vocabulary: Ints) -> Ints:
        """For each document the sum, over its words, of a value that each distinct word has: [V] to [D]."""
        total = np.concatenate(([0], np.cumsum(of_vocabulary[self.ids])))
        return total[self.starts[1:]] - total[self.starts[:-1]]


def index_words(texts: Sequence[str]) -> WordBatch:
    """Split every text and number its words by first appearance in the batch."""
    number: defaultdict[str, int] = defaultdict()
    number.default_factory = number.__len__
    parts: list[Ints] = []
    for text in texts:
        words = split_words(text)
        parts.append(np.fromiter(map(number.__getitem__, words), np.int64, len(words)))
    starts = np.zeros(len(texts) + 1, np.int64)
    np.cumsum([len(p) for p in parts], out=starts[1:])
    vocabulary = list(number)
    return WordBatch(
        ids=np.concatenate(parts) if parts else np.zeros(0, np.int64),
        starts=starts,
        vocabulary=vocabulary,
        lengths=np.fromiter(map(len, vocabulary), np.int64, len(vocabulary)),
    )
