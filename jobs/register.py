"""Register a finished training's last checkpoint in MLflow, with its held-out figures and lineage as tags."""

from __future__ import annotations

import sys
from pathlib import Path

from pydantic import Field

from jobs import console, evaluate, runs
from jobs.main import main
from jobs.settings import JobSettings
from model.evaluate.held_out import EvaluateConfig, Evaluation
from model.registry.register import RegisteredVersion, register
from model.train.config import TrainSummary
from model.train.plan import finished


class Settings(JobSettings):
    """Register a finished training's last checkpoint in MLflow, with its held-out figures and lineage as tags."""

    training: str = Field("quickstart", description="name of the finished training to register, or its output folder")
    name: str = Field("", description="the registered model's name; empty: the training's")
    evaluate: EvaluateConfig = Field(default_factory=EvaluateConfig, description="settings of the evaluation")


def run_registration(lake: str, name: str, training: TrainSummary, evaluation: Evaluation) -> RegisteredVersion:
    """Register, or find the same weights registered, and record it in ops.runs."""
    folder = Path(training.checkpoint)
    with console.working("register"), runs.recorded(lake, "register", {"name": name, "folder": str(folder)}) as run:
        version = register(folder, lake=lake, name=name, metrics=evaluation.metrics)
        run.inputs = {evaluation.data["table"]: evaluation.data["version"]}
        run.mlflow_run_id = training.mlflow_run_id
        run.status = "succeeded" if version.created else "unchanged"
    console.done("register", run.status, {"version": int(version.version)})
    return version


def run(settings: Settings) -> None:
    training = finished(settings.lake, settings.training)
    evaluation = evaluate.run_evaluation(settings.lake, Path(training.checkpoint), settings.evaluate)
    version = run_registration(settings.lake, settings.name or training.name, training, evaluation)
    console.note(f"The model is {version.uri}.")
    console.note(f"Next: lakemoe promote --model {version.name} --lake {settings.lake}")


if __name__ == "__main__":
    sys.exit(main(["register", *sys.argv[1:]]))
