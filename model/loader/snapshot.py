"""Pin one version of gold.sequences and say which rows of which files it holds.

The Delta log is read with deltalake, the files with pyarrow.parquet: no Spark, no JVM, no copy of the data. Everything
that could make a training silently wrong is refused here, before the first step: a table that needs a reader feature
unknown to us, files that are gone or cut short, several editions and none named.

Leaves out: retries and readahead for object stores. In memory stay about 100 bytes a sequence (its id and address),
never the tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from deltalake import DeltaTable
from deltalake.exceptions import DeltaError, TableNotFoundError
from pyarrow import fs

from model.errors import ModelError
from pipelines.tables import GOLD_SEQUENCES

# Features that change nothing in how a data file is read. Deletion vectors and column mapping do: read without them,
# deleted rows come back and renamed columns are null.
READER_FEATURES = frozenset({"timestampNtz", "v2Checkpoint", "vacuumProtocolCheck"})
INDEX_COLUMNS = ("sequence_id", "split", "domain")


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """One split of one edition of gold.sequences at one version, in canonical order (by sequence_id).

    The canonical order does not depend on files, so two lakes with equal content are read alike. ``content`` is the
    sha256 over the ordered ids: what a shuffle is keyed by (the table's own id is random, it differs between them).
    """

    lake: str
    uri: str
    table_id: str
    version: int
    split: str
    tokenizer_id: str
    sequence_length: int
    num_sequences: int
    domains: tuple[str, ...]
    content: str
    files: tuple[str, ...] = field(repr=False)
    filesystem: fs.FileSystem = field(repr=False, compare=False)
    # One entry a sequence, canonical order.
    sequence_ids_N: npt.NDArray[np.bytes_] = field(repr=False, compare=False)
    domain_N: npt.NDArray[np.int32] = field(repr=False, compare=False)  # index into domains
    file_N: npt.NDArray[np.int32] = field(repr=False, compare=False)
    row_group_N: npt.NDArray[np.int32] = field(repr=False, compare=False)
    row_N: npt.NDArray[np.int32] = field(repr=False, compare=False)  # within the row group

    def describe(self) -> dict[str, Any]:
        """What identifies the data, for a manifest, tags and refusals."""
        return {
            "table": GOLD_SEQUENCES.name,
            "uri": self.uri,
            "table_id": self.table_id,
            "version": self.version,
            "split": self.split,
            "tokenizer_id": self.tokenizer_id,
            "sequence_length": self.sequence_length,
            "num_sequences": self.num_sequences,
            "content": self.content,
        }


def open_sequences(
    lake: str,
    version: int | None = None,
    split: str = "train",
    tokenizer_id: str | None = None,
    sequence_length: int | None = None,
) -> Snapshot:
    """Pin gold.sequences of a lake (a path or an object store's URI); the latest version unless one is named.

    Raises ModelError where there is nothing to read or something that cannot be read faithfully.
    """
    uri = GOLD_SEQUENCES.uri(lake)
    table = _open(uri, version)
    _check_readable(table, uri)
    adds = pa.table(table.get_add_actions(flatten=True)).to_pylist()
    tokenizer_id, sequence_length = _edition(adds, uri, table.version(), tokenizer_id, sequence_length)
    adds = [
        a
        for a in adds
        if a["partition.tokenizer_id"] == tokenizer_id and int(a["partition.sequence_length"]) == sequence_length
    ]
    filesystem, root = _filesystem(uri)
    files = tuple(sorted(f"{root}/{unquote(a['path'])}" for a in adds))
    sizes = {f"{root}/{unquote(a['path'])}": int(a["size_bytes"]) for a in adds}
    _check_files(filesystem, files, sizes, table.version())
    index = _index(filesystem, files, split)
    if index.num_rows == 0:
        raise ModelError(
            f"{uri} at version {table.version()} has no sequence in the split {split!r}; pack more documents "
            "(raise tokenize.validation_fraction where the validation split is empty)."
        )
    ids: npt.NDArray[np.bytes_] = np.asarray(index["sequence_id"].to_pylist(), dtype=np.bytes_)
    order = np.argsort(ids, kind="stable")
    ids = ids[order]
    if len(ids) > 1 and bool((ids[1:] == ids[:-1]).any()):
        raise ModelError(f"{uri} at version {table.version()} holds a sequence_id twice; run pack again.")
    names = index["domain"].to_pylist()
    domains = tuple(sorted(set(names)))
    number = {name: i for i, name in enumerate(domains)}

    def ordered(values: Any) -> npt.NDArray[np.int32]:
        return np.asarray(values, dtype=np.int32)[order]

    return Snapshot(
        lake=lake,
        uri=uri,
        table_id=str(table.metadata().id),
        version=table.version(),
        split=split,
        tokenizer_id=tokenizer_id,
        sequence_length=sequence_length,
        num_sequences=len(ids),
        domains=domains,
        content=hashlib.sha256(b"\n".join(ids.tolist())).hexdigest(),
        files=files,
        filesystem=filesystem,
        sequence_ids_N=ids,
        domain_N=ordered([number[name] for name in names]),
        file_N=ordered(index["file"].to_numpy()),
        row_group_N=ordered(index["row_group"].to_numpy()),
        row_N=ordered(index["row"].to_numpy()),
    )


def _open(uri: str, version: int | None) -> DeltaTable:
    try:
        return DeltaTable(uri, version=version)
    except TableNotFoundError:
        raise ModelError(
            f"There is no table {GOLD_SEQUENCES.name} at {uri}; run the pipeline up to pack first."
        ) from None
    except (DeltaError, OSError) as error:
        wanted = "its latest version" if version is None else f"version {version}"
        raise ModelError(
            f"{uri} cannot be opened at {wanted} ({_first_line(error)}); name a version that the table still has."
        ) from error


def _check_readable(table: DeltaTable, uri: str) -> None:
    protocol = table.protocol()
    unknown = sorted(set(protocol.reader_features or ()) - READER_FEATURES)
    mapping = table.metadata().configuration.get("delta.columnMapping.mode", "none")
    if mapping not in ("none", "") or "columnMapping" in unknown:
        raise ModelError(
            f"{uri} uses Delta column mapping, which the loader cannot read; rewrite the table without it."
        )
    if unknown or protocol.min_reader_version not in (1, 2, 3):
        what = ", ".join(unknown) or f"reader version {protocol.min_reader_version}"
        raise ModelError(f"{uri} needs {what} of its reader, which the loader lacks; drop the feature from the table.")
    partitions = table.metadata().partition_columns
    if tuple(partitions) != GOLD_SEQUENCES.partition_by:
        raise ModelError(f"{uri} is partitioned by {partitions}, not as gold.sequences is; run pack into a new lake.")


def _edition(
    adds: Sequence[dict[str, Any]], uri: str, version: int, tokenizer_id: str | None, sequence_length: int | None
) -> tuple[str, int]:
    """The one edition meant; refused where none or several fit."""
    editions = sorted({(str(a["partition.tokenizer_id"]), int(a["partition.sequence_length"])) for a in adds})
    if not editions:
        raise ModelError(f"{uri} at version {version} is empty; run the pipeline up to pack first.")
    fitting = [
        e for e in editions if tokenizer_id in (None, e[0]) and (sequence_length is None or sequence_length == e[1])
    ]
    if len(fitting) == 1:
        return fitting[0]
    listed = "; ".join(f"tokenizer_id {t} with sequence_length {s}" for t, s in editions)
    said = "several editions and none was named" if fitting else "no such edition"
    raise ModelError(f"{uri} at version {version}: {said}; name one of: {listed}.", exit_code=2)


def _filesystem(uri: str) -> tuple[fs.FileSystem, str]:
    """The file system of a path or URI, and the path within it without a trailing slash."""
    if "://" not in uri:
        return fs.LocalFileSystem(use_mmap=True), str(Path(uri).absolute())
    if uri.startswith("file://"):
        return fs.LocalFileSystem(use_mmap=True), unquote(uri.removeprefix("file://")).rstrip("/")
    filesystem, path = fs.FileSystem.from_uri(uri)
    return filesystem, path.rstrip("/")


def _check_files(filesystem: fs.FileSystem, files: Iterable[str], sizes: dict[str, int], version: int) -> None:
    for info in filesystem.get_file_info(list(files)):
        if info.type != fs.FileType.File:
            raise ModelError(
                f"{info.path}, a file of version {version}, is gone (VACUUM removes old versions' files); "
                "train on a newer version."
            )
        if info.size != sizes[info.path]:
            raise ModelError(
                f"{info.path} has {info.size} bytes where the Delta log says {sizes[info.path]}; "
                "restore the file or pack again."
            )


def _index(filesystem: fs.FileSystem, files: Sequence[str], split: str) -> pa.Table:
    """Id, domain and address of every row of the split."""
    parts = []
    for number, path in enumerate(files):
        file = open_parquet(filesystem, path)
        for group in range(file.num_row_groups):
            rows = file.read_row_group(group, columns=list(INDEX_COLUMNS))
            missing = [c for c in INDEX_COLUMNS if c not in rows.column_names or rows[c].null_count]
            if missing:
                raise ModelError(f"{path} lacks values of {', '.join(missing)}; pack again.")
            wanted = np.flatnonzero([s == split for s in rows["split"].to_pylist()])
            count = len(wanted)
            parts.append(
                pa.table(
                    {
                        "sequence_id": rows["sequence_id"].take(pa.array(wanted)).cast(pa.string()),
                        "domain": rows["domain"].take(pa.array(wanted)).cast(pa.string()),
                        "file": pa.array(np.full(count, number, dtype=np.int32)),
                        "row_group": pa.array(np.full(count, group, dtype=np.int32)),
                        "row": pa.array(wanted.astype(np.int32)),
                    }
                )
            )
    return pa.concat_tables(parts)


def open_parquet(filesystem: fs.FileSystem, path: str) -> pq.ParquetFile:
    """A Parquet file, memory-mapped where it is local. A file that is not one raises ModelError."""
    try:
        return pq.ParquetFile(filesystem.open_input_file(path))
    except (OSError, pa.ArrowInvalid) as error:
        raise ModelError(
            f"{path} cannot be read as Parquet ({_first_line(error)}); restore it or pack again."
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
