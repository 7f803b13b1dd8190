"""silver.documents -> silver.minhash and silver.duplicates: exact and near-duplicate clusters, and the one that stays.

Exact duplicates (equal text_sha256) collapse first; MinHash-LSH proposes pairs of distinct texts, their true Jaccard
similarity decides, and clusters are the connected components of the verified pairs. Documents of every verdict take
part; one document of a cluster is kept, by a total order that no run's clock or partitioning changes.

A run after the first looks at the documents that changed, the texts that share a bucket with them and the clusters of
all of these; the clusters of the rest cannot differ (``scope``).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pyarrow as pa
from pyspark.sql import Column, DataFrame, SparkSession, Window
from pyspark.sql import functions as F

from pipelines import lake as tables_of
from pipelines.batches import Batches
from pipelines.changes import Since, changes, keys, within
from pipelines.dedup.components import connected_components
from pipelines.dedup.config import DedupConfig
from pipelines.dedup.shingles import lsh, shingle_sets
from pipelines.lake import StageResult
from pipelines.tables import SILVER_DOCUMENTS, SILVER_DUPLICATES, SILVER_MINHASH


def run(spark: SparkSession, lake: str, config: DedupConfig, *, run_id: str, since: Since = None) -> StageResult:
    """Bring silver.minhash and silver.duplicates in line with silver.documents.

    since: the version of silver.documents that the last run by this configuration saw; None looks at every document.
    """
    version = tables_of.version(spark, lake, SILVER_DOCUMENTS)
    silver = tables_of.read(spark, lake, SILVER_DOCUMENTS, version)
    for table in (SILVER_MINHASH, SILVER_DUPLICATES):
        tables_of.ensure(spark, lake, table)
    changed = changes(spark, lake, SILVER_DOCUMENTS, since, version, "document_id", "text_sha256")

    copies = silver.select("document_id", "text_sha256")
    if changed is not None:
        copies = copies.join(F.broadcast(changed.select("text_sha256").distinct()), "text_sha256", "left_semi")
    # A text's copies are spoken for by the one with the least id.
    copies = copies.localCheckpoint()
    speakers = keys(copies.groupBy("text_sha256").agg(F.min("document_id").alias("document_id")))
    touched = None if changed is None else keys(changed.select("document_id").union(copies.select("document_id")))
    minhash = within(silver.select("document_id", "kind", "text"), speakers).mapInArrow(
        _lsh_batches(config), "document_id string, band int, bucket bigint"
    )
    hashed = tables_of.sync(spark, lake, SILVER_MINHASH, minhash, among=touched)

    minhash = tables_of.read(spark, lake, SILVER_MINHASH, hashed.version)
    previous = tables_of.read(spark, lake, SILVER_DUPLICATES).select("document_id", "cluster_id")
    looked_at = scope(minhash, previous, touched, speakers, config.bucket_limit)
    documents = within(
        silver.select(
            "document_id",
            "source",
            "text_sha256",
            F.length("text").alias("length"),
            (F.size("rejected_by") > 0).alias("rejected"),
        ),
        looked_at,
    ).persist()
    texts = documents.groupBy("text_sha256").agg(
        F.min("document_id").alias("speaker"), (F.count("*") > 1).alias("copied")
    )
    pairs, crowded = candidate_pairs(within(minhash, looked_at), config.bucket_limit)
    pairs = pairs.persist()
    edges = verify(silver, pairs, config).localCheckpoint()
    members = clusters(documents, texts, edges, config)
    # Checkpointed: what is written must not be read again from the table while it is written.
    duplicates = keep_cluster_ids(members, within(previous, looked_at)).localCheckpoint()
    written = tables_of.sync(spark, lake, SILVER_DUPLICATES, duplicates, among=looked_at)

    totals = (
        tables_of.read(spark, lake, SILVER_DUPLICATES, written.version)
        .agg(
            F.count("*"),
            F.count_if("kept"),
            F.count_if(F.col("method") == "exact"),
            F.count_if(F.col("method") == "near"),
        )
        .first()
    )
    texts_held = silver.agg(F.count("*"), F.count_distinct("text_sha256")).first()
    assert totals is not None
    assert texts_held is not None
    counts = {
        "documents": int(texts_held[0]),
        "distinct_texts": int(texts_held[1]),
        "documents_looked_at": documents.count(),
        "candidate_pairs": pairs.count(),
        "near_pairs": edges.count(),
        "clusters": int(totals[1]),
        "members": int(totals[0]),
        "members_exact": int(totals[2]),
        "members_near": int(totals[3]),
        "duplicates": int(totals[0]) - int(totals[1]),
        "crowded_buckets": crowded.count(),
    }
    for cached in (documents, pairs):
        cached.unpersist()
    return StageResult(
        counts=counts,
        inputs={SILVER_DOCUMENTS.name: version or 0},
        outputs={SILVER_MINHASH.name: hashed.version, SILVER_DUPLICATES.name: written.version},
    )


def scope(
    minhash: DataFrame, previous: DataFrame, touched: DataFrame | None, speakers: DataFrame | None, limit: int
) -> DataFrame | None:
    """document_id of the documents whose cluster may differ; None: all.

    touched: documents that changed and all copies of their texts, before and after. speakers: those texts' own rows of
    silver.minhash. A cluster is looked at whole: where a member left, what is left of it may fall apart. So is one that
    is named after a document looked at, which might become another cluster's member.
    """
    if touched is None or speakers is None:
        return None
    met = within(minhash, speakers).select("band", "bucket").distinct()
    shared = minhash.join(met, ["band", "bucket"]).groupBy("band", "bucket")
    sized = shared.agg(F.count("*").alias("size"), F.min("document_id").alias("centre"))
    near = minhash.join(sized, ["band", "bucket"]).where(
        (F.col("size") <= limit) | (F.col("document_id") == F.col("centre"))
    )
    anchors = keys(touched.union(near.select("document_id")))
    by_member = within(previous, anchors).select("cluster_id")
    by_name = within(previous, anchors, "cluster_id").select("cluster_id")
    named = keys(by_member.union(by_name), "cluster_id")
    assert anchors is not None
    return keys(anchors.union(within(previous, named, "cluster_id").select("document_id")))


def candidate_pairs(minhash: DataFrame, limit: int) -> tuple[DataFrame, DataFrame]:
    """(pairs (a, b) with a < b, each once; the buckets of more than ``limit`` texts).

    A crowded bucket gives edges to its centre, the least id, only: its pairs would grow with the square of its size.
    """
    buckets = minhash.groupBy("band", "bucket").agg(F.count("*").alias("size"), F.min("document_id").alias("centre"))
    shared = minhash.join(buckets.where("size > 1"), ["band", "bucket"])
    here = shared.where(F.col("size") <= limit).select("band", "bucket", F.col("document_id").alias("a"))
    there = here.select("band", "bucket", F.col("a").alias("b"))
    every = here.join(there, ["band", "bucket"]).where("a < b").select("a", "b")
    star = shared.where((F.col("size") > limit) & (F.col("document_id") != F.col("centre")))
    pairs = every.union(star.select(F.col("centre").alias("a"), F.col("document_id").alias("b"))).distinct()
    return pairs, buckets.where(F.col("size") > limit)


def verify(silver: DataFrame, pairs: DataFrame, config: DedupConfig) -> DataFrame:
    """pairs (a, b) -> (a, b, similarity): those whose shingle sets' true Jaccard similarity reaches the threshold."""
    named = keys(pairs.select(F.col("a").alias("document_id")).union(pairs.select("b")))
    sets = within(silver.select("document_id", "kind", "text"), named)
    sets = sets.mapInArrow(_set_batches(config.shingle), "document_id string, shingles array<bigint>").persist()
    joined = pairs.join(sets.select(F.col("document_id").alias("a"), F.col("shingles").alias("x")), "a").join(
        sets.select(F.col("document_id").alias("b"), F.col("shingles").alias("y")), "b"
    )
    # Sets whose sizes differ too much cannot reach the threshold: their elements are not compared.
    sized = joined.where(F.least(F.size("x"), F.size("y")) >= config.threshold * F.greatest(F.size("x"), F.size("y")))
    common = F.size(F.array_intersect("x", "y"))
    similarity: Column = common / (F.size("x") + F.size("y") - common)
    return sized.select("a", "b", similarity.alias("similarity")).where(F.col("similarity") >= config.threshold)


