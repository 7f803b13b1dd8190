"""The loader's samples as a `datasets.IterableDataset`, for people who train elsewhere.

    dataset = iterable_dataset(open_sequences(lake), epochs=3, seed=7)
    dataset = split_dataset_by_node(dataset, rank=rank, world_size=8)     # each rank reads its own samples only
    loader = StatefulDataLoader(dataset, batch_size=4, num_workers=2)

The samples and their order are SequenceLoader's. `state_dict()` and `load_state_dict()` are the library's: a position,
to which the dataset goes without reading what lies before it. The library's own shuffling and `set_epoch` change
nothing.

Built on the library's class of example sources, which is internal to it: its versions are pinned, and tests say so when
it changes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from datasets import DatasetInfo, Features, IterableDataset, List, Value
from datasets.iterable_dataset import _BaseExamplesIterable

from model.loader.loader import SequenceReader
from model.loader.mixture import Phase
from model.loader.order import Order
from model.loader.snapshot import Ints, Snapshot

# Ranks and workers each take one sample in so many; any of these numbers divides it: up to 10, and 2^10.
_SHARDS = 2**10 * 3**2 * 5 * 7
_READ = 32  # samples at a time


def iterable_dataset(
    snapshot: Snapshot, *, epochs: int = 1, seed: int = 0, mixture: Sequence[Phase] = (), global_batch_size: int = 1
) -> IterableDataset:
    """`epochs` times as many samples as the snapshot has sequences, in SequenceLoader's order.

    An example has input_ids, segment_ids (-1 on padding), position_ids (all int32 [S]), loss_mask (bool [S]), domain
    and sequence_id, as `loader.Batch` describes them. global_batch_size: sequences a step, where a mixture has phases.
    """
    S = snapshot.sequence_length
    numbers = {name: List(Value("int32"), length=S) for name in ("input_ids", "segment_ids", "position_ids")}
    words = {name: Value("string") for name in ("domain", "sequence_id")}
    features = Features({**numbers, "loss_mask": List(Value("bool"), length=S), **words})
    samples = _Samples(snapshot, (seed, tuple(mixture), global_batch_size), epochs * snapshot.num_sequences)
    return IterableDataset(samples, info=DatasetInfo(features=features))


class _Samples(_BaseExamplesIterable):
    """Of the first `stop` samples those at offset, offset + stride, ..."""

    def __init__(
        self, snapshot: Snapshot, how: tuple[int, tuple[Phase, ...], int], stop: int, stride: int = 1, offset: int = 0
    ) -> None:
        super().__init__()
        self._snapshot, self._how, self._stop, self._stride, self._offset = snapshot, how, stop, stride, offset

    def _init_state_dict(self) -> dict[str, Any]:
        self._state_dict = {"samples": 0, "type": type(self).__name__}
        return self._state_dict

    def __iter__(self) -> Iterator[tuple[int, dict[str, Any]]]:
        seed, mixture, global_batch_size = self._how
        order = Order(self._snapshot, seed, mixture, global_batch_size)
        reader = SequenceReader(self._snapshot, order.room(self._stride))
        state: Any = self._state_dict  # None: nobody asks for it
        done = int(state["samples"]) if state else 0
        batches = reader.batches(self._wanted(order, done))
        try:
            for batch in batches:
                for row in range(len(batch)):
                    done += 1
                    if state:
                        state["samples"] = done
                    yield (
                        self._offset + (done - 1) * self._stride,
                        {
                            "input_ids": batch.tokens[row].numpy().astype(np.int32),
                            "segment_ids": batch.segment_ids[row].numpy(),
                            "position_ids": batch.positions[row].numpy(),
                            "loss_mask": batch.loss_mask[row].numpy(),
                            "domain": batch.domains[row],
                            "sequence_id": batch.sequence_ids[row],
                        },
                    )
        finally:
            batches.close()

    def _wanted(self, order: Order, done: int) -> Iterator[Ints]:
        """The samples after the first `done` ones, some at a time."""
        while (start := done * self._stride) < self._stop:
            indices = order.samples(start, min(start + _READ * self._stride, self._stop))[self._offset :: self._stride]
            if not len(indices):  # fewer are left than ranks
                return
            yield indices
            done += len(indices)

    @property
    def num_shards(self) -> int:
        return max(1, _SHARDS // self._stride)

    def shard_data_sources(self, num_shards: int, index: int, contiguous: bool = True) -> _Samples:
        offset = self._offset + index * self._stride
        return _Samples(self._snapshot, self._how, self._stop, self._stride * num_shards, offset)

    def shuffle_data_sources(self, generator: np.random.Generator) -> _Samples:
        return self

    def reshard_data_sources(self) -> _Samples:
        return self
