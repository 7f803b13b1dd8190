"""The process's one Spark session: Delta configured, small-data defaults for local runs.

A cluster's own session, where one is active, is used as it is. What the JVM prints goes to a file: its start alone is
a hundred lines that nobody who waits for a result wants to read. ``python -m pipelines.session`` starts and stops one,
which fetches Delta's JARs.
"""

from __future__ import annotations

import atexit
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pyspark.sql import SparkSession

from pipelines.errors import LakeError
from pipelines.java import java_home

# What Spark generates for its queries fills the default code cache (240 MB) of a session that lives long, and a JVM
# that must throw out code is several times slower.
_JAVA_OPTIONS = "-XX:ReservedCodeCacheSize=512m -Dlog4j2.level=ERROR -Divy.message.logger.level=0"


def spark_session(
    app_name: str = "lakemoe", *, memory: str = "2g", shuffle_partitions: int | None = None
) -> SparkSession:
    """Start, or return, the session.

    memory: the local driver's heap (JVM notation). shuffle_partitions: default the number of cores, for local runs.
    Raises LakeError when there is no usable Java.
    """
    if active := SparkSession.getActiveSession():
        return active
    os.environ["JAVA_HOME"] = java_home()
    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    os.environ.setdefault("PYSPARK_DRIVER_PYTHON", sys.executable)
    # The driver's Python workers inherit it: a local run must find the package also when it runs from a checkout.
    os.environ.setdefault("SPARK_LOCAL_IP", "127.0.0.1")
    from delta import configure_spark_with_delta_pip

    # Tables are named by their path in a lake: Spark's own warehouse stays empty, and out of the working directory.
    warehouse = tempfile.mkdtemp(prefix="lakemoe-warehouse-")
    atexit.register(shutil.rmtree, warehouse, ignore_errors=True)
    cores = os.cpu_count() or 2
    partitions = str(shuffle_partitions or max(2, cores))
    builder = (
        SparkSession.builder.appName(app_name)
        .master(os.environ.get("LAKEMOE_SPARK_MASTER", "local[*]"))
        .config("spark.sql.extensions", "io.delta.sql.DeltaSparkSessionExtension")
        .config("spark.sql.catalog.spark_catalog", "org.apache.spark.sql.delta.catalog.DeltaCatalog")
        .config("spark.sql.warehouse.dir", warehouse)
        .config("spark.driver.memory", memory)
        .config("spark.driver.bindAddress", "127.0.0.1")
        .config("spark.sql.shuffle.partitions", partitions)
        .config("spark.databricks.delta.snapshotPartitions", "2")
        .config("spark.databricks.delta.stats.collect", "true")
        .config("spark.sql.execution.arrow.maxRecordsPerBatch", "512")
        .config("spark.sql.execution.arrow.pyspark.enabled", "true")
        .config("spark.sql.session.timeZone", "UTC")
        .config("spark.ui.enabled", os.environ.get("LAKEMOE_SPARK_UI", "false"))
        .config("spark.ui.showConsoleProgress", "false")
        # What is kept of past queries for the UI, plans above all, fills a small heap within a few hundred of them.
        .config("spark.sql.ui.retainedExecutions", "20")
        .config("spark.ui.retainedJobs", "100")
        .config("spark.ui.retainedStages", "100")
        .config("spark.ui.retainedTasks", "2000")
        # By default a 16th of a core's memory, in which a join's table of ten rows takes as much as one of a million: a
        # query with some twenty joins is then out of memory.
        .config("spark.buffer.pageSize", "2m")
        .config("spark.sql.sources.parallelPartitionDiscovery.parallelism", "2")
        .config("spark.sql.adaptive.coalescePartitions.enabled", "true")
        .config("spark.driver.extraJavaOptions", _JAVA_OPTIONS)
        .config("spark.log.level", "ERROR")
    )
    with _standard_error_in_file() as log:
        try:
            session = configure_spark_with_delta_pip(builder).getOrCreate()
        except Exception as error:
            atexit.unregister(log.unlink)
            raise LakeError(
                f"Spark could not start ({_first_line(error)}); {log} says why, mend it and run again.", 75
            ) from error
    session.sparkContext.setLogLevel("ERROR")
    return session


@contextmanager
def _standard_error_in_file() -> Iterator[Path]:
    """Processes started in the body write their standard error to this file, removed when this process ends."""
    handle, name = tempfile.mkstemp(prefix="lakemoe-spark-", suffix=".log")
    log = Path(name)
    atexit.register(log.unlink, missing_ok=True)
    sys.stderr.flush()
    own = os.dup(2)
    try:
        os.dup2(handle, 2)
        yield log
    finally:
        os.dup2(own, 2)
        os.close(own)
        os.close(handle)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")


if __name__ == "__main__":
    spark_session().stop()
