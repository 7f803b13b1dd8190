"""Normalise, redact and judge every document: bronze.documents to silver.documents."""

from __future__ import annotations

import sys

from pydantic import Field

from jobs import stages
from jobs.main import main
from jobs.settings import JobSettings
from pipelines.clean.config import CleanConfig


class Settings(JobSettings):
    """Normalise, redact and judge every document: bronze.documents to silver.documents."""

    clean: CleanConfig = Field(default_factory=CleanConfig, description="settings of the stage")


def run(settings: Settings) -> None:
    stages.run_stage("clean", settings.lake, settings.clean)
    stages.where(settings.lake, "clean")


if __name__ == "__main__":
    sys.exit(main(["clean", *sys.argv[1:]]))
