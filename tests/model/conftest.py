"""Small gold.sequences tables for the tests of the model room, written with deltalake, without Spark."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from deltalake import write_deltalake
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from pipelines.tables import GOLD_SEQUENCES, SPECIAL_TOKENS, tokenizer_uri

WriteSequences = Callable[..., str]
# A model for tests of what is around it.
SMALLEST = {
    "layers": 2,
    "width": 16,
    "heads": 2,
    "kv_heads": 1,
    "head_width": 8,
    "experts": 4,
    "experts_chosen": 2,
    "expert_width": 8,
    "max_seq_len": 64,
}
WORDS = ["the ", "cat ", "sat ", "on ", "a ", "mat ", "and ", "slept; ", "then ", "it ", "woke. "]


def byte_tokenizer() -> Tokenizer:
    """A byte-level tokenizer without merges: one token a byte, the special tokens first."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*SPECIAL_TOKENS, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    return tokenizer


def _pack(documents: Sequence[list[int]], length: int, pad: int) -> tuple[list[int], list[int], int]:
    """Documents into one sequence, cut to fit: tokens, segment lengths, padding."""
    tokens: list[int] = []
    lengths: list[int] = []
    for document in documents:
        room = length - len(tokens)
        if room <= 0:
            break
        tokens += document[:room]
        lengths.append(len(document[:room]))
    padding = length - len(tokens)
    return tokens + [pad] * padding, lengths + ([padding] if padding else []), padding


@pytest.fixture
def write_sequences(tmp_path: Path) -> WriteSequences:
    """write_sequences(lake="lake", count=24, length=32, ...) -> the lake's path; equal arguments, equal content."""

    def write(
        lake: str = "lake",
        *,
        count: int = 24,
        validation: int = 4,
        length: int = 32,
        seed: int = 0,
        files: int = 1,
        reverse: bool = False,
        mode: str = "error",
        row_group: int | None = None,
    ) -> str:
        where = str(tmp_path / lake)
        tokenizer = byte_tokenizer()
        text = tokenizer.to_str()
        tokenizer_id = hashlib.sha256(text.encode()).hexdigest()
        file = Path(tokenizer_uri(where, tokenizer_id))
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
        rng = np.random.default_rng(seed)
        rows = []
        for n in range(count + validation):
            domain = ("text", "code")[n % 2]
            end, pad = tokenizer.token_to_id(SPECIAL_TOKENS[0]), tokenizer.token_to_id(SPECIAL_TOKENS[1])
            words = WORDS if domain == "text" else [w.upper() for w in WORDS]
            documents = [
                [*tokenizer.encode("".join(rng.choice(words, size=int(rng.integers(2, 6))))).ids, end] for _ in range(2)
            ]
            tokens, lengths, padding = _pack(documents, length, pad)
            rows.append(
                {
                    "sequence_id": hashlib.sha256(f"{seed} {n} {tokens}".encode()).hexdigest(),
                    "split": "train" if n < count else "validation",
                    "domain": domain,
                    "tokens": np.asarray(tokens, dtype="<u4").tobytes(),
                    "segment_lengths": lengths,
                    "document_ids": [f"{n}-{i}" for i in range(len(lengths) - bool(padding))],
                    "pad_count": padding,
                    "tokenizer_id": tokenizer_id,
                    "sequence_length": length,
                }
            )
        if reverse:
            rows.reverse()
        for part in range(files):
            write_deltalake(
                GOLD_SEQUENCES.uri(where),
                pa.Table.from_pylist(rows[part::files], schema=GOLD_SEQUENCES.schema),
                partition_by=list(GOLD_SEQUENCES.partition_by),
                configuration=GOLD_SEQUENCES.table_properties if part == 0 and mode == "error" else None,
                mode=mode if part == 0 else "append",
            )
        return where

    return write
