"""Batches of packed sequences from a pinned snapshot, in an order that resumes exactly.

Every sample comes exactly once an epoch, epochs follow each other without end, and global batch g is the samples
g*B to (g+1)*B-1 of that endless order (`order.py`); rank r of w takes every w-th of them from the r-th on. With a
mixture (`mixture.py`) each domain has epochs of its own, and the mixture says whose next sample comes.

Row groups are read whole, ahead of their need and in threads (`readahead.py`), and held as long as the order comes back
to them. A state describes what was handed out, not what was read ahead.

Memory of one reader: `cache_bytes` of row groups, or one row group where that is larger. By default that is what the
order needs for reading each row group once an epoch (`Order.room`). Of a split that fits the window (WINDOW_BYTES, 1
GiB of tokens) these are its row groups; of a larger one, on one rank, twice the window and 16 row groups (4 GiB with
row groups of 128 MiB, more where the split is less than ten windows), on 8 ranks an eighth of that each. Beside it, for
an object store the compressed bytes of eight row groups on their way, the index (`snapshot.py`) and the order (32 bytes
a sequence of a window, or of a split that fits it).

Shapes: b sequences of this rank, S tokens a sequence; R rows of a row group that are in the split.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import torch

from model.errors import ModelError
from model.loader.mixture import Phase
from model.loader.order import Order
from model.loader.readahead import THREADS_LOCAL, THREADS_REMOTE, Readahead
from model.loader.snapshot import COLUMNS, Ints, Snapshot, rows_of_split


@dataclass(frozen=True, kw_only=True)
class Batch:
    """b packed sequences. Token t of a row may be a target (be predicted from t-1) where loss_mask is true.

    loss_mask is false at the first token of a document and on padding: a document's beginning is not predicted from
    its neighbour's end. segment_ids are -1 on padding; positions start at 0 in every segment.
    """

    tokens: torch.Tensor  # int64 [b, S]
    segment_ids: torch.Tensor  # int32 [b, S]
    positions: torch.Tensor  # int32 [b, S]
    loss_mask: torch.Tensor  # bool [b, S]
    domains: list[str]
    sequence_ids: list[str]

    def __len__(self) -> int:
        return len(self.sequence_ids)

    def slice(self, start: int, stop: int) -> Batch:
        """Rows start to stop-1 as a batch, for gradient accumulation."""
        return Batch(
            tokens=self.tokens[start:stop],
            segment_ids=self.segment_ids[start:stop],
            positions=self.positions[start:stop],
            loss_mask=self.loss_mask[start:stop],
            domains=self.domains[start:stop],
            sequence_ids=self.sequence_ids[start:stop],
        )


_TOKENS = ("tokens", "segment_lengths", "pad_count")


@dataclass(frozen=True)
class _RowGroup:
    """tokens and segments of all rows of a row group.

    rows_R and sequence_ids: of a split beyond the window, the split's rows, and all rows' ids.
    """

    rows_R: list[int] | None
    tokens: npt.NDArray[np.uint32]  # [rows, S]
    segment_offsets: Ints  # [rows + 1], into segment_lengths
    segment_lengths: Ints
    pad: Ints  # [rows]
    sequence_ids: list[str] | None


# A batch's canonical indices, and by row group their places in the batch and numbers in the row group.
_Places = tuple[Ints, dict[int, list[tuple[int, int]]]]


class SequenceReader:
    """Reads a snapshot's sequences by canonical index.

    cache_bytes: of row groups held, see the module's docstring. bytes_read: of the files, so far.
    """

    def __init__(self, snapshot: Snapshot, cache_bytes: int) -> None:
        self.snapshot = snapshot
        self.bytes_read = 0
        self._counting = threading.Lock()
        remote = not snapshot.store.is_local
        threads = THREADS_REMOTE if remote else THREADS_LOCAL
        self._groups = Readahead(self._load, snapshot.group_bytes, cache_bytes, threads, at_once=remote)

    def batches(self, wanted: Iterable[Ints]) -> Generator[Batch]:
        """A batch for each array of canonical indices; wanted is looked at some hundred batches ahead.

        Closing the iterator ends the reading ahead. Raises ModelError where a row group cannot be read, when its turn
        comes.
        """

        def needs() -> Iterator[tuple[_Places, list[int]]]:
            for indices in wanted:
                groups, numbers = self.snapshot.locate(indices)
                by_group: dict[int, list[tuple[int, int]]] = {}
                for out, (group, number) in enumerate(zip(groups.tolist(), numbers.tolist(), strict=True)):
                    by_group.setdefault(group, []).append((out, number))
                yield (indices, by_group), list(by_group)

        followed = self._groups.follow(needs())
        try:
            for (indices, by_group), get in followed:
                yield self._batch(indices, by_group, get)
        finally:
            followed.close()

    def _batch(
        self, indices: Ints, by_group: dict[int, list[tuple[int, int]]], get: Callable[[int], _RowGroup]
    ) -> Batch:
        """One row group after the other, so that no more than one has to be held."""
        snapshot, b = self.snapshot, len(indices)
        tokens = np.empty((b, snapshot.sequence_length), dtype=np.int64)
        lengths_b: list[Ints] = [indices[:0]] * b
        padded, sequence_ids = np.empty(b, dtype=bool), [""] * b
        for name, places in by_group.items():
            group = get(name)
            for out, number in places:
                row = number if group.rows_R is None else group.rows_R[number]
                tokens[out] = group.tokens[row]
                lengths_b[out] = group.segment_lengths[group.segment_offsets[row] : group.segment_offsets[row + 1]]
                padded[out] = group.pad[row] > 0
                if group.sequence_ids is not None:
                    sequence_ids[out] = group.sequence_ids[row]
        if snapshot.by_id is not None:
            sequence_ids = [name.decode() for name in snapshot.by_id.sequence_ids_N[indices].tolist()]
        segments, positions = _segments(lengths_b, padded, snapshot.sequence_length)
        mask = (segments >= 0) & (positions > 0)
        return Batch(
            tokens=torch.from_numpy(tokens),
            segment_ids=torch.from_numpy(segments),
            positions=torch.from_numpy(positions),
            loss_mask=torch.from_numpy(mask),
            domains=[snapshot.domains[i] for i in snapshot.domain_numbers(indices).tolist()],
            sequence_ids=sequence_ids,
        )

    def _load(self, number: int, stop: threading.Event) -> _RowGroup:
        snapshot, S = self.snapshot, self.snapshot.sequence_length
        path = snapshot.paths[snapshot.file_G[number]]
        shown = snapshot.store.show(path)
        columns = _TOKENS if snapshot.fits else COLUMNS
        table, size = snapshot.store.row_group(path, int(snapshot.row_group_G[number]), columns, stop)
        with self._counting:
            self.bytes_read += size
        if any(table[c].null_count for c in table.column_names):
            raise ModelError(f"{shown} holds nulls where tokens should be; pack again.")
        if bool(pc.any(pc.not_equal(pc.binary_length(table["tokens"]), 4 * S)).as_py()):
            raise ModelError(f"{shown} holds a sequence that is not {S} tokens long; pack again.")
        views = [_view(chunk, S) for chunk in table["tokens"].chunks]
        tokens = views[0] if len(views) == 1 else np.concatenate(views)
        lists = _joined(table["segment_lengths"])
        offsets = lists.offsets.to_numpy().astype(np.int64)
        lengths = lists.values.to_numpy(zero_copy_only=False).astype(np.int64)
        sums = np.diff(np.concatenate(([0], np.cumsum(lengths)))[offsets])
        pads = table["pad_count"].to_numpy().astype(np.int64)
        last = lengths[offsets[1:] - 1]
        if bool((lengths <= 0).any() or (sums != S).any() or ((pads > 0) & (pads != last)).any()):
            raise ModelError(f"{shown} holds segment lengths that do not add up to {S}; pack again.")
        rows_R = sequence_ids = None
        if not snapshot.fits:
            rows_R = rows_of_split(snapshot, number, table["split"], table["domain"]).tolist()
            sequence_ids = table["sequence_id"].to_pylist()
        return _RowGroup(rows_R, tokens, offsets, lengths, pads, sequence_ids)


def _joined(column: pa.ChunkedArray) -> pa.Array:
    joined = column.combine_chunks()
    return joined.chunk(0) if isinstance(joined, pa.ChunkedArray) else joined


def _view(chunk: pa.BinaryArray, S: int) -> npt.NDArray[np.uint32]:
    """The chunk's sequences where Arrow decoded them: its values, 4*S bytes each, lie one behind the other."""
    _, offsets, values = chunk.buffers()
    begin = int(np.frombuffer(offsets, np.int32)[chunk.offset])
    return np.frombuffer(values, dtype="<u4", count=len(chunk) * S, offset=begin).reshape(-1, S)


