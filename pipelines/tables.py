"""The lake's tables: names, Arrow schemas, keys, partitions, constraints. The contract between the rooms.

Spark-free on purpose: the loader, on a GPU node without pyspark, reads the same definitions that the Spark jobs write
by. What a column means is its comment here, and the comment is stored in the Delta table.

Every table has the change data feed on, its key NOT NULL and reader version 1, so that any Delta reader opens it: no
deletion vectors, no column mapping (Delta protocol, "Reader Version Requirements").
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field

import pyarrow as pa

QUARANTINE_REASONS = (
    "invalid_utf8",
    "truncated",
    "corrupt_record",
    "missing_text",
    "wrong_type",
    "too_large",
    "binary",
    "unreadable",
    "duplicate_id",
)
KINDS = ("text", "code")
SPLITS = ("train", "validation")
LICENSE_CLASSES = ("permissive", "copyleft", "unknown")
SPECIAL_TOKENS = ("<|endoftext|>", "<|pad|>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>")
END_OF_TEXT, PAD = SPECIAL_TOKENS[0], SPECIAL_TOKENS[1]
# A verdict of decontaminate is this and the evaluation set's name.
CONTAMINATED = "contaminated:"

TIMESTAMP = pa.timestamp("us", tz="UTC")
STRING_LIST = pa.list_(pa.string())


def column(name: str, type_: pa.DataType, comment: str, *, nullable: bool = True) -> pa.Field:
    """A field whose comment is carried in its metadata under ``comment``."""
    return pa.field(name, type_, nullable=nullable, metadata={"comment": comment})


def hash_version(digest: bytes) -> int:
    """63 bits of a hash: what stands in ops.runs for the version of an input that is no table."""
    return int.from_bytes(digest[:8]) >> 1


@dataclass(frozen=True, kw_only=True)
class Table:
    """One Delta table: what it is called, the job that makes it, what is in it, and the rules that Delta enforces."""

    name: str
    job: str
    comment: str
    schema: pa.Schema
    key: tuple[str, ...]
    partition_by: tuple[str, ...] = ()
    constraints: dict[str, str] = field(default_factory=dict)
    properties: dict[str, str] = field(default_factory=dict)

    def uri(self, lake: str) -> str:
        """Where the table lies: the lake's URI or absolute path and the name with ``/`` for ``.``."""
        return table_uri(lake, self.name)

    @property
    def table_properties(self) -> dict[str, str]:
        """The Delta table properties: those of every table and this one's own."""
        return {
            "delta.enableChangeDataFeed": "true",
            "delta.enableDeletionVectors": "false",
            "delta.minReaderVersion": "1",
            "delta.minWriterVersion": "4",
            **self.properties,
        }


def table_uri(lake: str, name: str) -> str:
    """``/data/lake`` and ``gold.tokens`` give ``/data/lake/gold/tokens``; a relative path is made absolute.

    Spark SQL takes a path for a table only where it is absolute, and a JVM does not follow this process's chdir.
    """
    base = lake if "://" in lake else os.path.abspath(lake)
    return base.rstrip("/") + "/" + name.replace(".", "/")


def tokenizer_uri(lake: str, tokenizer_id: str) -> str:
    """Where the tokenizer's JSON lies in the lake."""
    return f"{lake.rstrip('/')}/tokenizers/{tokenizer_id}.json"


def _in(name: str, values: tuple[str, ...]) -> str:
    return f"{name} IN ({', '.join(repr(v) for v in values)})"


# Text columns carry no statistics: Delta would copy their first 32 characters into the transaction log, where an erased
# document would live on.
_NO_TEXT_STATISTICS = {"delta.dataSkippingNumIndexedCols": "4"}

RUN_ID = column("run_id", pa.string(), "the run of ops.runs that last wrote this row")
SOURCE = column("source", pa.string(), "the source's name, by default its folder's or file's", nullable=False)

