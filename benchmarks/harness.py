"""What the benchmarks share: two functions run in turn, their times and ratio with spread, a table and a JSON file.

Each repetition runs ours and the peer one after the other, and the next one in the other order, so that neither always
finds the machine as the other left it. A ratio is taken within a repetition; the median of the ratios and their least
and greatest are what is reported, by wall-clock time and by CPU time (user and system, all threads of the process).
On a machine with other work the ratio of CPU times is the one to trust.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

OUT = Path(__file__).resolve().parent / "out"
PACKAGES = ("lakemoe", "torch", "pyarrow", "deltalake", "tokenizers", "numpy")

out = Console(highlight=False, soft_wrap=True)


class Different(Exception):
    """Ours and the peer do not give the same, so that their times say nothing beside each other."""


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Of one figure over the repetitions."""

    median: float
    least: float
    greatest: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(median=statistics.median(values), least=min(values), greatest=max(values))

    def show(self, pattern: str = "{:.2f}") -> str:
        """Median (least-greatest)."""
        median, least, greatest = (pattern.format(v) for v in (self.median, self.least, self.greatest))
        return f"{median} ({least}-{greatest})"


@dataclass(frozen=True, kw_only=True)
class Result:
    """One claim's figures. Rates are in tokens a second; ratios are ours over the peer's rate, more is better."""

    claim: str
    ours: str
    peer: str
    target: float
    tokens: int
    repetitions: int
    ours_rate: Spread
    peer_rate: Spread
    ours_cpu_rate: Spread
    peer_cpu_rate: Spread
    ratio: Spread
    cpu_ratio: Spread
    notes: dict[str, Any]
    machine: dict[str, Any]
    reached: bool  # whether the median of the ratios of CPU times is at least the target


@dataclass(frozen=True)
class _Time:
    wall: float
    cpu: float


def compare(
    *,
    claim: str,
    ours: tuple[str, Callable[[], object]],
    peer: tuple[str, Callable[[], object]],
    target: float,
    tokens: int,
    repetitions: int,
    notes: dict[str, Any],
) -> Result:
    """Time both, in turn. Each is (what it is, the function); a call handles ``tokens`` tokens."""
    ours_times, peer_times = [], []
    for n in range(repetitions):
        if n % 2 == 0:
            ours_times.append(_time(ours[1]))
            peer_times.append(_time(peer[1]))
        else:
            peer_times.append(_time(peer[1]))
            ours_times.append(_time(ours[1]))
        a, b = ours_times[-1], peer_times[-1]
        out.print(
            f"  {claim} {n + 1}/{repetitions}: ours {tokens / a.wall:,.0f}, peer {tokens / b.wall:,.0f} tokens/s; "
            f"ratio {b.wall / a.wall:.3f}, by CPU time {b.cpu / a.cpu:.3f}",
            markup=False,
        )
    pairs = list(zip(ours_times, peer_times, strict=True))
    cpu_ratio = Spread.of([b.cpu / a.cpu for a, b in pairs])
    return Result(
        claim=claim,
        ours=ours[0],
        peer=peer[0],
        target=target,
        tokens=tokens,
        repetitions=repetitions,
        ours_rate=Spread.of([tokens / t.wall for t in ours_times]),
        peer_rate=Spread.of([tokens / t.wall for t in peer_times]),
        ours_cpu_rate=Spread.of([tokens / t.cpu for t in ours_times]),
        peer_cpu_rate=Spread.of([tokens / t.cpu for t in peer_times]),
        ratio=Spread.of([b.wall / a.wall for a, b in pairs]),
        cpu_ratio=cpu_ratio,
        reached=cpu_ratio.median >= target,
        notes=notes,
        machine=machine(),
    )


def _time(function: Callable[[], object]) -> _Time:
    gc.collect()
    cpu, wall = time.process_time(), time.perf_counter()
    function()
    return _Time(time.perf_counter() - wall, time.process_time() - cpu)


def machine() -> dict[str, Any]:
    """What the figures depend on beside the code."""
    return {
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "load": [round(value, 2) for value in os.getloadavg()],
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
    }


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def rows(results: Sequence[dict[str, Any]]) -> Table:
    """The table of some claims' results, as they stand in their JSON files."""
    # Narrow enough for 80 columns: a ratio that is cut short would be none.
    table = Table(
        title="Millions of tokens a second; ratio of ours to the peer: median (least-greatest)",
        title_justify="left",
        box=SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    table.add_column("claim", no_wrap=True)
    for name in ("ours", "peer", "ratio by wall", "ratio by CPU", "target"):
        table.add_column(name, justify="right", no_wrap=True)
    for r in results:
        rates = [f"{r[side]['median'] / 1e6:,.2f}" for side in ("ours_rate", "peer_rate")]
        ratios = [Spread(**r[kind]).show() for kind in ("ratio", "cpu_ratio")]
        reached = "reached" if r["reached"] else "MISSED"
        table.add_row(r["claim"], *rates, *ratios, f"{r['target']} {reached}")
    return table


def arguments(description: str | None, *, megabytes: float, repetitions: int) -> argparse.ArgumentParser:
    """The flags that every benchmark has."""
    parser = argparse.ArgumentParser(
        description=(description or "").splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--megabytes", type=float, default=megabytes, help="text that it runs on (10^6 bytes of UTF-8)")
    parser.add_argument("--repetitions", type=int, default=repetitions, help="times that each side runs (count)")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the JSON file with the figures")
    return parser


def finish(name: str, folder: Path, measure: Callable[[], Result]) -> int:
    """Run a benchmark, print its table and write FOLDER/NAME.json; the exit code, 1 where the results differ."""
    try:
        result = measure()
    except Different as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 1
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(asdict(result), indent=2) + "\n", encoding="utf-8")
    out.print(rows([asdict(result)]))
    return 0
