"""A stage that has nothing to do is spared, without Spark; one whose files or lake changed is not."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from deltalake import DeltaTable
from pyspark.sql import SparkSession

from jobs import runs, stages
from jobs.main import main
from pipelines.clean.config import CleanConfig, Rule
from pipelines.ingest import stage as ingest
from pipelines.ingest.config import IngestConfig, SourceConfig
from pipelines.tables import BRONZE_DOCUMENTS, OPS_RUNS


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
    spark: SparkSession, lake: str, tmp_path: Path, times_run: list[str], capsys: Any
) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    (folder / "a.txt").write_text("first")
    (folder / "bad.txt").write_bytes(b"\xff")
    config = IngestConfig(sources=(SourceConfig(path=str(folder)),))

    first = stages.run_stage("ingest", lake, config)
    capsys.readouterr()
    # What is there is said, and not as if it had been done now; as often as it is run.
    for _ in range(2):
        held = stages.run_stage("ingest", lake, config)
        assert held == {"table_documents": 1, "table_quarantine": 1, "table_quarantine.invalid_utf8": 1}
        assert capsys.readouterr().out == "ingest: unchanged; the lake has documents 1, quarantine 1\n"
    assert len(times_run) == 1
    made, *spared = runs.runs(lake, "ingest")
    assert first["records"] == dict(made["counts"])["records"] == 2
    for row in spared:
        assert (row["status"], dict(row["counts"])) == ("unchanged", held)
        assert (row["inputs"], row["outputs"]) == (made["inputs"], made["outputs"])

    (folder / "b.txt").write_text("second")
    grown = stages.run_stage("ingest", lake, config)
    assert [grown[name] for name in ("table_documents", "files", "files_unchanged")] == [2, 1, 2]
    assert len(times_run) == 2

    # A table that someone else wrote to is read again, also where the files are the same.
    spark.sql(f"DELETE FROM delta.`{BRONZE_DOCUMENTS.uri(lake)}` WHERE source_id = 'a.txt'")
    assert stages.run_stage("ingest", lake, config)["inserted"] == 1
    assert len(times_run) == 3


def test_edited_code_is_never_spared(
    spark: SparkSession, lake: str, tmp_path: Path, times_run: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(runs, "code_version", lambda: "1.0+abc.dirty")
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "a text"}) + "\n")
    config = IngestConfig(sources=(SourceConfig(path=str(tmp_path / "a.jsonl")),))
    for _ in range(2):
        stages.run_stage("ingest", lake, config)
    assert len(times_run) == 2
    # Run or spared, what changed nothing is said in one form.
    assert "ingest: unchanged; the lake has documents 1, quarantine 0\n" in capsys.readouterr().out
    assert [row["status"] for row in runs.runs(lake, "ingest")] == ["succeeded", "unchanged"]


def test_more_broken_records_than_admitted_fail_when_the_others_are_in(
    spark: SparkSession, lake: str, tmp_path: Path, times_run: list[str], capsys: Any
) -> None:
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "good.txt").write_text("good")
    (tmp_path / "files" / "bad.txt").write_bytes(b"\xff")
    (tmp_path / "files" / ".env").symlink_to("/etc/hostname")
    (tmp_path / "files" / ".hidden").write_text("taken, and said")
    arguments = ["ingest", "--source", str(tmp_path / "files"), "--lake", lake]
    for _ in range(2):  # it fails as long as they are so many
        assert main([*arguments, "--ingest.max-quarantined", "0.3"]) == 1
        out, err = capsys.readouterr()
        assert "1 links lead out of their source and were passed over" in out
        assert "1 of the files are hidden, such as .hidden; --no-ingest.hidden" in out
        assert "1 of 3 records are no documents (invalid_utf8 1)" in out
        assert err.startswith(
            "33.33% of the records are no documents (invalid_utf8 1), more than ingest.max_quarantined"
        )
        row = runs.runs(lake, "ingest")[-1]
        assert (row["status"], dict(row["counts"])["documents"]) == ("failed", 2)
    assert main([*arguments, "--ingest.max-quarantined", "0.4"]) == 0


def test_rows_of_many_runs_are_few_files(lake: str) -> None:
    for _ in range(runs._MOST_FILES + 2):
        with runs.recorded(lake, "ingest", {}) as run:
            run.status = "unchanged"
    assert len(DeltaTable(OPS_RUNS.uri(lake)).file_uris()) <= 2
    assert len(runs.runs(lake)) == runs._MOST_FILES + 2


def test_rules_that_differ_are_said_and_the_same_ones_judge_nothing_again(
    lake: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(runs, "code_version", lambda: "1.0+abc")
    monkeypatch.setattr(stages, "record_stage", lambda *a, **k: pytest.fail("it was judged again"))
    config = CleanConfig()
    assert stages.rules_changed(lake, config) == ""
    with runs.recorded(lake, "clean", config.model_dump(mode="json")) as run:
        run.inputs, run.counts = (
            {BRONZE_DOCUMENTS.name: 3},
            {"documents": 9, "accepted": 8, "rejected": 1, "updated": 4},
        )
    assert main(["clean", "--rejudge", "--lake", lake]) == 0
    assert capsys.readouterr().out.startswith("clean: unchanged; the lake has documents 9, accepted 8, rejected 1\n")
    assert [row["status"] for row in runs.runs(lake, "clean")] == ["succeeded", "unchanged"]

    number = len(config.rules)
    shorter, other = config.rules[:3], config.rules[0].model_copy(update={"min": 7.0})
    fewer = config.model_copy(update={"rules": (*shorter, Rule(name="my.rule", signal="words", kind="text", min=1))})
    names = ", ".join(rule.name for rule in config.rules[3:7])
    assert stages.rules_changed(lake, fewer) == f"rules 4, were {number} (new: my.rule; gone: {names} ...)"
    changed = config.model_copy(update={"rules": (other, *config.rules[1:])})
    assert stages.rules_changed(lake, changed) == f"rules {number}, were {number} (changed: {other.name})"
    assert stages.rules_changed(lake, config) == ""