BRONZE_DOCUMENTS = Table(
    name="bronze.documents",
    job="ingest",
    comment="every document as it came, decoded and otherwise untouched",
    key=("document_id",),
    schema=pa.schema(
        [
            column("document_id", pa.string(), "sha256(source, NUL, source_id), hex", nullable=False),
            SOURCE,
            column(
                "source_id", pa.string(), "path relative to the source, or path:line, or the id field", nullable=False
            ),
            column("kind", pa.string(), "text or code", nullable=False),
            column("content", pa.string(), "the decoded UTF-8 text, exact", nullable=False),
            column("content_sha256", pa.string(), "sha256 of the content's UTF-8 bytes, hex", nullable=False),
            column("path", pa.string(), "the file that it was read from"),
            column("media_type", pa.string(), "IANA media type of the file or record"),
            column("license_declared", pa.string(), "SPDX identifier declared by the source"),
            column("language_declared", pa.string(), "language declared by the source"),
            column("metadata", pa.map_(pa.string(), pa.string()), "other fields of the record"),
            column("source_modified_at", TIMESTAMP, "modification time of the file"),
            column("ingested_at", TIMESTAMP, "when this content first came in"),
            RUN_ID,
        ]
    ),
    constraints={"kind_known": _in("kind", KINDS)},
    properties=_NO_TEXT_STATISTICS,
)

BRONZE_QUARANTINE = Table(
    name="bronze.quarantine",
    job="ingest",
    comment="every input record that is no document, and why",
    key=("quarantine_id",),
    schema=pa.schema(
        [
            column("quarantine_id", pa.string(), "sha256(source, NUL, source_id, NUL, reason), hex", nullable=False),
            SOURCE,
            column("source_id", pa.string(), "as in bronze.documents", nullable=False),
            column("reason", pa.string(), "one of the reasons of the contract", nullable=False),
            column("detail", pa.string(), "the reader's own words"),
            column("raw", pa.binary(), "the record's first 64 KiB"),
            RUN_ID,
            column("at", TIMESTAMP, "when it was met"),
        ]
    ),
    constraints={"reason_known": _in("reason", QUARANTINE_REASONS)},
    properties=_NO_TEXT_STATISTICS,
)

SIGNALS = pa.struct(
    [
        pa.field(name, pa.float64())
        for name in (
            "words",
            "mean_word_length",
            "hash_ratio",
            "ellipsis_ratio",
            "bullet_lines",
            "ellipsis_lines",
            "alpha_words",
            "stop_words",
            "dup_line_frac",
            "dup_para_frac",
            "dup_line_char_frac",
            "dup_para_char_frac",
            "top_2_gram",
            "top_3_gram",
            "top_4_gram",
            "dup_5_gram",
            "dup_6_gram",
            "dup_7_gram",
            "dup_8_gram",
            "dup_9_gram",
            "dup_10_gram",
            "sentences",
            "lorem_ipsum",
            "curly_bracket",
            "javascript_lines",
            "policy_lines",
            "bad_words",
            "line_punct_ratio",
            "short_line_ratio",
            "char_dup_ratio",
            "list_ratio",
            "max_line_length",
            "mean_line_length",
            "alphanumeric_frac",
            "comment_ratio",
            "autogenerated",
            "vendored",
            "data_like",
            "minified",
            "lines",
            "encoded_frac",
            "encoded_run",
            "xml_declared",
            "visible_characters",
            "visible_frac",
        )
    ]
)

