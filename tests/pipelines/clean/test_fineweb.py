"""FineWeb's signals against a plain statement of them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.clean import fineweb
from pipelines.clean.words import index_words

LINES = st.lists(st.sampled_from(["", " ", "short.", "no mark", "x" * 30, "y" * 31 + "!", "end. ", "終。", "a b c"]))
TEXTS = st.lists(LINES.map("\n".join), max_size=4)


@given(TEXTS)
def test_signals_equal_the_plain_count(texts: list[str]) -> None:
    found = fineweb.signals(texts, index_words(texts))
    for d, text in enumerate(texts):
        lines = [line for line in text.split("\n") if line.strip()]
        values = {name: found[name][d] for name in found}
        if not lines:
            assert all(np.isnan(value) for value in values.values())
            continue
        repeated = [line for i, line in enumerate(lines) if line in lines[:i]]
        assert values == {
            "line_punct_ratio": sum(line[-1] in ".!。" for line in lines) / len(lines),
            "short_line_ratio": sum(len(line) <= 30 for line in lines) / len(lines),
            "char_dup_ratio": sum(map(len, repeated)) / len(text.replace("\n", "")),
            "list_ratio": text.count("\n") / index_words([text]).counts[0],
        }


@pytest.mark.parametrize(
    ("mark", "ends"), [(".", True), ("؟", True), ("។", True), ("¿", False), ('"', False), ("a", False)]
)
def test_terminals(mark: str, ends: bool) -> None:
    assert (mark in fineweb.TERMINALS) is ends
