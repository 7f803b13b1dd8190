"""Print what a model preset is: parameters, expert combinations, memory, and where it trains; nothing is allocated."""

from __future__ import annotations

import sys

from pydantic import Field
from rich.table import Table

from jobs import console
from jobs.estimates import print_assumptions, print_largest
from jobs.main import main
from jobs.settings import JobSettings
from model.config import load_preset
from model.train.estimate import largest
from model.train.machine import GIB, MACHINES, MachineName
from model.train.memory import BF16

GPUS = (1, 8, 512, 3072)
SEQUENCE_LENGTH = 4096
# float32 master weight (in two halves), bfloat16 gradient and AdamW's two float32 moments, over all GPUs.
TRAINING_BYTES = 14


class Settings(JobSettings):
    """Print a preset's parameters and memory, and where it trains how fast, without allocating it."""

    model: str = Field("quickstart", description="a preset of conf/models, such as dbrx")
    machine: MachineName = Field("h200", description="GPU that training is estimated for")
    network: float = Field(400, gt=0, description="network between nodes of 8 GPUs (Gbit/s a GPU)")
    sequence_length: int | None = Field(
        None, ge=1, description=f"tokens a sequence (default: {SEQUENCE_LENGTH}, or the model's longest)"
    )
    assumptions: bool = Field(False, description="also print every figure that the estimate assumes")


def run(settings: Settings) -> None:
    config = load_preset(settings.model)
    machine = MACHINES[settings.machine].with_network(settings.network)
    table = Table(title=f"{settings.model}", show_header=False, title_justify="left")
    for name, value in (
        ("layers x width", f"{config.layers} x {config.width}"),
        ("heads / kv heads / head width", f"{config.heads} / {config.kv_heads} / {config.head_width}"),
        ("expert width, activation", f"{config.expert_width} {config.activation}-GLU"),
        ("experts / chosen", f"{config.experts} / {config.experts_chosen}"),
        ("expert combinations a block", f"{config.expert_combinations:,}"),
        ("vocabulary / context", f"{config.vocab_size:,} / {config.max_seq_len:,}"),
        ("parameters", f"{config.parameters:,}"),
        ("active parameters", f"{config.active_parameters:,}"),
        ("memory at rest, bf16", f"{config.parameters * BF16 / GIB:,.2f} GiB"),
        ("weights, gradients, AdamW in training", f"{config.parameters * TRAINING_BYTES / GIB:,.2f} GiB"),
    ):
        table.add_row(name, value)
    console.out.print(table)
    length = settings.sequence_length or min(SEQUENCE_LENGTH, config.max_seq_len)
    print_largest(config, [largest(config, gpus, machine, length) for gpus in GPUS], length)
    if settings.assumptions:
        print_assumptions(machine)
    console.note(f"Next: lakemoe train --dry-run --model {settings.model} --gpus 512")


if __name__ == "__main__":
    sys.exit(main(["describe", *sys.argv[1:]]))
