"""The laws of fill-in-the-middle: nothing is lost, nothing is left to chance twice, and prose is left alone."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models

from pipelines.errors import LakeError
from pipelines.pack.fim import ADDED, FillInTheMiddle, fill_in_the_middle
from pipelines.tables import SPECIAL_TOKENS

PREFIX, MIDDLE, SUFFIX = 2, 3, 4
# A document's tokens are never control tokens: those written in it are encoded as text.
DOCUMENT = st.lists(st.integers(5, 2**32 - 1), max_size=30)


def fim(rate: float = 1.0, spm_rate: float = 0.5, seed: int = 0) -> FillInTheMiddle:
    return FillInTheMiddle(prefix=PREFIX, middle=MIDDLE, suffix=SUFFIX, rate=rate, spm_rate=spm_rate, seed=seed)


def parts(out: list[int]) -> tuple[list[int], list[int], list[int]]:
    """What stands behind the tokens for prefix, suffix and middle; they come once each, in this order."""
    assert [t for t in out if t in (PREFIX, MIDDLE, SUFFIX)] == [PREFIX, SUFFIX, MIDDLE]
    assert out[0] == PREFIX
    suffix, middle = out.index(SUFFIX), out.index(MIDDLE)
    return out[1:suffix], out[suffix + 1 : middle], out[middle + 1 :]


@given(
    st.text(max_size=8), DOCUMENT, st.sampled_from([0.0, 0.5, 1.0]), st.integers(0, 9), st.sampled_from(["<u4", "u8"])
)
def test_the_document_comes_back(name: str, document: list[int], spm_rate: float, seed: int, dtype: str) -> None:
    tokens = np.array(document, dtype)
    given_before = tokens.copy()
    out = fim(spm_rate=spm_rate, seed=seed).rearrange(name, tokens)
    assert len(out) == len(document) + ADDED
    assert out.dtype == tokens.dtype
    assert np.array_equal(tokens, given_before)
    before, after, last = parts(out.tolist())
    # One rule reads both: SPM has nothing behind the prefix's token, and its prefix stands before the middle.
    assert before + last + after == document
    if spm_rate == 1.0:
        assert before == []
    assert np.array_equal(fim(spm_rate=spm_rate, seed=seed).rearrange(name, tokens), out)


@given(DOCUMENT.filter(len), st.integers(ADDED + 1, 12), st.sampled_from([0.0, 0.5, 1.0]))
def test_each_piece_of_a_long_document_comes_back_by_itself(document: list[int], length: int, spm_rate: float) -> None:
    tokens = np.array(document, "<u4")
    out = fim(spm_rate=spm_rate).rearrange_pieces("d", tokens, length).tolist()
    pieces = [out[start : start + length] for start in range(0, len(out), length)]
    room = length - ADDED
    assert len(pieces) == math.ceil(len(document) / room)
    for number, piece in enumerate(pieces):
        before, after, last = parts(piece)
        assert before + last + after == document[number * room : (number + 1) * room]
    if len(document) <= room:
        assert out == fim(spm_rate=spm_rate).rearrange("d", tokens).tolist()


def test_cuts_fall_everywhere_alike() -> None:
    """Two even draws among 4 + 1 places: the nine splits of PSM come in known shares."""
    tokens = np.arange(5, 9, dtype="<u4")
    trials = 6000
    seen: Counter[tuple[int, int]] = Counter()
    for i in range(trials):
        before, _, last = parts(fim(spm_rate=0.0).rearrange(f"d{i}", tokens).tolist())
        seen[len(before), len(before) + len(last)] += 1
    for start in range(5):
        for end in range(start, 5):
            share = (1 if start == end else 2) / 25
            assert abs(seen[start, end] - trials * share) < 5 * math.sqrt(trials * share * (1 - share))


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_shares_are_those_asked_for(rate: float) -> None:
    trials = 5000
    bound = 5 * math.sqrt(trials * rate * (1 - rate))
    drawn = {i for i in range(trials) if fim(rate=rate).applies(f"d{i}", "code")}
    assert abs(len(drawn) - trials * rate) < bound
    # A greater rate adds documents and drops none; another seed draws others.
    assert all(fim(rate=rate + 0.05).applies(f"d{i}", "code") for i in drawn)
    assert drawn != {i for i in range(trials) if fim(rate=rate, seed=1).applies(f"d{i}", "code")}
    tokens = np.arange(100, 600, dtype="<u4")
    spm = sum(fim(spm_rate=rate).rearrange(f"d{i}", tokens)[1] == SUFFIX for i in range(trials))
    # A PSM whose prefix is empty looks the same: one in about 250.
    assert abs(spm - trials * (rate + (1 - rate) * 2 / 501)) < bound


@given(st.text(), st.sampled_from(["text", "code"]), st.integers())
def test_only_code_is_rearranged_and_none_at_rate_0(name: str, kind: str, seed: int) -> None:
    assert fim(rate=1.0, seed=seed).applies(name, kind) == (kind == "code")
    assert not fim(rate=0.0, seed=seed).applies(name, kind)


def test_the_control_tokens_are_the_tokenizer_s() -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS[:-1]))
    with pytest.raises(LakeError, match=r"lacks <\|fim_suffix\|>: train one"):
        fill_in_the_middle(tokenizer, rate=0.5, spm_rate=0.5, seed=0)
    tokenizer.add_special_tokens([SPECIAL_TOKENS[-1]])
    made = fill_in_the_middle(tokenizer, rate=0.5, spm_rate=0.25, seed=7)
    assert made == FillInTheMiddle(prefix=2, middle=3, suffix=4, rate=0.5, spm_rate=0.25, seed=7)
