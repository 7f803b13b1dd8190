"""What the benchmarks that train small models share: one loop on one device, its clock, its held-out loss, a picture.

Every contestant has the same seed, batches, optimizer and schedule. Its kernels are compiled and tuned by two steps
before its time begins, after which the weights are made again from the seed. The clock runs in steps alone: it stands
still while the held-out loss is measured. Nothing waits for the device in between: losses and loads stay there.

Needs torch, Triton, numpy, pydantic and PyYAML; matplotlib only where it draws. Left out: what is compared, resuming
and more than one process (model/train has these).
"""

from __future__ import annotations

import argparse
import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.capacity import CapacityMoE
from benchmarks.gpu import OUT, release
from benchmarks.tokens import FILE, Tokens, read
from model.network.router import load_metrics, move_biases, router_losses
from model.network.transformer import Transformer
from model.train.config import TrainConfig
from model.train.optimizer import AdamW, build_optimizer, set_learning_rate

WARM_UP = 2  # steps that compile


class Plan(NamedTuple):
    """What all contestants share. A step is sequences * length tokens."""

    steps: int
    sequences: int
    length: int
    learning_rate: float
    evaluations: int
    held_out_sequences: int
    seed: int
    compiled: bool


class Data:
    """The token file on a device: batches as a function of the step, and the held-out sequences."""

    def __init__(self, tokens: Tokens, plan: Plan, device: torch.device) -> None:
        self.plan, self.device, self.vocabulary = plan, device, tokens.vocabulary
        self.train, self.held_out = (
            torch.from_numpy(part.astype(np.int32)).to(device) for part in (tokens.train, tokens.held_out)
        )
        windows = (len(tokens.train) - 1) // plan.length
        needed = plan.steps * plan.sequences
        rng = np.random.default_rng(plan.seed)
        # An epoch after the other, each in an order of its own.
        order = np.concatenate([rng.permutation(windows) for _ in range(-(-needed // windows))])[:needed]
        self.starts = torch.from_numpy(order * plan.length).to(device).view(plan.steps, plan.sequences)
        self.epochs = needed / windows
        held = min(plan.held_out_sequences, (len(tokens.held_out) - 1) // plan.length)
        held -= held % plan.sequences
        if windows < 1 or held < 1:
            raise SystemExit("The token file is too short for one batch; make a longer one with benchmarks/tokens.py.")
        self.held_starts = (torch.arange(held, device=device) * plan.length).view(-1, plan.sequences)

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets int64 [B, S] of a step."""
        return self._windows(self.train, self.starts[step])

    def held_out_batches(self) -> list[tuple[Tensor, Tensor]]:
        return [self._windows(self.held_out, starts) for starts in self.held_starts]

    def _windows(self, tokens: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
        span = torch.arange(self.plan.length + 1, device=self.device)
        window = tokens[starts[:, None] + span].long()
        return window[:, :-1], window[:, 1:]


def rate(plan: Plan, step: int) -> float:
    """Linear warm-up over a twentieth of the steps, then cosine to a tenth."""
    warm_up = max(1, plan.steps // 20)
    if step < warm_up:
        return plan.learning_rate * (step + 1) / warm_up
    done = (step - warm_up) / max(1, plan.steps - 1 - warm_up)
    return plan.learning_rate * (0.1 + 0.45 * (1 + math.cos(math.pi * done)))


def train(
    name: str,
    build: Callable[[], Transformer],
    data: Data,
    seconds: float,
    *,
    dtype: torch.dtype = torch.bfloat16,
    moments: Literal["float32", "bfloat16"] = "float32",
) -> tuple[dict[str, Any], Tensor]:
    """Train one contestant; its curves and figures, ready for JSON, and its assignments [steps, L, E].

    build: the model on data's device. seconds: after which it stops at the next evaluation, wherever it is; then
    ``cut`` is true and its figures are of the steps that it did. dtype: of products on a GPU; moments: AdamW's there.
    """
    plan, device = data.plan, data.device
    started = time.perf_counter()
    until = started + seconds
    if plan.compiled:
        torch._dynamo.reset()  # another contestant's code is none of this one's
    release()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    torch.manual_seed(plan.seed)
    model = build()
    if device.type == "cuda":
        model.compute_in(dtype)
    if plan.compiled:
        for block in model.blocks:
            block.compile(dynamic=False)
    optimizer = build_optimizer(model.parameters(), TrainConfig(moments=moments))
    for _ in range(WARM_UP):
        _step(model, optimizer, data.batch(0), 0.0)
    _wait(device)
    warm_up = time.perf_counter() - started
    torch.manual_seed(plan.seed)
    model.initialize()
    optimizer = build_optimizer(model.parameters(), TrainConfig(moments=moments))

    losses, loads, points = [], [], []
    clock, step = 0.0, 0
    ends = sorted({plan.steps * (n + 1) // plan.evaluations for n in range(plan.evaluations)} - {0})
    for end in ends:
        began = time.perf_counter()
        while step < end:
            loss, assignments_LE = _step(model, optimizer, data.batch(step), rate(plan, step))
            losses.append(loss)
            loads.append(assignments_LE)
            step += 1
        _wait(device)
        clock += time.perf_counter() - began
        held_out = evaluate(model, data)
        points.append({"step": step, "seconds": clock, "held_out_loss": held_out})
        speed = step * plan.sequences * plan.length / clock
        print(
            f"{name}: step {step}/{plan.steps}  loss {losses[-1].item():.4f}  held out {held_out:.4f}  "
            f"{clock:.1f} s  {speed:,.0f} tokens/s",
            flush=True,
        )
        if not math.isfinite(held_out) or time.perf_counter() > until:
            break
    loads_SLE = torch.stack(loads).cpu()
    curve = torch.stack(losses).tolist()
    last = max(1, step // 20)
    figures = {
        "name": name,
        "parameters": sum(p.numel() for p in model.parameters()),
        "cut": step < plan.steps,
        "steps": step,
        "tokens": step * plan.sequences * plan.length,
        "seconds": clock,
        "warm_up_seconds": warm_up,
        "tokens_per_second": step * plan.sequences * plan.length / clock,
        "peak_bytes": torch.cuda.max_memory_allocated() if device.type == "cuda" else 0,
        "loss": sum(curve[-last:]) / last,
        "held_out_loss": points[-1]["held_out_loss"],
        # Its weights with no token dropped, where its layers drop.
        "held_out_loss_dropless": evaluate(model, data, dropless=True),
        "curve": curve,
        "points": points,
        "load": _load_curve(loads_SLE),
    }
    return figures, loads_SLE


def _step(
    model: Transformer, optimizer: AdamW, batch: tuple[Tensor, Tensor], learning_rate: float
) -> tuple[Tensor, Tensor]:
    """One optimizer step: its loss without the router's (a scalar on the device) and assignments [L, E]."""
    c = model.config
    model.train()
    tokens_BS, target_BS = batch
    hidden = model.hidden(tokens_BS)
    logits_NV = F.linear(hidden.states, model.head_weight).flatten(0, 1)
    loss = F.cross_entropy(logits_NV.float(), target_BS.flatten())
    balance, z = router_losses(hidden.router, c.experts_chosen, tokens=tokens_BS.numel())
    total = loss + c.balance_loss_weight * balance + c.router_z_loss_weight * z
    total.backward()  # type: ignore[no-untyped-call]
    set_learning_rate(optimizer, learning_rate)
    optimizer.step(gradient_scale=(1 / (optimizer.gradient_norm() + 1e-6)).clamp(max=1.0))
    optimizer.zero_grad()
    if c.router_bias_rate is not None:
        move_biases(model, hidden.router.assignments)
    return loss.detach(), hidden.router.assignments


@torch.no_grad()
def evaluate(model: Transformer, data: Data, dropless: bool = False) -> float:
    """Mean loss a token on the held-out sequences (nats). dropless: layers that drop tokens do not."""
    model.eval()
    layers = [module for module in model.modules() if isinstance(module, CapacityMoE)]
    for layer in layers:
        layer.dropping = not dropless
    total = torch.zeros((), device=data.device)
    batches = data.held_out_batches()
    # Eagerly: a graph of its own would be compiled for what takes a second.
    with torch.compiler.set_stance("force_eager") if data.plan.compiled else contextlib.nullcontext():
        for tokens_BS, target_BS in batches:
            logits = F.linear(model.hidden(tokens_BS).states, model.head_weight)
            total += F.cross_entropy(logits.flatten(0, 1).float(), target_BS.flatten())
    for layer in layers:
        layer.dropping = True
    return float(total) / len(batches)


def _load_curve(loads_SLE: Tensor) -> dict[str, list[float]]:
    """A value a step: load_max, the fullest expert over the mean, mean of layers and worst; entropy; dead experts."""
    steps = [load_metrics(load_LE) for load_LE in loads_SLE]
    return {
        "max_mean": [sum(m["expert_load_max"]) / len(m["expert_load_max"]) for m in steps],
        "max_worst": [m["expert_load_max_worst"] for m in steps],
        "entropy": [m["expert_entropy"] for m in steps],
        "dead": [m["dead_experts"] for m in steps],
    }


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def tail(values: Sequence[float], share: float = 0.1) -> float:
    """The mean of the last tenth."""
    count = max(1, round(len(values) * share))
    return sum(values[-count:]) / count


def arguments(description: str | None, *, steps: int, seconds: float) -> argparse.ArgumentParser:
    """The flags that the trainings have in common."""
    parser = argparse.ArgumentParser(
        description=(description or "").splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--tokens", type=Path, default=FILE, help="token file, made by benchmarks/tokens.py")
    parser.add_argument("--steps", type=int, default=steps, help="optimizer steps of each contestant (count)")
    parser.add_argument("--seconds", type=float, default=seconds, help="after which it ends, whatever is done (s)")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and of the order of the data (number)")
    parser.add_argument("--only", nargs="+", help="contestants (default: all)")
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="cpu is for trying it out, with --tiny"
    )
    parser.add_argument("--tiny", action="store_true", help="a model and a batch that a CPU trains in seconds")
    parser.add_argument("--no-compile", action="store_true", help="without torch.compile")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the JSON file and the picture")
    parser.add_argument("--draw", type=Path, metavar="JSON", help="train nothing, draw this file's picture anew")
    return parser


def plan_of(asked: argparse.Namespace, *, learning_rate: float, evaluations: int) -> Plan:
    """What the flags say that all contestants share."""
    return Plan(
        steps=min(asked.steps, 20) if asked.tiny else asked.steps,
        sequences=4 if asked.tiny else 32,
        length=64 if asked.tiny else 1024,
        learning_rate=3e-3 if asked.tiny else learning_rate,
        evaluations=4 if asked.tiny else evaluations,
        held_out_sequences=8 if asked.tiny else 256,
        seed=asked.seed,
        compiled=asked.device == "cuda" and not asked.no_compile,
    )


def shares(names: Sequence[str], until: float) -> Iterator[tuple[str, float]]:
    """Each name with its part of the seconds that are left until a time of time.perf_counter when its turn comes."""
    for number, name in enumerate(names):
        yield name, (until - time.perf_counter()) / (len(names) - number)


def prepare(asked: argparse.Namespace, plan: Plan) -> Data:
    """The data on the device that was asked for. SystemExit where there is none, or a CPU without --tiny."""
    if asked.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("There is no CUDA device; run this where one is, or try it out with --device cpu --tiny.")
    if asked.device == "cpu" and not asked.tiny:
        raise SystemExit("A CPU is for trying the script out; add --tiny.")
    return Data(read(asked.tokens), plan, torch.device(asked.device))


def contestants(asked: argparse.Namespace, known: Sequence[str]) -> list[str]:
    """The names asked for, in their usual order. SystemExit where one is unknown."""
    unknown = sorted(set(asked.only or []) - set(known))
    if unknown:
        raise SystemExit(f"There is no contestant {', '.join(unknown)}; take of {', '.join(known)}.")
    return [name for name in known if not asked.only or name in asked.only]


def smoothed(values: Sequence[float], window: int) -> list[float]:
    """Means over ``window`` values, each at its last one's place, fewer at the start."""
    sums = np.concatenate([[0.0], np.cumsum(np.asarray(values, dtype=float))])
    ends = np.arange(1, len(sums))
    begins = np.maximum(ends - window, 0)
    return [float(v) for v in (sums[ends] - sums[begins]) / (ends - begins)]


def picture(path: Path, panels: Sequence[dict[str, Any]]) -> str:
    """Draw panels beside each other; say where, or why there is no picture.

    A panel: title, x and y (labels), lines {name: (x values, y values)}, optionally log (the y axis).
    """
    try:
        import matplotlib
    except ImportError:
        return "No picture: matplotlib is not installed; draw it elsewhere with --draw and the JSON file."
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(panels), figsize=(6.2 * len(panels), 4.6), squeeze=False)
    for panel, axis in zip(panels, axes[0], strict=True):
        for name, (x, y) in panel["lines"].items():
            axis.plot(x, y, label=name, linewidth=1.2)
        axis.set(title=panel["title"], xlabel=panel["x"], ylabel=panel["y"])
        if panel.get("log"):
            axis.set_yscale("log")
            axis.yaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_minor_formatter("{x:g}")
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return f"Picture: {path}"
