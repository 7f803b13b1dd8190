"""What a piece of work costs a whole tree of processes: CPU seconds, wall seconds and peak memory, stage by stage.

The tree is this process and all that it started, the JVM and its Python workers too. A child that has ended counts for
the parent that waited for it, and one whose parent ended is taken over by this process (Linux, PR_SET_CHILD_SUBREAPER),
so no CPU second is lost. Memory is sampled: a peak shorter than the interval can be missed. Needs psutil alone, so that
the peer's environment can import it. Left out: other systems than Linux.
"""

from __future__ import annotations

import ctypes
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import psutil

INTERVAL = 0.2  # seconds between two looks at the memory
_PR_SET_CHILD_SUBREAPER = 36  # prctl(2)


@dataclass(frozen=True, kw_only=True)
class Usage:
    """One stage: cpu and wall in seconds; memory in bytes.

    tree_bytes: greatest sum of the resident sizes of all processes (pages that forked processes share count in each).
    process_bytes: greatest resident size of one process by role: driver, jvm, worker (any other Python).
    counts: what the stage said that it did.
    """

    stage: str
    cpu: float
    wall: float
    tree_bytes: int
    process_bytes: dict[str, int]
    counts: dict[str, int]


@dataclass(kw_only=True)
class Meter:
    """The usage of the stages that ran, in order. One at a time in a process, from the thread that starts the work."""

    stages: list[Usage] = field(default_factory=list)

    def __post_init__(self) -> None:
        if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "prctl refused to adopt orphaned processes")

    @contextmanager
    def stage(self, name: str) -> Iterator[dict[str, int]]:
        """Measure the body as a stage; the body may fill in its counts."""
        counts: dict[str, int] = {}
        sampler = _Sampler()
        sampler.start()
        wall, cpu = time.perf_counter(), tree_cpu()
        yield counts
        cpu, wall = tree_cpu() - cpu, time.perf_counter() - wall
        tree_bytes, process_bytes = sampler.finish()
        self.stages.append(
            Usage(stage=name, cpu=cpu, wall=wall, tree_bytes=tree_bytes, process_bytes=process_bytes, counts=counts)
        )


def reap(timeout: float = 60) -> None:
    """Wait until all that this process started, or took over, has ended; their CPU seconds are then its own.

    For a stage that is a command: its JVM outlives it by a moment, in which it counts for the next stage, too.
    """
    until = time.monotonic() + timeout
    while (children := psutil.Process().children()) and time.monotonic() < until:
        for child in children:
            with suppress(ChildProcessError):
                os.waitpid(child.pid, os.WNOHANG)
        time.sleep(0.05)


def tree_cpu() -> float:
    """CPU seconds, user and system, of this process and its descendants so far, ended and awaited ones included."""
    return sum(sum(times[:4]) for _, times in _each("cpu_times"))


def _each(what: str) -> Iterator[tuple[psutil.Process, Any]]:
    """A figure of this process and of each descendant; one that ends meanwhile is passed over."""
    this = psutil.Process()
    for process in [this, *this.children(recursive=True)]:
        try:
            yield process, getattr(process, what)()
        except psutil.NoSuchProcess:
            continue


class _Sampler(threading.Thread):
    """Looks at the tree's resident sizes until it is told to finish."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._done = threading.Event()
        self._tree = 0
        self._roles: dict[str, int] = {}

    def run(self) -> None:
        self._look()
        while not self._done.wait(INTERVAL):
            self._look()

    def finish(self) -> tuple[int, dict[str, int]]:
        self._done.set()
        self.join()
        self._look()
        return self._tree, dict(sorted(self._roles.items()))

    def _look(self) -> None:
        total = 0
        for process, memory in _each("memory_info"):
            role = _role(process)
            if role is None:
                continue
            total += memory.rss
            self._roles[role] = max(self._roles.get(role, 0), memory.rss)
        self._tree = max(self._tree, total)


def _role(process: psutil.Process) -> str | None:
    """driver, jvm or worker; None for a fork of the JVM that is no other program yet: its memory is the JVM's."""
    if process == psutil.Process():
        return "driver"
    try:
        if not _is_java(process):
            return "worker"
        parent = process.parent()
        return None if parent is not None and _is_java(parent) else "jvm"
    except psutil.Error:
        return None


def _is_java(process: psutil.Process) -> bool:
    return os.path.basename(process.exe()) == "java"
