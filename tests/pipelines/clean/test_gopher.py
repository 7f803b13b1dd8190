"""Gopher's signals against a plain statement of the same counts, one document and one n-gram at a time."""

from __future__ import annotations

import re
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.clean import gopher
from pipelines.clean.words import index_words, split_words

TEXTS = st.lists(
    st.lists(
        st.sampled_from(["a", "b", "the", "of", "long-word", "...", "•", "x1", "\n", "\n\n", "é", "中文"]), max_size=80
    ).map(" ".join),
    max_size=5,
)


def plain_top(words: list[str], n: int) -> int:
    grams = Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))
    if not grams:
        return 0
    gram, count = grams.most_common(1)[0]
    return (sum(map(len, gram)) + n - 1) * count


def plain_duplicated(words: list[str], n: int) -> int:
    seen, characters, i = set(), 0, 0
    while i <= len(words) - n:
        gram = tuple(words[i : i + n])
        if gram in seen:
            characters += sum(map(len, gram))
            i += n
        else:
            seen.add(gram)
            i += 1
    return characters


@given(TEXTS)
def test_ngram_signals_equal_the_plain_count(texts: list[str]) -> None:
    found = gopher.repetition(texts, index_words(texts))
    for d, text in enumerate(texts):
        words, size = split_words(text), max(len(text), 1)
        for n in gopher.TOP_N:
            assert found[f"top_{n}_gram"][d] == plain_top(words, n) / size
        for n in gopher.DUPLICATED_N:
            assert found[f"dup_{n}_gram"][d] == plain_duplicated(words, n) / size


@given(TEXTS)
def test_signals_do_not_depend_on_the_batch(texts: list[str]) -> None:
    together = gopher.quality(texts, index_words(texts)) | gopher.repetition(texts, index_words(texts))
    for d, text in enumerate(texts):
        alone = gopher.quality([text], index_words([text])) | gopher.repetition([text], index_words([text]))
        for name, values in alone.items():
            np.testing.assert_array_equal(values[0], together[name][d], err_msg=name)


@given(TEXTS)
def test_duplicate_lines_equal_the_plain_count(texts: list[str]) -> None:
    found = gopher.repetition(texts, index_words(texts))
    for d, text in enumerate(texts):
        lines = re.split(r"\n+", text)
        repeated = [x for i, x in enumerate(lines) if x in lines[:i]]
        assert found["dup_line_frac"][d] == len(repeated) / len(lines)
        assert found["dup_line_char_frac"][d] == sum(map(len, repeated)) / max(len(text), 1)


def test_quality_of_a_known_text() -> None:
    text = "- The cat of the house # 12 ...\nwith that …"
    found = {k: v[0] for k, v in gopher.quality([text], index_words([text])).items()}
    # 12 words by white space; "-", "#", "..." and "…" are symbols alone.
    assert found["words"] == 8
    assert found["mean_word_length"] == pytest.approx((3 + 3 + 2 + 3 + 5 + 2 + 4 + 4) / 8)
    assert found["hash_ratio"] == 1 / 12
    assert found["ellipsis_ratio"] == 2 / 12
    assert found["bullet_lines"] == 0.5
    assert found["ellipsis_lines"] == 1
    assert found["alpha_words"] == 7 / 12
    assert found["stop_words"] == 4  # of, the, with, that: "The" is written otherwise


def test_empty_text_is_measured_or_null() -> None:
    words = index_words([""])
    found = gopher.quality([""], words) | gopher.repetition([""], words)
    assert found["words"][0] == 0
    assert np.isnan(found["mean_word_length"][0])
    assert found["dup_5_gram"][0] == 0


def test_scripts_without_spaces_are_split_by_character() -> None:
    assert split_words("今日は good, สวย\u00a0x") == ["今", "日", "は", "good,", "ส", "ว", "ย", "x"]
    # A mark stays with its letter: alone it would be a word without one.
    assert split_words("ที่ ភាសា မြန်မာ が") == ["ที่", "ភា", "សា", "မြ", "န်", "မာ", "が"]


@pytest.mark.parametrize("text", ["ประเทศไทยมีภูเขาและแม่น้ำ", "ភាសាខ្មែរជាភាសាផ្លូវការ", "မြန်မာဘာသာစကားသည်", "ພາສາລາວເປັນພາສາ"])
def test_words_without_spaces_have_letters(text: str) -> None:
    assert gopher.quality([text], index_words([text]))["alpha_words"][0] == 1
