"""A bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class TrainingProgress:
    """Shows steps done with loss and tokens a second; a line every ``every`` steps where there is no terminal."""

    def __init__(self, total: int, start: int, every: int, *, quiet: bool = False) -> None:
        self._console = Console(soft_wrap=True, highlight=False, quiet=quiet)
        self._total, self._every = total, every
        self._bar: Progress | None = None
        if self._console.is_terminal and not quiet:
            self._bar = Progress(
                TextColumn("train"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("loss {task.fields[loss]:.3f}  {task.fields[speed]}"),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._task = self._bar.add_task("train", total=total, completed=start, loss=float("nan"), speed="")

    def __enter__(self) -> Self:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()

    def step(self, done: int, line: dict[str, Any]) -> None:
        """``done`` steps are done, the last of them with this line."""
        speed = f"{line['tokens_per_second']:,.0f} tokens/s"
        if "mfu" in line:
            speed += f"  MFU {line['mfu']:.2f}"
        if self._bar:
            self._bar.update(self._task, completed=done, loss=line["loss"], speed=speed)
        elif done % self._every == 0 or done in (1, self._total):
            self.say(f"train: step {done}/{self._total}  loss {line['loss']:.4f}  {speed}")
        if "validation_loss" in line:
            domains = ((name.partition("/")[2], value) for name, value in line.items() if "validation_loss/" in name)
            told = ", ".join(f"{domain} {value:.4f}" for domain, value in domains)
            self.say(
                f"train: step {done}/{self._total}  validation loss {line['validation_loss']:.4f}  {told}".rstrip()
            )

    def say(self, line: str) -> None:
        """A line of its own."""
        self._console.print(line, markup=False)
