"""The decontaminate stage on a small lake: verdicts, what they leave alone, and how they are taken back."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from jobs import runs, stages
from pipelines import lake as tables_of
from pipelines.decontaminate import stage
from pipelines.decontaminate.config import DecontaminateConfig
from pipelines.tables import SILVER_DOCUMENTS

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

ITEMS = [" ".join(f"{name}{i}" for i in range(20)) for name in ("apple", "pear", "plum")]
RULES = ["gopher_quality.stop_words", "c4.min_sentences"]


def write_silver(
    spark: SparkSession, lake: str, texts: dict[str, tuple[str, list[str]]], run_id: str = "clean"
) -> None:
    from pyspark.sql import functions as F

    tables_of.ensure(spark, lake, SILVER_DOCUMENTS)
    rows = [
        (name, "s", name, "text", text, rejected, hashlib.sha256(text.encode()).hexdigest(), run_id)
        for name, (text, rejected) in texts.items()
    ]
    df = spark.createDataFrame(
        rows,
        "document_id string, source string, source_id string, kind string, text string, rejected_by array<string>, "
        "text_sha256 string, run_id string",
    )
    for field in tables_of.spark_schema(SILVER_DOCUMENTS.schema):
        if field.name not in df.columns:
            df = df.withColumn(field.name, F.lit(None).cast(field.dataType))
    tables_of.sync(spark, lake, SILVER_DOCUMENTS, df)


def silver(spark: SparkSession, lake: str) -> dict[str, dict[str, Any]]:
    return {r["document_id"]: r.asDict() for r in tables_of.read(spark, lake, SILVER_DOCUMENTS).collect()}


@contextmanager
def recorded(spark: SparkSession, lake: str) -> Iterator[str]:
    """What is written in the body is a recorded run of clean."""
    with runs.recorded(lake, "clean", {}) as run, tables_of.committing(spark, run.run_id):
        yield run.run_id


def write_set(folder: Path, name: str, *items: str) -> None:
    (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": item}) + "\n" for item in items))


@pytest.mark.slow
def test_verdicts_come_stay_and_go(
    spark: SparkSession, lake: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    real = stage.run
    monkeypatch.setattr(runs, "code_version", lambda: "1.0+abc")
    monkeypatch.setattr(stage, "run", lambda *a, **k: (calls.append(k["run_id"]), real(*a, **k))[1])
    folder = tmp_path / "evals"
    folder.mkdir()
    write_set(folder, "zoo", ITEMS[0], ITEMS[1], "too short")
    write_set(folder, "art", ITEMS[0] + " and more", ITEMS[2])
    part = " ".join(ITEMS[0].split()[:13])
    write_silver(
        spark,
        lake,
        {
            "both": (f"Read on: {part.title()}!", RULES),
            "one": (f"{ITEMS[1]} and {ITEMS[1]}", []),
            "near": (" ".join(ITEMS[2].split()[:12]), []),
            "stale": ("nothing of a set", [*RULES, "contaminated:gone"]),
            "other": ("nothing either", RULES),
        },
    )
    before = silver(spark, lake)

    nothing = stages.run_stage("decontaminate", lake, DecontaminateConfig())
    assert nothing == {"sets": 0}
    assert silver(spark, lake) == before
    assert stages.run_stage("decontaminate", lake, DecontaminateConfig()) == nothing
    assert len(calls) == 1

    config = DecontaminateConfig(sets=str(folder))
    version = tables_of.version(spark, lake, SILVER_DOCUMENTS) or 0
    counts = stages.run_stage("decontaminate", lake, config)
    after = silver(spark, lake)
    assert {name: row["rejected_by"] for name, row in after.items()} == {
        "both": [*RULES, "contaminated:art", "contaminated:zoo"],
        "one": ["contaminated:zoo"],
        "near": [],
        "stale": RULES,
        "other": RULES,
    }
    for name, row in after.items():
        written = calls[-1] if name in ("both", "one", "stale") else "clean"
        assert row == {**before[name], "rejected_by": row["rejected_by"], "run_id": written}
    assert counts == {
        "sets": 2, "documents": 5, "updated": 3, "contaminated": 2, "contaminated.art": 1, "contaminated.zoo": 2,
        "items": 5, "items.art": 2, "items.zoo": 3, "items_found": 3, "items_found.art": 1, "items_found.zoo": 2,
        "items_too_short": 1, "items_too_short.art": 0, "items_too_short.zoo": 1, "ngrams": 26,
    }  # fmt: skip
    assert tables_of.version(spark, lake, SILVER_DOCUMENTS) == version + 1

    # The same sets: spared; and when it runs all the same, nothing is written.
    spared = stages.run_stage("decontaminate", lake, config)
    assert spared == {name: n for name, n in counts.items() if name not in ("documents", "updated")}
    assert len(calls) == 2
    again = real(spark, lake, config, run_id="again")
    assert again.counts == counts | {"updated": 0}
    assert tables_of.version(spark, lake, SILVER_DOCUMENTS) == version + 1

    # Another job's documents: those alone are matched, beside those that have a verdict; the counts are those of all.
    rows = {name: (row["text"], row["rejected_by"]) for name, row in after.items() if name != "one"}
    with recorded(spark, lake) as run_id:
        write_silver(spark, lake, {**rows, "near": ("other text", []), "new": (ITEMS[2], ["a.rule"])}, run_id)
    counts = stages.run_stage("decontaminate", lake, config)
    assert silver(spark, lake)["new"]["rejected_by"] == ["a.rule", "contaminated:art"]
    assert counts["documents"] == 3
    assert (counts["updated"], counts["contaminated.art"], counts["contaminated.zoo"]) == (1, 2, 1)
    assert (counts["items_found.art"], counts["items_found.zoo"]) == (2, 1)

    # Other contents under the same name are other sets.
    write_set(folder, "zoo", ITEMS[2])
    assert stages.run_stage("decontaminate", lake, config)["documents"] == 5
    assert len(calls) == 4
    assert {name: row["rejected_by"] for name, row in silver(spark, lake).items() if name in ("both", "new")} == {
        "both": [*RULES, "contaminated:art"],
        "new": ["a.rule", "contaminated:art", "contaminated:zoo"],
    }
