"""A training killed, stopped or disturbed anywhere ends with the bytes of an undisturbed one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow import MlflowClient

from model.errors import ModelError
from model.train import share, trainer
from model.train.checkpoint import find_checkpoint
from tests.model.train.cases import Case, curve, mlflow_curve, runs, stop_after, train, weights

PROGRAM = """
import json, sys
import torch
torch.set_num_threads(1)
from model.errors import ModelError
from model.train.config import TrainConfig
from model.train.trainer import train
settings = json.loads(sys.argv[1])
try:
    train(settings.pop("lake"), TrainConfig(**settings))
except ModelError as error:
    print(error)
    sys.exit(error.exit_code)
"""


def _start(config: Case, before: str = "") -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", before + PROGRAM, config.model_dump_json()],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"},
    )


def _wait_for_step(config: Case, step: int, process: subprocess.Popen[str]) -> None:
    """Until the journal has ``step`` lines."""
    journal = config.output_path / "metrics.jsonl"
    until = time.monotonic() + 120
    while not journal.exists() or journal.read_text().count("\n") < step:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < until
        time.sleep(0.002)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs POSIX signals")
def test_sigkill_at_any_step_changes_nothing(settings: Callable[..., Case]) -> None:
    calm, killed = settings("calm", steps=40), settings("killed", steps=40)
    process = _start(calm)
    assert process.wait(timeout=120) == 0, process.communicate()[0]
    for step in (2, 13, 27):
        process = _start(killed)
        _wait_for_step(killed, step, process)
        process.kill()
        assert process.wait(timeout=60) == -signal.SIGKILL
    process = _start(killed)
    assert process.wait(timeout=120) == 0, process.communicate()[0]
    assert weights(killed) == weights(calm)
    assert curve(killed) == curve(calm)
    (run,) = runs(killed)
    assert mlflow_curve(killed, run.info.run_id) == [(c[0], c[1]) for c in curve(calm)]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_ends_with_75(settings: Callable[..., Case], number: signal.Signals) -> None:
    config, calm = settings(steps=120, checkpoint_every=1000), settings("calm", steps=120, checkpoint_every=1000)
    process = _start(config)
    _wait_for_step(config, 5, process)
    process.send_signal(number)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 75, out
    assert [r.info.status for r in runs(config)] == ["KILLED"]
    assert "run again" in out
    found, _ = find_checkpoint(config.output_path / "checkpoints")
    assert found is not None
    assert 5 <= found.step < 120
    assert len(curve(config)) == found.step
    torch_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        train(config)
        train(calm)
    finally:
        torch.set_num_threads(torch_threads)
    assert weights(config) == weights(calm)


def test_a_corrupt_checkpoint_falls_back_to_the_one_before(
    settings: Callable[..., Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    calm, config = settings("calm"), settings()
    train(calm)
    stop_after(monkeypatch, 7)
    with pytest.raises(KeyboardInterrupt):
        train(config)
    monkeypatch.undo()
    newest = config.output_path / "checkpoints" / "step-000006" / "model.safetensors"
    content = bytearray(newest.read_bytes())
    content[-1] ^= 1
    newest.write_bytes(content)
    (newest.parent.parent / ".writing-step-000009").mkdir()
    train(config)
    assert weights(config) == weights(calm)
    assert curve(config) == curve(calm)
    assert len(runs(config)) == 1
    assert not list(newest.parent.parent.glob(".writing-*"))


def test_a_full_disk_keeps_the_last_checkpoint_and_says_75(
    settings: Callable[..., Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, calm = settings(), settings("calm")
    train(calm)
    real = share.save_file

    def full(tensors: Any, path: Path, metadata: Any = None) -> None:
        real(tensors, path, metadata)
        if "step-000006" in str(path):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(share, "save_file", full)
    with pytest.raises(ModelError, match="No space left") as refused:
        train(config)
    assert refused.value.exit_code == 75
    monkeypatch.undo()
    assert [p.name for p in (config.output_path / "checkpoints").iterdir()] == ["step-000003"]
    train(config)
    assert weights(config) == weights(calm)


def test_mlflow_down_while_training_is_caught_up(
    settings: Callable[..., Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow.exceptions import MlflowException

    def down(*args: Any, **kwargs: Any) -> None:
        raise MlflowException("down")

    config = settings()
    real = MlflowClient.log_batch

    def parameters_only(self: Any, run_id: str, metrics: Any = (), **kwargs: Any) -> None:
        if metrics:
            raise MlflowException("down")
        real(self, run_id, metrics=metrics, **kwargs)

    monkeypatch.setattr(MlflowClient, "log_batch", parameters_only)
    with pytest.raises(ModelError, match="training is done") as refused:
        train(config)
    assert refused.value.exit_code == 75
    monkeypatch.undo()
    summary = train(config)
    assert [s for s, _ in mlflow_curve(config, summary.mlflow_run_id)] == list(range(1, 9))
    assert len(runs(config)) == 1
    monkeypatch.setattr(MlflowClient, "create_run", down)
    with pytest.raises(ModelError, match="cannot be used") as refused:
        train(settings("other"))
    assert refused.value.exit_code == 75


def test_a_kill_between_making_the_mlflow_run_and_noting_it_makes_no_second(
    settings: Callable[..., Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    from model.train.tracking import Tracking

    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    config = settings()
    monkeypatch.setattr(Tracking, "describe", interrupt)
    with pytest.raises(KeyboardInterrupt):
        train(config)
    monkeypatch.undo()
    train(config)
    assert len(runs(config)) == 1


@pytest.mark.slow
def test_sigkill_during_a_save_leaves_the_checkpoint_before(settings: Callable[..., Case]) -> None:
    calm, killed = settings("calm"), settings("killed")
    train(calm)
    hold = """
