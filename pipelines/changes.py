"""What changed in a table between two versions, from its change data feed, and how a stage looks at that alone.

A stage recomputes the rows of the keys that changed, from its inputs as they are now, and ``lake.sync`` brings those
keys of its output in line: new, changed and erased documents take one way. The feed is read by versions, in one batch;
which version was the last one seen is the caller's to know (jobs.runs has it). Where the feed cannot tell, because
nothing was seen yet, the table was restored to an older version or its old files are vacuumed, the stage looks at
everything, which gives the same tables.

Left out: Structured Streaming. Its checkpoint is a second record of what was done, which can differ from the table's,
and a stage that follows two tables would need two queries.

Delta protocol, "Change Data Files"; Delta Lake documentation, "Use Delta Lake change data feed".
"""

from __future__ import annotations

from collections.abc import Mapping

from py4j.protocol import Py4JJavaError
from pyspark.errors import PySparkException
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from pipelines.tables import Table

# The versions of a stage's inputs that its last run saw, by the tables' names; None: it has seen nothing.
Since = Mapping[str, int] | None

# Keys up to which they are sent to every core, so that the rows that they pick are never shuffled (64 MB of them).
BROADCAST_ROWS = 500_000


def changes(
    spark: SparkSession, lake: str, table: Table, since: Since, now: int | None, *columns: str
) -> DataFrame | None:
    """The distinct values of the columns, before and after, in rows that changed after the version last seen.

    None: look at everything. The result is held by Spark, so that it can be used again and costs its size once.
    """
    seen = (since or {}).get(table.name)
    if seen is None or now is None or seen > now:
        return None
    reader, uri = spark.read.format("delta"), table.uri(lake)
    if seen == now:
        return spark.createDataFrame([], reader.load(uri).select(*columns).schema)
    feed = reader.options(readChangeFeed=True, startingVersion=seen + 1, endingVersion=now)
    try:
        return feed.load(uri).select(*columns).distinct().localCheckpoint()
    except (PySparkException, Py4JJavaError):
        # Delta names a vacuumed file in one of several ways, by where it notices.
        return None


def keys(frame: DataFrame | None, column: str = "document_id") -> DataFrame | None:
    """The frame's distinct values of the column, as column ``document_id``, ready for ``within``."""
    if frame is None:
        return None
    found = frame.select(F.col(column).alias("document_id")).where("document_id IS NOT NULL").distinct()
    found = found.localCheckpoint()
    return F.broadcast(found) if found.count() <= BROADCAST_ROWS else found


def within(frame: DataFrame, wanted: DataFrame | None, column: str = "document_id") -> DataFrame:
    """The frame's rows whose column is one of the keys; all where ``wanted`` is None."""
    if wanted is None:
        return frame
    return frame.join(wanted.withColumnRenamed("document_id", column), column, "left_semi")


def without(frame: DataFrame, unwanted: DataFrame, column: str = "document_id") -> DataFrame:
    """The frame's rows whose column is none of the keys."""
    return frame.join(unwanted.withColumnRenamed("document_id", column), column, "left_anti")
