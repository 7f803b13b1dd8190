"""Runs tests/kernels/test_moe.py on the Triton code in Triton's interpreter, on the CPU.

A kernel decides when it is defined whether it is interpreted, so the setting needs a process of its own.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_moe_in_the_interpreter() -> None:
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
        "tests/kernels/test_moe.py",
    ]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=850, check=False)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
