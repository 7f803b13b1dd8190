"""`lakemoe train --processes 2` by torchrun and by Spark: the curve of one process, its exit codes, one run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs import runs
from model.train.config import TrainConfig
from model.train.trainer import train
from tests.model.conftest import SMALLEST, WriteSequences, write_sequences  # noqa: F401  (a fixture)

SETTINGS: dict[str, Any] = {
    "steps": 4,
    "global_batch_size": 4,
    "warmup_steps": 1,
    "device": "cpu",
    "overrides": SMALLEST,
}


def start(lake: str, folder: Path, name: str, *flags: str, **fields: Any) -> subprocess.Popen[str]:
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump({"train": {**SETTINGS, "name": name, **fields}}))
    command = [sys.executable, "-m", "jobs.main", "train", "--lake", lake, "--config", str(file), *flags]
    environment = {**os.environ, "PYTHONPATH": os.getcwd(), "LAKEMOE_SPARK_MASTER": "local[2]"}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def curve(lake: str, name: str) -> list[float]:
    lines = (Path(lake) / "training" / name / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


@pytest.mark.slow
def test_torchrun_and_spark_train_as_one_process_does(
    write_sequences: WriteSequences,  # noqa: F811
    tmp_path: Path,
) -> None:
    lake = write_sequences()
    for launcher in ("torchrun", "spark"):
        process = start(lake, tmp_path, launcher, "--processes", "2", "--launcher", launcher)
        out, err = process.communicate(timeout=400)
        assert process.returncode == 0, (out + err)[-3000:]
    train(lake, TrainConfig(name="one", **SETTINGS))
    assert curve(lake, "torchrun") == pytest.approx(curve(lake, "one"), rel=1e-6)
    assert curve(lake, "spark") == curve(lake, "torchrun")
    assert [run["status"] for run in runs.runs(lake, "train")] == ["succeeded"] * 2


@pytest.mark.slow
def test_sigterm_and_errors_of_several_processes_end_in_one_sentence_and_its_code(
    write_sequences: WriteSequences,  # noqa: F811
    tmp_path: Path,
) -> None:
    lake = write_sequences()
    process = start(lake, tmp_path, "a", "--processes", "2", global_batch_size=3)
    _, err = process.communicate(timeout=400)
    assert process.returncode == 2, err
    assert err.count("is no multiple of the 2 processes") == 1, err
    process = start(lake, tmp_path, "b", "--processes", "2", steps=100_000, checkpoint_every=100_000)
    journal = Path(lake) / "training" / "b" / "metrics.jsonl"
    until = time.monotonic() + 200
    while not journal.exists() or journal.read_text().count("\n") < 3:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGTERM)
    _, err = process.communicate(timeout=200)
    assert process.returncode == 75, err
    assert err.count("Stopped by a signal") == 1, err
    assert len(list((Path(lake) / "training" / "b" / "checkpoints").glob("step-*"))) == 1
