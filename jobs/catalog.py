"""The jobs by name: what each does in one line, and the module that holds it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Job:
    module: str
    help: str


JOBS: dict[str, Job] = {
    "describe": Job("jobs.describe", "parameters and memory of a model preset, without allocating it"),
}
