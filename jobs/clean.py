"""Normalise, redact and judge every document: bronze.documents to silver.documents."""

from __future__ import annotations

import json
import sys

from pydantic import Field

from jobs import runs, stages
from jobs.main import main
from jobs.settings import JobSettings, UsageError
from pipelines.clean.config import CleanConfig

# Settings that verdicts follow from, given the signals.
JUDGING = ("rules", "admitted_licenses")


class Settings(JobSettings):
    """Normalise, redact and judge every document: bronze.documents to silver.documents."""

    clean: CleanConfig = Field(default_factory=CleanConfig, description="settings of the stage")
    rejudge: bool = Field(False, description="apply the rules to the stored signals alone: no text is read")


def run(settings: Settings) -> None:
    if settings.rejudge:
        rejudge(settings.lake, settings.clean)
    else:
        stages.run_stage("clean", settings.lake, settings.clean)
    stages.where(settings.lake, "clean")


def rejudge(lake: str, config: CleanConfig) -> None:
    """Judge what silver.documents holds by other rules; by the same ones there is nothing to do.

    Raises UsageError where settings differ that need the text, from those that made silver.documents.
    """
    if not (cleaned := runs.last_good(lake, "clean")):
        raise UsageError(f"No clean is recorded in {lake}, so there are no signals to judge: run clean first.")
    last = cleaned[0]
    made, wanted = (json.loads(last["configuration"]), config.model_dump(mode="json"))
    if other := next((name for name in wanted if name not in JUDGING and made.get(name) != wanted[name]), None):
        raise UsageError(f"clean.{other} is not what silver.documents was made with: run clean without --rejudge.")
    if state := runs.last_state(lake, "clean", wanted):
        stages.spare_stage("clean", lake, config, state)
        return
    # Signals made by other code are judged all the same, but the next clean measures them anew.
    same_code = last["code_version"] == runs.code_version()
    since = runs.versions(last["inputs"]) if same_code else {}
    stages.record_stage("clean", lake, config, since=since, function="rejudge")


if __name__ == "__main__":
    sys.exit(main(["clean", *sys.argv[1:]]))
