"""Find documents that hold items of evaluation sets: verdicts ``contaminated:SET`` in silver.documents."""

from __future__ import annotations

import sys

from pydantic import Field

from jobs import stages
from jobs.main import main
from jobs.settings import JobSettings
from pipelines.decontaminate.config import DecontaminateConfig


class Settings(JobSettings):
    """Find documents that hold items of evaluation sets and reject them in silver.documents."""

    decontaminate: DecontaminateConfig = Field(default_factory=DecontaminateConfig, description="settings of the stage")


def run(settings: Settings) -> None:
    stages.run_stage("decontaminate", settings.lake, settings.decontaminate)
    stages.where(settings.lake, "decontaminate")


if __name__ == "__main__":
    sys.exit(main(["decontaminate", *sys.argv[1:]]))
