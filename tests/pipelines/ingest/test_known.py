"""An ingest that reads what is new alone ends in the tables of one that reads everything."""

from __future__ import annotations

import json
import random
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pipelines import lake as lakehouse
from pipelines.ingest import stage
from pipelines.ingest.config import IngestConfig, SourceConfig
from pipelines.ingest.known import news
from pipelines.ingest.listing import list_sources
from pipelines.tables import BRONZE_DOCUMENTS, BRONZE_QUARANTINE, Table
from tests.pipelines.ingest import tree

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

_WHEN = ("run_id", "ingested_at", "at", "source_modified_at")


@pytest.fixture(autouse=True)
def files_are_an_hour_old(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was changed within the tick of a clock has no fingerprint."""
    now = time.time_ns
    monkeypatch.setattr(time, "time_ns", lambda: now() + 3600 * 10**9)


def rows(spark: SparkSession, lake: str, table: Table) -> list[tuple[Any, ...]]:
    names = [name for name in table.schema.names if name not in _WHEN]
    return sorted(tuple(map(repr, row)) for row in lakehouse.read(spark, lake, table).select(*names).collect())


def lines(*records: dict[str, Any]) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


class Both:
    """A lake that reads what is new; before each run a copy of it is made, which reads everything."""

    def __init__(self, spark: SparkSession, lake: str, folder: Path, mirror: bool) -> None:
        self.spark, self.lake, self.folder = spark, lake, folder
        self.config = IngestConfig(sources=(SourceConfig(path=str(folder)),), mirror=mirror, max_bytes=tree.LIMIT)
        self.seen: dict[str, int] | None = None
        self.runs = 0

    def read(self) -> int:
        """How many files the lake that reads what is new has read; the tables are equal."""
        self.runs += 1
        whole = f"{self.lake}-{self.runs}"
        if self.seen is not None:
            shutil.copytree(self.lake, whole)
        result = stage.run(self.spark, self.lake, self.config, run_id="r", since=self.seen)
        if self.seen is not None:
            stage.run(self.spark, whole, self.config, run_id="r")
            for table in (BRONZE_DOCUMENTS, BRONZE_QUARANTINE):
                assert rows(self.spark, self.lake, table) == rows(self.spark, whole, table)
        self.seen = dict(result.inputs)
        return result.counts["files"]


@pytest.mark.slow
def test_what_is_new_alone_is_read(spark: SparkSession, lake: str, tmp_path: Path) -> None:
    folder = tmp_path / "source"
    (folder / "pkg").mkdir(parents=True)
    for name in ("a.txt", "pkg/c.py", "pkg/d.py"):
        (folder / name).write_text(f"the text of {name}\n")
    (folder / "bad.txt").write_bytes(b"\xe9t\xe9")
    (folder / "one.jsonl").write_bytes(lines({"id": "x", "text": "one"}, {"id": "y", "text": "two"}))
    both = Both(spark, lake, folder, mirror=False)
    assert both.read() == 5

    (folder / "a.txt").write_text("another text\n")
    (folder / "pkg" / "d.py").unlink()
    (folder / "pkg" / "e.py").write_bytes(b"\0")
    (folder / "one.jsonl").write_bytes(lines({"id": "x", "text": "one"}))
    assert both.read() == 3

    # The id of another file's record: it is the document now, and every file has a word in that while there are two.
    (folder / "0.jsonl").write_bytes(lines({"id": "x", "text": None}, {"id": "a.txt", "text": "of this name"}))
    (folder / "bad.txt").unlink()
    assert both.read() == 5


@pytest.mark.slow
def test_any_mirrored_history_ends_as_if_all_were_read(spark: SparkSession, lake: str, tmp_path: Path) -> None:
    rng, folder = random.Random(0), tmp_path / "source"
    tree.grow(folder, rng)
    both = Both(spark, lake, folder, mirror=True)
    both.read()
    for step in range(2):
        for _ in range(rng.randrange(1, 3)):
            ending = rng.choice(tuple(tree.FORMATS))
            path = folder / f"f{rng.randrange(9)}.{ending}"
            if path.exists() and rng.random() < 0.4:
                path.unlink()
            else:
                path.write_bytes(tree.FORMATS[ending][0](rng)[0] + b" " * step)
        both.read()


def test_without_the_last_list_everything_is_read(spark: SparkSession, lake: str, tmp_path: Path) -> None:
    folder = tmp_path / "source"
    folder.mkdir()
    for name in "ab":
        (folder / f"{name}.txt").write_text(name)
    config = IngestConfig(sources=(SourceConfig(path=str(folder)),))
    seen = stage.run(spark, lake, config, run_id="r").inputs
    (folder / "c.txt").write_text("c")
    (kept,) = (Path(lake) / "listings").iterdir()
    content = kept.read_bytes()
    kept.unlink()
    assert news(lake, list_sources(config, lake), seen) is None
    listed = list_sources(config, lake)
    kept.write_bytes(content[:40])
    assert news(lake, listed, seen) is None
    kept.write_bytes(content)
    other = {**seen, "files:source": seen["files:source"] + 1}
    assert news(lake, listed, other) is None
    erased = {**seen, "erasures": 7}
    assert stage.run(spark, lake, config, run_id="r", since=erased).counts["files"] == 3
