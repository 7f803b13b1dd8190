"""FineWeb's signals (Penedo et al. 2024, "The FineWeb Datasets", section 3.6), as datatrove 0.10 counts them.

A line is what lies between newlines and is not blank. It ends in terminal punctuation when its very last character, a
trailing space included, is one of Unicode's sentence terminals. The paper's "at most 0.12" and "at least 0.67" are
datatrove's "below" and "above", which are followed; for ``char_dup_ratio`` the paper's 0.1 is, not datatrove's 0.01.
``list_ratio`` is in datatrove and in FineWeb's pipeline, not in the paper. Judging is not here: see ``verdicts``.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pipelines.clean.words import Floats, WordBatch, ratio

SHORT_LINE = 30  # characters, bound included
# Unicode's property Sentence_Terminal (UAX 44, PropList) and three Khmer signs: the code points that datatrove 0.10
# has, which lacks those added since.
_TERMINAL_CODES = (
    "21 2e 3f 589 61d-61f 6d4 700-702 7f9 837 839 83d-83e 964-965 104a-104b 1362 1367-1368 166e 1735-1736 "
    "17d4-17d6 17d9-17da 1803 1809 1944-1945 1aa8-1aab 1b5a-1b5b 1b5e-1b5f 1b7d-1b7e 1c3b-1c3c 1c7e-1c7f "
    "203c-203d 2047-2049 2e2e 2e3c 2e53-2e54 3002 a4ff a60e-a60f a6f3 a6f7 a876-a877 a8ce-a8cf a92f a9c8-a9c9 "
    "aa5d-aa5f aaf0-aaf1 abeb fe52 fe56-fe57 ff01 ff0e ff1f ff61 10a56-10a57 10f55-10f59 10f86-10f89 11047-11048 "
    "110be-110c1 11141-11143 111c5-111c6 111cd 111de-111df 11238-11239 1123b-1123c 112a9 1144b-1144c 115c2-115c3 "
    "115c9-115d7 11641-11642 1173c-1173e 11944 11946 11a42-11a43 11a9b-11a9c 11c41-11c42 11ef7-11ef8 11f43-11f44 "
    "16a6e-16a6f 16af5 16b37-16b38 16b44 16e98 1bc9f 1da88"
)
TERMINALS = frozenset(
    chr(code)
    for first, _, last in (codes.partition("-") for codes in _TERMINAL_CODES.split())
    for code in range(int(first, 16), int(last or first, 16) + 1)
)


def signals(texts: Sequence[str], words: WordBatch) -> dict[str, Floats]:
    """The signals of D texts, each [D], fractions; NaN where a text has no line that is not blank."""
    counts = np.array([_count(text) for text in texts], np.float64).reshape(len(texts), 5)
    lines, ended, short, repeated, newlines = counts.T
    characters = np.array([len(t) for t in texts], np.float64) - newlines
    return {
        "line_punct_ratio": ratio(ended, lines),
        "short_line_ratio": ratio(short, lines),
        "char_dup_ratio": np.where(lines > 0, ratio(repeated, characters), np.nan),
        "list_ratio": ratio(newlines, words.counts.astype(np.float64)),
    }


def _count(text: str) -> tuple[int, int, int, int, int]:
    """Lines, those that end in a terminal, short ones, characters in lines met before; newlines."""
    lines = [line for line in text.split("\n") if line and not line.isspace()]
    lengths = [len(line) for line in lines]
    return (
        len(lines),
        sum(line[-1] in TERMINALS for line in lines),
        sum(length <= SHORT_LINE for length in lengths),
        sum(lengths) - sum(map(len, set(lines))),
        text.count("\n"),
    )
