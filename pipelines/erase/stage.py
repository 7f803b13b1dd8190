"""Documents that must go: requested, deleted from bronze, and proved to be in no table.

``request`` writes a row of ops.erasures a document, which also keeps it out when its file is ingested again, and
deletes it from bronze; the stages then follow bronze's change feed as after any change; ``complete`` looks for the
documents in every table and writes down at which versions they were in none. Killed anywhere, the next erase goes on
with what is not completed. Old files hold the documents until maintain's vacuum removes them.

A document's text may be in the lake under other ids as well: of these ``request`` gives those with the very same text,
which it erases along where asked to, and those of the same cluster of near-duplicates.

Left out: models and tokenizers that were trained on the documents, and reports that show them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import reduce

from pyspark.errors import AnalysisException, ParseException
from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F

from pipelines.changes import keys, within, without
from pipelines.columns import hashed
from pipelines.erase.config import EraseConfig
from pipelines.errors import LakeError
from pipelines.lake import delete, ensure, exists, read, revise, sync, version
from pipelines.sql import literals
from pipelines.tables import (
    BRONZE_DOCUMENTS,
    BRONZE_QUARANTINE,
    OPS_ERASURES,
    SILVER_DOCUMENTS,
    SILVER_DUPLICATES,
    TABLES,
    Table,
)

_VERSIONS = "array<struct<table: string, version: bigint>>"
_SHOWN = 3
_KINDS = {"same_text": "same_text", "same_cluster": "NOT same_text"}  # conditions on what `alike` gives


@dataclass(frozen=True, kw_only=True)
class Others:
    """Documents that stay: how many, and the first ids."""

    number: int
    ids: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Requested:
    """What was asked for. counts: documents asked for and rows deleted.

    same_text, same_cluster: documents that stay and have the very same text as an erased one, or are near-duplicates of
    one. ingested_us: when the first of the erased documents came in, in microseconds since the epoch; None: none is in
    bronze any more.
    """

    counts: dict[str, int]
    same_text: Others
    same_cluster: Others
    ingested_us: int | None


def request(spark: SparkSession, lake: str, config: EraseConfig) -> Requested:
    """Ask for the erasure and delete from bronze.

    Raises LakeError (exit code 2) when there is no lake, nothing matches, or a document is not known, or the condition
    is no SQL.
    """
    bronze = read(spark, lake, BRONZE_DOCUMENTS)  # first: a wrong path must not become a lake
    for table in (OPS_ERASURES, BRONZE_QUARANTINE):
        ensure(spark, lake, table)
    wanted = keys(selected(spark, lake, config))
    assert wanted is not None
    others = alike(spark, lake, wanted).localCheckpoint()
    if config.with_duplicates:
        wanted = keys(wanted.union(others.where("same_text").select("document_id")))
        assert wanted is not None
        others = others.where("NOT same_text")
    first = within(bronze, wanted).agg(F.min(F.unix_micros("ingested_at"))).first()
    new = without(wanted, pending(spark, lake).select("document_id")).select(
        "document_id",
        F.current_timestamp().alias("requested_at"),
        F.lit(config.reason).alias("reason"),
        F.lit(None).cast("timestamp").alias("completed_at"),
        F.lit(None).cast(_VERSIONS).alias("table_versions"),
    )
    requested = sync(spark, lake, OPS_ERASURES, new.localCheckpoint(), delete=False).inserted
    ids = keys(pending(spark, lake))
    counts = {"requested": requested}
    same = {name: _others(others.where(condition)) for name, condition in _KINDS.items()}
    for table in (BRONZE_QUARANTINE, BRONZE_DOCUMENTS):
        held = within(read(spark, lake, table).withColumn("__id", _document_id(table)), ids, "__id")
        counts[f"deleted.{table.name}"] = delete(spark, lake, table, held)
    counts |= {name: found.number for name, found in same.items()}
    return Requested(counts=counts, **same, ingested_us=first[0] if first else None)


def _others(documents: DataFrame) -> Others:
    ids = tuple(row[0] for row in documents.select("document_id").orderBy("document_id").take(_SHOWN))
    return Others(number=documents.count() if ids else 0, ids=ids)


def alike(spark: SparkSession, lake: str, wanted: DataFrame) -> DataFrame:
    """(document_id, same_text) of the documents that have the text of a wanted one, or are in its cluster.

    wanted: document_id. Without the wanted ones, and those whose erasure is asked for already.
    """
    ids = [
        read(spark, lake, table)
        .join(within(read(spark, lake, table), wanted).select(column).distinct(), column, "left_semi")
        .select("document_id", F.lit(column != "cluster_id").alias("same_text"))
        for table, column in (
            (BRONZE_DOCUMENTS, "content_sha256"),
            (SILVER_DOCUMENTS, "text_sha256"),
            (SILVER_DUPLICATES, "cluster_id"),
        )
        if exists(spark, lake, table)
    ]
    found = reduce(DataFrame.union, ids).groupBy("document_id").agg(F.max("same_text").alias("same_text"))
    return without(without(found, wanted), pending(spark, lake).select("document_id"))


def pending(spark: SparkSession, lake: str) -> DataFrame:
    """Rows of ops.erasures that are asked for and not completed."""
    return read(spark, lake, OPS_ERASURES).where("completed_at IS NULL")


def _document_id(table: Table) -> Column:
    """A row's document_id; a quarantined record has the one that it would have as a document."""
    if "document_id" in table.schema.names:
        return F.col("document_id")
    return hashed(F.col("source"), F.col("source_id"))


