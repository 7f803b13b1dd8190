"""Tokenize accepted, kept documents: silver.documents to gold.tokens."""

from __future__ import annotations

import sys

from pydantic import Field

from jobs import stages
from jobs.main import main
from jobs.settings import JobSettings
from pipelines.tokenize.config import TokenizeConfig


class Settings(JobSettings):
    """Tokenize accepted, kept documents: silver.documents to gold.tokens."""

    tokenize: TokenizeConfig = Field(default_factory=TokenizeConfig, description="settings of the stage")


def run(settings: Settings) -> None:
    stages.run_stage("tokenize", settings.lake, settings.tokenize)
    stages.where(settings.lake, "tokenize")


if __name__ == "__main__":
    sys.exit(main(["tokenize", *sys.argv[1:]]))
