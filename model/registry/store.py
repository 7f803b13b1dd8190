"""Where runs and models are kept: MLflow in the lake's own folder, or the server that MLFLOW_TRACKING_URI names.

Leaves out a registry apart from the tracking server.
"""

from __future__ import annotations

import fcntl
import logging
import os
from pathlib import Path

import mlflow
from mlflow import MlflowClient

from model.errors import ModelError
from model.lake import local_path
from model.loader.store import is_local

EXPERIMENT = "lakemoe"


def lake_folder(lake: str) -> Path:
    """The local folder of a lake, absolute. Errors: ModelError (2) for an object store."""
    if not is_local(lake):
        raise ModelError(f"The lake {lake} is no local folder to keep MLflow's store in; set MLFLOW_TRACKING_URI.", 2)
    return local_path(lake).resolve()


def tracking_uri(lake: str) -> str:
    """MLFLOW_TRACKING_URI where it is set, else the SQLite file LAKE/mlflow.db."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{lake_folder(lake)}/mlflow.db"


def connect(lake: str, *, create: bool = True) -> MlflowClient:
    """Points this process's MLflow to the lake's store and gives a client to it.

    create: make the store where it is absent. Who only reads does not, so that a mistyped lake is not made; then an
    absent store is a ModelError.
    """
    uri = tracking_uri(lake)
    absent = _absent_file(uri)
    if absent and not create:
        raise ModelError(f"There is no {absent}; register and promote a model first, or name another --lake.")
    # Migrations and the copying of files inside one machine are not worth a line each.
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    if absent:
        _create_store(absent)
    named = os.environ.get("MLFLOW_TRACKING_URI")
    mlflow.set_tracking_uri(uri)
    if named is None:  # MLflow sets the variable, and another lake would get this one's store
        os.environ.pop("MLFLOW_TRACKING_URI", None)
    mlflow.set_registry_uri(uri)
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def has_store(lake: str) -> bool:
    """Whether there is a store to ask; a server counts, whether it answers or not."""
    return _absent_file(tracking_uri(lake)) is None


def _absent_file(uri: str) -> Path | None:
    """The SQLite file of a store that is not there yet; None for a store that is there or of another kind."""
    file = Path(uri.removeprefix("sqlite:///"))
    return file if uri.startswith("sqlite:///") and not file.exists() else None


def _create_store(file: Path) -> None:
    """Make MLflow's SQLite file where it is absent, whole or not at all, one process at a time.

    MLflow makes and migrates its tables one by one for seconds, and a file that a kill left half migrated can never be
    opened again (3.17.2: "table already exists"). So it is made under another name and renamed.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.with_name(f".{file.name}.lock").open("w") as lock:  # held no longer than its process lives
        fcntl.flock(lock, fcntl.LOCK_EX)
        if file.exists():  # another process was first
            return
        for half in file.parent.glob(f".{file.name}.new*"):  # SQLite's journal of it too
            half.unlink()
        made = file.with_name(f".{file.name}.new")
        MlflowClient(tracking_uri=f"sqlite:///{made}").search_experiments(max_results=1)
        made.rename(file)


def experiment_id(client: MlflowClient, name: str = EXPERIMENT) -> str:
    """The experiment's id. Made where it is absent; a SQLite store's artifacts go to mlartifacts beside its file."""
    found = client.get_experiment_by_name(name)
    if found is not None:
        return str(found.experiment_id)
    location = None
    if client.tracking_uri.startswith("sqlite:///"):
        folder = Path(client.tracking_uri.removeprefix("sqlite:///")).absolute().parent
        location = (folder / "mlartifacts" / name).as_uri()
    return str(client.create_experiment(name, artifact_location=location))
