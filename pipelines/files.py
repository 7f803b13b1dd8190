"""A lake's files beside its tables (tokenizers, ingest's listings), wherever the lake lies: read and written whole."""

from __future__ import annotations

import posixpath
from pathlib import Path
from uuid import uuid4

import pyarrow.fs


def read_file(uri: str) -> bytes | None:
    """The bytes of a file in the lake; None where it is absent."""
    system, path = _filesystem(uri)
    if system.get_file_info(path).type == pyarrow.fs.FileType.NotFound:
        return None
    with system.open_input_stream(path) as stream:
        return bytes(stream.read())


def write_file(uri: str, content: bytes) -> None:
    """Write a file of the lake whole or not at all: a rename ends it (object stores do the same by themselves)."""
    system, path = _filesystem(uri)
    system.create_dir(posixpath.dirname(path), recursive=True)
    draft = f"{path}.{uuid4().hex}.draft" if isinstance(system, pyarrow.fs.LocalFileSystem) else path
    with system.open_output_stream(draft) as stream:
        stream.write(content)
    if draft != path:
        system.move(draft, path)


def _filesystem(uri: str) -> tuple[pyarrow.fs.FileSystem, str]:
    if "://" in uri:
        system, path = pyarrow.fs.FileSystem.from_uri(uri)
        return system, str(path)
    return pyarrow.fs.LocalFileSystem(), str(Path(uri).absolute())
