"""Reading and writing the lake's Delta tables with Spark: create, read, and make a table equal to a DataFrame.

``sync`` is the way a stage writes; ``revise`` sets columns and ``delete`` deletes rows by their keys. Each commits only
what differs, in one MERGE, and commits nothing when nothing differs: a run killed before the commit has changed
nothing, the next run finishes its work, and a second run over the same input adds no table version. Every commit
carries its run's id as ``userMetadata`` (``committing``), so that a table's history says which run wrote what.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import pyarrow as pa
from delta.tables import DeltaTable
from pyspark.sql import Column, DataFrame, Row, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.pandas.types import from_arrow_schema
from pyspark.sql.types import MapType, StructField, StructType

from pipelines.changes import within
from pipelines.errors import LakeError
from pipelines.tables import Table

# Who wrote a row and when is no part of what the row says.
NOT_COMPARED = ("run_id", "ingested_at", "at")
_OPERATION = "__operation"
_DESCRIPTION = "spark.job.description"
_USER_METADATA = "spark.databricks.delta.commitInfo.userMetadata"


@dataclass(frozen=True, kw_only=True)
class Change:
    """What one ``sync`` did: rows by operation, and the table's version after it."""

    inserted: int
    updated: int
    deleted: int
    version: int

    @property
    def total(self) -> int:
        return self.inserted + self.updated + self.deleted


@dataclass(frozen=True, kw_only=True)
class StageResult:
    """What a stage did: counts by name, and the versions of the tables (and files) that it read and wrote.

    unchanged: said by a stage that writes no table; of the others, the versions tell. notes: sentences for the user.
    failure: what the run fails with although its tables are written.
    """

    counts: dict[str, int]
    inputs: dict[str, int] = field(default_factory=dict)
    outputs: dict[str, int] = field(default_factory=dict)
    unchanged: bool = False
    notes: tuple[str, ...] = ()
    failure: LakeError | None = None


def spark_schema(schema: pa.Schema) -> StructType:
    """The Spark schema of an Arrow schema, column comments and NOT NULL included."""
    plain = from_arrow_schema(schema)
    fields = []
    for arrow, spark in zip(schema, plain.fields, strict=True):
        comment = (arrow.metadata or {}).get(b"comment", b"").decode()
        fields.append(
            StructField(spark.name, spark.dataType, arrow.nullable, {"comment": comment} if comment else None)
        )
    return StructType(fields)


def exists(spark: SparkSession, lake: str, table: Table) -> bool:
    """Whether the table is there."""
    return version(spark, lake, table) is not None


def version(spark: SparkSession, lake: str, table: Table) -> int | None:
    """The table's newest version; None where the table is absent.

    Asked of its log's file names (Delta protocol, "Delta Log Entries"): the history is a query of a tenth of a second,
    and a stage asks some ten times.
    """
    path, files = _files(spark, table.uri(lake))
    folder = re.sub(r"[]\\[{}*?]", r"\\\g<0>", _log(table.uri(lake)))
    commits = files.globStatus(path(f"{folder}/{'[0-9]' * 20}.json"))
    return int(commits[len(commits) - 1].getPath().getName().removesuffix(".json")) if commits else None


def ensure(spark: SparkSession, lake: str, table: Table) -> None:
    """Create the table where it is absent, with its schema, comments, partitions, constraints and properties.

    Raises LakeError when a table of another shape lies there.
    """
    uri = table.uri(lake)
    wanted = spark_schema(table.schema)
    if exists(spark, lake, table):
        found = set(_fields(spark.read.format("delta").load(uri).schema))
        if missing := [name for name in _fields(wanted) if name not in found]:
            raise LakeError(
                f"{table.name} at {uri} has no column {missing[0]!r}: it was written by another version of lakemoe; "
                "use the version that wrote it, or another --lake."
            )
        return
    _remove_log_without_commit(spark, uri)
    builder = DeltaTable.createIfNotExists(spark).location(uri).addColumns(wanted).comment(table.comment)
    for key, value in table.table_properties.items():
        builder = builder.property(key, value)
    # So they are there from the first commit; ALTER TABLE would be a second one, and read the table for it.
    for name, condition in table.constraints.items():
        builder = builder.property(f"delta.constraints.{name}", condition)
    if table.partition_by:
        builder = builder.partitionedBy(*table.partition_by)
    builder.execute()


