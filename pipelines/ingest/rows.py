"""Rows of Arrow tables to records: of Parquet files, and of Hugging Face data sets, which come as Arrow."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pyarrow as pa

from pipelines.ingest.config import SourceConfig
from pipelines.ingest.records import FieldMap, Outcome, from_fields, raw_of

ROWS = 64  # decoded at a time


def outcomes(
    batch: pa.RecordBatch, place: str, first: int, source: SourceConfig, fields: FieldMap, max_bytes: int
) -> Iterator[Outcome]:
    """Each row's record, known by `place:row`; first: the number of the batch's first row in its place, from 1."""
    for index in range(batch.num_rows):
        record = {name: _scalar(batch.column(c)[index]) for c, name in enumerate(batch.schema.names)}
        outcome = from_fields(f"{place}:{first + index}", record, b"", source, fields, max_bytes)
        if outcome.problem is not None:
            outcome = replace(outcome, problem=replace(outcome.problem, raw=raw_of(record)))
        yield outcome


def _scalar(value: pa.Scalar) -> object:
    """The value as Python; what Python cannot hold (a string that is not UTF-8, the year 20000) as bytes."""
    try:
        return value.as_py()
    except (ValueError, OverflowError):
        buffer = getattr(value, "as_buffer", None)
        return buffer().to_pybytes() if buffer is not None else f"{value.type} out of range".encode() + b"\xff"


def first_line(error: BaseException) -> str:
    """What an error says, as one line of at most 500 characters."""
    return (str(error).strip() or type(error).__name__).split("\n", 1)[0][:500]
