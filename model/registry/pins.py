"""Who still needs an old version of a table: registered models, and trainings that are not finished."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from deltalake import DeltaTable
from deltalake.exceptions import TableNotFoundError
from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.exceptions import MlflowException
from mlflow.store.tracking import SEARCH_MAX_RESULTS_THRESHOLD

from model.errors import ModelError
from model.loader.store import is_local
from model.registry.register import PREFIX
from model.registry.store import connect, has_store, lake_folder
from model.train.config import TRAININGS
from model.train.journal import read_run
from model.train.tracking import OUTPUT_TAG
from pipelines.tables import GOLD_SEQUENCES, table_uri


@dataclass(frozen=True, kw_only=True)
class Pin:
    """A table at a version, and who needs it, as the subject of a sentence."""

    holder: str
    table: str
    version: int


def pins(lake: str) -> Iterator[Pin]:
    """The pins of every registered version and unfinished training of a lake.

    Of trainings whose output is elsewhere MLflow knows: a run that is not finished, until it is deleted.
    Raises ModelError (exit code 75) where MLflow cannot be asked.
    """
    tag = PREFIX + GOLD_SEQUENCES.name
    try:
        table_id = str(DeltaTable(table_uri(lake, GOLD_SEQUENCES.name)).metadata().id)
    except TableNotFoundError:
        return
    if has_store(lake):
        try:
            client = connect(lake, create=False)
            found = client.search_model_versions()
            elsewhere = _unfinished(client, table_id)
        except MlflowException as error:
            raise ModelError(f"MLflow cannot say who needs old data ({error}); start it and run again.", 75) from error
        for version in found:
            # A server may hold models of other lakes.
            if version.tags.get(f"{tag}.table_id") == table_id:
                holder = f"The model {version.name} version {version.version}"
                yield Pin(holder=holder, table=GOLD_SEQUENCES.name, version=int(version.tags[f"{tag}.version"]))
        for run in elsewhere:
            holder = f"The training {run.info.run_name} in {run.data.tags[OUTPUT_TAG]}, which is not finished,"
            yield Pin(holder=holder, table=GOLD_SEQUENCES.name, version=int(run.data.tags["lakemoe.data.version"]))
    folder = lake_folder(lake) / TRAININGS if is_local(lake) else None
    for training in sorted(folder.iterdir()) if folder and folder.is_dir() else ():
        record = read_run(training) if training.is_dir() else None
        if record is not None and not record.get("logged"):
            holder = f"The training {training.name}, which is not finished,"
            yield Pin(holder=holder, table=GOLD_SEQUENCES.name, version=int(record["data"]["version"]))


def _unfinished(client: MlflowClient, table_id: str) -> list[Run]:
    """Runs of trainings on a table, with outputs elsewhere, that are not finished."""
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    query = (
        f"tags.`lakemoe.data.table_id` = '{table_id}' and tags.`{OUTPUT_TAG}` LIKE '%' "
        "and attributes.status != 'FINISHED'"
    )
    return list(client.search_runs(experiments, query, max_results=SEARCH_MAX_RESULTS_THRESHOLD))
