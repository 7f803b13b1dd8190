"""Ingest: files to bronze.documents and bronze.quarantine; every record ends in one of the two.

Names are listed on the driver and spread as a DataFrame; contents are read once, in the executors' Python, into a
DataFrame kept on the executors' disks, from which both tables are written. A file's reading also says how many records
it met, and the stage fails before it writes anything where documents and quarantined records do not make up that sum.

Reading the same again writes nothing, and where the files' fingerprint is that of the last run the job spares it; a
changed file updates its document; what is gone from the source is kept. Of two whole records with one id the first, by
path and line, is the document, however the files are spread; the others are `duplicate_id`, known by path:line. A
quarantine row goes when its record, or the file that it is a line of, is read again without the trouble.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import pyarrow as pa
from pyspark import StorageLevel
from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F

from pipelines import lake as lakehouse
from pipelines.changes import Since
from pipelines.errors import LakeError
from pipelines.ingest.config import IngestConfig, SourceConfig
from pipelines.ingest.lines import RAW_BYTES
from pipelines.ingest.listing import Entry, Listing, fingerprints, list_sources
from pipelines.ingest.read import Reading, read_entry
from pipelines.ingest.records import Outcome
from pipelines.sql import literals
from pipelines.tables import BRONZE_DOCUMENTS, BRONZE_QUARANTINE, TIMESTAMP

_PATHS = pa.schema(
    [
        ("source", pa.int32()),
        ("raw_path", pa.binary()),
        ("relative", pa.string()),
        ("format", pa.string()),
        ("size", pa.int64()),
        ("problem", pa.string()),
    ]
)
# One row a record, and one a file (met is not null) that says how many records were met in it.
_RECORDS = pa.schema(
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
        ("reason", pa.string()),
        ("detail", pa.string()),
        ("raw", pa.binary()),
        ("met", pa.int64()),
    ]
)
_BATCH_BYTES = 8 * 1024 * 1024
_BATCH_ROWS = 1024
_TASK_BYTES = 32 * 1024 * 1024
Batches = Iterator[pa.RecordBatch]


def run(
    spark: SparkSession, lake: str, config: IngestConfig, *, run_id: str, since: Since = None
) -> lakehouse.StageResult:
    """Ingest every source of `config`.

    Returns counts: records = documents + quarantined (also by reason, `quarantined.REASON`), files, skipped (files
    that are compiled or media by their name), inserted, updated and what the tables now hold (`table_...`).
    Raises LakeError, exit code 2, for no input or a path that is not there; 1 where the counts do not add up.
    """
    listed = list_sources(config, lake)
    sources, listings = tuple(listed), list(listed.values())
    entries = [entry for listing in listings for entry in listing.entries]
    if not entries:
        where = ", ".join(source.path for source in sources)
        raise LakeError(f"There is no file to ingest in {where}: name a folder, a file or a glob that has some.", 2)
    for table in (BRONZE_DOCUMENTS, BRONZE_QUARANTINE):
        lakehouse.ensure(spark, lake, table)

    read = _spread(spark, entries).mapInArrow(_reader(sources, config.max_bytes), lakehouse.spark_schema(_RECORDS))
    records = read.persist(StorageLevel.DISK_ONLY)
    try:
        counts = {"files": len(entries), "skipped": sum(listing.skipped for listing in listings)}
        met = _check_read(records, len(entries))
        settled = _settle(records.where("met IS NULL"))
        counts |= _check_settled(settled, met)
        stored = lakehouse.read(spark, lake, BRONZE_DOCUMENTS)
        documents = _carry_times(_documents(settled, run_id), stored)
        added = lakehouse.sync(spark, lake, BRONZE_DOCUMENTS, documents, delete=False)
        quarantine = _quarantine(settled, run_id)
        kept = _kept_quarantine(spark, lake, settled, sources, listings)
        scope = f"source IN ({literals(source.name for source in sources)})"
        held = lakehouse.sync(
            spark, lake, BRONZE_QUARANTINE, quarantine.unionByName(kept) if kept else quarantine, scope=scope
        )
    finally:
        records.unpersist()

    counts |= {"inserted": added.inserted, "updated": added.updated}
    counts |= {"quarantine_inserted": held.inserted, "quarantine_deleted": held.deleted}
    for name, table in (("documents", BRONZE_DOCUMENTS), ("quarantine", BRONZE_QUARANTINE)):
        counts[f"table_{name}"] = lakehouse.read(spark, lake, table).count()
    return lakehouse.StageResult(
        counts=counts,
        inputs=fingerprints(listed),
        outputs={BRONZE_DOCUMENTS.name: added.version, BRONZE_QUARANTINE.name: held.version},
    )


def _spread(spark: SparkSession, entries: list[Entry]) -> DataFrame:
    """The files as a DataFrame, spread by a hash of their names over enough tasks for their bytes."""
    columns = [[getattr(entry, name) for entry in entries] for name in _PATHS.names]
    table = pa.table([pa.array(c, t) for c, t in zip(columns, _PATHS.types, strict=True)], schema=_PATHS)
    cores = spark.sparkContext.defaultParallelism
    tasks = max(2 * cores, sum(entry.size for entry in entries) // _TASK_BYTES)
    return spark.createDataFrame(table).repartition(min(tasks, len(entries)), "raw_path")


def _reader(sources: tuple[SourceConfig, ...], max_bytes: int) -> Callable[[Batches], Batches]:
    """The batch function: rows of _PATHS in, rows of _RECORDS out."""

    def read(batches: Batches) -> Batches:
        rows = (
            row
            for batch in batches
            for values in batch.select(_PATHS.names).to_pylist()
            for row in _rows(sources, Entry(**values), max_bytes)
        )
        yield from _batched(rows)

    return read


def _rows(sources: tuple[SourceConfig, ...], entry: Entry, max_bytes: int) -> Iterator[tuple[Any, ...]]:
    """Rows of _RECORDS: one file's records, then the file's own row with their number."""
    source = sources[entry.source]
    path = entry.raw_path.decode("utf-8", "backslashreplace")
    reading = Reading()
    for line, outcome in enumerate(read_entry(source, entry, max_bytes, reading)):
        yield (
            _digest(source.name, outcome.source_id),
            source.name,
            outcome.source_id,
            outcome.location,
            entry.relative,
            line,
            *_contents(outcome, path, reading),
            None,
        )
    blank = [None] * (len(_RECORDS.names) - 7)
    yield (None, source.name, None, None, entry.relative, None, *blank, reading.records)


def _contents(outcome: Outcome, path: str, reading: Reading) -> tuple[Any, ...]:
    """From `kind` to `raw`."""
    problem = outcome.problem
    if problem is not None:
        return (*[None] * 9, problem.reason, problem.detail, problem.raw[:RAW_BYTES])
    assert outcome.content is not None
    return (
        outcome.kind,
        outcome.content,
        hashlib.sha256(outcome.content.encode()).hexdigest(),
        path,
        reading.media_type,
        outcome.license,
        outcome.language,
        sorted(outcome.metadata.items()),
        reading.modified_us,
        *[None] * 3,
    )


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _batched(rows: Iterator[tuple[Any, ...]]) -> Batches:
    """Rows to Arrow batches of bounded size. A text counts four times its length: the most bytes UTF-8 can need."""
    content, raw = _RECORDS.get_field_index("content"), _RECORDS.get_field_index("raw")
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
    arrays = [pa.array(column, field.type) for column, field in zip(zip(*rows, strict=True), _RECORDS, strict=True)]
    return pa.RecordBatch.from_arrays(arrays, schema=_RECORDS)


def _check_read(records: DataFrame, files: int) -> int:
    """Read everything, once; the number of records met. Raises LakeError where a file or a record is missing."""
    row = records.agg(F.count("met"), F.coalesce(F.sum("met"), F.lit(0)), F.count("document_id")).first()
    assert row is not None
    if row[0] != files or row[1] != row[2]:
        raise LakeError(
            f"Ingest lost count: {row[0]} of {files} files and {row[2]} of {row[1]} records came back; "
            "nothing was written, run it again.",
            75,
        )
    return int(row[1])


def _settle(records: DataFrame) -> DataFrame:
    """One record an id: others with it become known by their location, and `duplicate_id` where they are whole."""
    order = F.struct(F.col("reason").isNotNull().alias("broken"), F.col("file"), F.col("line"), F.col("location"))
    shared = (
        records.groupBy("document_id")
        .agg(F.count(F.lit(1)).alias("members"), F.min(order).alias("first"))
        .where("members > 1")
        .select("document_id", "first")
    )
    # Texts are shuffled only where there are duplicates at all.
    if shared.isEmpty():
        return records
    later = F.col("first").isNotNull() & (order != F.col("first"))
    duplicate = later & F.col("reason").isNull()
    known_by = F.when(later, F.col("location")).otherwise(F.col("source_id"))
    words = F.concat(F.lit("the id "), F.col("source_id"), F.lit(" came first at "), F.col("first.location"))
    return records.join(shared, "document_id", "left").select(
        _id(F.col("source"), known_by).alias("document_id"),
        known_by.alias("source_id"),
        F.when(duplicate, F.lit("duplicate_id")).otherwise(F.col("reason")).alias("reason"),
        F.when(duplicate, words).otherwise(F.col("detail")).alias("detail"),
        F.when(duplicate, F.substring(F.encode("content", "UTF-8"), 1, RAW_BYTES)).otherwise(F.col("raw")).alias("raw"),
        *[n for n in _RECORDS.names if n not in ("document_id", "source_id", "reason", "detail", "raw")],
    )


def _id(*parts: Column) -> Column:
    """sha256 of the parts, NUL between them, in hexadecimal."""
    joined: list[Column] = []
    for part in parts:
        joined += [F.lit("\0"), part]
    return F.sha2(F.concat(*joined[1:]), 256)


def _check_settled(settled: DataFrame, met: int) -> dict[str, int]:
    """The counts by what the records came to. Raises LakeError where they do not make up the records met."""
    by_reason: dict[str, int] = {}
    distinct = 0
    grouped = settled.groupBy(F.coalesce("reason", F.lit(""))).agg(
        F.count(F.lit(1)), F.countDistinct("source", "source_id")
    )
    for reason, number, ids in islice(grouped.toLocalIterator(), 100):
        by_reason[reason] = int(number)
        distinct += int(ids)
    documents = by_reason.pop("", 0)
    quarantined = sum(by_reason.values())
    if documents + quarantined != met or distinct != met:
        raise LakeError(
            f"Ingest's counts do not add up: {documents} documents and {quarantined} quarantined records, "
            f"{distinct} of them with an id of their own, of {met} records; nothing was written."
        )
    return {
        "records": met,
        "documents": documents,
        "quarantined": quarantined,
        **{f"quarantined.{reason}": by_reason[reason] for reason in sorted(by_reason)},
    }


def _documents(settled: DataFrame, run_id: str) -> DataFrame:
    whole = settled.where("reason IS NULL")
    return whole.withColumns({"ingested_at": F.current_timestamp(), "run_id": F.lit(run_id)}).select(
        *BRONZE_DOCUMENTS.schema.names
    )


def _quarantine(settled: DataFrame, run_id: str) -> DataFrame:
    columns = {
        "quarantine_id": _id(F.col("source"), F.col("source_id"), F.col("reason")),
        "run_id": F.lit(run_id),
        "at": F.current_timestamp(),
    }
    return settled.where("reason IS NOT NULL").withColumns(columns).select(*BRONZE_QUARANTINE.schema.names)


def _carry_times(documents: DataFrame, stored: DataFrame) -> DataFrame:
    """A file that was touched or copied, its content the same, is not another document: the stored time stands."""
    old = stored.select("document_id", "content_sha256", F.col("source_modified_at").alias("stored_at"))
    touched = (
        documents.select("document_id", "content_sha256", "source_modified_at")
        .join(old, ["document_id", "content_sha256"])
        .where("NOT (source_modified_at <=> stored_at)")
        .select("document_id", "stored_at", F.lit(True).alias("touched"))
    )
    if touched.isEmpty():
        return documents
    at = F.when(F.col("touched"), F.col("stored_at")).otherwise(F.col("source_modified_at"))
    return (
        documents.join(touched, "document_id", "left")
        .withColumn("source_modified_at", at)
        .select(*BRONZE_DOCUMENTS.schema.names)
    )


def _kept_quarantine(
    spark: SparkSession, lake: str, settled: DataFrame, sources: tuple[SourceConfig, ...], listings: list[Listing]
) -> DataFrame | None:
    """Rows of earlier runs that this run has nothing to say about; None where there are none of these sources.

    A row is settled anew when a record of its id was met, or when the file or folder that it lies in was read.
    """
    names = [source.name for source in sources]
    earlier = lakehouse.read(spark, lake, BRONZE_QUARANTINE).where(F.col("source").isin(names))
    if earlier.isEmpty():
        return None
    read = [
        (source.name, place)
        for source, listing in zip(sources, listings, strict=True)
        for place in [*(entry.relative for entry in listing.entries), *listing.folders]
    ]
    places = spark.createDataFrame(
        pa.table([[name for name, _ in read], [place for _, place in read]], names=["source", "place"])
    )
    return (
        earlier.join(settled.select("source", "source_id"), ["source", "source_id"], "left_anti")
        .join(places.withColumnRenamed("place", "source_id"), ["source", "source_id"], "left_anti")
        .withColumn("place", F.regexp_replace("source_id", ":[0-9]+$", ""))
        .join(places, ["source", "place"], "left_anti")
        .select(*BRONZE_QUARANTINE.schema.names)
    )
