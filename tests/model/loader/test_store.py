"""A lake in an object store is read as one on the disk, to the token, whatever the store does meanwhile."""

from __future__ import annotations

import itertools
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks.loader_store import CUT, RESET, Fault, Proxy, upload
from model.errors import ModelError
from model.loader import store
from model.loader.filesystems import open_filesystem
from model.loader.loader import Batch, SequenceLoader, in_order
from model.loader.snapshot import Snapshot, open_sequences

WriteMany = Callable[..., str]
WINDOW = 128 * 64  # bytes: 64 sequences of 32 tokens


def take(snapshot: Snapshot, steps: int) -> list[Batch]:
    return list(itertools.islice(SequenceLoader(snapshot, 8, seed=3), steps))


def assert_same(ours: list[Batch], theirs: list[Batch]) -> None:
    assert [b.sequence_ids for b in ours] == [b.sequence_ids for b in theirs]
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a.tokens, b.tokens)
        assert torch.equal(a.segment_ids, b.segment_ids)
        assert torch.equal(a.loss_mask, b.loss_mask)


@pytest.mark.parametrize("window", [WINDOW, 1 << 30], ids=["windows", "whole"])
def test_a_store_that_fails_now_and_then_reads_as_the_disk(
    write_many: WriteMany, s3: Proxy, s3_port: int, window: int
) -> None:
    folder = write_many(130, files=2)
    lake = upload(folder, s3_port, f"faults {window}")
    faults: list[Fault] = [None, 500, None, None, 503, None, None, CUT, None, None, RESET]
    turn = itertools.cycle(faults)
    s3.fault = lambda method, path: next(turn)
    snapshot = open_sequences(lake, window_bytes=window)
    disk = open_sequences(folder, window_bytes=window)
    assert (snapshot.content, snapshot.fits) == (disk.content, window > WINDOW)
    assert_same(take(snapshot, 20), take(disk, 20))
    assert_same(list(in_order(snapshot, 7)), list(in_order(disk, 7)))
    assert set(Counter(fault for _, _, fault in s3.seen)) == set(faults), "all of it has happened"


def test_options_reach_both_clients(
    write_many: WriteMany, s3: Proxy, s3_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    lake = upload(write_many(20), s3_port, "options")
    options = {"aws_endpoint_url": f"http://127.0.0.1:{s3.port}", "AWS_ALLOW_HTTP": "true"}
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    assert len(take(open_sequences(lake, storage_options=options), 2)) == 2


def files_only(status: Fault) -> Callable[[str, str], Fault]:
    return lambda method, path: status if ".parquet" in path else None


@pytest.mark.parametrize(
    ("fault", "said", "code"),
    [(403, "may not be read", 1), (404, "is gone", 1), (503, "could not be read in 3 attempts", 75)],
)
def test_a_lasting_failure_ends_it_with_one_sentence_in_its_turn(
    write_many: WriteMany, s3: Proxy, s3_port: int, monkeypatch: pytest.MonkeyPatch, fault: int, said: str, code: int
) -> None:
    monkeypatch.setattr(store, "ATTEMPTS", 3)
    lake = upload(write_many(160), s3_port, f"lasting {fault}")
    s3.fault = files_only(fault)
    with pytest.raises(ModelError, match=said) as refused:
        open_sequences(lake, window_bytes=WINDOW)
    assert refused.value.exit_code == code
    s3.fault = lambda method, path: None
    snapshot = open_sequences(lake, window_bytes=WINDOW)
    loader = SequenceLoader(snapshot, 4, cache_bytes=1 << 14)
    batches = iter(loader)
    next(batches)
    states = [loader.state_dict()]
    s3.fault = files_only(fault)
    with pytest.raises(ModelError, match=said) as ended:
        states.extend(loader.state_dict() for _ in batches)
    assert ended.value.exit_code == code
    assert "\n" not in str(ended.value)
    assert loader.state_dict() == states[-1], "what was not handed out is not counted"
    # The same loader goes on, with the very next sample, once the store answers again.
    s3.fault = lambda method, path: None
    following = SequenceLoader(snapshot, 4)
    following.load_state_dict(states[-1])
    assert next(iter(loader)).sequence_ids == next(iter(following)).sequence_ids


def test_a_log_that_cannot_be_read_is_told_from_one_that_is_not_there(
    write_many: WriteMany, s3: Proxy, s3_port: int
) -> None:
    lake = upload(write_many(8), s3_port, "log")
    with pytest.raises(ModelError, match="There is no table") as absent:
        open_sequences("s3://lake/nowhere")
    assert absent.value.exit_code == 1
    with pytest.raises(ModelError, match="There is no bucket"):
        open_sequences("s3://nowhere/lake")
    s3.fault = lambda method, path: 403
    with pytest.raises(ModelError, match="may not be read") as denied:
        open_sequences(lake)
    assert denied.value.exit_code == 1
    s3.fault = lambda method, path: 500
    few = {"max_retries": "1", "retry_timeout": "5s"}
    with pytest.raises(ModelError, match="does not answer") as silent:
        open_sequences(lake, storage_options=few)
    assert silent.value.exit_code == 75
    for refused in (absent, denied, silent):
        assert "\n" not in str(refused.value)


def readers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("loader")]


def gone(threads: Callable[[], list[threading.Thread]], seconds: float = 20) -> bool:
    until = time.monotonic() + seconds
    while threads() and time.monotonic() < until:
        time.sleep(0.01)
    return not threads()


def test_closing_or_leaving_an_iterator_ends_its_threads(
    write_many: WriteMany, s3: Proxy, s3_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "_FIRST_WAIT", 30)  # a thread that waits to try again is woken
    monkeypatch.setattr(store, "_LONGEST_WAIT", 30)
    snapshot = open_sequences(upload(write_many(160), s3_port, "threads"), window_bytes=WINDOW)
    loader = SequenceLoader(snapshot, 4, cache_bytes=1 << 14)
    batches = iter(loader)
    next(batches)
    assert readers()
    s3.fault = files_only(500)
    time.sleep(0.2)
    batches.close()  # type: ignore[attr-defined]
    assert gone(readers)
    s3.fault = lambda method, path: None
    next(iter(loader))  # left at once
    assert gone(readers)


def test_a_store_of_no_known_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no store that the loader knows"):
        open_filesystem("ftp://somewhere/lake", {})
    options = {"AZURE_STORAGE_ACCOUNT_NAME": "account", "azure_storage_account_key": "a2V5"}
    for uri in ("abfs://container/lake/gold", "abfss://container@account.dfs.core.windows.net/lake/gold/"):
        filesystem, root = open_filesystem(uri, options)
        assert (filesystem.type_name, root) == ("abfs", "container/lake/gold")
