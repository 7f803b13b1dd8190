"""The order of samples: a pure function of (content, split, seed, mixture, sample index).

Nothing of ranks, files' names, prefetching or restarts enters, which is what makes a resume exact on any number of
ranks. Samples are counted without end: of all sequences, or with a mixture (`mixture.py`) of each domain's, one epoch
follows another, each in an order of its own. Sequences that are shuffled together are a pool.

A pool that fits the window is shuffled as a whole: each epoch is a permutation drawn uniformly.

A larger one is shuffled so that it can be read once an epoch, in little memory. The pool's row groups are put into an
order drawn anew for each epoch, laid end to end and cut into LANES equal parts; sample k is of lane k mod LANES. A lane
is cut into windows of a LANES-th of the window or more (less than twice of it), and each is shuffled uniformly. So the
LANES windows that are read at one time make one of W sequences, in which two neighbours of one row group, and so of one
group of documents that were packed together, end up as far apart as in a uniform shuffle of W: (W + 1) / 3 on average
(as MosaicML's py1br shuffles, with lanes for its canonical nodes).

Rank r of w takes the samples k with k mod w = r, so that where w divides LANES a rank reads LANES / w lanes, and a row
group is read by one rank, but for the LANES - 1 in which a lane ends. More ranks than LANES share lanes.

With a mixture that holds for each domain's samples as long as they fall to the lanes in turn. In a pool beyond the
window the mixture therefore gives LANES samples in a row to a domain, where the global batch has LANES times that and
more; in a smaller global batch samples are mixed one by one, and every rank reads every lane.
"""

from __future__ import annotations

import hashlib
import math
from collections import OrderedDict
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from model.loader.mixture import Mixture, Phase
from model.loader.snapshot import Ints, Snapshot

LANES = 8
_STRIP = 1024  # samples that are looked up at once


def epoch_order(key: str, epoch: int, n: int) -> Ints:
    """A permutation of 0..n-1 drawn uniformly (up to ties of 64-bit numbers) for this key and epoch; int64 [n].

    Sorts n words of the counter-based generator Philox (Salmon et al. 2011). numpy promises its raw stream for ever
    (NEP 19), which it does not for Generator.permutation.
    """
    digest = hashlib.sha256(f"{key}\0{epoch}".encode()).digest()
    words = np.random.Philox(key=int.from_bytes(digest[:16], "little")).random_raw(n)
    return np.argsort(words, kind="stable").astype(np.int64)


class _Recent:
    """The last `count` values made."""

    def __init__(self, count: int, make: Callable[..., Ints]) -> None:
        self._count, self._make, self._values = count, make, OrderedDict[tuple[int, ...], Ints]()

    def __call__(self, *key: int) -> Ints:
        if key in self._values:
            self._values.move_to_end(key)
        else:
            self._values[key] = self._make(*key)
            while len(self._values) > self._count:
                self._values.popitem(last=False)
        return self._values[key]


class Pool:
    """Sequences that are shuffled together as a whole. indices: canonical ones."""

    def __init__(self, name: str, key: str, indices: Ints) -> None:
        self.name, self._indices = name, indices
        # Two epochs, since a global batch can lie in two.
        self._order = _Recent(2, lambda epoch: epoch_order(key, epoch, len(indices)))

    def __len__(self) -> int:
        return len(self._indices)

    def samples(self, first: int, count: int) -> Ints:
        """The canonical indices of `count` samples of the pool's endless order from the `first` on."""
        parts = [np.empty(0, dtype=np.int64)]
        while count:
            epoch, within = divmod(first, len(self))
            part = self._indices[self._order(epoch)[within : within + count]]
            parts.append(part)
            first, count = first + len(part), count - len(part)
        return np.concatenate(parts)


