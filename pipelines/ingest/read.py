"""One listed file to its records: each is a document or is quarantined with a reason. Runs in the executors' Python.

Pure functions of a file; Spark is not in sight. Memory is bounded by the largest record allowed, not by the file. What
makes a JSON or Parquet record a document is in `records.py`.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.ingest.config import SourceConfig
from pipelines.ingest.languages import detect
from pipelines.ingest.lines import RAW_BYTES, gunzip, read_chunks, split_lines
from pipelines.ingest.listing import Entry
from pipelines.ingest.records import FieldMap, Outcome, Rejected, from_fields, parse_json, raw_of

JSONL_TYPE = "application/jsonl"
PARQUET_TYPE = "application/vnd.apache.parquet"
_ROWS = 64  # Parquet rows decoded at a time


@dataclass(slots=True)
class Reading:
    """One file's reading: counts what is met, independently of what is made of it."""

    records: int = 0
    modified_us: int | None = None
    media_type: str | None = None
    fields: FieldMap = field(default_factory=FieldMap)


def read_entry(source: SourceConfig, entry: Entry, max_bytes: int, reading: Reading) -> Iterator[Outcome]:
    """Every record of one file; `reading` holds the number of records met when this is exhausted."""
    reading.fields = FieldMap.of(source)
    if entry.problem is not None:
        yield _whole(entry, reading, Rejected("unreadable", entry.problem))
        return
    try:
        with open(entry.raw_path, "rb", opener=_open_regular) as stream:
            status = os.fstat(stream.fileno())
            reading.modified_us = status.st_mtime_ns // 1000
            if entry.format == "jsonl":
                yield from _jsonl(source, entry, stream, max_bytes, reading)
            elif entry.format == "parquet":
                yield from _parquet(source, entry, stream, max_bytes, reading)
            else:
                yield _file(source, entry, stream, status.st_size, max_bytes, reading)
    except OSError as error:
        yield _whole(entry, reading, Rejected("unreadable", error.strerror or str(error)))


def _open_regular(path: str, flags: int) -> int:
    """Open without blocking: a pipe that took the file's place since the listing must not be waited for."""
    descriptor = os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file")
    return descriptor


def _whole(entry: Entry, reading: Reading, outcome: Outcome | Rejected) -> Outcome:
    """The record that is the file itself."""
    reading.records += 1
    if isinstance(outcome, Rejected):
        outcome = Outcome.rejected(entry.relative, outcome)
    return outcome


def _file(source: SourceConfig, entry: Entry, stream: BinaryIO, size: int, max_bytes: int, reading: Reading) -> Outcome:
    data = stream.read(RAW_BYTES if size > max_bytes else max_bytes + 1)
    head = data[:RAW_BYTES]
    if b"\0" in data:
        return _whole(entry, reading, Rejected("binary", f"NUL at byte {data.index(0)}", head))
    if size > max_bytes or len(data) > max_bytes:
        return _whole(entry, reading, Rejected("too_large", f"{max(size, len(data))} bytes, limit {max_bytes}", head))
    try:
        content = data.decode("utf-8")
    except UnicodeDecodeError as error:
        return _whole(entry, reading, Rejected("invalid_utf8", f"{error.reason} at byte {error.start}", head))
    language = detect(entry.relative, content[:256].split("\n", 1)[0])
    reading.media_type = language.media_type
    outcome = Outcome(
        location=entry.relative,
        source_id=entry.relative,
        content=content,
        kind=source.kind or language.kind,
        license=source.license,
        language=source.language,
    )
    return _whole(entry, reading, outcome)


def _jsonl(source: SourceConfig, entry: Entry, stream: BinaryIO, max_bytes: int, reading: Reading) -> Iterator[Outcome]:
    reading.media_type = JSONL_TYPE
    packed = entry.raw_path.lower().endswith(b".gz") or stream.read(2) == b"\x1f\x8b"
    stream.seek(0)
    chunks = read_chunks(stream)
    for line in split_lines(gunzip(chunks) if packed else chunks, max_bytes):
        data = line.data.removeprefix(b"\xef\xbb\xbf") if line.number == 1 else line.data
        if line.problem is None and line.size <= max_bytes and not data.strip():
            continue
        reading.records += 1
        location = f"{entry.relative}:{line.number}"
        head = data[:RAW_BYTES]
        if line.problem is not None:
            yield Outcome.rejected(location, Rejected(line.problem.reason, line.problem.detail, head))
        elif line.size > max_bytes:
            yield Outcome.rejected(location, Rejected("too_large", f"{line.size} bytes, limit {max_bytes}", head))
        else:
            record = parse_json(data)
            if isinstance(record, Rejected):
                yield Outcome.rejected(location, record)
            else:
                yield from_fields(location, record, head, source, reading.fields)


def _parquet(
    source: SourceConfig, entry: Entry, stream: BinaryIO, max_bytes: int, reading: Reading
) -> Iterator[Outcome]:
    reading.media_type = PARQUET_TYPE
    try:
        file = pq.ParquetFile(stream, pre_buffer=False)
        groups = [file.metadata.row_group(g).num_rows for g in range(file.metadata.num_row_groups)]
        reading.fields.guess(file.schema_arrow.names)
    except (pa.ArrowException, OSError, ValueError) as error:
        yield _whole(entry, reading, _broken_parquet(stream, error))
        return
    first = 1
    for group, rows in enumerate(groups):
        row = first
        try:
            for batch in file.iter_batches(batch_size=_ROWS, row_groups=[group]):
                for index in range(batch.num_rows):
                    reading.records += 1
                    location = f"{entry.relative}:{row}"
                    record = {name: _scalar(batch.column(c)[index]) for c, name in enumerate(batch.schema.names)}
                    outcome = from_fields(location, record, b"", source, reading.fields, max_bytes)
                    if outcome.problem is not None:
                        outcome = replace(outcome, problem=replace(outcome.problem, raw=raw_of(record)))
                    yield outcome
                    row += 1
        except (pa.ArrowException, OSError, ValueError) as error:
            # The rest of this row group cannot be decoded; each of its rows is known to be there and is accounted for.
            words = f"row group {group}: {_first_line(error)}"
            for lost in range(row, first + rows):
                reading.records += 1
                yield Outcome.rejected(f"{entry.relative}:{lost}", Rejected("corrupt_record", words))
        first += rows


def _scalar(value: pa.Scalar) -> object:
    """The value as Python; what Python cannot hold (a string that is not UTF-8, the year 20000) as bytes."""
    try:
        return value.as_py()
    except (ValueError, OverflowError):
        buffer = getattr(value, "as_buffer", None)
        return buffer().to_pybytes() if buffer is not None else f"{value.type} out of range".encode() + b"\xff"


def _broken_parquet(stream: BinaryIO, error: Exception) -> Rejected:
    """A Parquet file without its footer was cut off: the footer is written last and holds the schema."""
    try:
        stream.seek(0)
        head = stream.read(RAW_BYTES)
        stream.seek(max(0, os.fstat(stream.fileno()).st_size - 4))
        cut = head[:4] == b"PAR1" and stream.read(4) != b"PAR1"
    except OSError as failed:
        return Rejected("unreadable", failed.strerror or str(failed))
    return Rejected("truncated" if cut else "corrupt_record", _first_line(error), head)


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n", 1)[0][:500]
