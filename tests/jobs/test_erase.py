"""Erasure through every table, its proof and its files, and what maintain refuses to remove."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable
from pyspark.sql import SparkSession

from jobs import runs
from jobs.main import main
from model.registry.tables import missing
from pipelines import lake as lakes
from pipelines.tables import (
    BRONZE_DOCUMENTS,
    BRONZE_QUARANTINE,
    GOLD_SEQUENCES,
    OPS_ERASURES,
    SILVER_DOCUMENTS,
    SILVER_DUPLICATES,
)

MARKER = "zyzzyva"
SETTINGS = {
    "clean": {"rules": [{"name": "gopher_quality.min_words", "signal": "words", "kind": "text", "min": 5}]},
    "train_tokenizer": {"vocab_size": 400},
    "pack": {"sequence_length": 64},
}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "letters"
    folder.mkdir()
    for i in range(12):
        words = random.Random(i).choices(["lake", "house", "expert", "token", "shard", "kernel", "route", "band"], k=80)
        (folder / f"{i}.txt").write_text(" ".join(words))
    secret = (folder / "3.txt").read_text()
    (folder / "3.txt").write_text(f"{secret} {MARKER}")
    (folder / "copy.txt").write_text(f"{secret} {MARKER}")  # of the two the one with the lesser id is kept
    (folder / "broken.txt").write_bytes(MARKER.encode() + b" \xff")
    return folder


def lakemoe(*arguments: str | Path) -> int:
    return main([str(a) for a in arguments])


def rows(spark: SparkSession, lake: str, table: Any) -> list[Any]:
    return lakes.read(spark, lake, table).collect()


def holders(lake: str, marker: str) -> set[str]:
    """The files of the lake's tables, of any version, in which the words are: columns decoded, logs as they are."""
    found = set()
    for file in Path(lake).rglob("*"):
        if file.suffix == ".parquet" and file.is_file():
            text = repr(pq.ParquetFile(file).read().to_pydict())
        elif file.suffix in (".json", ".crc") and "_delta_log" in file.parts:
            text = file.read_bytes().decode(errors="replace")
        else:
            continue
        if marker in text:
            found.add(str(file.relative_to(lake)))
    return found


