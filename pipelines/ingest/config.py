"""What to ingest: one `SourceConfig` a source, all of it guessed from the path where nothing is said.

Local paths only, which on a cluster means a folder that every executor mounts. Left out: WARC, Hugging Face datasets
and zstd.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from pipelines.errors import LakeError

Format = Literal["file", "jsonl", "parquet"]

_JSONL = (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz", ".json.gz")
_PARQUET = (".parquet", ".pq")
_GLOB = re.compile(r"[*?\[]")


def format_of(name: str) -> Format:
    """How a file of this name is read: `.jsonl`, `.jsonl.gz` (as `.ndjson`, `.json.gz`), `.parquet`, else whole."""
    lower = name.lower()
    if lower.endswith(_JSONL):
        return "jsonl"
    return "parquet" if lower.endswith(_PARQUET) else "file"


def is_glob(path: str) -> bool:
    """Whether the path is a pattern: it has a wildcard and no file of that very name is there."""
    return _GLOB.search(path) is not None and not os.path.lexists(path)


def glob_base(path: str) -> str:
    """The folder that a pattern starts in: its leading parts without a wildcard."""
    parts = Path(path).parts
    fixed = next(i for i, part in enumerate(parts) if _GLOB.search(part))
    return str(Path(*parts[:fixed])) if fixed else "."


class SourceConfig(BaseModel):
    """One source of documents. Only `path` is needed."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str = Field(
        min_length=1, description="a folder, a file or a glob (`**` crosses folders), on a disk that all executors see"
    )
    name: str = Field("", description="the source's name in the lake; empty: the folder's or file's, extensions off")
    include: tuple[str, ...] = Field(
        (), description="globs over paths relative to the source (`**` crosses folders): only these; empty: all"
    )
    exclude: tuple[str, ...] = Field((), description="globs over relative paths: these are left out, folders whole")
    format: Format | None = Field(
        None, description="file (one document a file), jsonl or parquet; empty: by each file's name"
    )
    kind: Literal["text", "code"] | None = Field(
        None, description="text or code; empty: files by their language, records text"
    )
    text_field: str = Field("", description="the record's field with the text; empty: `text`, else `content`")
    id_field: str = Field("id", description="the record's field with its id; a record without it is known as path:line")
    language_field: str = Field("language", description="the record's field with its language, where it is a string")
    license_field: str = Field("license", description="the record's field with its licence, where it is a string")
    language: str | None = Field(None, description="the language that the source declares for all of its documents")
    license: str | None = Field(None, description="the SPDX identifier that the source declares for all its documents")

    def resolved(self) -> SourceConfig:
        """The same with an absolute path and the name filled in. Raises LakeError where there is no name to take."""
        if "://" in self.path:
            raise LakeError(f"The source {self.path} is no local path: mount or copy it to a folder first.", 2)
        expanded = os.path.expanduser(self.path)
        absolute = os.path.abspath(expanded)
        name = self.name
        if not name:
            folder = os.path.abspath(glob_base(expanded)) if is_glob(expanded) else absolute
            name = os.path.basename(folder)
            if not os.path.isdir(folder):
                name = name.lstrip(".").split(".", 1)[0] or name
        # A name that is not UTF-8 on disk is shown, and told apart, by its escaped bytes.
        name = os.fsencode(name).decode("utf-8", "backslashreplace")
        if not name or "\0" in name:
            raise LakeError(f"The source {self.path!r} has no folder or file name: give it a name of its own.", 2)
        return self.model_copy(update={"path": absolute, "name": name})


class IngestConfig(BaseModel):
    """All sources of one run, and what is too large to be a document."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sources: tuple[SourceConfig, ...] = Field((), description="the sources of this run")
    max_bytes: int = Field(
        32 * 1024 * 1024, ge=1, le=512 * 1024 * 1024, description="largest file or record that is a document (bytes)"
    )

    @model_validator(mode="after")
    def _names_given_are_unique(self) -> Self:
        given = [s.name for s in self.sources if s.name]
        twice = next((name for name in given if given.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"two sources are called {twice!r}: give each a name of its own")
        return self

    def resolved_sources(self) -> tuple[SourceConfig, ...]:
        """The sources with absolute paths and names. Raises LakeError where two share a name, or there is none."""
        if not self.sources:
            raise LakeError("There is no source to ingest: name a folder, a file or a glob with --source PATH.", 2)
        sources = tuple(source.resolved() for source in self.sources)
        seen: dict[str, str] = {}
        for source in sources:
            if source.name in seen:
                raise LakeError(
                    f"The sources {seen[source.name]} and {source.path} are both called {source.name!r}: "
                    "give each a name of its own.",
                    2,
                )
            seen[source.name] = source.path
        return sources
