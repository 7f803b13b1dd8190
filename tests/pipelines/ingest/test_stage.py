"""The ingest stage on a lake: counts that add up, runs that add nothing, quarantine that heals."""

from __future__ import annotations

import errno
import gzip
import hashlib
import json
import os
import random
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from pipelines import lake as lakehouse
from pipelines.errors import LakeError
from pipelines.ingest import stage
from pipelines.ingest.config import IngestConfig, SourceConfig
from pipelines.ingest.packed import zstd
from pipelines.ingest.tasks import reader, spread
from pipelines.tables import BRONZE_DOCUMENTS, BRONZE_QUARANTINE
from tests.pipelines.ingest import tree

if TYPE_CHECKING:
    from pyspark.sql import SparkSession


def ingest(spark: SparkSession, lake: str, *sources: Path | SourceConfig, **settings: Any) -> lakehouse.StageResult:
    configs = tuple(s if isinstance(s, SourceConfig) else SourceConfig(path=str(s)) for s in sources)
    result = stage.run(spark, lake, IngestConfig(sources=configs, **settings), run_id="r")
    assert result.counts["documents"] + result.counts["quarantined"] == result.counts["records"]
    return result


def documents(spark: SparkSession, lake: str) -> dict[str, str]:
    return {row.source_id: row.content for row in lakehouse.read(spark, lake, BRONZE_DOCUMENTS).collect()}


def quarantine(spark: SparkSession, lake: str) -> list[tuple[str, str]]:
    return sorted((row.source_id, row.reason) for row in lakehouse.read(spark, lake, BRONZE_QUARANTINE).collect())


def jsonl(*records: object) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def warc(text: str, year: int) -> bytes:
    """A WET record of one page."""
    head = ("WARC/1.0", "WARC-Type: conversion", "WARC-Target-URI: https://example.org/", "Content-Type: text/plain")
    return "\r\n".join(
        [*head, f"WARC-Date: {year}-01-01T00:00:00Z", f"Content-Length: {len(text)}", "", f"{text}\r\n\r\n"]
    ).encode()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    (folder / "pkg").mkdir(parents=True)
    (folder / "README.md").write_text("# Title\n")
    (folder / "pkg" / "__init__.py").write_text("")
    (folder / "pkg" / "run").write_text("#!/usr/bin/env python3\nprint(1)\n")
    (folder / "pkg" / "x.pyc").write_bytes(b"\0")
    (folder / "bin.dat").write_bytes(b"a\0")
    (folder / "latin.txt").write_bytes(b"\xe9t\xe9")
    (folder / "r.jsonl").write_bytes(jsonl({"id": "a", "text": "one", "url": "u"}, {"id": "b"}, {"id": "c", "text": 3}))
    return folder


def test_ingest_fills_both_tables_and_adds_nothing_again(spark: SparkSession, lake: str, source: Path) -> None:
    first = ingest(spark, lake, source)
    assert documents(spark, lake) == {
        "README.md": "# Title\n",
        "pkg/__init__.py": "",
        "pkg/run": "#!/usr/bin/env python3\nprint(1)\n",
        "a": "one",
    }
    assert quarantine(spark, lake) == [
        ("b", "missing_text"),
        ("bin.dat", "binary"),
        ("c", "wrong_type"),
        ("latin.txt", "invalid_utf8"),
    ]
    assert first.counts["skipped"] == 1
    words = (
        "4 of 8 records are no documents (binary 1, invalid_utf8 1, missing_text 1, wrong_type 1): bronze.quarantine"
    )
    assert [note.startswith(words) for note in first.notes] == [True]
    assert first.failure is None
    assert first.counts["quarantined.wrong_type"] == 1
    assert (first.counts["table_documents"], first.counts["table_quarantine"]) == (4, 4)
    rows = {row.source_id: row for row in lakehouse.read(spark, lake, BRONZE_DOCUMENTS).collect()}
    assert {i: row.kind for i, row in rows.items()} == {
        "README.md": "text",
        "pkg/__init__.py": "code",
        "pkg/run": "code",
        "a": "text",
    }
    run = rows["pkg/run"]
    assert run.document_id == hashlib.sha256(b"source\0pkg/run").hexdigest()
    assert run.content_sha256 == hashlib.sha256(run.content.encode()).hexdigest()
    assert (run.media_type, run.path, run.run_id) == ("text/x-python", str(source / "pkg/run"), "r")
    assert abs(run.source_modified_at.timestamp() - (source / "pkg/run").stat().st_mtime) < 86_400
    assert rows["a"].metadata == {"url": "u"}

    for path in source.rglob("*"):
        os.utime(path, (time.time() + 60,) * 2)  # copied or checked out anew: another time, the same content
    again = ingest(spark, lake, source)
    assert again.outputs == first.outputs
    assert again.counts["inserted"] == again.counts["updated"] == 0


