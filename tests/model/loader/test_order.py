"""Beyond the window: every sample once an epoch, shuffled as well as within the window, and read by one rank."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.loader import column_bytes, distance, one_epoch
from model.errors import ModelError
from model.loader.hugging_face import iterable_dataset
from model.loader.loader import Batch, SequenceLoader, in_order
from model.loader.mixture import Phase
from model.loader.order import LANES, Order, WindowedPool
from model.loader.snapshot import Snapshot, open_sequences

WriteMany = Callable[..., str]
ROW = 128  # bytes of a sequence of 32 tokens
MIXTURE = (Phase(steps=3, weights={"text": 1}), Phase(weights={"code": 3, "text": 1}))


def pool(rows: list[int], window: int) -> WindowedPool:
    rows_K = np.asarray(rows, dtype=np.int64)
    return WindowedPool("", "key", np.cumsum(rows_K) - rows_K, rows_K, window)


@settings(max_examples=25)
@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=30), st.integers(1, 200), st.integers(0, 3), st.integers(0, 1500)
)
def test_every_sample_once_an_epoch_and_from_anywhere_the_same(
    rows: list[int], window: int, epoch: int, start: int
) -> None:
    of, n = pool(rows, window), sum(rows)
    assert sorted(of.samples(epoch * n, n).tolist()) == list(range(n))
    whole = of.samples(0, start + 50)
    assert whole[start:].tolist() == pool(rows, window).samples(start, 50).tolist()


@pytest.mark.parametrize("window", [512, 2048])
def test_neighbours_end_up_as_far_apart_as_in_a_uniform_shuffle_of_the_window(window: int) -> None:
    """Neighbours of one row group, over 16 epochs of 16,384 samples; distances beside those of a uniform shuffle."""
    rows, n = [64] * 256, 64 * 256
    of, distances = pool(rows, window), []
    for epoch in range(16):
        at = np.empty(n, dtype=np.int64)
        at[of.samples(epoch * n, n)] = np.arange(n)
        distances.append(np.abs(np.diff(at.reshape(256, 64), axis=1)).ravel())
    found = np.sort(np.concatenate(distances))
    assert found.mean() / ((window + 1) / 3) > 0.98, "no nearer than by a uniform shuffle"
    # The whole distribution, by Kolmogorov and Smirnov's distance: P(d <= x) = 1 - (1 - x/W)^2 for two places of W. The
    # few pairs that a window's or a lane's end parts lie further off.
    x = np.arange(window)
    uniform = 1 - (1 - x / window) ** 2
    below = np.searchsorted(found, x, side="right") / len(found)
    assert np.max(below - uniform) < 0.02, "no more near ones"
    assert np.max(uniform - below) < 0.02 + LANES * 64 / window, "but for those parted"


def test_the_samples_of_one_lane_are_uniform_over_its_window() -> None:
    """Where in its window a sample comes does not depend on where it lies (chi-squared, 15 by 15 cells)."""
    window, n = 1024, 8 * 1024
    counts = np.zeros((16, 16))
    for epoch in range(40):
        order = pool([n // 64] * 64, window).samples(epoch * n, n)
        lane = order[3::LANES][:128]  # the first window of lane 3
        rank = np.argsort(np.argsort(lane))
        np.add.at(counts, (np.arange(128) // 8, rank // 8), 1)
    expected = counts.sum() / counts.size
    assert ((counts - expected) ** 2 / expected).sum() < 330  # 225 on average, of which 330 is far beyond 0.999


def take(snapshot: Snapshot, steps: int, mixture: tuple[Phase, ...] = (), world: int = 1) -> list[list[str]]:
    """Ids of global batches of 64, from the parts of `world` ranks."""
    loaders = [SequenceLoader(snapshot, 64, rank, world, seed=5, mixture=mixture) for rank in range(world)]
    parts = [[b.sequence_ids for b in itertools.islice(loader, steps)] for loader in loaders]
    return [list(itertools.chain(*zip(*of_step, strict=True))) for of_step in zip(*parts, strict=True)]


@pytest.fixture
def large(write_many: WriteMany) -> Snapshot:
    lake = write_many(1000, files=3, validation=40, domains=("text", "text", "code"))
    return open_sequences(lake, window_bytes=128 * ROW)


@pytest.mark.parametrize("mixture", [(), MIXTURE], ids=["all", "mixture"])
def test_ranks_share_each_global_batch_and_resume_anywhere(large: Snapshot, mixture: tuple[Phase, ...]) -> None:
    assert (large.fits, large.num_sequences) == (False, 1000)
    whole = take(large, 20, mixture)
    for world in (2, 4, 8):
        assert take(large, 20, mixture, world) == whole
    state = SequenceLoader(large, 64, seed=5, mixture=mixture).state_dict()
    for step, expected in enumerate(whole):
        loaders = [SequenceLoader(large, 64, rank, 2, seed=5, mixture=mixture) for rank in range(2)]
        for loader in loaders:
            kept = json.loads(json.dumps(state))
            if step % 2:
                kept.pop("domain_samples", None)  # it is counted then
            loader.load_state_dict(kept)
        parts = [next(iter(loader)).sequence_ids for loader in loaders]
        assert list(itertools.chain(*zip(*parts, strict=True))) == expected
        state = loaders[0].state_dict()


def test_each_sequence_comes_once_an_epoch_of_all_and_of_its_domain(large: Snapshot) -> None:
    flat = list(itertools.chain(*take(large, 32)))  # 2048 of 1000
    assert len(set(flat[:1000])) == len(set(flat[1000:2000])) == 1000
    assert flat[:1000] != flat[1000:2000]
    batches = list(itertools.islice(SequenceLoader(large, 64, seed=5, mixture=MIXTURE), 30))
    of_code = [n for b in batches for n, d in zip(b.sequence_ids, b.domains, strict=True) if d == "code"]
    count = int(large.rows_C[large.domain_C == large.domains.index("code")].sum())
    for at in range(0, len(of_code) - count, count):
        assert len(set(of_code[at : at + count])) == count
    shares = Counter(d for b in batches[3:] for d in b.domains)
    assert abs(shares["code"] - 0.75 * 27 * 64) <= 4 * LANES


def test_canonical_order_is_that_of_the_files_and_the_dataset_is_the_loaders(large: Snapshot) -> None:
    numbers = [int(row[0]) for batch in in_order(large, 30) for row in batch.tokens]
    assert len(set(numbers)) == 1000
    assert take(large, 2) == [
        [e["sequence_id"] for e in itertools.islice(iterable_dataset(large, seed=5), at, at + 64)] for at in (0, 64)
    ]
    batches: list[Batch] = list(in_order(large, 30))
    for batch in batches:
        for row, domain in zip(batch.tokens, batch.domains, strict=True):
            assert domain == ("text", "text", "code")[int(row[0]) % 3], "domain and tokens are of one row"


def test_the_window_is_part_of_a_state(large: Snapshot, write_many: WriteMany) -> None:
    state = SequenceLoader(large, 64).state_dict()
    other = open_sequences(large.lake, window_bytes=64 * ROW)
    with pytest.raises(ModelError, match="window 128, here 64"):
        SequenceLoader(other, 64).load_state_dict(state)
    whole = open_sequences(large.lake)
    assert "window" not in SequenceLoader(whole, 64).state_dict()
    with pytest.raises(ModelError, match="window 128, here None"):
        SequenceLoader(whole, 64).load_state_dict(state)


@pytest.mark.parametrize("window", [256, 512])
def test_eight_ranks_read_the_columns_once_an_epoch(write_many: WriteMany, window: int) -> None:
    snapshot = open_sequences(write_many(4096, row_group=16, files=4), window_bytes=window * ROW)
    read, _ = one_epoch(snapshot, 8, batch=8)
    assert 1 <= read / column_bytes(snapshot) < 1.05
    assert groups_of_ranks(snapshot, (Phase(weights={"text": 1}),)) <= len(snapshot.file_G) + LANES - 1
    assert distance(snapshot) > 0.98


def groups_of_ranks(snapshot: Snapshot, mixture: tuple[Phase, ...]) -> int:
    """Row groups that the ranks need in an epoch, each rank's counted by itself."""
    samples = Order(snapshot, 0, mixture, 64).samples(0, snapshot.num_sequences)
    return sum(len(np.unique(snapshot.locate(samples[rank::8])[0])) for rank in range(8))


def test_memory_is_bounded_by_the_room_whatever_the_split(write_many: WriteMany) -> None:
    """The room does not grow with the split, and Arrow holds no more; with less, row groups are read again."""
    lakes = [write_many(count, length=256, lake=str(count)) for count in (1024, 4096)]
    small, large = (open_sequences(lake, window_bytes=256 * 1024) for lake in lakes)
    room = Order(large, 0, (), 64).room(8)
    assert room == Order(small, 0, (), 64).room(8) < large.group_bytes(0) * len(large.file_G) / 20
    _, held = one_epoch(large, 8, batch=8)
    assert held < 1.25 * room  # and what is on its way
    tight = 4 * large.group_bytes(0)
    loader = SequenceLoader(large, 64, cache_bytes=tight)
    batches = list(itertools.islice(loader, 4))
    assert loader._reader._groups._used <= tight
    assert loader.bytes_read > 2 * column_bytes(large) / 16, "for a sixteenth of the split"
    assert [b.sequence_ids for b in batches] == [b.sequence_ids for b in itertools.islice(SequenceLoader(large, 64), 4)]
