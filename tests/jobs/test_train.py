"""`lakemoe train --dry-run` and `lakemoe describe`: whole answers, in seconds, in 80 columns, from settings or data."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jobs.estimates import PARTS, TIMES
from jobs.main import main
from model.config import preset_names
from model.train.machine import Machine
from tests.model.conftest import WriteSequences, write_sequences

__all__ = ["write_sequences"]  # a fixture of this file, too


def test_dbrx_on_512_gpus_answers_in_seconds(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "jobs.train", "--dry-run", "--model", "dbrx", "--gpus", "512"]
    # Neither torch nor MLflow nor a lake.
    block = "import sys; sys.modules.update({n: None for n in ('torch', 'mlflow', 'pyspark')}); "
    block += "from jobs.main import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", block, "train", *command[3:]]
    begin = time.monotonic()
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path.cwd())},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - begin < 15  # half a second; a machine may be busy
    assert "131,596,523,520 parameters" in done.stdout
    assert "It fits:" in done.stdout
    assert "A checkpoint takes 1,579.2 GB of disk, and copies of it 3.1 GB of main memory a process." in done.stdout
    assert all(words in done.stdout for words in (*PARTS.values(), *TIMES.values(), "tokens/s", "MFU"))
    assert not list(tmp_path.iterdir())


def test_what_does_not_fit_names_a_way_that_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    dry = ["train", "--dry-run", "--model", "dbrx"]
    assert main([*dry, "--gpus", "8"]) == 0
    printed = capsys.readouterr().out
    assert "It does not fit:" in printed
    flags = next(line for line in printed.splitlines() if "--gpus" in line).split(": ", 1)[1].split()
    assert main([*dry, *flags]) == 0
    assert "It fits:" in capsys.readouterr().out


def test_a_slower_network_is_a_flag(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    printed = []
    for gigabits in ("400", "50"):
        assert main(["train", "--dry-run", "--model", "dbrx", "--gpus", "512", "--network", gigabits]) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] != printed[1]


def test_without_model_the_lake_s_data_decide(
    write_sequences: WriteSequences,
    capsys: pytest.CaptureFixture[str],
) -> None:
    lake = write_sequences(length=48)
    assert main(["train", "--dry-run", "--lake", lake]) == 0
    printed = capsys.readouterr().out
    assert "sequences of 48 tokens, as in" in printed
    assert main(["train", "--dry-run", "--lake", lake, "--model", "quickstart", "--train.sequence-length", "96"]) == 0
    assert "sequences of 96 tokens, as set" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--gpus", "4"], "add --dry-run"),
        (["--dry-run", "--model", "dbrx", "--gpus", "6", "--train.global-batch-size", "8"], "take a multiple"),
        # Also where what is set is the default.
        (["--dry-run", "--model", "dbrx", "--gpus", "6", "--train.global-batch-size", "16"], "take a multiple"),
        (["--dry-run", "--model", "dbrx", "--gpus", "6", "--train.expert-parallel", "4"], "must divide the number"),
        (
            ["--dry-run", "--model", "dbrx", "--gpus", "3", "--train.expert-parallel", "3"],
            "16 experts cannot be spread",
        ),
        (["--dry-run", "--model", "none"], "There is no model preset 'none'"),
        (["--dry-run", "--processes", "6", "--train.expert-parallel", "4"], "must divide the number of GPUs, 6"),
        (
            ["--dry-run", "--train.overrides", '{"heads": 3}'],
            "quickstart.yaml with overrides of heads: the model: heads",
        ),
    ],
)
def test_a_mistake_is_one_sentence(
    flags: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", *flags]) == 2
    (sentence,) = capsys.readouterr().err.strip().splitlines()
    assert words in sentence


@pytest.mark.parametrize("preset", preset_names())
def test_describe_is_whole_at_80_columns(
    preset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("jobs.console.out._width", 80)
    monkeypatch.chdir(tmp_path)
    assert main(["describe", "--model", preset, "--assumptions"]) == 0
    printed = capsys.readouterr().out
    assert "…" not in printed
    tables = [line for line in printed.splitlines() if line and line[0] in "│┃┏┡└"]
    assert tables
    assert all(len(line) <= 80 for line in tables)
    for gpus in ("1", "8", "512", "3,072"):
        assert any(line.startswith("│") and line[1:].split("│")[0].strip() == gpus for line in tables)
    assert all(f"{name}:" in printed for name in Machine.model_fields if name != "name")
