"""Trainings that this machine's memory does not hold end with a sentence, before or after they begin."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from model.errors import ModelError
from model.train import trainer
from model.train.room import free_memory
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
    assert train(settings("a", steps=3, micro_batch_size=1)).step == 3


def test_a_container_s_limit_counts(tmp_path: Path) -> None:
    machine = psutil.virtual_memory().available
    assert free_memory(tmp_path / "none") == pytest.approx(machine, rel=0.2)
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("100\n")
    assert free_memory(tmp_path) == pytest.approx(machine, rel=0.2)
    (tmp_path / "memory.max").write_text("1000100\n")
    assert free_memory(tmp_path) == 1_000_000
