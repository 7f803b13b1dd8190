"""A tiny training with the lake that it is on, and what it left: for the tests of the trainer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from model.registry.store import tracking_uri
from model.train import trainer
from model.train.config import TrainConfig, TrainSummary


class Case(TrainConfig):
    """A training with the lake that it is on."""

    lake: str

    @property
    def output_path(self) -> Path:
        return self.output_folder(self.lake)


def train(case: Case, code_version: str | None = None) -> TrainSummary:
    config = TrainConfig(**case.model_dump(exclude={"lake"}))
    return trainer.train(case.lake, config, code_version=code_version)


def weights(config: Case) -> bytes:
    folder = config.output_path
    final = json.loads((folder / "run.json").read_text())["final"]
    return (folder / "checkpoints" / final / "model.safetensors").read_bytes()


def curve(config: Case) -> list[tuple[int, float, float, float]]:
    lines = [json.loads(line) for line in (config.output_path / "metrics.jsonl").read_text().splitlines()]
    return [(m["step"], m["loss"], m["aux_loss"], m["gradient_norm"]) for m in lines]


def mlflow_curve(config: Case, run_id: str) -> list[tuple[int, float]]:
    history = MlflowClient(tracking_uri=tracking_uri(config.lake)).get_metric_history(run_id, "loss")
    return [(m.step, m.value) for m in history]


def runs(config: Case) -> list[Any]:
    client = MlflowClient(tracking_uri=tracking_uri(config.lake))
    experiment = client.get_experiment_by_name(config.experiment)
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    return [r for r in runs if r.info.run_name == config.name]


def stop_after(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    """Interrupt a training before step number steps + 1."""

    real, done = trainer.compute_gradients, 0

    def compute(*args: Any) -> Any:
        nonlocal done
        if done == steps:
            raise KeyboardInterrupt
        done += 1
        return real(*args)

    monkeypatch.setattr(trainer, "compute_gradients", compute)
