"""A training killed, stopped or disturbed anywhere ends with the bytes of an undisturbed one."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow import MlflowClient

from model.errors import ModelError
from model.registry.load import open_weights
from model.registry.register import lineage_tags
from model.registry.store import tracking_uri
from model.train import trainer
from model.train.checkpoint import find_checkpoint, read_checkpoint
from model.train.config import TrainConfig, TrainSummary

WriteSequences = Callable[..., str]


class Case(TrainConfig):
    """A training with the lake that it is on."""

    lake: str

    @property
    def output_path(self) -> Path:
        return self.output_folder(self.lake)


def train(case: Case, code_version: str | None = None) -> TrainSummary:
    config = TrainConfig(**case.model_dump(exclude={"lake"}))
    return trainer.train(case.lake, config, code_version=code_version)


TINY = {
    "layers": 2,
    "width": 32,
    "heads": 4,
    "kv_heads": 2,
    "head_width": 8,
    "experts": 4,
    "experts_chosen": 2,
    "expert_width": 16,
}


@pytest.fixture(scope="session")
def empty_mlflow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A migrated MLflow database without runs: migrating takes seconds, copying does not."""
    file = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    MlflowClient(tracking_uri=f"sqlite:///{file}").search_experiments()
    return file


@pytest.fixture
def settings(write_sequences: WriteSequences, tmp_path: Path, empty_mlflow: Path) -> Iterator[Callable[..., Case]]:
    """settings(name="a", **fields) -> a training of a tiny model on the test's lake, 8 steps; one store for all lakes.

    The store is named in an environment of its own: a test's monkeypatch.undo() leaves it.
    """
    lake = write_sequences()
    shutil.copy(empty_mlflow, tmp_path / "mlflow.db")

    def make(name: str = "a", **fields: Any) -> Case:
        common = {"steps": 8, "global_batch_size": 4, "checkpoint_every": 3, "warmup_steps": 2, "device": "cpu"}
        return Case(**{"lake": lake, "name": name, "overrides": TINY, **common, **fields})

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
        yield make


def _weights(config: Case) -> bytes:
    folder = config.output_path
    final = json.loads((folder / "run.json").read_text())["final"]
    return (folder / "checkpoints" / final / "model.safetensors").read_bytes()


def _curve(config: Case) -> list[tuple[int, float, float, float]]:
    lines = [json.loads(line) for line in (config.output_path / "metrics.jsonl").read_text().splitlines()]
    return [(m["step"], m["loss"], m["aux_loss"], m["gradient_norm"]) for m in lines]


def _mlflow_curve(config: Case, run_id: str) -> list[tuple[int, float]]:
    history = MlflowClient(tracking_uri=tracking_uri(config.lake)).get_metric_history(run_id, "loss")
    return [(m.step, m.value) for m in history]


def _runs(config: Case) -> list[Any]:
    client = MlflowClient(tracking_uri=tracking_uri(config.lake))
    experiment = client.get_experiment_by_name(config.experiment)
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    return [r for r in runs if r.info.run_name == config.name]


