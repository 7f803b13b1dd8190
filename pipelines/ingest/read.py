"""One listed file to its records: each is a document or is quarantined with a reason. Runs in the executors' Python.

Pure functions of a file; Spark is not in sight. Memory is bounded by the largest record allowed, not by the file. What
makes the fields of a record a document is in `records.py`.

A whole file whose name ends in .gz or .zst is the text that it packs, of the language that its inner name says
(`README.md.gz` is Markdown); an archive of several files holds NULs and is `binary`.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.ingest.config import SourceConfig
from pipelines.ingest.languages import detect
from pipelines.ingest.lines import RAW_BYTES, Broken, split_lines
from pipelines.ingest.listing import Entry
from pipelines.ingest.packed import inner_name, unpacked, unpacker
from pipelines.ingest.records import FieldMap, Outcome, Rejected, from_fields, parse_json
from pipelines.ingest.rows import ROWS, first_line, outcomes

if TYPE_CHECKING:
    from pipelines.ingest.hugging_face import DataSet

JSONL_TYPE = "application/jsonl"
PARQUET_TYPE = "application/vnd.apache.parquet"
ARROW_TYPE = "application/vnd.apache.arrow.stream"


@dataclass(slots=True)
class Reading:
    """One file's reading: counts what is met, independently of what is made of it.

    passed: records that are no documents by what they are (a crawl's requests). complete: False where the file may hold
    records beyond those met.
    """

    records: int = 0
    passed: int = 0
    complete: bool = True
    modified_us: int | None = None
    media_type: str | None = None
    fields: FieldMap = field(default_factory=FieldMap)

    def broken(self, location: str, problem: Rejected) -> Outcome:
        """The record that stands for all that could not be read."""
        self.complete = False
        self.records += 1
        return Outcome.rejected(location, problem)


Reader = Callable[[SourceConfig, Entry, BinaryIO, int, Reading], Iterator[Outcome]]


def read_entry(
    source: SourceConfig, entry: Entry, max_bytes: int, reading: Reading, data_set: DataSet | None = None
) -> Iterator[Outcome]:
    """Every record of one file; `reading` holds the number of records met when this is exhausted.

    data_set: what was opened, for a part of a data set.
    """
    reading.fields = FieldMap.of(source)
    if entry.problem is not None:
        yield reading.broken(entry.relative, Rejected("unreadable", entry.problem))
        return
    if data_set is not None:
        yield from _data_set(source, entry, data_set, max_bytes, reading)
        return
    try:
        with open(entry.raw_path, "rb", opener=_open_regular) as stream:
            reading.modified_us = os.fstat(stream.fileno()).st_mtime_ns // 1000
            yield from _READERS[entry.format](source, entry, stream, max_bytes, reading)
    except OSError as error:
        yield reading.broken(entry.relative, Rejected("unreadable", error.strerror or str(error)))


def _open_regular(path: str, flags: int) -> int:
    """Open without blocking: a pipe that took the file's place since the listing must not be waited for."""
    descriptor = os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file")
    return descriptor


def _file(source: SourceConfig, entry: Entry, stream: BinaryIO, max_bytes: int, reading: Reading) -> Iterator[Outcome]:
    reading.records += 1
    content = _content(entry, stream, max_bytes)
    if isinstance(content, Rejected):
        yield Outcome.rejected(entry.relative, content)
        return
    language = detect(inner_name(entry.relative), content[:256].split("\n", 1)[0])
    reading.media_type = language.media_type
    yield Outcome(
        location=entry.relative,
        source_id=entry.relative,
        content=content,
        kind=source.kind or language.kind,
        license=source.license,
        language=source.language,
    )


def _content(entry: Entry, stream: BinaryIO, max_bytes: int) -> str | Rejected:
    """A whole file's text."""
    data, size, words = bytearray(), os.fstat(stream.fileno()).st_size, ""
    if unpack := unpacker(entry.relative):
        try:
            for piece in unpack(stream):
                data += piece
                if len(data) > max_bytes:
                    break
        except Broken as problem:
            return Rejected(problem.reason, problem.detail, bytes(data[:RAW_BYTES]))
        size, words = len(data), " or more"
    else:
        data += stream.read(RAW_BYTES if size > max_bytes else max_bytes + 1)
    head = bytes(data[:RAW_BYTES])
    if b"\0" in data:
        return Rejected("binary", f"NUL at byte {data.index(0)}", head)
    if size > max_bytes or len(data) > max_bytes:
        return Rejected("too_large", f"{max(size, len(data))} bytes{words}, limit {max_bytes}", head)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        return Rejected("invalid_utf8", f"{error.reason} at byte {error.start}", head)


def _jsonl(source: SourceConfig, entry: Entry, stream: BinaryIO, max_bytes: int, reading: Reading) -> Iterator[Outcome]:
    reading.media_type = JSONL_TYPE
    for line in split_lines(unpacked(entry.relative, stream), max_bytes):
        data = line.data.removeprefix(b"\xef\xbb\xbf") if line.number == 1 else line.data
        if line.problem is None and line.size <= max_bytes and not data.strip():
            continue
        location = f"{entry.relative}:{line.number}"
        head = data[:RAW_BYTES]
        if line.problem is not None:
            yield reading.broken(location, Rejected(line.problem.reason, line.problem.detail, head))
            return
        reading.records += 1
        if line.size > max_bytes:
            yield Outcome.rejected(location, Rejected("too_large", f"{line.size} bytes, limit {max_bytes}", head))
            continue
        record = parse_json(data)
        if isinstance(record, Rejected):
            yield Outcome.rejected(location, record)
        else:
            yield from_fields(location, record, head, source, reading.fields)


def _warc(source: SourceConfig, entry: Entry, stream: BinaryIO, max_bytes: int, reading: Reading) -> Iterator[Outcome]:
    # Its extension modules are loaded where there is an archive to read.
    from pipelines.ingest.warc import read_page, split_records

    for block in split_records(unpacked(entry.relative, stream), max_bytes):
        location = f"{entry.relative}:{block.number}"
        head = block.data[:RAW_BYTES]
        if block.problem is not None and block.problem.reason != "too_large":
            yield reading.broken(location, Rejected(block.problem.reason, block.problem.detail, head))
            continue
        page = Rejected("too_large", block.problem.detail, head) if block.problem else read_page(block.data, max_bytes)
        if page is None:
            reading.passed += 1
            continue
        reading.records += 1
        if isinstance(page, Rejected):
            yield Outcome.rejected(location, page)
            continue
        known_by = source.id_field if source.id_field in page.fields else "id"
        fields = FieldMap("text", known_by, source.language_field, source.license_field)
        outcome = from_fields(location, page.fields, head, source, fields, max_bytes)
        yield replace(outcome, media_type=page.media_type, crawled_us=page.crawled_us)


def _parquet(
    source: SourceConfig, entry: Entry, stream: BinaryIO, max_bytes: int, reading: Reading
) -> Iterator[Outcome]:
    reading.media_type = PARQUET_TYPE
    try:
        file = pq.ParquetFile(stream, pre_buffer=False)
        groups = [file.metadata.row_group(g).num_rows for g in range(file.metadata.num_row_groups)]
        reading.fields.guess(file.schema_arrow.names)
    except (pa.ArrowException, OSError, ValueError) as error:
        yield reading.broken(entry.relative, _broken_parquet(stream, error))
        return
    first = 1
    for group, rows in enumerate(groups):
        row = first
        try:
            for batch in file.iter_batches(batch_size=ROWS, row_groups=[group]):
                for outcome in outcomes(batch, entry.relative, row, source, reading.fields, max_bytes):
                    reading.records += 1
                    row += 1
                    yield outcome
        except (pa.ArrowException, OSError, ValueError) as error:
            # The rest of this row group cannot be decoded; each of its rows is known to be there and is accounted for.
            words = f"row group {group}: {first_line(error)}"
            for lost in range(row, first + rows):
                reading.records += 1
                yield Outcome.rejected(f"{entry.relative}:{lost}", Rejected("corrupt_record", words))
        first += rows


def _broken_parquet(stream: BinaryIO, error: Exception) -> Rejected:
    """A Parquet file without its footer was cut off: the footer is written last and holds the schema."""
    try:
        stream.seek(0)
        head = stream.read(RAW_BYTES)
        stream.seek(max(0, os.fstat(stream.fileno()).st_size - 4))
        cut = head[:4] == b"PAR1" and stream.read(4) != b"PAR1"
    except OSError as failed:
        return Rejected("unreadable", failed.strerror or str(failed))
    return Rejected("truncated" if cut else "corrupt_record", first_line(error), head)


def _data_set(
    source: SourceConfig, entry: Entry, data_set: DataSet, max_bytes: int, reading: Reading
) -> Iterator[Outcome]:
    reading.media_type = ARROW_TYPE
    row = 1
    try:
        for batch in data_set.batches(entry.split, entry.part):
            reading.fields.guess(batch.schema.names)
            for outcome in outcomes(batch, entry.relative, row, source, reading.fields, max_bytes):
                reading.records += 1
                row += 1
                yield outcome
    except Exception as error:
        # The library raises what its readers, file systems and the network raise: no list of types holds them all.
        reason = "corrupt_record" if isinstance(error, ValueError | TypeError | pa.ArrowException) else "unreadable"
        yield reading.broken(f"{entry.relative}:{row}", Rejected(reason, first_line(error)))


_READERS: dict[str, Reader] = {"file": _file, "jsonl": _jsonl, "warc": _warc, "parquet": _parquet}
