"""bronze.documents to silver.documents: every document normalised, measured, redacted and judged; none is dropped.

Text goes once through one Arrow function (``batch``); what relates documents (the nearest LICENSE file) and what
judges stored signals (``verdicts``) is Spark SQL. Rejected documents stay, with the rules that rejected them.
"""

from __future__ import annotations

from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.pandas.types import from_arrow_schema

from pipelines.clean.batch import LICENSE_OUTPUT, OUTPUT, cleaner, license_batches
from pipelines.clean.config import CleanConfig
from pipelines.clean.licenses import LICENSE_FILE
from pipelines.clean.verdicts import rejected_by
from pipelines.errors import LakeError
from pipelines.lake import StageResult, ensure, read, sync, version
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


def licenses_by_source(bronze: DataFrame) -> DataFrame:
    """(source, licenses: map of folder to SPDX expression); several LICENSE files in a folder hold together (AND)."""
    is_license = F.regexp_extract("source_id", "[^/]+$", 0).rlike(LICENSE_FILE)
    files = bronze.where((F.col("kind") == "text") & is_license).select("source", "source_id", "content")
    found = files.mapInArrow(license_batches, from_arrow_schema(LICENSE_OUTPUT)).where("license IS NOT NULL")
    one = F.expr(
        "array_join(array_sort(collect_set(IF(license LIKE '% OR %', concat('(', license, ')'), license))), ' AND ')"
    )
    folders = found.groupBy("source", "directory").agg(one.alias("license"))
    return folders.groupBy("source").agg(
        F.expr("map_from_entries(array_sort(collect_list(struct(directory, license))))").alias("licenses")
    )


def silver(bronze: DataFrame, config: CleanConfig, run_id: str) -> DataFrame:
    """The rows of silver.documents that bronze documents give, in the table's columns."""
    with_licenses = (
        bronze.select(*_COLUMNS)
        .join(F.broadcast(licenses_by_source(bronze)), "source", "left")
        .select(*_COLUMNS, F.expr(_NEAREST).alias("license_nearest"))
    )
    return (
        with_licenses.mapInArrow(cleaner(config), from_arrow_schema(OUTPUT))
        .withColumn("rejected_by", F.expr(rejected_by(config)))
        .withColumn("run_id", F.lit(run_id))
        .select(*SILVER_DOCUMENTS.schema.names)
    )


def run(spark: SparkSession, lake: str, config: CleanConfig, *, run_id: str) -> StageResult:
    """Make silver.documents what bronze.documents gives by the configuration; the same again commits nothing.

    Raises LakeError when there is no bronze.documents, or when a document was lost on the way.
    """
    bronze_version = version(spark, lake, BRONZE_DOCUMENTS)
    bronze = read(spark, lake, BRONZE_DOCUMENTS, bronze_version)
    ensure(spark, lake, SILVER_DOCUMENTS)
    change = sync(spark, lake, SILVER_DOCUMENTS, silver(_spread(spark, bronze), config, run_id))
    counts = funnel(read(spark, lake, SILVER_DOCUMENTS, change.version))
    if (documents := bronze.count()) != counts["documents"]:
        raise LakeError(
            f"silver.documents has {counts['documents']} rows for {documents} of bronze.documents: "
            "another job writes this lake; run clean again when it has ended.",
            75,
        )
    counts |= {"inserted": change.inserted, "updated": change.updated, "deleted": change.deleted}
    return StageResult(
        counts=counts,
        inputs={BRONZE_DOCUMENTS.name: bronze_version or 0},
        outputs={SILVER_DOCUMENTS.name: change.version},
    )


def funnel(documents: DataFrame) -> dict[str, int]:
    """documents, accepted, rejected, rejected_by.RULE and redactions.TYPE of silver documents; counted in Spark."""
    total, accepted = documents.agg(
        F.count("*"), F.coalesce(F.sum(F.expr("IF(size(rejected_by) = 0, 1, 0)")), F.lit(0))
    ).head() or (0, 0)
    counts = {"documents": int(total), "accepted": int(accepted), "rejected": int(total) - int(accepted)}
    rules = documents.select(F.explode("rejected_by").alias("name")).groupBy("name").count()
    redacted = documents.select(F.explode("redactions").alias("name", "n")).groupBy("name").agg(F.sum("n"))
    for prefix, frame in (("rejected_by", rules), ("redactions", redacted)):
        counts |= {f"{prefix}.{name}": int(n) for name, n in frame.orderBy("name").toLocalIterator()}
    return counts


def _spread(spark: SparkSession, bronze: DataFrame) -> DataFrame:
    """A small table lies in one file, which one core would read: give every core a part."""
    cores = spark.sparkContext.defaultParallelism
    return bronze if bronze.rdd.getNumPartitions() >= cores else bronze.repartition(cores, "document_id")
