"""Whether our rules decide as datatrove 0.10's filters do on the same words, rule by rule, and why where they do not.

Each of datatrove's filters is made once for every rule with all its other rules off, at the thresholds that it ships
with, and its splitters of words and sentences are replaced by ours. Ours are the signals of ``pipelines.clean`` under
conf/clean.yaml, languages aside, since datatrove's filters have none. The documents are files of this Python (library
sources as if they were prose, package documentation) and ones that hypothesis makes of pieces that the rules look for
and of any characters, since real text hardly meets a rule's edge.

A difference counts as explained only where a second count, written here after what datatrove does, gives datatrove's
decision from the text. Leaves out: the filters' speed, and datatrove's own splitters, with which every count differs.
Needs datatrove 0.10 and hypothesis, and neither Spark nor torch; ends with 1 where a difference is unexplained.
"""

from __future__ import annotations

import argparse
import random
import re
import sys
import sysconfig
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from datatrove.data import Document
from datatrove.pipeline.filters import c4_filters, fineweb_quality_filter, gopher_quality_filter
from datatrove.pipeline.filters import gopher_repetition_filter as repetition_filter
from datatrove.utils.text import PUNCTUATION_SET
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.clean import c4, fineweb, gopher
from pipelines.clean.config import CleanConfig, Rule
from pipelines.clean.normalise import normalise_prose
from pipelines.clean.words import index_words, split_words

DOCUMENTS = 4000
MADE = 5000
LONGEST = 40_000  # characters; every rule is a share but max_words, and n-grams of longer texts are slow in datatrove
BATCH = 200
CITATION = re.compile(r"\[(?:\d*|edit|citation needed)\]")
BAD_WORDS = ("warning", "deprecated", "bad-word", "todo fix", "é")
Theirs = Callable[[str], bool]
Explanation = Callable[[str], bool]


