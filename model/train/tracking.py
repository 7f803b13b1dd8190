"""One MLflow run for one training, also over restarts, and no step of it twice.

The run is found by its id in run.json, or, where a kill fell between making it and writing that down, by a tag. Metrics
are sent from the journal, whole steps at a time and in order, only up to a checkpoint's step; the last step that MLflow
has says where to go on. They are sent by a thread of their own, so that a tracking server that is slow does not slow
the training; one that fails costs a warning, and the next checkpoint catches up.

Leaves out: the model, which the registry logs.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT

from model.errors import ModelError
from model.registry.store import connect, experiment_id, tracking_uri
from model.train.config import TrainConfig
from model.train.journal import Journal
from model.train.plots import figures

TRAINING_TAG = "lakemoe.training_id"
OUTPUT_TAG = "lakemoe.output"  # of a training whose folder is not in its lake
ANCHOR = "loss"  # the metric whose last step says how far MLflow got
METRICS_A_CALL = 1000  # MLflow's limit
LAYER_METRICS = ("expert_load_max", "layer_entropy", "layer_dead_experts")  # tokens an expert stay in the journal


class Tracking:
    """The training's MLflow run. Opening it raises ModelError (75) where the tracking server cannot be used."""

    def __init__(self, lake: str, config: TrainConfig, training_id: str, run_id: str | None) -> None:
        self.uri = tracking_uri(lake)
        try:
            # Down servers are asked for two minutes by default; the training need not wait that long.
            os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
            self._client = connect(lake)
            self._experiment_id = experiment_id(self._client, config.experiment)
            self.run_id = run_id or self._find(training_id) or self._create(config, training_id)
            self._client.update_run(self.run_id, status="RUNNING")
        except (MlflowException, OSError) as error:
            raise ModelError(f"MLflow at {self.uri} cannot be used ({error}); mend it and run again.", 75) from error

    def _find(self, training_id: str) -> str | None:
        found = self._client.search_runs(
            [self._experiment_id], f"tags.`{TRAINING_TAG}` = '{training_id}'", max_results=1
        )
        return str(found[0].info.run_id) if found else None

    def _create(self, config: TrainConfig, training_id: str) -> str:
        tags = {TRAINING_TAG: training_id, "lakemoe.version": _code_version()}
        if config.output is not None:
            tags[OUTPUT_TAG] = str(Path(config.output).absolute())
        run = self._client.create_run(self._experiment_id, run_name=config.name, tags=tags)
        return str(run.info.run_id)

    def describe(self, parameters: dict[str, Any], data: dict[str, Any]) -> None:
        """Parameters, and the table with its version as dataset input and as tags. Saying it again changes nothing."""
        source = {"path": data["uri"], "delta_table_name": data["table"], "delta_table_version": data["version"]}
        dataset = Dataset(
            name=data["table"],
            digest=data["content"][:32],
            source_type="delta_table",
            source=json.dumps(source),
            profile=json.dumps({"num_rows": data["num_sequences"], "sequence_length": data["sequence_length"]}),
        )
        tags = {f"lakemoe.data.{key}": str(value) for key, value in data.items()}
        try:
            self._client.log_batch(
                self.run_id,
                params=[Param(key, str(value)) for key, value in parameters.items()],
                tags=[RunTag(key, value) for key, value in tags.items()],
            )
            self._client.log_inputs(self.run_id, [DatasetInput(dataset, [InputTag(MLFLOW_DATASET_CONTEXT, "train")])])
        except (MlflowException, OSError) as error:
            raise ModelError(f"MLflow at {self.uri} cannot be used ({error}); mend it and run again.", 75) from error

    def send(self, journal: Journal, until: int) -> str | None:
        """Send the journal's steps up to ``until`` that MLflow lacks. What went wrong, where something did."""
        try:
            history = self._client.get_metric_history(self.run_id, ANCHOR)
            after = max((m.step for m in history), default=0)
            steps = (_metrics(line) for line in journal.lines(after, until))
            for batch in _whole_steps(steps):
                self._client.log_batch(self.run_id, metrics=batch)
        except (MlflowException, OSError) as error:
            return f"MLflow at {self.uri} took no metrics ({error})"
        return None

    @contextlib.contextmanager
    def follow(self, journal: Journal, say: Callable[[str], None]) -> Iterator[Callable[[int], None]]:
        """Send the journal in the background up to each step that the given function is told, until the end."""
        told: SimpleQueue[int | None] = SimpleQueue()

        def work() -> None:
            ended = False
            while not ended and (until := told.get()) is not None:
                while not ended and not told.empty():  # only the newest counts
                    newer = told.get()
                    ended = newer is None
                    until = until if newer is None else newer
                try:
                    trouble = self.send(journal, until)
                except Exception as error:  # a thread that ends would say nothing more
                    trouble = f"the metrics could not be sent ({error})"
                if trouble:
                    say(f"train: {trouble}; the next checkpoint tries again")

        thread = threading.Thread(target=work, name="mlflow")
        thread.start()
        try:
            yield told.put
        finally:
            told.put(None)
            thread.join()

    def draw(self, journal: Journal, steps: int) -> str | None:
        """The finished training's pictures, as artifacts below plots/. What went wrong, where something did."""
        try:
            for name, figure in figures(journal.lines(until=steps), steps).items():
                self._client.log_figure(self.run_id, figure, f"plots/{name}")
        except Exception as error:  # artifact stores raise what their clients do
            return f"the pictures were not kept ({error}); metrics.jsonl has what they show"
        return None

    def end(self, status: str) -> None:
        """Mark the run FINISHED, FAILED or KILLED, where MLflow can be reached."""
        try:
            self._client.set_terminated(self.run_id, status=status)
        except (MlflowException, OSError):
            return  # the run's metrics are what matters; the next restart sets the status


def _metrics(line: dict[str, Any]) -> list[Metric]:
    numbers = {k: float(v) for k, v in line.items() if k not in ("step", "time") and isinstance(v, int | float)}
    for name in LAYER_METRICS:
        for layer, value in enumerate(line.get(name, ())):
            numbers[f"{name}/layer_{layer:02d}"] = float(value)
    return [Metric(k, v, line["time"], line["step"]) for k, v in sorted(numbers.items())]


def _whole_steps(steps: Iterable[list[Metric]]) -> Iterable[list[Metric]]:
    """Steps' metrics put together to calls under MLflow's limit. A step is never divided: each call is one transaction,
    so that a kill leaves whole steps behind."""
    batch: list[Metric] = []
    for step in steps:
        if batch and len(batch) + len(step) > METRICS_A_CALL:
            yield batch
            batch = []
        batch += islice(step, METRICS_A_CALL)
    if batch:
        yield batch


def _code_version() -> str:
    try:
        return version("lakemoe")
    except PackageNotFoundError:
        return "unknown"
