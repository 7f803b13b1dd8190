"""Which files are as the last run found them, so that an ingest reads the others alone.

A run keeps what it listed, a file of the lake for each source, under the fingerprint by which ops.runs names it. The
next run by the same settings takes a file for read where name, format, size and time are those of that list
(`listing.py` says what a time is), and reads what is new or changed.

That gives the tables that reading everything gives, unless a record of a file that is not read depends on one that is:
where two files have records of one id, the first file's is the document. So a run also keeps whether it met such
records, or broken ones that are lines of a file, whose place a quarantine row does not tell: then the next change reads
everything again. And where a record that was read has the id of one in a file that was not (`apart`), everything is
read as well.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyspark.sql import DataFrame, SparkSession

from pipelines.changes import Since
from pipelines.files import read_file, write_file
from pipelines.ingest.config import SourceConfig
from pipelines.ingest.listing import Entry, Listing, input_name, path_of

_LISTED = pa.schema(
    [
        ("raw_path", pa.binary()),
        ("relative", pa.string()),
        ("format", pa.string()),
        ("size", pa.int64()),
        ("problem", pa.string()),
        ("changed_ns", pa.int64()),
    ]
)
_FINGERPRINT, _ENTANGLED = b"fingerprint", b"entangled"
Places = list[tuple[str, str]]
"""Names of sources, and paths in them."""


@dataclass
class News:
    """What changed in the sources since the last run."""

    entries: list[Entry] = field(default_factory=list)
    """files to read"""
    read: Places = field(default_factory=list)
    """their relative paths"""
    gone: Places = field(default_factory=list)
    """relative paths of files that are no more"""
    paths: Places = field(default_factory=list)
    """paths of both, as documents have them"""


def keep(lake: str, listed: Mapping[SourceConfig, Listing], entangled: bool) -> None:
    """Keep what was listed of each source that has a fingerprint; data sets need no list.

    entangled: whether one record's fate may hang on another file's. What cannot be kept costs the next run its time.
    """
    for source, listing in listed.items():
        fingerprint = listing.fingerprint()
        if fingerprint is None or listing.data_set is not None:
            continue
        columns = [[getattr(entry, name) for entry in listing.entries] for name in _LISTED.names]
        table = pa.table([pa.array(c, t) for c, t in zip(columns, _LISTED.types, strict=True)], schema=_LISTED)
        table = table.replace_schema_metadata({_FINGERPRINT: str(fingerprint), _ENTANGLED: str(entangled)})
        sink = io.BytesIO()
        pq.write_table(table, sink, compression="zstd")
        with contextlib.suppress(OSError):
            write_file(_uri(lake, source), sink.getvalue())


def news(lake: str, listed: Mapping[SourceConfig, Listing], since: Since) -> News | None:
    """What the run that saw `since` has not read; None where that is not known of every source, or is everything."""
    found = News()
    for source, listing in listed.items():
        seen = (since or {}).get(input_name(source, listing))
        if listing.data_set is not None:
            if seen is None or listing.fingerprint() != seen:  # its parts have no times of their own
                return None
            continue
        before = _kept(lake, source, seen)
        if before is None:
            return None
        for entry in listing.entries:
            if before.pop(entry.raw_path, None) != tuple(getattr(entry, name) for name in _LISTED.names):
                found.entries.append(entry)
                found.read.append((source.name, entry.relative))
                found.paths.append((source.name, path_of(entry.raw_path)))
        for raw_path, relative, *_ in before.values():
            found.gone.append((source.name, str(relative)))
            found.paths.append((source.name, path_of(raw_path)))
    return found if len(found.entries) < sum(len(listing.entries) for listing in listed.values()) else None


def apart(found: News, settled: DataFrame, stored: DataFrame, earlier: DataFrame | None) -> bool:
    """Whether no record that was read has the id of one in another file. earlier: the quarantine, None if empty."""
    spark = settled.sparkSession
    elsewhere = (
        stored.join(settled.select("document_id"), "document_id", "left_semi")
        .join(places(spark, found.paths, "path"), ["source", "path"], "left_anti")
        .select("source")
    )
    if earlier is not None:
        rows = earlier.join(settled.select("source", "source_id"), ["source", "source_id"], "left_semi")
        others = rows.join(places(spark, found.read, "source_id"), ["source", "source_id"], "left_anti")
        elsewhere = elsewhere.union(others.select("source"))
    return elsewhere.isEmpty()


def places(spark: SparkSession, found: Places, name: str) -> DataFrame:
    """As a DataFrame: source and, by the given name, path."""
    columns = [pa.array([row[i] for row in found], pa.string()) for i in range(2)]
    return spark.createDataFrame(pa.table(columns, names=["source", name]))


def _uri(lake: str, source: SourceConfig) -> str:
    return f"{lake.rstrip('/')}/listings/{hashlib.sha256(source.name.encode()).hexdigest()[:32]}.parquet"


def _kept(lake: str, source: SourceConfig, fingerprint: int | None) -> dict[bytes, tuple[Any, ...]] | None:
    """The list of that fingerprint by path; None where the lake has another or none, or its files were entangled."""
    content = read_file(_uri(lake, source)) if fingerprint is not None else None
    if content is None:
        return None
    try:
        table = pq.read_table(io.BytesIO(content))
    except pa.ArrowException:  # cut short where the machine went down
        return None
    metadata = table.schema.metadata or {}
    if metadata.get(_FINGERPRINT) != str(fingerprint).encode() or metadata.get(_ENTANGLED) != b"False":
        return None
    return {row[0]: row for row in zip(*(column.to_pylist() for column in table.columns), strict=True)}