def _theirs() -> dict[str, Theirs]:
    """For each rule, whether datatrove's filter rejects a text when this rule alone is on."""
    repetition_off: dict[str, Any] = dict.fromkeys(
        ("dup_line_frac", "dup_para_frac", "dup_line_char_frac", "dup_para_char_frac")
    ) | {"top_n_grams": (), "dup_n_grams": ()}
    quality_off: dict[str, Any] = dict.fromkeys(
        (
            "min_doc_words",
            "max_doc_words",
            "min_avg_word_length",
            "max_avg_word_length",
            "max_symbol_word_ratio",
            "max_bullet_lines_ratio",
            "max_ellipsis_lines_ratio",
            "max_non_alpha_words_ratio",
            "min_stop_words",
        )
    )
    c4_off: dict[str, Any] = {"min_num_sentences": -1, "filter_lorem_ipsum": False, "filter_curly_bracket": False}
    fineweb_off: dict[str, Any] = {
        "line_punct_thr": -1,
        "short_line_thr": 2,
        "char_duplicates_ratio": 2,
        "new_line_ratio": float("inf"),
    }
    symbols = gopher_quality_filter.GopherQualityFilter(**quality_off | {"max_symbol_word_ratio": 0.1})
    quality: dict[str, dict[str, Any]] = {
        "min_words": {"min_doc_words": 50},
        "max_words": {"max_doc_words": 100000},
        "mean_word_length": {"min_avg_word_length": 3, "max_avg_word_length": 10},
        "bullet_lines": {"max_bullet_lines_ratio": 0.9},
        "ellipsis_lines": {"max_ellipsis_lines_ratio": 0.3},
        "alpha_words": {"max_non_alpha_words_ratio": 0.8},
        "stop_words": {"min_stop_words": 2},
    }
    shipped: dict[str, float] = {
        "dup_line_frac": 0.3,
        "dup_para_frac": 0.3,
        "dup_line_char_frac": 0.2,
        "dup_para_char_frac": 0.2,
    }
    of_fineweb: dict[str, dict[str, Any]] = {
        "line_punct_ratio": {"line_punct_thr": 0.12},
        "short_line_ratio": {"short_line_thr": 0.67},
        "char_dup_ratio": {"char_duplicates_ratio": 0.01},
        "list_ratio": {"new_line_ratio": 0.3},
    }
    filters: dict[str, Any] = {
        **{
            f"gopher_quality.{n}": gopher_quality_filter.GopherQualityFilter(**quality_off | s)
            for n, s in quality.items()
        },
        **{
            f"gopher_repetition.{n}": repetition_filter.GopherRepetitionFilter(**repetition_off | {n: limit})
            for n, limit in shipped.items()
        },
        **{
            f"gopher_repetition.top_{n}_gram": repetition_filter.GopherRepetitionFilter(
                **repetition_off | {"top_n_grams": ((n, limit),)}
            )
            for n, limit in ((2, 0.2), (3, 0.18), (4, 0.16))
        },
        **{
            f"gopher_repetition.dup_{n}_gram": repetition_filter.GopherRepetitionFilter(
                **repetition_off | {"dup_n_grams": ((n, limit),)}
            )
            for n, limit in ((5, 0.15), (6, 0.14), (7, 0.13), (8, 0.12), (9, 0.11), (10, 0.10))
        },
        "c4.min_sentences": c4_filters.C4QualityFilter(**c4_off | {"min_num_sentences": 5}),
        "c4.lorem_ipsum": c4_filters.C4QualityFilter(**c4_off | {"filter_lorem_ipsum": True}),
        "c4.curly_bracket": c4_filters.C4QualityFilter(**c4_off | {"filter_curly_bracket": True}),
        "c4.bad_words": c4_filters.C4BadWordsFilter(),
        **{
            f"fineweb.{n}": fineweb_quality_filter.FineWebQualityFilter(**fineweb_off | s)
            for n, s in of_fineweb.items()
        },
    }

    def of(filter_: Any) -> Theirs:
        return lambda text: filter_.filter(Document(text=text, id="")) is not True

    def symbol(reason: str, count: Callable[[str], int]) -> Theirs:
        # One threshold for both symbols: the other one is taken out of the text where it would answer first.
        return lambda text: (
            (r := symbols.filter(Document(text=text, id=""))) is not True
            and (r[1] == reason or count(text) / len(split_words(text)) > 0.1)
        )

    return {
        **{name: of(filter_) for name, filter_ in filters.items()},
        "gopher_quality.hash_ratio": symbol("gopher_too_many_hashes", lambda t: t.count("#")),
        "gopher_quality.ellipsis_ratio": symbol("gopher_too_many_ellipsis", lambda t: t.count("...") + t.count("…")),
    }


def _with_our_splitters(bad_words: Path) -> None:
    """Hand our words, sentences and list of bad words to datatrove's filters."""
    for module in (gopher_quality_filter, repetition_filter, fineweb_quality_filter):
        module.split_into_words = lambda text, _language: split_words(text)
    c4_filters.split_into_sentences = lambda line, _language: [line] * c4.sentences(line)
    bad_words.write_text("\n".join(BAD_WORDS), encoding="utf-8")
    c4_filters.cached_asset_path_or_download = lambda *_args, **_more: str(bad_words)


def _ours(texts: Sequence[str], rules: Sequence[Rule]) -> dict[str, np.ndarray[Any, np.dtype[np.bool_]]]:
    """For each rule, which of the texts it rejects."""
    words = index_words(texts)
    signals = gopher.quality(texts, words) | gopher.repetition(texts, words) | c4.signals(texts)
    signals |= fineweb.signals(texts, words)
    signals["bad_words"] = np.array([c4.bad_words(t, "en", {"en": BAD_WORDS}) for t in texts])
    found = {}
    for rule in rules:
        value = signals[rule.signal]
        low = value < rule.min if rule.min is not None else np.zeros(len(texts), bool)
        high = value > rule.max if rule.max is not None else np.zeros(len(texts), bool)
        found[rule.name] = low | high
    return found


def _plain_lengths(text: str) -> list[int]:
    """Lengths of the words that are no symbols alone, by datatrove's list of symbols."""
    return [len(w) for w in split_words(text) if not PUNCTUATION_SET.issuperset(w)]


