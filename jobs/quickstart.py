"""The whole way on real input: documents, tables, tokenizer, sequences, a trained model, the registry, a completion.

Without ``--source`` the input is what every Python environment holds: the standard library's sources (code) and the
documentation, READMEs and licences of the installed packages (text). Every step is safe to kill and finds its work done
when the command is run again.
"""

from __future__ import annotations

import sys
import sysconfig
import time
from pathlib import Path

from pydantic import Field

from jobs import console, evaluate, pipeline, promote, register, summary, train
from jobs.main import main
from jobs.settings import CONF
from model.evaluate.held_out import EvaluateConfig
from model.network.generate import SamplingConfig, generate
from model.registry.load import load
from model.registry.promote import CHALLENGER, CHAMPION, PromotionConfig
from model.train.config import TrainConfig
from pipelines.ingest.config import SourceConfig

TEXT = ("md", "rst", "txt")
TEXT_NAMES = ("README*", "METADATA", "LICEN[CS]E*", "COPYING*", "NOTICE*", "AUTHORS*", "CHANGE*", "HISTORY*")


class Settings(pipeline.Settings):
    """From documents to a registered model that answers, on real input, on this machine."""

    default_file = CONF / "quickstart.yaml"

    train: TrainConfig = Field(default_factory=TrainConfig, description="settings of train")
    evaluate: EvaluateConfig = Field(default_factory=EvaluateConfig, description="settings of evaluate")
    promote: PromotionConfig = Field(default_factory=PromotionConfig, description="settings of promote")
    sampling: SamplingConfig = Field(default_factory=SamplingConfig, description="how the completion is sampled")
    prompt: str = Field("def read(path):\n", description="text that the finished model completes")


def default_sources() -> tuple[SourceConfig, ...]:
    """The standard library's sources and the installed packages' documentation."""
    paths = sysconfig.get_paths()
    patterns = (*(f"**/*.{ending}" for ending in TEXT), *(f"**/{name}" for name in TEXT_NAMES))
    return (
        SourceConfig(
            path=paths["stdlib"],
            name="python-stdlib",
            include=("**/*.py",),
            exclude=("site-packages/**", "dist-packages/**", "**/test/**", "**/tests/**"),
            license="PSF-2.0",
        ),
        SourceConfig(
            path=paths["purelib"],
            name="package-docs",
            include=patterns,
            # Lists of names are no prose, and lakemoe's own metadata changes with every edit of its README.
            exclude=("**/*.dist-info/*.txt", "**/*.egg-info/**", "lakemoe-*/**", "**/*.py"),
            kind="text",
        ),
    )


def run(settings: Settings) -> None:
    start, lake = time.monotonic(), settings.lake
    if not settings.source and not settings.ingest.sources:
        ingest = settings.ingest.model_copy(update={"sources": default_sources()})
        settings = settings.model_copy(update={"ingest": ingest})
    counts = pipeline.run_stages(settings)
    training = train.run_training(lake, settings.train)
    evaluation = evaluate.run_evaluation(lake, Path(training.checkpoint), settings.evaluate)
    version = register.run_registration(lake, settings.train.name, training, evaluation)
    decision = promote.run_promotion(lake, version.name, version.version, settings.promote, settings.evaluate)
    alias = CHAMPION if decision.promoted else CHALLENGER
    model = load(f"models:/{version.name}@{alias}", lake=lake)
    with console.working("generate"):
        pieces = generate(model.transformer, model.tokenizer, settings.prompt, settings.sampling)
        completion = "".join(piece.text for piece in pieces)
    summary.show(
        lake=lake,
        counts=counts,
        evaluation=evaluation,
        decision=decision,
        alias=alias,
        prompt=settings.prompt,
        completion=completion,
        seconds=time.monotonic() - start,
    )


if __name__ == "__main__":
    sys.exit(main(["quickstart", *sys.argv[1:]]))
