"""The reading as Spark tasks: names out to the executors, records back, in batches of bounded size.

What a file's records are is `read.py`'s; what becomes of records that share an id is `settle.py`'s.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pyarrow as pa
from pyspark.sql import DataFrame, SparkSession

from pipelines.batches import Batches
from pipelines.ingest.config import SourceConfig
from pipelines.ingest.lines import RAW_BYTES
from pipelines.ingest.listing import Entry, path_of
from pipelines.ingest.read import Reading, read_entry
from pipelines.ingest.records import Outcome
from pipelines.tables import TIMESTAMP

if TYPE_CHECKING:
    from pipelines.ingest.hugging_face import DataSet

_PATHS = pa.schema(
    [
        ("source", pa.int32()),
        ("raw_path", pa.binary()),
        ("relative", pa.string()),
        ("format", pa.string()),
        ("size", pa.int64()),
        ("problem", pa.string()),
        ("split", pa.string()),
        ("part", pa.int32()),
    ]
)
# One row a record, and one a file (met is not null) that says how many records were met in it, how many were passed
# over as no documents, and whether it may hold others.
RECORDS = pa.schema(
    [
        ("document_id", pa.string()),
        ("source", pa.string()),
        ("source_id", pa.string()),
        ("location", pa.string()),
        ("file", pa.string()),
        ("line", pa.int64()),
        ("kind", pa.string()),
        ("content", pa.string()),
        ("content_sha256", pa.string()),
        ("path", pa.string()),
        ("media_type", pa.string()),
        ("license_declared", pa.string()),
        ("language_declared", pa.string()),
        ("metadata", pa.map_(pa.string(), pa.string())),
        ("source_modified_at", TIMESTAMP),
        ("crawled_at", TIMESTAMP),
        ("reason", pa.string()),
        ("detail", pa.string()),
        ("raw", pa.binary()),
        ("met", pa.int64()),
        ("passed", pa.int64()),
        ("complete", pa.bool_()),
    ]
)
_BATCH_BYTES = 8 * 1024 * 1024
_BATCH_ROWS = 1024
_TASK_BYTES = 32 * 1024 * 1024


def spread(spark: SparkSession, entries: list[Entry]) -> DataFrame:
    """The files as a DataFrame, spread by a hash of their names over enough tasks for their bytes."""
    columns = [[getattr(entry, name) for entry in entries] for name in _PATHS.names]
    table = pa.table([pa.array(c, t) for c, t in zip(columns, _PATHS.types, strict=True)], schema=_PATHS)
    cores = spark.sparkContext.defaultParallelism
    tasks = max(2 * cores, sum(entry.size for entry in entries) // _TASK_BYTES)
    return spark.createDataFrame(table).repartition(max(1, min(tasks, len(entries))), "raw_path", "relative")


def reader(
    sources: tuple[SourceConfig, ...], data_sets: tuple[DataSet | None, ...], max_bytes: int
) -> Callable[[Batches], Batches]:
    """The batch function: rows of _PATHS in, rows of RECORDS out. data_sets: what was opened, one a source."""

    def read(batches: Batches) -> Batches:
        rows = (
            row
            for batch in batches
            for values in batch.select(_PATHS.names).to_pylist()
            for row in _rows(sources, data_sets, Entry(**values), max_bytes)
        )
        yield from _batched(rows)

    return read


def _rows(
    sources: tuple[SourceConfig, ...], data_sets: tuple[DataSet | None, ...], entry: Entry, max_bytes: int
) -> Iterator[tuple[Any, ...]]:
    """Rows of RECORDS: one file's records, then the file's own row with their number."""
    source = sources[entry.source]
    path = path_of(entry.raw_path)
    reading = Reading()
    for line, outcome in enumerate(read_entry(source, entry, max_bytes, reading, data_sets[entry.source])):
        yield _row(
            document_id=_digest(source.name, outcome.source_id),
            source=source.name,
            source_id=outcome.source_id,
            location=outcome.location,
            file=entry.relative,
            line=line,
            path=path,
            crawled_at=outcome.crawled_us,
            **_contents(outcome, reading),
        )
    yield _row(
        source=source.name,
        file=entry.relative,
        path=path,
        met=reading.records,
        passed=reading.passed,
        complete=reading.complete,
    )


def _row(**values: Any) -> tuple[Any, ...]:
    return tuple(values.get(name) for name in RECORDS.names)


def _contents(outcome: Outcome, reading: Reading) -> dict[str, Any]:
    """What a document holds, or why the record is none."""
    problem = outcome.problem
    if problem is not None:
        return {"reason": problem.reason, "detail": problem.detail, "raw": problem.raw[:RAW_BYTES]}
    assert outcome.content is not None
    return {
        "kind": outcome.kind,
        "content": outcome.content,
        "content_sha256": hashlib.sha256(outcome.content.encode()).hexdigest(),
        "media_type": outcome.media_type or reading.media_type,
        "license_declared": outcome.license,
        "language_declared": outcome.language,
        "metadata": sorted(outcome.metadata.items()),
        "source_modified_at": outcome.crawled_us if outcome.crawled_us is not None else reading.modified_us,
    }


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _batched(rows: Iterator[tuple[Any, ...]]) -> Batches:
    """Rows to Arrow batches of bounded size. A text counts four times its length: the most bytes UTF-8 can need."""
    content, raw = RECORDS.get_field_index("content"), RECORDS.get_field_index("raw")
    held: list[tuple[Any, ...]] = []
    size = 0
    for row in rows:
        held.append(row)
        size += 4 * len(row[content] or "") + len(row[raw] or b"")
        if size >= _BATCH_BYTES or len(held) >= _BATCH_ROWS:
            yield _batch(held)
            held, size = [], 0
    if held:
        yield _batch(held)


def _batch(rows: list[tuple[Any, ...]]) -> pa.RecordBatch:
    arrays = [pa.array(column, field.type) for column, field in zip(zip(*rows, strict=True), RECORDS, strict=True)]
    return pa.RecordBatch.from_arrays(arrays, schema=RECORDS)
