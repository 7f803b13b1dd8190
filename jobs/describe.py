"""Print what a model preset is: parameters, active parameters, memory, expert combinations; nothing is allocated."""

from __future__ import annotations

import sys

from pydantic import Field
from rich.table import Table

from jobs import console
from jobs.main import main
from jobs.settings import JobSettings
from model.config import load_preset

GIB = 1024**3
# float32 master weight, float32 gradient and AdamW's two float32 moments.
TRAINING_BYTES = 16
BF16_BYTES = 2


class Settings(JobSettings):
    """Print a preset's parameters and memory without allocating it."""

    model: str = Field("quickstart", description="a preset of conf/models, such as dbrx")


def run(settings: Settings) -> None:
    config = load_preset(settings.model)
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
        ("memory at rest, bf16", f"{config.parameters * BF16_BYTES / GIB:,.2f} GiB"),
        ("weights, gradients, AdamW in training", f"{config.parameters * TRAINING_BYTES / GIB:,.2f} GiB"),
    ):
        table.add_row(name, value)
    console.out.print(table)


if __name__ == "__main__":
    sys.exit(main(["describe", *sys.argv[1:]]))
