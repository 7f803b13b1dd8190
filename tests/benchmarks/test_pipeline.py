"""The pipeline's benchmark: its corpus is what it says, its meter loses no process, its ratios compare what they name.

Left out: the runs themselves, which need Spark and datatrove's own environment, and the figures.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import pipeline, pipeline_corpus
from benchmarks.pipeline_corpus import CorpusConfig, build, docstrings, edited
from pipelines.dedup.shingles import shingle_sets

# Burns CPU in a grandchild that its parent leaves behind, and says so when it has begun.
_ORPHAN = """
import os, time
read, write = os.pipe()
if os.fork() == 0:
    if os.fork() == 0:
        end = time.process_time() + 0.5
        while time.process_time() < end: pass
        os.write(write, b".")
    os._exit(0)
os.read(read, 1)
"""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus") / "made"
    build(CorpusConfig(megabytes=1, exact=0.1, near=0.1, file_megabytes=0.2), folder)
    return folder


def _records(corpus: Path) -> dict[str, dict[str, str]]:
    lines = [line for path in sorted(corpus.glob("*/*.jsonl")) for line in path.read_text("utf-8").splitlines()]
    return {record["id"]: record for record in map(json.loads, lines)}


def test_the_corpus_is_what_was_asked_for_and_again_the_same(corpus: Path, tmp_path: Path) -> None:
    counts = json.loads((corpus / "corpus.json").read_text("utf-8"))["counts"]
    records = _records(corpus)
    assert len(records) == counts["documents"]
    assert sum(len(record["text"].encode()) for record in records.values()) == counts["bytes"] >= 0.99e6
    for share, origin in ((0.1, "exact"), (0.1, "near"), (0.8, "original")):
        # The last document of each is whole, and none is larger than MOST.
        assert share * 1e6 * 0.99 <= counts[f"bytes.{origin}"] <= share * 1e6 + pipeline_corpus.MOST
    again = CorpusConfig(megabytes=1, exact=0.1, near=0.1, file_megabytes=0.2)
    assert build(again, tmp_path / "again") == counts
    assert _records(tmp_path / "again") == records
    with pytest.raises(SystemExit, match="name another folder"):
        build(again.model_copy(update={"seed": 1}), tmp_path / "again")


def test_copies_are_of_the_documents_that_they_name(corpus: Path) -> None:
    records = _records(corpus)
    copies = {name: record for name, record in records.items() if not name.startswith("original")}
    assert copies
    for name, copy in copies.items():
        original = records["original-" + name.rpartition("-of-")[2]]
        assert (copy["text"] == original["text"]) == name.startswith("exact")
        assert copy["kind"] == original["kind"]


@given(words=st.lists(st.text("abcdefgh", min_size=1, max_size=4), min_size=200, max_size=400), seed=st.integers(0, 99))
def test_an_edited_copy_is_near(words: list[str], seed: int) -> None:
    # Words of their own, so that shingles repeat only where the text does.
    text = " ".join(f"{word}{number}" for number, word in enumerate(words))
    copy = edited(text, random.Random(seed))
    a, b = shingle_sets(pa.array([text, copy]), np.zeros(2, bool), 5)
    common = len(np.intersect1d(a, b))
    # An edit touches two words at most, a word is in five shingles, and each of those is replaced.
    edits = max(1, int(pipeline_corpus.MOST_EDITED * len(text.split())))
    assert common >= len(a) - 10 * edits


def test_docstrings_are_taken_in_order_and_from_nothing_else() -> None:
    source = '"""Module."""\nclass A:\n    """Class."""\n    def f(self):\n        """Function."""\n        x = "no"\n'
    assert docstrings(source) == "Module.\n\nClass.\n\nFunction."
    assert docstrings("def broken(:") == docstrings("x = 1") == ""


def test_the_meter_counts_a_process_whose_parent_has_ended() -> None:
    code = (
        "import json, subprocess, sys\nfrom benchmarks.processes import Meter\nmeter = Meter()\n"
        "with meter.stage('orphan') as counts:\n"
        f"    subprocess.run([sys.executable, '-c', {_ORPHAN!r}], check=True)\n"
        "    counts['runs'] = 1\n"
        "usage = meter.stages[0]\nprint(json.dumps([usage.stage, usage.cpu, usage.tree_bytes, usage.counts]))"
    )
    root = Path(__file__).resolve().parents[2]
    ran = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    stage, cpu, tree_bytes, counts = json.loads(ran.stdout)
    assert (stage, counts) == ("orphan", {"runs": 1})
    assert cpu >= 0.5
    assert tree_bytes > 5e6


def test_ratios_add_the_stages_that_a_row_names() -> None:
    def stages(**cpu: float) -> pipeline.Stages:
        return {name.replace("_", " "): {"cpu": seconds} for name, seconds in cpu.items()}

    row = pipeline.Row("two", "equal", ("clean", "dedup"), ("filters", "tokenize"), ("read",))
    ran = {"equal": stages(clean=1.0, dedup=3.0, pack=9.0), "regex": stages(read=2.0, filters=7.0, tokenize=3.0)}
    assert pipeline.ratios(row, ran) == {"regex": 2.0}
    assert pipeline.ratios(row, {"regex": ran["regex"]}) == {}
