"""What to ingest: one `SourceConfig` a source, all of it guessed from the path where nothing is said.

A path is local, which on a cluster means a folder that every executor mounts; only a Hugging Face data set may be a
name of the hub. Left out: object stores.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from pipelines.errors import LakeError

Format = Literal["file", "jsonl", "parquet", "warc", "datasets"]

_PACKED = ("", ".gz", ".zst")
_JSONL = (*(f".{name}{packed}" for name in ("jsonl", "ndjson") for packed in _PACKED), ".json.gz", ".json.zst")
_WARC = tuple(f".{name}{packed}" for name in ("warc", "wet", "wat") for packed in _PACKED)
_PARQUET = (".parquet", ".pq")
_HUB = "hf://datasets/"
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_GLOB = re.compile(r"[*?\[]")


def format_of(name: str) -> Format:
    """How a file of this name is read: `.jsonl`, `.warc` and their like, packed or not, `.parquet`, else whole."""
    lower = name.lower()
    if lower.endswith(_JSONL):
        return "jsonl"
    if lower.endswith(_WARC):
        return "warc"
    return "parquet" if lower.endswith(_PARQUET) else "file"


def is_saved_data_set(path: str) -> bool:
    """Whether `datasets` wrote this folder with save_to_disk."""
    files = ("dataset_dict.json",), ("dataset_info.json", "state.json")
    return any(all(os.path.isfile(os.path.join(path, name)) for name in names) for names in files)


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
        min_length=1,
        description="a folder, a file or a glob (`**` crosses folders), on a disk that all executors see, or a data "
        "set of the hub: hf://datasets/OWNER/NAME[@REVISION]",
    )
    name: str = Field("", description="the source's name in the lake; empty: the folder's or file's, extensions off")
    include: tuple[str, ...] = Field(
        (), description="globs over paths relative to the source (`**` crosses folders): only these; empty: all"
    )
    exclude: tuple[str, ...] = Field((), description="globs over relative paths: these are left out, folders whole")
    format: Format | None = Field(
        None,
        description="file (one document a file), jsonl, parquet, warc (WET too) or datasets (a Hugging Face data set, "
        "by its folder or its name on the hub); empty: by each file's name",
    )
    config: str = Field("", description="a data set's configuration; empty: its only or default one")
    split: str = Field("", description="a data set's split; empty: all of them")
    revision: str = Field("", description="a data set's revision on the hub (commit, tag or branch); empty: the newest")
    kind: Literal["text", "code"] | None = Field(
        None, description="text or code; empty: files by their language, records text"
    )
    text_field: str = Field(
        "", description="the record's field with the text (a.b: b in a); empty: `text`, else `content`"
    )
    id_field: str = Field(
        "id",
        description="the record's field with its id (of WARC the target URI is one); without it a record is path:line",
    )
    language_field: str = Field("language", description="the record's field with its language, where it is a string")
    license_field: str = Field("license", description="the record's field with its licence, where it is a string")
    language: str | None = Field(None, description="the language that the source declares for all of its documents")
    license: str | None = Field(None, description="the SPDX identifier that the source declares for all its documents")

    @model_validator(mode="after")
    def _only_data_sets_have_parts(self) -> Self:
        named = next((name for name in ("config", "split", "revision") if getattr(self, name)), None)
        if named and self.format not in (None, "datasets"):
            raise ValueError(f"{named} is of a Hugging Face data set: leave it out, or set format to datasets")
        if (self.include or self.exclude) and self.format == "datasets":
            raise ValueError("a Hugging Face data set is taken by its splits: leave out include and exclude")
        return self

    def resolved(self) -> SourceConfig:
        """The same with an absolute path and the name filled in. Raises LakeError where there is no name to take."""
        if self.path.startswith(_HUB):
            path, _, revision = self.path.removeprefix(_HUB).partition("@")
            of_hub = {"path": path, "format": "datasets", "revision": revision or self.revision}
            return self.model_copy(update={**of_hub, "name": self.name or path.rpartition("/")[2]})
        if "://" in self.path:
            raise LakeError(f"The source {self.path} is no local path: mount or copy it to a folder first.", 2)
        expanded = os.path.expanduser(self.path)
        absolute = os.path.abspath(expanded)
        form = self.format or ("datasets" if is_saved_data_set(absolute) else None)
        if form == "datasets" and not os.path.isdir(absolute):
            if _HUB_NAME.fullmatch(self.path) is None:
                raise LakeError(f"The data set {self.path} is no folder and no name (OWNER/NAME): check the path.", 2)
            return self.model_copy(update={"name": self.name or self.path.rpartition("/")[2]})
        if form != "datasets" and (self.config or self.split or self.revision):
            raise LakeError(
                f"The source {self.path} is no saved Hugging Face data set: leave out config, split and revision, "
                "or set format to datasets.",
                2,
            )
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
        return self.model_copy(update={"path": absolute, "name": name, "format": form})


class IngestConfig(BaseModel):
    """All sources of one run, what is too large to be a document, and what becomes of documents that are gone."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sources: tuple[SourceConfig, ...] = Field((), description="the sources of this run")
    max_bytes: int = Field(
        32 * 1024 * 1024, ge=1, le=512 * 1024 * 1024, description="largest file or record that is a document (bytes)"
    )
    mirror: bool = Field(
        False, description="delete documents and quarantine rows whose file or record is gone from its source"
    )
    allow_empty: bool = Field(
        False, description="with mirror: delete also all documents of a source that has no file any more"
    )

    max_quarantined: float = Field(
        1.0,
        ge=0,
        le=1,
        description="share of the records read that may be no documents; with more, ingest ends with exit code 1 after "
        "it has written what it could read (fraction)",
    )
    follow_links: bool = Field(
        False,
        description="take files that symbolic links lead to outside their source; else they are passed over, but for "
        "data sets, sources of the format parquet, and a Hugging Face cache's links to its blobs",
    )
    hidden: bool = Field(
        True, description="take hidden files and folders, of names with a dot before them; else they are passed over"
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
