"""Write one HTML page about the lake: documents to tokens, rejections, languages, signals, sources, lineage."""

from __future__ import annotations

import os
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path

from pydantic import Field

from jobs import console
from jobs.main import main
from jobs.settings import JobSettings, UsageError

NAME = "report.html"


class Settings(JobSettings):
    """Write one HTML page about the lake; it reads the tables and changes none."""

    output: Path | None = Field(None, description="the file to write; LAKE/report.html when not given")


def output_of(settings: Settings) -> Path:
    """Where the page goes. Raises UsageError for a lake in an object store without a file of one's own."""
    if settings.output is not None:
        return settings.output
    if "://" in settings.lake:
        raise UsageError(f"{settings.lake} is no local folder: name the file to write with --output FILE.")
    return Path(settings.lake) / NAME


def write(path: Path, text: str) -> None:
    """Write the file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, draft = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".draft")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes files that nobody else can read, and a report is for others too.
        os.chmod(draft, 0o644)
        os.replace(draft, path)
    except BaseException:
        Path(draft).unlink(missing_ok=True)
        raise


def run(settings: Settings) -> None:
    output = output_of(settings)
    with console.working("report"):
        from pipelines.report.figures import figures
        from pipelines.report.page import render
        from pipelines.session import spark_session

        spark = spark_session()
        spark.sparkContext.setJobDescription("report")
        page = render(figures(spark, settings.lake), made_at=datetime.now(UTC))
    write(output, page)
    console.note(f"The report is {output.resolve()}; open it in a browser.")


if __name__ == "__main__":
    sys.exit(main(["report", *sys.argv[1:]]))
