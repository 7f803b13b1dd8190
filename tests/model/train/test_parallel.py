"""Trainings of several processes (gloo): the same losses, gradients and weights as of one, and resumed by any world."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from model.errors import ModelError
from model.train.config import TrainConfig
from model.train.parallel import check
from tests.model.conftest import SMALLEST, WriteSequences
from tests.model.ranks import free_port, run_ranks

MODEL: dict[str, Any] = {**SMALLEST, "router_bias_rate": 0.01, "router_z_loss_weight": 1e-3}
# Trains one after the other in the same processes, each time as a new world.
PROGRAM = """
import json, os, sys
import torch
torch.set_num_threads(1)
from model.train.config import TrainConfig
from model.train.trainer import train
for settings in json.loads(sys.argv[1]):
    os.environ["MASTER_PORT"] = settings.pop("port")
    train(settings.pop("lake"), TrainConfig(**settings))
"""


def train_in(size: int, trainings: Sequence[dict[str, Any]], uri: str) -> None:
    """Run trainings in so many processes, as torchrun would start them."""
    trainings = [{**settings, "port": free_port()} for settings in trainings]
    outputs = run_ranks(size, PROGRAM, json.dumps(trainings), MLFLOW_TRACKING_URI=uri)
    assert "step" not in "".join(outputs[1:]), "rank 0 alone speaks"


def curve(lake: Path, name: str) -> list[list[float]]:
    lines = (lake / "training" / name / "metrics.jsonl").read_text().splitlines()
    keys = ("loss", "aux_loss", "router_z_loss", "gradient_norm", "expert_entropy", "loss/text", "validation_loss")
    keys += ("validation_loss/code", "validation_loss/text")
    return [[m[k] for k in keys if k in m] for m in map(json.loads, lines)]


def weights(lake: Path, name: str) -> dict[str, torch.Tensor]:
    final = json.loads((lake / "training" / name / "run.json").read_text())["final"]
    return load_file(lake / "training" / name / "checkpoints" / final / "model.safetensors")


@pytest.mark.slow
def test_every_mesh_gives_the_losses_and_weights_of_one_process(
    write_sequences: WriteSequences, tmp_path: Path
) -> None:
    # Five sequences to look at: not as many on every rank.
    lake, uri = write_sequences(validation=5), f"sqlite:///{tmp_path / 'mlflow.db'}"

    def settings(name: str, **fields: Any) -> dict[str, Any]:
        common = {"steps": 6, "global_batch_size": 8, "warmup_steps": 2, "checkpoint_every": 3, "device": "cpu"}
        common |= {"validate_every": 2}
        return {"lake": lake, "name": name, "overrides": MODEL, **common, **fields}

    block = {"activation_checkpointing": "block"}
    train_in(1, [settings("one")], uri)
    expected, final = curve(Path(lake), "one"), weights(Path(lake), "one")
    assert [len(line) for line in expected] == [6, 9] * 3
    assert expected[-1][0] < expected[0][0]

    def same(name: str) -> None:
        for a, b in zip(curve(Path(lake), name), expected, strict=True):
            assert a == pytest.approx(b, rel=1e-6, abs=1e-6), name
        for key, value in weights(Path(lake), name).items():
            torch.testing.assert_close(value, final[key], atol=2e-5, rtol=1e-4, msg=lambda m, k=key: f"{name} {k}: {m}")

    # Every mesh once from the beginning, and then from step 3 of another one.
    go_back(Path(lake), "one")
    four = [
        settings("four", **block),
        *(settings(f"four-{p}", expert_parallel=p, expert_parallel_chunks=p + 1) for p in (2, 4)),
    ]
    train_in(4, [*four, settings("one", expert_parallel=2)], uri)
    for name in ("four", "four-2", "four-4", "one"):
        same(name)
    go_back(Path(lake), "four-2")
    train_in(2, [settings("two", expert_parallel=2, **block), settings("four-2")], uri)
    same("two")
    same("four-2")
    go_back(Path(lake), "two")
    train_in(1, [settings("two")], uri)
    same("two")


def go_back(lake: Path, name: str) -> None:
    """A finished training as it was killed after step 3."""
    folder = lake / "training" / name
    shutil.rmtree(folder / "checkpoints" / "step-000006")
    record = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**record, "final": None, "logged": False}))


def test_worlds_that_do_not_fit_are_refused() -> None:
    check(TrainConfig(global_batch_size=8, expert_parallel=2), experts=16, size=4)
    for fields, experts, size, words in (
        ({"expert_parallel": 3}, 16, 4, "groups of expert_parallel 3"),
        ({"expert_parallel": 4}, 6, 4, "6 experts"),
        ({"global_batch_size": 6}, 16, 4, "no multiple of the 4 processes"),
    ):
        with pytest.raises(ModelError, match=words) as refused:
            check(TrainConfig(**fields), experts=experts, size=size)  # type: ignore[arg-type]
        assert refused.value.exit_code == 2
