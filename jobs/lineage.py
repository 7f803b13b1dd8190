"""Print the way from a model's version back to table versions, jobs and code, and whether those still exist."""

from __future__ import annotations

import sys

from pydantic import Field
from rich.table import Table

from jobs import console
from jobs.main import main
from jobs.settings import JobSettings
from model.registry.lineage import lineage


class Settings(JobSettings):
    """Print the way from a model's version back to table versions, jobs and code, and whether those still exist."""

    model: str = Field("models:/quickstart@champion", description="models:/NAME@ALIAS or models:/NAME/VERSION")


def run(settings: Settings) -> None:
    found = lineage(settings.model, lake=settings.lake)
    console.note(f"{found.model} version {found.version}")
    console.note(f"  training run  {found.training_run_id or 'unknown'}")
    console.note(f"  code          {found.code_version or 'unknown'}")
    console.note(f"  tokenizer     {found.tokenizer_id or 'unknown'}")
    out = Table(show_edge=False)
    for column in ("table", "version", "written by", "run", "still there"):
        out.add_column(column)
    for use in found.tables:
        out.add_row(use.table, str(use.version), use.job or "?", use.run_id or "?", use.missing or "yes")
    console.out.print(out)


if __name__ == "__main__":
    sys.exit(main(["lineage", *sys.argv[1:]]))
