"""Records as they were read to the rows of both bronze tables, as relations: one record an id, and what it replaces.

On the tables documents + quarantined rows = records, so a record is in one of them alone:

- A record that is no document now replaces the document that it was, by its quarantine row.
- A record that came in whole loses its quarantine row.
- A record that could not be read (`unreadable`) says nothing against the document that is there: it stays, and its
  failure is in the run's counts only.
- A record that ops.erasures has is neither: it was asked to be erased, and stays out.
- What is gone from the source is kept, or with `mirror` deleted; but not where it may be in what could not be read: a
  folder that cannot be listed, a file that breaks off.
"""

from __future__ import annotations

from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from pipelines.columns import hashed
from pipelines.errors import LakeError
from pipelines.ingest.lines import RAW_BYTES
from pipelines.ingest.tasks import RECORDS
from pipelines.lake import few
from pipelines.tables import BRONZE_DOCUMENTS, BRONZE_QUARANTINE

# The reason of a record that is left out because its document was erased; no reason of the quarantine.
ERASED = "erased"


def settle(records: DataFrame) -> tuple[DataFrame, bool]:
    """One record an id: others with it become known by their location, and `duplicate_id` where they are whole.

    And whether there were such.

    The id is the newest's of pages that say when they were crawled, else the first's by file and line.
    """
    order = F.struct(
        F.col("reason").isNotNull().alias("broken"),
        F.coalesce(-F.unix_micros("crawled_at"), F.lit(0)).alias("age"),
        F.col("file"),
        F.col("line"),
        F.col("location"),
    )
    shared = (
        records.groupBy("document_id")
        .agg(F.count(F.lit(1)).alias("members"), F.min(order).alias("first"))
        .where("members > 1")
        .select("document_id", "first")
    )
    # Texts are shuffled only where there are duplicates at all.
    if shared.isEmpty():
        return records, False
    later = F.col("first").isNotNull() & (order != F.col("first"))
    duplicate = later & F.col("reason").isNull()
    known_by = F.when(later, F.col("location")).otherwise(F.col("source_id"))
    words = F.concat(F.lit("the id "), F.col("source_id"), F.lit(" is that of "), F.col("first.location"))
    settled = records.join(shared, "document_id", "left").select(
        hashed(F.col("source"), known_by).alias("document_id"),
        known_by.alias("source_id"),
        F.when(duplicate, F.lit("duplicate_id")).otherwise(F.col("reason")).alias("reason"),
        F.when(duplicate, words).otherwise(F.col("detail")).alias("detail"),
        F.when(duplicate, F.substring(F.encode("content", "UTF-8"), 1, RAW_BYTES)).otherwise(F.col("raw")).alias("raw"),
        *[n for n in RECORDS.names if n not in ("document_id", "source_id", "reason", "detail", "raw")],
    )
    return settled, True


def without_erased(settled: DataFrame, erased: DataFrame) -> DataFrame:
    """The records, those of the erased ids marked by the reason ERASED. erased: document_id."""
    marked = F.broadcast(erased.select("document_id").distinct().withColumn("erased", F.lit(True)))
    reason = F.when(F.col("erased"), F.lit(ERASED)).otherwise(F.col("reason"))
    return settled.join(marked, "document_id", "left").withColumn("reason", reason).drop("erased")


def check_settled(settled: DataFrame, met: int) -> tuple[dict[str, int], bool]:
    """The counts by what the records came to, and whether one that is no document is a line of a file.

    Raises LakeError where they do not make up the records met.
    """
    by_reason: dict[str, int] = {}
    distinct = lines = 0
    grouped = settled.groupBy(F.coalesce("reason", F.lit(""))).agg(
        F.count(F.lit(1)), F.countDistinct("source", "source_id"), F.count_if(F.col("location") != F.col("file"))
    )
    for reason, number, ids, of_lines in few(grouped):
        by_reason[reason] = int(number)
        distinct += int(ids)
        lines += int(of_lines) if reason else 0
    documents, erased = by_reason.pop("", 0), by_reason.pop(ERASED, 0)
    quarantined = sum(by_reason.values())
    if documents + quarantined + erased != met or distinct != met:
        raise LakeError(
            f"Ingest's counts do not add up: {documents} documents, {quarantined} quarantined records and {erased} "
            f"erased ones, {distinct} of them with an id of their own, of {met} records; nothing was written."
        )
    counts = {
        "records": met,
        "documents": documents,
        "quarantined": quarantined,
        "erased": erased,
        **{f"quarantined.{reason}": by_reason[reason] for reason in sorted(by_reason)},
    }
    return counts, lines > 0


