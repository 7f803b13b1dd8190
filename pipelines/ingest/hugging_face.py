"""Data sets of Hugging Face's `datasets`: what save_to_disk wrote, a folder for its builders, a name of the hub.

Opened once, on the driver, and sent to the readers as the library pickles it, names of files and no data: what is
added meanwhile is not part of it. Read as Arrow, some rows at a time, one part a task: a shard of a stream, or 8,192
rows of a saved data set. A name of the hub is streamed at the revision that it had when it was opened; where the hub
cannot be reached, the library takes its cache.

Left out: pictures and sound (they stay bytes, in the metadata), and going on after a part's error: the library gives up
the part, so its rest is one quarantined record. JSONL files are better read as such, line by line.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pyarrow as pa

from pipelines.errors import LakeError
from pipelines.ingest.config import SourceConfig, is_saved_data_set
from pipelines.ingest.rows import ROWS, first_line
from pipelines.tables import hash_version

PART_ROWS = 8192
PART_BYTES = 32 * 1024 * 1024  # what a part is taken to hold: nobody knows before it is read


@dataclass(frozen=True, slots=True)
class DataSet:
    """An opened data set: a `Dataset` or an `IterableDataset` a split. revision: of the hub, empty for a folder."""

    splits: dict[str, Any]
    revision: str

    def parts(self) -> Iterator[tuple[str, int]]:
        """Every part by its split and number."""
        for split, data in self.splits.items():
            parts = -(-len(data) // PART_ROWS) if _counted(data) else data.num_shards
            yield from ((split, part) for part in range(parts))

    def batches(self, split: str, part: int) -> Iterator[pa.RecordBatch]:
        """A part's rows, some at a time. Raises what the library and its readers raise."""
        data: Any = self.splits[split]
        with _library():
            if _counted(data):
                data = data.select(range(part * PART_ROWS, min((part + 1) * PART_ROWS, len(data))))
            else:
                data = data.shard(num_shards=data.num_shards, index=part)
            for table in data.with_format("arrow").iter(batch_size=ROWS):
                yield from table.combine_chunks().to_batches()


def _counted(data: object) -> bool:
    """Whether it is a `Dataset`, which knows its rows; a stream knows its shards."""
    return isinstance(data, Sized)


def open_data_set(source: SourceConfig) -> DataSet:
    """Open a source whose path is resolved, of the split that it names, or of all.

    Raises LakeError, exit code 2, where there is no such data set, configuration, split or revision; 75 where the hub
    cannot be reached and its cache does not have it, or where reading fails.
    """
    with _library() as library:
        try:
            if is_saved_data_set(source.path):
                return DataSet(_of_splits(source, _saved(library, source)), "")
            builder = library.load_dataset_builder(source.path, source.config or None, revision=source.revision or None)
            streams = builder.as_streaming_dataset(split=None)
            revision = "" if os.path.isdir(source.path) else str(builder.hash or "")
            return DataSet(_of_splits(source, dict(streams)), revision)
        except ConnectionError as error:
            raise LakeError(
                f"The data set {source.path} is not in the cache and the hub cannot be reached "
                f"({first_line(error)}): run again with a network, or name a folder.",
                75,
            ) from error
        except (FileNotFoundError, library.exceptions.DatasetNotFoundError) as error:
            raise LakeError(
                f"There is no data set {source.path} ({first_line(error)}): "
                "check its name (OWNER/NAME on the hub), its revision and your access to it.",
                2,
            ) from error
        except OSError as error:
            raise LakeError(
                f"The data set {source.path} cannot be read now ({first_line(error)}): run again later.", 75
            ) from error
        except (ValueError, library.exceptions.DatasetsError) as error:
            raise LakeError(
                f"The data set {source.path} cannot be opened ({first_line(error)}): check its path and config.", 2
            ) from error


def version_of(source: SourceConfig, revision: str) -> int | None:
    """63 bits that tell a revision of the hub, and what is taken of it; None where there is no revision."""
    if not revision:
        return None
    named = "\0".join((source.path, source.config, source.split, revision))
    return hash_version(hashlib.sha256(named.encode()).digest())


def _saved(library: ModuleType, source: SourceConfig) -> dict[str, Any]:
    if source.config or source.revision:
        raise ValueError("a data set written by save_to_disk has no config and no revision")
    data = library.load_from_disk(source.path)
    # A data set that was saved without its splits calls itself by the one that it was, or by none.
    return dict(data) if isinstance(data, library.DatasetDict) else {str(data.split or "train"): data}


def _of_splits(source: SourceConfig, splits: dict[str, Any]) -> dict[str, Any]:
    if source.split and source.split not in splits:
        raise ValueError(f"it has no split {source.split!r}, only {', '.join(splits)}")
    return {split: data for split, data in splits.items() if source.split in ("", split)}


@contextmanager
def _library() -> Iterator[ModuleType]:
    """The library, quiet, and without torch, which it would load with its first stream: rows are taken as Arrow."""
    import datasets
    import huggingface_hub

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    huggingface_hub.logging.set_verbosity_error()
    torch = datasets.config.TORCH_AVAILABLE
    datasets.config.TORCH_AVAILABLE = False
    try:
        yield datasets
    finally:
        datasets.config.TORCH_AVAILABLE = torch