class WindowedPool:
    """Sequences that are shuffled within windows.

    begin_K, rows_K: the first canonical index and the number of sequences of each of K row groups. window: sequences.
    Memory: 32 bytes a row group, 32 bytes a sequence of a window.
    """

    def __init__(self, name: str, key: str, begin_K: Ints, rows_K: Ints, window: int) -> None:
        self.name, self.window = name, max(1, window // LANES)
        self._begin_K, self._len = begin_K, int(rows_K.sum())

        def blocks(epoch: int) -> Ints:
            order_K = epoch_order(f"{key}\0row groups", epoch, len(rows_K))
            return np.stack((order_K, np.cumsum(rows_K[order_K])))

        def shuffled(epoch: int, lane: int, window: int, n: int) -> Ints:
            return epoch_order(f"{key}\0{lane}\0{window}", epoch, n)

        self._blocks, self._shuffled = _Recent(2, blocks), _Recent(2 * LANES, shuffled)
        self._strip = _Recent(2, self._look_up)

    def __len__(self) -> int:
        return self._len

    @property
    def largest_window(self) -> int:
        """Sequences of LANES windows at most."""
        n = -(-len(self) // LANES)
        return LANES * -(-n // max(1, n // self.window))

    def samples(self, first: int, count: int) -> Ints:
        """As Pool's."""
        parts = [np.empty(0, dtype=np.int64)]
        while count:
            strip, within = divmod(first, _STRIP)
            part = self._strip(strip)[within : within + count]
            parts.append(part)
            first, count = first + len(part), count - len(part)
        return np.concatenate(parts)

    def _look_up(self, strip: int) -> Ints:
        found, at, end = np.empty(_STRIP, dtype=np.int64), strip * _STRIP, (strip + 1) * _STRIP
        while at < end:
            epoch, within = divmod(at, len(self))
            count = min(end - at, len(self) - within)
            offset = at - strip * _STRIP
            found[offset : offset + count] = self._within(epoch, within, within + count)
            at += count
        return found

    def _within(self, epoch: int, start: int, stop: int) -> Ints:
        """Samples start to stop-1 of an epoch."""
        found = np.empty(stop - start, dtype=np.int64)
        order_K, ends_K = self._blocks(epoch)
        begin = 0
        for lane in range(LANES):
            # The lane's samples in the epoch are first, first + LANES, ...: n of them, the lane's numbers 0 to n-1.
            first = (lane - epoch * len(self)) % LANES
            n = max(0, -(-(len(self) - first) // LANES))
            low, high = max(0, -(-(start - first) // LANES)), max(0, -(-(stop - first) // LANES))
            at = begin + self._shuffle(epoch, lane, n, low, high)
            block = np.searchsorted(ends_K, at, side="right")
            group = order_K[block]
            before = np.where(block > 0, ends_K[block - 1], 0)
            found[first - start + LANES * np.arange(low, high)] = self._begin_K[group] + at - before
            begin += n
        return found

    def _shuffle(self, epoch: int, lane: int, n: int, low: int, high: int) -> Ints:
        """Which of a lane's n places its samples low to high-1 are."""
        windows, parts = max(1, n // self.window), [np.empty(0, dtype=np.int64)]
        while low < high:
            window = ((low + 1) * windows - 1) // n
            begin, end = window * n // windows, (window + 1) * n // windows
            stop = min(high, end)
            parts.append(begin + self._shuffled(epoch, lane, window, end - begin)[low - begin : stop - begin])
            low = stop
        return np.concatenate(parts)


class Order:
    """Which sequence each sample is. mixture: phases of steps of global_batch_size samples; none: one pool of all."""

    def __init__(self, snapshot: Snapshot, seed: int, mixture: Sequence[Phase], global_batch_size: int) -> None:
        key = f"{snapshot.content}\0{snapshot.split}\0{seed}"
        self._snapshot = snapshot
        self._mixture: Mixture | None = None
        self._run = 1  # samples in a row of one domain
        if mixture:
            if not snapshot.fits and global_batch_size % LANES == 0 and global_batch_size >= LANES * LANES:
                self._run = LANES
            self._mixture = Mixture(mixture, snapshot.domains, global_batch_size // self._run, seed)
            shares = [max(p.weights.get(n, 0.0) / sum(p.weights.values()) for p in mixture) for n in snapshot.domains]
            pools = [
                self._pool(name, f"{key}\0{name}", number, math.ceil(snapshot.window * share))
                for number, (name, share) in enumerate(zip(snapshot.domains, shares, strict=True))
            ]
        else:
            pools = [self._pool("", key, None, snapshot.window)]
        self._pools: list[Pool | WindowedPool] = pools
        self._at = 0
        self._taken = [0] * len(self._pools)

    def _pool(self, name: str, key: str, domain: int | None, window: int) -> Pool | WindowedPool:
        """Of a domain, or of all sequences."""
        snapshot = self._snapshot
        if snapshot.by_id is not None:
            of = snapshot.by_id.domain_N
            return Pool(name, key, np.arange(len(of)) if domain is None else np.flatnonzero(of == domain))
        if domain is None:
            ends = np.append(snapshot.begin_G[1:], snapshot.num_sequences)
            return WindowedPool(name, key, snapshot.begin_G, ends - snapshot.begin_G, window)
        of_domain = snapshot.domain_C == domain
        return WindowedPool(name, key, snapshot.begin_C[of_domain], snapshot.rows_C[of_domain], window)

    def room(self, stride: int) -> int:
        """Bytes of row groups that are held to read each once an epoch, for who takes one sample in `stride`.

        A split that fits the window: all of its row groups. Else, of each pool, the windows that are read and those
        that come next, and for each lane two row groups that reach beyond them; divided by the ranks that divide LANES
        (unless a mixture mixes samples one by one).
        """
        snapshot = self._snapshot
        size_G = np.asarray([snapshot.group_bytes(group) for group in range(len(snapshot.file_G))])
        total, largest, needed = int(size_G.sum()), int(size_G.max()), 0
        for number, pool in enumerate(self._pools):
            if isinstance(pool, Pool):
                return total
            of_pool = size_G
            if self._mixture:
                of_pool = size_G[snapshot.group_C[snapshot.domain_C == number]]
            needed += int(2 * pool.largest_window * of_pool.sum() / len(pool)) + 2 * LANES * largest
        share = 1 if self._mixture and self._run == 1 else math.gcd(stride, LANES)
        return min(total, needed // share)

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
            runs, rest = divmod(at, self._run)
            counts = self._mixture.counts(runs) * self._run
            if rest:
                counts[self._mixture.domains(runs, runs + 1)[0]] += rest
            self._taken = counts.tolist()
        self._at = at

    def samples(self, start: int, stop: int, say: Callable[[str], None] = lambda _: None) -> Ints:
        """The canonical indices of samples start to stop-1; quickest where each call goes on from the one before it.

        say: told where a domain of a mixture begins another epoch.
        """
        if start != self._at:
            self.go_to(start)
        pools: npt.NDArray[np.int64] = np.zeros(stop - start, dtype=np.int64)
        if self._mixture:
            runs = self._mixture.domains(start // self._run, -(-stop // self._run))
            pools = np.repeat(runs, self._run)[start % self._run :][: stop - start]
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
