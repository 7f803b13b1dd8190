"""Erase documents from every table, and write down the proof; `maintain --vacuum` then removes the old files."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from deltalake import DeltaTable
from deltalake.exceptions import TableNotFoundError
from pydantic import BaseModel, Field, ValidationError

from jobs import console, runs, stages
from jobs.main import main
from jobs.report import NAME as report_name
from jobs.settings import JobSettings, UsageError
from pipelines.erase.config import EraseConfig
from pipelines.tables import GOLD_TOKENS, table_uri
from pipelines.tokenize.train import default_tokenizer, tokenizer_input

if TYPE_CHECKING:
    from pipelines.erase.stage import Others, Requested


class Settings(JobSettings):
    """Erase documents from every table of the lake, and keep them out when their files are ingested again."""

    document_id: list[str] = Field([], description="a document to erase; can be given more than once")
    source: list[str] = Field([], description="a source to erase whole, by its name; can be given more than once")
    where: str = Field("", description="a SQL condition on bronze.documents")
    with_duplicates: bool = Field(
        False, description="erase also the documents that have the very same text, by the same reason and proof"
    )
    reason: str = Field("", description="why, as ops.erasures will say")
    restore: bool = Field(False, description="take the erasure of --document-id back: it may be ingested again")


def run(settings: Settings) -> None:
    lake = settings.lake
    try:
        config = EraseConfig.model_validate(settings.model_dump(include=set(EraseConfig.model_fields)))
    except ValidationError as error:
        raise UsageError(f"erase: {error.errors()[0]['msg'].removeprefix('Value error, ')}.") from None
    with runs.recorded(lake, "erase", config.model_dump(mode="json")) as run:
        from pipelines.erase import stage
        from pipelines.lake import committing
        from pipelines.session import spark_session

        spark = spark_session()
        if config.restore:
            run.counts = {"restored": stage.restore(spark, lake, config)}
            console.done("erase", run.status, run.counts)
            console.note(f"Next: lakemoe ingest --lake {lake}, with the sources that hold them")
            return
        followed = list(_made(lake))
        with console.working("erase"), committing(spark, run.run_id):
            requested = stage.request(spark, lake, config)
        run.counts = requested.counts
        console.done("erase", run.status, run.counts)
        for job, made_with in followed:
            stages.run_stage(job, lake, made_with)
        with console.working("prove"):
            run.outputs = stage.complete(spark, lake)
    console.note("No table holds documents of these ids any more; ops.erasures says at which versions.")
    for sentence in _left(lake, requested):
        console.note(sentence)
    console.note(f"Their old files go with: lakemoe maintain --vacuum --retention-hours 0 --lake {lake}")


def _left(lake: str, requested: Requested) -> Iterator[str]:
    """Sentences about where the text of the erased documents may still be."""
    same, near = requested.same_text, requested.same_cluster
    if same.number or near.number:
        twins = f"Other documents with the very same text: {same.number:,}{_ids(same)}"
        if same.number:
            twins += f" (lakemoe erase --with-duplicates --document-id {same.ids[0]} --lake {lake} erases them)"
        yield f"{twins}; more of the same clusters of near-duplicates: {near.number:,}{_ids(near)}."
    trained = [run["started_at"] for run in runs.runs(lake, "train-tokenizer") if run["status"] == "succeeded"]
    since = requested.ingested_us
    if since is not None and any(started.timestamp() * 1e6 > since for started in trained):
        yield (
            "The lake's tokenizer was trained on a sample of its documents, these perhaps among them, and is kept: "
            f"lakemoe train-tokenizer --train-tokenizer.retrain --lake {lake} makes another."
        )
    if "://" not in lake and (report := Path(lake) / report_name).exists():
        yield f"{report} was made before and may show them: make it again with lakemoe report, and remove its copies."


def _ids(others: Others) -> str:
    if not others.number:
        return ""
    return f", {', '.join(others.ids)}{' ...' if others.number > len(others.ids) else ''}"


def _made(lake: str) -> Iterator[tuple[str, BaseModel]]:
    """The stages that made the lake's tables after ingest, in order, each with the settings that it ran with last."""
    # ops.runs names tokenizers by a part of their ids.
    ids = {tokenizer_input(name)["tokenizer"]: name for name in _tokenizer_ids(lake)}
    own = default_tokenizer(lake)
    for job in stages.FOLLOWERS:
        for made in runs.last_good(lake, job):
            values = json.loads(made["configuration"])
            tokenizer, _ = runs.edition(made)
            if tokenizer is not None and values["tokenizer"] is None and ids.get(tokenizer) != own:
                if tokenizer not in ids:
                    continue  # an edition that holds nothing
                values["tokenizer"] = ids[tokenizer]
            yield job, stages.STAGES[job].config.model_validate(values)


def _tokenizer_ids(lake: str) -> list[str]:
    """The tokenizers of the editions of gold.tokens."""
    try:
        return [p["tokenizer_id"] for p in DeltaTable(table_uri(lake, GOLD_TOKENS.name)).partitions()]
    except TableNotFoundError:
        return []


if __name__ == "__main__":
    sys.exit(main(["erase", *sys.argv[1:]]))
