"""Documents to training sequences: every stage in order, in one Spark session."""

from __future__ import annotations

import sys

from pydantic import BaseModel, Field

from jobs import ingest, stages
from jobs.main import main
from pipelines.clean.config import CleanConfig
from pipelines.decontaminate.config import DecontaminateConfig
from pipelines.dedup.config import DedupConfig
from pipelines.pack.config import PackConfig
from pipelines.tokenize.config import TokenizeConfig, TrainTokenizerConfig


class Settings(ingest.Settings):
    """Run ingest, clean, decontaminate, dedup, train-tokenizer, tokenize and pack in one Spark session."""

    clean: CleanConfig = Field(default_factory=CleanConfig, description="settings of clean")
    decontaminate: DecontaminateConfig = Field(
        default_factory=DecontaminateConfig, description="settings of decontaminate"
    )
    dedup: DedupConfig = Field(default_factory=DedupConfig, description="settings of dedup")
    train_tokenizer: TrainTokenizerConfig = Field(
        default_factory=TrainTokenizerConfig, description="settings of train-tokenizer"
    )
    tokenize: TokenizeConfig = Field(default_factory=TokenizeConfig, description="settings of tokenize")
    pack: PackConfig = Field(default_factory=PackConfig, description="settings of pack")


def run_stages(settings: Settings) -> dict[str, dict[str, int]]:
    """The counts of every stage, by job."""
    configs: dict[str, BaseModel] = {
        "ingest": ingest.config_of(settings),
        "clean": settings.clean,
        "decontaminate": settings.decontaminate,
        "dedup": settings.dedup,
        "train-tokenizer": settings.train_tokenizer,
        "tokenize": settings.tokenize,
        "pack": settings.pack,
    }
    return {job: stages.run_stage(job, settings.lake, config) for job, config in configs.items()}


def run(settings: Settings) -> None:
    run_stages(settings)
    stages.where(settings.lake, "pack")


if __name__ == "__main__":
    sys.exit(main(["pipeline", *sys.argv[1:]]))
