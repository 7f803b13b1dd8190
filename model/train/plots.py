"""Pictures of a training for its MLflow run, drawn from the journal."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

_POINTS = 1000  # across a picture, at most; each is the mean of the steps that fall to it


def figures(lines: Iterable[dict[str, Any]], steps: int) -> dict[str, Figure]:
    """losses.png and experts.png by their names. steps: in all; the lines are read once and not kept."""
    width = -(-steps // _POINTS)
    sums: dict[str, dict[int, tuple[int, Any]]] = defaultdict(dict)
    validation: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for line in lines:
        point = (line["step"] - 1) // width
        for name, value in line.items():
            if name == "loss" or name.startswith("loss/") or name == "expert_load_max":
                count, total = sums[name].get(point, (0, 0.0))
                sums[name][point] = (count + 1, total + np.asarray(value))
            elif name.startswith("validation_loss"):
                validation[name].append((line["step"], value))

    def curve(name: str) -> tuple[list[float], list[Any]]:
        points = sorted(sums[name])
        # The middle of the steps that a point stands for, which count from 1.
        middles = [point * width + (width + 1) / 2 for point in points]
        return middles, [total / count for count, total in (sums[name][point] for point in points)]

    return {
        "losses.png": _losses({name: curve(name) for name in sorted(sums) if name != "expert_load_max"}, validation),
        "experts.png": _experts(*curve("expert_load_max")),
    }


def _losses(
    training: dict[str, tuple[list[float], list[float]]], validation: dict[str, list[tuple[int, float]]]
) -> Figure:
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    names = [name for name in training if name != "loss"] or ["loss"]  # several domains, or the one
    for number, name in enumerate(names):
        color = f"C{number}"
        domain = name.removeprefix("loss/") if name != "loss" else "training"
        axes.plot(*training[name], color=color, linewidth=0.8, alpha=0.5, label=domain)
        if held_out := validation.get(f"validation_{name}"):
            axes.plot(*zip(*held_out, strict=True), color=color, marker="o", markersize=4, label=f"{domain}, held out")
    if len(names) > 1 and (held_out := validation.get("validation_loss")):
        axes.plot(*zip(*held_out, strict=True), color="black", marker="o", markersize=4, label="all, held out")
    axes.set(xlabel="step", ylabel="loss (nats a token)")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def _experts(steps: list[float], load_PL: list[Any]) -> Figure:
    """Of each layer over the steps, the busiest expert's tokens over the mean (1 where the load is even)."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots()
    layers = len(load_PL[0])
    image = axes.imshow(
        np.transpose(load_PL),
        aspect="auto",
        interpolation="nearest",
        origin="lower",
        vmin=1,
        extent=(0, steps[-1], -0.5, layers - 0.5),
    )
    axes.set(xlabel="step", ylabel="layer", title="Tokens of the busiest expert over the mean")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    figure.colorbar(image)
    return figure
