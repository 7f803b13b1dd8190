"""A session's empty MLflow store, and trainings of a tiny model beside copies of it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from tests.model.conftest import SMALLEST, WriteSequences
from tests.model.train.cases import Case


@pytest.fixture(scope="session")
def empty_mlflow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A migrated MLflow database without runs: migrating takes seconds, copying does not."""
    file = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    MlflowClient(tracking_uri=f"sqlite:///{file}").search_experiments()
    return file


@pytest.fixture
def settings(write_sequences: WriteSequences, tmp_path: Path, empty_mlflow: Path) -> Iterator[Callable[..., Case]]:
    """settings(name="a", **fields) -> a training of a tiny model on the test's lake, 8 steps; one store for all lakes.

    The store is named in an environment of its own: a test's monkeypatch.undo() leaves it.
    """
    lake = write_sequences()
    shutil.copy(empty_mlflow, tmp_path / "mlflow.db")

    def make(name: str = "a", **fields: Any) -> Case:
        common = {"steps": 8, "global_batch_size": 4, "checkpoint_every": 3, "warmup_steps": 2, "device": "cpu"}
        return Case(**{"lake": lake, "name": name, "overrides": SMALLEST, **common, **fields})

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
        yield make
