"""Train a mixture of experts on a pinned version of gold.sequences; killed anywhere, the next run goes on.

``--dry-run`` says what a training needs and how fast it is, before anything is spent (model/train/estimate.py).
"""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from jobs import console
from jobs.estimates import print_assumptions, print_estimate
from jobs.launch import Launcher, is_main, launch
from jobs.main import main
from jobs.settings import JobSettings, UsageError
from model.config import ModelConfig, load_preset
from model.lake import local_path
from model.loader.store import is_local
from model.train.config import TrainConfig
from model.train.estimate import estimate
from model.train.machine import MACHINES, MachineName
from model.train.memory import TrainShape, checkpoint_bytes, checkpoint_copies
from pipelines.tables import GOLD_SEQUENCES

if TYPE_CHECKING:
    from model.train.config import TrainSummary

# Of a dry run where neither the settings nor a lake's data say it.
SEQUENCE_LENGTH = 4096


class Settings(JobSettings):
    """Train a mixture of experts on a pinned version of gold.sequences; killed anywhere, the next run goes on."""

    train: TrainConfig = Field(default_factory=TrainConfig, description="settings of the training")
    dry_run: bool = Field(False, description="estimate memory and time of the training; nothing is allocated or read")
    model: str | None = Field(
        None,
        description="dry run: this preset with its own vocabulary, whatever the lake holds (default: train.preset)",
    )
    gpus: int | None = Field(None, ge=1, description="dry run: GPUs to train on (default: processes)")
    processes: int = Field(
        1, ge=1, description="processes that train together, each on a GPU of its own where there are"
    )
    launcher: Launcher = Field(
        "torchrun",
        description="what starts them: torchrun on this machine, or Spark's TorchDistributor in barrier mode",
    )
    machine: MachineName = Field("h200", description="dry run: the GPU")
    network: float = Field(400, gt=0, description="dry run: network between nodes of 8 GPUs (Gbit/s a GPU)")
    assumptions: bool = Field(False, description="dry run: also print every figure that the estimate assumes")


def run_training(lake: str, config: TrainConfig) -> TrainSummary:
    """Train, or find it done, and record it in ops.runs; of several processes, the first one records."""
    # Here, so that a dry run does not wait seconds for torch and MLflow.
    from jobs import runs
    from model.train.journal import read_run
    from model.train.trainer import train

    if not is_main():
        return train(lake, config)
    before = read_run(config.output_folder(lake)) or {}
    with runs.recorded(lake, "train", config.model_dump(mode="json")) as run:
        summary = train(lake, config, code_version=runs.code_version())
        data = (read_run(config.output_folder(lake)) or {})["data"]
        run.inputs, run.mlflow_run_id = {GOLD_SEQUENCES.name: data["version"]}, summary.mlflow_run_id
        run.counts = {"steps": summary.step, "tokens": summary.tokens}
        if before.get("logged"):
            run.status = "unchanged"
    console.done("train", run.status, run.counts)
    return summary


def planned(settings: Settings) -> tuple[ModelConfig, int, str]:
    """The model and the tokens a sequence that a dry run is about, and where they come from, in words."""
    config, lake = settings.train, settings.lake
    if settings.model is None and (not is_local(lake) or local_path(GOLD_SEQUENCES.uri(lake)).is_dir()):
        from model.loader.snapshot import NoTableError
        from model.train.plan import model_config, open_data

        with contextlib.suppress(NoTableError):
            data = open_data(lake, config, None)
            source = f"sequences of {data.sequence_length:,} tokens, as in {lake}"
            return model_config(lake, config, data), data.sequence_length, source
    model = load_preset(settings.model or config.preset, **config.overrides)
    if config.sequence_length is not None:
        return model, config.sequence_length, f"sequences of {config.sequence_length:,} tokens, as set"
    length = min(SEQUENCE_LENGTH, model.max_seq_len)
    return model, length, f"sequences of {length:,} tokens, as train.sequence_length is not set"


def shape(config: TrainConfig, gpus: int, sequence_length: int) -> tuple[TrainShape, str]:
    """How the settings train on so many GPUs, and where the batch comes from, in words.

    A global_batch_size that nobody set grows to what every GPU needs. Raises UsageError where it cannot be shared.
    """
    batch = config.global_batch_size
    words = f"{batch:,} sequences a step"
    if "global_batch_size" not in config.model_fields_set and batch % gpus:
        batch = gpus * (config.micro_batch_size or 1)
        words = f"{batch:,} sequences a step, as train.global_batch_size is not set"
    if batch % gpus:
        raise UsageError(
            f"train.global_batch_size {batch} cannot be shared by {gpus} GPUs; take a multiple of their number."
        )
    if gpus % config.expert_parallel:
        raise UsageError(f"train.expert_parallel {config.expert_parallel} must divide the number of GPUs, {gpus}.")
    each = batch // gpus
    micro = min(config.micro_batch_size or each, each)
    made = TrainShape(
        gpus=gpus,
        sequence_length=sequence_length,
        micro_batch_size=micro,
        accumulation=-(-each // micro),
        expert_parallel=config.expert_parallel,
        activation_checkpointing=config.activation_checkpointing,
        loss_chunk=config.loss_chunk,
        moments=config.moments,
    )
    return made, words


def dry_run(settings: Settings) -> None:
    """Print what the training needs and how fast it is."""
    model, length, source = planned(settings)
    how, batch = shape(settings.train, settings.gpus or settings.processes, length)
    machine = MACHINES[settings.machine].with_network(settings.network)
    console.note(f"Dry run: {source}; {batch}.")
    print_estimate(estimate(model, how, machine), settings.train.steps)
    config = settings.train
    disk, copies = checkpoint_bytes(model, how) / 1e9, checkpoint_copies(model, how) / 1e9
    console.note(
        f"A checkpoint takes {disk:,.1f} GB of disk, and copies of it {copies:,.1f} GB of main memory a process."
    )
    if config.validate_every:
        # A forward pass is a third of a step.
        share = config.validation_sequences * length / 3 / (config.validate_every * how.tokens_per_step)
        console.note(
            f"Looking at the validation split every {config.validate_every} steps adds about {share:.1%} of time."
        )
    if settings.assumptions:
        print_assumptions(machine)


def run(settings: Settings) -> int | None:
    if settings.dry_run:
        dry_run(settings)
        return None
    if settings.model is not None or settings.gpus is not None:
        raise UsageError("--model and --gpus are of a dry run; add --dry-run, or name the model with --train.preset.")
    if settings.processes > 1:
        return launch(settings.launcher, settings.processes, settings.lake, settings.train)
    train_here(settings.lake, settings.train)
    return None


def train_here(lake: str, config: TrainConfig) -> None:
    """Train in this process, alone or as one of several; the first one says where the result lies."""
    from model.registry.store import tracking_uri

    summary = run_training(lake, config)
    if not is_main():
        return
    console.note(f"The checkpoint is {summary.checkpoint}, the last loss {summary.final_loss:.4f} nats a token.")
    store = tracking_uri(lake)
    console.note(f"The run is {summary.mlflow_run_id}; to see it: mlflow ui --backend-store-uri {store}")
    training = config.name if config.output is None else Path(config.output).absolute()
    console.note(f"Next: lakemoe evaluate --training {training} --lake {lake}")


if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
