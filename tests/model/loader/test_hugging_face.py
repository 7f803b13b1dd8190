"""The IterableDataset has the loader's samples, on any ranks and workers, and goes on from anywhere."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable

import pytest
import torch
from datasets.distributed import split_dataset_by_node
from torch.utils.data import DataLoader

from model.loader.hugging_face import iterable_dataset
from model.loader.loader import SequenceLoader
from model.loader.mixture import Phase
from model.loader.snapshot import Snapshot, open_sequences

WriteSequences = Callable[..., str]
MIXTURE = (Phase(steps=4, weights={"text": 1}), Phase(weights={"code": 1, "text": 1}))


def expected(snapshot: Snapshot, count: int, mixture: tuple[Phase, ...] = ()) -> list[str]:
    batches = iter(SequenceLoader(snapshot, 1, seed=3, mixture=mixture))
    return [batch.sequence_ids[0] for batch in itertools.islice(batches, count)]


@pytest.mark.parametrize("mixture", [(), MIXTURE], ids=["all", "mixture"])
def test_the_samples_are_the_loaders_on_any_ranks(write_sequences: WriteSequences, mixture: tuple[Phase, ...]) -> None:
    snapshot = open_sequences(write_sequences(count=21))
    dataset = iterable_dataset(snapshot, epochs=2, seed=3, mixture=mixture)
    whole = expected(snapshot, 42, mixture)
    assert [example["sequence_id"] for example in dataset] == whole
    for world in (2, 3, 4, 11):  # 11 divides no number of shards
        parts = [
            [example["sequence_id"] for example in split_dataset_by_node(dataset, rank, world)] for rank in range(world)
        ]
        assert [parts[i % world][i // world] for i in range(42)] == whole


def test_an_example_is_a_row_of_a_batch(write_sequences: WriteSequences) -> None:
    snapshot = open_sequences(write_sequences(count=5))
    batch = next(iter(SequenceLoader(snapshot, 5, seed=3)))
    for row, example in enumerate(iterable_dataset(snapshot, seed=3).with_format("torch")):
        assert torch.equal(example["input_ids"].long(), batch.tokens[row])
        assert torch.equal(example["segment_ids"].int(), batch.segment_ids[row])
        assert torch.equal(example["position_ids"].int(), batch.positions[row])
        assert torch.equal(example["loss_mask"], batch.loss_mask[row])
        assert (example["domain"], example["sequence_id"]) == (batch.domains[row], batch.sequence_ids[row])


@pytest.mark.parametrize("world", [1, 2])
def test_it_goes_on_from_anywhere(write_sequences: WriteSequences, world: int) -> None:
    snapshot = open_sequences(write_sequences(count=21))

    def made() -> object:
        return split_dataset_by_node(iterable_dataset(snapshot, epochs=4, seed=3, mixture=MIXTURE), world - 1, world)

    whole = [example["sequence_id"] for example in made()]
    for taken in (0, 1, 31, 32, 33, len(whole) - 1, len(whole)):
        first, second = made(), made()
        head = [example["sequence_id"] for example in itertools.islice(first, taken)]
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert head + [example["sequence_id"] for example in second] == whole


def test_workers_share_the_samples(write_sequences: WriteSequences) -> None:
    snapshot = open_sequences(write_sequences(count=21))
    loader = DataLoader(iterable_dataset(snapshot, seed=3), batch_size=None, num_workers=2)
    assert sorted(example["sequence_id"] for example in loader) == sorted(expected(snapshot, 21))
