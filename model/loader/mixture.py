"""Which domain each sample is of: weights of domains, by phases of steps (a curriculum).

Sample j of a training is of the domain into whose share of [0, 1) the j-th point of a Weyl sequence falls, j times the
golden ratio's fraction, shifted by the seed: a pure function of (phases, seed, j), and so even that after n samples of
a phase each domain has had its weight times n, up to a few (Kuipers and Niederreiter 1974, chapter 2: the discrepancy
of that sequence is of the order of log n / n).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field

from model.errors import ModelError

_GOLDEN = 0x9E3779B97F4A7C15  # of 2^64, odd: all multiples differ
_CHUNK = 1 << 20


class Phase(BaseModel):
    """Some steps of a training, and how much of them each domain is."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    steps: int | None = Field(None, ge=1, description="steps of the phase; the last has none: all that follow")
    weights: dict[str, float] = Field(description="a domain's part of the sequences, in proportion to the others'")


class Mixture:
    """Phases over the domains of a snapshot. Raises ModelError (2) where they do not fit it or each other."""

    def __init__(self, phases: Sequence[Phase], domains: Sequence[str], global_batch_size: int, seed: int) -> None:
        self.num_domains = len(domains)
        digest = hashlib.sha256(f"mixture\0{seed}".encode()).digest()
        self._shift = np.uint64(int.from_bytes(digest[:8], "little"))
        self._ends: list[int | None] = []  # of each phase, in samples
        self._bounds: list[npt.NDArray[np.uint64]] = []  # of the domains' shares of 2^64, but for the last one's end
        end = 0
        for number, phase in enumerate(phases, start=1):
            unknown = sorted(set(phase.weights) - set(domains))
            if unknown:
                raise ModelError(
                    f"Phase {number} of the mixture weighs {', '.join(unknown)}, but the domains are "
                    f"{', '.join(domains)}; name these.",
                    2,
                )
            if any(not 0 <= w < float("inf") for w in phase.weights.values()) or not sum(phase.weights.values()) > 0:
                raise ModelError(f"Phase {number} of the mixture needs weights of 0 and more, and one above 0.", 2)
            if (phase.steps is None) != (number == len(phases)):
                raise ModelError(
                    f"Phase {number} of the mixture {'has no' if phase.steps is None else 'has'} steps; all phases but "
                    "the last need them, and the last goes on to the end.",
                    2,
                )
            end += (phase.steps or 0) * global_batch_size
            self._ends.append(end if phase.steps else None)
            weights = np.asarray([phase.weights.get(name, 0.0) for name in domains])
            shares = np.cumsum(weights / weights.sum())[:-1]
            self._bounds.append(np.asarray([min(int(s * 2**64), 2**64 - 1) for s in shares], dtype=np.uint64))

    def domains(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        """The domains' numbers of samples start to stop-1."""
        parts = []
        for bounds, begin, end in self._phases(start, stop):
            points = np.arange(begin, end, dtype=np.uint64) * np.uint64(_GOLDEN) + self._shift
            parts.append(np.searchsorted(bounds, points, side="right"))
        return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)

    def counts(self, stop: int) -> npt.NDArray[np.int64]:
        """How many of the first `stop` samples are of each domain; in time proportional to `stop`."""
        total = np.zeros(self.num_domains, dtype=np.int64)
        for start in range(0, stop, _CHUNK):
            total += np.bincount(self.domains(start, min(start + _CHUNK, stop)), minlength=self.num_domains)
        return total

    def _phases(self, start: int, stop: int) -> Iterator[tuple[npt.NDArray[np.uint64], int, int]]:
        """The phases' bounds, and which of the samples start to stop-1 are theirs."""
        for bounds, end in zip(self._bounds, self._ends, strict=True):
            if start >= stop:
                return
            last = stop if end is None else min(stop, end)
            if last > start:
                yield bounds, start, last
                start = last
