"""A few documents to look at: kept ones, what each rule rejects, and the members of the largest clusters of duplicates.

Which ones is decided by the hash of their ids, so that a report of the same lake shows the same. Only the beginning of
a text comes to the driver. A report keeps what it shows: an erased document stays in pages made before its erasure.
"""

from __future__ import annotations

from collections.abc import Iterable

from pyspark.sql import DataFrame, Row, Window
from pyspark.sql import functions as F

from pipelines.report import facts
from pipelines.report.lineage import MOST_ROWS, Lake
from pipelines.tables import KINDS, SILVER_DOCUMENTS, SILVER_DUPLICATES

EACH = 2  # documents a rule
KEPT = 3  # a kind
CLUSTERS, MEMBERS = 5, 3
CHARACTERS = 300  # of a text


def samples(lake: Lake, judged: DataFrame) -> tuple[tuple[facts.Samples, ...], tuple[facts.Cluster, ...]]:
    """Of documents by kind (kept) and by rule (rejected), and of the largest clusters; `judged` is figures' frame."""
    group = F.when(F.size("rejected_by") > 0, F.col("rejected_by")).when(F.col("kept"), F.array("kind"))
    named = judged.select("document_id", "accepted", F.explode(group).alias("name"))
    order = Window.partitionBy("accepted", "name").orderBy(F.xxhash64("document_id"), "document_id")
    # The first bound is a number, by which Spark cuts each task's part down before it brings a name's rows together.
    chosen = (
        named.withColumn("place", F.row_number().over(order))
        .where(F.col("place") <= max(KEPT, EACH))
        .where(F.col("accepted") | (F.col("place") <= EACH))
    )
    picked = chosen.orderBy(F.desc("accepted"), "name", "place").head(MOST_ROWS)
    clusters = _largest(lake)
    texts = _texts(lake, {row.document_id for row in [*picked, *clusters]})

    groups: dict[tuple[bool, str], list[facts.Sample]] = {}
    for row in picked:
        groups.setdefault((row.accepted, row.name), []).append(texts[row.document_id])
    kept = [facts.Samples(name=kind, kept=True, samples=tuple(groups.get((True, kind), ()))) for kind in KINDS]
    rejected = [facts.Samples(name=n, kept=False, samples=tuple(s)) for (ok, n), s in groups.items() if not ok]
    return tuple(group for group in [*kept, *rejected] if group.samples), _by_cluster(clusters, texts)


def _largest(lake: Lake) -> list[Row]:
    """Of the largest clusters the first members, the one that is kept before the others."""
    duplicates = lake.read(SILVER_DUPLICATES)
    if duplicates is None:
        return []
    sizes = duplicates.groupBy("cluster_id").agg(F.count("*").alias("members"))
    largest = sizes.orderBy(F.desc("members"), "cluster_id").limit(CLUSTERS)
    order = Window.partitionBy("cluster_id").orderBy(F.desc("kept"), F.xxhash64("document_id"), "document_id")
    first = duplicates.join(F.broadcast(largest), "cluster_id").withColumn("place", F.row_number().over(order))
    shown = first.where(F.col("place") <= MEMBERS).orderBy(F.desc("members"), "cluster_id", "place")
    return shown.select("cluster_id", "members", "document_id", "method", "kept").head(CLUSTERS * MEMBERS)


def _by_cluster(rows: Iterable[Row], texts: dict[str, facts.Sample]) -> tuple[facts.Cluster, ...]:
    clusters: dict[str, list[Row]] = {}
    for row in rows:
        clusters.setdefault(row.cluster_id, []).append(row)
    return tuple(
        facts.Cluster(
            members=own[0].members,
            shown=tuple((row.method, row.kept, texts[row.document_id]) for row in own if row.document_id in texts),
        )
        for own in clusters.values()
    )


def _texts(lake: Lake, ids: set[str]) -> dict[str, facts.Sample]:
    silver = lake.read(SILVER_DOCUMENTS)
    assert silver is not None
    wanted = silver.where(F.col("document_id").isin(sorted(ids))).select(
        "document_id",
        "source",
        "source_id",
        F.length("text").alias("characters"),
        F.substring("text", 1, CHARACTERS).alias("beginning"),
    )
    return {row.document_id: facts.Sample(**row.asDict()) for row in wanted.head(len(ids))} if ids else {}
