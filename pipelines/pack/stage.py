"""gold.tokens -> gold.sequences: documents packed into sequences of one length, one domain and split a sequence.

Documents are dealt to seeded hash groups, and each group is packed by itself, so that the work spreads over the cluster
and the result depends on the documents alone. An end token closes each document. Left out: fill-in-the-middle, and
adding to a packed edition: a run packs the whole edition and commits the sequences that differ.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F
from tokenizers import Tokenizer

from pipelines import lake as tables_of
from pipelines.errors import LakeError
from pipelines.lake import StageResult
from pipelines.pack.config import PackConfig
from pipelines.pack.packing import Piece, best_fit, concat
from pipelines.tables import END_OF_TEXT, GOLD_SEQUENCES, GOLD_TOKENS, PAD
from pipelines.tokenize.train import chosen_tokenizer, tokenizer_input, tokenizer_json

# A group has at least this many sequences, so that its last, half empty ones weigh little.
SEQUENCES_A_GROUP = 128
_BATCH = 1024
_HASH_DIGITS = 12


def run(spark: SparkSession, lake: str, config: PackConfig, *, run_id: str) -> StageResult:
    """Bring the edition of this tokenizer and sequence length in line with gold.tokens.

    Raises LakeError (exit code 2) when gold.tokens holds nothing of the tokenizer.
    """
    tokenizer_id = chosen_tokenizer(lake, config.tokenizer)
    version = tables_of.version(spark, lake, GOLD_TOKENS)
    tokens = tables_of.read(spark, lake, GOLD_TOKENS, version).where(F.col("tokenizer_id") == tokenizer_id)
    if tokens.isEmpty():
        raise LakeError(
            f"gold.tokens in {lake} holds nothing of tokenizer {tokenizer_id}: run tokenize with it first.", 2
        )
    tokenizer = Tokenizer.from_str(tokenizer_json(lake, tokenizer_id))
    end, pad = tokenizer.token_to_id(END_OF_TEXT), tokenizer.token_to_id(PAD)
    if end is None or pad is None:
        raise LakeError(f"Tokenizer {tokenizer_id} lacks {END_OF_TEXT} or {PAD}: train one, or add them to it.", 2)
    tables_of.ensure(spark, lake, GOLD_SEQUENCES)
    packer = Packer(config, tokenizer_id=tokenizer_id, end=end, pad=pad)
    scope = f"tokenizer_id = '{tokenizer_id}' AND sequence_length = {config.sequence_length}"
    written = tables_of.sync(spark, lake, GOLD_SEQUENCES, packer.pack(tokens), scope=scope)
    edition = tables_of.read(spark, lake, GOLD_SEQUENCES, written.version).where(scope)
    counts = {"sequences": 0, "padding": 0, "tokens": 0}
    for row in edition.groupBy("split").agg(F.count("*"), F.sum("pad_count")).toLocalIterator():
        counts[f"sequences_{row[0]}"] = int(row[1])
        counts["sequences"] += int(row[1])
        counts["padding"] += int(row[2])
    counts["tokens"] = counts["sequences"] * config.sequence_length - counts["padding"]
    return StageResult(
        counts=counts,
        inputs={GOLD_TOKENS.name: version or 0, **tokenizer_input(tokenizer_id)},
        outputs={GOLD_SEQUENCES.name: written.version},
    )


class Packer:
    """Packs the documents of one edition of gold.tokens. end, pad: the ids of the control tokens."""

    def __init__(self, config: PackConfig, *, tokenizer_id: str, end: int, pad: int) -> None:
        self.config, self.tokenizer_id, self.end, self.pad = config, tokenizer_id, end, pad

    def pack(self, tokens: DataFrame) -> DataFrame:
        """Rows of gold.tokens -> rows of gold.sequences. Documents without tokens are left out."""
        documents = tokens.where("token_count > 0").select(
            "document_id",
            "split",
            F.col(self.config.domain).alias("domain"),
            "tokens",
            "token_count",
            F.sha2(F.concat(F.lit(f"pack/{self.config.seed}/"), "document_id"), 256).alias("draw"),
        )
        enough = SEQUENCES_A_GROUP * self.config.sequence_length
        groups = documents.groupBy("split", "domain").agg(
            F.least(F.lit(self.config.groups), F.ceil(F.sum("token_count") / enough)).cast("int").alias("groups")
        )
        number = F.conv(F.substring("draw", 1, _HASH_DIGITS), 16, 10).cast("bigint")
        dealt = documents.join(F.broadcast(groups), ["split", "domain"]).withColumn("group", number % F.col("groups"))
        packed = dealt.groupBy("split", "domain", "group").applyInArrow(
            self.group_function(), tables_of.spark_schema(GOLD_SEQUENCES.schema)
        )
        return packed

    def group_function(self) -> Callable[..., Iterator[pa.RecordBatch]]:
        """The function that packs one group, for applyInArrow."""

        def pack_group(key: tuple[pa.Scalar, ...], batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
            split, domain = key[0].as_py(), key[1].as_py()
            yield from self.sequences(split, domain, pa.Table.from_batches(list(batches)))

        return pack_group

    def sequences(self, split: str, domain: str, documents: pa.Table) -> Iterator[pa.RecordBatch]:
        """The sequences of one group. documents: document_id, tokens, draw; their order does not matter."""
        documents = documents.sort_by([("draw", "ascending"), ("document_id", "ascending")])
        ids = documents["document_id"].to_pylist()
        tokens = [np.frombuffer(t.as_buffer(), "<u4") for t in documents["tokens"]]
        lengths = [len(t) + 1 for t in tokens]
        arrange = best_fit if self.config.mode == "best_fit" else concat
        arranged = arrange(lengths, self.config.sequence_length)
        for start in range(0, len(arranged), _BATCH):
            part = arranged[start : start + _BATCH]
            yield pa.RecordBatch.from_pylist(
                [self._row(split, domain, pieces, ids, tokens) for pieces in part], GOLD_SEQUENCES.schema
            )

    def _row(
        self, split: str, domain: str, pieces: list[Piece], ids: list[str], tokens: list[np.ndarray[Any, Any]]
    ) -> dict[str, Any]:
        length = self.config.sequence_length
        row = np.full(length, self.pad, "<u4")
        at = 0
        name = [self.tokenizer_id, str(length), split, domain]
        for piece in pieces:
            document = tokens[piece.document]
            text = document[piece.offset : piece.offset + piece.length]
            row[at : at + len(text)] = text
            if len(text) < piece.length:
                row[at + len(text)] = self.end
            at += piece.length
            name.append(f"{ids[piece.document]} {piece.offset} {piece.length}")
        pad_count = length - at
        # The id stands for the content: a document that changes and keeps its length is another sequence.
        name.append(hashlib.sha256(row.tobytes()).hexdigest())
        return {
            "sequence_id": hashlib.sha256("\n".join(name).encode()).hexdigest(),
            "split": split,
            "domain": domain,
            "tokens": row.tobytes(),
            "segment_lengths": [p.length for p in pieces] + ([pad_count] if pad_count else []),
            "document_ids": [ids[p.document] for p in pieces],
            "pad_count": pad_count,
            "tokenizer_id": self.tokenizer_id,
            "sequence_length": length,
        }