def _segments(
    lengths_by_row: Sequence[npt.NDArray[np.int64]], padded: npt.NDArray[np.bool_], S: int
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """Segment ids (-1 on padding, a padded row's last segment) and positions of rows of these segments, [b, S] each."""
    lengths = np.concatenate(lengths_by_row)
    counts = np.fromiter(map(len, lengths_by_row), np.int64, len(lengths_by_row))
    ends = np.cumsum(counts)
    ids = np.arange(len(lengths), dtype=np.int32) - np.repeat(ends - counts, counts).astype(np.int32)
    ids[ends[padded] - 1] = -1
    begins = (np.cumsum(lengths) - lengths).astype(np.int32)
    positions = np.arange(len(counts) * S, dtype=np.int32) - np.repeat(begins, lengths)
    return np.repeat(ids, lengths).reshape(-1, S), positions.reshape(-1, S)


def in_order(snapshot: Snapshot, batch_size: int) -> Iterator[Batch]:
    """One pass over a snapshot in canonical order, for evaluation; the last batch may be smaller.

    Memory: as a loader's for a split that fits the window; of a larger one four row groups.
    """
    sizes = [snapshot.group_bytes(group) for group in range(len(snapshot.file_G))]
    reader = SequenceReader(snapshot, sum(sizes) if snapshot.fits else 4 * max(sizes))
    starts = range(0, snapshot.num_sequences, batch_size)
    yield from reader.batches(np.arange(at, min(at + batch_size, snapshot.num_sequences)) for at in starts)


class SequenceLoader:
    """Endless batches of this rank's part of each global batch; see the module's docstring for the order.

    global_batch_size: sequences over all ranks, a multiple of world_size. mixture: phases of weights; none: the domains
    as they come. cache_bytes: of row groups held; none: what the order needs, see the module's docstring; with less,
    row groups are read again and again. say: told where a domain of a mixture begins again. state_dict() after a batch
    was taken counts that batch as consumed. One iterator at a time; closing or leaving it ends its threads.
    """

    def __init__(
        self,
        snapshot: Snapshot,
        global_batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        *,
        mixture: Sequence[Phase] = (),
        cache_bytes: int | None = None,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        if global_batch_size < 1 or world_size < 1 or global_batch_size % world_size:
            raise ModelError(
                f"A global batch of {global_batch_size} sequences does not divide over {world_size} ranks; "
                "choose a multiple of the number of ranks.",
                exit_code=2,
            )
        if not 0 <= rank < world_size:
            raise ModelError(f"There is no rank {rank} among {world_size}; ranks count from 0.", exit_code=2)
        self.snapshot = snapshot
        self.global_batch_size = global_batch_size
        self.rank = rank
        self.world_size = world_size
        self.seed = seed
        self.samples_consumed = 0
        self.phases = tuple(mixture)
        self._say = say
        self._order = Order(snapshot, seed, self.phases, global_batch_size)
        self._taken = self._order.taken
        self._reader = SequenceReader(snapshot, self._order.room(world_size) if cache_bytes is None else cache_bytes)

    @property
    def bytes_read(self) -> int:
        """Of the table's files, by this rank, so far; what was read ahead is counted."""
        return self._reader.bytes_read

    def __iter__(self) -> Generator[Batch, None, None]:
        while True:
            expected = self.samples_consumed
            passed: deque[tuple[list[int], list[str]]] = deque()
            batches = self._reader.batches(self._wanted(expected, passed))
            try:
                for batch in batches:
                    self._taken, said = passed.popleft()
                    expected += self.global_batch_size
                    self.samples_consumed = expected
                    for what in said:
                        self._say(what)
                    yield batch
                    if self.samples_consumed != expected:  # a state was loaded
                        break
            finally:
                batches.close()

    def _wanted(self, start: int, passed: deque[tuple[list[int], list[str]]]) -> Iterator[Ints]:
        """This rank's samples of each global batch from sample `start` on; passed: what is true once it is consumed."""
        self._order.go_to(start, self._taken)
        while True:
            said: list[str] = []
            samples = self._order.samples(start, start + self.global_batch_size, said.append)
            start += self.global_batch_size
            passed.append((self._order.taken, said))
            yield samples[self.rank :: self.world_size]

    def fingerprint(self) -> dict[str, Any]:
        """What has to be the same for a saved position to mean anything here."""
        described = self.snapshot.describe()
        names = ("table_id", "version", "split", "tokenizer_id", "sequence_length", "content")
        return {
            **{name: described[name] for name in names},
            "seed": self.seed,
            "global_batch_size": self.global_batch_size,
            **({} if self.snapshot.fits else {"window": self.snapshot.window}),
            **({"mixture": [phase.model_dump() for phase in self.phases]} if self.phases else {}),
        }

    def state_dict(self) -> dict[str, Any]:
        """The position, as JSON values; the same on every rank."""
        state = {"samples_consumed": self.samples_consumed, **self.fingerprint()}
        return state | {"domain_samples": self._taken} if self.phases else state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved position. One of other data, seed or batch size raises ModelError and names what differs."""
        mine = self.fingerprint()
        names = [*mine, *(name for name in ("mixture", "window") if name in state and name not in mine)]
        different = [f"{k} {state.get(k)!r}, here {mine.get(k)!r}" for k in names if state.get(k) != mine.get(k)]
        consumed = state.get("samples_consumed")
        if not isinstance(consumed, int) or consumed < 0:
            different.append(f"samples_consumed {consumed!r}, which is no position")
        if different or not isinstance(consumed, int):
            raise ModelError(
                f"The loader's saved state is of another training ({'; '.join(different)}); "
                "resume with what it was saved with or start a new training."
            )
        self.samples_consumed = consumed
        # What the state counted is what the mixture counts, which takes a while after some billions of samples.
        self._order.go_to(consumed, state.get("domain_samples"))
        self._taken = self._order.taken
