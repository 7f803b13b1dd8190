"""The pipeline's stages beside datatrove's, in one run over one corpus: CPU seconds, rates, memory, kept and dropped.

    python -m venv PEER && PEER/bin/pip install "datatrove[processing]==0.10.0" spacy orjson tokenizers psutil
    python benchmarks/pipeline.py --megabytes 100 --peer-python PEER/bin/python

The corpus is pipeline_corpus.py's; the contestants are those of CONTESTANTS, each in a process of its own, one after
the other. Ratios are datatrove's CPU seconds over ours, of the whole process tree, the JVM and its start included where
a row says so. Rows marked "alone" are the functions without Spark, beside datatrove's step less its reading. What the
two keep is printed beside it and not compared: they split words differently (decisions on the same words are a test's
business). Left out: growth with the corpus and the cost of a change, which pipeline_growth.py measures.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from rich.box import SIMPLE_HEAD
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.harness import OUT, machine, out
from benchmarks.pipeline_corpus import KINDS, CorpusConfig, build
from pipelines.tokenize.config import TrainTokenizerConfig
from pipelines.tokenize.train import train

HERE = Path(__file__).resolve().parent
# name: (script, its first argument, whether it runs in the peer's environment)
CONTESTANTS = {
    "functions": ("pipeline_ours.py", "functions", False),
    "equal": ("pipeline_ours.py", "equal", False),
    "default": ("pipeline_ours.py", "default", False),
    "regex": ("pipeline_peer.py", "regex", True),
    "shipped": ("pipeline_peer.py", "shipped", True),
}
PEERS = ("shipped", "regex")
# What a vocabulary of this size is trained on, of each kind (characters).
SAMPLE = 2_000_000

Stages = dict[str, dict[str, Any]]


class Row(NamedTuple):
    """One comparison: stages whose CPU seconds are added, of ours and of the peer; those of ``without`` are taken off.

    targets: of the ratio, against datatrove as shipped and with a regex; None where nothing was promised.
    """

    name: str
    contestant: str
    ours: tuple[str, ...]
    peer: tuple[str, ...]
    without: tuple[str, ...] = ()
    targets: tuple[float | None, float | None] = (None, None)


_DEDUP = ("signatures", "buckets", "clusters", "dedup filter")
_PEER = ("filters", *_DEDUP, "tokenize")
_OURS = ("clean", "dedup", "tokenize", "pack")
ROWS = (
    Row("signals alone", "functions", ("signals alone",), ("filters",), ("read",), (5, None)),
    Row("signatures alone", "functions", ("signatures alone",), ("signatures",), ("read",), (10, None)),
    Row("clean", "equal", ("clean",), ("filters",)),
    Row("near dedup", "equal", ("dedup",), _DEDUP),
    Row("tokenize, pack", "equal", ("tokenize", "pack"), ("tokenize",)),
    Row("clean to pack", "equal", _OURS, _PEER, targets=(4, 1.5)),
    Row("all, with start", "equal", ("start", "ingest", *_OURS), _PEER),
    Row("clean to pack, default", "default", _OURS, _PEER),
)


def seconds(stages: Stages, names: Sequence[str]) -> float:
    """CPU seconds of the stages together."""
    return float(sum(stages[name]["cpu"] for name in names))


def peer_seconds(row: Row, stages: Stages) -> float:
    """CPU seconds of the peer for a row."""
    return seconds(stages, row.peer) - seconds(stages, row.without)


def ratios(row: Row, ran: dict[str, Stages]) -> dict[str, float]:
    """The peers' CPU seconds over ours, of the peers that ran; empty where ours did not."""
    if row.contestant not in ran:
        return {}
    ours = seconds(ran[row.contestant], row.ours)
    return {peer: peer_seconds(row, ran[peer]) / ours for peer in PEERS if peer in ran}


def show(ran: dict[str, Stages], counts: dict[str, int]) -> None:
    """Print the three tables."""
    compared = _table("CPU seconds of the whole process tree; ratio of datatrove's to ours", "stage")
    for name in ("ours", *(name for peer in PEERS for name in (peer, "ratio", "target"))):
        compared.add_column(name, justify="right", no_wrap=True)
    for row in ROWS:
        found = ratios(row, ran)
        if not found:
            continue
        cells = [f"{seconds(ran[row.contestant], row.ours):.1f}"]
        for peer, target in zip(PEERS, row.targets, strict=True):
            there = peer in ran
            cells.append(f"{peer_seconds(row, ran[peer]):.1f}" if there else "")
            cells.append(f"{found[peer]:.2f}" if there else "")
            cells.append("" if target is None else f"{target:g}")
        compared.add_row(row.name, *cells)
    out.print(compared)
    costs = _table("What each stage took: of CPU seconds, and the greatest memory of its processes together", "run")
    for name in ("stage", "CPU s", "wall s", "MB/CPU s", "docs/CPU s", "peak MB"):
        costs.add_column(name, justify="left" if name == "stage" else "right", no_wrap=True)
    for contestant, stages in ran.items():
        for name, stage in stages.items():
            cpu = max(stage["cpu"], 0.01)
            rates = (f"{counts['bytes'] / 1e6 / cpu:,.1f}", f"{counts['documents'] / cpu:,.0f}")
            costs.add_row(
                contestant, name, f"{cpu:.1f}", f"{stage['wall']:.1f}", *rates, f"{stage['tree_bytes'] / 1e6:,.0f}"
            )
    out.print(costs)
    for contestant, stages in ran.items():
        for name, stage in stages.items():
            if stage["counts"]:
                told = ", ".join(f"{key} {count:,}" for key, count in stage["counts"].items())
                out.print(f"{contestant}, {name}: {told}", markup=False)


