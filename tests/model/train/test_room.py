"""Trainings that this machine's memory does not hold end with a sentence, before or after they begin."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from model.config import load_preset
from model.errors import ModelError
from model.train import room, trainer
from model.train.config import TrainConfig
from model.train.world import World
from tests.model.train.cases import Case, train


def test_a_preset_that_cannot_fit_is_refused_before_anything_is_made(settings: Callable[..., Case]) -> None:
    case = settings("a", preset="grok-1", overrides={})
    with pytest.raises(ModelError, match=r"grok-1 has 31[\d,]+ parameters.*GiB on this machine") as refused:
        train(case)
    assert refused.value.exit_code == 2
    assert not list(case.output_path.glob("run.json")), "the name is free"
    assert train(settings("a", steps=3)).step == 3


def test_a_gpu_that_runs_out_says_what_helps(settings: Callable[..., Case], monkeypatch: pytest.MonkeyPatch) -> None:
    def run_out(*args: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee the documentation")

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "compute_gradients", run_out)
        with pytest.raises(ModelError, match=r"2.00 GiB.*activation_checkpointing block") as refused:
            train(settings("a", steps=3))
    assert refused.value.exit_code == 2
    # What it names may change, also where the training has begun.
    assert train(settings("a", steps=3, micro_batch_size=1, activation_checkpointing="block")).step == 3


def test_memory_that_others_have_is_worth_another_try(
    settings: Callable[..., Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "memory", lambda device: (1000, 2**40))
    with pytest.raises(ModelError, match=r"0\.0 of 1,024\.0 are free") as refused:
        train(settings("a", steps=3))
    assert refused.value.exit_code == 75


def test_a_gpu_s_machine_must_hold_the_copies_for_checkpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    # As on a GPU of 80 GiB: what the machine has decides. 6.9 billion parameters, 4 bytes each and two moments.
    monkeypatch.setattr(room, "memory", lambda device: (80 * 2**30, 200 * 2**30))
    model, four = load_preset("olmoe"), World(device=torch.device("cuda"), size=4)
    for moments, room_for in (("float32", 77.3), ("bfloat16", 51.6)):
        needed = room._needed(TrainConfig(preset="olmoe", moments=moments), model, four)
        assert [device.type for _, _, device in needed] == ["cuda", "cpu"]
        # One process a machine: a quarter of it.
        assert needed[1][1] / 2**30 == pytest.approx(room_for / 4, rel=0.01)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setattr(room, "memory", lambda device: (80 * 2**30, 80 * 2**30) if device.type == "cuda" else (1, 1))
    words = r"copies of weights and moments for checkpoints need 77\.\d GiB on this machine"
    with pytest.raises(ModelError, match=words), room.within_memory(TrainConfig(preset="olmoe"), model, four):
        pytest.fail("it began")


def test_the_machine_that_has_too_little_decides_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "memory", lambda device: (100 * 2**30, 100 * 2**30))
    # Another machine has 8 times the processes.
    monkeypatch.setattr(World, "gather", lambda self, mine: [mine, (8 * mine[0], *mine[1:])])
    model, ranks = load_preset("olmoe"), World(device=torch.device("cpu"), rank=0, size=9)
    within = room.within_memory(TrainConfig(preset="olmoe"), model, ranks)
    with pytest.raises(ModelError, match=r"need 1\d\d\.\d GiB") as refused, within:
        pytest.fail("it began")
    assert refused.value.exit_code == 2


def test_a_container_s_limit_counts_and_its_files_do_not(tmp_path: Path) -> None:
    cpu, machine = torch.device("cpu"), psutil.virtual_memory()
    same = (pytest.approx(machine.available, rel=0.2), machine.total)
    assert room.memory(cpu, tmp_path / "none") == same
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("900100\n")
    (tmp_path / "memory.stat").write_text("anon 100\nfile 900000\nactive_file 300000\ninactive_file 600000\n")
    assert room.memory(cpu, tmp_path) == same
    (tmp_path / "memory.max").write_text("1000100\n")
    assert room.memory(cpu, tmp_path) == (1_000_000, 1_000_100)
