"""Where runs and models are kept: MLflow in the lake's own folder, or the server that MLFLOW_TRACKING_URI names.

Leaves out a registry apart from the tracking server.
"""

from __future__ import annotations

import contextlib
import logging
import os
from pathlib import Path

import mlflow
from mlflow import MlflowClient

from model.errors import ModelError

EXPERIMENT = "lakemoe"


def lake_folder(lake: str) -> Path:
    """The local folder of a lake, absolute. Errors: ModelError (2) for an object store."""
    if "://" in lake and not lake.startswith("file://"):
        raise ModelError(f"The lake {lake} is no local folder to keep MLflow's store in; set MLFLOW_TRACKING_URI.", 2)
    return Path(lake.removeprefix("file://")).resolve()


def tracking_uri(lake: str) -> str:
    """MLFLOW_TRACKING_URI where it is set, else the SQLite file LAKE/mlflow.db (the folder is made)."""
    if named := os.environ.get("MLFLOW_TRACKING_URI"):
        return named
    folder = lake_folder(lake)
    folder.mkdir(parents=True, exist_ok=True)
    return f"sqlite:///{folder}/mlflow.db"


def connect(lake: str, uri: str | None = None) -> MlflowClient:
    """Points this process's MLflow to the lake's store (or ``uri``) and gives a client to it."""
    uri = uri or tracking_uri(lake)
    # Migrations and the copying of files inside one machine are not worth a line each.
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    _create_store(uri)
    mlflow.set_tracking_uri(uri)
    mlflow.set_registry_uri(uri)
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def _create_store(uri: str) -> None:
    """Make MLflow's SQLite file where it is absent, whole or not at all; nothing for another kind of store.

    MLflow makes and migrates its tables one by one for seconds, and a file that a kill left half migrated can never be
    opened again (3.17.2: "table already exists"). So it is made under another name and linked to its own.
    """
    file = Path(uri.removeprefix("sqlite:///"))
    if not uri.startswith("sqlite:///") or file.exists():
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    for half in file.parent.glob(f".{file.name}.new-*"):
        half.unlink(missing_ok=True)
    made = file.with_name(f".{file.name}.new-{os.getpid()}")
    MlflowClient(tracking_uri=f"sqlite:///{made}").search_experiments(max_results=1)
    with contextlib.suppress(FileExistsError):  # another process was first: its file is as good
        os.link(made, file)
    made.unlink(missing_ok=True)


def experiment_id(client: MlflowClient, lake: str, name: str = EXPERIMENT) -> str:
    """The experiment's id. Made where it is absent; in the lake's own store its artifacts go to LAKE/mlartifacts."""
    found = client.get_experiment_by_name(name)
    if found is not None:
        return str(found.experiment_id)
    own = client.tracking_uri.startswith("sqlite:")
    location = (lake_folder(lake) / "mlartifacts" / name).as_uri() if own else None
    return str(client.create_experiment(name, artifact_location=location))
