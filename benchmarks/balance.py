"""What keeps experts evenly used, and what it costs in loss: each method by itself, from one seed on the same tokens.

    python benchmarks/tokens.py                          # once, where lakemoe is installed; carry the file along
    python benchmarks/balance.py                         # one GPU, some minutes
    python benchmarks/balance.py --draw benchmarks/out/balance.json

The methods are the fields of the configuration (model/network/router.py), at the strengths of their papers: auxiliary
loss 0.01 (Switch), z-loss 0.001 (ST-MoE), bias 0.001 a step (DeepSeek-V3, whose scores are sigmoids; with softmax as
well here, so that one thing differs), jitter 0.01 (Switch). Reported of the last tenth of the steps: the fullest expert
over the mean (mean of the layers, and the worst), entropy, dead experts; and the held-out loss at the end.

Method, clock and what it needs: ``small_training.py``. Left out: several seeds, and tuning each method's strength.
"""

from __future__ import annotations

import json
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.gpu import machine, write
from benchmarks.small_training import arguments, contestants, picture, plan_of, prepare, shares, smoothed, tail, train
from model.config import ModelConfig
from model.network.transformer import Transformer

METHODS: dict[str, dict[str, Any]] = {
    "none": {},
    "auxiliary": {"balance_loss_weight": 0.01},
    "z": {"router_z_loss_weight": 0.001},
    "auxiliary + z": {"balance_loss_weight": 0.01, "router_z_loss_weight": 0.001},
    "bias": {"router_bias_rate": 0.001},
    "bias, sigmoid": {"router_bias_rate": 0.001, "router_score": "sigmoid"},
    "jitter": {"router_jitter": 0.01},
}
SHAPE: dict[str, Any] = {
    "max_seq_len": 1024, "layers": 6, "width": 512, "heads": 8, "kv_heads": 8, "head_width": 64, "norm": "rms_norm",
    "experts": 64, "experts_chosen": 4, "expert_width": 256,
}  # fmt: skip
TINY: dict[str, Any] = {
    **SHAPE, "layers": 2, "width": 64, "heads": 4, "kv_heads": 4, "head_width": 16, "experts": 8, "experts_chosen": 2,
    "expert_width": 32,
}  # fmt: skip


def model_of(method: str, shape: dict[str, Any], device: torch.device) -> Transformer:
    """A method's model, made on the device."""
    with torch.device(device):
        return Transformer(ModelConfig(**shape, **METHODS[method]))


def table(runs: list[dict[str, Any]]) -> str:
    lines = [f"{'':<15}{'held out':>9}{'loss':>8}{'max/mean':>10}{'worst':>8}{'entropy':>9}{'dead':>7}{'tokens/s':>12}"]
    for run in runs:
        load = run["load"]
        lines.append(
            f"{run['name']:<15}{run['held_out_loss']:>9.4f}{run['loss']:>8.4f}{tail(load['max_mean']):>10.2f}"
            f"{tail(load['max_worst']):>8.2f}{tail(load['entropy']):>9.4f}{tail(load['dead']):>7.1f}"
            f"{run['tokens_per_second']:>12,.0f}{'  cut short' if run['cut'] else ''}"
        )
    return "\n".join(lines)


def draw(report: dict[str, Any], path: Path) -> str:
    """The load and both losses by step."""
    load, training, held_out = {}, {}, {}
    for run in report["runs"]:
        steps = range(1, run["steps"] + 1)
        window = max(1, run["steps"] // 30)
        load[run["name"]] = (steps, smoothed(run["load"]["max_mean"], window))
        training[run["name"]] = (steps, smoothed(run["curve"], window))
        points = run["points"]
        held_out[run["name"]] = ([p["step"] for p in points], [p["held_out_loss"] for p in points])
    title, loss = "Fullest expert over the mean, mean of layers", "nats a token"
    return picture(
        path,
        [
            {"title": title, "x": "step", "y": "1 when even", "lines": load, "log": True},
            {"title": "Training loss, smoothed", "x": "step", "y": loss, "lines": training, "log": True},
            {"title": "Held-out loss", "x": "step", "y": loss, "lines": held_out, "log": True},
        ],
    )


def main(args: list[str] | None = None) -> int:
    began = time.perf_counter()
    asked = arguments(__doc__, steps=500, seconds=420).parse_args(args)
    if asked.draw:
        print(draw(json.loads(asked.draw.read_text(encoding="utf-8")), asked.draw.with_suffix(".png")))
        return 0
    names = contestants(asked, tuple(METHODS))
    plan = plan_of(asked, learning_rate=1e-3, evaluations=10)
    data = prepare(asked, plan)
    shape = {**(TINY if asked.tiny else SHAPE), "vocab_size": data.vocabulary}
    report: dict[str, Any] = {
        "machine": machine(data.device), "plan": plan._asdict(), "shape": shape, "methods": METHODS,
        "epochs": data.epochs, "runs": [],
    }  # fmt: skip
    for name, seconds in shares(names, began + asked.seconds):
        run, _ = train(name, partial(model_of, name, shape, data.device), data, seconds)
        report["runs"].append(run)
        path = write(asked.out, "balance", report)
    print(f"\n{table(report['runs'])}\n\n{path}", flush=True)
    print(draw(report, path.with_suffix(".png")))
    return 0


if __name__ == "__main__":
    sys.exit(main())
