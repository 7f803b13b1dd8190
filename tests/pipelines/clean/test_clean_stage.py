"""The clean stage on a small bronze table, and the rule table's verdicts in Spark."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pytest
from pydantic import ValidationError

from pipelines.batches import slices
from pipelines.clean.batch import clean_rows
from pipelines.clean.config import CleanConfig, Rule
from pipelines.clean.stage import run
from pipelines.lake import ensure, read, spark_schema, sync
from pipelines.tables import BRONZE_DOCUMENTS, SILVER_DOCUMENTS

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

PROSE = (
    "It was a bright day in the old town, and the people of the valley came to see what had happened.\n"
    "Nobody could say why the river had risen, but every farmer knew that it would fall again with time.\n"
    "Some of them brought bread; others carried tools, blankets or letters for their cousins.\n"
    "A child asked whether the bridge would hold. Her mother smiled and told her to have patience.\n"
    "By evening most visitors had gone home! Write to mayor@town.example or ask 8.8.8.8 about it.\n"
)
GERMAN = (
    "Der Fluss stieg in der Nacht über die Ufer und niemand wusste warum das geschah, weil alle Leute im Dorf "
    "schliefen, außer dem alten Müller, der jeden Abend lange wach blieb und auf das Wasser hörte, bis endlich am "
    "frühen Morgen die ersten Nachbarn kamen, um ihm zu helfen, die Säcke mit Mehl auf den Hügel zu tragen."
)
CODE = '"""Add numbers."""\n\n\ndef add(first: int, second: int) -> int:\n    return first + second\n'


def bronze_row(source_id: str, content: str, kind: str = "text", **more: Any) -> dict[str, Any]:
    row: dict[str, Any] = dict.fromkeys(BRONZE_DOCUMENTS.schema.names)
    row |= {
        "document_id": hashlib.sha256(f"s\0{source_id}".encode()).hexdigest(),
        "source": "s",
        "source_id": source_id,
        "kind": kind,
        "content": content,
        "content_sha256": hashlib.sha256(content.encode()).hexdigest(),
        "run_id": "r",
    }
    return row | more


def write_bronze(spark: SparkSession, lake: str, rows: list[dict[str, Any]]) -> None:
    ensure(spark, lake, BRONZE_DOCUMENTS)
    names = BRONZE_DOCUMENTS.schema.names
    frame = spark.createDataFrame([tuple(r[n] for n in names) for r in rows], spark_schema(BRONZE_DOCUMENTS.schema))
    sync(spark, lake, BRONZE_DOCUMENTS, frame)


def silver_rows(spark: SparkSession, lake: str) -> dict[str, Any]:
    return {r["source_id"]: r for r in read(spark, lake, SILVER_DOCUMENTS).collect()}


@pytest.fixture
def rows() -> list[dict[str, Any]]:
    return [
        bronze_row("good.txt", "\ufeff" + PROSE.replace("\n", "\r\n")),
        bronze_row("short.txt", "Too short { lorem ipsum"),
        bronze_row("empty.txt", ""),
        bronze_row("repeated.txt", "the same line of words again and again\n" * 40),
        bronze_row("german.txt", GERMAN),
        bronze_row("pkg/LICENSE", "GNU GENERAL PUBLIC LICENSE\nVersion 3, 29 June 2007"),
        bronze_row("pkg/deep/a.py", CODE, "code"),
        bronze_row("pkg/deep/b.py", "# SPDX-License-Identifier: MIT\n" + CODE, "code"),
        bronze_row("other/c.py", CODE, "code", license_declared="Apache-2.0"),
        bronze_row("other/empty.py", "", "code"),
        bronze_row("call.html", "<p>Call +1 718 575 1816 with AKIAIOSFODNN7EXAMPLE.</p>", "code"),
    ]


def test_clean_judges_every_document(spark: SparkSession, lake: str, rows: list[dict[str, Any]]) -> None:
    write_bronze(spark, lake, rows)
    result = run(spark, lake, CleanConfig(), run_id="r1")
    silver = silver_rows(spark, lake)
    assert (
        len(silver) == len(rows) == result.counts["documents"] == result.counts["accepted"] + result.counts["rejected"]
    )

    good = silver["good.txt"]
    assert good["text"] == PROSE.replace("mayor@town.example", "<EMAIL>").replace("8.8.8.8", "<IP>")
    assert good["redactions"] == {"email": 1, "ip": 1}
    assert good["text_sha256"] == hashlib.sha256(good["text"].encode()).hexdigest()
    assert (good["language"], good["rejected_by"], good["code_language"]) == ("en", [], None)
    assert good["signals"]["words"] > 50
    assert good["signals"]["max_line_length"] is None

    short = silver["short.txt"]["rejected_by"]
    assert {"gopher_quality.min_words", "c4.lorem_ipsum", "c4.curly_bracket"} <= set(short)
    assert silver["empty.txt"]["rejected_by"] == ["gopher_quality.min_words"]
    repetition = {"gopher_repetition.dup_line_frac", "gopher_repetition.dup_10_gram", "fineweb.char_dup_ratio"}
    assert repetition <= set(silver["repeated.txt"]["rejected_by"])
    assert (silver["german.txt"]["language"], silver["german.txt"]["rejected_by"]) == ("de", [])

    assert (silver["pkg/deep/a.py"]["license"], silver["pkg/deep/a.py"]["license_class"]) == (
        "GPL-3.0-only",
        "copyleft",
    )
    assert silver["pkg/deep/a.py"]["rejected_by"] == ["license.copyleft"]
    assert (silver["pkg/deep/b.py"]["license"], silver["pkg/deep/b.py"]["rejected_by"]) == ("MIT", [])
    assert (silver["other/c.py"]["license"], silver["other/c.py"]["code_language"]) == ("Apache-2.0", "python")
    assert silver["other/c.py"]["signals"]["words"] is None
    assert silver["call.html"]["rejected_by"] == ["code.visible_characters"]
    assert silver["call.html"]["redactions"] == {"phone": 1, "secret": 1}
    assert "code.alphanumeric_frac" in silver["other/empty.py"]["rejected_by"]


def test_clean_again_commits_nothing_and_follows_changes(
    spark: SparkSession, lake: str, rows: list[dict[str, Any]]
) -> None:
    write_bronze(spark, lake, rows)
    first = run(spark, lake, CleanConfig(), run_id="r1")
    second = run(spark, lake, CleanConfig(), run_id="r2")
    assert second.outputs == first.outputs
    assert (second.counts["inserted"], second.counts["updated"], second.counts["deleted"]) == (0, 0, 0)
    write_bronze(spark, lake, [bronze_row("good.txt", PROSE + "One more line."), *rows[2:]])
    third = run(spark, lake, CleanConfig(), run_id="r3")
    assert (third.counts["inserted"], third.counts["updated"], third.counts["deleted"]) == (0, 1, 1)


def test_a_rule_table_of_ones_own(spark: SparkSession, lake: str, rows: list[dict[str, Any]]) -> None:
    write_bronze(spark, lake, rows[:2])
    rule = Rule(name="mine.long", signal="words", kind="text", max=20)
    run(spark, lake, CleanConfig(rules=(rule,)), run_id="r1")
    silver = silver_rows(spark, lake)
    assert (silver["good.txt"]["rejected_by"], silver["short.txt"]["rejected_by"]) == (["mine.long"], [])


def test_slices_do_not_change_the_rows(rows: list[dict[str, Any]]) -> None:
    inputs = [{**r, "license_nearest": None} for r in rows]
    batch = pa.RecordBatch.from_pylist(inputs)
    parts = list(slices(batch, "content", 300))
    assert sum(p.num_rows for p in parts) == len(rows)
    assert len(parts) > 1
    whole = clean_rows(batch.to_pydict(), CleanConfig())
    pieces = [clean_rows(p.to_pydict(), CleanConfig()) for p in parts]
    assert whole["text"] == [t for p in pieces for t in p["text"]]
    assert whole["signals"].to_pylist() == [s for p in pieces for s in p["signals"].to_pylist()]


def test_rules_are_checked() -> None:
    with pytest.raises(ValidationError, match="no signal 'wrds'"):
        Rule(name="a.b", signal="wrds", kind="text", max=1)
    with pytest.raises(ValidationError, match="neither min nor max"):
        Rule(name="a.b", signal="words", kind="text")
    rule = Rule(name="a.b", signal="words", kind="text", max=1)
    with pytest.raises(ValidationError, match="two rules are called"):
        CleanConfig(rules=(rule, rule))