def clusters(documents: DataFrame, texts: DataFrame, edges: DataFrame, config: DedupConfig) -> DataFrame:
    """Members of clusters of two and more: (document_id, least, method, similarity, kept); least names the cluster."""
    components = connected_components(edges).withColumnRenamed("node", "speaker")
    both = edges.select(F.col("a").alias("speaker"), "similarity").union(edges.select("b", "similarity"))
    nearest = both.groupBy("speaker").agg(F.max("similarity").alias("nearest"))
    known = texts.join(components, "speaker", "left").join(nearest, "speaker", "left")
    members = (
        documents.join(known.where("copied OR component IS NOT NULL"), "text_sha256")
        .withColumn("least", F.coalesce("component", "speaker"))
        .withColumn("method", F.when(F.col("copied"), "exact").otherwise("near"))
        .withColumn("similarity", F.when(F.col("copied"), 1.0).otherwise(F.col("nearest")))
    )
    priority = F.lit(len(config.source_priority))
    for rank, source in reversed(list(enumerate(config.source_priority))):
        priority = F.when(F.col("source") == source, rank).otherwise(priority)
    order = F.struct("rejected", priority.alias("priority"), (-F.col("length")).alias("shortness"), "document_id")
    best = members.groupBy("least").agg(F.min(order).alias("best"))
    return members.join(best, "least").select(
        "document_id",
        "least",
        "method",
        "similarity",
        (F.col("document_id") == F.col("best.document_id")).alias("kept"),
    )


