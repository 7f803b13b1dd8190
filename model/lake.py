"""A lake's files beside its tables, on a local disk or in an object store: tokenizers, and figures that are kept.

Credentials and endpoints are those of the loader (model/loader/store.py).
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pyarrow as pa
from pyarrow import fs

from model.errors import ModelError
from model.files import write_json
from model.loader.filesystems import open_filesystem, open_input
from model.loader.store import ATTEMPTS, first_line, is_local, raise_if_denied
from pipelines.tables import tokenizer_uri


def local_path(lake: str) -> Path:
    """Of a local lake, or of a file of it: a path, or a file:// URI with escapes."""
    return Path(unquote(lake.removeprefix("file://"))) if lake.startswith("file://") else Path(lake)


def tokenizer_file(lake: str, tokenizer_id: str) -> Path:
    """The tokenizer's JSON as a local file; of an object store a copy that lasts as long as the process.

    Errors: ModelError where it is not there, or is not the one of this id (the sha256 of its bytes); 75 where the store
    does not answer.
    """
    uri = tokenizer_uri(lake, tokenizer_id)
    content = read_file(uri)
    if content is None:
        raise ModelError(f"There is no tokenizer {uri}; restore it, or name the lake that the model was trained on.")
    if hashlib.sha256(content).hexdigest() != tokenizer_id:
        raise ModelError(f"{uri} was changed: its sha256 is not its name; restore the file.")
    if is_local(lake):
        return local_path(uri)
    path = Path(_copies().name, f"{tokenizer_id}.json")
    path.write_bytes(content)
    return path


@cache
def _copies() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="lakemoe-")  # removed when the process ends


def read_file(uri: str) -> bytes | None:
    """A small file's content; None where there is none. Errors: ModelError, 75 where the store does not answer."""
    try:
        filesystem, path = open_filesystem(uri, {}, ATTEMPTS)
        if filesystem.get_file_info(path).type != fs.FileType.File:
            return None
        with open_input(filesystem, path) as file:
            return bytes(file.read())
    except (OSError, pa.ArrowException) as error:
        raise _told(uri, "read", error) from error


def read_kept(lake: str, name: str) -> Any:
    """What ``keep`` wrote, or None."""
    content = read_file(f"{lake.rstrip('/')}/{name}")
    return json.loads(content) if content else None  # Azure's client writes an empty file first


def keep(lake: str, name: str, value: dict[str, Any]) -> None:
    """Write a JSON file of the lake, whole or not at all. Errors: as of read_file."""
    uri = f"{lake.rstrip('/')}/{name}"
    if is_local(lake):
        path = local_path(uri)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, value)
        return
    try:
        filesystem, path_there = open_filesystem(uri, {}, ATTEMPTS)
        with filesystem.open_output_stream(path_there) as file:  # closed, it is there whole
            file.write(json.dumps(value, indent=2, sort_keys=True).encode())
    except (OSError, pa.ArrowException) as error:
        raise _told(uri, "written", error) from error


def _told(uri: str, done: str, error: BaseException) -> ModelError:
    raise_if_denied(uri, error, done)
    return ModelError(f"{uri} could not be {done} ({first_line(error)}); look after the store and run again.", 75)
