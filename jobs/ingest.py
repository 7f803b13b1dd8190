"""Read files and records into bronze.documents; what is no document goes to bronze.quarantine with its reason."""

from __future__ import annotations

import sys

from pydantic import Field

from jobs import stages
from jobs.main import main
from jobs.settings import JobSettings, UsageError
from pipelines.ingest.config import IngestConfig, SourceConfig


class Settings(JobSettings):
    """Read files and records into bronze.documents; what is no document goes to bronze.quarantine."""

    source: list[str] = Field(
        [],
        description="a directory, file, glob or data set (hf://datasets/OWNER/NAME) to ingest; "
        "can be given more than once",
    )
    mirror: bool = Field(
        False, description="delete documents and quarantine rows whose file or record is gone from its source"
    )
    ingest: IngestConfig = Field(default_factory=IngestConfig, description="settings of the stage")


def config_of(settings: Settings) -> IngestConfig:
    """The stage's settings with the ``--source`` flags added to the sources of the file, and ``--mirror``."""
    sources = [*settings.ingest.sources, *(SourceConfig(path=path) for path in settings.source)]
    if not sources:
        raise UsageError("There is nothing to ingest: name a directory or file with --source PATH.")
    mirror = settings.mirror or settings.ingest.mirror
    return settings.ingest.model_copy(update={"sources": tuple(sources), "mirror": mirror})


def run(settings: Settings) -> None:
    stages.run_stage("ingest", settings.lake, config_of(settings))
    stages.where(settings.lake, "ingest")


if __name__ == "__main__":
    sys.exit(main(["ingest", *sys.argv[1:]]))
