"""The order of samples: a pure function of (content, split, seed, mixture, sample index).

Nothing of ranks, files or restarts enters, which is what makes a resume exact on any number of ranks. Samples are
counted without end: of all sequences, or with a mixture (`mixture.py`) of each domain's, one epoch follows another,
each in an order of its own.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from model.loader.mixture import Mixture, Phase
from model.loader.snapshot import Snapshot


def epoch_order(key: str, epoch: int, n: int) -> npt.NDArray[np.int64]:
    """A permutation of 0..n-1 drawn uniformly (up to ties of 64-bit numbers) for this key and epoch; int64 [n].

    Sorts n words of the counter-based generator Philox (Salmon et al. 2011). numpy promises its raw stream for ever
    (NEP 19), which it does not for Generator.permutation.
    """
    digest = hashlib.sha256(f"{key}\0{epoch}".encode()).digest()
    words = np.random.Philox(key=int.from_bytes(digest[:16], "little")).random_raw(n)
    return np.argsort(words, kind="stable").astype(np.int64)


class _Pool:
    """Sequences that are shuffled together, epoch after epoch. indices: canonical ones."""

    def __init__(self, name: str, key: str, indices: npt.NDArray[np.int64]) -> None:
        self.name, self._key, self._indices = name, key, indices
        self._orders: OrderedDict[int, npt.NDArray[np.int64]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._indices)

    def samples(self, first: int, count: int) -> npt.NDArray[np.int64]:
        """The canonical indices of `count` samples of the pool's endless order from the `first` on."""
        parts = []
        while count:
            epoch, within = divmod(first, len(self))
            part = self._indices[self._order(epoch)[within : within + count]]
            parts.append(part)
            first, count = first + len(part), count - len(part)
        return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)

    def _order(self, epoch: int) -> npt.NDArray[np.int64]:
        if epoch not in self._orders:
            self._orders[epoch] = epoch_order(self._key, epoch, len(self))
            while len(self._orders) > 2:  # a global batch can lie in two epochs
                self._orders.popitem(last=False)
        return self._orders[epoch]


class Order:
    """Which sequence each sample is. mixture: phases of steps of global_batch_size samples; none: one pool of all."""

    def __init__(self, snapshot: Snapshot, seed: int, mixture: Sequence[Phase], global_batch_size: int) -> None:
        key = f"{snapshot.content}\0{snapshot.split}\0{seed}"
        self._mixture: Mixture | None = None
        self._pools = [_Pool("", key, np.arange(snapshot.num_sequences))]
        if mixture:
            self._mixture = Mixture(mixture, snapshot.domains, global_batch_size, seed)
            self._pools = [
                _Pool(name, f"{key}\0{name}", np.flatnonzero(snapshot.domain_N == number))
                for number, name in enumerate(snapshot.domains)
            ]
        self._at = 0
        self._taken = [0] * len(self._pools)

    @property
    def taken(self) -> list[int]:
        """How many samples of each pool lie before the one that follows the last asked for."""
        return list(self._taken)

    def go_to(self, at: int, taken: object = None) -> None:
        """Go on with sample `at`. taken: `taken` there, where it is known; else it is counted, sample by sample."""
        if self._mixture is None:
            self._taken = [at]
        elif isinstance(taken, list) and len(taken) == len(self._pools) and sum(taken) == at:
            self._taken = list(taken)
        else:
            self._taken = self._mixture.counts(at).tolist()
        self._at = at

    def samples(self, start: int, stop: int, say: Callable[[str], None] = lambda _: None) -> npt.NDArray[np.int64]:
        """The canonical indices of samples start to stop-1; quickest where each call goes on from the one before it.

        say: told where a domain of a mixture begins another epoch.
        """
        if start != self._at:
            self.go_to(start)
        pools = np.zeros(stop - start, dtype=np.int64)
        if self._mixture:
            pools = self._mixture.domains(start, stop)
        found = np.empty(stop - start, dtype=np.int64)
        for number, pool in enumerate(self._pools):
            here = np.flatnonzero(pools == number)
            before = self._taken[number]
            found[here] = pool.samples(before, len(here))
            self._taken[number] += len(here)
            if self._mixture and before and before // len(pool) < self._taken[number] // len(pool):
                say(f"the domain {pool.name} begins its epoch {self._taken[number] // len(pool) + 1}")
        self._at = stop
        return found
