"""Train a mixture of experts on a pinned version of gold.sequences; killed anywhere, the next run goes on."""

from __future__ import annotations

import sys

from pydantic import Field

from jobs import console, runs
from jobs.main import main
from jobs.settings import JobSettings
from model.registry.store import tracking_uri
from model.train.config import TrainConfig, TrainSummary
from model.train.journal import read_run
from model.train.trainer import train
from pipelines.tables import GOLD_SEQUENCES


class Settings(JobSettings):
    """Train a mixture of experts on a pinned version of gold.sequences; killed anywhere, the next run goes on."""

    train: TrainConfig = Field(default_factory=TrainConfig, description="settings of the training")


def run_training(lake: str, config: TrainConfig) -> TrainSummary:
    """Train, or find it done, and record it in ops.runs."""
    before = read_run(config.output_folder(lake)) or {}
    with runs.recorded(lake, "train", config.model_dump(mode="json")) as run:
        summary = train(lake, config, code_version=runs.code_version())
        data = (read_run(config.output_folder(lake)) or {})["data"]
        run.inputs, run.mlflow_run_id = {GOLD_SEQUENCES.name: data["version"]}, summary.mlflow_run_id
        run.counts = {"steps": summary.step, "tokens": summary.tokens}
        if before.get("logged"):
            run.status = "unchanged"
    console.done("train", run.status, run.counts)
    return summary


def run(settings: Settings) -> None:
    summary = run_training(settings.lake, settings.train)
    console.note(f"The checkpoint is {summary.checkpoint}, the last loss {summary.final_loss:.4f} nats a token.")
    store = tracking_uri(settings.lake)
    console.note(f"The run is {summary.mlflow_run_id}; to see it: mlflow ui --backend-store-uri {store}")
    console.note(f"Next: lakemoe evaluate --training {settings.train.name} --lake {settings.lake}")


if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
