"""What the page's template lays out, and how numbers are written: texts and cells, nothing counted."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime

from pipelines.report.charts import Chart

NONE = "–"
_NO_BREAK = "\u00a0"


@dataclass(frozen=True, kw_only=True)
class TableView:
    """words: the columns that hold words, not numbers; the first, a row's name, does. total: the last row is a sum."""

    id: str
    caption: str
    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    words: tuple[int, ...] = (0,)
    total: bool = False
    note: str = ""

    def is_number(self, column: int) -> bool:
        return column not in self.words


@dataclass(frozen=True, kw_only=True)
class BarView:
    """One bar of the funnel. shares: percent of its track, text and code."""

    label: str
    shares: tuple[float, ...]
    dropped: bool


@dataclass(frozen=True, kw_only=True)
class ChartGroup:
    title: str
    charts: tuple[Chart, ...]


@dataclass(frozen=True, kw_only=True)
class SampleView:
    """text: the beginning of a document; more: whether the document goes on."""

    head: str
    note: str
    text: str
    more: bool


@dataclass(frozen=True, kw_only=True)
class SampleGroup:
    """Folded up until it is asked for."""

    title: str
    note: str
    samples: tuple[SampleView, ...]


@dataclass(frozen=True, kw_only=True)
class Tile:
    name: str
    value: str
    note: str


@dataclass(frozen=True, kw_only=True)
class Notice:
    """What is missing or behind, and the commands that make it."""

    text: str
    commands: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Section:
    """narrow: its tables stand beside each other where the window is wide."""

    id: str
    title: str
    paragraphs: tuple[str, ...] = ()
    bars: tuple[BarView, ...] = ()
    tables: tuple[TableView, ...] = ()
    narrow: bool = False
    charts: tuple[ChartGroup, ...] = field(default=())
    samples: tuple[SampleGroup, ...] = ()


def number(value: int | None) -> str:
    """1234567 gives 1,234,567; None gives a dash."""
    return NONE if value is None else f"{value:,}"


def share(part: int | None, whole: int | None) -> str:
    """Percent with one decimal; a dash where there is no whole."""
    if part is None or not whole:
        return NONE
    if 0 < part < whole / 2000:
        return f"<{_NO_BREAK}0.1{_NO_BREAK}%"
    return f"{100 * part / whole:.1f}{_NO_BREAK}%"


def ratio(part: int, whole: int) -> str:
    """With two decimals; a dash where there is no whole."""
    return f"{part / whole:,.2f}" if whole else NONE


def time(value: datetime | None) -> str:
    """To the second, as it is stored: UTC."""
    return NONE if value is None else value.strftime("%Y-%m-%d %H:%M:%S")


def duration(start: datetime, end: datetime | None) -> str:
    """41 s, 3 min 05 s, 2 h 10 min."""
    if end is None:
        return NONE
    seconds = round((end - start).total_seconds())
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02} min"