def _fields(schema: StructType, prefix: str = "") -> Iterator[str]:
    """The columns' names, and by dotted names what structs hold."""
    for one in schema.fields:
        yield prefix + one.name
        if isinstance(one.dataType, StructType):
            yield from _fields(one.dataType, f"{prefix}{one.name}.")


def _log(uri: str) -> str:
    return f"{uri}/_delta_log"


def _files(spark: SparkSession, uri: str) -> tuple[Any, Any]:
    """Hadoop's class of paths, and the file system that the table is on."""
    jvm = spark._jvm
    assert jvm is not None
    path = jvm.org.apache.hadoop.fs.Path
    return path, path(uri).getFileSystem(spark.sparkContext._jsc.hadoopConfiguration())


def _remove_log_without_commit(spark: SparkSession, uri: str) -> None:
    """Remove the folder that a kill left between making the log and its first commit: Delta cannot create there.

    Looks for itself: what is deleted must not depend on a pattern.
    """
    path, files = _files(spark, uri)
    log = path(_log(uri))
    if files.exists(log) and not any(s.getPath().getName().endswith(".json") for s in files.listStatus(log)):
        files.delete(log, True)


def read(spark: SparkSession, lake: str, table: Table, version: int | None = None) -> DataFrame:
    """The table's rows, at a version or the newest.

    Raises LakeError (exit code 2) that names the missing table.
    """
    if not exists(spark, lake, table):
        raise LakeError(f"{table.name} is not in {lake}: run lakemoe {table.job} first, or name another --lake.", 2)
    reader = spark.read.format("delta")
    if version is not None:
        reader = reader.option("versionAsOf", version)
    return reader.load(table.uri(lake))


def few(frame: DataFrame) -> list[Row]:
    """The rows, at most 10,000, of an aggregate that has few of them however large the tables are.

    Not toLocalIterator: its jobs begin when the query has ended, and Spark (4.2) then keeps their plans for ever.
    """
    return frame.take(10_000)


@contextmanager
def committing(spark: SparkSession, run_id: str) -> Iterator[None]:
    """Delta commits made in the body carry the run's id as ``userMetadata``."""
    spark.conf.set(_USER_METADATA, run_id)
    try:
        yield
    finally:
        spark.conf.unset(_USER_METADATA)


@contextmanager
def _described(spark: SparkSession, what: str) -> Iterator[None]:
    """Spark's UI calls the queries of the body by the job's name and this."""
    context = spark.sparkContext
    before = context.getLocalProperty(_DESCRIPTION)
    context.setJobDescription(f"{before}: {what}" if before else what)
    try:
        yield
    finally:
        context.setLocalProperty(_DESCRIPTION, before)  # type: ignore[arg-type]


def sync(
    spark: SparkSession,
    lake: str,
    table: Table,
    df: DataFrame,
    *,
    scope: str | None = None,
    among: DataFrame | None = None,
    delete: bool = True,
) -> Change:
    """Make the table's rows equal to ``df`` by the table's key, in at most one commit.

    scope: a SQL condition on the table; rows outside it are left alone and ``df`` must lie inside it.
    among: keys of the rows that ``df`` speaks of (``changes.keys`` of the table's first key column); others are left
    alone.
    delete: whether rows of the scope that ``df`` lacks are deleted. Columns in NOT_COMPARED do not make a row differ.
    """
    key = list(table.key)
    names = table.schema.names
    target = DeltaTable.forPath(spark, table.uri(lake))
    old = target.toDF() if scope is None else target.toDF().where(scope)
    df = df.select(*names).persist()
    try:
        changes = _changes(df, within(old, among, key[0]), table, delete).persist()
        try:
            with _described(spark, f"compare with {table.name}"):
                counted = {row[0]: int(row[1]) for row in few(changes.groupBy(_OPERATION).count())}
            if counted:
                with _described(spark, f"write {table.name}"):
                    _merge(target, changes, key, names, counted)
        finally:
            changes.unpersist()
    finally:
        df.unpersist()
    after = version(spark, lake, table)
    assert after is not None
    return Change(
        inserted=counted.get("insert", 0),
        updated=counted.get("update", 0),
        deleted=counted.get("delete", 0),
        version=after,
    )


