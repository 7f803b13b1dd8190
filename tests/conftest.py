"""Fixtures for all rooms: one Spark session for the whole test run, one fresh lake a test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

# A machine that is busy with Spark is no failure of a law.
settings.register_profile("lakemoe", deadline=None)
settings.load_profile("lakemoe")

if TYPE_CHECKING:
    from pyspark.sql import SparkSession


@pytest.fixture(scope="session")
def spark() -> Iterator[SparkSession]:
    from pipelines.session import spark_session

    session = spark_session("lakemoe-tests", memory="1g", shuffle_partitions=2)
    yield session
    session.stop()


@pytest.fixture
def lake(tmp_path: Path) -> str:
    """The path of an empty lake."""
    return str(tmp_path / "lake")
