"""Ingest: files to bronze.documents and bronze.quarantine; every record ends in one of the two.

Names are listed on the driver and spread as a DataFrame; contents are read once, in the executors' Python, into a
DataFrame kept on the executors' disks, from which both tables are written. A file's reading also says how many records
it met, and the stage fails before it writes anything where documents and quarantined records do not make up that sum.

Reading the same again writes nothing, and where the files' fingerprint is that of the last run the job spares it;
where some are new or changed, they alone are read (`known.py`). A changed file updates its document; what is gone from
the source is kept, unless the source is mirrored. Of two whole records with one id the first, by path and line, is the
document (of pages the newest crawled), however the files are spread; the others are `duplicate_id`, known by path:line.
A source without any file, such as a disk that is not mounted, is mirrored only where that is asked for by itself.
A quarantine row goes when its record, or the file that it is a line of, is read again without the trouble; what it says
of a document's record takes the document's place (`settle.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from pyspark import StorageLevel
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from pipelines import lake as lakehouse
from pipelines.changes import Since, keys
from pipelines.errors import LakeError
from pipelines.ingest.config import IngestConfig, SourceConfig
from pipelines.ingest.known import News, apart, keep, news, places
from pipelines.ingest.listing import Entry, Listing, ingest_input, list_sources
from pipelines.ingest.settle import (
    carry_times,
    check_settled,
    documents_of,
    gone,
    kept_quarantine,
    quarantine_of,
    replaced,
    settle,
    without_erased,
    without_unread,
)
from pipelines.ingest.tasks import RECORDS, reader, spread
from pipelines.sql import literals
from pipelines.tables import BRONZE_DOCUMENTS, BRONZE_QUARANTINE, OPS_ERASURES

Listed = Mapping[SourceConfig, Listing]


def run(
    spark: SparkSession,
    lake: str,
    config: IngestConfig,
    *,
    run_id: str,
    since: Since = None,
    listed: Listed | None = None,
) -> lakehouse.StageResult:
    """Ingest every source of `config`.

    since: the sources' fingerprints that the last run saw; None: every file is read. listed: what `list_sources` found,
    where the caller has looked already.
    Returns counts, of what was read: records = documents + quarantined (also by reason, `quarantined.REASON`) + erased,
    files, files_unchanged (not read again), skipped
    (files that are compiled or media by their name), links_passed_over and hidden_passed_over (`listing.py`),
    passed_over (an archive's records that are no pages), inserted,
    updated, deleted and what the tables now hold (`table_documents`, `table_quarantine` and by reason).
    The result's failure is that too many are quarantined.
    Raises LakeError, exit code 2, for no input, a path that is not there, or a source to mirror that has lost all its
    files; 1 where the counts do not add up.
    """
    listed = listed or list_sources(config, lake)
    entries = [entry for listing in listed.values() for entry in listing.entries]
    notes = _emptied(spark, lake, config, listed)
    if not entries and not (config.mirror and config.allow_empty):
        where = ", ".join(source.path for source in listed)
        raise LakeError(f"There is no file to ingest in {where}: name a folder, a file or a glob that has some.", 2)
    for table in (BRONZE_DOCUMENTS, BRONZE_QUARANTINE):
        lakehouse.ensure(spark, lake, table)
    erasures = lakehouse.version(spark, lake, OPS_ERASURES)

    inputs, result = ingest_input(listed, erasures), None
    # What was erased, or restored, is known of files that are read alone.
    same_erasures = (since or {}).get("erasures") == inputs.get("erasures")
    if same_erasures and (found := news(lake, listed, since)):
        result = _ingest(spark, lake, config, listed, found.entries, erasures, run_id, found)
    if result is None:
        result = _ingest(spark, lake, config, listed, entries, erasures, run_id, None)
    assert result is not None
    # A file that could not be read is tried again by the next run, though no name, size or time changes; what could not
    # be listed has changed when it can.
    unlisted = sum(entry.problem is not None for entry in entries)
    known = {} if result.counts.get("quarantined.unreadable", 0) > unlisted else inputs
    notes += _remarks(listed, result.counts)
    return replace(result, inputs=known, notes=notes, failure=_too_many_quarantined(config, result.counts))


def _remarks(listed: Listed, counts: dict[str, int]) -> tuple[str, ...]:
    """Sentences about what was passed over, what is hidden, and what is no document."""
    out = []
    if number := counts["links_passed_over"]:
        out.append(
            f"{number:,} links lead out of their source and were passed over; --ingest.follow-links takes their files."
        )
    hidden = [e.relative for listing in listed.values() for e in listing.entries if "/." in f"/{e.relative}"]
    if hidden:
        out.append(f"{len(hidden):,} of the files are hidden, such as {hidden[0]}; --no-ingest.hidden leaves them out.")
    if number := counts["quarantined"]:
        out.append(
            f"{number:,} of {counts['records']:,} records are no documents ({_reasons(counts)}): bronze.quarantine has "
            "each with its reason and its first bytes."
        )
    return tuple(out)


def _reasons(counts: dict[str, int]) -> str:
    prefix = "quarantined."
    return ", ".join(f"{name.removeprefix(prefix)} {n:,}" for name, n in counts.items() if name.startswith(prefix))


def _too_many_quarantined(config: IngestConfig, counts: dict[str, int]) -> LakeError | None:
    share = counts["quarantined"] / max(1, counts["records"])
    if share <= config.max_quarantined:
        return None
    return LakeError(
        f"{share:.2%} of the records are no documents ({_reasons(counts)}), more than ingest.max_quarantined admits "
        f"({config.max_quarantined:.2%}): what could be read is written; mend the source or raise "
        "--ingest.max-quarantined, and run again."
    )


def _emptied(spark: SparkSession, lake: str, config: IngestConfig, listed: Listed) -> tuple[str, ...]:
    """A sentence for every source that has no file: what becomes of the documents that it had.

    Raises LakeError (exit code 2) where they would be deleted and that was not asked for.
    """
    empty = {source.name: source.path for source, listing in listed.items() if not listing.entries}
    if not empty:
        return ()
    held = dict.fromkeys(empty, 0)
    if lakehouse.exists(spark, lake, BRONZE_DOCUMENTS):
        stored = lakehouse.read(spark, lake, BRONZE_DOCUMENTS).where(F.col("source").isin(list(empty)))
        held |= {row[0]: int(row[1]) for row in lakehouse.few(stored.groupBy("source").count())}
    lost = [f"{name} in {empty[name]} (documents: {number:,})" for name, number in held.items() if number]
    if lost and config.mirror and not config.allow_empty:
        raise LakeError(
            f"No file is left of the source {' and of '.join(lost)}, and --mirror would delete all that it had: mount "
            "or restore it, leave out --mirror, or say --ingest.allow-empty to delete them.",
            2,
        )
    fate = "are deleted" if config.mirror else "stay"
    return tuple(f"{name} has no file in {empty[name]}: its {held[name]:,} documents {fate}." for name in empty)


def _ingest(
    spark: SparkSession,
    lake: str,
    config: IngestConfig,
    listed: Listed,
    entries: list[Entry],
    erasures: int | None,
    run_id: str,
    found: News | None,
) -> lakehouse.StageResult | None:
    """Read these files and bring both tables in line.

    found: what is new, where that is all that is read; then None, and nothing written, where it is not apart from the
    rest.
    """
    data_sets = tuple(listing.data_set for listing in listed.values())
    read = reader(tuple(listed), data_sets, config.max_bytes)
    records = spread(spark, entries).mapInArrow(read, lakehouse.spark_schema(RECORDS)).persist(StorageLevel.DISK_ONLY)
    names = [source.name for source in listed]
    try:
        files = records.where("met IS NOT NULL")
        passed = [(listing.skipped, listing.links_outside, listing.hidden) for listing in listed.values()]
        skipped, links, hidden = (sum(numbers) for numbers in zip(*passed, strict=True))
        counts = {"files": len(entries), "skipped": skipped}
        counts |= {"links_passed_over": links, "hidden_passed_over": hidden}
        if found:
            counts["files_unchanged"] = sum(len(listing.entries) for listing in listed.values()) - len(entries)
        read_counts, unread = _check_read(records, len(entries))
        counts |= read_counts
        settled, shared = settle(records.where("met IS NULL"))
        if erasures is not None:
            settled = without_erased(settled, lakehouse.read(spark, lake, OPS_ERASURES, erasures))
        settled_counts, lines = check_settled(settled, counts["records"])
        counts |= settled_counts
        stored = lakehouse.read(spark, lake, BRONZE_DOCUMENTS).where(F.col("source").isin(names))
        earlier: DataFrame | None = lakehouse.read(spark, lake, BRONZE_QUARANTINE).where(F.col("source").isin(names))
        if earlier is not None and earlier.isEmpty():
            earlier = None
        # Of an erased record it is not known whether it is this one; of a file not read whole, what else is in it.
        if found and (counts["erased"] or unread or not apart(found, settled, stored, earlier)):
            return None
        # Queries over nothing cost half a second each: what there is nothing of is not asked for.
        quarantine: DataFrame | None = None
        if counts["quarantined"] or earlier is not None:
            quarantine = quarantine_of(settled, run_id)
            if "quarantined.unreadable" in counts:
                quarantine = without_unread(quarantine, stored)
            if earlier is not None:
                quarantine = quarantine.unionByName(_kept(settled, files, earlier, listed, found, config.mirror))
            # Fixed before the first table is written: what is replaced is known from the documents as they were.
            quarantine = quarantine.localCheckpoint()
        documents = carry_times(documents_of(settled, run_id), stored)
        left = documents.select("document_id")
        if counts["quarantined"] or counts["erased"]:
            left = left.union(replaced(settled, stored))
        if config.mirror:
            mirrored = stored
            if found:
                mirrored = stored.join(places(spark, found.paths, "path"), ["source", "path"], "left_semi")
            left = left.union(gone(settled, files, mirrored))
        # In one commit: rows of the ids in `left` are spoken of, and not all are documents.
        added = lakehouse.sync(spark, lake, BRONZE_DOCUMENTS, documents, among=keys(left))
        outputs = {BRONZE_DOCUMENTS.name: added.version}
        counts |= {"inserted": added.inserted, "updated": added.updated, "deleted": added.deleted}
        counts |= {"quarantine_inserted": 0, "quarantine_deleted": 0}
        if quarantine is not None:
            held = lakehouse.sync(spark, lake, BRONZE_QUARANTINE, quarantine, scope=f"source IN ({literals(names)})")
            counts |= {"quarantine_inserted": held.inserted, "quarantine_deleted": held.deleted}
    finally:
        records.unpersist()

    keep(lake, listed, entangled=shared or lines or unread)
    counts["table_documents"] = lakehouse.read(spark, lake, BRONZE_DOCUMENTS).count()
    reasons = lakehouse.few(lakehouse.read(spark, lake, BRONZE_QUARANTINE).groupBy("reason").count().orderBy("reason"))
    counts["table_quarantine"] = sum(int(number) for _, number in reasons)
    counts |= {f"table_quarantine.{reason}": int(number) for reason, number in reasons}
    outputs[BRONZE_QUARANTINE.name] = lakehouse.version(spark, lake, BRONZE_QUARANTINE) or 0
    return lakehouse.StageResult(counts=counts, inputs={}, outputs=outputs)


def _kept(
    settled: DataFrame, files: DataFrame, earlier: DataFrame, listed: Listed, found: News | None, mirror: bool
) -> DataFrame:
    """Rows of the earlier quarantine that stay: of what was not read because it is known, and `kept_quarantine`'s."""
    read = [(source.name, folder) for source, listing in listed.items() for folder in listing.folders]
    if found:
        read += found.read + (found.gone if mirror else [])
    else:
        read += [(source.name, entry.relative) for source, listing in listed.items() for entry in listing.entries]
    of_mirror = mirror and not found
    return kept_quarantine(settled, files, places(settled.sparkSession, read, "place"), earlier, of_mirror)


def _check_read(records: DataFrame, files: int) -> tuple[dict[str, int], bool]:
    """Read everything, once; the numbers of records met and passed over, and whether a file was not read whole.

    Raises LakeError where a file or a record is missing.
    """
    total = F.coalesce(F.sum("met"), F.lit(0)), F.coalesce(F.sum("passed"), F.lit(0))
    row = records.agg(
        F.count("met"), total[0], F.count("document_id"), total[1], F.count_if(~F.col("complete"))
    ).first()
    assert row is not None
    if row[0] != files or row[1] != row[2]:
        raise LakeError(
            f"Ingest lost count: {row[0]} of {files} files and {row[2]} of {row[1]} records came back; "
            "nothing was written, run it again.",
            75,
        )
    return {"records": int(row[1]), "passed_over": int(row[3])}, row[4] > 0
