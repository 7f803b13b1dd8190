"""Kill the pipeline at random moments and see that the tables end as if nothing had happened.

    python benchmarks/pipeline_kills.py --kills 30

One history of a lake: `lakemoe pipeline` over some of the standard library's packages, with an evaluation set; again
after files were changed, added and taken away from a mirrored source; `lakemoe erase` of a package. Undisturbed it is
run once, which gives each step's seconds. Then the same history in new lakes: each step is killed (SIGKILL to its whole
process group, the JVM and Spark's workers with it) at moments drawn evenly over its seconds, several times in a row,
and then run to its end. At the history's end every table but those that record runs is compared, row for row, without
run ids and times. Not a measurement of speed. Leaves nothing behind; ends with 1 where a table differs.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from deltalake import DeltaTable

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.harness import out
from pipelines.tables import TABLES, table_uri

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("json", "email", "asyncio")
# Each history writes its files at its own time.
LEFT_OUT = {"run_id", "ingested_at", "at", "source_modified_at"}


@dataclass(frozen=True)
class Step:
    """prepare: what happens to the input before it; arguments: of lakemoe."""

    name: str
    prepare: Callable[[Path], None]
    arguments: tuple[str, ...]


def first_files(source: Path) -> None:
    library = Path(sysconfig.get_paths()["stdlib"])
    for package in PACKAGES:
        shutil.copytree(library / package, source / package, ignore=shutil.ignore_patterns("__pycache__"))


def changed_files(source: Path) -> None:
    library = Path(sysconfig.get_paths()["stdlib"])
    shutil.copytree(library / "http", source / "http", ignore=shutil.ignore_patterns("__pycache__"))
    for number, file in enumerate(sorted(source.glob("asyncio/*.py"))):
        if number % 5 == 0:
            file.unlink()
        elif number % 5 == 1:
            file.write_text(file.read_text(encoding="utf-8") + "\n# A line more.\n", encoding="utf-8")


STEPS = (
    Step("first", first_files, ("pipeline",)),
    Step("changed", changed_files, ("pipeline",)),
    Step("erase", lambda _: None, ("erase", "--where", "path LIKE '%/email/%'", "--reason", "asked for")),
)


class History:
    """One lake and its input in a folder of their own."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.lake, self.source = folder, folder / "lake", folder / "files"
        folder.mkdir(parents=True)
        (folder / "sets").mkdir()
        item = (Path(sysconfig.get_paths()["stdlib"]) / "json" / "encoder.py").read_text(encoding="utf-8")[2000:3000]
        (folder / "sets" / "leaked.jsonl").write_text(json.dumps({"text": item}) + "\n", encoding="utf-8")
        settings = {
            "ingest": {"sources": [{"path": str(self.source)}], "mirror": True},
            "decontaminate": {"sets": str(folder / "sets")},
            "train_tokenizer": {"vocab_size": 400},
            "tokenize": {"validation_fraction": 0.2},
            "pack": {"sequence_length": 128},
        }
        (folder / "settings.yaml").write_text(json.dumps(settings), encoding="utf-8")  # JSON is YAML

    def start(self, step: Step) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "jobs.main", *step.arguments, "--lake", str(self.lake)]
        if step.arguments[0] == "pipeline":
            command += ["--config", str(self.folder / "settings.yaml")]
        log = (self.folder / "log").open("ab")
        return subprocess.Popen(
            command, cwd=self.folder, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=log, stderr=log,
            start_new_session=True,
        )  # fmt: skip

    def finish(self, step: Step) -> float:
        """Run the step to its end; its seconds."""
        begin = time.monotonic()
        process = self.start(step)
        if process.wait(timeout=1800):
            raise SystemExit(f"{step.name} failed in {self.folder}:\n{(self.folder / 'log').read_text()[-3000:]}")
        return time.monotonic() - begin

    def kill(self, step: Step, after: float) -> bool:
        """Whether the step was killed: where it had ended before, there was nothing to kill."""
        process = self.start(step)
        try:
            process.wait(timeout=after)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(timeout=60)
            return True
        return False

    def tables(self) -> dict[str, list[str]]:
        """Every table's rows as sorted texts."""
        found = {}
        for name, table in TABLES.items():
            if name in ("ops.runs", "ops.promotions", "ops.erasures") or not DeltaTable.is_deltatable(self.uri(name)):
                continue
            names = [n for n in table.schema.names if n not in LEFT_OUT]
            files = DeltaTable(self.uri(name)).file_uris()
            rows = pa.concat_tables([pq.ParquetFile(f).read(columns=names) for f in files]) if files else None
            texts = [] if rows is None else [repr(tuple(row.values())) for row in rows.select(names).to_pylist()]
            # The lake's own folder is part of every path.
            found[name] = sorted(text.replace(str(self.folder), "") for text in texts)
        return found

    def uri(self, name: str) -> str:
        return table_uri(str(self.lake), name)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=30, help="how often a step is killed (count)")
    parser.add_argument("--in-a-row", type=int, default=3, help="kills of a step before it may end (count)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (number)")
    asked = parser.parse_args()
    rng, left, different = random.Random(asked.seed), asked.kills, 0
    with tempfile.TemporaryDirectory(prefix="lakemoe-kills-") as made:
        undisturbed, seconds = History(Path(made) / "undisturbed"), {}
        for step in STEPS:
            step.prepare(undisturbed.source)
            seconds[step.name] = undisturbed.finish(step)
            out.print(f"{step.name:<9} undisturbed {seconds[step.name]:6.1f} s")
        expected = undisturbed.tables()
        number = 0
        while left > 0:
            number += 1
            history = History(Path(made) / f"lake-{number}")
            for step in STEPS:
                step.prepare(history.source)
                for _ in range(min(left, asked.in_a_row)):
                    moment = rng.uniform(0, seconds[step.name])
                    if not history.kill(step, moment):
                        break
                    left -= 1
                    out.print(f"{step.name:<9} killed after {moment:5.1f} s; {left} to go")
                else:
                    history.finish(step)
            found = history.tables()
            for name in sorted(expected.keys() | found.keys()):
                rows, wanted = found.get(name, []), expected.get(name, [])
                if rows != wanted:
                    different += 1
                    out.print(f"lake {number}: {name} differs: {len(set(wanted) - set(rows))} rows of {len(wanted)}")
            out.print(f"lake {number}: compared {sum(map(len, found.values())):,} rows of {len(found)} tables")
            shutil.rmtree(history.folder)
    out.print("every table is as the undisturbed one" if not different else f"{different} tables differ")
    return int(different > 0)


if __name__ == "__main__":
    sys.exit(main())
