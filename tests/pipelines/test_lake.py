"""A sync makes the table equal, once, in one commit, and leaves everything else alone."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest
from py4j.protocol import Py4JJavaError
from pyspark.sql import SparkSession

from pipelines import lake as lakes
from pipelines.errors import LakeError
from pipelines.tables import GOLD_TOKENS, SIGNALS, SILVER_DOCUMENTS, SILVER_DUPLICATES, TABLES

SCHEMA = "document_id string, cluster_id string, method string, similarity double, kept boolean"


def test_every_table_can_be_made_and_made_again(spark: SparkSession, lake: str) -> None:
    for table in TABLES.values():
        lakes.ensure(spark, lake, table)
        first = lakes.version(spark, lake, table)
        lakes.ensure(spark, lake, table)
        assert lakes.version(spark, lake, table) == first
        log = Path(table.uri(lake), "_delta_log", "00000000000000000000.json").read_text()
        protocol = next(json.loads(line) for line in log.splitlines() if '"protocol"' in line)["protocol"]
        assert protocol["minReaderVersion"] == 1


def test_sync_commits_only_differences(spark: SparkSession, lake: str) -> None:
    table = SILVER_DUPLICATES
    lakes.ensure(spark, lake, table)
    rows = [("a", "a", "exact", 1.0, True), ("b", "a", "exact", 1.0, False), ("c", "c", "near", 0.9, True)]
    first = lakes.sync(spark, lake, table, spark.createDataFrame(rows, SCHEMA))
    assert (first.inserted, first.updated, first.deleted) == (3, 0, 0)
    again = lakes.sync(spark, lake, table, spark.createDataFrame(rows[::-1], SCHEMA))
    assert (again.total, again.version) == (0, first.version)
    other = [("a", "a", "exact", 1.0, False), ("b", "a", "exact", 1.0, False), ("d", "d", "near", 0.8, True)]
    third = lakes.sync(spark, lake, table, spark.createDataFrame(other, SCHEMA))
    assert (third.inserted, third.updated, third.deleted, third.version) == (1, 1, 1, first.version + 1)
    assert sorted(tuple(r) for r in lakes.read(spark, lake, table).collect()) == other


def test_spark_lets_a_written_table_go(spark: SparkSession, lake: str) -> None:
    """What Spark keeps of queries that have ended is kept for the session's life, plans and all."""

    def kept() -> int:
        return int(spark.sparkContext._jsc.sc().dagScheduler().activeQueryToJobs().size())

    before = kept()
    lakes.ensure(spark, lake, SILVER_DUPLICATES)
    lakes.sync(spark, lake, SILVER_DUPLICATES, spark.createDataFrame([("a", "a", "near", None, True)], SCHEMA))
    until = time.monotonic() + 60  # the scheduler forgets in its own time
    while kept() > before and time.monotonic() < until:
        time.sleep(0.1)
    assert kept() <= before


def test_sync_leaves_rows_outside_the_scope(spark: SparkSession, lake: str) -> None:
    table = SILVER_DUPLICATES
    lakes.ensure(spark, lake, table)
    lakes.sync(spark, lake, table, spark.createDataFrame([("a", "a", "near", None, True)], SCHEMA))
    empty = spark.createDataFrame([], SCHEMA)
    assert lakes.sync(spark, lake, table, empty, scope="method = 'exact'").total == 0
    assert lakes.sync(spark, lake, table, empty, delete=False).total == 0
    assert lakes.sync(spark, lake, table, empty, scope="method = 'near'").deleted == 1


def test_a_value_outside_the_contract_is_not_written(spark: SparkSession, lake: str) -> None:
    lakes.ensure(spark, lake, GOLD_TOKENS)
    schema = lakes.spark_schema(GOLD_TOKENS.schema)
    row = {**dict.fromkeys(schema.names), "document_id": "a", "tokenizer_id": "t", "kind": "text", "split": "train"}
    row |= {"source": "s", "token_count": 0, "tokens": b""}
    lakes.sync(spark, lake, GOLD_TOKENS, spark.createDataFrame([row], schema))
    wrong = spark.createDataFrame([row | {"split": "test"}, row | {"document_id": "b"}], schema)
    with pytest.raises(Py4JJavaError, match="CHECK constraint"):
        lakes.sync(spark, lake, GOLD_TOKENS, wrong)
    assert [r["split"] for r in lakes.read(spark, lake, GOLD_TOKENS).collect()] == ["train"]


def test_a_missing_table_is_named(spark: SparkSession, lake: str) -> None:
    with pytest.raises(LakeError, match=r"silver.duplicates is not in .*: run lakemoe dedup first"):
        lakes.read(spark, lake, SILVER_DUPLICATES)


def test_a_table_of_another_version_is_named(spark: SparkSession, lake: str) -> None:
    at = SILVER_DOCUMENTS.schema.get_field_index("signals")
    fewer = pa.field("signals", pa.struct([SIGNALS.field(i) for i in range(SIGNALS.num_fields - 1)]))
    lakes.ensure(spark, lake, replace(SILVER_DOCUMENTS, schema=SILVER_DOCUMENTS.schema.set(at, fewer)))
    last = SIGNALS.field(SIGNALS.num_fields - 1).name
    with pytest.raises(LakeError, match=rf"silver.documents at .* has no column 'signals.{last}'"):
        lakes.ensure(spark, lake, SILVER_DOCUMENTS)


def test_a_kill_before_the_first_commit_leaves_nothing_in_the_way(spark: SparkSession, lake: str) -> None:
    Path(SILVER_DUPLICATES.uri(lake), "_delta_log").mkdir(parents=True)
    assert not lakes.exists(spark, lake, SILVER_DUPLICATES)
    lakes.ensure(spark, lake, SILVER_DUPLICATES)
    assert lakes.version(spark, lake, SILVER_DUPLICATES) is not None


@pytest.mark.parametrize("name", ["./lake", "lake", "a b/lake", "[1]{2}/la*k?e^"])
def test_a_lake_may_be_a_relative_path(
    spark: SparkSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    lakes.ensure(spark, name, SILVER_DUPLICATES)
    change = lakes.sync(spark, name, SILVER_DUPLICATES, spark.createDataFrame([("a", "a", "exact", 1.0, True)], SCHEMA))
    assert change.inserted == 1
    assert lakes.read(spark, name, SILVER_DUPLICATES).count() == 1
    assert (tmp_path / name / "silver" / "duplicates" / "_delta_log").is_dir()
