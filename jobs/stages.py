"""Running one stage of the pipeline: spare it where nothing changed, run it in the shared Spark session, record it.

Progress goes to a terminal as a spinner with the time, elsewhere as plain lines.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING

from pydantic import BaseModel

from jobs import console, runs
from pipelines.ingest.config import IngestConfig
from pipelines.ingest.listing import fingerprints, list_sources
from pipelines.pack.config import PackConfig
from pipelines.tables import TABLES
from pipelines.tokenize.config import TokenizeConfig

if TYPE_CHECKING:
    from pipelines.lake import StageResult

# job: (module with `run`, next command)
STAGES: dict[str, tuple[str, str]] = {
    "ingest": ("pipelines.ingest.stage", "lakemoe clean"),
    "clean": ("pipelines.clean.stage", "lakemoe dedup"),
    "dedup": ("pipelines.dedup.stage", "lakemoe train-tokenizer"),
    "train-tokenizer": ("pipelines.tokenize.train", "lakemoe tokenize"),
    "tokenize": ("pipelines.tokenize.stage", "lakemoe pack"),
    "pack": ("pipelines.pack.stage", "lakemoe train"),
}


def run_stage(job: str, lake: str, config: BaseModel) -> dict[str, int]:
    """Run one stage and record it in ops.runs; returns its counts."""
    configuration = config.model_dump(mode="json")
    if done := runs.up_to_date(lake, job, configuration, _read_beside_tables(lake, config)):
        counts = dict(done["counts"])
        console.done(job, "unchanged", counts)
        return counts
    before = {name: runs.table_version(lake, name) for name in TABLES if not name.startswith("ops.")}
    with console.working(job), runs.recorded(lake, job, configuration) as run:
        stage: Callable[..., StageResult] = importlib.import_module(STAGES[job][0]).run
        from pipelines.session import spark_session

        spark = spark_session()
        spark.sparkContext.setJobDescription(job)
        result = stage(spark, lake, config, run_id=run.run_id)
        run.inputs, run.outputs, run.counts = result.inputs, result.outputs, result.counts
        written = [before.get(name) != version for name, version in result.outputs.items()]
        if result.unchanged or (written and not any(written)):
            run.status = "unchanged"
    console.done(job, run.status, run.counts)
    return run.counts


def _read_beside_tables(lake: str, config: BaseModel) -> dict[str, int]:
    """What a run by these settings would read that is no table, as StageResult.inputs names it."""
    if isinstance(config, IngestConfig):
        return fingerprints(list_sources(config, lake))
    if isinstance(config, TokenizeConfig | PackConfig):
        from pipelines.tokenize.train import chosen_tokenizer, tokenizer_input

        return tokenizer_input(chosen_tokenizer(lake, config.tokenizer))
    return {}


def where(lake: str, job: str) -> None:
    """Say where the result lies and what comes next."""
    console.note(f"The lake is {lake}; next: {STAGES[job][1]} --lake {lake}")
