"""What a training is before its first step: data, model, record and MLflow run; begun anew or found as it was left."""

from __future__ import annotations

import os
import uuid
from pathlib import Path
from typing import Any

from model.config import ModelConfig, load_preset
from model.errors import ModelError
from model.lake import tokenizer_file
from model.loader.snapshot import Snapshot, open_sequences
from model.network.generate import load_tokenizer
from model.train.config import TrainConfig, TrainSummary
from model.train.journal import RUN, read_run, write_run

CHECKPOINTS = "checkpoints"


def plan(lake: str, config: TrainConfig, code_version: str | None) -> tuple[dict[str, Any], Snapshot | None]:
    """The training's record, run.json, which is written where there was none, and its data; none of one that is done.

    Errors: ModelError (2) where the settings are not those that the output began with, (1) where the data cannot be
    read.
    """
    output = config.output_folder(lake)
    record = read_run(output)
    if record is not None:
        _same(config.identity(), TrainConfig.identity_of(record["settings"]), output)
        if record.get("logged"):
            return record, None
    snapshot = open_data(lake, config, record)
    shape = model_config(lake, config, snapshot).model_dump(mode="json")
    if record is not None:
        # Read as a configuration, so that fields which came later have their defaults.
        then = ModelConfig(**record["model"]).model_dump(mode="json")
        _same(shape, then, output)
        return record, snapshot
    record = {
        "training_id": uuid.uuid4().hex,
        "name": config.name,
        "mlflow_run_id": None,
        "settings": config.identity(),
        "code_version": code_version,
        "model": shape,
        "data": snapshot.describe(),
        "final": None,
    }
    # Before the MLflow run is made: a kill in between leaves the id by which the run is found again.
    write_run(output, record)
    return record, snapshot


def forget(output: Path) -> None:
    """Leave no record of a training that has no checkpoint."""
    if not (output / CHECKPOINTS).is_dir() or not any((output / CHECKPOINTS).iterdir()):
        (output / RUN).unlink(missing_ok=True)


def finished(lake: str, training: str) -> TrainSummary:
    """The summary of a training that is done, by its name, or by its output folder where that lies elsewhere.

    Errors: ModelError (2) where there is none.
    """
    folder = Path(training)
    is_folder = os.sep in training or (folder / RUN).is_file()
    output = folder if is_folder else TrainConfig(name=training).output_folder(lake)
    record = read_run(output)
    if record is None or not record.get("logged"):
        raise ModelError(f"{output} holds no finished training: run lakemoe train, or name another training.", 2)
    return summary(output, record)


def summary(output: Path, record: dict[str, Any]) -> TrainSummary:
    """Of a finished training, whose folder may have moved since."""
    folder = output / CHECKPOINTS / record["final"]
    if not folder.is_dir():
        raise ModelError(f"The finished training's checkpoint {folder} is gone; restore it or name another training.")
    known = {"checkpoint": str(folder), "name": record.get("name") or output.resolve().name}
    return TrainSummary(**{**record["summary"], **known})


def open_data(lake: str, config: TrainConfig, record: dict[str, Any] | None) -> Snapshot:
    """The training's data: what it began with, else what the settings name, else the latest version."""
    if record is None:
        return open_sequences(lake, config.sequences_version, "train", config.tokenizer_id, config.sequence_length)
    data = record["data"]
    snapshot = open_sequences(lake, data["version"], "train", data["tokenizer_id"], data["sequence_length"])
    if (snapshot.table_id, snapshot.content) != (data["table_id"], data["content"]):
        raise ModelError(
            f"{snapshot.uri} at version {snapshot.version} is not the table that this training began with; "
            "name another output to train on it."
        )
    return snapshot


def parameters(record: dict[str, Any]) -> dict[str, Any]:
    """What MLflow shows of a training: settings, shape and counts."""
    model = ModelConfig(**record["model"])
    settings = {k: v for k, v in record["settings"].items() if k != "overrides"}
    shape = {f"model.{k}": v for k, v in record["model"].items()}
    counts = {"parameters": model.parameters, "active_parameters": model.active_parameters}
    return {**settings, **shape, **counts}


def model_config(lake: str, config: TrainConfig, snapshot: Snapshot) -> ModelConfig:
    """The preset with its overrides and the vocabulary of the tokenizer that the data was made with."""
    tokenizer = load_tokenizer(str(tokenizer_file(lake, snapshot.tokenizer_id)))
    vocabulary = tokenizer.get_vocab_size(with_added_tokens=True)
    overrides = {"vocab_size": vocabulary, **config.overrides}
    model = load_preset(config.preset, **overrides)
    if model.vocab_size < vocabulary:
        raise ModelError(f"vocab_size {model.vocab_size} is less than the tokenizer's {vocabulary}; leave it out.", 2)
    if model.max_seq_len < snapshot.sequence_length:
        raise ModelError(
            f"The data's sequences have {snapshot.sequence_length} tokens, the model takes {model.max_seq_len}; "
            "override max_seq_len or pack shorter sequences.",
            2,
        )
    return model


def _same(now: dict[str, Any], then: dict[str, Any], output: Path) -> None:
    different = [f"{k} was {then.get(k)!r} and is now {v!r}" for k, v in now.items() if then.get(k) != v]
    if different:
        raise ModelError(
            f"{output} holds a training with other settings ({'; '.join(different)}); "
            "train under another name (--train.name) or take those settings.",
            2,
        )
