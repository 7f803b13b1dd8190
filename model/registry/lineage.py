"""The way from a model's version back to its data, and whether that data is still there.

The version's tags name gold.sequences at its version; ops.runs says which run wrote that version, from which tables at
which versions, and so on back to bronze.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from model.errors import ModelError
from model.registry.load import find
from model.registry.register import PREFIX
from model.registry.tables import missing, read_rows
from pipelines.tables import GOLD_SEQUENCES, OPS_RUNS, TABLES, table_uri

MAINTAIN = "maintain"  # the job that compacts and vacuums


@dataclass(frozen=True, kw_only=True)
class TableUse:
    """A table at the version that was read. missing: None while that can be read, else the reason.

    job and run_id are those of the run that made its rows (maintenance makes versions, too, and changes none), None
    where ops.runs does not say.
    """

    table: str
    version: int
    job: str | None
    run_id: str | None
    missing: str | None


@dataclass(frozen=True, kw_only=True)
class Lineage:
    """Where a model's version came from. tables begin with gold.sequences and go back to bronze."""

    model: str
    version: str
    training_run_id: str | None
    code_version: str | None
    tokenizer_id: str | None
    tags: dict[str, str]
    tables: tuple[TableUse, ...]

    @property
    def reproducible(self) -> bool:
        """Whether every table version is still there."""
        return all(use.missing is None for use in self.tables)


def lineage(uri: str, *, lake: str) -> Lineage:
    """The lineage of models:/NAME@ALIAS or models:/NAME/VERSION. Errors: ModelError where there is no such version."""
    version = find(uri, lake=lake)
    tags = {key.removeprefix(PREFIX): value for key, value in version.tags.items() if key.startswith(PREFIX)}
    try:
        sequences = int(tags[f"{GOLD_SEQUENCES.name}.version"])
    except (KeyError, ValueError):
        raise ModelError(f"{uri} has no lineage tags; it was not registered by lakemoe.") from None
    runs = read_rows(OPS_RUNS.uri(lake))
    uses: dict[str, TableUse] = {}
    to_visit = [(GOLD_SEQUENCES.name, sequences)]
    while to_visit:
        table, number = to_visit.pop(0)
        if table in uses and uses[table].version >= number:
            continue
        writer = written_by(runs, table, number)
        maker = _maker(runs, writer, table)
        # The tag holds the id of the one table that the training opened itself.
        table_id = tags.get(f"{table}.table_id")
        uses[table] = TableUse(
            table=table,
            version=number,
            job=None if maker is None else str(maker["job"]),
            run_id=None if maker is None else str(maker["run_id"]),
            missing=missing(table_uri(lake, table), number, table_id),
        )
        # Beside tables a run names the files that it read, of which only the last state is there.
        to_visit += [read for read in _inputs(runs, writer, table) if read[0] != table]
    return Lineage(
        model=str(version.name),
        version=str(version.version),
        training_run_id=tags.get("training_run_id"),
        code_version=tags.get("code_version"),
        tokenizer_id=tags.get("tokenizer_id"),
        tags=tags,
        tables=tuple(uses.values()),
    )


def _inputs(runs: list[dict[str, Any]], writer: dict[str, Any] | None, table: str) -> list[tuple[str, int]]:
    """What went into the table by the run and, where that changed the table in place, by the runs before it."""
    found: list[tuple[str, int]] = []
    while writer is not None:
        found += _read(writer) if writer["job"] != MAINTAIN else []  # which opens every table
        writer = _before(runs, writer, table)
    return found


def _read(run: dict[str, Any]) -> list[tuple[str, int]]:
    return [(i["table"], int(i["version"])) for i in run.get("inputs") or () if i["table"] in TABLES]


def _before(runs: list[dict[str, Any]], run: dict[str, Any], table: str) -> dict[str, Any] | None:
    """The run that wrote the version which this one changed in place; where none says so, as the job that wrote it was
    killed before its row, the last one before that."""
    before = next((version for name, version in _read(run) if name == table), None)
    if before is None:
        return None
    wrote = [
        (int(o["version"]), earlier)
        for earlier in runs
        for o in earlier.get("outputs") or ()
        if o["table"] == table and int(o["version"]) <= before and earlier["run_id"] < run["run_id"]
    ]
    last = max((version for version, _ in wrote), default=None)
    return None if last is None else written_by(runs, table, last)


def _maker(runs: list[dict[str, Any]], writer: dict[str, Any] | None, table: str) -> dict[str, Any] | None:
    while writer is not None and writer["job"] == MAINTAIN:
        writer = _before(runs, writer, table)
    return writer


def written_by(runs: list[dict[str, Any]], table: str, version: int) -> dict[str, Any] | None:
    """The first run that ended with the table at this version: later ones found it so and changed nothing."""
    wrote = [
        run
        for run in runs
        if any(o["table"] == table and int(o["version"]) == version for o in run.get("outputs") or ())
    ]
    return min(wrote, key=lambda run: str(run["run_id"]), default=None)
