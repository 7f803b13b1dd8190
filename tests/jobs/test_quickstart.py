"""The whole way as a user runs it: real processes, killed anywhere and run again, bad input, a full disk."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable
from mlflow import MlflowClient

from pipelines.tables import GOLD_SEQUENCES, GOLD_TOKENS, TABLES, table_uri

TINY = {"layers": 1, "width": 32, "heads": 2, "kv_heads": 1, "head_width": 16, "experts": 4, "experts_chosen": 2}
TINY |= {"expert_width": 32}
STEPS = 12


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real files of this machine, a copy, and input that is broken: each of it ends in the quarantine."""
    folder = tmp_path_factory.mktemp("input") / "files"
    library = Path(sysconfig.get_paths()["stdlib"])
    for package in ("json", "email", "asyncio"):
        shutil.copytree(library / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(folder / "json" / "decoder.py", folder / "copy.py")
    (folder / "latin.txt").write_bytes(b"\xe9t\xe9")
    (folder / "nul.txt").write_bytes(b"a\0b")
    (folder / "empty.txt").touch()
    (folder / "cut.jsonl.gz").write_bytes(gzip.compress(json.dumps({"text": "whole" * 99}).encode())[:-12])
    records = [{"id": str(i), "text": f"A record says the number {i} and that is all of it.\n" * 12} for i in range(5)]
    (folder / "records.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return folder


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quickstart of seconds."""
    train = {"steps": STEPS, "global_batch_size": 2, "checkpoint_every": 4, "overrides": TINY, "device": "cpu"}
    values = {"train_tokenizer": {"vocab_size": 400}, "pack": {"sequence_length": 128}, "train": train}
    values |= {"tokenize": {"validation_fraction": 0.2}, "sampling": {"max_tokens": 4, "seed": 0}}
    file = tmp_path_factory.mktemp("settings") / "small.yaml"
    file.write_text(json.dumps(values))  # JSON is YAML
    return file


def start(*arguments: str | Path, cwd: Path) -> subprocess.Popen[str]:
    """``lakemoe ARGUMENTS`` in a process group of its own, so that a kill takes Spark's processes along."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("LAKEMOE_", "MLFLOW_"))}
    return subprocess.Popen(
        [sys.executable, "-m", "jobs.main", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=cwd,
        env=environment | {"PYTHONPATH": str(Path.cwd()), "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )


def run(*arguments: str | Path, cwd: Path, code: int = 0) -> str:
    process = start(*arguments, cwd=cwd)
    out, _ = process.communicate(timeout=1200)
    assert process.returncode == code, out
    return out


def kill_when(process: subprocess.Popen[str], condition: Callable[[], bool]) -> None:
    """SIGKILL to the whole group as soon as the condition holds."""
    until = time.monotonic() + 1200
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < until
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait(timeout=60)


def versions(lake: Path) -> dict[str, int]:
    """The version of every table but the two that record what happens."""
    names = [n for n in TABLES if not n.startswith("ops.") and (lake / n.replace(".", "/")).exists()]
    return {name: DeltaTable(table_uri(str(lake), name)).version() for name in names}


def digest(lake: Path, name: str, key: str) -> str:
    rows: list[dict[str, Any]] = []
    for file in DeltaTable(table_uri(str(lake), name)).file_uris():
        rows += pq.ParquetFile(file).read().to_pylist()
    return hashlib.sha256(repr(sorted(rows, key=lambda row: row[key])).encode()).hexdigest()


def outcome(lake: Path) -> dict[str, Any]:
    """What two undisturbed runs have in common: gold, the loss curve, the model's bytes, how many runs there are."""
    training = lake / "training" / "quickstart"
    lines = [json.loads(line) for line in (training / "metrics.jsonl").read_text().splitlines()]
    store = f"sqlite:///{lake}/mlflow.db"
    client = MlflowClient(tracking_uri=store, registry_uri=store)  # else it asks the last registry of this process
    (experiment,) = [e for e in client.search_experiments() if e.name == "lakemoe"]
    runs = client.search_runs([experiment.experiment_id])
    history = client.get_metric_history(runs[0].info.run_id, "loss")
    return {
        "tokens": digest(lake, GOLD_TOKENS.name, "document_id"),
        "sequences": digest(lake, GOLD_SEQUENCES.name, "sequence_id"),
        "curve": [(line["step"], line["loss"]) for line in lines],
        "logged": [(m.step, m.value) for m in history],
        "weights": (training / "checkpoints" / f"step-{STEPS:06d}" / "model.safetensors").read_bytes(),
        "runs": len(runs),
        "versions": [v.version for v in client.search_model_versions("name = 'quickstart'")],
        "champion": client.get_model_version_by_alias("quickstart", "champion").version,
    }


@pytest.mark.slow
@pytest.mark.timeout(3000)  # six runs of the whole way, on a machine that another worker uses
def test_killed_anywhere_and_run_again_it_ends_as_if_undisturbed(source: Path, settings: Path, tmp_path: Path) -> None:
    calm, killed = tmp_path / "calm", tmp_path / "killed"
    common = ("quickstart", "--config", settings, "--source", source)
    out = run(*common, "--lake", calm, cwd=tmp_path)
    for words in ("quarantined", "invalid_utf8 1", "bigram", "models:/quickstart@champion", "lakemoe serve", "curl"):
        assert words in out
    assert not list(tmp_path.glob("mlruns*")), "everything lies in the lake"

    # Once in a random stage of the pipeline, once in the training, once while the registry is written.
    table = random.choice(("bronze/documents", "silver/documents", "silver/minhash", "gold/tokens", "gold/sequences"))
    kill_when(start(*common, "--lake", killed, cwd=tmp_path), (killed / table / "_delta_log").exists)
    journal = killed / "training" / "quickstart" / "metrics.jsonl"
    kill_when(
        start(*common, "--lake", killed, cwd=tmp_path),
        lambda: journal.exists() and journal.read_text().count("\n") >= STEPS // 2,
    )
    kill_when(start(*common, "--lake", killed, cwd=tmp_path), (killed / "mlartifacts").exists)
    run(*common, "--lake", killed, cwd=tmp_path)
    assert outcome(killed) == outcome(calm)

    before = versions(calm)
    out = run(*common, "--lake", calm, cwd=tmp_path)
    assert versions(calm) == before
    assert "succeeded" not in "".join(line for line in out.splitlines() if not line.startswith("evaluate"))
    assert outcome(calm) == outcome(killed)


@pytest.mark.slow
def test_a_full_disk_loses_nothing(source: Path, tmp_path: Path) -> None:
    """A size limit on files stands for the full disk: writing fails in the middle, with ENOSPC's cousin EFBIG."""
    lake = tmp_path / "lake"
    limited = f"ulimit -f 40; exec {sys.executable} -m jobs.main ingest --source {source} --lake {lake}"
    environment = {**os.environ, "PYTHONPATH": str(Path.cwd())}
    done = subprocess.run(
        ["bash", "-c", limited], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=800, check=False
    )
    assert done.returncode == 75, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    long = tmp_path / "long.jsonl"
    long.write_text('{"text": "' + "x" * 100_000_000 + '"}\n{"text": "A short one after it."}\n')
    out = run("ingest", "--source", source, "--source", long, "--lake", lake, cwd=tmp_path)
    assert "ingest: succeeded" in out
    files = DeltaTable(table_uri(str(lake), "bronze.documents")).file_uris()
    rows = [row for file in files for row in pq.ParquetFile(file).read(["source_id"])["source_id"].to_pylist()]
    expected = {str(path.relative_to(source)) for path in source.rglob("*.py")} | {*"01234", "long.jsonl:2"}
    assert len(rows) == len(set(rows))
    assert set(rows) >= expected, expected - set(rows)
    quarantined = DeltaTable(table_uri(str(lake), "bronze.quarantine")).to_pyarrow_table(columns=["reason"])
    assert "too_large" in quarantined["reason"].to_pylist()
