"""The files of a table, on a local disk or in an object store, read by ranges; what may pass is tried again.

Local files are memory-mapped; object stores are read with pyarrow's clients (model/loader/filesystems.py).

A server's error, a cut connection, a short answer or a request to slow down is tried again, after waits that double
from a quarter of a second to 16 (with jitter, Brooker 2015, "Exponential backoff and jitter"), about a minute in all.
Then it ends with exit code 75. A missing file and a denial end at once with 1.
"""

from __future__ import annotations

import random
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from model.errors import ModelError
from model.loader.filesystems import open_filesystem, open_input

T = TypeVar("T")

ATTEMPTS = 9  # of one read
_FIRST_WAIT, _LONGEST_WAIT = 0.25, 16.0  # seconds
_TAIL = 1 << 16  # bytes at a file's end that are read for its footer
_OPEN = 64  # files and footers kept
# Columns that lie no further apart are read in one request of an object store.
_HOLE = 1 << 20

# What the clients say where another try is of no use; they raise OSError for all of it.
_DENIED = (
    "ACCESS_DENIED", "AccessDenied", "INVALID_ACCESS_KEY_ID", "InvalidAccessKeyId", "SIGNATURE_DOES_NOT_MATCH",
    "SignatureDoesNotMatch", "INVALID_CLIENT_TOKEN_ID", "EXPIRED_TOKEN", "ExpiredToken", "PERMISSION_DENIED",
    "UNAUTHENTICATED", "AuthenticationFailed", "AuthorizationFailure", "401 Unauthorized", "403 Forbidden",
    "lacked the necessary privileges", "lacked valid authentication",
)  # fmt: skip
_GONE = ("NO_SUCH_KEY", "NoSuchKey", "NO_SUCH_BUCKET", "NoSuchBucket", "RESOURCE_NOT_FOUND", "BlobNotFound", "404 Not")


def is_local(uri: str) -> bool:
    """Whether a lake, or a file or table of it, is on this machine's disks."""
    return "://" not in uri or uri.startswith("file://")


class Store:
    """The files below a table's URI or path. Safe to use from threads; a copy for another process opens anew."""

    def __init__(self, uri: str, options: Mapping[str, str] | None = None) -> None:
        self.uri = uri
        self.is_local = is_local(uri)
        self._options = dict(options or {})
        self._start()

    def _start(self) -> None:
        self._lock = threading.Lock()
        self._filesystem: fs.FileSystem | None = None
        self._root = ""
        self._files: OrderedDict[str, pa.NativeFile] = OrderedDict()
        self._footers: OrderedDict[str, pq.FileMetaData] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {"uri": self.uri, "is_local": self.is_local, "_options": self._options}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start()

    def size(self, path: str) -> int:
        """Bytes of a file, as the store says. Errors as for read."""
        return self._again(path, lambda: int(self._file(path).size()))

    def read(self, path: str, start: int, length: int, stop: threading.Event | None = None) -> pa.Buffer:
        """Bytes start to start+length-1 of a file, without a copy where it is local.

        stop: set, no further attempt is made. Raises ModelError: 1 missing, denied or cut short, 75 no answer.
        """

        def attempt() -> pa.Buffer:
            found = pa.py_buffer(b"") if not length else self._file(path).read_at(length, start)
            found = found if isinstance(found, pa.Buffer) else pa.py_buffer(found)
            if found.size != length:
                raise OSError(f"{found.size} bytes came where {length} were asked for")
            return found

        return self._again(path, attempt, stop)

    def footer(self, path: str) -> pq.FileMetaData:
        """A Parquet file's metadata; the last ones asked for are kept. Raises ModelError also where it is none."""
        with self._lock:
            if path in self._footers:
                self._footers.move_to_end(path)
                return self._footers[path]
        size = self.size(path)
        tail = self.read(path, max(0, size - _TAIL), min(size, _TAIL))
        try:
            needed = int.from_bytes(tail[-8:-4].to_pybytes(), "little") + 8 if size >= 12 else 0
            if tail.size < needed <= size:
                tail = self.read(path, size - needed, needed)
            footer = pq.read_metadata(_Parts(size, [(size - tail.size, tail)]))
        except (OSError, pa.ArrowException) as error:
            raise ModelError(
                f"{self.show(path)} cannot be read as Parquet ({first_line(error)}); restore it or pack again."
            ) from error
        with self._lock:
            _keep(self._footers, path, footer)
        return footer

    def row_group(
        self, path: str, group: int, columns: Sequence[str], stop: threading.Event | None = None
    ) -> tuple[pa.Table, int]:
        """Columns of a row group, and how many of the file's bytes were read for them."""
        footer = self.footer(path)
        ranges = self._ranges(footer, group, columns)
        if self.is_local:  # mapped: nothing is to be fetched first
            source = self._again(path, lambda: self._file(path))
        else:
            parts = [(start, self.read(path, start, end - start, stop)) for start, end in ranges]
            source = _Parts(self.size(path), parts)
        try:
            file = pq.ParquetFile(source, metadata=footer, pre_buffer=False)
            table = file.read_row_group(group, list(columns), use_threads=False)
        except (OSError, pa.ArrowException) as error:
            raise ModelError(
                f"{self.show(path)} cannot be read as Parquet ({first_line(error)}); restore it or pack again."
            ) from error
        return table, sum(end - start for start, end in ranges)

    def _ranges(self, footer: pq.FileMetaData, group: int, columns: Sequence[str]) -> list[tuple[int, int]]:
        """Where the columns lie in the file, in order, near ones joined."""
        found = sorted(
            (start, start + chunk.total_compressed_size)
            for chunk in chunks(footer, group, columns)
            for start in [min(o for o in (chunk.dictionary_page_offset, chunk.data_page_offset) if o is not None)]
        )
        joined: list[tuple[int, int]] = []
        for start, end in found:
            if joined and start - joined[-1][1] <= (0 if self.is_local else _HOLE):
                joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
            else:
                joined.append((start, end))
        return joined

    def show(self, path: str) -> str:
        """The file's whole path or URI, for a person."""
        return f"{self.uri.rstrip('/')}/{path}"

    def _file(self, path: str) -> pa.NativeFile:
        with self._lock:
            if self._filesystem is None:
                self._filesystem, self._root = open_filesystem(self.uri, self._options)
            if path in self._files:
                self._files.move_to_end(path)
                return self._files[path]
            filesystem, root = self._filesystem, self._root
        file = open_input(filesystem, f"{root}/{path}")
        with self._lock:
            _keep(self._files, path, file)
        return file

    def _again(self, path: str, attempt: Callable[[], T], stop: threading.Event | None = None) -> T:
        wait = _FIRST_WAIT
        for number in range(1, ATTEMPTS + 1):
            try:
                return attempt()
            except (OSError, pa.ArrowException) as error:
                raise_if_lasting(self.show(path), error)
                if self.is_local:
                    raise ModelError(
                        f"{self.show(path)} cannot be read ({first_line(error)}); restore the file or pack again."
                    ) from error
                with self._lock:
                    self._files.pop(path, None)
                if number == ATTEMPTS or (stop is not None and stop.is_set()):
                    raise ModelError(
                        f"{self.show(path)} could not be read in {number} attempts ({first_line(error)}); "
                        "look after the store and the network, then start again.",
                        75,
                    ) from error
            (stop or threading.Event()).wait(wait * (0.5 + random.random() / 2))
            wait = min(2 * wait, _LONGEST_WAIT)
        raise AssertionError


