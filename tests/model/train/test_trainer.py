"""What a training leaves, what decides its weights, and what it refuses."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from model.errors import ModelError
from model.registry.load import open_weights
from model.registry.register import lineage_tags
from model.registry.store import tracking_uri
from model.train import trainer
from model.train.checkpoint import find_checkpoint, read_checkpoint
from model.train.config import TrainConfig
from tests.model.conftest import SMALLEST, WriteSequences
from tests.model.train.cases import Case, curve, mlflow_curve, runs, stop_after, train, weights


def test_training_learns_logs_and_is_found_done(settings: Callable[..., Case], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model.train.system.INTERVAL", 0.0)
    config = settings(steps=30, learning_rate=1e-2, checkpoint_every=10)
    summary = train(config)
    losses = curve(config)
    assert [c[0] for c in losses] == list(range(1, 31))
    lines = [json.loads(line) for line in (config.output_path / "metrics.jsonl").read_text().splitlines()]
    stood = {line["step"]: line["checkpoint_seconds"] for line in lines if "checkpoint_seconds" in line}
    assert set(stood) == {11, 21}, "of the saves at 10 and 20"
    assert all(seconds > 0 for seconds in stood.values())
    assert losses[-1][1] < 0.75 * losses[0][1]
    assert (summary.step, summary.tokens, summary.final_loss) == (30, 30 * 4 * 32, losses[-1][1])
    assert sorted(p.name for p in (config.output_path / "checkpoints").iterdir()) == ["step-000020", "step-000030"]
    model, _ = open_weights(Path(summary.checkpoint))
    manifest = read_checkpoint(Path(summary.checkpoint)).manifest
    assert manifest["data"]["version"] == 0
    assert model.config.vocab_size == 261
    (run,) = runs(config)
    assert run.info.run_id == summary.mlflow_run_id
    assert run.info.status == "FINISHED"
    assert run.data.params["learning_rate"] == "0.01"
    assert run.data.tags["lakemoe.data.version"] == "0"
    source = json.loads(run.inputs.dataset_inputs[0].dataset.source)
    assert source["delta_table_version"] == 0
    assert mlflow_curve(config, summary.mlflow_run_id) == [(c[0], c[1]) for c in losses]
    assert {"validation_loss", "validation_loss/code", "validation_loss/text"} <= set(run.data.metrics)
    assert run.data.metrics["system/system_memory_usage_megabytes"] > 0
    drawn = MlflowClient(tracking_uri=tracking_uri(config.lake)).list_artifacts(summary.mlflow_run_id, "plots")
    assert [file.path for file in drawn] == ["plots/experts.png", "plots/losses.png"]
    began = time.perf_counter()
    assert train(config) == summary
    assert time.perf_counter() - began < 1
    assert len(runs(config)) == 1


def test_equal_lakes_give_equal_curves_and_weights(
    settings: Callable[..., Case], write_sequences: WriteSequences
) -> None:
    first = settings()
    second = settings(lake=write_sequences("second", files=3, reverse=True))
    train(first)
    train(second)
    assert curve(first) == curve(second)
    assert weights(first) == weights(second)


def test_accumulated_gradients_are_the_batchs(settings: Callable[..., Case]) -> None:
    whole, parts = settings("whole"), settings("parts", micro_batch_size=2)
    # Without the auxiliary loss, which is a micro-batch's own.
    whole, parts = (
        c.model_copy(update={"overrides": {**SMALLEST, "balance_loss_weight": 0.0}}) for c in (whole, parts)
    )
    train(whole)
    train(parts)
    for a, b in zip(curve(whole), curve(parts), strict=True):
        assert a[1] == pytest.approx(b[1], rel=1e-4)
        assert a[3] == pytest.approx(b[3], rel=1e-3)  # AdamW and clipping hide a gradient's size from the loss


def test_what_cannot_go_on_is_refused_by_name(settings: Callable[..., Case], write_sequences: WriteSequences) -> None:
    config = settings(steps=3)
    train(config)
    with pytest.raises(ModelError, match=r"seed was 0 and is now 1") as refused:
        train(settings(steps=3, seed=1))
    assert refused.value.exit_code == 2
    with pytest.raises(ModelError, match="the model takes 16"):
        train(settings("b", overrides={**SMALLEST, "max_seq_len": 16}))
    with pytest.raises(ModelError, match="less than the tokenizer's 261"):
        train(settings("c", overrides={**SMALLEST, "vocab_size": 100}))
    # The version is pinned: what is appended later does not enter a training that began before.
    write_sequences(seed=1, mode="append")
    train(settings("d", sequences_version=0))
    assert json.loads((settings("d").output_path / "run.json").read_text())["data"]["num_sequences"] == 24


def test_a_loss_that_is_not_finite_names_its_sequences(settings: Callable[..., Case]) -> None:
    config = settings(learning_rate=1e30, warmup_steps=0, overrides={**SMALLEST, "qkv_clip": None})
    with pytest.raises(ModelError, match="not finite at step"):
        train(config)
    bad = json.loads((config.output_path / "bad_batch.json").read_text())
    assert len(bad["sequence_ids"]) == 4
    (run,) = runs(config)
    assert run.info.status == "FAILED"


def test_the_manifest_keeps_the_code_version_that_the_training_began_with(
    settings: Callable[..., Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings()
    stop_after(monkeypatch, 4)
    with pytest.raises(KeyboardInterrupt):
        train(config, "1.0+first")
    monkeypatch.undo()
    summary = train(config, "1.0+second")  # another commit goes on
    manifest = read_checkpoint(Path(summary.checkpoint)).manifest
    assert manifest["code_version"] == "1.0+first"
    assert lineage_tags(manifest)["lakemoe.code_version"] == "1.0+first"


def test_bad_batches_are_skipped_by_name_where_asked(
    settings: Callable[..., Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(bad_batch="skip", spike=2.0)
    real = trainer.read
    monkeypatch.setattr(trainer, "SPIKE_WINDOW", 3)

    def read(figures: Any, *rest: Any) -> Any:
        line, stop = real(figures, *rest)
        number = len(curve(config)) + 1
        return {**line, "loss": {3: float("nan"), 6: 100 * line["loss"]}.get(number, line["loss"])}, stop

    monkeypatch.setattr(trainer, "read", read)
    stop_after(monkeypatch, 7)
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