SILVER_DOCUMENTS = Table(
    name="silver.documents",
    job="clean",
    comment="every bronze document, normalised, redacted and judged; rejected ones stay with their reasons",
    key=("document_id",),
    schema=pa.schema(
        [
            column("document_id", pa.string(), "as in bronze.documents", nullable=False),
            SOURCE,
            column("source_id", pa.string(), "as in bronze.documents", nullable=False),
            column("kind", pa.string(), "text or code", nullable=False),
            column("text", pa.string(), "normalised (text: NFC) and redacted", nullable=False),
            column("language", pa.string(), "ISO 639-1, null for code"),
            column("language_score", pa.float64(), "the identifier's probability, 0 to 1"),
            column("code_language", pa.string(), "linguist's name in lower case, null for text"),
            column("license", pa.string(), "SPDX expression: of the file, else nearest LICENSE, else declared"),
            column("license_class", pa.string(), "permissive, copyleft or unknown"),
            column("signals", SIGNALS, "the quality signals that verdicts are derived from; null where not measured"),
            column("rejected_by", STRING_LIST, "every rule that rejects it, family.rule; empty: accepted"),
            column("redactions", pa.map_(pa.string(), pa.int32()), "matches redacted by type"),
            column("text_sha256", pa.string(), "sha256 of the text's UTF-8 bytes, hex"),
            column("content_sha256", pa.string(), "as in bronze.documents"),
            RUN_ID,
        ]
    ),
    constraints={"kind_known": _in("kind", KINDS)},
    properties=_NO_TEXT_STATISTICS,
)

SILVER_MINHASH = Table(
    name="silver.minhash",
    job="dedup",
    comment="MinHash-LSH bands of every distinct text",
    key=("document_id", "band"),
    schema=pa.schema(
        [
            column("document_id", pa.string(), "as in bronze.documents", nullable=False),
            column("band", pa.int32(), "0 to bands-1", nullable=False),
            column("bucket", pa.int64(), "64-bit hash of the band's rows", nullable=False),
        ]
    ),
)

SILVER_DUPLICATES = Table(
    name="silver.duplicates",
    job="dedup",
    comment="the members of every cluster of two and more; a document alone has no row",
    key=("document_id",),
    schema=pa.schema(
        [
            column("document_id", pa.string(), "as in bronze.documents", nullable=False),
            column("cluster_id", pa.string(), "the least document_id that the cluster has ever had", nullable=False),
            column("method", pa.string(), "exact or near: how it joined the cluster", nullable=False),
            column("similarity", pa.float64(), "highest verified Jaccard similarity to another member"),
            column("kept", pa.bool_(), "true for the one that stays", nullable=False),
        ]
    ),
    constraints={"method_known": _in("method", ("exact", "near"))},
)

GOLD_TOKENS = Table(
    name="gold.tokens",
    job="tokenize",
    comment="the tokens of every accepted, kept document, one edition a tokenizer",
    key=("document_id", "tokenizer_id"),
    partition_by=("tokenizer_id",),
    schema=pa.schema(
        [
            column("document_id", pa.string(), "as in bronze.documents", nullable=False),
            SOURCE,
            column("kind", pa.string(), "text or code", nullable=False),
            column("split", pa.string(), "train or validation, by the hash of the cluster", nullable=False),
            column("tokens", pa.binary(), "uint32 little-endian; decoding gives the text back", nullable=False),
            column("token_count", pa.int32(), "length of tokens in tokens", nullable=False),
            column("tokenizer_id", pa.string(), "sha256 of the tokenizer's JSON file, hex", nullable=False),
        ]
    ),
    constraints={"split_known": _in("split", SPLITS), "whole_tokens": "length(tokens) = 4 * token_count"},
)

