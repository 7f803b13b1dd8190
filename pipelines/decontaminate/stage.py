"""silver.documents -> the verdicts ``contaminated:SET`` in its rejected_by: documents that hold evaluation items.

The n-grams of all sets are hashed once by the driver and travel to each Python worker once, as a broadcast; text goes
through one Arrow function. Verdicts stand after the rules', in the order of the sets' names; one that no longer holds
is taken back. Without sets nothing is done, and verdicts that are there stay.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pyarrow as pa
from pyspark import Broadcast
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from pipelines import lake as tables_of
from pipelines.batches import Batches, slices
from pipelines.changes import Since, changes, keys, within, without
from pipelines.columns import IS_CONTAMINATED
from pipelines.decontaminate.config import DecontaminateConfig
from pipelines.decontaminate.ngrams import Index, build, match
from pipelines.decontaminate.sets import read_sets, sets_input
from pipelines.lake import StageResult
from pipelines.tables import CONTAMINATED, SILVER_DOCUMENTS

_MATCHES = "document_id string, rejected_by array<string>, contaminated array<string>, ngrams array<bigint>"


def run(
    spark: SparkSession, lake: str, config: DecontaminateConfig, *, run_id: str, since: Since = None
) -> StageResult:
    """Bring the verdicts ``contaminated:SET`` of silver.documents in line with the evaluation sets.

    since: the version of silver.documents that the last run by this configuration and these sets saw; None looks at
    every document. Raises LakeError when the sets cannot be read, or there is no silver.documents.
    """
    sets = read_sets(config)
    if not sets:
        return StageResult(counts={"sets": 0}, inputs=sets_input(sets), unchanged=True)
    version = tables_of.version(spark, lake, SILVER_DOCUMENTS)
    silver = tables_of.read(spark, lake, SILVER_DOCUMENTS, version)
    documents = to_look_at(silver, keys(changes(spark, lake, SILVER_DOCUMENTS, since, version, "document_id")))
    shared = spark.sparkContext.broadcast(build(((one.name, one.texts()) for one in sets), config.ngram))
    found = verdicts(documents, shared).persist()
    try:
        # Before the commit: Spark drops what it holds of a table that is written, and would match everything again.
        counts = {"documents": documents.count()} | count(found, shared)
        judged = found.select("document_id", F.col("verdict").alias("rejected_by"), F.lit(run_id).alias("run_id"))
        written = tables_of.revise(spark, lake, SILVER_DOCUMENTS, judged)
    finally:
        found.unpersist()
        shared.destroy()
    # What this run itself wrote gives it nothing to do; what another job wrote meanwhile was not seen.
    own = (version or 0) + bool(written.updated)
    return StageResult(
        counts=counts | {"updated": written.updated},
        inputs={SILVER_DOCUMENTS.name: own if written.version == own else version or 0, **sets_input(sets)},
        outputs={SILVER_DOCUMENTS.name: written.version},
    )


def to_look_at(silver: DataFrame, changed: DataFrame | None) -> DataFrame:
    """The documents that changed, and those with a verdict of this stage, so that the counts are those of all.

    changed: document_id; None: every document.
    """
    if changed is None:
        return silver
    marked = silver.where(f"exists(rejected_by, name -> {IS_CONTAMINATED})")
    return within(silver, changed).unionByName(without(marked, changed))


def verdicts(documents: DataFrame, index: Broadcast[Index]) -> DataFrame:
    """Documents that hold n-grams of the index, or did: (document_id, rejected_by, contaminated, ngrams, verdict).

    documents: document_id, rejected_by, text. contaminated: sets in the order of the index; verdict: rejected_by as it
    should be.
    """
    read = documents.select("document_id", F.coalesce("rejected_by", F.array()).alias("rejected_by"), "text")
    matches = read.mapInArrow(match_batches(index), _MATCHES)
    concerned = matches.where(f"size(contaminated) > 0 OR exists(rejected_by, name -> {IS_CONTAMINATED})")
    others = f"filter(rejected_by, name -> NOT {IS_CONTAMINATED})"
    ours = f"transform(contaminated, name -> concat('{CONTAMINATED}', name))"
    return concerned.withColumn("verdict", F.expr(f"concat({others}, {ours})"))


def match_batches(index: Broadcast[Index]) -> Callable[[Batches], Batches]:
    """The mapInArrow function of the stage: replaces text by the sets and the n-grams that the document holds."""

    def batches(incoming: Batches) -> Batches:
        known = index.value
        names = pa.array(known.sets, pa.string())
        for batch in incoming:
            for part in slices(batch, "text"):
                document, ngram = match(part["text"], known)
                pair, number = known.sets_of.at(ngram)
                # A document's n-grams are of few sets: each pair once, by one number that keeps their order.
                owned = np.unique(document[pair] * len(known.sets) + number)
                sets = _lists(owned // len(known.sets), names.take(pa.array(owned % len(known.sets))), part.num_rows)
                ngrams = _lists(document, pa.array(ngram), part.num_rows)
                columns = [part["document_id"], part["rejected_by"], sets, ngrams]
                yield pa.RecordBatch.from_arrays(columns, ["document_id", "rejected_by", "contaminated", "ngrams"])

    return batches


def item_batches(index: Broadcast[Index]) -> Callable[[Batches], Batches]:
    """The mapInArrow function from n-grams (ngram bigint) to the items that hold them (name string, item bigint)."""

    def batches(incoming: Batches) -> Batches:
        known = index.value
        names = pa.array(known.sets, pa.string())
        for batch in incoming:
            _, item = known.items_of.at(batch["ngram"].to_numpy())
            owner = names.take(pa.array(known.set_of[item]))
            yield pa.RecordBatch.from_arrays([owner, pa.array(item)], ["name", "item"])

    return batches


def count(found: DataFrame, index: Broadcast[Index]) -> dict[str, int]:
    """The counts of the sets and of what was found of them, in all and by set (``contaminated.SET`` and so on)."""
    known = index.value
    items = np.bincount(known.set_of, minlength=len(known.sets))
    searched = np.bincount(known.set_of[np.unique(known.items_of.values)], minlength=len(known.sets))
    held = found.select(F.explode("ngrams").alias("ngram")).distinct()
    held_items = held.mapInArrow(item_batches(index), "name string, item bigint").distinct().groupBy("name").count()
    documents = found.select(F.explode("contaminated").alias("name")).groupBy("name").count()
    parts = {
        "items": dict(zip(known.sets, items.tolist(), strict=True)),
        "items_too_short": dict(zip(known.sets, (items - searched).tolist(), strict=True)),
        "items_found": _by_name(held_items),
        "contaminated": _by_name(documents),
    }
    counts = {"sets": len(known.sets), "ngrams": len(known.hashes)}
    counts |= {total: sum(by_set.values()) for total, by_set in parts.items()}
    counts["contaminated"] = found.where("size(contaminated) > 0").count()
    for total, by_set in parts.items():
        counts |= {f"{total}.{name}": by_set.get(name, 0) for name in known.sets}
    return counts


def _by_name(frame: DataFrame) -> dict[str, int]:
    return {row[0]: int(row[1]) for row in tables_of.few(frame)}


def _lists(owner: np.ndarray[tuple[int], np.dtype[np.int64]], values: pa.Array, rows: int) -> pa.ListArray:
    """The values of each of ``rows`` owners as lists; owner: ascending, that of each value."""
    offsets = np.searchsorted(owner, np.arange(rows + 1)).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), values)
