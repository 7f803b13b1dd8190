"""An ingest that reads what is new alone ends in the tables of one that reads everything."""

from __future__ import annotations

import gzip
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pipelines import lake as lakehouse
from pipelines.ingest import stage
from pipelines.ingest.config import IngestConfig, SourceConfig
from pipelines.tables import BRONZE_DOCUMENTS, BRONZE_QUARANTINE, Table

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
    """A lake that reads what is new, and beside it one that reads everything."""

    def __init__(self, spark: SparkSession, lake: str, folder: Path, mirror: bool) -> None:
        self.spark, self.lake = spark, lake
        self.config = IngestConfig(sources=(SourceConfig(path=str(folder)),), mirror=mirror)
        self.seen: dict[str, int] | None = None

    def read(self, *, compare: bool = True) -> int:
        """How many files the lake that reads what is new has read; the tables are equal."""
        result = stage.run(self.spark, self.lake, self.config, run_id="r", since=self.seen)
        self.seen = dict(result.inputs)
        # A mirror is what its source is now, whatever it was before.
        if compare or not self.config.mirror:
            stage.run(self.spark, f"{self.lake}-whole", self.config, run_id="r")
        if compare:
            for table in (BRONZE_DOCUMENTS, BRONZE_QUARANTINE):
                assert rows(self.spark, self.lake, table) == rows(self.spark, f"{self.lake}-whole", table)
        counts = result.counts
        assert counts["documents"] + counts["quarantined"] == counts["records"]
        return counts["files"]


@pytest.mark.slow
@pytest.mark.parametrize("mirror", [False, True], ids=["kept", "mirrored"])
def test_what_is_new_alone_is_read(spark: SparkSession, lake: str, tmp_path: Path, mirror: bool) -> None:
    folder = tmp_path / "source"
    (folder / "pkg").mkdir(parents=True)
    for name in ("a.txt", "b.md", "pkg/c.py", "pkg/d.py"):
        (folder / name).write_text(f"the text of {name}\n")
    (folder / "bad.txt").write_bytes(b"\xe9t\xe9")
    (folder / "one.jsonl").write_bytes(lines({"id": "x", "text": "one"}, {"id": "y", "text": "two"}))
    both = Both(spark, lake, folder, mirror)
    assert both.read(compare=False) == 6

    (folder / "a.txt").write_text("another text\n")
    (folder / "pkg" / "d.py").unlink()
    (folder / "pkg" / "e.py").write_text("new = 1\n")
    (folder / "one.jsonl").write_bytes(lines({"id": "x", "text": "one"}, {"text": 3}))
    assert both.read() == 3

    # Mended, of a line whose place is known, and of a file.
    (folder / "one.jsonl").write_bytes(lines({"id": "x", "text": "one, changed"}))
    (folder / "bad.txt").write_text("good")
    # A mirror cannot tell a line's row from one of a file that was not read.
    assert both.read(compare=not mirror) == (6 if mirror else 2)

    # A file's record is the first of its id now: every file has a word in it, as long as there are duplicates.
    (folder / "0.jsonl").write_bytes(lines({"id": "x", "text": "the first"}))
    assert both.read(compare=not mirror) == 7
    (folder / "0.jsonl").unlink()
    assert both.read(compare=False) == 6
    (folder / "b.md").write_text("changed last")
    (folder / "cut.jsonl.gz").write_bytes(gzip.compress(lines(*({"id": i, "text": "t" * i} for i in range(99))))[:-40])
    assert both.read() == (7 if mirror else 2)


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
    assert stage.run(spark, lake, config, run_id="r", since=seen).counts["files"] == 3
    kept.write_bytes(content)  # of another run than the last
    now = {**seen, "files:source": seen["files:source"] + 1}
    assert stage.run(spark, lake, config, run_id="r", since=now).counts["files"] == 3
