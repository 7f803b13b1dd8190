"""Dropless training beside a capacity that drops tokens and beside a dense model: loss by time and by tokens.

    python benchmarks/tokens.py                          # once, where lakemoe is installed; carry the file along
    python benchmarks/dropless.py                        # one GPU, about five minutes
    python benchmarks/dropless.py --draw benchmarks/out/dropless.json

MegaBlocks' question (Gale et al. 2022): what does dropping cost? All have the same data, seed, optimizer and schedule.
The mixtures differ in their experts' layer alone: ours, or ``capacity.py``'s with factors 1, 1.25 and 2.
The dense model has one gated layer as wide as the chosen experts together, so that a token costs the same FLOPs.
Reported: held-out loss at the end, each with its own capacity and (dropless) the same weights with no token dropped;
the share of assignments that training dropped; and when each reached the final loss of the worst.

Method, clock and what it needs: ``small_training.py``. Left out: several seeds (the spread is not known), and tuning
the learning rate for each.
"""

from __future__ import annotations

import json
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.capacity import CapacityMoE, Dense, capacity_of
from benchmarks.gpu import machine, write
from benchmarks.small_training import arguments, contestants, picture, plan_of, prepare, shares, smoothed, train
from model.config import ModelConfig
from model.network.transformer import Transformer

FACTORS = {"capacity 1": 1.0, "capacity 1.25": 1.25, "capacity 2": 2.0}
CONTESTANTS = ("dropless", *FACTORS, "dense")
SHAPE: dict[str, Any] = {
    "max_seq_len": 1024, "layers": 6, "width": 1024, "heads": 16, "kv_heads": 16, "head_width": 64, "norm": "rms_norm",
    "experts": 32, "experts_chosen": 2, "expert_width": 1024, "balance_loss_weight": 0.01,
}  # fmt: skip
TINY: dict[str, Any] = {
    **SHAPE, "layers": 2, "width": 64, "heads": 4, "kv_heads": 4, "head_width": 16, "experts": 8, "expert_width": 32,
}  # fmt: skip


def model_of(name: str, shape: dict[str, Any], device: torch.device) -> Transformer:
    """A contestant's model, made on the device."""
    if name == "dense":
        chosen = shape["experts_chosen"]
        shape = {**shape, "experts": 1, "experts_chosen": 1, "expert_width": chosen * shape["expert_width"]}
    config = ModelConfig(**shape)
    with torch.device(device):
        model = Transformer(config)
        for block in model.blocks:
            if name == "dense":
                block.moe = Dense(config)
            elif name in FACTORS:
                block.moe = CapacityMoE(config, FACTORS[name])
        model.initialize()
    return model


def dropped(assignments_SLE: Tensor, factor: float, tokens: int, chosen: int) -> float:
    """The share of all steps' assignments beyond capacity."""
    capacity = capacity_of(factor, tokens, chosen, assignments_SLE.shape[-1])
    return float((assignments_SLE - capacity).clamp(min=0).sum() / assignments_SLE.sum())


def reached(points: list[dict[str, float]], loss: float) -> float | None:
    """Seconds at which the held-out loss first was ``loss``, between two evaluations in proportion; None if never."""
    before: dict[str, float] | None = None
    for point in points:
        if point["held_out_loss"] <= loss:
            if before is None:
                return point["seconds"]
            part = (before["held_out_loss"] - loss) / (before["held_out_loss"] - point["held_out_loss"])
            return before["seconds"] + part * (point["seconds"] - before["seconds"])
        before = point
    return None


def compare(runs: list[dict[str, Any]]) -> None:
    """Add to each run when it reached the final loss of the worst, of those that did all steps."""
    whole = [run for run in runs if not run["cut"]]
    if not whole:
        return
    worst = max(run["held_out_loss"] for run in whole)
    for run in runs:
        run["seconds_to_worst"] = reached(run["points"], worst)


def table(runs: list[dict[str, Any]]) -> str:
    head = (
        f"{'':<15}{'held out':>9}{'dropless':>9}{'loss':>8}{'dropped':>9}{'tokens/s':>12}{'seconds':>9}{'to worst':>10}"
    )
    lines = [head]
    for run in runs:
        to_worst = run.get("seconds_to_worst")
        lines.append(
            f"{run['name']:<15}{run['held_out_loss']:>9.4f}{run['held_out_loss_dropless']:>9.4f}{run['loss']:>8.4f}"
            f"{run['dropped']:>9.2%}{run['tokens_per_second']:>12,.0f}{run['seconds']:>9.1f}"
            f"{'' if to_worst is None else f'{to_worst:.1f} s':>10}{'  cut short' if run['cut'] else ''}"
        )
    return "\n".join(lines)


def draw(report: dict[str, Any], path: Path) -> str:
    """Held-out loss by time and by tokens, and the training's loss by tokens."""
    by_time, by_tokens, training = {}, {}, {}
    for run in report["runs"]:
        name, points = run["name"], run["points"]
        a_step = run["tokens"] / run["steps"]
        held_out = [p["held_out_loss"] for p in points]
        by_time[name] = ([p["seconds"] for p in points], held_out)
        by_tokens[name] = ([p["step"] * a_step / 1e6 for p in points], held_out)
        curve = smoothed(run["curve"], max(1, len(run["curve"]) // 30))
        training[name] = ([(n + 1) * a_step / 1e6 for n in range(len(curve))], curve)
    loss = "nats a token"
    return picture(
        path,
        [
            {"title": "Held-out loss by time", "x": "seconds of training", "y": loss, "lines": by_time, "log": True},
            {"title": "Held-out loss by tokens", "x": "million tokens", "y": loss, "lines": by_tokens, "log": True},
            {"title": "Training loss, smoothed", "x": "million tokens", "y": loss, "lines": training, "log": True},
        ],
    )


def main(args: list[str] | None = None) -> int:
    began = time.perf_counter()
    asked = arguments(__doc__, steps=450, seconds=360).parse_args(args)
    if asked.draw:
        print(draw(json.loads(asked.draw.read_text(encoding="utf-8")), asked.draw.with_suffix(".png")))
        return 0
    names = contestants(asked, CONTESTANTS)
    plan = plan_of(asked, learning_rate=6e-4, evaluations=15)
    data = prepare(asked, plan)
    shape = {**(TINY if asked.tiny else SHAPE), "vocab_size": data.vocabulary}
    report: dict[str, Any] = {
        "machine": machine(data.device), "plan": plan._asdict(), "shape": shape, "epochs": data.epochs, "runs": [],
    }  # fmt: skip
    runs = report["runs"]
    for name, seconds in shares(names, began + asked.seconds):
        run, assignments = train(name, partial(model_of, name, shape, data.device), data, seconds)
        a_step = plan.sequences * plan.length
        run["dropped"] = (
            dropped(assignments, FACTORS[name], a_step, shape["experts_chosen"]) if name in FACTORS else 0.0
        )
        runs.append(run)
        compare(runs)
        path = write(asked.out, "dropless", report)
    print(f"\n{table(runs)}\n\n{path}", flush=True)
    print(draw(report, path.with_suffix(".png")))
    return 0


if __name__ == "__main__":
    sys.exit(main())
