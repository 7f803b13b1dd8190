"""Compact the tables' files, and remove old files where no registered model and no unfinished training needs them."""

from __future__ import annotations

import sys

from deltalake import DeltaTable
from deltalake.exceptions import DeltaError
from pydantic import Field

from jobs import console, runs
from jobs.main import main
from jobs.settings import JobSettings
from model.registry.pins import Pin, pins
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

        if settings.vacuum and not settings.force:
            _refuse(lake, list(pins(lake)), settings.retention_hours)
        spark = spark_session()
        with committing(spark, run.run_id):
            for name in names:
                before = runs.table_version(lake, name) or 0
                with console.working(f"maintain {name}"):
                    if settings.optimize:
                        removed, added = stage.optimize(spark, lake, TABLES[name])
                        run.counts |= {f"compacted.{name}": removed, f"compacted_to.{name}": added}
                    if settings.vacuum:
                        files = len(_doomed(lake, name, settings.retention_hours))
                        stage.vacuum(spark, lake, TABLES[name], settings.retention_hours)
                        run.counts[f"removed.{name}"] = files
                        console.note(f"  {name}: {files} old files removed")
                run.inputs[name], run.outputs[name] = before, runs.table_version(lake, name) or 0
        run.counts["tables"] = len(names)
    console.done("maintain", run.status, run.counts)


def _refuse(lake: str, pinned: list[Pin], retention_hours: int) -> None:
    """Raises LakeError (exit code 2) that names the first who would lose its data."""
    for pin in pinned:
        try:
            needed = set(DeltaTable(table_uri(lake, pin.table), version=pin.version).file_uris())
        except DeltaError:
            continue  # gone already
        root = table_uri(lake, pin.table)
        doomed = {f"{root}/{file}" for file in _doomed(lake, pin.table, retention_hours)}
        if needed & doomed:
            raise LakeError(
                f"{pin.holder} needs {pin.table} at version {pin.version}, whose files this would remove: keep more "
                "hours by --retention-hours, or say --force to lose them.",
                2,
            )


def _doomed(lake: str, name: str, retention_hours: int) -> list[str]:
    """The files that a vacuum would remove, relative to the table."""
    table = DeltaTable(table_uri(lake, name))
    return table.vacuum(retention_hours, dry_run=True, enforce_retention_duration=False, full=True)


if __name__ == "__main__":
    sys.exit(main(["maintain", *sys.argv[1:]]))