def _min_words(text: str) -> bool:
    return len(_plain_lengths(text)) < 50


def _max_words(text: str) -> bool:
    return len(_plain_lengths(text)) > 100000


def _mean_word_length(text: str) -> bool:
    lengths = _plain_lengths(text)
    return bool(lengths) and not 3 <= sum(lengths) / len(lengths) <= 10


def _in_a_kept_line(phrase: str) -> Explanation:
    """Whether the phrase is in a line of three words that ends in a mark, where datatrove looks for it."""

    def rejects(text: str) -> bool:
        for line in map(str.strip, text.splitlines()):
            cut, words = CITATION.sub("", line), line.split()
            lowered = cut.lower()
            if len(words) < 3 or max(map(len, words)) > 1000:
                continue
            if not cut.endswith((".", "?", "!", '"', "'")) or cut.endswith("..."):
                continue
            if phrase == "{" and "javascript" in lowered:
                continue
            if phrase in lowered:
                return True
        return False

    return rejects


def _joined(n: int, limit: float) -> Explanation:
    """Repeated n-grams known by their letters alone, so that "a bc" repeats "ab c"."""

    def rejects(text: str) -> bool:
        words, seen, characters, at = split_words(text), set(), 0, 0
        while at + n <= len(words):
            gram = "".join(words[at : at + n])
            known = gram in seen
            seen.add(gram)
            characters += len(gram) if known else 0
            at += n if known else 1
        return bool(text) and characters / len(text) > limit

    return rejects


def _repeated_lines(text: str) -> bool:
    lines = Counter(line for line in text.split("\n") if line.strip())
    repeated = sum(len(line) * (times - 1) for line, times in lines.items())
    return repeated / len(text.replace("\n", "")) > 0.01


SYMBOLS = "datatrove has its own list of symbols, we take Unicode's categories P and S"
PAGE = "the paper judges the page, datatrove the lines that it keeps"
JOINED = "datatrove joins the words of an n-gram without a space"
EXPLANATIONS: dict[str, tuple[str, Explanation]] = {
    "gopher_quality.min_words": (SYMBOLS, _min_words),
    "gopher_quality.max_words": (SYMBOLS, _max_words),
    "gopher_quality.mean_word_length": (SYMBOLS, _mean_word_length),
    "c4.lorem_ipsum": (PAGE, _in_a_kept_line("lorem ipsum")),
    "c4.curly_bracket": (PAGE, _in_a_kept_line("{")),
    "fineweb.char_dup_ratio": ("the paper has 0.1, datatrove ships 0.01", _repeated_lines),
    **{
        f"gopher_repetition.dup_{n}_gram": (JOINED, _joined(n, limit))
        for n, limit in ((5, 0.15), (6, 0.14), (7, 0.13), (8, 0.12), (9, 0.11), (10, 0.10))
    },
}


@dataclass(kw_only=True)
class Count:
    """Of one rule: documents by who rejects them, and the texts of differences that nothing explains."""

    documents: int = 0
    both: int = 0
    only_ours: int = 0
    only_theirs: int = 0
    unexplained: list[str] = field(default_factory=list)

    def add(self, name: str, text: str, ours: bool, theirs: bool) -> None:
        self.documents += 1
        self.both += ours and theirs
        self.only_ours += ours and not theirs
        self.only_theirs += theirs and not ours
        if ours != theirs and (name not in EXPLANATIONS or EXPLANATIONS[name][1](text) != theirs):
            self.unexplained.append(text)


def compare(texts: Sequence[str], theirs: dict[str, Theirs], rules: Sequence[Rule], counts: dict[str, Count]) -> None:
    """Add every text's decisions to the counts. Texts without a word are left out: datatrove divides by their words."""
    for start in range(0, len(texts), BATCH):
        batch = [t for t in texts[start : start + BATCH] if t.split()]
        ours = _ours(batch, rules)
        for name, count in counts.items():
            for text, decision in zip(batch, ours[name].tolist(), strict=True):
                count.add(name, text, decision, bool(theirs[name](text)))


