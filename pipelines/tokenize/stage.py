"""silver.documents -> gold.tokens: the tokens of every accepted, kept document, and its split.

What a document says is text: ``<|endoftext|>`` written in it is encoded as its characters, never as the control token.
A run after the first encodes the documents of which silver.documents or silver.duplicates says something else.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import numpy as np
import pyarrow as pa
from pyspark.sql import Column, SparkSession
from pyspark.sql import functions as F
from tokenizers import Tokenizer

from pipelines import lake as tables_of
from pipelines.batches import Batches
from pipelines.changes import Since, changes, keys, within
from pipelines.columns import HASH_DIGITS, draw
from pipelines.lake import StageResult
from pipelines.tables import GOLD_TOKENS, SILVER_DOCUMENTS, SILVER_DUPLICATES
from pipelines.tokenize.config import TokenizeConfig
from pipelines.tokenize.train import chosen_tokenizer, kept_documents, tokenizer_input, tokenizer_json

# Texts that are encoded at a time (characters): encodings, far larger than their tokens, are held together.
SLICE = 1 << 20


def run(spark: SparkSession, lake: str, config: TokenizeConfig, *, run_id: str, since: Since = None) -> StageResult:
    """Bring the tokenizer's edition of gold.tokens in line with silver.

    since: the versions of silver's tables that the last run by this configuration saw; None looks at every document.
    Raises LakeError when there is no tokenizer.
    """
    tokenizer_id = chosen_tokenizer(lake, config.tokenizer)
    inputs = {t.name: tables_of.version(spark, lake, t) for t in (SILVER_DOCUMENTS, SILVER_DUPLICATES)}
    kept = kept_documents(spark, lake, inputs)
    tables_of.ensure(spark, lake, GOLD_TOKENS)
    changed = [
        changes(spark, lake, t, since, inputs[t.name], "document_id") for t in (SILVER_DOCUMENTS, SILVER_DUPLICATES)
    ]
    looked_at = None if changed[0] is None or changed[1] is None else keys(changed[0].union(changed[1]))
    documents = within(kept, looked_at).select(
        "document_id",
        "source",
        "kind",
        split(F.coalesce("cluster_id", "document_id"), config.validation_fraction).alias("split"),
        "text",
    )
    schema = "document_id string, source string, kind string, split string, tokens binary, token_count int"
    tokens = documents.mapInArrow(encode_batches(tokenizer_json(lake, tokenizer_id)), schema)
    tokens = tokens.withColumn("tokenizer_id", F.lit(tokenizer_id))
    scope = f"tokenizer_id = '{tokenizer_id}'"
    written = tables_of.sync(spark, lake, GOLD_TOKENS, tokens, scope=scope, among=looked_at)
    edition = tables_of.read(spark, lake, GOLD_TOKENS, written.version).where(scope)
    counts = {"documents": 0, "tokens": 0}
    for row in tables_of.few(edition.groupBy("split").agg(F.count("*"), F.sum("token_count"))):
        counts[f"documents_{row[0]}"], counts[f"tokens_{row[0]}"] = int(row[1]), int(row[2])
        counts["documents"] += int(row[1])
        counts["tokens"] += int(row[2])
    return StageResult(
        counts=counts,
        inputs={n: v for n, v in inputs.items() if v is not None} | tokenizer_input(tokenizer_id),
        outputs={GOLD_TOKENS.name: written.version},
    )


def split(cluster: Column, validation_fraction: float) -> Column:
    """train or validation by the hash of the cluster's id: near-duplicates never straddle the two."""
    bound = round(validation_fraction * 16**HASH_DIGITS)
    drawn = draw(F.sha2(F.concat(F.lit("split/"), cluster), 256))
    return F.when(drawn < bound, "validation").otherwise("train")


def encode_batches(tokenizer: str) -> Callable[[Batches], Batches]:
    """The batch function of the tokenizer with this JSON: replaces column text by tokens and token_count."""

    def batches(incoming: Batches) -> Batches:
        # Spark already runs one worker a core.
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        loaded = plain_text_tokenizer(tokenizer)
        for batch in incoming:
            tokens, counts = encode(loaded, batch["text"])
            others = [name for name in batch.schema.names if name != "text"]
            yield pa.RecordBatch.from_arrays(
                [*(batch[name] for name in others), tokens, counts], [*others, "tokens", "token_count"]
            )

    return batches


def plain_text_tokenizer(tokenizer: str) -> Tokenizer:
    """The tokenizer with this JSON, set to encode special tokens' text as the text that it is."""
    loaded = Tokenizer.from_str(tokenizer)
    loaded.encode_special_tokens = True
    return loaded


def encode(tokenizer: Tokenizer, texts: pa.Array) -> tuple[pa.Array, pa.Array]:
    """texts -> (tokens: binary, uint32 little-endian; token counts: int32)."""
    tokens: list[bytes] = []
    part: list[str] = []
    characters = 0
    for text in texts:
        part.append(text.as_py())
        characters += len(part[-1])
        if characters >= SLICE:
            tokens += _encode_part(tokenizer, part)
            part, characters = [], 0
    tokens += _encode_part(tokenizer, part)
    counts = np.fromiter((len(t) // 4 for t in tokens), np.int32, len(tokens))
    return pa.array(tokens, pa.binary()), pa.array(counts)


def _encode_part(tokenizer: Tokenizer, texts: list[str]) -> list[bytes]:
    encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    return [np.array(encoding.ids, dtype="<u4").tobytes() for encoding in encodings]
