"""Train the lake's byte-level BPE tokenizer on accepted, kept documents."""

from __future__ import annotations

import sys

from pydantic import Field

from jobs import stages
from jobs.main import main
from jobs.settings import JobSettings
from pipelines.tokenize.config import TrainTokenizerConfig


class Settings(JobSettings):
    """Train the lake's byte-level BPE tokenizer on accepted, kept documents."""

    train_tokenizer: TrainTokenizerConfig = Field(
        default_factory=TrainTokenizerConfig, description="settings of the stage"
    )


def run(settings: Settings) -> None:
    stages.run_stage("train-tokenizer", settings.lake, settings.train_tokenizer)
    stages.where(settings.lake, "train-tokenizer")


if __name__ == "__main__":
    sys.exit(main(["train-tokenizer", *sys.argv[1:]]))