def files(limit: int) -> Iterator[str]:
    """Texts of this Python's library and of installed packages, normalised as prose; every n-th file by its path."""
    roots = sorted({sysconfig.get_path("stdlib"), sysconfig.get_path("purelib")})
    found = sorted({p for r in roots for e in ("py", "md", "rst", "txt") for p in Path(r).rglob(f"*.{e}")})
    for path in found[:: max(1, len(found) // limit)]:
        try:
            text = normalise_prose(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError):
            continue
        if text and len(text) <= LONGEST:
            yield text


PIECES = (
    *(
        "the",
        "be",
        "to",
        "of",
        "and",
        "that",
        "have",
        "with",
        "The",
        "a",
        "bc",
        "ab",
        "c",
        "house",
        "ελλάδα",
        "x1",
        "12",
    ),
    *("#", "...", "…", "•", "-", "–", "→", "|", "。", "?", "wait...", "end.", 'said."', "[12]", "[edit]", "fine.[3]"),
    *("lorem ipsum", "Lorem Ipsum dolor", "JavaScript", "use cookies", "{", "}", "今日は", "ภาษาไทย", "warning", "é"),
    *("It was a fine day.", "And so it went on and on.", "No mark here", "todo fix", "x" * 40, "y" * 1001),
)


ENDS = ((" ",), (" ", " ", " ", "\n"), (" ", "\n", "\n\n"), ("", " ", "\n", "\r\n", " \n", "\u2028"))


def made(number: int) -> list[str]:
    """Texts that hypothesis makes, the same each time: a few kinds of piece in each, so that every threshold is met."""
    texts: list[str] = []

    @settings(max_examples=number, derandomize=True, database=None, deadline=None)
    @given(
        st.lists(st.sampled_from(PIECES) | st.text(max_size=8), min_size=1, max_size=12),
        st.sampled_from(ENDS),
        st.integers(1, 150),
        st.randoms(use_true_random=False),
    )
    def make(pieces: list[str], ends: tuple[str, ...], size: int, draw: random.Random) -> None:
        texts.append("".join(draw.choice(pieces) + draw.choice(ends) for _ in range(size)))

    make()
    # Beyond the most words, which no text of pieces reaches.
    return [*texts, "to be, " * 50_001]


def report(title: str, counts: dict[str, Count]) -> int:
    """Print the table; the number of differences that are not explained."""
    print(f"\n{title}: {max(c.documents for c in counts.values()):,} documents")
    print(f"{'rule':<36}{'both reject':>12}{'only ours':>11}{'only theirs':>13}{'unexplained':>13}  why")
    for name, count in counts.items():
        why = EXPLANATIONS[name][0] if count.only_ours or count.only_theirs else ""
        row = f"{count.both:>12,}{count.only_ours:>11,}{count.only_theirs:>13,}{len(count.unexplained):>13,}"
        print(f"{name:<36}{row}  {why}".rstrip())
    for name, count in counts.items():
        for text in sorted(count.unexplained, key=len)[:2]:
            print(f"unexplained, {name}: {text[:300]!r}", file=sys.stderr)
    return sum(len(c.unexplained) for c in counts.values())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=DOCUMENTS, help="files of this Python, about so many (count)")
    parser.add_argument("--made", type=int, default=MADE, help="made documents (count)")
    asked = parser.parse_args()
    print(f"datatrove {version('datatrove')}, Python {sys.version.split()[0]}")
    theirs = _theirs()
    rules = [rule for rule in CleanConfig().rules if rule.name in theirs]
    unexplained = 0
    with tempfile.TemporaryDirectory() as folder:
        _with_our_splitters(Path(folder) / "words")
        for title, texts in (("files", files(asked.documents)), ("made", made(asked.made))):
            counts = {rule.name: Count() for rule in rules}
            compare(list(texts), theirs, rules, counts)
            unexplained += report(title, counts)
    print(f"\n{unexplained:,} differences are unexplained.")
    return 1 if unexplained else 0


if __name__ == "__main__":
    sys.exit(main())
