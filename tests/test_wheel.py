"""The wheel, not the checkout: built, installed in a clean environment, its command run."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def run(*command: str | Path, cwd: Path) -> str:
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(
        [str(c) for c in command], cwd=cwd, env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_wheel_installs_and_runs_alone(tmp_path: Path) -> None:
    uv = Path(sys.executable).with_name("uv")
    run(uv, "build", "--wheel", "--quiet", "--out-dir", tmp_path, ROOT, cwd=tmp_path)
    (wheel,) = tmp_path.glob("lakemoe-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert not [n for n in names if n.count("/") == 1 and n.endswith("__init__.py")], "rooms are namespace packages"
    data = {"conf/models/dbrx.yaml", "conf/clean.yaml", "conf/quickstart.yaml", "pipelines/report/page.html.jinja"}
    assert data <= set(names)
    assert not [n for n in names if n.startswith(("tests/", "benchmarks/", "notebooks/"))]
    run(uv, "venv", "--quiet", "--python", sys.executable, tmp_path / "env", cwd=tmp_path)
    python = tmp_path / "env" / "bin" / "python"
    run(uv, "pip", "install", "--quiet", "--python", python, "-c", ROOT / "constraints.txt", wheel, cwd=tmp_path)
    lakemoe = tmp_path / "env" / "bin" / "lakemoe"
    assert "usage: lakemoe JOB" in run(lakemoe, "--help", cwd=tmp_path)
    assert "131,596,523,520" in run(lakemoe, "describe", "--model", "dbrx", cwd=tmp_path)
    # The rooms keep apart: the trainer's node has no Spark, the pipeline's no torch.
    block = "import sys; sys.modules.update({name: None for name in %r}); import %s"
    run(python, "-c", block % (("pyspark", "delta"), "model.network.transformer"), cwd=tmp_path)
    run(python, "-c", block % (("torch", "mlflow"), "pipelines.lake"), cwd=tmp_path)
