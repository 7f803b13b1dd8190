"""The quickstart notebook, executed from its first cell to its last in a kernel of this Python, and executed again."""

from __future__ import annotations

import shutil
import sys
import sysconfig
from pathlib import Path
from typing import Any

import jupytext
import nbclient
import nbformat
import pytest
from deltalake import DeltaTable
from ipykernel.kernelspec import install

from model.registry.load import resolve
from model.registry.store import connect
from pipelines.tables import OPS_ERASURES, OPS_RUNS, TABLES

ROOT = Path(__file__).resolve().parents[2]
KERNEL = "lakemoe-test"
PROMPT = "import json\n\ndef "
SMALL = {"layers": 2, "width": 32, "heads": 2, "kv_heads": 1, "head_width": 16, "experts": 4, "experts_chosen": 2}


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a kernel that is this very Python: one called python3 may be of any environment of the machine."""
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter" / "share" / "jupyter"))
    install(kernel_name=KERNEL, prefix=str(tmp_path / "jupyter"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    # Its own server, if the machine has one, is none of this test's.
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return KERNEL


def make_sources(folder: Path) -> list[str]:
    """A few dozen real files: three packages of the standard library, the descriptions of installed packages."""
    library, packages = (Path(sysconfig.get_paths()[name]) for name in ("stdlib", "purelib"))
    for package in ("json", "email", "asyncio"):
        shutil.copytree(library / package, folder / "code" / package, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "docs").mkdir()
    for metadata in sorted(packages.glob("[a-p]*.dist-info/METADATA"))[:40]:
        shutil.copyfile(metadata, folder / "docs" / f"{metadata.parent.stem}.md")
    return [str(folder / "code"), str(folder / "docs")]


def execute(kernel: str, folder: Path, parameters: dict[str, Any]) -> nbformat.NotebookNode:
    """The executed notebook, with these parameters in a cell after its own, as papermill does it."""
    notebook = jupytext.read(ROOT / "notebooks" / "quickstart.py")
    (at,) = (n for n, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", []))
    own: dict[str, Any] = {}
    exec(notebook.cells[at].source, own)
    assert set(parameters) <= set(own), "a parameter that the notebook does not have would be set in vain"
    source = "\n".join(["import sys", *(f"{k} = {v!r}" for k, v in parameters.items()), "print(sys.executable)"])
    notebook.cells.insert(at + 1, nbformat.v4.new_code_cell(source))
    client = nbclient.NotebookClient(
        notebook, kernel_name=kernel, timeout=600, resources={"metadata": {"path": str(folder)}}
    )
    # A cell that raises raises here, with its traceback.
    return client.execute()


def outputs(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def printed(notebook: nbformat.NotebookNode) -> str:
    return "".join(o.text for o in outputs(notebook) if o.output_type == "stream" and o.name == "stdout")


def versions(lake: Path) -> dict[str, int]:
    tables = [table for table in TABLES.values() if table is not OPS_ERASURES]  # nothing was erased
    return {table.name: DeltaTable(table.uri(str(lake))).version() for table in tables}


@pytest.mark.slow
def test_the_notebook_leads_to_a_champion_and_again_adds_nothing(kernel: str, tmp_path: Path) -> None:
    lake = tmp_path / "lake"
    parameters = {
        "lake": str(lake),
        "sources": make_sources(tmp_path / "files"),
        "name": "small",
        "vocabulary": 512,
        "sequence_length": 128,
        "validation_fraction": 0.1,
        "overrides": SMALL,
        "steps": 4,
        "warmup_steps": 1,
        "prompt": PROMPT,
        "max_tokens": 8,
    }
    first = execute(kernel, tmp_path, parameters)
    assert sys.executable in printed(first).splitlines()
    assert [o for o in outputs(first) if o.output_type == "error"] == []
    assert sum("image/png" in o.get("data", {}) for o in outputs(first)) >= 4
    (completion,) = (o.text for o in outputs(first) if o.get("text", "").startswith(PROMPT))
    assert len(completion.rstrip("\n")) > len(PROMPT)
    champion = resolve(connect(str(lake)), "models:/small@champion")
    assert str(champion.version) == "1"
    assert champion.tags["lakemoe.gold.sequences.version"].isdigit()

    before = versions(lake)
    second = execute(kernel, tmp_path, parameters)
    assert completion in [o.get("text") for o in outputs(second)]
    after = versions(lake)
    assert {**after, OPS_RUNS.name: 0} == {**before, OPS_RUNS.name: 0}, "only ops.runs says that it ran again"
    assert [str(v.version) for v in connect(str(lake)).search_model_versions("name = 'small'")] == ["1"]
