"""bronze.documents to silver.documents: every document normalised, measured, redacted and judged; none is dropped.

Text goes once through one Arrow function (``batch``); what relates documents (the nearest LICENSE file) and what
judges stored signals (``verdicts``) is Spark SQL. Rejected documents stay, with the rules that rejected them.
"""

from __future__ import annotations

from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.pandas.types import from_arrow_schema

from pipelines.changes import Since, changes, keys, within
from pipelines.clean.batch import LICENSE_OUTPUT, OUTPUT, cleaner, license_batches
from pipelines.clean.config import CleanConfig
from pipelines.clean.licenses import LICENSE_FILE
from pipelines.clean.verdicts import rejected_by
from pipelines.columns import IS_CONTAMINATED
from pipelines.errors import LakeError
from pipelines.lake import StageResult, ensure, few, read, revise, sync, version
from pipelines.tables import BRONZE_DOCUMENTS, SILVER_DOCUMENTS

_COLUMNS = (
    "document_id",
    "source",
    "source_id",
    "kind",
    "content",
    "content_sha256",
    "license_declared",
    "language_declared",
)
# From the document's folder up to the source's root: the first that has a LICENSE. try_element_at and get give null.
_NEAREST = """
get(filter(transform(sequence(size(split(source_id, '/')) - 1, 0),
                     n -> try_element_at(licenses, array_join(slice(split(source_id, '/'), 1, n), '/'))),
           found -> found IS NOT NULL), 0)
"""
# What decontaminate added to a document's verdicts.
_FOUND = f"filter(rejected_by, name -> {IS_CONTAMINATED})"


def licenses_by_source(bronze: DataFrame) -> DataFrame:
    """(source, licenses: map of folder to SPDX expression); several LICENSE files in a folder hold together (AND)."""
    files = bronze.where(_is_license()).select("source", "source_id", "content")
    found = files.mapInArrow(license_batches, from_arrow_schema(LICENSE_OUTPUT)).where("license IS NOT NULL")
    one = F.expr(
        "array_join(array_sort(collect_set(IF(license LIKE '% OR %', concat('(', license, ')'), license))), ' AND ')"
    )
    folders = found.groupBy("source", "directory").agg(one.alias("license"))
    return folders.groupBy("source").agg(
        F.expr("map_from_entries(array_sort(collect_list(struct(directory, license))))").alias("licenses")
    )


def _is_license() -> Column:
    return (F.col("kind") == "text") & F.regexp_extract("source_id", "[^/]+$", 0).rlike(LICENSE_FILE)


def affected(bronze: DataFrame, changed: DataFrame | None) -> DataFrame | None:
    """document_id of the documents whose silver row may differ; None: all.

    changed: document_id, source, source_id and kind of bronze rows before and after their change. A LICENSE file that
    changed judges every document of its folder and below.
    """
    if changed is None:
        return None
    folder = F.regexp_extract("source_id", "^(.*/)?[^/]+$", 1)
    folders = changed.where(_is_license()).select("source", folder.alias("folder")).distinct()
    below = bronze.join(F.broadcast(folders), "source").where("startswith(source_id, folder)").select("document_id")
    return keys(changed.select("document_id").union(below))


def silver(
    bronze: DataFrame, config: CleanConfig, run_id: str, *, documents: DataFrame | None = None, spread: int = 1
) -> DataFrame:
    """The rows of silver.documents that bronze documents give, in the table's columns.

    documents: document_id of those wanted; None: all. spread: parts that few files are dealt out to, for the cores.
    """
    wanted = within(bronze.select(*_COLUMNS), documents)
    if wanted.rdd.getNumPartitions() < spread:
        wanted = wanted.repartition(spread, "document_id")
    with_licenses = wanted.join(F.broadcast(licenses_by_source(bronze)), "source", "left").select(
        *_COLUMNS, F.expr(_NEAREST).alias("license_nearest")
    )
    return (
        with_licenses.mapInArrow(cleaner(config), from_arrow_schema(OUTPUT))
        .withColumn("rejected_by", F.expr(rejected_by(config)))
        .withColumn("run_id", F.lit(run_id))
        .select(*SILVER_DOCUMENTS.schema.names)
    )


