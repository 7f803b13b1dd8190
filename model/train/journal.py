"""What a training leaves beside its checkpoints: run.json (what it is) and metrics.jsonl (one line a step).

The journal is the source of the curve: MLflow gets its lines at checkpoints (model/train/tracking.py), and a resumed
training cuts it back to the step that it resumes from.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from model.errors import ModelError
from model.files import write_json

RUN = "run.json"


@contextlib.contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Hold a training's folder; ModelError (75) where another process does. The lock dies with its process."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("w")
    except OSError as error:
        raise ModelError(f"{folder} cannot be written ({error}); name another output.") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ModelError(
                f"Another training is writing to {folder}; wait for it or name another output.", 75
            ) from None
        yield


def read_run(folder: Path) -> dict[str, Any] | None:
    """run.json, or None where no training began here."""
    try:
        record = json.loads((folder / RUN).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder / RUN} cannot be read ({error}); restore it or name another output.") from error
    if not isinstance(record, dict):
        raise ModelError(f"{folder / RUN} is no training's record; restore it or name another output.")
    return record


def write_run(folder: Path, record: dict[str, Any]) -> None:
    """Replace run.json."""
    write_json(folder / RUN, record)


class Journal:
    """metrics.jsonl: {"step": 1, "time": ms since 1970, "loss": ..., ...} a line."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "metrics.jsonl"

    def cut_to(self, step: int) -> None:
        """Drop the lines after ``step`` and a line that a kill cut short; ModelError where earlier lines lack."""
        if not self.path.exists():
            self.path.touch()
        end, last = 0, 0
        with self.path.open("rb+") as file:
            for line in file:
                try:
                    number = int(json.loads(line)["step"])
                except (ValueError, KeyError, TypeError):
                    break
                if number > step or not line.endswith(b"\n"):
                    break
                end, last = end + len(line), number
            file.truncate(end)
        if last != step:
            raise ModelError(f"{self.path} ends at step {last} where the checkpoint is of step {step}; restore it.")

    def append(self, line: dict[str, Any]) -> None:
        """One step's line."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def flush(self) -> None:
        """To the disk, before a checkpoint that counts on these lines."""
        with self.path.open("a", encoding="utf-8") as file:
            os.fsync(file.fileno())

    def lines(self, after: int = 0, until: int | None = None) -> Iterator[dict[str, Any]]:
        """The lines of the steps after ``after`` up to ``until``."""
        with self.path.open(encoding="utf-8") as file:
            for text in file:
                line = json.loads(text)
                if line["step"] > after and (until is None or line["step"] <= until):
                    yield line
                if line["step"] == until:
                    return  # what follows may be half written: the training goes on meanwhile
