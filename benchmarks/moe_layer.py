"""The dropless mixture-of-experts layer beside an equal dense layer and other ways to compute it, on one GPU.

    python benchmarks/moe_layer.py                                   # six shapes, every contestant, balanced routing
    python benchmarks/moe_layer.py --shapes dbrx,7b --peers dense,lakemoe --profile
    python benchmarks/moe_layer.py --shapes dbrx,mixtral --tokens 1,8,64 --forward-only --graph
    python benchmarks/moe_layer.py --skew 0,1 --peers dense,padded,lakemoe
    python benchmarks/moe_layer.py --device cpu --quick              # tries the script out; no measurement

`dense` (benchmarks/moe_peers.py) is one unfused SwiGLU by cuBLAS, T tokens through width K*F: the same multiply-adds,
6*T*K*D*F forward and 12*T*K*D*F backward. Router, softmax and top-k, with their gradients, are on every clock, dense's
too. Forward is training's: it keeps what backward needs. Backward gives the gradients of x, router, w1, v1 and w2.

Before it is timed, each contestant's output and gradients of the very batch that is timed are held to float64 on
unit-scale inputs (benchmarks/moe_truth.py); one that is wrong, fails or runs out of memory is reported and not timed.

`saved` are the distinct storages that the experts' part keeps for backward without the weights: input, pre-activations,
routing metadata, whatever else it keeps. The router's softmax, alike for all, is not in it. `peak` is the most that
forward and backward allocate at once beyond inputs and weights, gradients included. `first call` is the wall-clock
time of lakemoe's first forward and backward at a shape less that of a later one, with an empty compilation cache unless
TRITON_CACHE_DIR is set; `new T` is the same at another number of tokens with the rest alike.

Legend: T tokens, D model width, F expert width, E experts, K chosen experts a token, N = T*K.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

from benchmarks import gpu
from benchmarks.gpu import Clock, Spread, errors, judge
from benchmarks.moe_peers import Contestant, contestants
from benchmarks.moe_truth import NAMES, Case, Sample, Shape, choose, make_case, sampled

SHAPES = {
    "dbrx": Shape(T=8192, D=6144, F=10752, E=16, K=4, targets=(1.04, 1.02), saved_gib=1.41),
    "mixtral": Shape(T=16384, D=4096, F=14336, E=8, K=2, targets=(1.05, 1.03), saved_gib=1.9),
    "olmoe": Shape(T=32768, D=2048, F=1024, E=64, K=8, targets=(1.00, 1.00), saved_gib=1.13),
    "qwen3moe": Shape(T=32768, D=2048, F=768, E=128, K=8, targets=(1.02, 1.00), saved_gib=0.88),
    "30b": Shape(T=32768, D=4096, F=1024, E=128, K=8, targets=(1.00, 1.00), saved_gib=1.26),
    "7b": Shape(T=32768, D=1536, F=256, E=128, K=8, targets=(0.95, 0.97), saved_gib=0.35),
}
TINY = {name: replace(shape, T=96, D=64, F=48, E=8, targets=None, saved_gib=None) for name, shape in SHAPES.items()}


@dataclass(frozen=True)
class Runs:
    """A contestant made ready for one case."""

    experts: Callable[[], Tensor]  # with the experts chosen beforehand
    forward: Callable[[], tuple[Tensor, ...]]
    both: Callable[[], tuple[Tensor, ...]]
    check: Callable[[], dict[str, Tensor]]  # output and gradients by name
    weights: tuple[Tensor, ...]


def dense_case(case: Case) -> Case:
    """The tokens through one expert as wide as the K that they choose together, with weight 1."""
    T, K = case.index_TK.shape
    _, F, D = case.w1_EFD.shape
    return replace(
        case,
        w1_EFD=case.w1_EFD[:K].reshape(1, K * F, D),
        v1_EFD=case.v1_EFD[:K].reshape(1, K * F, D),
        w2_EFD=case.w2_EFD[:K].reshape(1, K * F, D),
        index_TK=case.index_TK.new_zeros(T, 1),
        weight_TK=case.weight_TK.new_ones(T, 1),
    )


def ready(contestant: Contestant, case: Case) -> Runs:
    """The calls of a contestant; dense has no experts to choose, its router stands beside it."""
    is_dense = contestant.name == "dense"
    own = dense_case(case) if is_dense else case
    K = case.index_TK.shape[1]
    prepared = contestant.prepare(own.w1_EFD, own.v1_EFD, own.w2_EFD)
    leaves = tuple(w.detach().requires_grad_() for w in prepared)
    x_TD = own.x_TD.detach().requires_grad_()
    routed_TD = case.x_TD.detach().requires_grad_() if is_dense else x_TD
    router_ED = case.router_ED.detach().requires_grad_()
    weight_TK = own.weight_TK.detach().requires_grad_()
    # The router learns from its weights' gradient: the layer's own where it has one, dense's from a tensor like it.
    dweight_TK = torch.ones_like(case.weight_TK)

    def experts() -> Tensor:
        return contestant.experts(x_TD, own.index_TK, weight_TK, *leaves)

    def forward() -> tuple[Tensor, ...]:
        index_TK, chosen_TK = choose(routed_TD, router_ED, K)
        y_TD = contestant.experts(x_TD, index_TK, chosen_TK, *leaves)
        return (y_TD, chosen_TK) if is_dense else (y_TD,)

    def both() -> tuple[Tensor, ...]:
        inputs = [x_TD, router_ED, *leaves, *([routed_TD] if is_dense else [])]
        return torch.autograd.grad(forward(), inputs, [own.dy_TD, dweight_TK] if is_dense else [own.dy_TD])

    def check() -> dict[str, Tensor]:
        y_TD = experts()
        inputs = (x_TD, weight_TK, *leaves)
        dx, dweight, *rest = torch.autograd.grad(y_TD, inputs, own.dy_TD, allow_unused=True)
        results = dict(zip(NAMES, (y_TD.detach(), dx, dweight, *contestant.gradients(rest)), strict=True))
        return {name: result for name, result in results.items() if result is not None}

    return Runs(experts, forward, both, check, leaves)


def check_all(
    entrants: Sequence[Contestant], case: Case, dtype: torch.dtype
) -> tuple[list[Contestant], dict[str, dict[str, Any]]]:
    """The contestants whose results are right, and each one's errors or why it is out."""
    report: dict[str, dict[str, Any]] = {}
    right = []
    sets: dict[bool, tuple[Sample, dict[str, Tensor], dict[str, float]]] = {}
    for contestant in entrants:
        is_dense = contestant.name == "dense"
        if is_dense not in sets:
            own = dense_case(case) if is_dense else case
            sample = Sample.of(own)
            truth = sampled(own, sample, torch.float64)
            sets[is_dense] = (sample, truth, errors(sampled(own, sample, dtype), truth))
            del own
            gpu.release()
        sample, truth, unfused = sets[is_dense]

        def measure(
            contestant: Contestant = contestant, sample: Sample = sample, truth: dict[str, Tensor] = truth
        ) -> dict[str, float]:
            results = ready(contestant, case).check()
            found = errors(sample.take(results), truth)
            # The sample bounds the error; that no number is missing is asked of all.
            missing = [
                name for name, result in results.items() if not bool(torch.isfinite(result.sum(dtype=torch.float32)))
            ]
            return found | dict.fromkeys(missing, float("inf"))

        found, why = gpu.attempt(measure)
        gpu.release()
        if found is None:
            report[contestant.name] = {"status": f"failed: {why}"}
        else:
            wrong = judge(found, unfused, dtype)
            status = f"wrong: {', '.join(wrong)}" if wrong else "right"
            report[contestant.name] = {"status": status, "errors": found, "unfused_errors": unfused}
            if not wrong:
                right.append(contestant)
        print(f"  checked {contestant.name}: {report[contestant.name]['status']}", flush=True)
    return right, report


