"""Upkeep of one table's files: small ones made into large ones, and those of old versions removed.

Neither changes a row. After a vacuum the versions whose files it removed can no longer be read.
"""

from __future__ import annotations

from delta.tables import DeltaTable
from pyspark.sql import SparkSession

from pipelines.tables import Table

_CHECK = "spark.databricks.delta.retentionDurationCheck.enabled"


def optimize(spark: SparkSession, lake: str, table: Table) -> tuple[int, int]:
    """Compact the table; (files removed from its newest version, files put in their place)."""
    row = DeltaTable.forPath(spark, table.uri(lake)).optimize().executeCompaction().first()
    metrics = row["metrics"] if row else None
    return (int(metrics["numFilesRemoved"]), int(metrics["numFilesAdded"])) if metrics else (0, 0)


def vacuum(spark: SparkSession, lake: str, table: Table, retention_hours: float) -> None:
    """Remove the files that no version of the last hours holds, those of the change feed too."""
    before = spark.conf.get(_CHECK, "true")
    spark.conf.set(_CHECK, "false")  # the job has looked at who still needs the old versions
    try:
        DeltaTable.forPath(spark, table.uri(lake)).vacuum(retention_hours)
    finally:
        spark.conf.set(_CHECK, str(before))
