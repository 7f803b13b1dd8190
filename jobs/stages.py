"""Running one stage of the pipeline: spare it where nothing changed, run it in the shared Spark session, record it.

Progress goes to a terminal as a spinner with the time, Spark's tasks and rows, elsewhere as plain lines.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterable, Mapping
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
from pipelines.tables import OPS_ERASURES, SPLITS, TABLES
from pipelines.tokenize.config import TokenizeConfig, TrainTokenizerConfig

if TYPE_CHECKING:
    from pipelines.lake import StageResult


@dataclass(frozen=True)
class Stage:
    """A job of the pipeline: the module with its ``run``, its settings, and the command that comes after it.

    totals: which of its counts say what the lake holds after it, breakdowns (``total.part``) along with their totals;
    the others say what a run did.
    """

    module: str
    config: type[BaseModel]
    next: str
    totals: tuple[str, ...]


STAGES: dict[str, Stage] = {
    "ingest": Stage("pipelines.ingest.stage", IngestConfig, "lakemoe clean", ("table_documents", "table_quarantine")),
    "clean": Stage(
        "pipelines.clean.stage",
        CleanConfig,
        "lakemoe decontaminate",
        ("documents", "accepted", "rejected", "rejected_by", "redactions"),
    ),
    "decontaminate": Stage(
        "pipelines.decontaminate.stage",
        DecontaminateConfig,
        "lakemoe dedup",
        ("sets", "ngrams", "items", "items_too_short", "items_found", "contaminated"),
    ),
    "dedup": Stage(
        "pipelines.dedup.stage",
        DedupConfig,
        "lakemoe train-tokenizer",
        ("documents", "distinct_texts", "clusters", "members", "members_exact", "members_near", "duplicates"),
    ),
    "train-tokenizer": Stage("pipelines.tokenize.train", TrainTokenizerConfig, "lakemoe tokenize", ("vocabulary",)),
    "tokenize": Stage(
        "pipelines.tokenize.stage",
        TokenizeConfig,
        "lakemoe pack",
        ("documents", "tokens", *(f"{what}_{split}" for what in ("documents", "tokens") for split in SPLITS)),
    ),
    "pack": Stage(
        "pipelines.pack.stage",
        PackConfig,
        "lakemoe train",
        ("sequences", "padding", "tokens", *(f"sequences_{split}" for split in SPLITS)),
    ),
}
# The stages by which a document that leaves bronze leaves the other tables. Not decontaminate: an erasure must not hang
# on a folder of evaluation sets that may have moved.
FOLLOWERS = ("clean", "dedup", "tokenize", "pack")

_NAMES = 4  # of rules, in a line about them


def run_stage(job: str, lake: str, config: BaseModel) -> dict[str, int]:
    """Bring one stage's tables up to date: nothing where nothing changed, what changed since its last run, or all.

    Returns its counts; of a run that had nothing to do those that say what the lake holds.
    """
    beside, options = _read_beside_tables(lake, config)
    last = runs.last_state(lake, job, config.model_dump(mode="json"), beside)
    if last and runs.is_current(lake, last, beside):
        return spare_stage(job, lake, config, last)
    return record_stage(job, lake, config, since=runs.versions(last["inputs"]) if last else None, **options)


def spare_stage(job: str, lake: str, config: BaseModel, last: Mapping[str, Any]) -> dict[str, int]:
    """Record that the stage had nothing to do after its last run; returns what the lake holds, by that run's counts."""
    held = totals(job, dict(last["counts"]))
    runs.spared(lake, job, config.model_dump(mode="json"), last, held)
    _say(job, "unchanged", held)
    return held


def totals(job: str, counts: Mapping[str, int]) -> dict[str, int]:
    """Of a stage's counts those that say what the lake holds, in the stage's order."""
    order = {total: at for at, total in enumerate(STAGES[job].totals)}
    found = [(order[total], name) for name in counts if (total := name.partition(".")[0]) in order]
    return {name: counts[name] for _, name in sorted(found, key=lambda item: item[0])}


def rules_changed(lake: str, config: CleanConfig) -> str:
    """How the rules differ from the last clean's, in a few words; empty where they are the same or there was none."""
    last = runs.last_good(lake, "clean")
    if not last:
        return ""
    before, now = (
        {rule["name"]: rule for rule in rules}
        for rules in (json.loads(last[0]["configuration"]).get("rules", []), config.model_dump(mode="json")["rules"])
    )
    parts = {
        "new": [name for name in now if name not in before],
        "gone": [name for name in before if name not in now],
        "changed": [name for name in now if name in before and before[name] != now[name]],
    }
    said = [
        f"{what}: {', '.join(names[:_NAMES])}{' ...' if len(names) > _NAMES else ''}"
        for what, names in parts.items()
        if names
    ]
    return f"rules {len(now)}, were {len(before)} ({'; '.join(said)})" if said else ""


def _say(job: str, status: str, counts: Mapping[str, int]) -> None:
    if job == "decontaminate" and not counts["sets"]:
        console.note(f"{job}: off (no evaluation sets are named; --decontaminate.sets FOLDER names some)")
    elif status == "unchanged":
        console.unchanged(job, totals(job, counts))
    else:
        console.done(job, status, counts)


def record_stage(
    job: str, lake: str, config: BaseModel, *, since: Mapping[str, int] | None, function: str = "run", **options: Any
) -> dict[str, int]:
    """Run a function of the stage's module, whatever was done before, and record it in ops.runs; returns its counts.

    since: the versions of its inputs that the last run saw; None: it looks at everything. options: more arguments.
    """
    if isinstance(config, CleanConfig) and (sentence := rules_changed(lake, config)):
        console.note(f"{job}: {sentence}")
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
        if result.failure:
            _remark(result.notes)
            raise result.failure
    _say(job, run.status, run.counts)
    _remark(result.notes)
    return run.counts


def _remark(sentences: Iterable[str]) -> None:
    for sentence in sentences:
        console.note(f"  {sentence}")


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