def selected(spark: SparkSession, lake: str, config: EraseConfig) -> DataFrame:
    """document_id of what the settings name: in bronze, or erased before and not completed."""
    bronze = read(spark, lake, BRONZE_DOCUMENTS)
    if config.document_id:
        asked = spark.createDataFrame([(i,) for i in dict.fromkeys(config.document_id)], "document_id string")
        known = bronze.select("document_id").union(read(spark, lake, OPS_ERASURES).select("document_id"))
        unknown = without(asked, known).first()
        if unknown:
            raise LakeError(f"There is no document {unknown[0]} in {lake}: check the id, or erase by --where.", 2)
        return asked
    if config.source:
        condition = f"source IN ({literals(config.source)})"
        records = read(spark, lake, BRONZE_QUARANTINE).where(condition)
        found = bronze.where(condition).select("document_id").union(records.select(_document_id(BRONZE_QUARANTINE)))
    else:
        try:
            found = bronze.where(config.where).select("document_id")
        except (AnalysisException, ParseException) as error:
            raise LakeError(
                f"--where {config.where!r} is no condition on bronze.documents: {_first_words(error)}.", 2
            ) from error
    if found.isEmpty() and pending(spark, lake).isEmpty():
        raise LakeError(f"Nothing in {lake} matches: no document was erased; check the name or the condition.", 2)
    return found


def _first_words(error: BaseException) -> str:
    """What Spark says first: without its error class, its SQLSTATE, and the suggestions and plan that follow."""
    words = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    words = re.sub(r"^\[[\w.]+\] |\s*SQLSTATE: .*$", "", words.strip())
    return re.split(r"(?<=\w[\w`'\")])\. ", words, maxsplit=1)[0].rstrip(". ")


def complete(spark: SparkSession, lake: str) -> dict[str, int]:
    """Prove that no table holds a requested document, and write down the versions; they are returned by table.

    Raises LakeError (exit code 75) that names the table which still holds one.
    """
    ids = keys(pending(spark, lake))
    versions = {}
    for table in TABLES.values():
        if table.name.startswith("ops.") or not exists(spark, lake, table):
            continue
        at = version(spark, lake, table)
        assert at is not None
        held = documents_of(read(spark, lake, table, at), table)
        if left := within(held, ids).first():
            raise LakeError(
                f"{table.name} at version {at} still holds document {left[0]}: another job wrote it; run erase again.",
                75,
            )
        versions[table.name] = at
    proof = F.array(*(F.struct(F.lit(n).alias("table"), F.lit(v).alias("version")) for n, v in versions.items()))
    values = {"completed_at": F.current_timestamp(), "table_versions": proof.cast(_VERSIONS)}
    revise(spark, lake, OPS_ERASURES, pending(spark, lake).select(*OPS_ERASURES.key).withColumns(values))
    return versions


def documents_of(rows: DataFrame, table: Table) -> DataFrame:
    """document_id of every document that the table's rows hold or speak of."""
    if "document_ids" in table.schema.names:
        return rows.select(F.explode("document_ids").alias("document_id"))
    return rows.select(_document_id(table).alias("document_id"))


def restore(spark: SparkSession, lake: str, config: EraseConfig) -> int:
    """Forget the erasure of documents named by their ids, so that ingest takes them again; how many there were.

    Raises LakeError (exit code 2) when none of them was erased, or nothing was in this lake.
    """
    rows = read(spark, lake, OPS_ERASURES).where(f"document_id IN ({literals(config.document_id)})")
    if not (count := delete(spark, lake, OPS_ERASURES, rows)):
        raise LakeError(f"None of these documents was erased in {lake}: ops.erasures has the ids.", 2)
    return count