def raise_if_lasting(what: str, error: BaseException) -> None:
    """Raises ModelError (1) where the error, of one of the clients, is one that another try does not end."""
    if isinstance(error, FileNotFoundError) or any(word in str(error) for word in _GONE):
        raise ModelError(
            f"{what} is gone (VACUUM removes old versions' files); train on a newer version or restore it."
        ) from error
    raise_if_denied(what, error)


def raise_if_denied(what: str, error: BaseException, done: str = "read") -> None:
    """Raises ModelError (1) where a store refuses to answer us."""
    if isinstance(error, PermissionError) or any(word in str(error) for word in _DENIED):
        raise ModelError(
            f"{what} may not be {done} ({first_line(error)}); give the right to it, or credentials that have it."
        ) from error


def chunks(footer: pq.FileMetaData, group: int, columns: Sequence[str]) -> list[pq.ColumnChunkMetaData]:
    """The column chunks of these columns in a row group; a list's are those of its values."""
    row_group = footer.row_group(group)
    every = [row_group.column(number) for number in range(row_group.num_columns)]
    return [chunk for chunk in every if chunk.path_in_schema.split(".")[0] in columns]


class _Parts:
    """Some parts of a file, as a file: what the Parquet reader asks for must lie within one of them."""

    closed = False

    def __init__(self, size: int, parts: Sequence[tuple[int, pa.Buffer]]) -> None:
        self._size, self._parts, self._at = size, parts, 0

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = offset + (0, self._at, self._size)[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, length: int = -1) -> Any:
        at, length = self._at, self._size - self._at if length < 0 else length
        for start, part in self._parts:
            if start <= at and at + length <= start + part.size:
                self._at += length
                return memoryview(part)[at - start : at - start + length]
        raise OSError(f"bytes {at} to {at + length} of the file were not fetched")

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def close(self) -> None:
        pass


def _keep(kept: OrderedDict[str, T], name: str, value: T) -> None:
    kept[name] = value
    kept.move_to_end(name)
    while len(kept) > _OPEN:
        kept.popitem(last=False)


def first_line(error: BaseException) -> str:
    """Of what an error says, without an address's query, which may hold a signature."""
    return re.sub(r"\?\S+", "?...", (str(error).splitlines() or [type(error).__name__])[0])