GOLD_SEQUENCES = Table(
    name="gold.sequences",
    job="pack",
    comment="fixed-length training sequences, one edition a tokenizer and a sequence length",
    key=("sequence_id",),
    partition_by=("tokenizer_id", "sequence_length"),
    schema=pa.schema(
        [
            column(
                "sequence_id", pa.string(), "sha256 of the edition, domain and tokens' documents, hex", nullable=False
            ),
            column("split", pa.string(), "train or validation", nullable=False),
            column("domain", pa.string(), "mixture group: kind unless configured", nullable=False),
            column("tokens", pa.binary(), "uint32 little-endian, exactly sequence_length of them", nullable=False),
            column("segment_lengths", pa.list_(pa.int32()), "documents' tokens and, last, padding where there is any"),
            column("document_ids", STRING_LIST, "one a segment, padding excepted"),
            column("pad_count", pa.int32(), "padding tokens at the end", nullable=False),
            column("tokenizer_id", pa.string(), "as in gold.tokens", nullable=False),
            column("sequence_length", pa.int32(), "tokens a sequence", nullable=False),
        ]
    ),
    constraints={"split_known": _in("split", SPLITS), "whole_sequence": "length(tokens) = 4 * sequence_length"},
)

TABLE_VERSION = pa.struct([pa.field("table", pa.string()), pa.field("version", pa.int64())])

# How ops.runs names a source that a run read, and that changes as tables do: with its name behind.
FILES = "files:"

OPS_RUNS = Table(
    name="ops.runs",
    job="pipeline",
    comment="every run of every job",
    key=("run_id",),
    schema=pa.schema(
        [
            column("run_id", pa.string(), "ULID-like: sortable by start", nullable=False),
            column("job", pa.string(), "the job's name", nullable=False),
            column("started_at", TIMESTAMP, "UTC", nullable=False),
            column("ended_at", TIMESTAMP, "UTC; null while it runs"),
            column("status", pa.string(), "succeeded, unchanged, failed", nullable=False),
            column("code_version", pa.string(), "lakemoe's version and git commit where there is one"),
            column("configuration", pa.string(), "the settings as JSON"),
            column("inputs", pa.list_(TABLE_VERSION), "tables read, at which version; files and tokenizer by a hash"),
            column("outputs", pa.list_(TABLE_VERSION), "tables written, the version after"),
            column("counts", pa.map_(pa.string(), pa.int64()), "what the job counted"),
            column("mlflow_run_id", pa.string(), "the training's MLflow run"),
        ]
    ),
)

OPS_PROMOTIONS = Table(
    name="ops.promotions",
    job="promote",
    comment="every decision of the promotion gate, pass or refuse",
    key=("promotion_id",),
    schema=pa.schema(
        [
            column("promotion_id", pa.string(), "sortable by time", nullable=False),
            column("at", TIMESTAMP, "UTC", nullable=False),
            column("model", pa.string(), "registered model's name", nullable=False),
            column("candidate_version", pa.string(), "the version that asked", nullable=False),
            column("champion_version", pa.string(), "the champion before, null when there was none"),
            column("decision", pa.string(), "promoted, refused or rolled_back", nullable=False),
            column("reason", pa.string(), "one sentence"),
            column("figures", pa.map_(pa.string(), pa.float64()), "what the gate compared"),
            column("requested_by", pa.string(), "who asked"),
        ]
    ),
)

OPS_ERASURES = Table(
    name="ops.erasures",
    job="erase",
    comment="every document that was asked to be erased; while its row is there, ingest leaves the document out",
    key=("document_id", "requested_at"),
    schema=pa.schema(
        [
            column("document_id", pa.string(), "as it was in bronze.documents", nullable=False),
            column("requested_at", TIMESTAMP, "UTC", nullable=False),
            column("reason", pa.string(), "why, in the words of who asked"),
            column("completed_at", TIMESTAMP, "when no table held it any more; null: not done yet"),
            column("table_versions", pa.list_(TABLE_VERSION), "the versions at which it was looked for and not found"),
        ]
    ),
)

TABLES: dict[str, Table] = {
    t.name: t
    for t in (
        BRONZE_DOCUMENTS,
        BRONZE_QUARANTINE,
        SILVER_DOCUMENTS,
        SILVER_MINHASH,
        SILVER_DUPLICATES,
        GOLD_TOKENS,
        GOLD_SEQUENCES,
        OPS_RUNS,
        OPS_PROMOTIONS,
        OPS_ERASURES,
    )
}