@pytest.mark.slow
def test_an_erased_document_is_nowhere(
    spark: SparkSession, lake: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(runs, "code_version", lambda: "1.0+abc")
    config = tmp_path / "settings.yaml"
    config.write_text(json.dumps(SETTINGS))
    pipeline = ("pipeline", "--config", config, "--source", source, "--lake", lake)
    assert lakemoe(*pipeline) == 0
    first, second = sorted(
        r["document_id"] for r in rows(spark, lake, BRONZE_DOCUMENTS) if r["source_id"] in ("3.txt", "copy.txt")
    )
    kept = {r["document_id"] for r in rows(spark, lake, SILVER_DUPLICATES) if r["kept"]}
    assert kept == {first}
    before = {r["sequence_id"]: r["document_ids"] for r in rows(spark, lake, GOLD_SEQUENCES)}

    assert lakemoe("erase", "--document-id", "0" * 64, "--lake", lake) == 2
    assert "There is no document 000" in capsys.readouterr().err
    assert lakemoe("erase", "--lake", lake) == 2
    assert lakemoe("erase", "--where", "no such column = 1", "--lake", lake) == 2
    assert rows(spark, lake, OPS_ERASURES) == []

    # The one that was kept goes: the other takes its place.
    (Path(lake) / "report.html").write_text("made before")
    capsys.readouterr()
    assert lakemoe("erase", "--document-id", first, "--reason", "asked by letter", "--lake", lake) == 0
    out = capsys.readouterr().out
    assert f"Other documents with the very same text: 1, {second} (lakemoe erase --with-duplicates " in out
    assert f"--document-id {second} --lake {lake} erases them); more of the same clusters" in out
    assert "The lake's tokenizer was trained on a sample of its documents, these perhaps among them" in out
    assert f"{lake}/report.html was made before and may show them" in out
    (proof,) = rows(spark, lake, OPS_ERASURES)
    assert (proof["document_id"], proof["reason"]) == (first, "asked by letter")
    assert proof["completed_at"] is not None
    versions = {use["table"]: use["version"] for use in proof["table_versions"]}
    assert versions[GOLD_SEQUENCES.name] == DeltaTable(GOLD_SEQUENCES.uri(lake)).version()
    after = {r["sequence_id"]: r["document_ids"] for r in rows(spark, lake, GOLD_SEQUENCES)}
    assert {s for s, held in before.items() if s not in after} == {s for s, held in before.items() if first in held}
    assert second in {d for held in after.values() for d in held}
    assert rows(spark, lake, SILVER_DUPLICATES) == []

    # Its file is still there; the document stays out, also of a run that looks at everything.
    assert lakemoe(*pipeline) == 0
    monkeypatch.setattr(runs, "code_version", lambda: "1.0+abc.dirty")
    assert lakemoe(*pipeline) == 0
    assert first not in {r["document_id"] for r in rows(spark, lake, BRONZE_DOCUMENTS)}

    # Everything of the source, the quarantined record too; then also from the files of old versions.
    assert lakemoe("erase", "--where", f"document_id = '{second}'", "--lake", lake) == 0
    assert {r["source_id"] for r in rows(spark, lake, BRONZE_QUARANTINE)} == {"broken.txt"}
    assert holders(lake, MARKER)
    assert lakemoe("erase", "--source", "letters", "--lake", lake) == 0
    assert [rows(spark, lake, t) for t in (BRONZE_DOCUMENTS, BRONZE_QUARANTINE, SILVER_DOCUMENTS)] == [[], [], []]
    assert rows(spark, lake, GOLD_SEQUENCES) == []

    training = Path(lake) / "training" / "half"
    training.mkdir(parents=True)
    (training / "run.json").write_text(json.dumps({"data": {"version": versions[GOLD_SEQUENCES.name]}}))
    vacuum = ("maintain", "--vacuum", "--retention-hours", "0", "--lake", lake)
    capsys.readouterr()
    assert lakemoe(*vacuum) == 2
    assert "The training half, which is not finished, needs gold.sequences at version" in capsys.readouterr().err
    assert holders(lake, MARKER)
    assert lakemoe(*vacuum, "--force") == 0
    assert holders(lake, MARKER) == set()
    assert holders(lake, first) <= {f for f in holders(lake, first) if f.startswith("ops")}

    assert lakemoe("erase", "--restore", "--document-id", first, "--lake", lake) == 0
    assert lakemoe(*pipeline) == 0
    assert [r["document_id"] for r in rows(spark, lake, BRONZE_DOCUMENTS)] == [first]


def test_the_very_same_text_is_named_or_goes_along(spark: SparkSession, lake: str, source: Path, capsys: Any) -> None:
    # Nothing is left of a mistake: a wrong path is no lake afterwards.
    assert lakemoe("erase", "--where", "true", "--lake", lake) == 2
    assert lakemoe("erase", "--restore", "--document-id", "0" * 64, "--lake", lake) == 2
    assert not Path(lake).exists()
    assert lakemoe("erase", "--restore", "--with-duplicates", "--document-id", "0" * 64, "--lake", lake) == 2
    capsys.readouterr()

    shutil.copy(source / "copy.txt", source / "another.txt")
    assert lakemoe("ingest", "--source", source, "--lake", lake) == 0
    for condition, words in (
        ("no_column = 1", "A column, variable, or function parameter with name `no_column` cannot be resolved"),
        ("1 +* 2", "Syntax error at or near '2': extra input '2'"),
    ):
        capsys.readouterr()
        assert lakemoe("erase", "--where", condition, "--lake", lake) == 2
        sentence = f"--where {condition!r} is no condition on bronze.documents: {words}.\n"
        assert capsys.readouterr().err == sentence

    held = {r["source_id"]: r["document_id"] for r in rows(spark, lake, BRONZE_DOCUMENTS)}
    twins = [held["another.txt"], held["copy.txt"]]
    erase = ("erase", "--document-id", held["3.txt"], "--reason", "by letter", "--lake", lake)
    assert lakemoe(*erase, "--with-duplicates") == 0
    assert "very same text" not in capsys.readouterr().out
    proofs = rows(spark, lake, OPS_ERASURES)
    assert {p["document_id"] for p in proofs} == {held["3.txt"], *twins}
    assert {p["reason"] for p in proofs} == {"by letter"}
    assert all(p["completed_at"] for p in proofs)
    left = {r["source_id"] for r in rows(spark, lake, BRONZE_DOCUMENTS)}
    assert left == set(held) - {"3.txt", "copy.txt", "another.txt"}


@pytest.mark.slow
def test_a_compaction_leaves_a_training_its_files(spark: SparkSession, lake: str, capsys: Any) -> None:
    lakes.ensure(spark, lake, GOLD_SEQUENCES)
    schema = lakes.spark_schema(GOLD_SEQUENCES.schema)
    for name in ("first", "second"):  # a file each
        row = (name, "train", "text", bytes(8), [2], [name], 0, "t", 2)
        lakes.sync(spark, lake, GOLD_SEQUENCES, spark.createDataFrame([row], schema), delete=False)
    uri = GOLD_SEQUENCES.uri(lake)
    pinned = DeltaTable(uri).version()
    assert len(DeltaTable(uri).file_uris()) == 2
    training = Path(lake) / "training" / "half"
    training.mkdir(parents=True)
    (training / "run.json").write_text(json.dumps({"data": {"version": pinned}}))
    vacuum = ("maintain", "--vacuum", "--retention-hours", "0", "--lake", lake)
    assert lakemoe(*vacuum) == 2
    assert "The training half, which is not finished, needs gold.sequences" in capsys.readouterr().err
    assert missing(uri, pinned) is None
    assert lakemoe(*vacuum, "--force") == 0
    assert missing(uri, pinned) == "files of the version are gone (VACUUM)"
    assert len(rows(spark, lake, GOLD_SEQUENCES)) == 2
