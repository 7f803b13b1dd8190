"""The dedup stage on small lakes: clusters, the kept document, and what a second run does."""

from __future__ import annotations

import hashlib
import itertools
import random
from typing import TYPE_CHECKING, Any

import pytest

from pipelines import lake as tables_of
from pipelines.dedup.components import connected_components
from pipelines.dedup.config import DedupConfig
from pipelines.dedup.stage import run
from pipelines.tables import SILVER_DOCUMENTS, SILVER_DUPLICATES, SILVER_MINHASH

if TYPE_CHECKING:
    from pyspark.sql import SparkSession


def silver_row(name: str, text: str, kind: str = "text", source: str = "s", rejected: tuple[str, ...] = ()) -> Any:
    return {
        "document_id": name,
        "source": source,
        "source_id": name,
        "kind": kind,
        "text": text,
        "rejected_by": list(rejected),
        "text_sha256": hashlib.sha256(text.encode()).hexdigest(),
    }


def write_silver(spark: SparkSession, lake: str, rows: list[Any]) -> None:
    from pyspark.sql import functions as F

    tables_of.ensure(spark, lake, SILVER_DOCUMENTS)
    schema = (
        "document_id string, source string, source_id string, kind string, text string, rejected_by array<string>, "
        "text_sha256 string"
    )
    df = spark.createDataFrame(rows, schema)
    for field in tables_of.spark_schema(SILVER_DOCUMENTS.schema):
        if field.name not in df.columns:
            df = df.withColumn(field.name, F.lit(None).cast(field.dataType))
    tables_of.sync(spark, lake, SILVER_DOCUMENTS, df)


def prose(seed: int, words: int = 200) -> list[str]:
    rng = random.Random(seed)
    return [f"w{rng.randrange(5000)}" for _ in range(words)]


def clusters_of(spark: SparkSession, lake: str) -> dict[str, dict[str, Any]]:
    return {r["document_id"]: r.asDict() for r in tables_of.read(spark, lake, SILVER_DUPLICATES).collect()}


@pytest.mark.slow
def test_clusters_kept_and_second_run(spark: SparkSession, lake: str) -> None:
    base = prose(1)
    near = [*base[:100], "changed", *base[101:]]
    far = [*base[:100], *prose(2, 100)]
    other = prose(3)
    rows = [
        silver_row("a", " ".join(base)),
        silver_row("b", " ".join(base)),
        silver_row("c", " ".join([*near, "longest"]), rejected=("gopher_quality.stop_words",)),
        silver_row("d", " ".join(far)),
        silver_row("e", " ".join(other), source="low"),
        silver_row("f", "  ".join(other), source="high"),
        silver_row("g", "def f(x):\n    return x", kind="code"),
        silver_row("h", ""),
        silver_row("i", ""),
    ]
    config = DedupConfig(source_priority=("high",))
    write_silver(spark, lake, rows[:1] + rows[2:])
    first = run(spark, lake, config, run_id="r0")
    assert first.counts["members"] == 6
    write_silver(spark, lake, rows)
    result = run(spark, lake, config, run_id="r1")
    found = clusters_of(spark, lake)
    assert {k: v["cluster_id"] for k, v in found.items()} == {
        "a": "a", "b": "a", "c": "a", "e": "e", "f": "e", "h": "h", "i": "h"
    }  # fmt: skip
    assert {k for k, v in found.items() if v["kept"]} == {"a", "f", "h"}
    assert [found[k]["method"] for k in "abcef"] == ["exact", "exact", "near", "near", "near"]
    assert found["a"]["similarity"] == 1.0
    assert found["c"]["similarity"] == pytest.approx(191 / 202)
    assert result.counts["documents"] == 9
    assert result.counts["distinct_texts"] == 7
    assert result.counts["clusters"] == 3
    assert result.counts["duplicates"] == 4
    again = run(spark, lake, config, run_id="r2")
    assert again.outputs == result.outputs
    assert again.counts == result.counts

    # The least member goes; the cluster keeps its name and another is kept.
    write_silver(spark, lake, rows[1:])
    run(spark, lake, config, run_id="r3")
    found = clusters_of(spark, lake)
    assert {k: (v["cluster_id"], v["kept"]) for k, v in found.items() if k in "abcd"} == {
        "b": ("a", True),
        "c": ("a", False),
    }


@pytest.mark.slow
def test_crowded_bucket_meets_at_its_centre(spark: SparkSession, lake: str) -> None:
    base = prose(1, 400)
    rows = [silver_row(f"d{i:02}", " ".join([*base, f"end{i}"])) for i in range(12)]
    write_silver(spark, lake, rows)
    result = run(spark, lake, DedupConfig(bucket_limit=4), run_id="r")
    assert result.counts["crowded_buckets"] > 0
    assert result.counts["candidate_pairs"] < 66
    assert result.counts["clusters"] == 1
    assert result.counts["members"] == 12
    bands = tables_of.read(spark, lake, SILVER_MINHASH).count()
    assert bands == 12 * 14


def test_components_are_those_of_union_find(spark: SparkSession) -> None:
    rng = random.Random(5)
    nodes = [f"n{i:03}" for i in range(120)]
    chain = nodes[:30]
    rng.shuffle(chain)
    edges = list(itertools.pairwise(chain)) + [(rng.choice(nodes[30:]), rng.choice(nodes[30:])) for _ in range(60)]
    parent = {n: n for n in nodes}

    def find(n: str) -> str:
        while parent[n] != n:
            n = parent[n]
        return n

    for a, b in edges:
        x, y = sorted((find(a), find(b)))
        parent[y] = x
    joined = {n for a, b in edges for n in (a, b) if a != b}
    result = connected_components(spark.createDataFrame(edges, "a string, b string")).collect()
    assert {r["node"]: r["component"] for r in result} == {n: find(n) for n in joined}
    assert len(result) == len(joined)


def test_no_edges_no_components(spark: SparkSession) -> None:
    assert connected_components(spark.createDataFrame([], "a string, b string")).isEmpty()
