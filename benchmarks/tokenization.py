"""Tokenization: the tokenize stage's batch function, outside Spark, beside `tokenizers`' encode_batch_fast alone.

Ours takes Arrow batches of texts and gives Arrow batches of tokens (uint32 bytes and counts), as in Spark's worker. The
peer takes the same documents as Python strings, made before its time begins, in the same batches, and its encodings are
dropped unread. Both run on one core in one process (TOKENIZERS_PARALLELISM=false), each repetition with a tokenizer
newly made from its JSON, so that no cache of words is warm. The peer's is made before its time begins, ours within it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

# tokenizers reads it when it first encodes; ours sets the same.
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import numpy as np
import pyarrow as pa

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.corpus import Document, batches, documents, tokenizer_json
from benchmarks.harness import Different, Result, arguments, compare, finish, out
from pipelines.tokenize.stage import encode_batches, plain_text_tokenizer

TARGET = 0.9


def ours(tokenizer: str, arrow: list[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """The stage's function over the batches."""
    return encode_batches(tokenizer)(iter(arrow))


def our_ids(tokenizer: str, arrow: list[pa.RecordBatch]) -> Iterator[list[int]]:
    """The ids of every document by ours."""
    for batch in ours(tokenizer, arrow):
        for tokens, count in zip(batch["tokens"], batch["token_count"], strict=True):
            ids = np.frombuffer(tokens.as_buffer(), "<u4").tolist()
            assert len(ids) == count.as_py()
            yield ids


def peer_ids(tokenizer: str, texts: list[list[str]]) -> Iterator[list[int]]:
    """The ids of every document by encode_batch_fast."""
    loaded = plain_text_tokenizer(tokenizer)
    for part in texts:
        for encoding in loaded.encode_batch_fast(part, add_special_tokens=False):
            yield encoding.ids


def check(ours: Iterator[list[int]], peer: Iterator[list[int]]) -> int:
    """The tokens in all. Raises Different at the first document whose ids are not the same, or where one ends early."""
    total = number = 0
    for number, ids in enumerate(ours, 1):
        theirs = next(peer, None)
        if ids != theirs:
            raise Different(f"document {number} has {len(ids)} ids, which are not the peer's {len(theirs or [])}.")
        total += len(ids)
    if next(peer, None) is not None:
        raise Different(f"the peer has more documents than the {number} of ours.")
    return total


def measure(texts: list[Document], repetitions: int) -> Result:
    """Check that both give the same ids, then time them."""
    tokenizer, arrow = tokenizer_json(texts), batches(texts)
    strings = [batch["text"].to_pylist() for batch in arrow]
    tokens = check(our_ids(tokenizer, arrow), peer_ids(tokenizer, strings))
    size = sum(len(d.text.encode()) for d in texts)
    out.print(f"tokenization: {len(texts):,} documents, {size / 1e6:.1f} MB, {tokens:,} tokens")
    # One for each repetition: a tokenizer keeps the words that it has met.
    fresh = iter([plain_text_tokenizer(tokenizer) for _ in range(repetitions)])

    def run_ours() -> None:
        for _ in ours(tokenizer, arrow):
            pass

    def run_peer() -> None:
        loaded = next(fresh)
        for part in strings:
            loaded.encode_batch_fast(part, add_special_tokens=False)

    return compare(
        claim="tokenization",
        ours=("encode_batches over Arrow batches", run_ours),
        peer=("encode_batch_fast alone", run_peer),
        target=TARGET,
        tokens=tokens,
        repetitions=repetitions,
        notes={"documents": len(texts), "text_bytes": size, "threads": 1},
    )


def main() -> int:
    asked = arguments(__doc__, megabytes=8, repetitions=5).parse_args()
    return finish("tokenization", asked.out, lambda: measure(documents(asked.megabytes), asked.repetitions))


if __name__ == "__main__":
    sys.exit(main())
