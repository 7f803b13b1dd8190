"""How far Spark is: the tasks done and the rows read by the queries under way, asked of Spark's own status store."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

_EVERY = 0.5  # seconds


@contextmanager
def watched(spark: SparkSession, show: Callable[[str], None]) -> Iterator[None]:
    """While the body runs, ``show`` is told how far Spark is."""
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(_EVERY):
            try:
                show(far(spark))
            except Exception:  # a session that ends takes its store along; progress is no reason to fail
                return

    watcher = threading.Thread(target=watch, name="progress", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()


def far(spark: SparkSession) -> str:
    """Tasks done of those of the queries' stages under way, and rows that they have read; empty where none is."""
    stages = spark.sparkContext._jsc.sc().statusStore().activeStages()
    done = tasks = rows = 0
    for i in range(stages.length()):
        stage = stages.apply(i)
        done, tasks = done + stage.numCompleteTasks(), tasks + stage.numTasks()
        rows += stage.inputRecords() + stage.shuffleReadRecords()
    return f"{done:,}/{tasks:,} tasks, {rows:,} rows" if tasks else ""
