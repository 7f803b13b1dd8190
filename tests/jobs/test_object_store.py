"""A lake in an object store is trained on, evaluated, registered and exported as one on the disk."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks import loader_store
from jobs import runs
from tests import stores
from tests.model.conftest import SMALLEST, WriteSequences, write_sequences  # noqa: F401  (a fixture)

SETTINGS: dict[str, Any] = {"steps": 3, "global_batch_size": 4, "warmup_steps": 1, "device": "cpu", "name": "a"}
SETTINGS |= {"overrides": {**SMALLEST, "max_seq_len": 32}, "validate_every": 2}


@contextmanager
def uploaded(scheme: str, folder: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The lake's URI in a store on localhost, which the environment names."""
    with loader_store.s3_server() if scheme == "s3" else stores.azure_server() as port:
        wanted = loader_store.environment(port) if scheme == "s3" else stores.environment(scheme, port)
        for name, value in wanted.items():
            monkeypatch.setenv(name, value)
        yield loader_store.upload(folder, port, "lake") if scheme == "s3" else stores.upload(folder, scheme, "lake")


# Not gs: fake-gcs-server does not take the requests that deltalake writes with.
@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["s3", "abfs"])
def test_every_command_behind_pack_takes_a_lake_in_a_store(
    scheme: str,
    write_sequences: WriteSequences,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    monkeypatch.setenv("PYTHONPATH", os.getcwd())
    folder, output = write_sequences(), tmp_path / "training"

    def lakemoe(job: str, lake: str, *flags: str, **settings: Any) -> subprocess.CompletedProcess[str]:
        file = tmp_path / "settings.yaml"
        file.write_text(yaml.safe_dump(settings))
        command = [sys.executable, "-m", "jobs.main", job, "--lake", lake, "--config", str(file), *flags]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)

    def done(job: str, lake: str, *flags: str, **settings: Any) -> str:
        ran = lakemoe(job, lake, *flags, **settings)
        assert ran.returncode == 0, ran.stdout + ran.stderr
        return ran.stdout

    with uploaded(scheme, folder, monkeypatch) as lake:
        refused = lakemoe("train", lake, train=SETTINGS)
        assert refused.returncode == 2, refused.stderr
        assert "train.output" in refused.stderr
        said = done("train", lake, train={**SETTINGS, "output": str(output)})
        assert f"lakemoe evaluate --training {output} --lake {lake}" in said
        assert "sequences of 32 tokens" in done("train", lake, "--dry-run", train=SETTINGS)
        first = done("evaluate", lake, training=str(output))
        assert done("evaluate", lake, training=str(output)).splitlines()[-6:] == first.splitlines()[-6:]
        # By the training's name, although it lies in a folder of another one.
        assert "The model is models:/a/1" in done("register", lake, training=output.name)
        done("promote", lake, model="a")
        done("export", lake, model="models:/a@champion", to=str(tmp_path / "exported"))
        jobs = [(run["job"], run["status"]) for run in runs.runs(lake)]
        assert ("train", "succeeded") in jobs
        assert ("register", "succeeded") in jobs
        assert not any(status == "failed" for _, status in jobs)

    def losses(folder: Path) -> list[float]:
        return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]

    done("train", folder, train={**SETTINGS, "output": str(tmp_path / "local")})
    assert losses(output) == losses(tmp_path / "local"), "the same training as on the disk"
    assert not list(Path(tmp_path).glob(f"{scheme}:*")), "no folder was made where an address was meant"
