"""ops.runs: one row for every run of every job, and the check that spares a run with nothing to do.

Written with deltalake, not Spark, so that training on a node without Spark is recorded the same way.
"""

from __future__ import annotations

import importlib.metadata
import json
import secrets
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
from deltalake import DeltaTable, write_deltalake
from deltalake.exceptions import DeltaError, TableNotFoundError

from jobs import console
from model.registry.tables import read_rows
from pipelines.tables import FILES, OPS_RUNS, TABLES, table_uri

GOOD = ("succeeded", "unchanged")
# A row is a file, and every stage reads them all (2 ms a file): beyond so many they are made one.
_MOST_FILES = 32
_DIRTY = ".dirty"
# Delta's operations that leave every row as it is.
_UPKEEP = ("OPTIMIZE", "VACUUM START", "VACUUM END", "ADD CONSTRAINT", "SET TBLPROPERTIES")


def new_run_id() -> str:
    """Sortable by start: microseconds since the epoch in hex, and 64 random bits."""
    return f"{time.time_ns() // 1000:014x}-{secrets.token_hex(8)}"


@cache
def code_version() -> str:
    """The package's version, and in a checkout the git commit, with `.dirty` behind it where files differ from it."""
    version = importlib.metadata.version("lakemoe")
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists() or shutil.which("git") is None:
        return version

    def git(*arguments: str) -> str | None:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else None

    commit, changed = git("rev-parse", "HEAD"), git("status", "--porcelain", "--untracked-files=no")
    return f"{version}+{commit}{_DIRTY if changed else ''}" if commit else version


def table_version(lake: str, name: str) -> int | None:
    """A table's newest version without Spark; None where it is absent."""
    try:
        return DeltaTable(table_uri(lake, name)).version()
    except TableNotFoundError:
        return None


@dataclass
class Run:
    """A run that is under way; the job fills it in."""

    run_id: str
    started_at: datetime
    status: str = "succeeded"
    inputs: dict[str, int] = field(default_factory=dict)
    outputs: dict[str, int] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    mlflow_run_id: str | None = None


@contextmanager
def recorded(lake: str, job: str, configuration: dict[str, Any]) -> Iterator[Run]:
    """Record what happens in the body as one row: as the body left the run, or as failed where it raised."""
    run = Run(new_run_id(), datetime.now(UTC))
    try:
        yield run
    except BaseException:
        run.status = "failed"
        # What failed is history too; a full disk must not hide the first error behind a second one. But a wrong path
        # must not become a lake.
        try:
            if _is_lake(lake):
                _append(lake, job, configuration, run)
        except Exception as error:
            console.warn(f"ops.runs could not be written: {error}")
        raise
    _append(lake, job, configuration, run)


def spared(lake: str, job: str, configuration: dict[str, Any], last: Mapping[str, Any], totals: dict[str, int]) -> None:
    """Record a run that had nothing to do: it leaves its tables as the job's last run did.

    totals: what the tables hold, in the names of the job's counts.
    """
    with recorded(lake, job, configuration) as run:
        run.status, run.counts = "unchanged", totals
        run.inputs, run.outputs = versions(last["inputs"]), versions(last["outputs"])


def _is_lake(lake: str) -> bool:
    return any(table_version(lake, name) is not None for name in TABLES)


def _append(lake: str, job: str, configuration: dict[str, Any], run: Run) -> None:
    row = {
        "run_id": run.run_id,
        "job": job,
        "started_at": run.started_at,
        "ended_at": datetime.now(UTC),
        "status": run.status,
        "code_version": code_version(),
        "configuration": json.dumps(configuration, sort_keys=True, default=str),
        "inputs": [{"table": t, "version": v} for t, v in sorted(run.inputs.items())],
        "outputs": [{"table": t, "version": v} for t, v in sorted(run.outputs.items())],
        "counts": sorted(run.counts.items()),
        "mlflow_run_id": run.mlflow_run_id,
    }
    # Nullability is the table's rule; deltalake compares field for field, comments aside.
    schema = pa.schema([pa.field(f.name, f.type, f.nullable) for f in OPS_RUNS.schema])
    properties: dict[str, str | None] = {
        k: v for k, v in OPS_RUNS.table_properties.items() if not k.startswith("delta.min")
    }
    write_deltalake(
        OPS_RUNS.uri(lake),
        pa.Table.from_pylist([row], schema=schema),
        mode="append",
        name=OPS_RUNS.name,
        description=OPS_RUNS.comment,
        configuration=properties,
    )
    table = DeltaTable(OPS_RUNS.uri(lake))
    if len(table.file_uris()) > _MOST_FILES:
        # Where another run does the same at this moment, one is enough.
        with suppress(DeltaError):
            table.optimize.compact()


