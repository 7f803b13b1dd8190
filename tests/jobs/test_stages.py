"""A stage that has nothing to do is spared, without Spark; one whose files or lake changed is not."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from pyspark.sql import SparkSession

from jobs import runs, stages
from pipelines.ingest import stage as ingest
from pipelines.ingest.config import IngestConfig, SourceConfig
from pipelines.tables import BRONZE_DOCUMENTS


@pytest.fixture
def times_run(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows by one with each real run of ingest. The code counts as committed, the files as an hour old."""
    calls: list[str] = []
    real, now = ingest.run, time.time_ns
    monkeypatch.setattr(time, "time_ns", lambda: now() + 3600 * 10**9)
    monkeypatch.setattr(runs, "code_version", lambda: "1.0+abc")
    monkeypatch.setattr(ingest, "run", lambda *a, **k: (calls.append("run"), real(*a, **k))[1])
    return calls


def test_ingest_is_spared_while_its_files_are_the_same(
    spark: SparkSession, lake: str, tmp_path: Path, times_run: list[str]
) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    (folder / "a.txt").write_text("first")
    config = IngestConfig(sources=(SourceConfig(path=str(folder)),))

    first = stages.run_stage("ingest", lake, config)
    assert stages.run_stage("ingest", lake, config) == first
    assert len(times_run) == 1

    (folder / "b.txt").write_text("second")
    grown = stages.run_stage("ingest", lake, config)
    assert [grown[name] for name in ("table_documents", "files", "files_unchanged")] == [2, 1, 1]
    assert len(times_run) == 2

    # A table that someone else wrote to is read again, also where the files are the same.
    spark.sql(f"DELETE FROM delta.`{BRONZE_DOCUMENTS.uri(lake)}` WHERE source_id = 'a.txt'")
    assert stages.run_stage("ingest", lake, config)["inserted"] == 1
    assert len(times_run) == 3


def test_edited_code_is_never_spared(
    spark: SparkSession, lake: str, tmp_path: Path, times_run: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "code_version", lambda: "1.0+abc.dirty")
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "a text"}) + "\n")
    config = IngestConfig(sources=(SourceConfig(path=str(tmp_path / "a.jsonl")),))
    for _ in range(2):
        stages.run_stage("ingest", lake, config)
    assert len(times_run) == 2
    assert [row["status"] for row in runs.runs(lake, "ingest")] == ["succeeded", "unchanged"]
