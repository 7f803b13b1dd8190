"""Held-out loss and bits a byte of a finished training or a registered model, beside n-gram baselines."""

from __future__ import annotations

import sys
from pathlib import Path

from pydantic import Field
from rich.table import Table

from jobs import console, runs
from jobs.main import main
from jobs.settings import JobSettings, UsageError
from model.evaluate.held_out import EvaluateConfig, Evaluation, evaluate_folder
from model.registry.load import download
from model.train.plan import finished


class Settings(JobSettings):
    """Measure a finished training, or a registered model, on the validation split of the data it was trained on."""

    training: str = Field("quickstart", description="name of the finished training to evaluate, or its output folder")
    model: str = Field("", description="models:/NAME@ALIAS or models:/NAME/VERSION, in place of a training")
    evaluate: EvaluateConfig = Field(default_factory=EvaluateConfig, description="settings of the evaluation")


def run_evaluation(lake: str, folder: Path, config: EvaluateConfig) -> Evaluation:
    """Evaluate the model in a folder, with progress, and record it in ops.runs."""
    with runs.recorded(lake, "evaluate", {"folder": str(folder), **config.model_dump(mode="json")}) as run:
        with console.counting("evaluate", "sequences") as progress:
            evaluation = evaluate_folder(folder, lake, config, progress=progress)
        run.inputs = {evaluation.data["table"]: evaluation.data["version"]}
        run.counts = {"targets": evaluation.total.targets, "bytes": evaluation.total.bytes}
    console.done("evaluate", run.status, run.counts)
    return evaluation


def table(evaluation: Evaluation) -> Table:
    """The figures by domain and in all."""
    out = Table(title="Held out (nats a token; bits a byte)", title_justify="left")
    out.add_column("domain")
    for name in ("tokens", "loss", "bits a byte", "unigram", "bigram"):
        out.add_column(name, justify="right")
    for name, s in (*evaluation.domains.items(), ("all", evaluation.total)):
        numbers = (f"{s.loss:.4f}", f"{s.bits_per_byte:.4f}", f"{s.unigram:.4f}", f"{s.bigram:.4f}")
        out.add_row(name, f"{s.targets:,}", *numbers)
    return out


def run(settings: Settings) -> None:
    if settings.model and "training" in settings.model_fields_set:
        raise UsageError("--training and --model are two things to evaluate; name one.")
    if settings.model:
        folder = download(settings.model, lake=settings.lake)
    else:
        folder = Path(finished(settings.lake, settings.training).checkpoint)
    console.out.print(table(run_evaluation(settings.lake, folder, settings.evaluate)))
    if not settings.model:
        console.note(f"Next: lakemoe register --training {settings.training} --lake {settings.lake}")


if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
