"""C4's signals (Raffel et al. 2020, section 2.2; line rules as in TensorFlow Datasets' c4_utils).

Lines are counted, never cut: ``sentences`` is how many sentences the lines hold that C4 would keep, so that the page is
judged as C4 judges it while its text stays whole. The phrase "lorem ipsum" and the curly bracket judge the whole page,
as in the paper; datatrove and c4_utils look for them in the lines that they keep alone. A line's words are counted
before citations are taken out, as datatrove 0.10 does, not after, as c4_utils does. Sentences end at a run of ". ! ?"
before white space or the line's end, and every kept line holds one at least; the original splits them with NLTK's Punkt
model, which no wheel carries. ``bad_words`` counts the words of a list that the configuration gives by language: C4's
own list is not here, since what it removes beside obscenity is disputed (Dodge et al. 2021, section 5).
Left out: C4's removal of spans of three sentences met before, which looks at the whole corpus, and mC4's paragraphs.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence

import numpy as np

from pipelines.clean.words import Floats

POLICY_PHRASES = ("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies")
MIN_WORDS_A_LINE = 3
MAX_WORD_LENGTH = 1000  # characters
_TERMINAL = (".", "?", "!", '"', "'")
_CITATION = re.compile(r"\[\d*\]|\[edit\]|\[citation needed\]")
_SENTENCE_END = re.compile(r"[.!?]+[\"')\]]*(?=\s|$)")
# Where words are not set apart by spaces a bad word counts inside of another (c4_utils, get_badwords_filter_fn).
_UNSPACED_LANGUAGES = ("ja", "th", "zh")

BadWords = Mapping[str, Sequence[str]]


def sentences(line: str) -> int:
    """Sentences in a line that is not empty: one at least."""
    return max(1, len(_SENTENCE_END.findall(line)))


def _kept(raw: str, *, javascript: bool, policy: bool) -> str:
    """The line without white space around it and without citations, empty where C4 drops it.

    javascript, policy: whether the page has such a phrase at all.
    """
    line = raw.strip()
    if not line.endswith((*_TERMINAL, "]")):
        return ""
    words = line.split()
    if len(words) < MIN_WORDS_A_LINE:
        return ""
    if len(line) > MAX_WORD_LENGTH and max(map(len, words)) > MAX_WORD_LENGTH:
        return ""
    if "[" in line:
        line = _CITATION.sub("", line)
    if not line.endswith(_TERMINAL) or line.endswith("..."):
        return ""
    if javascript or policy:
        lowered = line.lower()
        if (javascript and "javascript" in lowered) or (policy and any(p in lowered for p in POLICY_PHRASES)):
            return ""
    return line


def page_signals(text: str) -> dict[str, float]:
    """One page's counts of kept sentences and of lines with C4's phrases; 1.0 or 0.0 for the page rules."""
    lowered = text.lower()
    javascript = "javascript" in lowered
    policy = any(p in lowered for p in POLICY_PHRASES)
    kept = (_kept(line, javascript=javascript, policy=policy) for line in text.splitlines())
    low_lines = lowered.splitlines() if javascript or policy else []
    return {
        "sentences": float(sum(sentences(line) for line in kept if line)),
        "lorem_ipsum": float("lorem ipsum" in lowered),
        "curly_bracket": float("{" in text),
        "javascript_lines": float(sum("javascript" in x for x in low_lines)),
        "policy_lines": float(sum(any(p in x for p in POLICY_PHRASES) for x in low_lines)),
    }


def signals(texts: Sequence[str]) -> dict[str, Floats]:
    """The signals of D texts, each [D]; ``bad_words`` needs their languages and is apart."""
    pages = [page_signals(t) for t in texts]
    names = ("sentences", "lorem_ipsum", "curly_bracket", "javascript_lines", "policy_lines")
    return {name: np.array([p[name] for p in pages], np.float64) for name in names}


@functools.cache
def _bad_words_pattern(words: tuple[str, ...], spaced: bool) -> re.Pattern[str]:
    # Longest first, so that a word is not hidden by its own beginning.
    choice = "|".join(re.escape(word) for word in sorted(words, key=lambda w: (-len(w), w)))
    return re.compile(rf"(?<!\w)(?:{choice})(?!\w)" if spaced else choice)


def bad_words(text: str, language: str | None, lists: BadWords) -> float:
    """How often the text has a word of its language's list, in any case; NaN where the language has no list."""
    words = tuple(lists.get(language or "", ()))
    if not words:
        return float("nan")
    return float(len(_bad_words_pattern(words, language not in _UNSPACED_LANGUAGES).findall(text.lower())))