def keep_cluster_ids(members: DataFrame, previous: DataFrame) -> DataFrame:
    """Rows of silver.duplicates: a cluster keeps the least id that it has ever had, whoever left it since.

    previous: (document_id, cluster_id) before. An id that is now a member of another cluster is that one's to have; of
    the parts of a cluster that fell apart the one with the least member keeps its id. The others are called by their
    own least member, so that no two clusters share an id.
    """
    had = members.select("document_id", "least").join(previous, "document_id").select("least", "cluster_id").distinct()
    owner = members.select(F.col("document_id").alias("cluster_id"), F.col("least").alias("owner"))
    free = had.join(owner, "cluster_id", "left").where("owner IS NULL OR owner = least")
    claims = free.groupBy("least").agg(F.min("cluster_id").alias("before"))
    claim = members.select("least").distinct().join(claims, "least", "left")
    claim = claim.withColumn("claim", F.least("least", "before"))
    first = F.min("least").over(Window.partitionBy("claim")) == F.col("least")
    names = claim.withColumn("cluster_id", F.when(first, F.col("claim")).otherwise(F.col("least")))
    joined = members.join(names.select("least", "cluster_id"), "least")
    return joined.select("document_id", "cluster_id", "method", "similarity", "kept")


def _lsh_batches(config: DedupConfig) -> Callable[[Batches], Batches]:
    size, bands, rows = config.shingle, config.bands, config.rows

    def batches(incoming: Batches) -> Batches:
        for batch in incoming:
            having, buckets = lsh(batch["text"], _is_code(batch), size=size, bands=bands, rows=rows)
            ids = batch["document_id"].take(pa.array(np.repeat(having, bands)))
            band = pa.array(np.tile(np.arange(bands, dtype=np.int32), len(having)))
            yield pa.RecordBatch.from_arrays([ids, band, pa.array(buckets.ravel())], ["document_id", "band", "bucket"])

    return batches


def _set_batches(size: int) -> Callable[[Batches], Batches]:
    def batches(incoming: Batches) -> Batches:
        for batch in incoming:
            sets = shingle_sets(batch["text"], _is_code(batch), size)
            offsets = np.concatenate([[0], np.cumsum([len(s) for s in sets])]).astype(np.int32)
            values = pa.array(np.concatenate([*sets, np.empty(0, np.uint64)]).view(np.int64))
            lists = pa.ListArray.from_arrays(pa.array(offsets), values)
            yield pa.RecordBatch.from_arrays([batch["document_id"], lists], ["document_id", "shingles"])

    return batches


def _is_code(batch: pa.RecordBatch) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    return np.asarray(batch["kind"].to_numpy(zero_copy_only=False) == "code")
