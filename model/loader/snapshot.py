"""Pin one version of gold.sequences and say which rows of which files it holds.

The Delta log is read with deltalake, the files with pyarrow: no Spark, no JVM, no copy of the data. Everything that
could make a training silently wrong is refused here, before the first step: a table that needs a reader feature unknown
to us, files that are gone or cut short, several editions and none named.

What stays in memory grows with row groups, not with sequences: 32 bytes a row group and 24 for each domain in it, and
76 bytes a sequence (its id and address) of a split that fits the shuffle's window. Tokens are for the reader to hold.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.parse import unquote

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from deltalake import DeltaTable
from deltalake.exceptions import DeltaError, TableNotFoundError

from model.errors import ModelError
from model.loader.store import Store, first_line, raise_if_denied
from pipelines.tables import GOLD_SEQUENCES

# Features that change nothing in how a data file is read. Deletion vectors and column mapping do: read without them,
# deleted rows come back and renamed columns are null.
READER_FEATURES = frozenset({"timestampNtz", "v2Checkpoint", "vacuumProtocolCheck"})
COLUMNS = ("sequence_id", "split", "domain", "tokens", "segment_lengths", "pad_count")  # that are read
# Tokens that are shuffled together, in bytes over all ranks; 4 bytes a token.
WINDOW_BYTES = 1 << 30
_ROW_BYTES = 256  # what a sequence's id, segments and addresses take beside its tokens, about
_OPENERS = 16  # files looked at at once

Ints = npt.NDArray[np.int64]


class NoTableError(ModelError):
    """There is no gold.sequences."""


class EmptySplitError(ModelError):
    """The table is there, and has no sequence in the split."""


@dataclass(frozen=True, kw_only=True)
class ById:
    """What is kept for each sequence where they are numbered by id: id, row group (0 to G-1), row there and domain."""

    sequence_ids_N: npt.NDArray[np.bytes_]
    group_N: npt.NDArray[np.int32]
    row_N: npt.NDArray[np.int32]
    domain_N: npt.NDArray[np.int32]


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """One split of one edition of gold.sequences at one version.

    Sequences have a canonical number, 0 to num_sequences-1. Where the split fits the window (`fits`), it is by
    sequence_id and does not depend on files, so that two lakes with equal content are read alike, and ``content`` is
    the sha256 over the ordered ids. A larger split is numbered by row group (file path, place in the file) and within
    it by domain and row, so that nothing has to be kept for each sequence, and ``content`` is the sha256 over the
    files' paths, sizes and rows. A shuffle is keyed by ``content`` (the table's own id is random, it differs between
    lakes). A sequence_id that is there twice is found where the split fits the window.
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
    window: int  # sequences that are shuffled together, over all ranks
    files: tuple[str, ...] = field(repr=False)
    paths: tuple[str, ...] = field(repr=False, compare=False)  # the files, as the store knows them
    store: Store = field(repr=False, compare=False)
    # One entry a row group that has rows of the split, by file and place.
    file_G: npt.NDArray[np.int32] = field(repr=False, compare=False)
    row_group_G: npt.NDArray[np.int32] = field(repr=False, compare=False)
    rows_G: Ints = field(repr=False, compare=False)  # of all splits
    begin_G: Ints = field(repr=False, compare=False)  # the stored number of its first sequence of the split
    # One entry a row group and domain in it.
    group_C: npt.NDArray[np.int32] = field(repr=False, compare=False)
    domain_C: npt.NDArray[np.int32] = field(repr=False, compare=False)  # index into domains
    begin_C: Ints = field(repr=False, compare=False)
    rows_C: Ints = field(repr=False, compare=False)  # of the split
    # One entry a sequence of a split that fits the window, by canonical number; else None.
    by_id: ById | None = field(repr=False, compare=False)

    @property
    def fits(self) -> bool:
        """Whether the whole split is shuffled together."""
        return self.by_id is not None

    def locate(self, canonical: Ints) -> tuple[Ints, Ints]:
        """Of each sequence the row group (0 to G-1), and which row it is there: of all rows where the split fits the
        window, else of those of `rows_of_split`."""
        if self.by_id is not None:
            return self.by_id.group_N[canonical].astype(np.int64), self.by_id.row_N[canonical].astype(np.int64)
        group = np.searchsorted(self.begin_G, canonical, side="right") - 1
        return group, canonical - self.begin_G[group]

    def domain_numbers(self, canonical: Ints) -> npt.NDArray[np.int32]:
        """Of each sequence the index into domains."""
        if self.by_id is not None:
            return self.by_id.domain_N[canonical]
        return self.domain_C[np.searchsorted(self.begin_C, canonical, side="right") - 1]

    def group_bytes(self, group: int) -> int:
        """What a row group takes in memory, about: all splits' tokens, as they lie in it."""
        return int(self.rows_G[group]) * (4 * self.sequence_length + _ROW_BYTES)

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
    *,
    storage_options: Mapping[str, str] | None = None,
    window_bytes: int = WINDOW_BYTES,
) -> Snapshot:
    """Pin gold.sequences of a lake (a path or an object store's URI); the latest version unless one is named.

    storage_options: deltalake's, for an object store; what is not there is looked for in the environment.
    window_bytes: of tokens that are shuffled together, over all ranks; part of what decides the order of a split that
    is larger.
    Raises ModelError where there is nothing to read or something that cannot be read faithfully; with exit code 75
    where a store does not answer.
    """
    uri = GOLD_SEQUENCES.uri(lake)
    table = _open(uri, version, storage_options)
    _check_readable(table, uri)
    adds = pa.table(table.get_add_actions(flatten=True)).to_pylist()
    tokenizer_id, sequence_length = _edition(adds, uri, table.version(), tokenizer_id, sequence_length)
    sizes = {
        unquote(a["path"]): int(a["size_bytes"])
        for a in adds
        if a["partition.tokenizer_id"] == tokenizer_id and int(a["partition.sequence_length"]) == sequence_length
    }
    store, paths = Store(uri, storage_options), tuple(sorted(sizes))
    with ThreadPoolExecutor(_OPENERS) as pool:
        of_files = list(pool.map(lambda path: _count(store, path, sizes[path], split, table.version()), paths))
    domains = tuple(sorted({domain for groups in of_files for _, _, counts in groups for domain in counts}))
    found = [
        (file, number, rows, [counts.get(domain, 0) for domain in domains])
        for file, groups in enumerate(of_files)
        for number, rows, counts in groups
        if counts
    ]
    if not found:
        raise EmptySplitError(
            f"{uri} at version {table.version()} has no sequence in the split {split!r}; pack more documents "
            "(raise tokenize.validation_fraction where the validation split is empty)."
        )
    counts_GD = np.asarray([counts for _, _, _, counts in found], dtype=np.int64)
    group_C, domain_C = np.nonzero(counts_GD)
    rows_C = counts_GD[group_C, domain_C]
    num_sequences, window = int(rows_C.sum()), max(1, window_bytes // (4 * sequence_length))
    snapshot = Snapshot(
        lake=lake,
        uri=uri,
        table_id=str(table.metadata().id),
        version=table.version(),
        split=split,
        tokenizer_id=tokenizer_id,
        sequence_length=sequence_length,
        num_sequences=num_sequences,
        domains=domains,
        content=_content_of_files(paths, sizes, found),
        window=window,
        files=tuple(store.show(path).removeprefix("file://") for path in paths),
        paths=paths,
        store=store,
        file_G=np.asarray([file for file, _, _, _ in found], dtype=np.int32),
        row_group_G=np.asarray([number for _, number, _, _ in found], dtype=np.int32),
        rows_G=np.asarray([rows for _, _, rows, _ in found], dtype=np.int64),
        begin_G=np.cumsum(counts_GD.sum(axis=1)) - counts_GD.sum(axis=1),
        group_C=group_C.astype(np.int32),
        domain_C=domain_C.astype(np.int32),
        begin_C=np.cumsum(rows_C) - rows_C,
        rows_C=rows_C,
        by_id=None,
    )
    return _by_id(snapshot) if num_sequences <= window else snapshot


def rows_of_split(snapshot: Snapshot, group: int, split: pa.ChunkedArray, domain: pa.ChunkedArray) -> Ints:
    """The row numbers in a row group of the split's sequences, by domain and row."""
    rows = np.flatnonzero(pc.equal(split, snapshot.split).to_numpy(zero_copy_only=False))
    numbers = pc.index_in(domain, pa.array(snapshot.domains)).to_numpy()[rows]
    rows = rows[np.argsort(numbers, kind="stable")]
    end = snapshot.begin_G[group + 1] if group + 1 < len(snapshot.begin_G) else snapshot.num_sequences
    if len(rows) != end - snapshot.begin_G[group]:
        path = snapshot.store.show(snapshot.paths[snapshot.file_G[group]])
        raise ModelError(f"{path} has changed since it was opened; restore the file or pack again.")
    return rows


def _by_id(snapshot: Snapshot) -> Snapshot:
    """The snapshot with its sequences numbered by sequence_id."""
    columns = ("sequence_id", "split", "domain")

    def ids_and_rows(group: int) -> tuple[list[str], Ints]:
        path, number = snapshot.paths[snapshot.file_G[group]], int(snapshot.row_group_G[group])
        table, _ = snapshot.store.row_group(path, number, columns)
        _check_values(table, columns, snapshot.store.show(path))
        rows = rows_of_split(snapshot, group, table["split"], table["domain"])
        return table["sequence_id"].take(pa.array(rows)).to_pylist(), rows

    with ThreadPoolExecutor(_OPENERS) as pool:
        found = list(pool.map(ids_and_rows, range(len(snapshot.file_G))))
    ids: npt.NDArray[np.bytes_] = np.asarray([name for names, _ in found for name in names], dtype=np.bytes_)
    order = np.argsort(ids, kind="stable")
    ids = ids[order]
    if len(ids) > 1 and bool((ids[1:] == ids[:-1]).any()):
        raise ModelError(f"{snapshot.uri} at version {snapshot.version} holds a sequence_id twice; run pack again.")
    by_id = ById(
        sequence_ids_N=ids,
        group_N=np.repeat(snapshot.group_C, snapshot.rows_C)[order],
        row_N=np.concatenate([rows for _, rows in found])[order].astype(np.int32),
        domain_N=np.repeat(snapshot.domain_C, snapshot.rows_C).astype(np.int32)[order],
    )
    return replace(snapshot, content=hashlib.sha256(b"\n".join(ids.tolist())).hexdigest(), by_id=by_id)


def _content_of_files(
    paths: Sequence[str], sizes: Mapping[str, int], groups: Sequence[tuple[int, int, int, list[int]]]
) -> str:
    digest = hashlib.sha256()
    for file, number, rows, counts in groups:
        digest.update(f"{paths[file]}\0{sizes[paths[file]]}\0{number}\0{rows}\0{counts}\n".encode())
    return digest.hexdigest()


def _count(store: Store, path: str, size: int, split: str, version: int) -> list[tuple[int, int, dict[str, int]]]:
    """Of each row group: its number, rows, and the split's rows by domain. Refuses a file that is not as it was."""
    found = store.size(path)
    if found != size:
        raise ModelError(
            f"{store.show(path)} has {found} bytes where the Delta log says {size}; restore the file or pack again."
        )
    footer, groups = store.footer(path), []
    names = {footer.schema.column(number).path.split(".")[0] for number in range(footer.num_columns)}
    missing = [column for column in COLUMNS if column not in names]
    if missing:
        raise ModelError(f"{store.show(path)} lacks the columns {', '.join(missing)}; pack again.")
    for number in range(footer.num_row_groups):
        table, _ = store.row_group(path, number, ("split", "domain"))
        _check_values(table, ("split", "domain"), store.show(path))
        wanted = table.filter(pc.equal(table["split"], split))["domain"].value_counts()
        groups.append((number, len(table), {c["values"].as_py(): c["counts"].as_py() for c in wanted}))
    return groups


def _check_values(table: pa.Table, columns: Sequence[str], path: str) -> None:
    missing = [column for column in columns if table[column].null_count]
    if missing:
        raise ModelError(f"{path} lacks values of {', '.join(missing)}; pack again.")


def _open(uri: str, version: int | None, options: Mapping[str, str] | None) -> DeltaTable:
    try:
        return DeltaTable(uri, version=version, storage_options=dict(options) if options else None)
    except TableNotFoundError:
        raise NoTableError(
            f"There is no table {GOLD_SEQUENCES.name} at {uri}; run the pipeline up to pack first."
        ) from None
    except (DeltaError, OSError) as error:
        wanted = "its latest version" if version is None else f"version {version}"
        raise_if_denied(uri, error)
        code = re.search(r"<Code>(\w+)", str(error))
        if code is not None and code[1] in ("NoSuchBucket", "ContainerNotFound"):
            raise ModelError(f"There is no bucket for {uri}; name one that there is.") from None
        said = code[1] if code is not None else str(error).strip().splitlines()[-1]
        cause = re.sub(r"[^ -~]+(\[[0-9]*m)?", "", said).strip()
        if "Generic" in str(error) and "delta kernel" not in str(error):  # the store's, not the log's
            raise ModelError(
                f"{uri} cannot be opened at {wanted}, the store does not answer ({cause}); "
                "look after the store and the network, then start again.",
                75,
            ) from error
        raise ModelError(
            f"{uri} cannot be opened at {wanted} ({first_line(error)}); "
            f"name a version that the table still has{_versions(uri, options)}."
        ) from error


def _versions(uri: str, options: Mapping[str, str] | None) -> str:
    """The table's latest version, in words; nothing where it cannot be read. The first depends on its checkpoints."""
    try:
        return f" (the latest is {DeltaTable(uri, storage_options=dict(options) if options else None).version()})"
    except (DeltaError, OSError):
        return ""


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
