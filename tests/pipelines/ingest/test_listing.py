"""The fingerprint of a source: equal while nothing changes, another for every change that could be read."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipelines.ingest.config import IngestConfig, SourceConfig
from pipelines.ingest.listing import Listing, ingest_input, list_source, list_sources


def version(folder: Path, lake: str = "") -> int | None:
    config = IngestConfig(sources=(SourceConfig(path=str(folder)),))
    return ingest_input(list_sources(config, lake), None).get(f"files:{folder.name}")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A source that is old enough to be known by its fingerprint: the clock is an hour ahead."""
    now = time.time_ns
    monkeypatch.setattr(time, "time_ns", lambda: now() + 3600 * 10**9)
    folder = tmp_path / "source"
    (folder / "below").mkdir(parents=True)
    (folder / "a.txt").write_text("one")
    (folder / "below" / "b.txt").write_text("two")
    return folder


def _same_size_old_time(folder: Path) -> None:
    status = (folder / "a.txt").stat()
    (folder / "a.txt").write_text("ONE")
    os.utime(folder / "a.txt", ns=(status.st_atime_ns, status.st_mtime_ns))


CHANGES: dict[str, Callable[[Path], object]] = {
    "added": lambda folder: (folder / "c.txt").write_text("three"),
    "removed": lambda folder: (folder / "below" / "b.txt").unlink(),
    "renamed": lambda folder: (folder / "a.txt").rename(folder / "z.txt"),
    "grown": lambda folder: (folder / "a.txt").write_text("one and more"),
    "rewritten, the time set back": _same_size_old_time,
    "made unreadable": lambda folder: (folder / "a.txt").chmod(0),
    "empty folder added": lambda folder: (folder / "empty").mkdir(),
    "link out of it added": lambda folder: (folder / "link").symlink_to("/etc/hostname"),
    "skipped file added": lambda folder: (folder / "a.png").touch(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_every_change_shows(folder: Path, change: Callable[[Path], object]) -> None:
    before = version(folder)
    assert before is not None
    assert version(folder) == before
    time.sleep(0.02)  # one tick of the file system's clock, for the changes that keep size and name
    change(folder)
    assert version(folder) not in (None, before)


def listed(path: Path, format: Any = None, **settings: bool) -> tuple[list[str], Listing]:
    listing = list_source(0, SourceConfig(path=str(path), format=format).resolved(), **settings)
    return [entry.relative for entry in listing.entries], listing


def test_links_stay_in_their_source(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("of another owner")
    (tmp_path / "source-2").mkdir()
    (tmp_path / "source-2" / "near.txt").write_text("its name begins as the source's")
    for name, target in {
        "inside": "below/b.txt",
        "outside": "../secret.txt",
        "absolute": str(tmp_path / "secret.txt"),
        "twice": "outside",
        "near": "../source-2/near.txt",
        "gone": "../nothing",
    }.items():
        (folder / name).symlink_to(target)
    taken, listing = listed(folder)
    assert taken == ["a.txt", "inside", "below/b.txt"]
    assert (listing.links_outside, listing.skipped) == (5, 0)
    # The source may be a link itself, and be a glob.
    (tmp_path / "link").symlink_to(folder)
    assert listed(tmp_path / "link")[0] == taken
    assert listed(folder / "**" / "*")[0] == taken
    everything = sorted([*taken, "outside", "absolute", "twice", "near", "gone"])
    assert sorted(listed(folder, follow_links=True)[0]) == everything
    assert sorted(listed(folder, "parquet")[0]) == everything
    # A file that is named itself is what was asked for.
    assert listed(folder / "outside")[0] == ["outside"]


def test_a_hugging_face_cache_is_read_through_its_links(tmp_path: Path) -> None:
    repository = tmp_path / "datasets--owner--name"
    (repository / "blobs").mkdir(parents=True)
    (repository / "blobs" / "3f2a").write_text('{"text": "one"}')
    (tmp_path / "secret.txt").write_text("of another owner")
    snapshot = repository / "snapshots" / "abc" / "data"
    snapshot.mkdir(parents=True)
    (snapshot / "train.jsonl").symlink_to("../../../blobs/3f2a")
    (snapshot / "secret.txt").symlink_to(tmp_path / "secret.txt")
    for folder in (snapshot, snapshot.parent):
        taken, listing = listed(folder)
        assert [Path(relative).name for relative in taken] == ["train.jsonl"]
        assert listing.links_outside == 1


def test_hidden_files_are_taken_or_counted(folder: Path) -> None:
    (folder / ".env").write_text("TOKEN=1")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "c.txt").write_text("three")
    assert listed(folder)[0] == [".env", "a.txt", ".cache/c.txt", "below/b.txt"]
    taken, listing = listed(folder, hidden=False)
    assert (taken, listing.hidden) == (["a.txt", "below/b.txt"], 2)
    assert listing.fingerprint() != listed(folder)[1].fingerprint()


def test_the_lake_in_the_source_is_no_change(folder: Path) -> None:
    lake = folder / "lake"
    before = version(folder, str(lake))
    lake.mkdir()
    (lake / "part.parquet").write_text("rows")
    assert version(folder, str(lake)) == before


def test_a_file_just_written_has_no_fingerprint(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one")
    assert version(tmp_path) is None


def test_one_source_without_a_fingerprint_leaves_none(folder: Path, tmp_path: Path) -> None:
    new = tmp_path / "new"
    new.mkdir()
    (new / "a.txt").write_text("one")
    later = time.time_ns()
    os.utime(new / "a.txt", ns=(later, later))
    config = IngestConfig(sources=tuple(SourceConfig(path=str(path)) for path in (folder, new)))
    assert ingest_input(list_sources(config, ""), None) == {}
