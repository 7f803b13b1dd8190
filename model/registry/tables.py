"""The lake's small operational tables read without Spark, and whether a table still has a version."""

from __future__ import annotations

from typing import Any
from urllib.parse import unquote

import pyarrow.parquet as pq
from deltalake import DeltaTable
from deltalake.exceptions import DeltaError, TableNotFoundError
from pyarrow import fs

from model.loader.filesystems import open_filesystem
from model.loader.store import ATTEMPTS


def read_rows(uri: str) -> list[dict[str, Any]]:
    """All rows of a table without partitions, as it is now; none where the table is absent."""
    try:
        files = DeltaTable(uri).file_uris()
    except TableNotFoundError:
        return []
    rows: list[dict[str, Any]] = []
    # Not to_pyarrow_table: a process that used it aborted now and then at its exit (deltalake 1.6).
    for file in files:
        filesystem, path = _filesystem(file)
        rows += pq.read_table(path, filesystem=filesystem, partitioning=None).to_pylist(maps_as_pydicts="strict")
    return rows


def missing(uri: str, version: int, table_id: str | None = None) -> str | None:
    """Why a table's version can no longer be read: None, or a few words."""
    try:
        table = DeltaTable(uri, version=version)
    except TableNotFoundError:
        return "the table is gone"
    except (DeltaError, OSError):
        return "the version is gone from the log"
    if table_id is not None and str(table.metadata().id) != table_id:
        return "another table lies there now"
    for file in table.file_uris():
        filesystem, path = _filesystem(file)
        if filesystem.get_file_info(path).type != fs.FileType.File:
            return "files of the version are gone (VACUUM)"
    return None


def _filesystem(uri: str) -> tuple[fs.FileSystem, str]:
    return open_filesystem(uri if "://" in uri else unquote(uri), {}, ATTEMPTS)
