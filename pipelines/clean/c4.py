"""C4's signals (Raffel et al. 2020, section 2.2; line rules as in TensorFlow Datasets' c4_utils).

Lines are counted, never cut: ``sentences`` is how many sentences the lines hold that C4 would keep, so that the page is
judged as C4 judges it while its text stays whole. The phrase "lorem ipsum" and the curly bracket judge the whole page.
Sentences end at a run of ". ! ?" before white space or the line's end, and every kept line holds one at least; the
original splits them with NLTK's Punkt model, which no wheel carries. C4's list of bad words is not here.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from pipelines.clean.words import Floats

POLICY_PHRASES = ("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies")
MIN_WORDS_A_LINE = 3
MAX_WORD_LENGTH = 1000
_TERMINAL = (".", "?", "!", '"', "'")
_CITATION = re.compile(r"\[\d*\]|\[edit\]|\[citation needed\]")
_SENTENCE_END = re.compile(r"[.!?]+[\"')\]]*(?=\s|$)")


def _is_kept(line: str, *, javascript: bool, policy: bool) -> bool:
    """Whether C4 keeps a stripped line; the flags say whether the page has such a phrase at all."""
    if not line.endswith(_TERMINAL) or line.endswith("..."):
        return False
    words = line.split()
    if len(words) < MIN_WORDS_A_LINE:
        return False
    if len(line) > MAX_WORD_LENGTH and max(map(len, words)) > MAX_WORD_LENGTH:
        return False
    if javascript or policy:
        lowered = line.lower()
        return not ((javascript and "javascript" in lowered) or (policy and any(p in lowered for p in POLICY_PHRASES)))
    return True


def page_signals(text: str) -> dict[str, float]:
    """One page's counts of kept sentences and of lines with C4's phrases; 1.0 or 0.0 for the page rules."""
    lowered = text.lower()
    javascript = "javascript" in lowered
    policy = any(p in lowered for p in POLICY_PHRASES)
    lines = text.splitlines()
    sentences = 0
    for raw in lines:
        line = raw.strip()
        if "[" in line:
            line = _CITATION.sub("", line)
        if _is_kept(line, javascript=javascript, policy=policy):
            sentences += max(1, len(_SENTENCE_END.findall(line)))
    low_lines = lowered.splitlines() if javascript or policy else []
    return {
        "sentences": float(sentences),
        "lorem_ipsum": float("lorem ipsum" in lowered),
        "curly_bracket": float("{" in text),
        "javascript_lines": float(sum("javascript" in x for x in low_lines)),
        "policy_lines": float(sum(any(p in x for p in POLICY_PHRASES) for x in low_lines)),
    }


def signals(texts: Sequence[str]) -> dict[str, Floats]:
    """The signals of D texts, each [D]."""
    pages = [page_signals(t) for t in texts]
    names = ("sentences", "lorem_ipsum", "curly_bracket", "javascript_lines", "policy_lines")
    return {name: np.array([p[name] for p in pages], np.float64) for name in names}
