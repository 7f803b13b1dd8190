"""Who still needs an old version of a table: registered models, and trainings that are not finished."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from deltalake import DeltaTable
from deltalake.exceptions import TableNotFoundError
from mlflow.exceptions import MlflowException

from model.errors import ModelError
from model.lake import is_local
from model.registry.register import PREFIX
from model.registry.store import connect, has_store, lake_folder
from model.train.config import TRAININGS
from model.train.journal import read_run
from pipelines.tables import GOLD_SEQUENCES, table_uri


@dataclass(frozen=True, kw_only=True)
class Pin:
    """A table at a version, and who needs it, as the subject of a sentence."""

    holder: str
    table: str
    version: int


def pins(lake: str) -> Iterator[Pin]:
    """The pins of every registered version and unfinished training of a lake; those with an output elsewhere not.

    Raises ModelError (exit code 75) where MLflow cannot be asked.
    """
    tag = PREFIX + GOLD_SEQUENCES.name
    try:
        table_id = str(DeltaTable(table_uri(lake, GOLD_SEQUENCES.name)).metadata().id)
    except TableNotFoundError:
        return
    if has_store(lake):
        try:
            found = connect(lake, create=False).search_model_versions()
        except MlflowException as error:
            raise ModelError(f"MLflow cannot say who needs old data ({error}); start it and run again.", 75) from error
        for version in found:
            # A server may hold models of other lakes.
            if version.tags.get(f"{tag}.table_id") == table_id:
                holder = f"The model {version.name} version {version.version}"
                yield Pin(holder=holder, table=GOLD_SEQUENCES.name, version=int(version.tags[f"{tag}.version"]))
    folder = lake_folder(lake) / TRAININGS if is_local(lake) else None
    for training in sorted(folder.iterdir()) if folder and folder.is_dir() else ():
        record = read_run(training)
        if record is not None and not record.get("logged"):
            holder = f"The training {training.name}, which is not finished,"
            yield Pin(holder=holder, table=GOLD_SEQUENCES.name, version=int(record["data"]["version"]))