def keep_contaminated(rows: DataFrame, stored: DataFrame) -> DataFrame:
    """The rows, each with what decontaminate found in the very same text: clean does not know the evaluation sets."""
    marked = stored.select("document_id", "text_sha256", F.expr(_FOUND).alias("found")).where("size(found) > 0")
    joined = rows.join(marked, ["document_id", "text_sha256"], "left")
    verdicts = F.expr("IF(found IS NULL, rejected_by, concat(rejected_by, found))")
    return joined.withColumn("rejected_by", verdicts).select(*SILVER_DOCUMENTS.schema.names)


def run(spark: SparkSession, lake: str, config: CleanConfig, *, run_id: str, since: Since = None) -> StageResult:
    """Make silver.documents what bronze.documents gives by the configuration; the same again commits nothing.

    since: the version of bronze.documents that the last run by this configuration saw; None looks at every document.
    Raises LakeError when there is no bronze.documents, or when a document was lost on the way.
    """
    bronze_version = version(spark, lake, BRONZE_DOCUMENTS)
    bronze = read(spark, lake, BRONZE_DOCUMENTS, bronze_version)
    ensure(spark, lake, SILVER_DOCUMENTS)
    changed = changes(
        spark, lake, BRONZE_DOCUMENTS, since, bronze_version, "document_id", "source", "source_id", "kind"
    )
    documents = affected(bronze, changed)
    stored = read(spark, lake, SILVER_DOCUMENTS)
    rows = silver(bronze, config, run_id, documents=documents, spread=spark.sparkContext.defaultParallelism)
    rows = keep_contaminated(rows, stored)
    change = sync(spark, lake, SILVER_DOCUMENTS, rows, among=documents)
    counts = funnel(read(spark, lake, SILVER_DOCUMENTS, change.version))
    if (total := bronze.count()) != counts["documents"]:
        raise LakeError(
            f"silver.documents has {counts['documents']} rows for {total} of bronze.documents: "
            "another job writes this lake; run clean again when it has ended.",
            75,
        )
    counts |= {"inserted": change.inserted, "updated": change.updated, "deleted": change.deleted}
    return StageResult(
        counts=counts,
        inputs={BRONZE_DOCUMENTS.name: bronze_version or 0},
        outputs={SILVER_DOCUMENTS.name: change.version},
    )


def rejudge(spark: SparkSession, lake: str, config: CleanConfig, *, run_id: str, since: Since = None) -> StageResult:
    """Derive the verdicts of silver.documents anew from its stored signals; reads no text, looks at no new document.

    since: the version of bronze.documents that silver was made from, which stays what it was made from.
    Raises LakeError when there is no silver.documents.
    """
    stored = read(spark, lake, SILVER_DOCUMENTS)
    judged = stored.select(
        "document_id",
        F.expr(f"concat({rejected_by(config)}, {_FOUND})").alias("rejected_by"),
        F.lit(run_id).alias("run_id"),
    )
    change = revise(spark, lake, SILVER_DOCUMENTS, judged)
    counts = funnel(read(spark, lake, SILVER_DOCUMENTS, change.version)) | {"updated": change.updated}
    return StageResult(counts=counts, inputs=dict(since or {}), outputs={SILVER_DOCUMENTS.name: change.version})


def funnel(documents: DataFrame) -> dict[str, int]:
    """documents, accepted, rejected, rejected_by.RULE and redactions.TYPE of silver documents; counted in Spark."""
    total, accepted = documents.agg(
        F.count("*"), F.coalesce(F.sum(F.expr("IF(size(rejected_by) = 0, 1, 0)")), F.lit(0))
    ).head() or (0, 0)
    counts = {"documents": int(total), "accepted": int(accepted), "rejected": int(total) - int(accepted)}
    rules = documents.select(F.explode("rejected_by").alias("name")).groupBy("name").count()
    redacted = documents.select(F.explode("redactions").alias("name", "n")).groupBy("name").agg(F.sum("n"))
    for prefix, frame in (("rejected_by", rules), ("redactions", redacted)):
        counts |= {f"{prefix}.{name}": int(n) for name, n in few(frame.orderBy("name"))}
    return counts