def test_ingest_updates_what_changed_and_keeps_or_mirrors_what_is_gone(
    spark: SparkSession, lake: str, source: Path
) -> None:
    ingest(spark, lake, source)
    (source / "README.md").write_text("new")
    (source / "pkg" / "run").unlink()
    (source / "pkg" / "__init__.py").write_bytes(b"\0")
    (source / "bin.dat").unlink()
    (source / "latin.txt").write_text("été")
    (source / "r.jsonl").write_bytes(jsonl({"id": "b", "text": "whole"}, {"id": "c"}))
    result = ingest(spark, lake, source)
    assert [result.counts[name] for name in ("inserted", "updated", "deleted")] == [2, 1, 1]
    # A record that is none now takes the place of the document that it was; what is gone says nothing.
    kept = {"README.md": "new", "latin.txt": "été", "b": "whole"}
    assert documents(spark, lake) == {**kept, "a": "one", "pkg/run": "#!/usr/bin/env python3\nprint(1)\n"}
    bad = [("c", "missing_text"), ("pkg/__init__.py", "binary")]
    assert quarantine(spark, lake) == [("bin.dat", "binary"), *bad]

    mirrored = ingest(spark, lake, source, mirror=True)
    assert (documents(spark, lake), quarantine(spark, lake)) == (kept, bad)
    assert [mirrored.counts[name] for name in ("inserted", "updated", "deleted")] == [0, 0, 2]
    assert mirrored.counts["records"] == mirrored.counts["table_documents"] + mirrored.counts["table_quarantine"] == 5
    assert ingest(spark, lake, source, mirror=True).outputs == mirrored.outputs


def test_ingest_mirrors_a_source_without_files_only_when_told(spark: SparkSession, lake: str, tmp_path: Path) -> None:
    """A disk that is not mounted looks like a folder whose files are all gone."""
    disk, other = tmp_path / "disk", tmp_path / "other"
    for folder, number in ((disk, 3), (other, 1)):
        folder.mkdir()
        for i in range(number):
            (folder / f"{folder.name}-{i}.txt").write_text(str(i))
    before = ingest(spark, lake, disk, other, mirror=True)
    held = documents(spark, lake)
    for file in disk.iterdir():
        file.unlink()
    for sources in ((disk, other), (disk,)):
        with pytest.raises(LakeError) as error:
            ingest(spark, lake, *sources, mirror=True)
        assert error.value.exit_code == 2
        for words in (f"source disk in {disk} (documents: 3)", "--mirror", "--ingest.allow-empty"):
            assert words in str(error.value)
        assert "other" not in str(error.value)
    kept = ingest(spark, lake, disk, other)
    assert kept.notes == (f"disk has no file in {disk}: its 3 documents stay.",)
    assert (kept.outputs, documents(spark, lake)) == (before.outputs, held)

    gone = ingest(spark, lake, disk, other, mirror=True, allow_empty=True)
    assert (gone.counts["deleted"], documents(spark, lake)) == (3, {"other-0.txt": "0"})
    (other / "other-0.txt").unlink()
    assert ingest(spark, lake, other, mirror=True, allow_empty=True).counts["table_documents"] == 0


