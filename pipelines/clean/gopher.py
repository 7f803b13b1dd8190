"""Gopher's quality and repetition signals (Rae et al. 2021, "Scaling Language Models", section A1.1 and table A1).

Where the paper leaves a count open, datatrove 0.10 is followed: a line is what lies between newlines, a paragraph
between blank lines; a bullet is "•" or "-"; stop words are matched as written and distinct ones are counted; the number
of words and their mean length leave out words that are symbols alone. A symbol is a character of the Unicode categories
P and S (datatrove has a list of its own, which lacks some bullets). Judging is not here: see ``verdicts``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from pipelines.clean.ngrams import duplicated_characters, repeated_ngrams, top_characters
from pipelines.clean.words import Floats, WordBatch, has_letter, is_symbol, ratio

STOP_WORDS = ("the", "be", "to", "of", "and", "that", "have", "with")
TOP_N = (2, 3, 4)
DUPLICATED_N = (5, 6, 7, 8, 9, 10)
_PARAGRAPH_END = re.compile(r"\n{2,}")
_LINE_END = re.compile(r"\n+")
_BULLETS = ("•", "-")
_ELLIPSES = ("...", "…")


def quality(texts: Sequence[str], words: WordBatch) -> dict[str, Floats]:
    """The quality signals of D texts, each [D]; NaN where a text has no word or no line to measure."""
    vocabulary = words.vocabulary
    plain = np.fromiter((not is_symbol(w) for w in vocabulary), np.int64, len(vocabulary))
    letters = np.fromiter(map(has_letter, vocabulary), np.int64, len(vocabulary))
    count = words.counts.astype(np.float64)
    plain_count = words.sums(plain).astype(np.float64)
    lines = [text.splitlines() for text in texts]
    line_count = np.array([len(x) for x in lines], np.float64)

    def per_text(values: list[int]) -> Floats:
        return np.array(values, np.float64)

    return {
        "words": plain_count,
        "mean_word_length": ratio(words.sums(plain * words.lengths).astype(np.float64), plain_count),
        "hash_ratio": ratio(per_text([t.count("#") for t in texts]), count),
        "ellipsis_ratio": ratio(per_text([t.count("...") + t.count("…") for t in texts]), count),
        "bullet_lines": ratio(per_text([sum(x.lstrip().startswith(_BULLETS) for x in ls) for ls in lines]), line_count),
        "ellipsis_lines": ratio(
            per_text([sum(x.rstrip().endswith(_ELLIPSES) for x in ls) for ls in lines]), line_count
        ),
        "alpha_words": ratio(words.sums(letters).astype(np.float64), count),
        "stop_words": _distinct_stop_words(words),
    }


def _distinct_stop_words(words: WordBatch) -> Floats:
    index = {w: i for i, w in enumerate(STOP_WORDS)}
    which = np.fromiter((index.get(w, -1) for w in words.vocabulary), np.int64, len(words.vocabulary))[words.ids]
    hits = which >= 0
    pairs = np.unique(words.document()[hits] * len(STOP_WORDS) + which[hits])
    return np.bincount(pairs // len(STOP_WORDS), minlength=len(words.starts) - 1).astype(np.float64)


def repetition(texts: Sequence[str], words: WordBatch) -> dict[str, Floats]:
    """The repetition signals of D texts, each [D]: fractions of lines, paragraphs and of the text's characters."""
    characters = np.array([max(len(t), 1) for t in texts], np.float64)
    signals: dict[str, Floats] = {}
    pieces = {
        "line": [_LINE_END.split(t) for t in texts],
        "para": [_PARAGRAPH_END.split(t.strip()) for t in texts],
    }
    for name, split in pieces.items():
        distinct = [set(x) for x in split]
        fractions = [(len(x) - len(d)) / len(x) for x, d in zip(split, distinct, strict=True)]
        repeated = [sum(map(len, x)) - sum(map(len, d)) for x, d in zip(split, distinct, strict=True)]
        signals[f"dup_{name}_frac"] = np.array(fractions, np.float64)
        signals[f"dup_{name}_char_frac"] = np.array(repeated, np.float64) / characters
    for found in repeated_ngrams(words, DUPLICATED_N[-1]):
        if found.n in TOP_N:
            signals[f"top_{found.n}_gram"] = top_characters(words, found) / characters
        elif found.n in DUPLICATED_N:
            signals[f"dup_{found.n}_gram"] = duplicated_characters(words, found) / characters
    return signals
