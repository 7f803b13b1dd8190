"""Batches of packed sequences from a pinned snapshot, in an order that resumes exactly.

Every sample comes exactly once an epoch, epochs follow each other without end, and global batch g is the samples
g*B to (g+1)*B-1 of that endless order; a rank takes its slice of it. With a mixture (`mixture.py`) each domain has
epochs of its own, and the mixture says whose next sample comes. Tokens are read by row group and kept in a cache
bounded in bytes (least recently used goes first): a split that fits is read once, a larger one is read again and again,
because the shuffle is over the whole split.

Leaves out: prefetching, a windowed shuffle for splits larger than memory.

Shapes: b sequences of this rank, S tokens a sequence.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
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
from model.loader.snapshot import Snapshot, open_parquet

CACHE_BYTES = 1 << 30  # decoded tokens held by one reader


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


@dataclass(frozen=True)
class _RowGroup:
    tokens_RS: npt.NDArray[np.uint32]
    segment_offsets: npt.NDArray[np.int64]  # [R+1], into segment_lengths
    segment_lengths: npt.NDArray[np.int64]
    pad_R: npt.NDArray[np.int64]

    @property
    def nbytes(self) -> int:
        return self.tokens_RS.nbytes + self.segment_lengths.nbytes + self.segment_offsets.nbytes + self.pad_R.nbytes


class SequenceReader:
    """Random access to a snapshot's sequences by canonical index, through a cache of at most cache_bytes
    (and never less than one row group)."""

    def __init__(self, snapshot: Snapshot, cache_bytes: int = CACHE_BYTES) -> None:
        self.snapshot = snapshot
        self.cache_bytes = cache_bytes
        self._cache: OrderedDict[tuple[int, int], _RowGroup] = OrderedDict()
        self._held = 0

    def batch(self, indices: Sequence[int] | npt.NDArray[np.int64]) -> Batch:
        """The sequences at these canonical indices."""
        snapshot, S = self.snapshot, self.snapshot.sequence_length
        b = len(indices)
        tokens = np.empty((b, S), dtype=np.int64)
        lengths_by_row, padded = [], np.empty(b, dtype=bool)
        for out, index in enumerate(indices):
            group = self._group(int(snapshot.file_N[index]), int(snapshot.row_group_N[index]))
            row = int(snapshot.row_N[index])
            tokens[out] = group.tokens_RS[row]
            lengths_by_row.append(group.segment_lengths[group.segment_offsets[row] : group.segment_offsets[row + 1]])
            padded[out] = group.pad_R[row] > 0
        segments, positions = _segments(lengths_by_row, padded, S)
        mask = (segments >= 0) & (positions > 0)
        return Batch(
            tokens=torch.from_numpy(tokens),
            segment_ids=torch.from_numpy(segments),
            positions=torch.from_numpy(positions),
            loss_mask=torch.from_numpy(mask),
            domains=[snapshot.domains[snapshot.domain_N[i]] for i in indices],
            sequence_ids=[snapshot.sequence_ids_N[i].decode() for i in indices],
        )

    def _group(self, file: int, group: int) -> _RowGroup:
        key = (file, group)
        held = self._cache.get(key)
        if held is not None:
            self._cache.move_to_end(key)
            return held
        loaded = self._load(file, group)
        while self._cache and self._held + loaded.nbytes > self.cache_bytes:
            self._held -= self._cache.popitem(last=False)[1].nbytes
        self._cache[key] = loaded
        self._held += loaded.nbytes
        return loaded

    def _load(self, file: int, group: int) -> _RowGroup:
        path, S = self.snapshot.files[file], self.snapshot.sequence_length
        try:
            table = open_parquet(self.snapshot.filesystem, path).read_row_group(
                group, columns=["tokens", "segment_lengths", "pad_count"]
            )
        except (OSError, pa.ArrowException, KeyError) as error:
            raise ModelError(f"{path} cannot be read any more ({error}); restore the file or pack again.") from error
        if any(table[c].null_count for c in table.column_names):
            raise ModelError(f"{path} holds nulls where tokens should be; pack again.")
        if bool(pc.any(pc.not_equal(pc.binary_length(table["tokens"]), 4 * S)).as_py()):
            raise ModelError(f"{path} holds a sequence that is not {S} tokens long; pack again.")
        views = [_view(chunk, S) for chunk in table["tokens"].chunks]
        tokens = views[0] if len(views) == 1 else np.concatenate(views)
        lists = table["segment_lengths"].combine_chunks()
        lists = lists.chunk(0) if isinstance(lists, pa.ChunkedArray) else lists
        offsets = lists.offsets.to_numpy().astype(np.int64)
        lengths = lists.values.to_numpy(zero_copy_only=False).astype(np.int64)
        sums = np.diff(np.concatenate(([0], np.cumsum(lengths)))[offsets])
        pads = table["pad_count"].to_numpy().astype(np.int64)
        last = lengths[offsets[1:] - 1]
        if bool((lengths <= 0).any() or (sums != S).any() or ((pads > 0) & (pads != last)).any()):
            raise ModelError(f"{path} holds segment lengths that do not add up to {S}; pack again.")
        return _RowGroup(tokens, offsets, lengths, pads)


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
    """One pass over a snapshot in canonical order, for evaluation; the last batch may be smaller."""
    reader = SequenceReader(snapshot)
    for start in range(0, snapshot.num_sequences, batch_size):
        yield reader.batch(range(start, min(start + batch_size, snapshot.num_sequences)))


class SequenceLoader:
    """Endless batches of this rank's part of each global batch; see the module's docstring for the order.

    global_batch_size: sequences over all ranks, a multiple of world_size. mixture: phases of weights; none: the domains
    as they come. say: told where a domain of a mixture begins again. state_dict() after a batch was taken counts that
    batch as consumed.
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
        cache_bytes: int = CACHE_BYTES,
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
        self._reader = SequenceReader(snapshot, cache_bytes)
        self._order = Order(snapshot, seed, self.phases, global_batch_size)

    def __iter__(self) -> Iterator[Batch]:
        mine = self.global_batch_size // self.world_size
        while True:
            start = self.samples_consumed
            samples = self._order.samples(start, start + self.global_batch_size, self._say)
            batch = self._reader.batch(samples[self.rank * mine : (self.rank + 1) * mine])
            self.samples_consumed = start + self.global_batch_size
            yield batch

    def fingerprint(self) -> dict[str, Any]:
        """What has to be the same for a saved position to mean anything here."""
        described = self.snapshot.describe()
        names = ("table_id", "version", "split", "tokenizer_id", "sequence_length", "content")
        return {
            **{name: described[name] for name in names},
            "seed": self.seed,
            "global_batch_size": self.global_batch_size,
            **({"mixture": [phase.model_dump() for phase in self.phases]} if self.phases else {}),
        }

    def state_dict(self) -> dict[str, Any]:
        """The position, as JSON values; the same on every rank."""
        state = {"samples_consumed": self.samples_consumed, **self.fingerprint()}
        return state | {"domain_samples": self._order.taken} if self.phases else state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved position. One of other data, seed or batch size raises ModelError and names what differs."""
        mine = self.fingerprint()
        names = [*mine, *(["mixture"] if "mixture" in state and "mixture" not in mine else [])]
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
