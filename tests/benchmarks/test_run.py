"""The benchmarks run to their table on the smallest input, and refuse to compare results that differ.

Left out: the figures themselves, which on a shared machine would fail at random.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import loader, tokenization
from benchmarks.harness import Different

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_every_benchmark_runs_to_its_row_of_the_table(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "run.py"), "--megabytes=1", "--repetitions=1"]
    # From another folder: nothing may depend on where it is called.
    ran = subprocess.run([*command, f"--out={tmp_path}"], cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert ran.returncode == 0, ran.stderr
    table = ran.stdout[ran.stdout.rindex("Millions of tokens a second") :]
    for claim in ("loader", "tokenization"):
        assert any(line.split()[:1] == [claim] for line in table.splitlines()), table
        figures = json.loads((tmp_path / f"{claim}.json").read_text(encoding="utf-8"))
        assert figures["tokens"] > 0
        assert figures["cpu_ratio"]["median"] > 0


def test_the_loader_is_refused_where_one_sequence_differs() -> None:
    right = [b"a", b"b", b"b"]
    loader.check(list(right), list(right))
    for wrong in ([b"a", b"b", b"c"], [b"a", b"b"], [b"a", b"a", b"b"]):
        with pytest.raises(Different, match="the loader yields"):
            loader.check(wrong, right)


def test_the_tokens_are_refused_where_one_id_differs() -> None:
    right = [[1, 2, 3], [], [4]]
    assert tokenization.check(iter(right), iter(right)) == 4
    for wrong in ([[1, 2, 3], [], [5]], [[1, 2, 3], []], [*right, [6]]):
        with pytest.raises(Different):
            tokenization.check(iter(wrong), iter(right))
