"""How the pipeline's cost grows: with the corpus (time and memory), and with a change to it.

    python benchmarks/pipeline_growth.py scale --megabytes 20 --multiples 1 3 10
    python benchmarks/pipeline_growth.py change --megabytes 100

``scale`` runs our stages, set as a user has them, over corpora of several sizes, each in a process and a lake of its
own. ``change`` runs `lakemoe pipeline` over a corpus, adds files of about a tenth of it and runs it again, then over
all of it in a new lake that has the first one's tokenizer; what counts is the second run's CPU seconds over the full
one's. Each pays a JVM's start.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.harness import OUT, machine, out
from benchmarks.pipeline import make_tokenizer, run
from benchmarks.pipeline_corpus import KINDS, CorpusConfig, build
from benchmarks.processes import Meter, reap

ROOT = Path(__file__).resolve().parent.parent
# One file in so many comes later.
NEW = 11
FILES = 8 * NEW
# Seconds after which ingest trusts that a file's time tells whether it was changed again.
FRESH = 3


def scale(megabytes: float, multiples: list[float], folder: Path) -> dict[str, Any]:
    """CPU seconds by stage and the greatest memory of each role, by size."""
    sizes: dict[str, Any] = {}
    table = Table(title="CPU seconds by stage", title_justify="left", box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for multiple in multiples:
        corpus = folder / f"{multiple:g}"
        counts = build(CorpusConfig(megabytes=megabytes * multiple), corpus / "corpus")
        # One tokenizer for all: tokens are of the same vocabulary.
        make_tokenizer(corpus / "corpus", folder / "tokenizer.json")
        stages = run("default", corpus / "corpus", folder / "tokenizer.json", None)["stages"]
        peaks: dict[str, int] = {}
        for stage in stages:
            for role, size in stage["process_bytes"].items():
                peaks[role] = max(peaks.get(role, 0), size)
        sizes[f"{multiple:g}"] = {"corpus": counts, "stages": stages, "peaks": peaks}
        if not table.columns:
            for name in ("MB", *(stage["stage"] for stage in stages), "all", *(f"{role} MB" for role in peaks)):
                table.add_column(name, justify="right", no_wrap=True)
        cpu = [stage["cpu"] for stage in stages]
        cells = [f"{counts['bytes'] / 1e6:.0f}", *(f"{value:.1f}" for value in [*cpu, sum(cpu)])]
        table.add_row(*cells, *(f"{size / 1e6:,.0f}" for size in peaks.values()))
    out.print(table)
    return sizes


def change(megabytes: float, folder: Path) -> dict[str, Any]:
    """CPU seconds of a first run, of one with a tenth more documents, and of one over everything."""
    corpus, watched = folder / "corpus", folder / "watched"
    build(CorpusConfig(megabytes=megabytes, file_megabytes=megabytes / FILES), corpus)
    files = sorted(corpus.glob("*/*.jsonl"))
    new = files[NEW - 1 :: NEW]
    settings = folder / "settings.yaml"
    sources = [{"path": str(watched / kind), "kind": kind} for kind in KINDS]
    settings.write_text(json.dumps({"ingest": {"sources": sources}}), encoding="utf-8")  # JSON is YAML
    meter = Meter()

    def add(paths: list[Path]) -> None:
        for path in paths:
            to = watched / path.relative_to(corpus)
            to.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, to)
        time.sleep(FRESH)

    def pipeline(name: str, lake: Path) -> None:
        command = [sys.executable, "-m", "jobs.pipeline", "--lake", str(lake), "--config", str(settings)]
        with meter.stage(name) as counts:
            subprocess.run(command, cwd=ROOT, check=True, stdout=sys.stderr)
            reap()
            counts["bytes"] = sum(path.stat().st_size for path in watched.glob("*/*.jsonl"))
        usage = meter.stages[-1]
        out.print(f"{name:<12} {usage.cpu:8.1f} CPU s {counts['bytes'] / 1e6:8.1f} MB of JSONL")

    add([path for path in files if path not in new])
    pipeline("first", folder / "lake")
    add(new)
    pipeline("changed", folder / "lake")
    shutil.copytree(folder / "lake" / "tokenizers", folder / "fresh" / "tokenizers")
    pipeline("full", folder / "fresh")
    pipeline("nothing new", folder / "lake")
    stages = {usage.stage: asdict(usage) for usage in meter.stages}
    share = stages["changed"]["cpu"] / stages["full"]["cpu"]
    out.print(f"{len(new)} new files of {len(files)}: {100 * share:.0f} % of a full run (at most 20 % is promised)")
    return {"stages": stages, "share": share, "files": len(files), "new_files": len(new)}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("what", choices=("scale", "change"))
    parser.add_argument("--megabytes", type=float, default=20, help="text of the smallest corpus (10^6 bytes of UTF-8)")
    parser.add_argument("--multiples", type=float, nargs="+", default=[1, 3, 10], help="corpora of scale (multiples)")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the JSON file with the figures")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="lakemoe-growth-") as made:
        folder = Path(made)
        figures = (
            scale(asked.megabytes, asked.multiples, folder)
            if asked.what == "scale"
            else change(asked.megabytes, folder)
        )
    asked.out.mkdir(parents=True, exist_ok=True)
    record = {asked.what: figures, "machine": machine()}
    (asked.out / f"pipeline_{asked.what}.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
