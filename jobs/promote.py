"""Ask the gate to make a version the champion; every decision is a row of ops.promotions."""

from __future__ import annotations

import sys

from pydantic import Field

from jobs import console, runs
from jobs.main import FAILED, OK, main
from jobs.settings import JobSettings
from model.evaluate.held_out import EvaluateConfig
from model.evaluate.versions import held_out_loss
from model.registry.promote import CHALLENGER, PromotionConfig, PromotionDecision, promote


class Settings(JobSettings):
    """Make a version the champion where its held-out loss is not worse than the champion's, on the same data."""

    model: str = Field("quickstart", description="the registered model's name")
    version: str = Field(CHALLENGER, description="the version's number, or the alias that names it")
    promote: PromotionConfig = Field(default_factory=PromotionConfig, description="settings of the gate")
    evaluate: EvaluateConfig = Field(default_factory=EvaluateConfig, description="settings of the evaluation")


def run_promotion(
    lake: str, name: str, version: str, config: PromotionConfig, evaluation: EvaluateConfig
) -> PromotionDecision:
    """Ask the gate and record it in ops.runs."""
    with console.working("promote"), runs.recorded(lake, "promote", {"model": name, "version": version}) as run:
        loss = held_out_loss(name, version, lake=lake, config=evaluation)
        decision = promote(name, version, lake=lake, held_out_loss=loss, config=config)
        run.counts = {"promoted": int(decision.promoted)}
        run.status = "succeeded" if decision.recorded else "unchanged"
    console.done("promote", run.status, {"version": int(decision.candidate_version)})
    return decision


def run(settings: Settings) -> int:
    decision = run_promotion(settings.lake, settings.model, settings.version, settings.promote, settings.evaluate)
    console.note(f"Version {decision.candidate_version} of {decision.model} is {decision.decision}. {decision.reason}")
    if decision.promoted:
        console.note(f"Next: lakemoe serve --model models:/{decision.model}@champion --lake {settings.lake}")
    return OK if decision.promoted else FAILED


if __name__ == "__main__":
    sys.exit(main(["promote", *sys.argv[1:]]))
