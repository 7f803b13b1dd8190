"""Runs the kernels' tests on the Triton code in Triton's interpreter, on the CPU.

A kernel decides when it is defined whether it is interpreted, so the setting needs a process of its own.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import numpy
import pytest
from packaging.version import Version


def interpreter_fails() -> str:
    """Why Triton's interpreter cannot run here, or nothing."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if Version(version("triton")) < Version("3.7") and Version(numpy.__version__) >= Version("2.4"):
        return "the interpreter before Triton 3.7 cannot read a loop's bound with NumPy 2.4 or newer"
    return ""


@pytest.mark.slow
@pytest.mark.skipif(interpreter_fails() != "", reason=interpreter_fails() or "it can run")
@pytest.mark.parametrize("file", ["test_moe.py", "test_permute.py", "test_block_sparse.py"])
def test_a_file_in_the_interpreter(file: str) -> None:
    root = Path(__file__).parents[2]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-m",
        "not gpu",
        "-p",
        "no:cacheprovider",
        f"tests/kernels/{file}",
    ]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=1700, check=False)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
