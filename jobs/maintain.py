"""Compact the tables' files, and remove old files where no registered model and no unfinished training needs them."""

from __future__ import annotations

import sys

from deltalake import DeltaTable
from deltalake.exceptions import DeltaError
from pydantic import Field

from jobs import console, runs
from jobs.main import main
from jobs.settings import JobSettings
from model.registry.pins import pins
from pipelines.errors import LakeError
from pipelines.tables import TABLES, table_uri


class Settings(JobSettings):
    """Compact the tables' files; with --vacuum also remove those of old versions, which then cannot be read."""

    optimize: bool = Field(True, description="make small files into large ones")
    vacuum: bool = Field(False, description="remove the files of versions older than the retention")
    retention_hours: int = Field(168, ge=0, description="age from which a version's files may go (hours)")
    force: bool = Field(False, description="remove files also of versions that a model or a training needs")


def run(settings: Settings) -> None:
    lake = settings.lake
    names = [name for name in TABLES if runs.table_version(lake, name) is not None]
    if not names:
        raise LakeError(f"There is no table in {lake}: name another --lake.", 2)
    configuration = settings.model_dump(mode="json", include={"optimize", "vacuum", "retention_hours", "force"})
    with runs.recorded(lake, "maintain", configuration) as run:
        from pipelines.lake import committing
        from pipelines.maintain import stage
        from pipelines.session import spark_session

        spark = spark_session()
        run.inputs = {name: runs.table_version(lake, name) or 0 for name in names}
        with committing(spark, run.run_id):
            for name in names if settings.optimize else ():
                with console.working(f"compact {name}"):
                    removed, added = stage.optimize(spark, lake, TABLES[name])
                run.counts |= {f"compacted.{name}": removed, f"compacted_to.{name}": added}
            # Looked at after compaction, which makes old files of those that the newest version had.
            doomed = {name: _doomed(lake, name, settings.retention_hours) for name in names if settings.vacuum}
            if not settings.force:
                _refuse(lake, doomed)
            for name, files in doomed.items():
                with console.working(f"vacuum {name}"):
                    stage.vacuum(spark, lake, TABLES[name], settings.retention_hours)
                run.counts[f"removed.{name}"] = len(files)
                console.note(f"  {name}: {len(files)} old files removed")
        run.outputs = {name: runs.table_version(lake, name) or 0 for name in names}
        run.counts["tables"] = len(names)
    console.done("maintain", run.status, run.counts)


def _refuse(lake: str, doomed: dict[str, set[str]]) -> None:
    """Raises LakeError (exit code 2) that names the first who would lose its data. doomed: files by table."""
    for pin in pins(lake) if doomed else ():
        try:
            needed = DeltaTable(table_uri(lake, pin.table), version=pin.version).file_uris()
        except DeltaError:
            continue  # gone already
        if not doomed[pin.table].isdisjoint(needed):
            raise LakeError(
                f"{pin.holder} needs {pin.table} at version {pin.version}, whose files this would remove: keep more "
                "hours by --retention-hours, or say --force to lose them.",
                2,
            )


def _doomed(lake: str, name: str, retention_hours: int) -> set[str]:
    """The files that a vacuum would remove."""
    uri = table_uri(lake, name)
    files = DeltaTable(uri).vacuum(retention_hours, dry_run=True, enforce_retention_duration=False, full=True)
    return {f"{uri}/{file}" for file in files}


if __name__ == "__main__":
    sys.exit(main(["maintain", *sys.argv[1:]]))
