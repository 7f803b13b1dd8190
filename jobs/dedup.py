"""Find exact and near-duplicate clusters: silver.documents to silver.duplicates."""

from __future__ import annotations

import sys

from pydantic import Field

from jobs import stages
from jobs.main import main
from jobs.settings import JobSettings
from pipelines.dedup.config import DedupConfig


class Settings(JobSettings):
    """Find exact and near-duplicate clusters: silver.documents to silver.duplicates."""

    dedup: DedupConfig = Field(default_factory=DedupConfig, description="settings of the stage")


def run(settings: Settings) -> None:
    stages.run_stage("dedup", settings.lake, settings.dedup)
    stages.where(settings.lake, "dedup")


if __name__ == "__main__":
    sys.exit(main(["dedup", *sys.argv[1:]]))