def documents_of(settled: DataFrame, run_id: str) -> DataFrame:
    whole = settled.where("reason IS NULL")
    return whole.withColumns({"ingested_at": F.current_timestamp(), "run_id": F.lit(run_id)}).select(
        *BRONZE_DOCUMENTS.schema.names
    )


def quarantine_of(settled: DataFrame, run_id: str) -> DataFrame:
    columns = {
        "quarantine_id": hashed(F.col("source"), F.col("source_id"), F.col("reason")),
        "run_id": F.lit(run_id),
        "at": F.current_timestamp(),
    }
    return (
        settled.where(f"reason IS NOT NULL AND reason <> '{ERASED}'")
        .withColumns(columns)
        .select(*BRONZE_QUARANTINE.schema.names)
    )


def carry_times(documents: DataFrame, stored: DataFrame) -> DataFrame:
    """A file that was touched or copied, its content the same, is not another document: the stored time stands."""
    old = stored.select("document_id", "content_sha256", F.col("source_modified_at").alias("stored_at"))
    touched = (
        documents.select("document_id", "content_sha256", "source_modified_at")
        .join(old, ["document_id", "content_sha256"])
        .where("NOT (source_modified_at <=> stored_at)")
        .select("document_id", "stored_at", F.lit(True).alias("touched"))
    )
    if touched.isEmpty():
        return documents
    at = F.when(F.col("touched"), F.col("stored_at")).otherwise(F.col("source_modified_at"))
    return (
        documents.join(touched, "document_id", "left")
        .withColumn("source_modified_at", at)
        .select(*BRONZE_DOCUMENTS.schema.names)
    )


def replaced(settled: DataFrame, stored: DataFrame) -> DataFrame:
    """Ids of stored documents whose records were read and are no documents now."""
    refused = settled.where("reason IS NOT NULL AND reason != 'unreadable'")
    return refused.select("document_id").join(stored, "document_id", "left_semi")


def without_unread(quarantine: DataFrame, stored: DataFrame) -> DataFrame:
    """The quarantine rows, without those of records that could not be read and whose documents are there."""
    unread = quarantine.where("reason = 'unreadable'").join(stored, ["source", "source_id"], "left_semi")
    if unread.isEmpty():
        return quarantine
    return quarantine.join(unread.select("quarantine_id"), "quarantine_id", "left_anti")


def gone(settled: DataFrame, files: DataFrame, stored: DataFrame) -> DataFrame:
    """Ids of the sources' stored documents that were not met, and are in no file or folder that was not read whole."""
    unseen = files.where("NOT complete").select("source", F.col("path").alias("place"))
    absent = stored.select("document_id", "source", "path").join(
        settled.select("document_id"), "document_id", "left_anti"
    )
    inside = (F.col("path") == F.col("place")) | F.col("path").startswith(F.concat("place", F.lit("/")))
    on = (absent["source"] == unseen["source"]) & inside
    return absent.join(unseen, on, "left_anti").select("document_id")


def kept_quarantine(
    settled: DataFrame, files: DataFrame, places: DataFrame, earlier: DataFrame, mirror: bool
) -> DataFrame:
    """Rows of earlier runs that this run has nothing to say about.

    A row is settled anew when a record of its id was met, or when the file or folder that it lies in was read; with
    `mirror` also where its source was read whole. places: files and folders read, by source and relative path.
    """
    place = F.regexp_replace("source_id", ":[0-9]+$", "")
    kept = (
        earlier.join(settled.select("source", "source_id"), ["source", "source_id"], "left_anti")
        .join(places.withColumnRenamed("place", "source_id"), ["source", "source_id"], "left_anti")
        .withColumn("place", place)
        .join(places, ["source", "place"], "left_anti")
    )
    if mirror:
        kept = kept.join(files.where("NOT complete").select("source").distinct(), "source", "left_semi")
    return kept.select(*BRONZE_QUARANTINE.schema.names)