def first_call(contestant: Contestant, case: Case, clock: Clock) -> dict[str, float]:
    """Seconds of compilation at a new shape, and then at a new number of tokens."""
    T = case.x_TD.shape[0]
    fewer = max(1, T - max(1, T // 16))
    cut = {name: getattr(case, name)[:fewer] for name in ("x_TD", "dy_TD", "index_TK", "weight_TK")}
    seconds = {}
    for name, these in (("first_call_seconds", case), ("new_tokens_seconds", replace(case, **cut))):
        both = ready(contestant, these).both
        first = gpu.wall_seconds(both, clock)
        seconds[name] = first - gpu.wall_seconds(both, clock)
    return seconds


def measure(entrants: Sequence[Contestant], case: Case, shape: Shape, clock: Clock, asked: argparse.Namespace) -> Any:
    """Everything about the contestants that are right, by name."""
    runs = {c.name: ready(c, case) for c in entrants}
    figures: dict[str, dict[str, Any]] = {name: {} for name in runs}
    touched = int((torch.bincount(case.index_TK.reshape(-1), minlength=shape.E) > 0).sum())
    weight_bytes = 3 * touched * shape.D * shape.F * case.x_TD.element_size()
    for kind, factor in (("forward", 1), ("both", 3)):
        if kind == "both" and asked.forward_only:
            continue
        calls: dict[str, Callable[[], object]] = {name: getattr(run, kind) for name, run in runs.items()}
        refused = {}
        if asked.graph:
            made = {name: gpu.attempt(partial(gpu.captured, call, clock)) for name, call in calls.items()}
            refused = {name: why for name, (call, why) in made.items() if call is None}
            calls = {name: call for name, (call, _) in made.items() if call is not None}
        times, failed = gpu.interleave(calls, asked.repeats, clock)
        failed |= refused
        for name, why in failed.items():
            figures[name]["status"] = f"failed: {why}"
        for name, seconds in times.items():
            figures[name][kind] = {
                "seconds": asdict(Spread.of(seconds)),
                "tflops": asdict(Spread.of([factor * shape.forward_flops / s / 1e12 for s in seconds])),
            }
            if "dense" in times:
                figures[name][kind]["ratio"] = asdict(gpu.ratios(times["dense"], seconds))
            if kind == "forward" and name != "dense":  # what small batches are bound by
                figures[name][kind]["weights_tb_s"] = asdict(Spread.of([weight_bytes / s / 1e12 for s in seconds]))
    for name, run in runs.items():
        saved, _ = gpu.attempt(partial(gpu.saved_bytes, run.experts, run.weights))
        peak, _ = gpu.attempt(partial(gpu.peak_bytes, run.forward if asked.forward_only else run.both, clock))
        figures[name] |= {"saved_bytes": saved, "peak_bytes": peak}
    return figures


def show(title: str, shape: Shape, report: dict[str, dict[str, Any]], balanced: bool) -> None:
    """The table of one shape."""

    def cell(found: dict[str, Any], kind: str, figure: str, pattern: str) -> str:
        return Spread(**found[kind][figure]).show(pattern) if figure in found.get(kind, {}) else "-"

    print(f"\n{title}  (median and quartiles; ratio: times as fast as dense)")
    header = ("forward TFLOP/s", "ratio", "fwd+bwd TFLOP/s", "ratio")
    print(f"  {'':20}" + "".join(f"{h:>24}" for h in header) + f"{'saved GiB':>11}{'peak GiB':>10}{'weights TB/s':>18}")
    for name, found in report.items():
        if "forward" not in found:
            print(f"  {name:20}{found['status']}")
            continue
        columns = [(k, *f) for k in ("forward", "both") for f in (("tflops", "{:.1f}"), ("ratio", "{:.3f}"))]
        cells = [cell(found, *column) for column in columns]
        memory = [f"{(found.get(key) or 0) / 2**30:.3f}" for key in ("saved_bytes", "peak_bytes")]
        speed = cell(found, "forward", "weights_tb_s", "{:.2f}")
        print(f"  {name:20}" + "".join(f"{c:>24}" for c in cells) + f"{memory[0]:>11}{memory[1]:>10}{speed:>18}")
    ours = report.get("lakemoe", {})
    if "first_call_seconds" in ours:
        print(f"  lakemoe: first call {ours['first_call_seconds']:.1f} s, new T {ours['new_tokens_seconds']:.1f} s")
    if balanced and shape.targets:
        for kind, target in zip(("forward", "both"), shape.targets, strict=True):
            if "ratio" in ours.get(kind, {}):
                ratio = ours[kind]["ratio"]["median"]
                print(f"  target {kind} >= {target}: {ratio:.3f}, {'reached' if ratio >= target else 'MISSED'}")
        if shape.saved_gib and ours.get("saved_bytes"):
            saved = ours["saved_bytes"] / 2**30
            reached = "reached" if saved <= shape.saved_gib else "MISSED"
            print(f"  target saved <= {shape.saved_gib} GiB: {saved:.3f}, {reached}")


def run_shape(
    name: str, shape: Shape, skew: float, entrants: Sequence[Contestant], clock: Clock, asked: argparse.Namespace
) -> dict[str, Any]:
    """Check, time and print one shape; its entry of the report."""
    device, dtype = torch.device(asked.where), getattr(torch, asked.dtype)
    title = f"{name}: T={shape.T} D={shape.D} F={shape.F} E={shape.E} K={shape.K}, {asked.dtype}, skew {skew:g}"
    print(f"\n{title}", flush=True)
    torch.compiler.reset()  # its limit of compilations is for one program's life, not for a benchmark of many shapes
    case = make_case(shape, dtype, device, skew)
    loads_E = torch.bincount(case.index_TK.reshape(-1), minlength=shape.E)
    ours = next((c for c in entrants if c.name == "lakemoe"), None)
    compiled, why = gpu.attempt(partial(first_call, ours, case, clock)) if ours else (None, "")
    if why:
        print(f"  lakemoe's first call failed: {why}")
    right, report = check_all(entrants, case, dtype)
    for contestant, found in measure(right, case, shape, clock, asked).items():
        report[contestant] |= found
    if "lakemoe" in report:
        report["lakemoe"] |= compiled or {}
    show(title, shape, report, balanced=skew == 0 and shape.T == SHAPES[name].T)
    if asked.profile:
        for contestant in right:
            if contestant.name in ("dense", "lakemoe"):
                calls = ready(contestant, case)
                rows = gpu.profile(calls.forward if asked.forward_only else calls.both, clock)
                gpu.print_profile(f"{name}, {contestant.name}", rows)
                report[contestant.name]["profile"] = rows
    sizes = {key: getattr(shape, key) for key in "TDFEK"}
    loads = {"least": int(loads_E.min()), "greatest": int(loads_E.max())}
    return {"shape": name, **sizes, "skew": skew, "dtype": asked.dtype, "loads": loads, "contestants": report}


def picture(path: Path, results: Sequence[dict[str, Any]]) -> str:
    panels: dict[str, dict[str, dict[str, float]]] = {}
    for kind, title in (("forward", "forward"), ("both", "forward + backward")):
        for result in results:
            group = f"{result['shape']}\nT={result['T']}" + (f" skew {result['skew']:g}" if result["skew"] else "")
            for name, found in result["contestants"].items():
                if kind in found:
                    values = panels.setdefault(title, {}).setdefault(name, {})
                    values[group] = found[kind]["tflops"]["median"]
    return gpu.bars(path, panels, "TFLOP/s") if panels else "No picture: nothing was timed."


def arguments() -> argparse.Namespace:
    def words(text: str) -> list[str]:
        return [word for word in text.split(",") if word]

    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--shapes", type=words, default=list(SHAPES), help="names, with commas between")
    parser.add_argument(
        "--peers", type=words, help="contestants, with commas between; default: all that can be imported"
    )
    parser.add_argument("--skew", type=lambda t: [float(w) for w in words(t)], default=[0.0], help="Zipf exponents")
    parser.add_argument("--tokens", type=lambda t: [int(w) for w in words(t)], help="T instead of the shape's own")
    parser.add_argument("--repeats", type=int, default=20, help="rounds (count)")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16", help="of the layer")
    parser.add_argument("--forward-only", action="store_true", help="time no backward")
    parser.add_argument(
        "--graph", action="store_true", help="time a CUDA graph of each: no host, no gaps of its making"
    )
    parser.add_argument("--profile", action="store_true", help="print the kernels' times of lakemoe and dense")
    parser.add_argument("--quick", action="store_true", help="three rounds; on a CPU also tiny shapes")
    parser.add_argument("--device", dest="where", choices=("cuda", "cpu"), default="cuda", help="where it runs")
    parser.add_argument("--out", type=Path, default=gpu.OUT, help="folder of the JSON and PNG files")
    asked = parser.parse_args()
    asked.repeats = min(asked.repeats, 3) if asked.quick else asked.repeats
    for flag, given, known in (("--shapes", asked.shapes, SHAPES), ("--peers", asked.peers or [], contestants())):
        if unknown := [word for word in given if word not in known]:
            parser.error(f"{flag}: {', '.join(unknown)} is not known or not installed; choose from {', '.join(known)}")
    if asked.repeats < 1 or min(asked.tokens or [1]) < 1:
        parser.error("--repeats and --tokens must be at least 1")
    return asked


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="lakemoe-triton-") as cache:
        os.environ.setdefault("TRITON_CACHE_DIR", cache)
        return run(arguments())


def run(asked: argparse.Namespace) -> int:
    device = gpu.device_of(asked.where, asked.quick)
    known = contestants()
    if device.type == "cpu":
        print("On a CPU, tiny shapes: this tries the script out; it is NOT A MEASUREMENT.")
        asked.peers = asked.peers or [name for name in known if name != "grouped_mm_compiled"]
    entrants = [known[name] for name in (asked.peers or known)]
    clock = Clock(device)
    report: dict[str, Any] = {"machine": gpu.machine(device), "argv": sys.argv[1:], "results": []}
    print(f"{report['machine']}")
    for skew in asked.skew:
        for name in asked.shapes:
            shape = (SHAPES if device.type == "cuda" else TINY)[name]
            for T in asked.tokens or [shape.T]:
                entry = run_shape(name, replace(shape, T=T), skew, entrants, clock, asked)
                report["results"].append(entry)
                path = gpu.write(asked.out, "moe_layer", report)
                gpu.release()
    print(f"\nFigures: {path}\n{picture(path.with_suffix('.png'), report['results'])}")
    ours = [r["contestants"].get("lakemoe", {"status": "right"})["status"] for r in report["results"]]
    return 0 if all(status == "right" for status in ours) else 1


if __name__ == "__main__":
    sys.exit(main())
