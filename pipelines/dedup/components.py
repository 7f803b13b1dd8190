"""Connected components in Spark SQL: alternating large-star and small-star until every component is a star.

Kiveris, Lattanzi, Mirrokni, Rastogi and Vassilvitskii, "Connected Components in MapReduce and Beyond" (SoCC 2014):
O(log^2 n) rounds, each of which keeps the number of edges. Nodes are strings; a component's name is its least node.
"""

from __future__ import annotations

from pyspark.sql import DataFrame, Window
from pyspark.sql import functions as F

MAX_ROUNDS = 100


def connected_components(edges: DataFrame) -> DataFrame:
    """edges (a, b), any direction, repeats allowed -> (node, component): every node that has an edge, once.

    The lineage is cut in each round by localCheckpoint: without it the plan doubles a round.
    """
    # Edges go from the larger node to the smaller: (v, u) with v > u.
    stars = edges.where("a <> b").select(F.greatest("a", "b").alias("v"), F.least("a", "b").alias("u")).distinct()
    stars = stars.localCheckpoint()
    for _ in range(MAX_ROUNDS):
        if _are_stars(stars):
            leaves = stars.select(F.col("v").alias("node"), F.col("u").alias("component"))
            return leaves.union(stars.select("u", "u")).distinct()
        stars = _small_star(_large_star(stars)).localCheckpoint()
    raise AssertionError(f"connected components did not settle in {MAX_ROUNDS} rounds")


def _large_star(edges: DataFrame) -> DataFrame:
    """Every node joins its larger neighbours to the least of its neighbours and itself."""
    both = edges.select("v", "u").union(edges.select("u", "v"))
    least = F.least("v", F.min("u").over(Window.partitionBy("v")))
    return both.withColumn("least", least).where("u > v").select(F.col("u").alias("v"), F.col("least").alias("u"))


def _small_star(edges: DataFrame) -> DataFrame:
    """Every node joins its smaller neighbours and itself to the least of them."""
    least = edges.withColumn("least", F.min("u").over(Window.partitionBy("v")))
    joined = least.where("u <> least").select(F.col("u").alias("v"), F.col("least").alias("u"))
    return joined.union(least.select("v", "least")).distinct()


def _are_stars(edges: DataFrame) -> bool:
    """Whether every node is a centre or the leaf of one centre."""
    nodes = edges.select(F.col("v").alias("node"), F.lit(1).alias("out"), F.lit(0).alias("into")).union(
        edges.select("u", F.lit(0), F.lit(1))
    )
    degrees = nodes.groupBy("node").agg(F.sum("out").alias("out"), F.max("into").alias("into"))
    return degrees.where("out > 1 OR (out = 1 AND into = 1)").isEmpty()
