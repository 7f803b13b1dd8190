"""Running one stage of the pipeline: spare it where nothing changed, run it in the shared Spark session, record it.

Progress goes to a terminal as a spinner with the time, Spark's tasks and rows, elsewhere as plain lines.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from jobs import console, runs
from jobs.progress import watched
from pipelines.clean.config import CleanConfig
from pipelines.decontaminate.config import DecontaminateConfig
from pipelines.decontaminate.sets import read_sets, sets_input
from pipelines.dedup.config import DedupConfig
from pipelines.ingest.config import IngestConfig
from pipelines.ingest.listing import ingest_input, list_sources
from pipelines.pack.config import PackConfig
from pipelines.tables import OPS_ERASURES, TABLES
from pipelines.tokenize.config import TokenizeConfig, TrainTokenizerConfig

if TYPE_CHECKING:
    from pipelines.lake import StageResult


@dataclass(frozen=True)
class Stage:
    """A job of the pipeline: the module with its ``run``, its settings, and the command that comes after it."""

    module: str
    config: type[BaseModel]
    next: str


STAGES: dict[str, Stage] = {
    "ingest": Stage("pipelines.ingest.stage", IngestConfig, "lakemoe clean"),
    "clean": Stage("pipelines.clean.stage", CleanConfig, "lakemoe decontaminate"),
    "decontaminate": Stage("pipelines.decontaminate.stage", DecontaminateConfig, "lakemoe dedup"),
    "dedup": Stage("pipelines.dedup.stage", DedupConfig, "lakemoe train-tokenizer"),
    "train-tokenizer": Stage("pipelines.tokenize.train", TrainTokenizerConfig, "lakemoe tokenize"),
    "tokenize": Stage("pipelines.tokenize.stage", TokenizeConfig, "lakemoe pack"),
    "pack": Stage("pipelines.pack.stage", PackConfig, "lakemoe train"),
}
# The stages by which a document that leaves bronze leaves the other tables. Not decontaminate: an erasure must not hang
# on a folder of evaluation sets that may have moved.
FOLLOWERS = ("clean", "dedup", "tokenize", "pack")


def run_stage(job: str, lake: str, config: BaseModel) -> dict[str, int]:
    """Bring one stage's tables up to date: nothing where nothing changed, what changed since its last run, or all.

    Returns its counts.
    """
    beside, options = _read_beside_tables(lake, config)
    last = runs.last_state(lake, job, config.model_dump(mode="json"), beside)
    if last and runs.is_current(lake, last, beside):
        counts = dict(last["counts"])
        console.done(job, "unchanged", counts)
        return counts
    return record_stage(job, lake, config, since=runs.versions(last["inputs"]) if last else None, **options)


def record_stage(
    job: str, lake: str, config: BaseModel, *, since: Mapping[str, int] | None, function: str = "run", **options: Any
) -> dict[str, int]:
    """Run a function of the stage's module, whatever was done before, and record it in ops.runs; returns its counts.

    since: the versions of its inputs that the last run saw; None: it looks at everything. options: more arguments.
    """
    before = {name: runs.table_version(lake, name) for name in TABLES if not name.startswith("ops.")}
    with console.working(job) as show, runs.recorded(lake, job, config.model_dump(mode="json")) as run:
        stage: Callable[..., StageResult] = getattr(importlib.import_module(STAGES[job].module), function)
        from pipelines.lake import committing
        from pipelines.session import spark_session

        spark = spark_session()
        spark.sparkContext.setJobDescription(job)
        with committing(spark, run.run_id), watched(spark, show):
            result = stage(spark, lake, config, run_id=run.run_id, since=since, **options)
        run.inputs, run.outputs, run.counts = result.inputs, result.outputs, result.counts
        written = [before.get(name) != version for name, version in result.outputs.items()]
        if result.unchanged or (written and not any(written)):
            run.status = "unchanged"
    console.done(job, run.status, run.counts)
    for sentence in result.notes:
        console.note(f"  {sentence}")
    return run.counts


def _read_beside_tables(lake: str, config: BaseModel) -> tuple[dict[str, int], dict[str, Any]]:
    """What a run by these settings would read that is no table, as StageResult.inputs names it; what it may reuse."""
    if isinstance(config, IngestConfig):
        listed = list_sources(config, lake)
        return ingest_input(listed, runs.table_version(lake, OPS_ERASURES.name)), {"listed": listed}
    if isinstance(config, DecontaminateConfig):
        return sets_input(read_sets(config)), {}
    if isinstance(config, TokenizeConfig | PackConfig):
        from pipelines.tokenize.train import chosen_tokenizer, tokenizer_input

        return tokenizer_input(chosen_tokenizer(lake, config.tokenizer)), {}
    return {}, {}


def where(lake: str, job: str) -> None:
    """Say where the result lies and what comes next."""
    console.note(f"The lake is {lake}; next: {STAGES[job].next} --lake {lake}")
