"""Normalisation: its laws on any text, and the exact result on the characters that it is for."""

from __future__ import annotations

import unicodedata

from hypothesis import given
from hypothesis import strategies as st

from pipelines.clean.normalise import normalise, normalise_code, normalise_prose

ANY = st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from("\r\n\t\x00\ufeff\x0c\x85\u2028e\u0301"))


@given(ANY, st.sampled_from(["text", "code"]))
def test_normalise_is_idempotent(text: str, kind: str) -> None:
    once = normalise(text, kind)
    assert normalise(once, kind) == once


@given(ANY)
def test_prose_is_nfc_without_controls(text: str) -> None:
    done = normalise_prose(text)
    assert unicodedata.is_normalized("NFC", done)
    assert {c for c in done if unicodedata.category(c) == "Cc"} <= {"\n", "\t"}
    assert not {"\ufeff", "\u2028", "\u2029"} & set(done)


@given(ANY)
def test_code_loses_only_what_is_named(text: str) -> None:
    dropped = {c for c in text if (unicodedata.category(c) == "Cc" and c not in "\t\n\r\x0b\x0c") or c == "\ufeff"}
    kept = "".join(c for c in text if c not in dropped)
    assert normalise_code(text).replace("\r", "") == kept.replace("\r", "")


def test_normalise_examples() -> None:
    assert normalise_prose("\ufeffa\r\nb\rc\x00\x0cd\x85e\u0301") == "a\nb\nc\nd\n\u00e9"
    assert normalise_code("\ufeffa\r\n\tb\rc\x00\x0cd e\u0301") == "a\n\tb\rc\x0cd e\u0301"
    assert normalise_prose("e\x00\u0301") == "\u00e9"
