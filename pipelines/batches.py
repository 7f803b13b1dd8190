"""Arrow batches in slices of a bounded number of bytes: Spark bounds a batch's rows alone, and rows can be long."""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow as pa
import pyarrow.compute as pc

Batches = Iterator[pa.RecordBatch]  # what a mapInArrow function takes and gives
SLICE_BYTES = 4 * 1024 * 1024


def slices(batch: pa.RecordBatch, column: str, limit: int = SLICE_BYTES) -> Iterator[pa.RecordBatch]:
    """The batch in slices of at most ``limit`` bytes of the column, or of one row where a row is longer."""
    start, size = 0, 0
    for row, length in enumerate(pc.binary_length(batch.column(column)).to_pylist()):
        if row > start and size + length > limit:
            yield batch.slice(start, row - start)
            start, size = row, 0
        size += length
    if start < batch.num_rows:
        yield batch.slice(start)
