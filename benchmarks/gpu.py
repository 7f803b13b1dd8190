"""What the benchmarks of kernels share: fair times on one device, ratios with spread, memory, a profile, a JSON file.

Times are of CUDA events around one call. Before each call a buffer ten times the L2 cache is overwritten three times,
so that nothing of the inputs is cached and the processor's launches are ahead of the device when the call begins.
Contestants run in turn within a round, and each round begins with the next of them; a ratio is taken within a round.
Reported are the median and the quartiles. On a CPU (the scripts' tests) it is wall-clock time, and no measurement.

Before a contestant is timed its results are held to float64, and its errors to those of the plain computation in the
same dtype. It imports torch alone; matplotlib only where it draws. Left out: what is compared.
"""

from __future__ import annotations

import gc
import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

OUT = Path(__file__).resolve().parent / "out"
_HEAD_START = 5_000_000  # cycles, some milliseconds
_SCRATCH_BYTES = 512 << 20
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Of one figure over the rounds: the median and the quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        if len(values) < 2:
            return cls(median=values[0], low=values[0], high=values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median=median, low=low, high=high)

    def show(self, pattern: str) -> str:
        """Median (quartiles)."""
        return f"{pattern.format(self.median)} ({pattern.format(self.low)}-{pattern.format(self.high)})"


class Clock:
    """Seconds that one call takes on a device, from cold caches."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self._scratch = torch.empty(_SCRATCH_BYTES if self.cuda else 0, dtype=torch.uint8, device=device)

    def seconds(self, call: Callable[[], object]) -> float:
        if not self.cuda:
            begin = time.perf_counter()
            call()
            return time.perf_counter() - begin
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        for _ in range(3):
            self._scratch.zero_()
        # Meanwhile the host gets ahead, as in training: what is timed are kernels, not their launches.
        torch.cuda._sleep(_HEAD_START)  # type: ignore[no-untyped-call]
        start.record()
        result = call()
        end.record()
        end.synchronize()
        del result
        return float(start.elapsed_time(end)) / 1e3

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()


def wall_seconds(call: Callable[[], object], clock: Clock) -> float:
    """Wall-clock seconds of a call with all that it compiles, until the device is done."""
    clock.wait()
    begin = time.perf_counter()
    call()
    clock.wait()
    return time.perf_counter() - begin


def attempt(call: Callable[[], T]) -> tuple[T | None, str]:
    """(the call's result, "") or (None, why there is none), with the memory given back; one peer never ends a run."""
    why = ""
    try:
        return call(), ""
    except torch.OutOfMemoryError:
        why = "out of memory"
    except Exception as error:
        why = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"
    release()
    return None, why


def captured(call: Callable[[], object], clock: Clock) -> Callable[[], object]:
    """The call as a CUDA graph, to be replayed: what a server of few tokens does about the host's part."""
    if not clock.cuda:
        return call
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = call()

    def replay() -> object:
        graph.replay()
        return kept

    return replay


def release() -> None:
    """Free what is no longer used."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def errors(found: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, float]:
    """Of each result the largest error, relative to the truth's largest entry; infinite where a number is missing."""
    relative = {}
    for name, result in found.items():
        exact = truth[name]
        error = (result.double() - exact).abs().max() / exact.abs().max().clamp(min=1e-300)
        relative[name] = float(error) if bool(torch.isfinite(error)) else float("inf")
    return relative


def judge(found: dict[str, float], plain: dict[str, float], dtype: torch.dtype) -> list[str]:
    """The results whose error is beyond twice the plain computation's (a largest error is a matter of luck)."""
    slack = torch.finfo(dtype).eps * (4 if dtype == torch.float32 else 0.25)
    return [name for name, error in found.items() if not error <= 2 * plain[name] + slack]


def interleave(
    calls: dict[str, Callable[[], object]], rounds: int, clock: Clock, warm_up: int = 3
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Seconds of each call in each round, and why a call that failed was left out."""
    alive, failed = dict(calls), dict[str, str]()
    times: dict[str, list[float]] = {name: [] for name in calls}

    def once(name: str, keep: bool) -> None:
        seconds, why = attempt(lambda: clock.seconds(alive[name]))
        if seconds is None:
            del alive[name], times[name]
            failed[name] = why
        elif keep:
            times[name].append(seconds)

    for name in list(calls):
        for _ in range(warm_up):
            if name in alive:
                once(name, keep=False)
    for turn in range(rounds):
        names = list(alive)
        first = turn % max(1, len(names))
        for name in names[first:] + names[:first]:
            once(name, keep=True)
    return times, failed


def ratios(base: Sequence[float], other: Sequence[float]) -> Spread:
    """How many times faster `other` is than `base`, round by round."""
    return Spread.of([b / o for b, o in zip(base, other, strict=True)])


def saved_bytes(forward: Callable[[], object], exclude: Sequence[Tensor]) -> int:
    """Bytes of the distinct storages that autograd keeps for backward, those of `exclude` not counted."""
    known = {t.untyped_storage().data_ptr() for t in exclude}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # the tensor itself would keep its own graph alive

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()
    del result
    return sum(kept.values())


def peak_bytes(call: Callable[[], object], clock: Clock) -> int:
    """The most bytes that a call has allocated at once, beyond what was there before it; 0 on a CPU."""
    if not clock.cuda:
        return 0
    clock.wait()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = call()
    clock.wait()
    del result
    return torch.cuda.max_memory_allocated() - before


def profile(call: Callable[[], object], clock: Clock, rows: int = 25) -> list[tuple[str, int, float]]:
    """(kernel, launches, milliseconds) of one warm call, the longest first; on a CPU, of its operators."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    call()
    clock.wait()
    with record(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if clock.cuda else [])]) as recorded:
        call()
        clock.wait()
    wanted = "DeviceType.CUDA" if clock.cuda else "DeviceType.CPU"
    found = [
        (e.key, e.count, (e.self_device_time_total if clock.cuda else e.self_cpu_time_total) / 1e3)
        for e in recorded.key_averages()
        if str(e.device_type) == wanted and not e.is_user_annotation  # a region named by hand holds kernels, is none
    ]
    return sorted(found, key=lambda row: -row[2])[:rows]