def _table(title: str, first: str) -> Table:
    # Narrow enough for 80 columns: a figure that is cut short would be none.
    table = Table(
        title=title, title_justify="left", box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0)
    )
    table.add_column(first, no_wrap=True)
    return table


def run(contestant: str, corpus: Path, tokenizer: Path, peer_python: str | None) -> dict[str, Any]:
    """One contestant's figures. Raises SystemExit with what it said last where it fails."""
    script, settings, is_peer = CONTESTANTS[contestant]
    with tempfile.TemporaryDirectory(prefix="lakemoe-benchmark-") as folder:
        figures = Path(folder, "figures.json")
        python = peer_python if is_peer else sys.executable
        assert python is not None  # main() leaves the peers out where there is none
        command = [python, str(HERE / script), settings, str(corpus), str(tokenizer), f"{folder}/work", str(figures)]
        ran = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
        if ran.returncode:
            raise SystemExit(f"{contestant} failed; its last words:\n" + "\n".join(ran.stdout.splitlines()[-20:]))
        found: dict[str, Any] = json.loads(figures.read_text(encoding="utf-8"))
    return found


def make_tokenizer(corpus: Path, to: Path) -> None:
    """A byte-level BPE of train-tokenizer's default vocabulary, trained on the first texts of each kind."""
    if to.exists():
        return
    sample = []
    for kind in KINDS:
        size = 0
        for path in sorted((corpus / kind).glob("*.jsonl")):
            with path.open(encoding="utf-8") as lines:
                for line in lines:
                    if size >= SAMPLE:
                        break
                    sample.append(json.loads(line)["text"])
                    size += len(sample[-1])
    to.write_text(train(sample, TrainTokenizerConfig().vocab_size).to_str(pretty=False), encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--megabytes", type=float, default=20, help="text that all run on (10^6 bytes of UTF-8)")
    parser.add_argument("--peer-python", help="Python of an environment with datatrove; without it ours alone run")
    parser.add_argument("--only", nargs="+", choices=CONTESTANTS, help="contestants that run; default: all")
    parser.add_argument("--corpus", type=Path, help="folder to keep the corpus in; default: one that is removed")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the JSON file with the figures")
    asked = parser.parse_args()
    peer_python = shutil.which(asked.peer_python) if asked.peer_python else None
    if asked.peer_python and peer_python is None:
        parser.error(f"there is no program {asked.peer_python}; name the Python of datatrove's environment.")
    with tempfile.TemporaryDirectory(prefix="lakemoe-corpus-") as made:
        folder = asked.corpus or Path(made)
        counts = build(CorpusConfig(megabytes=asked.megabytes), folder / "corpus")
        make_tokenizer(folder / "corpus", folder / "tokenizer.json")
        out.print(f"{counts['documents']:,} documents, {counts['bytes'] / 1e6:.1f} MB")
        ran: dict[str, Stages] = {}
        versions = {name: version(name) for name in ("pyspark", "delta-spark")}
        for contestant in asked.only or CONTESTANTS:
            if CONTESTANTS[contestant][2] and peer_python is None:
                continue
            figures = run(contestant, folder / "corpus", folder / "tokenizer.json", peer_python)
            ran[contestant] = {stage["stage"]: stage for stage in figures["stages"]}
            versions |= {f"peer {name}": of for name, of in figures.get("versions", {}).items()}
            out.print(f"{contestant}: {seconds(ran[contestant], list(ran[contestant])):.1f} CPU s", markup=False)
            # A long run that is cut off keeps what it has measured.
            record = {
                "corpus": counts,
                "ratios": {row.name: ratios(row, ran) for row in ROWS},
                "ran": ran,
                "machine": machine(),
                "versions": versions,
            }
            asked.out.mkdir(parents=True, exist_ok=True)
            (asked.out / "pipeline.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    show(ran, counts)
    return 0


if __name__ == "__main__":
    sys.exit(main())
