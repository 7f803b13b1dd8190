"""Where the report's figures come from: the tables at pinned versions, the jobs' last runs, the rules that judged."""

from __future__ import annotations

import json
from typing import Any

from delta.tables import DeltaTable
from pydantic import ValidationError
from pyspark.sql import Column, DataFrame, Row, SparkSession, Window
from pyspark.sql import functions as F

from pipelines import lake as tables_of
from pipelines.clean.config import CleanConfig, Rule
from pipelines.report import facts
from pipelines.tables import OPS_RUNS, TABLES, Table

MOST_ROWS = 200
JUDGED = ("succeeded", "unchanged")


class Lake:
    """The tables that are there, each pinned to its version of now."""

    def __init__(self, spark: SparkSession, uri: str) -> None:
        self.spark, self.uri = spark, uri
        self.versions: dict[str, tuple[int, Any]] = {}
        for table in TABLES.values():
            if tables_of.exists(spark, uri, table):
                last = DeltaTable.forPath(spark, table.uri(uri)).history(1).select("version", "timestamp").head()
                assert last is not None
                self.versions[table.name] = (int(last[0]), last[1])

    def read(self, table: Table) -> DataFrame | None:
        """The table's rows; None where it is absent."""
        if table.name not in self.versions:
            return None
        return tables_of.read(self.spark, self.uri, table, self.versions[table.name][0])


def rules_that_judged(lake: Lake) -> tuple[tuple[Rule, ...], bool]:
    """The rule table of the last run of clean, and whether there is one; else the default table."""
    runs = lake.read(OPS_RUNS)
    if runs is not None:
        cleaned = runs.where((F.col("job") == "clean") & F.col("status").isin(*JUDGED))
        last = cleaned.orderBy(*_ended_last()).select("configuration").head()
        try:
            if last is not None:
                return CleanConfig.model_validate(json.loads(last[0])).rules, True
        except (ValidationError, ValueError, TypeError):
            pass  # Written by a version of lakemoe with other settings.
    return CleanConfig.model_validate({}).rules, False


def _ended_last() -> tuple[Column, Column]:
    """The order of runs, newest first: of two at the same time the one that ended last says how it stands."""
    return F.desc(F.coalesce("ended_at", "started_at")), F.desc("run_id")


def table_states(lake: Lake) -> tuple[facts.TableState, ...]:
    states = []
    for name, (version, written_at) in lake.versions.items():
        frame = lake.read(TABLES[name])
        assert frame is not None
        states.append(facts.TableState(table=name, version=version, written_at=written_at, rows=frame.count()))
    return tuple(states)


def last_runs(lake: Lake) -> tuple[facts.Run, ...]:
    """The run of each job that ended last, in the order in which they were started."""
    runs = lake.read(OPS_RUNS)
    if runs is None:
        return ()
    newest = F.row_number().over(Window.partitionBy("job").orderBy(*_ended_last()))
    last = runs.withColumn("newest", newest).where("newest = 1").orderBy("run_id")
    columns = ("job", "run_id", "started_at", "ended_at", "status", "code_version", "inputs", "outputs")
    out = []
    for row in last.select(*columns).head(MOST_ROWS):
        values = row.asDict()
        inputs, outputs = values.pop("inputs") or [], values.pop("outputs") or []
        behind = [
            read.table
            for read in inputs
            if read.table in TABLES and read.version < lake.versions.get(read.table, (0,))[0]
        ]
        out.append(facts.Run(**values, inputs=_pins(inputs), outputs=_pins(outputs), behind=tuple(behind)))
    return tuple(out)


def _pins(versions: list[Row]) -> tuple[str, ...]:
    return tuple(f"{pin.table}@{pin.version}" for pin in versions)