def test_ingest_refuses_a_source_that_cannot_be_listed(
    spark: SparkSession, lake: str, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = ingest(spark, lake, source).outputs
    scandir = os.scandir

    def failing(path: Any) -> Any:
        if Path(path) == source:
            raise OSError(errno.EIO, "Input/output error", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", failing)
    with pytest.raises(LakeError, match="cannot be listed: Input/output error"):
        ingest(spark, lake, source, mirror=True)
    assert lakehouse.version(spark, lake, BRONZE_DOCUMENTS) == before[BRONZE_DOCUMENTS.name]


def test_ingest_duplicates_do_not_depend_on_partitions(spark: SparkSession, tmp_path: Path) -> None:
    folder = tmp_path / "s"
    folder.mkdir()
    (folder / "a.jsonl").write_bytes(jsonl({"id": "x"}, {"id": "y", "text": "a2"}))
    (folder / "b.jsonl").write_bytes(
        jsonl({"id": "x", "text": "b1"}, {"id": "x", "text": "b2"}, {"id": "y", "text": 1})
    )
    (folder / "c.jsonl").write_bytes(jsonl({"id": "x", "text": "c1"}, {"id": "y", "text": "c2"}, {"text": "c3"}))
    seen = []
    for number, shuffled in enumerate(("1", "5")):
        before = spark.conf.get("spark.sql.shuffle.partitions")
        spark.conf.set("spark.sql.shuffle.partitions", shuffled)
        try:
            lake = str(tmp_path / f"lake{number}")
            result = ingest(spark, lake, folder)
        finally:
            spark.conf.set("spark.sql.shuffle.partitions", before)
        assert result.counts["quarantined.duplicate_id"] == 3
        assert result.counts["table_documents"] + result.counts["table_quarantine"] == 8
        seen.append((documents(spark, lake), quarantine(spark, lake)))
    assert seen[0] == seen[1]
    assert seen[0] == (
        {"x": "b1", "y": "a2", "c.jsonl:3": "c3"},
        [
            ("a.jsonl:1", "missing_text"),
            ("b.jsonl:2", "duplicate_id"),
            ("b.jsonl:3", "wrong_type"),
            ("c.jsonl:1", "duplicate_id"),
            ("c.jsonl:2", "duplicate_id"),
        ],
    )
    rows = lakehouse.read(spark, lake, BRONZE_QUARANTINE).where("source_id = 'c.jsonl:2'").collect()
    assert (rows[0].detail, bytes(rows[0].raw)) == ("the id y is that of a.jsonl:2", b"c2")
    assert rows[0].quarantine_id == hashlib.sha256(b"s\0c.jsonl:2\0duplicate_id").hexdigest()
    assert ingest(spark, lake, folder).outputs == result.outputs


def test_ingest_truncated_file_heals_and_is_not_mirrored(spark: SparkSession, lake: str, tmp_path: Path) -> None:
    whole = gzip.compress(jsonl(*({"id": f"i{n}", "text": os.urandom(30).hex()} for n in range(50))))
    path = tmp_path / "data.jsonl.gz"
    path.write_bytes(whole[:-4])  # only the checksum is missing: no record 51 will ever take the row's place
    ingest(spark, lake, path)
    assert quarantine(spark, lake) == [("data.jsonl.gz:51", "truncated")]
    path.write_bytes(whole[: len(whole) // 2])
    cut = ingest(spark, lake, path, mirror=True)
    assert 0 < cut.counts["documents"] < 50
    assert quarantine(spark, lake) == [(f"data.jsonl.gz:{cut.counts['documents'] + 1}", "truncated")]
    # What may be behind the break is not known to be gone.
    assert cut.counts["table_documents"] == 50
    path.write_bytes(whole)
    assert ingest(spark, lake, path).counts["documents"] == 50
    assert quarantine(spark, lake) == []


def test_ingest_several_sources_leave_each_other_alone(spark: SparkSession, lake: str, tmp_path: Path) -> None:
    for name in ("one's", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").write_text(name)
        (tmp_path / name / "b.txt").write_bytes(b"\0")
    both = ingest(spark, lake, tmp_path / "one's", SourceConfig(path=str(tmp_path / "two"), license="MIT", kind="code"))
    assert (both.counts["documents"], both.counts["quarantined"]) == (2, 2)
    (tmp_path / "one's" / "b.txt").write_text("whole")
    ingest(spark, lake, tmp_path / "one's")
    left = lakehouse.read(spark, lake, BRONZE_QUARANTINE).collect()
    assert [(row.source, row.source_id) for row in left] == [("two", "b.txt")]
    rows = lakehouse.read(spark, lake, BRONZE_DOCUMENTS).where("source = 'two'").collect()
    assert [(row.license_declared, row.kind) for row in rows] == [("MIT", "code")]


def test_ingest_unreadable_folder_heals_and_is_not_mirrored(
    spark: SparkSession, lake: str, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scandir, now = os.scandir, time.time_ns
    monkeypatch.setattr(time, "time_ns", lambda: now() + 3600 * 10**9)  # so that the files' times tell of changes

    def refuse(path: str) -> Any:
        if str(path).endswith("pkg"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    first = ingest(spark, lake, source)
    with monkeypatch.context() as patched:
        patched.setattr(os, "scandir", refuse)
        shut = ingest(spark, lake, source, mirror=True)
    assert ("pkg", "unreadable") in quarantine(spark, lake)
    assert shut.counts["table_documents"] == first.counts["table_documents"]
    again = ingest(spark, lake, source)
    assert again.inputs["files:source"] != shut.inputs["files:source"], "what can be listed again has changed"
    assert ("pkg", "unreadable") not in quarantine(spark, lake)


def test_ingest_file_that_vanishes_or_comes_while_it_runs(
    spark: SparkSession, lake: str, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def meanwhile(spark: SparkSession, entries: Any) -> Any:
        (source / "README.md").unlink()
        (source / "late.txt").write_text("late")
        with (source / "r.jsonl").open("ab") as grown:
            grown.write(b'{"id": "grown", "text": "more"}\n')
        return spread(spark, entries)

    readme = (source / "README.md").read_text()
    with monkeypatch.context() as patched:
        patched.setattr(stage, "spread", meanwhile)
        first = ingest(spark, lake, source)
    assert ("README.md", "unreadable") in quarantine(spark, lake)
    assert "late.txt" not in documents(spark, lake)
    assert documents(spark, lake)["grown"] == "more"
    assert first.inputs == {}  # so the next run is not spared

    (source / "README.md").write_text(readme)
    second = ingest(spark, lake, source)
    assert second.counts["table_documents"] == first.counts["table_documents"] + 2
    assert "README.md" not in dict(quarantine(spark, lake))

    with monkeypatch.context() as patched:
        patched.setattr(stage, "spread", meanwhile)
        third = ingest(spark, lake, source)
    # Nothing was read that speaks against the document that is there.
    assert third.counts["quarantined.unreadable"] == 1
    assert documents(spark, lake)["README.md"] == readme
    assert "README.md" not in dict(quarantine(spark, lake))


def test_ingest_every_format_and_the_newest_of_a_page(spark: SparkSession, lake: str, tmp_path: Path) -> None:
    folder = tmp_path / "mixed"
    folder.mkdir()
    (folder / "README.md.gz").write_bytes(gzip.compress(b"# Packed"))
    (folder / "r.jsonl.zst").write_bytes(zstd.compress(jsonl({"id": "z", "text": "zstd"}, {"id": "y"})))
    pq.write_table(pa.table({"body": [{"text": "row"}], "text": ["not it"]}), folder / "p.parquet")
    (folder / "2023.warc.gz").write_bytes(gzip.compress(warc("old", 2023)) + gzip.compress(warc("new", 2024)))
    datasets.Dataset.from_dict({"text": ["first", "second"]}).save_to_disk(str(tmp_path / "saved"))
    settings = ("text_field", "id_field"), ("body.text", "id")
    sources = (
        SourceConfig(path=str(folder), exclude=("*.parquet",)),
        SourceConfig(path=str(folder / "p.parquet"), **dict(zip(*settings, strict=True))),  # type: ignore[arg-type]
        SourceConfig(path=str(tmp_path / "saved")),
    )
    first = ingest(spark, lake, *sources)
    wanted = {
        "README.md.gz": "# Packed",
        "z": "zstd",
        "https://example.org/": "new",
        "p.parquet:1": "row",
        "train/00000:1": "first",
        "train/00000:2": "second",
    }
    assert documents(spark, lake) == wanted
    assert quarantine(spark, lake) == [("2023.warc.gz:1", "duplicate_id"), ("y", "missing_text")]
    assert (first.counts["passed_over"], first.counts["records"]) == (0, 8)
    rows = {row.source_id: row for row in lakehouse.read(spark, lake, BRONZE_DOCUMENTS).collect()}
    assert rows["README.md.gz"].media_type == "text/markdown"
    assert rows["p.parquet:1"].metadata == {"text": "not it"}
    assert rows["https://example.org/"].source_modified_at.year == 2024

    (folder / "2025.wet.zst").write_bytes(zstd.compress(warc("newest", 2025)))
    again = ingest(spark, lake, sources[0])
    assert (again.counts["inserted"], again.counts["updated"]) == (0, 1)
    assert documents(spark, lake) == {**wanted, "https://example.org/": "newest"}


def test_ingest_counts_add_up_over_a_history_of_mixed_trees(spark: SparkSession, lake: str, tmp_path: Path) -> None:
    """Mirrored, documents + quarantined rows on the tables = records, whatever came, changed and went."""
    folder = tmp_path / "tree"
    for seed in range(3):
        records = tree.grow(folder, random.Random(seed))
        counts = ingest(spark, lake, folder, mirror=True, max_bytes=tree.LIMIT).counts
        assert counts["documents"] + counts["quarantined"] == counts["records"] == records
        assert (counts["table_documents"], counts["table_quarantine"]) == (counts["documents"], counts["quarantined"])


def test_ingest_leaves_the_lake_out_of_its_source(spark: SparkSession, source: Path) -> None:
    lake = str(source / "lake")
    first = ingest(spark, lake, source)
    assert ingest(spark, lake, source).outputs == first.outputs


def test_ingest_fails_where_counts_do_not_add_up(
    spark: SparkSession, lake: str, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def losing(*settings: Any) -> Any:
        whole = reader(*settings)

        # Sent to the executors as it is: their Python imports the module anew.
        def read(batches: Any) -> Any:
            for batch in whole(batches):
                lost = pc.fill_null(pc.equal(batch["source_id"], "README.md"), False)
                yield batch.filter(pc.invert(lost))

        return read

    monkeypatch.setattr(stage, "reader", losing)
    with pytest.raises(LakeError, match="lost count"):
        ingest(spark, lake, source)
    assert documents(spark, lake) == {}


def test_ingest_without_input(spark: SparkSession, lake: str, tmp_path: Path) -> None:
    (tmp_path / "empty" / ".git").mkdir(parents=True)
    (tmp_path / "empty" / ".git" / "config").write_text("x")
    for sources, words in (
        ((tmp_path / "empty",), "no file to ingest"),
        ((tmp_path / "no",), "does not exist"),
        ((), "no"),
    ):
        with pytest.raises(LakeError, match=words) as error:
            ingest(spark, lake, *sources)
        assert error.value.exit_code == 2
    assert not Path(lake).exists()
