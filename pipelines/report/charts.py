"""Figures as drawings: the geometry of a histogram in SVG user units. No text is made here that data could write."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pipelines.report.facts import Histogram

WIDTH, HEIGHT = 300.0, 150.0
LEFT, RIGHT = 8.0, 292.0
TOP, BASE = 34.0, 128.0
_LEAST_HEIGHT = 1.5
_GAP = 1.0


@dataclass(frozen=True, kw_only=True)
class Bar:
    """One bin: the whole bar, and the part of it, from the base, that was rejected. title: what a pointer shows."""

    x: float
    width: float
    y: float
    height: float
    rejected_y: float
    rejected_height: float
    title: str


@dataclass(frozen=True, kw_only=True)
class Mark:
    """A labelled place on the axis. anchor: SVG's text-anchor; row: 0 the upper line of labels, 1 the lower."""

    x: float
    label: str
    anchor: str
    row: int = 0


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A histogram ready to be drawn. summary: the same in a sentence, for who does not see it."""

    title: str
    notes: tuple[str, ...]
    summary: str
    bars: tuple[Bar, ...]
    ticks: tuple[Mark, ...]
    thresholds: tuple[Mark, ...]


def plain(value: float) -> str:
    """A number as short as it is exact to four digits, thousands separated: 0.05, 1.5, 100,000."""
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def compact(value: float) -> str:
    """An axis label: 0.25, 100, 10k, 1M."""
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= unit:
            return f"{value / unit:.3g}{name}"
    return f"{value:.3g}"


def chart(histogram: Histogram, *, title: str, notes: tuple[str, ...]) -> Chart:
    """Lay a histogram out. Heights follow the square root of the counts, so that a thin tail can be seen."""
    marks = [_threshold(histogram, i) for i in range(len(histogram.bounds))]
    words = ", ".join(f"{_SIDES[side][1]} {plain(value)}" for side, value in histogram.bounds)
    summary = f"{title}: {histogram.documents:,} documents, median {plain(histogram.median)}; {words}"
    if any(side != "length" for side, _ in histogram.bounds):
        summary += f"; {histogram.rejected:,} rejected"
    return Chart(
        title=title,
        notes=notes,
        summary=summary + ".",
        bars=tuple(_bars(histogram)),
        ticks=tuple(_ticks(histogram)),
        thresholds=tuple(marks),
    )


_SIDES = {"min": ("≥", "at least"), "max": ("≤", "at most"), "length": ("", "sequence length")}


def _bars(histogram: Histogram) -> list[Bar]:
    edges, bins = histogram.edges, len(histogram.counts)
    step = (RIGHT - LEFT) / bins
    most = max(1, *histogram.counts)
    bars = []
    for i, (count, outside) in enumerate(zip(histogram.counts, histogram.outside, strict=True)):
        if not count:
            continue
        height = max(_LEAST_HEIGHT, (BASE - TOP) * math.sqrt(count / most))
        # A share of the bar, not a root of its own: the two parts stand on one another.
        rejected = height * outside / count
        low = "up to" if i == 0 and histogram.log else f"{plain(edges[i])} to"
        span = f"from {plain(edges[i])}" if i == bins - 1 else f"{low} {plain(edges[i + 1])}"
        bars.append(
            Bar(
                x=round(LEFT + i * step + _GAP / 2, 2),
                width=round(step - _GAP, 2),
                y=round(BASE - height, 2),
                height=round(height - rejected, 2),
                rejected_y=round(BASE - rejected, 2),
                rejected_height=round(rejected, 2),
                title=f"{span}: {count:,} documents" + (f", {outside:,} rejected" if outside else ""),
            )
        )
    return bars


def _place(histogram: Histogram, value: float) -> float:
    low, high = histogram.edges[0], histogram.edges[-1]
    if histogram.log:
        low, high, value = math.log10(low), math.log10(high), math.log10(max(value, low))
    share = min(1.0, max(0.0, (value - low) / (high - low)))
    return round(LEFT + (RIGHT - LEFT) * share, 2)


def _threshold(histogram: Histogram, index: int) -> Mark:
    """The line of a threshold, its label on the side of what it admits where there is room for it."""
    side, value = histogram.bounds[index]
    x = _place(histogram, value)
    leftwards = side == "max"
    if x > LEFT + 0.75 * (RIGHT - LEFT):
        leftwards = True
    elif x < LEFT + 0.25 * (RIGHT - LEFT):
        leftwards = False
    label = f"{_SIDES[side][0]} {plain(value)}".strip()
    return Mark(x=x, label=label, anchor="end" if leftwards else "start", row=index % 2)


def _ticks(histogram: Histogram) -> list[Mark]:
    edges = histogram.edges
    if histogram.log:
        decades = round(math.log10(edges[-1]))
        values = [10.0**i for i in range(0, decades + 1, 2 if decades > 6 else 1)]
    else:
        values = [edges[0] + (edges[-1] - edges[0]) * i / 4 for i in range(5)]
    ticks = []
    for value in values:
        x = _place(histogram, value)
        anchor = "start" if x <= LEFT + 1 else "end" if x >= RIGHT - 1 else "middle"
        ticks.append(Mark(x=x, label=compact(value), anchor=anchor))
    return ticks
