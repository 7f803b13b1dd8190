"""Pack documents' tokens into training sequences: gold.tokens to gold.sequences."""

from __future__ import annotations

import sys

from pydantic import Field

from jobs import stages
from jobs.main import main
from jobs.settings import JobSettings
from pipelines.pack.config import PackConfig


class Settings(JobSettings):
    """Pack documents' tokens into training sequences: gold.tokens to gold.sequences."""

    pack: PackConfig = Field(default_factory=PackConfig, description="settings of the stage")
    repack: bool = Field(False, description="arrange the edition anew, as one run over everything does")


def run(settings: Settings) -> None:
    if settings.repack:
        stages.record_stage("pack", settings.lake, settings.pack, since=None, repack=True)
    else:
        stages.run_stage("pack", settings.lake, settings.pack)
    stages.where(settings.lake, "pack")


if __name__ == "__main__":
    sys.exit(main(["pack", *sys.argv[1:]]))
