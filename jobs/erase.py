"""Erase documents from every table, and write down the proof; `maintain --vacuum` then removes the old files."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator

from deltalake import DeltaTable
from deltalake.exceptions import TableNotFoundError
from pydantic import BaseModel, Field, ValidationError

from jobs import console, runs, stages
from jobs.main import main
from jobs.settings import JobSettings, UsageError
from pipelines.erase.config import EraseConfig
from pipelines.tables import GOLD_TOKENS, table_uri
from pipelines.tokenize.train import default_tokenizer, tokenizer_input


class Settings(JobSettings):
    """Erase documents from every table of the lake, and keep them out when their files are ingested again."""

    document_id: list[str] = Field([], description="a document to erase; can be given more than once")
    source: list[str] = Field([], description="a source to erase whole, by its name; can be given more than once")
    where: str = Field("", description="a SQL condition on bronze.documents")
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
            run.counts = stage.request(spark, lake, config)
        console.done("erase", run.status, run.counts)
        for job, made_with in followed:
            stages.run_stage(job, lake, made_with)
        with console.working("prove"):
            run.outputs = stage.complete(spark, lake)
    console.note("No table holds the documents any more; ops.erasures says at which versions.")
    console.note(f"Their old files go with: lakemoe maintain --vacuum --retention-hours 0 --lake {lake}")


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
