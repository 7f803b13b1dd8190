"""A lake in Google's or Azure's object store is read as one on the disk, and its small files are written there."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from benchmarks.loader_store import BUCKET, CUT, RESET, Fault
from model import lake as lakes
from model.errors import ModelError
from model.loader import store
from model.loader.filesystems import open_filesystem
from model.loader.loader import Batch, SequenceLoader
from model.loader.snapshot import Snapshot, open_sequences
from tests.stores import Remote, azure_options, azure_server, environment, google_server, upload

WriteMany = Callable[..., str]
WINDOW = 128 * 64  # bytes: 64 sequences of 32 tokens


class Cloud(NamedTuple):
    """A store behind a proxy, which the environment names."""

    scheme: str
    proxy: Remote


@pytest.fixture(scope="module")
def gs() -> Iterator[Remote]:
    with google_server() as port, closing(Remote(port)) as proxy:
        yield proxy


@pytest.fixture(scope="module")
def abfs() -> Iterator[Remote]:
    with azure_server() as port, closing(Remote(port)) as proxy:
        yield proxy


@pytest.fixture(params=["gs", "abfs"])
def cloud(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Cloud:
    proxy: Remote = request.getfixturevalue(request.param)
    proxy.fail()
    for name, value in environment(request.param, proxy.port).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(store, "_FIRST_WAIT", 0.001)
    monkeypatch.setattr(store, "_LONGEST_WAIT", 0.01)
    return Cloud(request.param, proxy)


def take(snapshot: Snapshot, steps: int, state: dict[str, object] | None = None) -> list[Batch]:
    loader = SequenceLoader(snapshot, 8, seed=3)
    if state is not None:
        loader.load_state_dict(state)
    return list(itertools.islice(loader, steps))


def assert_same(ours: list[Batch], theirs: list[Batch]) -> None:
    assert [b.sequence_ids for b in ours] == [b.sequence_ids for b in theirs]
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a.tokens, b.tokens)
        assert torch.equal(a.loss_mask, b.loss_mask)


@pytest.mark.parametrize("window", [WINDOW, 1 << 30], ids=["windows", "whole"])
def test_it_reads_as_the_disk_and_goes_on_where_it_was(write_many: WriteMany, cloud: Cloud, window: int) -> None:
    folder = write_many(130, files=2)
    lake = upload(folder, cloud.scheme, f"a lake {window}")
    ours, disk = open_sequences(lake, window_bytes=window), open_sequences(folder, window_bytes=window)
    assert (ours.content, ours.fits) == (disk.content, window > WINDOW)
    loader = SequenceLoader(ours, 8, seed=3)
    batches = iter(loader)
    first = [next(batches) for _ in range(5)]
    assert_same(first + take(open_sequences(lake, window_bytes=window), 15, loader.state_dict()), take(disk, 20))


def test_a_store_that_fails_now_and_then_reads_as_the_disk(write_many: WriteMany, cloud: Cloud) -> None:
    folder = write_many(64, files=2)
    lake = upload(folder, cloud.scheme, "faults")
    faults: list[Fault] = [None, 500, None, None, 503, None, None, CUT, None, None, RESET]
    cloud.proxy.fail(*faults, *[None] * 200)
    ours = take(open_sequences(lake, window_bytes=WINDOW), 8)
    assert set(cloud.proxy.fail()) == set(faults), "all of it has happened"
    assert_same(ours, take(open_sequences(folder, window_bytes=WINDOW), 8))


@pytest.mark.parametrize(
    ("fault", "said", "code"),
    [(403, "may not be read", 1), (404, "is gone", 1), (503, "could not be read in 1 attempts", 75)],
)
def test_a_lasting_failure_ends_it_with_one_sentence(
    write_many: WriteMany, cloud: Cloud, monkeypatch: pytest.MonkeyPatch, fault: int, said: str, code: int
) -> None:
    monkeypatch.setattr(store, "ATTEMPTS", 1)
    lake = upload(write_many(16), cloud.scheme, f"lasting {fault}")
    cloud.proxy.fail(fault, only=".parquet")
    with pytest.raises(ModelError, match=said) as refused:
        open_sequences(lake)
    assert refused.value.exit_code == code
    assert "\n" not in str(refused.value)


# Google's client asks for a file's bytes as it opens it.
@pytest.mark.parametrize("cloud", ["gs"], indirect=True)
def test_an_answer_that_fails_after_the_file_was_found_is_tried_again(write_many: WriteMany, cloud: Cloud) -> None:
    folder = write_many(16)
    lake = upload(folder, cloud.scheme, "late")
    cloud.proxy.fail(404, *[None] * 50, only="alt=media")
    ours = take(open_sequences(lake), 2)
    assert 404 in cloud.proxy.fail()
    assert_same(ours, take(open_sequences(folder), 2))


def test_a_log_that_cannot_be_read_is_told_from_one_that_is_not_there(write_many: WriteMany, cloud: Cloud) -> None:
    lake = upload(write_many(8), cloud.scheme, "log")
    with pytest.raises(ModelError, match="There is no table"):
        open_sequences(f"{cloud.scheme}://{BUCKET}/nowhere")
    if cloud.scheme == "abfs":  # fake-gcs-server answers 500 here, which Google's does not
        with pytest.raises(ModelError, match="There is no bucket"):
            open_sequences("abfs://nowhere/lake")
    cloud.proxy.fail(403)
    with pytest.raises(ModelError, match="may not be read") as denied:
        open_sequences(lake)
    cloud.proxy.fail(500)
    few = {"max_retries": "1", "retry_timeout": "5s"}
    with pytest.raises(ModelError, match="does not answer") as silent:
        open_sequences(lake, storage_options=few)
    assert (denied.value.exit_code, silent.value.exit_code) == (1, 75)
    assert "\n" not in str(denied.value) + str(silent.value)


def test_options_reach_both_clients(write_many: WriteMany, cloud: Cloud, monkeypatch: pytest.MonkeyPatch) -> None:
    lake = upload(write_many(20), cloud.scheme, "options")
    options = {"google_base_url": f"http://127.0.0.1:{cloud.proxy.port}"}
    monkeypatch.setenv("GOOGLE_BASE_URL", "http://127.0.0.1:1")
    if cloud.scheme == "abfs":
        monkeypatch.delenv("AZURE_STORAGE_USE_EMULATOR")
        options = azure_options(cloud.proxy.port)
    assert len(take(open_sequences(lake, storage_options=options), 2)) == 2


def test_small_files_are_kept_and_read(cloud: Cloud, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty" / "evaluations").mkdir(parents=True)
    (tmp_path / "empty" / "evaluations" / "y.json").touch()
    lake = upload(str(tmp_path / "empty"), cloud.scheme, "kept")
    for loss in (1.5, 0.5):
        lakes.keep(lake, "evaluations/x.json", {"loss": loss})
        assert lakes.read_kept(lake, "evaluations/x.json") == {"loss": loss}
    assert lakes.read_kept(lake, "evaluations/y.json") is None, "one that is being written"
    assert lakes.read_kept(lake, "evaluations/z.json") is None
    monkeypatch.setattr(lakes, "ATTEMPTS", 1)
    cloud.proxy.fail(403)
    for act in (lambda: lakes.read_kept(lake, "evaluations/x.json"), lambda: lakes.keep(lake, "x.json", {})):
        with pytest.raises(ModelError, match="may not be") as denied:
            act()
        assert denied.value.exit_code == 1
    cloud.proxy.fail(500)
    with pytest.raises(ModelError, match="look after the store") as failed:
        lakes.read_kept(lake, "evaluations/x.json")
    assert failed.value.exit_code == 75


def test_an_account_that_the_files_client_would_not_use_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GOOGLE_APPLICATION_CREDENTIALS", raising=False)
    for options in ({"google_service_account": "/a.json"}, {"GOOGLE_APPLICATION_CREDENTIALS": "/a.json"}):
        with pytest.raises(ModelError, match="set GOOGLE_APPLICATION_CREDENTIALS") as refused:
            open_filesystem("gs://bucket/lake", options)
        assert refused.value.exit_code == 2
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", "/a.json")
    assert open_filesystem("gs://bucket/lake/", {"google_service_account": "/a.json"})[1] == "bucket/lake"