def print_profile(title: str, rows: Sequence[tuple[str, int, float]]) -> None:
    total = sum(row[2] for row in rows)
    print(f"\n  {title}: {total:.3f} ms in the kernels below")
    for name, count, milliseconds in rows:
        print(f"  {milliseconds:9.3f} ms {milliseconds / max(total, 1e-9):6.1%} {count:5d} x  {name[:100]}")


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures depend on beside the code."""
    known: dict[str, Any] = {
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": _triton_version(),
        "device": "CPU: these times are no measurement",
    }
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        known |= {
            "device": card.name,
            "memory_bytes": card.total_memory,
            "multiprocessors": card.multi_processor_count,
            "l2_bytes": card.L2_cache_size,
        }
    return known


def _triton_version() -> str:
    try:
        import triton
    except ImportError:
        return "not installed"
    return str(triton.__version__)


def device_of(name: str, quick: bool) -> torch.device:
    """The device that a benchmark was asked for, or an error that says what to do."""
    if name == "cuda" and not torch.cuda.is_available():
        raise SystemExit("There is no CUDA device; run this where one is, or try it out with --device cpu --quick.")
    if name == "cpu" and not quick:
        raise SystemExit("A CPU is for trying the script out, on tiny shapes; add --quick.")
    return torch.device("cuda", torch.cuda.current_device()) if name == "cuda" else torch.device("cpu")


def write(folder: Path, name: str, report: dict[str, Any]) -> Path:
    """FOLDER/NAME.json, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    partial.replace(path)
    return path


def bars(path: Path, panels: dict[str, dict[str, dict[str, float]]], unit: str) -> str:
    """Draw {panel: {series: {group: value}}} as bars by group; say where, or why there is no picture."""
    try:
        import matplotlib
    except ImportError:
        return "No picture: matplotlib is not installed; the JSON file holds all of it."
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(len(panels), 1, figsize=(12, 4.2 * len(panels)), squeeze=False)
    for (title, series), axis in zip(panels.items(), axes[:, 0], strict=True):
        groups = list(dict.fromkeys(group for values in series.values() for group in values))
        width = 0.84 / max(1, len(series))
        for number, (name, values) in enumerate(series.items()):
            at = [groups.index(group) - 0.42 + (number + 0.5) * width for group in values]
            axis.bar(at, list(values.values()), width, label=name)
        axis.set_xticks(range(len(groups)), groups)
        axis.set_ylabel(unit)
        axis.set_title(title)
        axis.grid(axis="y", alpha=0.3)
        axis.legend(ncols=min(5, max(1, len(series))), fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return f"Picture: {path}"