def delete(spark: SparkSession, lake: str, table: Table, rows: DataFrame) -> int:
    """Delete the rows that have the keys of ``rows``, in at most one commit; how many there are. rows must be there."""
    key = list(table.key)
    found = rows.select(*key).localCheckpoint()
    if count := found.count():
        target = DeltaTable.forPath(spark, table.uri(lake)).alias("t")
        target.merge(found.alias("c"), _by(key)).whenMatchedDelete().execute()
    return count


def revise(spark: SparkSession, lake: str, table: Table, df: DataFrame) -> Change:
    """Set the columns that ``df`` has beside the table's key in the rows of its keys, in at most one commit.

    Rows in which they are so already are left alone, columns in NOT_COMPARED not counted, and so are keys without row.
    """
    key = list(table.key)
    columns = [name for name in df.columns if name not in key]
    target = DeltaTable.forPath(spark, table.uri(lake))
    old = target.toDF().select(*key, F.struct(*(c for c in columns if c not in NOT_COMPARED)).alias("__old"))
    new = F.struct(*(c for c in columns if c not in NOT_COMPARED))
    different = df.join(old, key).where(~new.eqNullSafe(F.col("__old"))).drop("__old").localCheckpoint()
    updated = different.count()
    if updated:
        values: dict[str, str | Column] = {name: f"c.{name}" for name in columns}
        target.alias("t").merge(different.alias("c"), _by(key)).whenMatchedUpdate(set=values).execute()
    after = version(spark, lake, table)
    assert after is not None
    return Change(inserted=0, updated=updated, deleted=0, version=after)


def _changes(df: DataFrame, old: DataFrame, table: Table, delete: bool) -> DataFrame:
    """Rows of ``df`` that are new or differ, and the keys of rows to delete, with their operation."""
    key, names = list(table.key), table.schema.names
    types = dict(zip(df.schema.names, (f.dataType for f in df.schema.fields), strict=True))

    def digest(frame: DataFrame) -> DataFrame:
        # Maps are not comparable in Spark SQL: their sorted entries are.
        compared = [
            F.array_sort(F.map_entries(name)) if isinstance(types[name], MapType) else F.col(name)
            for name in names
            if name not in NOT_COMPARED and name not in key
        ]
        return frame.withColumn("__digest", F.sha2(F.to_json(F.struct(*compared)), 256) if compared else F.lit(""))

    new_rows = digest(df).alias("new")
    old_rows = digest(old).select(*key, "__digest").alias("old")
    on = reduce(lambda a, b: a & b, (F.col(f"new.{k}") == F.col(f"old.{k}") for k in key))
    joined = new_rows.join(old_rows, on, "full_outer")
    operation = (
        F.when(F.col(f"old.{key[0]}").isNull(), "insert")
        .when(F.col(f"new.{key[0]}").isNull(), "delete" if delete else None)
        .when(F.col("new.__digest") != F.col("old.__digest"), "update")
    )
    columns = [F.coalesce(f"new.{n}", f"old.{n}").alias(n) if n in key else F.col(f"new.{n}") for n in names]
    return joined.withColumn(_OPERATION, operation).where(f"{_OPERATION} IS NOT NULL").select(*columns, _OPERATION)


def _by(key: list[str]) -> str:
    """SQL: whether a row of the target t and one of the changes c have the same key."""
    return " AND ".join(f"t.{k} = c.{k}" for k in key)


def _merge(
    target: DeltaTable, changes: DataFrame, key: list[str], names: list[str], operations: Collection[str]
) -> None:
    """Write the changes. Only the clauses that they need are named: where all are inserts, Delta joins once."""
    values: dict[str, str | Column] = {name: f"c.{name}" for name in names}
    merge = target.alias("t").merge(changes.alias("c"), _by(key))
    if "delete" in operations:
        merge = merge.whenMatchedDelete(f"c.{_OPERATION} = 'delete'")
    if "update" in operations:
        merge = merge.whenMatchedUpdate(f"c.{_OPERATION} = 'update'", set=values)
    if "insert" in operations:
        merge = merge.whenNotMatchedInsert(f"c.{_OPERATION} = 'insert'", values=values)
    merge.execute()