def runs(lake: str, job: str | None = None) -> list[dict[str, Any]]:
    """The recorded runs, oldest first; empty where there are none."""
    rows = read_rows(OPS_RUNS.uri(lake))
    return sorted((row for row in rows if job in (None, row["job"])), key=lambda row: row["run_id"])


def versions(uses: list[dict[str, Any]] | None) -> dict[str, int]:
    """A run's inputs or outputs: versions by table, or by the name of what is no table."""
    return {use["table"]: int(use["version"]) for use in uses or []}


def edition(run: Mapping[str, Any]) -> tuple[int | None, int | None]:
    """Which rows of its tables a run is about, where editions share them: by tokenizer and by sequence length."""
    return versions(run["inputs"]).get("tokenizer"), json.loads(run["configuration"]).get("sequence_length")


def last_good(lake: str, job: str) -> list[dict[str, Any]]:
    """The last run that did not fail of every edition that the job made, the newest first."""
    newest: dict[tuple[int | None, int | None], dict[str, Any]] = {}
    for run in reversed([run for run in runs(lake, job) if run["status"] in GOOD]):
        newest.setdefault(edition(run), run)
    return list(newest.values())


def last_state(
    lake: str, job: str, configuration: dict[str, Any], others: Mapping[str, int] | None = None
) -> dict[str, Any] | None:
    """The job's last good run, where what it left is still a state to go on from; None: the job looks at everything.

    So it is where its settings and code are today's, where its inputs that are neither tables nor sources are the same,
    and where nothing but recorded runs of other jobs and editions, and Delta's own upkeep, has written to its tables
    since. Code that was edited since its commit is never the same.

    others: the versions of inputs that are no tables, as ops.runs names them.
    """
    if code_version().endswith(_DIRTY):
        return None
    beside = dict(others or {})
    wanted = json.dumps(configuration, sort_keys=True, default=str)
    now = (beside.get("tokenizer"), configuration.get("sequence_length"))
    own, known = [], set()
    for run in runs(lake):
        if run["status"] in GOOD:
            if run["job"] == job and edition(run) == now:
                own.append(run)
            else:
                known.add(run["run_id"])
    last = own[-1] if own else None
    if last is None or (last["configuration"], last["code_version"]) != (wanted, code_version()) or not last["inputs"]:
        return None
    seen = {name: v for name, v in versions(last["inputs"]).items() if name not in TABLES}
    if seen.keys() != beside.keys():
        return None
    if any(seen[name] != v for name, v in beside.items() if not name.startswith(FILES)):
        return None
    if all(_continued(lake, name, version, known) for name, version in versions(last["outputs"]).items()):
        return last
    return None


def is_current(lake: str, run: Mapping[str, Any], others: Mapping[str, int]) -> bool:
    """Whether all that the run read is at the versions that it read: then it would write nothing.

    others: the versions of inputs that are no tables, as ops.runs names them.
    """
    read = versions(run["inputs"]).items()
    return all((table_version(lake, name) if name in TABLES else others.get(name)) == version for name, version in read)


def _continued(lake: str, name: str, version: int, run_ids: set[str]) -> bool:
    """Whether only these runs, and upkeep that changes no row, have written to the table after the version."""
    now = table_version(lake, name)
    if now is None or now < version:
        return False
    if now == version:
        return True
    commits = [c for c in DeltaTable(table_uri(lake, name)).history(now - version) if c["version"] > version]
    return len(commits) == now - version and all(
        commit["operation"] in _UPKEEP or commit.get("userMetadata") in run_ids for commit in commits
    )
