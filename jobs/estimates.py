"""Estimates as tables of 80 columns: what `lakemoe train --dry-run` and `lakemoe describe` print."""

from __future__ import annotations

from rich.table import Table

from jobs import console
from model.config import ModelConfig
from model.train.estimate import Estimate, Largest, changes, fastest, suggest
from model.train.machine import GIB, Machine

PARTS = {
    "weights": "weights, float32 in all",
    "gradients": "gradients",
    "moments": "AdamW's moments",
    "copies": "gathered blocks, bf16",
    "activations": "activations kept for backward",
    "working": "work of one block",
    "logits": "logits and the head's gradient",
    "communication": "communication buffers",
}
TIMES = {
    "experts": "experts",
    "projections": "attention's projections",
    "attention": "attention",
    "head": "head and loss",
    "elementwise": "norms, residuals, rotary",
    "recompute": "forward again (checkpointing)",
    "parameters": "gathering parameters, reducing gradients",
    "all_to_all": "all-to-all of tokens",
    "optimizer": "optimizer",
}
# How much faster another shape must be to be named.
WORTH = 1.05


def print_estimate(found: Estimate, steps: int) -> None:
    """Memory and time by part, whether it fits, what would make it fit, tokens a second, MFU and days."""
    shape, machine, memory = found.shape, found.machine, found.memory
    per_gpu = shape.micro_batch_size * shape.accumulation
    console.note(
        f"{found.config.name}, {found.config.parameters:,} parameters, {found.config.active_parameters:,} active, "
        f"on {shape.gpus:,} {machine.name}"
    )
    console.note(
        f"a step: {shape.tokens_per_step:,} tokens in sequences of {shape.sequence_length:,}; a GPU has {per_gpu:,}, "
        f"a forward pass {shape.micro_batch_size:,}"
    )
    console.note(
        f"experts over {shape.expert_parallel} GPU{'s' * (shape.expert_parallel > 1)}, "
        f"activation checkpointing: {shape.activation_checkpointing}"
    )
    table = Table(title="Memory of a GPU at its peak", title_justify="left", show_footer=True)
    table.add_column(found.moment, footer=f"of the GPU's {machine.memory / GIB:,.1f}")
    table.add_column("GiB", justify="right", footer=f"{found.total / GIB:,.1f}")
    for part, words in PARTS.items():
        table.add_row(words, f"{getattr(memory, part) / GIB:,.1f}")
    table.add_row("context, libraries, allocator's gaps", f"{memory.reserve(machine) / GIB:,.1f}")
    console.out.print(table)
    table = Table(title="Time of a step", title_justify="left", show_footer=True)
    table.add_column("part", footer="a step")
    table.add_column("ms", justify="right", footer=f"{found.time.step * 1e3:,.1f}")
    table.add_column("%", justify="right", footer="100")
    for part, words in TIMES.items():
        seconds = getattr(found.time, part)
        table.add_row(words, f"{seconds * 1e3:,.1f}", f"{100 * seconds / found.time.step:.0f}")
    console.out.print(table)
    if found.fits:
        console.note(f"It fits: {found.spare / GIB:,.1f} GiB of {machine.memory / GIB:,.1f} are left.")
        print_speed(found, steps)
        better = fastest(found.config, shape.gpus, machine, shape.sequence_length)
        if better is not None and better.tokens_per_second > WORTH * found.tokens_per_second:
            console.note(f"Faster on these GPUs: {better.tokens_per_second:,.0f} tokens/s, MFU {better.mfu:.2f}, with")
            console.note(f"  {flags(better)}")
    else:
        console.note(f"It does not fit: {-found.spare / GIB:,.1f} GiB of {found.total / GIB:,.1f} are too many.")
        better = suggest(found)
        if better is None:
            console.note("No number of GPUs that was tried holds it; take a smaller model or shorter sequences.")
        else:
            console.note(
                f"The cheapest way to fit: {changes(shape, better.shape)}: {better.total / GIB:,.1f} GiB a GPU."
            )
            console.note(f"As flags: {flags(better)}")
            print_speed(better, steps)


def print_speed(found: Estimate, steps: int) -> None:
    """Tokens a second, MFU, and how long so many steps take."""
    tokens = steps * found.shape.tokens_per_step
    days = found.days(tokens)
    long = (
        f"{days:,.1f} days" if days >= 1 else f"{days * 24:,.1f} hours" if days > 0.1 else f"{days * 1440:,.1f} minutes"
    )
    console.note(
        f"{found.tokens_per_second:,.0f} tokens/s, MFU {found.mfu:.2f}; {steps:,} steps, {tokens:,} tokens: {long}."
    )


def flags(found: Estimate) -> str:
    """The flags of `lakemoe train --dry-run` that mean this shape."""
    shape = found.shape
    return " ".join(
        (
            f"--gpus {shape.gpus}",
            f"--train.global-batch-size {shape.gpus * shape.micro_batch_size * shape.accumulation}",
            f"--train.micro-batch-size {shape.micro_batch_size}",
            f"--train.expert-parallel {shape.expert_parallel}",
            f"--train.activation-checkpointing {shape.activation_checkpointing}",
        )
    )


def print_assumptions(machine: Machine) -> None:
    """Every figure that the estimate takes for granted, with its meaning."""
    table = Table(title=f"What is assumed of the {machine.name} and its network", title_justify="left")
    table.add_column("figure", justify="right", no_wrap=True)
    table.add_column("meaning")
    for name, field in type(machine).model_fields.items():
        value = getattr(machine, name)
        if name != "name":
            table.add_row(f"{value:,.4g}", f"{name}: {field.description}")
    console.out.print(table)


def print_largest(config: ModelConfig, rows: list[Largest], sequence_length: int) -> None:
    """One row a number of GPUs: whether the model trains there and how fast, and the deepest one that would."""
    machine = rows[0].best.machine
    table = Table(
        title=f"Training on {machine.name}s, sequences of {sequence_length:,} tokens (estimated)", title_justify="left"
    )
    for name in ("GPUs", "trains", "GiB", "tokens/s", "MFU", "batch", "again", "experts", "most blocks"):
        table.add_column(name, justify="right")
    for row in rows:
        best, shape = row.best, row.best.shape
        speed = (_short(best.tokens_per_second), f"{best.mfu:.2f}") if best.fits else ("", "")
        table.add_row(
            f"{shape.gpus:,}",
            "yes" if best.fits else "no",
            f"{best.total / GIB:,.0f}",
            *speed,
            f"{shape.micro_batch_size}",
            "yes" if shape.activation_checkpointing == "block" else "no",
            f"/ {shape.expert_parallel}",
            f"{row.layers:,}",
        )
    console.out.print(table)
    console.note(
        f"GiB: of each GPU's {machine.memory / GIB:,.1f}; where it does not train, the least that it would need.\n"
        "batch: sequences a GPU in one forward pass; again: activation checkpointing by block;\n"
        "experts: spread over so many GPUs.\n"
        "most blocks: of a model of this shape that so many GPUs hold, and its parameters:\n  "
        + ", ".join(f"{row.best.shape.gpus:,}: {_short(row.parameters)}" for row in rows)
    )


def _short(count: float) -> str:
    """Three digits or so, with the unit of thousands."""
    for size, unit in ((1e12, " T"), (1e9, " B"), (1e6, " M"), (1e3, " k")):
        if count >= size:
            return f"{count / size:,.3g}{unit}"
    return f"{count:,.0f}"
