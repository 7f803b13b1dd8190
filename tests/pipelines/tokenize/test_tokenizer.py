"""The tokenizer: determinism, exact round trip, digits, special tokens as text, files."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from pipelines.errors import LakeError
from pipelines.tables import SPECIAL_TOKENS, tokenizer_uri
from pipelines.tokenize.stage import encode, plain_text_tokenizer
from pipelines.tokenize.train import chosen_tokenizer, default_tokenizer, save, tokenizer_json, train

TEXTS = [
    Path(__file__).read_text(),
    Path(train.__code__.co_filename).read_text(),
    "naïve café 日本語 12345 \r\n\t x" * 9,
]
TRAINED = train(TEXTS, 600)
PLAIN = plain_text_tokenizer(TRAINED.to_str())


def ids(text: str) -> list[int]:
    tokens, counts = encode(PLAIN, pa.array([text]))
    found = np.frombuffer(tokens[0].as_py(), "<u4").tolist()
    assert counts[0].as_py() == len(found)
    return found


def test_special_tokens_come_first_and_vocabulary_is_as_asked() -> None:
    assert [TRAINED.token_to_id(t) for t in SPECIAL_TOKENS] == list(range(len(SPECIAL_TOKENS)))
    assert TRAINED.get_vocab_size() == 600


@settings(max_examples=200, deadline=None)
@given(st.text() | st.lists(st.sampled_from([*SPECIAL_TOKENS, " ", "\n", "a", "  ", "\r"])).map("".join))
def test_round_trip_is_exact(text: str) -> None:
    found = ids(text)
    assert PLAIN.decode(found) == text
    assert not {PLAIN.token_to_id(t) for t in SPECIAL_TOKENS} & set(found)


def test_round_trip_of_every_code_point() -> None:
    text = "".join(chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000)
    assert PLAIN.decode(ids(text)) == text


def test_digits_are_split_by_three() -> None:
    repeated = train(["1234567 " * 1000], 300)
    assert [repeated.decode([i]) for i in repeated.encode("1234567").ids] == ["123", "456", "7"]


def test_encoding_does_not_depend_on_the_batch() -> None:
    texts = [text[i : i + 50] for text in TEXTS for i in range(0, 500, 50)]
    together, _ = encode(PLAIN, pa.array(texts))
    assert together.to_pylist() == [encode(PLAIN, pa.array([t]))[0][0].as_py() for t in texts]


def test_training_is_the_same_in_another_process() -> None:
    code = (
        "import sys, hashlib; from pathlib import Path; from pipelines.tokenize.train import train;"
        "texts = [p.read_text() for p in sorted(Path(sys.argv[1]).glob('*.py'))];"
        "print(hashlib.sha256(train(texts, 2000).to_str().encode()).hexdigest())"
    )
    folder = Path(pytest.__file__).parent.parent / "_pytest"
    digests = {
        subprocess.run(
            [sys.executable, "-c", code, str(folder)],
            env={"PYTHONHASHSEED": seed, "RAYON_NUM_THREADS": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2", "3")
    }
    assert len(digests) == 1


def test_saved_tokenizer_is_the_lakes(tmp_path: Path) -> None:
    lake = str(tmp_path / "lake")
    assert default_tokenizer(lake) is None
    with pytest.raises(LakeError, match="no tokenizer"):
        chosen_tokenizer(lake, None)
    saved = save(lake, TRAINED)
    content = Path(tokenizer_uri(lake, saved)).read_bytes()
    assert hashlib.sha256(content).hexdigest() == saved == default_tokenizer(lake) == chosen_tokenizer(lake, None)
    assert Tokenizer.from_str(tokenizer_json(lake, saved)).get_vocab() == TRAINED.get_vocab()
    with pytest.raises(LakeError, match="is not there"):
        chosen_tokenizer(lake, "0" * 64)
    Path(tokenizer_uri(lake, saved)).write_bytes(content + b" ")
    with pytest.raises(LakeError, match="was changed"):
        tokenizer_json(lake, saved)
