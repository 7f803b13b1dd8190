"""Pieces to rows of gold.sequences, in one edition: of one tokenizer and one sequence length."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from pipelines import lake as tables_of
from pipelines.columns import draw
from pipelines.pack.config import PackConfig
from pipelines.pack.packing import Part, best_fit, concat
from pipelines.tables import GOLD_SEQUENCES

# A group has at least this many sequences, so that its last, half empty ones weigh little.
SEQUENCES_A_GROUP = 128
# And about so many tokens at most, whatever `pack.groups` says: one Python process packs a whole group (4 bytes a
# token, twice while it is sorted).
TOKENS_A_GROUP = 32_000_000
_BATCH = 1024


@dataclass(frozen=True, kw_only=True)
class Edition:
    """What all sequences of an edition share. end, pad: the ids of the control tokens."""

    config: PackConfig
    tokenizer_id: str
    end: int
    pad: int

    @property
    def scope(self) -> str:
        """SQL: the edition's rows of gold.sequences."""
        return f"tokenizer_id = '{self.tokenizer_id}' AND sequence_length = {self.config.sequence_length}"

    def whole(self, pieces: DataFrame) -> DataFrame:
        """Whole pieces -> a sequence each; other pieces are left out. In the mode ``concat`` there are none."""
        length = self.config.sequence_length
        return pieces.where(F.lit(self.config.mode == "best_fit") & F.col("offset").isNotNull()).select(
            self._sequence_id().alias("sequence_id"),
            "split",
            "domain",
            "tokens",
            F.array(F.lit(length)).alias("segment_lengths"),
            F.array("document_id").alias("document_ids"),
            F.lit(0).alias("pad_count"),
            F.lit(self.tokenizer_id).alias("tokenizer_id"),
            F.lit(length).alias("sequence_length"),
        )

    def _sequence_id(self) -> Column:
        """``_name`` in SQL, for sequences of one whole piece."""
        return F.sha2(
            F.concat_ws(
                "\n",
                F.lit(self.tokenizer_id),
                F.lit(str(self.config.sequence_length)),
                "split",
                "domain",
                F.concat_ws(" ", "document_id", "offset"),
                F.sha2("tokens", 256),
            ),
            256,
        )

    def pack(self, pieces: DataFrame) -> DataFrame:
        """Pieces -> sequences, packed in seeded hash groups, so that the work spreads and the order does not matter."""
        config = self.config
        drawn = pieces.withColumn("draw", F.sha2(F.concat(F.lit(f"pack/{config.seed}/"), "document_id"), 256))
        dealt = drawn.join(F.broadcast(self.groups(drawn)), ["split", "domain"])
        dealt = dealt.withColumn("group", draw(F.col("draw")) % F.col("groups"))
        return dealt.groupBy("split", "domain", "group").applyInArrow(
            self.group_function(), tables_of.spark_schema(GOLD_SEQUENCES.schema)
        )

    def groups(self, pieces: DataFrame) -> DataFrame:
        """How many groups each split and domain is packed in: split, domain, groups. pieces: with their length."""
        enough, tokens = SEQUENCES_A_GROUP * self.config.sequence_length, F.sum("length")
        wanted = F.least(F.lit(self.config.groups), F.ceil(tokens / enough))
        number = F.greatest(wanted, F.ceil(tokens / TOKENS_A_GROUP)).cast("int")
        return pieces.groupBy("split", "domain").agg(number.alias("groups"))

    def group_function(self) -> Callable[..., Iterator[pa.RecordBatch]]:
        """The function that packs one group, for applyInArrow."""

        def pack_group(key: tuple[pa.Scalar, ...], batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
            yield from self.sequences(key[0].as_py(), key[1].as_py(), pa.Table.from_batches(list(batches)))

        return pack_group

    def sequences(self, split: str, domain: str, pieces: pa.Table) -> Iterator[pa.RecordBatch]:
        """The sequences of one group. pieces: document_id, offset, tokens, draw; their order does not matter."""
        pieces = pieces.sort_by([(name, "ascending") for name in ("draw", "document_id", "offset")])
        ids, offsets = pieces["document_id"].to_pylist(), pieces["offset"].to_pylist()
        tokens = [np.frombuffer(t.as_buffer(), "<u4") for t in pieces["tokens"]]
        arrange = best_fit if self.config.mode == "best_fit" else concat
        arranged = arrange([len(t) for t in tokens], self.config.sequence_length)
        for at in range(0, len(arranged), _BATCH):
            rows = [self._row(split, domain, parts, ids, offsets, tokens) for parts in arranged[at : at + _BATCH]]
            yield pa.RecordBatch.from_pylist(rows, GOLD_SEQUENCES.schema)

    def _row(
        self,
        split: str,
        domain: str,
        parts: list[Part],
        ids: list[str],
        offsets: list[int | None],
        tokens: list[np.ndarray[Any, Any]],
    ) -> dict[str, Any]:
        length = self.config.sequence_length
        row = np.full(length, self.pad, "<u4")
        at = 0
        named = []
        for part in parts:
            row[at : at + part.length] = tokens[part.piece][part.start : part.start + part.length]
            at += part.length
            offset = offsets[part.piece]
            named.append(f"{ids[part.piece]} {'tail' if offset is None else offset + part.start}")
        pad_count = length - at
        return {
            "sequence_id": self._name(split, domain, named, row.tobytes()),
            "split": split,
            "domain": domain,
            "tokens": row.tobytes(),
            "segment_lengths": [p.length for p in parts] + ([pad_count] if pad_count else []),
            "document_ids": [ids[p.piece] for p in parts],
            "pad_count": pad_count,
            "tokenizer_id": self.tokenizer_id,
            "sequence_length": length,
        }

    def _name(self, split: str, domain: str, named: list[str], tokens: bytes) -> str:
        """The id stands for the content: a document that changes and keeps its length is another sequence."""
        parts = [self.tokenizer_id, str(self.config.sequence_length), split, domain, *named]
        return hashlib.sha256("\n".join([*parts, hashlib.sha256(tokens).hexdigest()]).encode()).hexdigest()