import time
from pathlib import Path
from model.train import share
real = share.save_file
def save(tensors, path, metadata=None):
    real(tensors, path, metadata)
    if "step-000006" in str(path):
        Path("SAVING").touch()
        time.sleep(600)
share.save_file = save
""".replace("SAVING", str(killed.output_path / "saving"))
    process = _start(killed, before=hold)
    until = time.monotonic() + 120
    while not (killed.output_path / "saving").exists():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < until
        time.sleep(0.01)
    # The training goes on while it is written.
    _wait_for_step(killed, 8, process)
    process.kill()
    process.wait(timeout=60)
    names = sorted(p.name for p in (killed.output_path / "checkpoints").iterdir())
    assert names == [".writing-step-000006", "step-000003"]
    train(killed)
    assert weights(killed) == weights(calm)
    assert curve(killed) == curve(calm)
    assert not list((killed.output_path / "checkpoints").glob(".writing-*"))


def test_ten_restarts_have_one_run_and_the_undisturbed_curve(
    settings: Callable[..., Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    calm, config = settings("calm", steps=12, checkpoint_every=1), settings(steps=12, checkpoint_every=1)
    train(calm)
    for _ in range(10):
        stop_after(monkeypatch, 1)
        with pytest.raises(KeyboardInterrupt):
            train(config)
        monkeypatch.undo()
    summary = train(config)
    assert weights(config) == weights(calm)
    assert curve(config) == curve(calm)
    (run,) = runs(config)
    assert run.info.run_id == summary.mlflow_run_id
    assert mlflow_curve(config, summary.mlflow_run_id) == [(c[0], c[1]) for c in curve(calm)]


def test_a_tracking_server_that_hangs_does_not_hold_the_training(
    settings: Callable[..., Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, answer = settings(), threading.Event()
    real_log, real_step = MlflowClient.log_batch, trainer.update
    steps = 0

    def log(self: Any, run_id: str, metrics: Any = (), **kwargs: Any) -> None:
        if metrics:
            assert answer.wait(60), "the training waited for MLflow"
        real_log(self, run_id, metrics=metrics, **kwargs)

    def step(*args: Any) -> None:
        nonlocal steps
        steps += 1
        real_step(*args)
        if steps == 8:  # the last one, two checkpoints after MLflow began to hang
            answer.set()

    monkeypatch.setattr(MlflowClient, "log_batch", log)
    monkeypatch.setattr(trainer, "update", step)
    summary = train(config)
    assert [s for s, _ in mlflow_curve(config, summary.mlflow_run_id)] == list(range(1, 9))
