"""The process's one Spark session: Delta configured, small-data defaults for local runs.

A cluster's own session, where one is active, is used as it is. What the JVM prints goes to a file: its start alone is
a hundred lines that nobody who waits for a result wants to read. ``python -m pipelines.session`` starts and stops one,
which fetches Delta's JARs into the environment (``jars.py``).
"""

from __future__ import annotations

import atexit
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

from pyspark import SparkConf, SparkContext
from pyspark.java_gateway import launch_gateway
from pyspark.logger import PySparkLogger
from pyspark.sql import SparkSession

from pipelines import jars
from pipelines.errors import LakeError
from pipelines.java import java_home

# What Spark generates for its queries fills the default code cache (240 MB) of a session that lives long, and a JVM
# that must throw out code is several times slower.
_JAVA_OPTIONS = "-XX:ReservedCodeCacheSize=512m -Dlog4j2.level=ERROR -Divy.message.logger.level=0"
# Of a local run: the JVM's first compiler alone. Reading and counting text is Python's, and what the second one would
# make faster does not pay for its work, up to 300 MB and more (benchmarks/README.md, "The pipeline beside datatrove").
_LOCAL_JAVA_OPTIONS = "-XX:TieredStopAtLevel=1"


# What the JVM says where another try cannot help: a file or folder of its own that it cannot make.
_UNWRITABLE = re.compile(
    r"Exception: (?P<file>/.+?) \((?:Permission denied|Read-only file system|Not a directory|No such file or directory)"
    r"\)"
    r"|AccessDeniedException: (?P<denied>/\S+)"
    r"|Failed to create local dir in (?P<folder>/.+?)\. Ignoring"
)
_UNRESOLVED = re.compile(r"unresolved dependency: (\S+?): not found")
_NETWORK = re.compile(
    r"Host \S+ not found|Server access error|UnknownHost|ConnectException|Connection (?:refused|reset)"
    r"|[Tt]imed? ?[Oo]ut|Network is unreachable|No route to host"
)


def spark_session(
    app_name: str = "lakemoe",
    *,
    memory: str = "2g",
    shuffle_partitions: int | None = None,
    jars_folder: Path | None = None,
) -> SparkSession:
    """Start, or return, the session.

    memory: the local driver's heap (JVM notation). shuffle_partitions: default the number of cores, for local runs.
    jars_folder: where Delta's JARs are fetched to when they are nowhere; default the user's.
    Raises LakeError when there is no usable Java (exit code 2), and when Spark does not start: 1 where a folder cannot
    be written or no repository has a JAR, else 75.
    """
    if active := SparkSession.getActiveSession():
        return active
    os.environ["JAVA_HOME"] = java_home()
    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    os.environ.setdefault("PYSPARK_DRIVER_PYTHON", sys.executable)
    # The driver's Python workers inherit it: a local run must find the package also when it runs from a checkout.
    os.environ.setdefault("SPARK_LOCAL_IP", "127.0.0.1")
    folder, wanted = jars_folder or jars.of_user(), jars.packages()
    of_jars = jars.settings(wanted, folder)
    # Tables are named by their path in a lake: Spark's own warehouse stays empty, and out of the working directory.
    warehouse = tempfile.mkdtemp(prefix="lakemoe-warehouse-")
    atexit.register(shutil.rmtree, warehouse, ignore_errors=True)
    master = os.environ.get("LAKEMOE_SPARK_MASTER", "local[*]")
    java_options = os.environ.get("LAKEMOE_JAVA_OPTIONS", _LOCAL_JAVA_OPTIONS if master.startswith("local") else "")
    cores = os.cpu_count() or 2
    partitions = str(shuffle_partitions or max(2, cores))
    builder = (
        SparkSession.builder.appName(app_name)
        .master(master)
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
        .config("spark.driver.extraJavaOptions", f"{_JAVA_OPTIONS} {java_options}".strip())
        .config("spark.log.level", "ERROR")
    )
    for key, value in of_jars.items():
        builder = builder.config(key, value)
    handle, name = tempfile.mkstemp(prefix="lakemoe-spark-", suffix=".log")
    log = Path(name)
    atexit.register(log.unlink, missing_ok=True)
    try:
        if SparkContext._gateway is None and SparkContext._active_spark_context is None:
            # This way round, what the JVM prints can be led elsewhere.
            conf = SparkConf().setAll(list(builder._options.items()))
            SparkContext(conf=conf, gateway=launch_gateway(conf, {"stdout": handle, "stderr": handle}))
        session = builder.getOrCreate()
    except Exception as error:
        atexit.unregister(log.unlink)
        raise _explained(error, log, folder) from error
    finally:
        os.close(handle)
    if "spark.jars.packages" in of_jars:
        jars.remember(folder, wanted, session.sparkContext.getConf().get("spark.jars") or "")
    session.sparkContext.setLogLevel("ERROR")
    for name in ("SQLQueryContextLogger", "DataFrameQueryContextLogger"):
        # PySpark logs an error as a line of JSON before it raises it, and what is raised says the same.
        PySparkLogger.getLogger(name).disabled = True
    return session


def _explained(error: BaseException, log: Path, folder: Path) -> LakeError:
    """What kept Spark from starting, by what the JVM wrote into the log. folder: where JARs are fetched to."""
    # Spark asks its own repository too, which has none of them.
    said = "".join(
        line for line in log.read_text(errors="replace").splitlines(keepends=True) if "spark-packages" not in line
    )
    if found := _UNWRITABLE.search(said):
        file = found["file"]
        place = os.path.dirname(file) if file else found["denied"] or found["folder"]
        return LakeError(
            f"Spark could not start, because {place} cannot be written: mend that, or name other folders by HOME, "
            f"XDG_CACHE_HOME or SPARK_LOCAL_DIRS ({log} has its words)."
        )
    if (found := _UNRESOLVED.search(said)) and not _NETWORK.search(said):
        return LakeError(
            f"Spark could not start, because no repository has {found[1]} to be fetched into {folder}: check the "
            f"versions of pyspark and delta-spark ({log} has its words)."
        )
    if found:
        return LakeError(
            f"Spark could not start, because {found[1]} could not be fetched into {folder}: run again with a network "
            f"({log} has its words).",
            75,
        )
    return LakeError(f"Spark could not start ({_first_line(error)}); {log} says why, mend it and run again.", 75)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")


if __name__ == "__main__":
    spark_session(jars_folder=jars.in_environment()).stop()
