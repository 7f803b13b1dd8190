"""What counts as contamination, against plain Python sets and in texts as they are met."""

from __future__ import annotations

import time
import unicodedata

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.decontaminate.ngrams import SHORTEST, Index, build, match

QUESTION = (
    "A train leaves the station at nine o'clock and travels north at sixty miles an hour; a second train leaves two "
    "hours later. When does it overtake the first?"
)
FUNCTION = '''
def has_close_elements(numbers: List[float], threshold: float) -> bool:
    """Check if in given list of numbers, are any two numbers closer to each other than given threshold."""
    for idx, elem in enumerate(numbers):
        for idx2, elem2 in enumerate(numbers):
            if idx != idx2 and abs(elem - elem2) < threshold:
                return True
    return False
'''


def index(*items: str, ngram: int = 13) -> Index:
    return build([("a", [pa.array(items, pa.large_string())])], ngram)


def hit(document: str, *items: str, ngram: int = 13) -> bool:
    return len(match(pa.array(["before " * 20, document, "after " * 20]), index(*items, ngram=ngram))[0]) > 0


def plain(words: list[str], ngram: int) -> set[tuple[str, ...]]:
    size = min(len(words), ngram)
    if size < min(SHORTEST, ngram):
        return set()
    return {tuple(words[i : i + size]) for i in range(len(words) - size + 1)}


WORDS = st.lists(st.sampled_from("ab"), max_size=18)


@settings(max_examples=100)
@given(st.lists(st.lists(WORDS, max_size=4), min_size=1, max_size=3), st.lists(WORDS, max_size=6), st.integers(2, 11))
def test_matches_are_those_of_plain_sets(sets: list[list[list[str]]], documents: list[list[str]], ngram: int) -> None:
    def texts(of: list[list[str]]) -> pa.Array:
        return pa.array([" ".join(words) for words in of], pa.string())

    # Each set comes in two arrays, as a long file does.
    built = build(((str(i), [texts(s[:1]), texts(s[1:])]) for i, s in enumerate(sets)), ngram)
    document, gram = match(texts(documents), built)
    place, item = built.items_of.at(gram)
    found_items = set(zip(document[place].tolist(), item.tolist(), strict=True))
    place, owner = built.sets_of.at(gram)
    found_sets = set(zip(document[place].tolist(), owner.tolist(), strict=True))
    items = [(i, plain(words, ngram)) for i, one in enumerate(sets) for words in one]
    held = [
        (d, i, owner)
        for d, words in enumerate(documents)
        for i, (owner, grams) in enumerate(items)
        if any(tuple(words[at : at + len(g)]) == g for g in grams for at in range(len(words)))
    ]
    assert found_items == {(d, i) for d, i, _ in held}
    assert found_sets == {(d, owner) for d, _, owner in held}
    assert len(set(zip(document.tolist(), gram.tolist(), strict=True))) == len(document)


def test_a_document_that_quotes_an_item_is_found() -> None:
    assert hit(f"Homework, page 4.\n\n> {QUESTION.upper()}\n\nAnswer: at 1 p.m.", QUESTION)
    # Line breaks, dashes, and quotes of another kind are how texts differ on the way.
    assert hit("x " + QUESTION.replace(" ", "\n").replace("'", "\u2019").replace(";", " \u2014"), QUESTION)


def test_thirteen_words_in_a_row_and_not_twelve() -> None:
    words = QUESTION.split()
    for start in range(len(words) - 12):
        assert hit("so " + " ".join(words[start : start + 13]) + " etc", QUESTION)
        assert not hit("so " + " ".join(words[start : start + 12]) + " etc", QUESTION)
    every = [*words]
    every[12::13] = ["changed"] * len(every[12::13])
    assert not hit(" ".join(every), QUESTION)


def test_a_run_does_not_go_on_in_the_next_document() -> None:
    words = QUESTION.split()
    halves = pa.array([" ".join(words[:12]), "", " ".join(words[12:24])])
    assert len(match(halves, index(QUESTION))[0]) == 0


@pytest.mark.parametrize("count", [7, 8, 12])
def test_short_items_match_whole_from_eight_words(count: int) -> None:
    item = " ".join(QUESTION.split()[:count])
    assert hit(f"Then: {item}, and so on", item) == (count >= 8)
    assert not hit(" ".join(QUESTION.split()[: count - 1]), item)


def test_an_ngram_below_eight_takes_shorter_items() -> None:
    assert hit("he said: to be or not to be", "To be, or not...", ngram=4)
    assert not hit("he said: to be or", "To be, or", ngram=4)


@pytest.mark.parametrize(
    ("item", "document"),
    [
        (" ".join(QUESTION.split()[:13]), QUESTION.replace("station", "sta\u00adtion")),
        ("Où est né l'écrivain français qui a reçu, en 1957, le prix Nobel de littérature ?", None),
        ("How do older Japanese pages write Ｌａｔｉｎ words when they are set in full width", None),
        ("日本で一番高い山の名前とその高さを答えなさい", "問題。日本で一番高い山の名前、と その高さを答えなさい。"),
        ("ข้อใดคือเมืองหลวงของประเทศไทย", "คำถาม ข้อใดคือเมืองหลวงของประเทศไทย จงตอบ"),
        ("भारत की राजधानी का नाम क्या है और यह किस नदी के किनारे बसी हुई है", None),
    ],
    ids=["soft hyphen", "accents", "full width", "japanese", "thai", "hindi"],
)
def test_unicode_is_compared_by_what_is_read(item: str, document: str | None) -> None:
    assert hit(unicodedata.normalize("NFD", document or f"« {item} »"), item)
    assert hit(unicodedata.normalize("NFKC", document or item).upper(), item)
    assert not hit((document or item)[: len(document or item) // 3], item)


def test_code_is_found_whatever_its_layout() -> None:
    reformatted = FUNCTION.replace("    ", "\t").replace(" - ", "-").replace(", ", ",\n\t").replace('"""', "'''")
    assert hit(f"import math\n{reformatted}\nprint(1)", FUNCTION)
    other = FUNCTION.replace("idx", "i").replace("elem", "value").replace("numbers", "xs").replace("given", "the")
    assert not hit(other, FUNCTION)


def test_sets_without_ngrams_match_nothing() -> None:
    for built in (index("too short"), index(), build([], 13)):
        assert len(match(pa.array(["too short", QUESTION]), built)[0]) == 0


def test_matching_costs_little() -> None:
    """In CPU seconds of this process, with several times as much room as it needs here."""
    rng = np.random.default_rng(0)
    vocabulary = np.array([f"w{i}" for i in range(50_000)])
    texts = pa.array([" ".join(rng.choice(vocabulary, 1000)) for _ in range(600)])
    items = [" ".join(rng.choice(vocabulary, 100)) for _ in range(2000)]
    built = index(*items, texts[7].as_py()[:400])
    start = time.process_time()
    found = match(texts, built)[0]
    seconds = time.process_time() - start
    assert set(found.tolist()) == {7}
    assert seconds / (texts.nbytes / 1e6) < 0.5
