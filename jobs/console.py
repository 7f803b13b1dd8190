"""What jobs print: rich on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console

out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)
# Seconds between lines about the same work, where there is no terminal.
LINE_EVERY = 30


@contextmanager
def working(what: str) -> Iterator[Callable[[str], None]]:
    """A spinner with the elapsed time while the body runs; one line where there is no terminal.

    Gives a function that shows how far the work is: beside the spinner, else as a line now and then.
    """
    start = last = time.monotonic()

    def line(far: str) -> None:
        nonlocal last
        if far and time.monotonic() - last > LINE_EVERY:
            last = time.monotonic()
            out.print(f"  {what}: {last - start:.0f} s, {far}", markup=False)

    if out.is_terminal:
        from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[far]}"),
        )
        with Progress(*columns, console=out, transient=True) as bar:
            task = bar.add_task(what, total=None, far="")
            yield lambda far: bar.update(task, far=far)
    else:
        out.print(f"{what} ...", markup=False)
        yield line
    out.print(f"  {what}: {time.monotonic() - start:.1f} s", markup=False, style="dim")


@contextmanager
def counting(what: str, unit: str) -> Iterator[Callable[[int, int], None]]:
    """A function to call with how much is done and how much there is: a bar on a terminal, else a line at the end."""
    if out.is_terminal:
        from rich.progress import Progress

        with Progress(console=out, transient=True) as bar:
            task = bar.add_task(what, total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)
    else:
        out.print(f"{what} ...", markup=False)
        yield lambda done, total: out.print(f"  {what}: {done:,} {unit}", markup=False) if done == total else None


def done(job: str, status: str, counts: Mapping[str, int]) -> None:
    """One line: the job, how it ended, what it counted; what is zero, and breakdowns (``total.part``), are left to
    ops.runs and the report."""
    counted = _counted({name: n for name, n in counts.items() if n})
    out.print(f"{job}: {status}" + (f" ({counted})" if counted else ""), markup=False)


def unchanged(job: str, totals: Mapping[str, int]) -> None:
    """One line: the job, that it changed nothing, and what the lake holds."""
    counted = _counted(totals)
    out.print(f"{job}: unchanged" + (f"; the lake has {counted}" if counted else ""), markup=False)


def _counted(counts: Mapping[str, int]) -> str:
    """What a run did, and of the same things (``table_``) how many the table holds."""
    did = any(not name.startswith("table_") for name in counts)

    def called(name: str) -> str:
        thing = name.removeprefix("table_")
        return thing.replace("_", " ") + (" in all" if thing != name and did else "")

    return ", ".join(f"{called(name)} {n:,}" for name, n in counts.items() if "." not in name)


def note(text: str) -> None:
    out.print(text, markup=False)


def warn(text: str) -> None:
    err.print(text, markup=False)
