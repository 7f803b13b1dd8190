"""Fixtures for all rooms: one Spark session for the whole test run, one fresh lake a test.

Run by several workers (pytest -n 2, as `make test` does), all tests that need Spark go to one of them, and the tests of
any other file stay together.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings
from xdist.scheduler import LoadScopeScheduling

if "PYTEST_XDIST_WORKER" in os.environ:
    # Before torch is imported, here and in the processes that tests start: OpenMP's threads wait for each other, which
    # on cores that another worker uses is many times slower than one thread.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # A JVM that lives for a minute gains nothing from its second compiler, which takes a third of its CPU time, or from
    # a collector with threads of its own.
    os.environ.setdefault("JAVA_TOOL_OPTIONS", "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC")

# A machine that is busy with Spark is no failure of a law.
settings.register_profile("lakemoe", deadline=None)
settings.load_profile("lakemoe")

if TYPE_CHECKING:
    from pyspark.sql import SparkSession


@pytest.fixture(scope="session")
def spark() -> Iterator[SparkSession]:
    from pipelines.session import spark_session

    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("JAVA_TOOL_OPTIONS", raising=False)  # this one lives long
        session = spark_session("lakemoe-tests", memory="2g", shuffle_partitions=2)
    yield session
    session.stop()


@pytest.fixture(autouse=True)
def forgotten_lakes(request: pytest.FixtureRequest) -> Iterator[None]:
    """After a test Spark forgets its tables: what Delta keeps of each lake would fill the heap of a long test run."""
    yield
    if "spark" in request.fixturenames:
        session = request.getfixturevalue("spark")
        session.catalog.clearCache()
        session._jvm.org.apache.spark.sql.delta.DeltaLog.clearCache()


@pytest.fixture
def lake(tmp_path: Path) -> str:
    """The path of an empty lake."""
    return str(tmp_path / "lake")


def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> LoadScopeScheduling:
    return OneSpark(config, log)


class OneSpark(LoadScopeScheduling):
    """A file's tests go to one worker, and all files that use the Spark session to the same one."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.split("::")[0]
        return "spark" if ": SparkSession" in (self.config.rootpath / file).read_text(encoding="utf-8") else file
