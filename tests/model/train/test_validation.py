"""The validation split's losses while a training runs: what evaluation finds, and nothing that a step could notice."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from model.config import ModelConfig
from model.evaluate.held_out import EvaluateConfig, evaluate_folder
from model.loader.snapshot import open_sequences
from model.network.transformer import Transformer
from model.train.config import TrainConfig
from model.train.trainer import train
from model.train.validation import Validation, open_validation
from model.train.world import World
from tests.model.conftest import SMALLEST, WriteSequences

SETTINGS: dict[str, Any] = {
    "steps": 5,
    "global_batch_size": 4,
    "warmup_steps": 1,
    "learning_rate": 1e-2,
    "device": "cpu",
    "overrides": {**SMALLEST, "router_jitter": 0.1},
}


def lines(lake: str, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(lake, "training", name, "metrics.jsonl").read_text().splitlines()]


def test_the_last_validation_loss_is_what_evaluation_finds(write_sequences: WriteSequences) -> None:
    lake = write_sequences(validation=7)
    done = train(lake, TrainConfig(**SETTINGS, name="a", validate_every=2, micro_batch_size=2))
    looked = [line for line in lines(lake, "a") if "validation_loss" in line]
    assert [line["step"] for line in looked] == [2, 4, 5]
    assert looked[-1]["validation_loss"] < looked[0]["validation_loss"]
    found = evaluate_folder(Path(done.checkpoint), lake, EvaluateConfig())
    assert looked[-1]["validation_loss"] == pytest.approx(found.total.loss, rel=1e-5)
    for domain in ("code", "text"):
        assert looked[-1][f"validation_loss/{domain}"] == pytest.approx(found.domains[domain].loss, rel=1e-5)


def test_looking_changes_no_weight_and_may_be_changed(write_sequences: WriteSequences) -> None:
    lake = write_sequences()
    often = train(lake, TrainConfig(**SETTINGS, name="often", validate_every=1))
    never = train(lake, TrainConfig(**SETTINGS, name="never", validate_every=0))
    files = [Path(summary.checkpoint, "model.safetensors").read_bytes() for summary in (often, never)]
    assert files[0] == files[1]
    assert not any("validation_loss" in line for line in lines(lake, "never"))
    # A training that is done is found done with other looks.
    assert train(lake, TrainConfig(**SETTINGS, name="often", validate_every=3, validation_sequences=2)) == often


@pytest.mark.parametrize(("sequences", "size"), [(7, 1), (7, 2), (7, 3), (5, 4), (2, 4), (100, 2)])
def test_ranks_share_the_sequences_and_count_each_once(
    write_sequences: WriteSequences, monkeypatch: pytest.MonkeyPatch, sequences: int, size: int
) -> None:
    lake = write_sequences(validation=7)
    split = open_sequences(lake, split="validation")
    model = Transformer(ModelConfig(**SMALLEST, vocab_size=261))
    whole = Validation(split, sequences, 3, World(device=model.device)).losses(model)
    # One process in the place of each rank; what each would add to the sum is added up here.
    summed: list[Tensor] = []
    monkeypatch.setattr(World, "total", lambda self, tensor: summed.append(tensor.clone()) or tensor)
    passes = set()
    for rank in range(size):
        part = Validation(split, sequences, 3, World(device=model.device, rank=rank, size=size))
        passes.add(len(part._batches))
        part.losses(model)
    losses, targets = sum(summed[1:], start=summed[0]).tolist()
    assert sum(losses) / sum(targets) == pytest.approx(whole["validation_loss"], rel=1e-6)
    for number, domain in enumerate(split.domains):
        if targets[number]:
            assert losses[number] / targets[number] == pytest.approx(whole[f"validation_loss/{domain}"], rel=1e-6)
    assert len(passes) == 1, "ranks gather weights in every pass, so they need the same number of them"


def test_who_is_told_to_stop_does_not_look_to_the_end(write_sequences: WriteSequences) -> None:
    split = open_sequences(write_sequences(validation=7), split="validation")
    model = Transformer(ModelConfig(**SMALLEST, vocab_size=261))
    validation, stop = Validation(split, 7, 2, World(device=model.device)), threading.Event()
    assert validation.losses(model, stop)["validation_seconds"] > 0
    stop.set()
    assert validation.losses(model, stop) == {}


def test_a_split_without_sequences_is_said_once_and_no_error(write_sequences: WriteSequences) -> None:
    lake, said = write_sequences(validation=0), list[str]()
    config = TrainConfig(**SETTINGS, name="none", validate_every=1)
    assert open_validation(open_sequences(lake), config, World(device=torch.device("cpu")), said.append) is None
    assert len(said) == 1
    assert "no validation losses" in said[0]
    train(lake, config)
    assert not any("validation_loss" in line for line in lines(lake, "none"))