def test_training_learns_logs_and_is_found_done(settings: Callable[..., Case], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model.train.system.INTERVAL", 0.0)
    config = settings(steps=30, learning_rate=1e-2, checkpoint_every=10)
    summary = train(config)
    curve = _curve(config)
    assert [c[0] for c in curve] == list(range(1, 31))
    assert curve[-1][1] < 0.75 * curve[0][1]
    assert (summary.step, summary.tokens, summary.final_loss) == (30, 30 * 4 * 32, curve[-1][1])
    assert sorted(p.name for p in (config.output_path / "checkpoints").iterdir()) == ["step-000020", "step-000030"]
    model, _ = open_weights(Path(summary.checkpoint))
    manifest = read_checkpoint(Path(summary.checkpoint)).manifest
    assert manifest["data"]["version"] == 0
    assert model.config.vocab_size == 261
    (run,) = _runs(config)
    assert run.info.run_id == summary.mlflow_run_id
    assert run.info.status == "FINISHED"
    assert run.data.params["learning_rate"] == "0.01"
    assert run.data.tags["lakemoe.data.version"] == "0"
    source = json.loads(run.inputs.dataset_inputs[0].dataset.source)
    assert source["delta_table_version"] == 0
    assert _mlflow_curve(config, summary.mlflow_run_id) == [(c[0], c[1]) for c in curve]
    assert {"validation_loss", "validation_loss/code", "validation_loss/text"} <= set(run.data.metrics)
    assert run.data.metrics["system/system_memory_usage_megabytes"] > 0
    drawn = MlflowClient(tracking_uri=tracking_uri(config.lake)).list_artifacts(summary.mlflow_run_id, "plots")
    assert [file.path for file in drawn] == ["plots/experts.png", "plots/losses.png"]
    began = time.perf_counter()
    assert train(config) == summary
    assert time.perf_counter() - began < 1
    assert len(_runs(config)) == 1


def test_equal_lakes_give_equal_curves_and_weights(
    settings: Callable[..., Case], write_sequences: WriteSequences
) -> None:
    first = settings()
    second = settings(lake=write_sequences("second", files=3, reverse=True))
    train(first)
    train(second)
    assert _curve(first) == _curve(second)
    assert _weights(first) == _weights(second)


def test_accumulated_gradients_are_the_batchs(settings: Callable[..., Case]) -> None:
    whole, parts = settings("whole"), settings("parts", micro_batch_size=2)
    # Without the auxiliary loss, which is a micro-batch's own.
    whole, parts = (c.model_copy(update={"overrides": {**TINY, "balance_loss_weight": 0.0}}) for c in (whole, parts))
    train(whole)
    train(parts)
    for a, b in zip(_curve(whole), _curve(parts), strict=True):
        assert a[1] == pytest.approx(b[1], rel=1e-4)
        assert a[3] == pytest.approx(b[3], rel=1e-3)  # AdamW and clipping hide a gradient's size from the loss


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
    assert _weights(killed) == _weights(calm)
    assert _curve(killed) == _curve(calm)
    (run,) = _runs(killed)
    assert _mlflow_curve(killed, run.info.run_id) == [(c[0], c[1]) for c in _curve(calm)]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_ends_with_75(settings: Callable[..., Case], number: signal.Signals) -> None:
    config, calm = settings(steps=120, checkpoint_every=1000), settings("calm", steps=120, checkpoint_every=1000)
    process = _start(config)
    _wait_for_step(config, 5, process)
    process.send_signal(number)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 75, out
    assert [r.info.status for r in _runs(config)] == ["KILLED"]
    assert "run again" in out
    found, _ = find_checkpoint(config.output_path / "checkpoints")
    assert found is not None
    assert 5 <= found.step < 120
    assert len(_curve(config)) == found.step
    torch_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        train(config)
        train(calm)
    finally:
        torch.set_num_threads(torch_threads)
    assert _weights(config) == _weights(calm)


def test_a_corrupt_checkpoint_falls_back_to_the_one_before(
    settings: Callable[..., Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    calm, config = settings("calm"), settings()
    train(calm)
    _stop_after(monkeypatch, 7)
    with pytest.raises(KeyboardInterrupt):
        train(config)
    monkeypatch.undo()
    newest = config.output_path / "checkpoints" / "step-000006" / "model.safetensors"
    content = bytearray(newest.read_bytes())
    content[-1] ^= 1
    newest.write_bytes(content)
    (newest.parent.parent / ".writing-step-000009").mkdir()
    train(config)
    assert _weights(config) == _weights(calm)
    assert _curve(config) == _curve(calm)
    assert len(_runs(config)) == 1
    assert not list(newest.parent.parent.glob(".writing-*"))


def _stop_after(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    """Interrupt a training before step number steps + 1."""

    real, done = trainer.compute_gradients, 0

    def compute(*args: Any) -> Any:
        nonlocal done
        if done == steps:
            raise KeyboardInterrupt
        done += 1
        return real(*args)

    monkeypatch.setattr(trainer, "compute_gradients", compute)


def test_a_full_disk_keeps_the_last_checkpoint_and_says_75(
    settings: Callable[..., Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, calm = settings(), settings("calm")
    train(calm)
    from model.train import checkpoint

    real = checkpoint.save_file

    def full(tensors: Any, path: Path) -> None:
        real(tensors, path)
        if "step-000006" in str(path):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(ModelError, match="No space left") as refused:
        train(config)
    assert refused.value.exit_code == 75
    monkeypatch.undo()
    assert [p.name for p in (config.output_path / "checkpoints").iterdir()] == ["step-000003"]
    train(config)
    assert _weights(config) == _weights(calm)


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
    assert [s for s, _ in _mlflow_curve(config, summary.mlflow_run_id)] == list(range(1, 9))
    assert len(_runs(config)) == 1
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
    assert len(_runs(config)) == 1


def test_what_cannot_go_on_is_refused_by_name(settings: Callable[..., Case], write_sequences: WriteSequences) -> None:
    config = settings(steps=3)
    train(config)
    with pytest.raises(ModelError, match=r"seed was 0 and is now 1") as refused:
        train(settings(steps=3, seed=1))
    assert refused.value.exit_code == 2
    with pytest.raises(ModelError, match="the model takes 16"):
        train(settings("b", overrides={**TINY, "max_seq_len": 16}))
    with pytest.raises(ModelError, match="less than the tokenizer's 261"):
        train(settings("c", overrides={**TINY, "vocab_size": 100}))
    # The version is pinned: what is appended later does not enter a training that began before.
    write_sequences(seed=1, mode="append")
    train(settings("d", sequences_version=0))
    assert json.loads((settings("d").output_path / "run.json").read_text())["data"]["num_sequences"] == 24


def test_a_loss_that_is_not_finite_names_its_sequences(settings: Callable[..., Case]) -> None:
    config = settings(learning_rate=1e30, warmup_steps=0, overrides={**TINY, "qkv_clip": None})
    with pytest.raises(ModelError, match="not finite at step"):
        train(config)
    bad = json.loads((config.output_path / "bad_batch.json").read_text())
    assert len(bad["sequence_ids"]) == 4
    (run,) = _runs(config)
    assert run.info.status == "FAILED"


def test_the_manifest_keeps_the_code_version_that_the_training_began_with(
    settings: Callable[..., Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings()
    _stop_after(monkeypatch, 4)
    with pytest.raises(KeyboardInterrupt):
        train(config, "1.0+first")
    monkeypatch.undo()
    summary = train(config, "1.0+second")  # another commit goes on
    manifest = read_checkpoint(Path(summary.checkpoint)).manifest
    assert manifest["code_version"] == "1.0+first"
    assert lineage_tags(manifest)["lakemoe.code_version"] == "1.0+first"


@pytest.mark.slow
def test_sigkill_during_a_save_leaves_the_checkpoint_before(settings: Callable[..., Case]) -> None:
    calm, killed = settings("calm"), settings("killed")
    train(calm)
    hold = """
import time
from pathlib import Path
from model.train import checkpoint
real = checkpoint.save_file
def save(tensors, path):
    real(tensors, path)
    if "step-000006" in str(path):
        Path("SAVING").touch()
        time.sleep(600)
checkpoint.save_file = save
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
    assert _weights(killed) == _weights(calm)
    assert _curve(killed) == _curve(calm)
    assert not list((killed.output_path / "checkpoints").glob(".writing-*"))


def test_ten_restarts_have_one_run_and_the_undisturbed_curve(
    settings: Callable[..., Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    calm, config = settings("calm", steps=12, checkpoint_every=1), settings(steps=12, checkpoint_every=1)
    train(calm)
    for _ in range(10):
        _stop_after(monkeypatch, 1)
        with pytest.raises(KeyboardInterrupt):
            train(config)
        monkeypatch.undo()
    summary = train(config)
    assert _weights(config) == _weights(calm)
    assert _curve(config) == _curve(calm)
    (run,) = _runs(config)
    assert run.info.run_id == summary.mlflow_run_id
    assert _mlflow_curve(config, summary.mlflow_run_id) == [(c[0], c[1]) for c in _curve(calm)]


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
    assert [s for s, _ in _mlflow_curve(config, summary.mlflow_run_id)] == list(range(1, 9))


def test_bad_batches_are_skipped_by_name_where_asked(
    settings: Callable[..., Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(bad_batch="skip", spike=2.0)
    real = trainer.read
    monkeypatch.setattr(trainer, "SPIKE_WINDOW", 3)

    def read(figures: Any, *rest: Any) -> Any:
        line, stop = real(figures, *rest)
        number = len(_curve(config)) + 1
        return {**line, "loss": {3: float("nan"), 6: 100 * line["loss"]}.get(number, line["loss"])}, stop

    monkeypatch.setattr(trainer, "read", read)
    _stop_after(monkeypatch, 7)
    with pytest.raises(KeyboardInterrupt):
        train(config)
    lines = [json.loads(line) for line in (config.output_path / "metrics.jsonl").read_text().splitlines()]
    assert [m["skipped"] for m in lines] == [0, 0, 1, 0, 0, 1, 0]
    for number in (3, 6):
        bad = json.loads((config.output_path / f"bad_batch-{number:06d}.json").read_text())
        assert len(bad["sequence_ids"]) == 4
    found, _ = find_checkpoint(config.output_path / "checkpoints")
    assert found is not None
    assert found.state["position"]["updates"] == found.step - 2


def test_no_setting_that_decides_the_weights_is_dropped_on_the_way(settings: Callable[..., Case]) -> None:
    begun = settings(steps=4, z_loss_weight=1e-3, bad_batch="skip")
    train(begun)
    with pytest.raises(ModelError, match=r"z_loss_weight was 0.001 and is now 0.0"):
        train(settings(steps=4))
    # What is done about a bad batch, and what fits the machine, may change.
    assert train(settings(steps=4, z_loss_weight=1e-3, spike=5.0, loss_chunk=16)).step == 4


def test_wrong_settings_leave_their_name_free(settings: Callable[..., Case]) -> None:
    for wrong in ({"mixture": ({"weights": {"nosuch": 1}},)}, {"expert_parallel": 2}):
        with pytest.raises(ModelError) as refused:
            train(settings("a", steps=4, **wrong))
        assert refused.value.exit_code == 2
    assert train(settings("a", steps=3)).step == 3
    # But not where there is something to go on from.
    with pytest.raises(ModelError, match="other settings"):
        train(settings("a", steps=4))


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../x"])
def test_a_name_is_that_of_a_folder(name: str) -> None:
    with pytest.raises(ValueError, match="take one without slashes"):
        TrainConfig(name=name)
