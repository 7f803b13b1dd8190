"""Hugging Face data sets without Spark: saved, by a builder, cached under a hub's name; and what cannot be opened."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import datasets
import pytest

from pipelines.errors import LakeError
from pipelines.ingest import hugging_face
from pipelines.ingest.config import IngestConfig, SourceConfig
from pipelines.ingest.listing import ingest_input, list_source, list_sources
from pipelines.ingest.read import Reading, read_entry

LIMIT = 1 << 20


def read_all(path: str, **settings: Any) -> list[tuple[str, str | None]]:
    """Every record's id with its content, or its reason; the data set pickled on the way, as to an executor."""
    source = SourceConfig(path=path, **settings).resolved()
    listing = list_source(0, source)
    data_set = pickle.loads(pickle.dumps(listing.data_set))
    found = []
    for entry in listing.entries:
        reading = Reading()
        outcomes = list(read_entry(source, entry, LIMIT, reading, data_set))
        assert reading.records == len(outcomes)
        found += [(o.source_id, o.problem.reason if o.problem else o.content) for o in outcomes]
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two shards of a train split, one of a test split, as a builder finds them."""
    folder = tmp_path / "corpus"
    (folder / "data").mkdir(parents=True)
    for name, first in (("train-0", 0), ("train-1", 3), ("test-0", 6)):
        rows = [{"key": f"k{n}", "text": f"text {n}", "meta": {"license": "MIT"}} for n in range(first, first + 3)]
        (folder / "data" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the library's own, and no network: the hub is not asked."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    return tmp_path / "cache"


def test_a_folder_by_its_builder(folder: Path, cache: Path) -> None:
    everything = read_all(str(folder), format="datasets", id_field="key")
    assert sorted(everything) == [(f"k{n}", f"text {n}") for n in range(9)]
    assert read_all(str(folder), format="datasets", split="test") == [
        (f"test/00000:{n + 1}", f"text {n + 6}") for n in range(3)
    ]
    # Streamed: nothing was written to the cache.
    assert not list(cache.rglob("*.arrow"))


def test_a_saved_data_set_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hugging_face, "PART_ROWS", 100)
    rows = {"text": [f"text {n}" for n in range(250)], "id": list(range(250)), "picture": [b"\0\1"] * 250}
    data = datasets.Dataset.from_dict(rows)
    data.save_to_disk(str(tmp_path / "one"), num_shards=2)
    datasets.DatasetDict(train=data, test=data.select(range(2))).save_to_disk(str(tmp_path / "two"))
    wanted = [(str(n), f"text {n}") for n in range(250)]
    assert read_all(str(tmp_path / "one")) == wanted
    assert [e.relative for e in list_source(0, SourceConfig(path=str(tmp_path / "one")).resolved()).entries] == [
        "train/00000",
        "train/00001",
        "train/00002",
    ]
    assert read_all(str(tmp_path / "two"), split="train") == wanted
    assert read_all(str(tmp_path / "two"), id_field="none")[-2:] == [
        ("test/00000:1", "text 0"),
        ("test/00000:2", "text 1"),
    ]


def test_a_name_of_the_hub_from_the_cache(folder: Path, cache: Path) -> None:
    datasets.load_dataset(str(folder), cache_dir=str(cache))
    (revision,) = [path.name for path in (cache / "corpus" / "default" / "0.0.0").iterdir() if path.is_dir()]
    shutil.move(cache / "corpus", cache / "someone___corpus")
    # Files are named by the data set, which of a hub's is the last part of its name.
    found = read_all("hf://datasets/someone/corpus", split="train", id_field="key")
    assert found == [(f"k{n}", f"text {n}") for n in range(6)]
    config = IngestConfig(sources=(SourceConfig(path="someone/corpus", format="datasets"),))
    [(name, version), _] = ingest_input(list_sources(config, ""), None).items()
    assert name == f"files:corpus@{revision}"
    split = IngestConfig(sources=(SourceConfig(path="someone/corpus", format="datasets", split="train"),))
    assert ingest_input(list_sources(split, ""), None) not in ({}, {name: version, "erasures": -1})


def test_a_folder_is_known_by_its_files(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.time_ns
    config = IngestConfig(sources=(SourceConfig(path=str(folder), format="datasets"),))
    assert ingest_input(list_sources(config, ""), None) == {}  # just written
    monkeypatch.setattr(time, "time_ns", lambda: now() + 3600 * 10**9)
    first = ingest_input(list_sources(config, ""), None)
    assert list(first) == ["files:corpus", "erasures"]
    assert ingest_input(list_sources(config, ""), None) == first
    (folder / "data" / "train-1.jsonl").write_text('{"text": "new"}\n')
    assert ingest_input(list_sources(config, ""), None) != first


def test_what_is_added_after_the_listing_is_not_read(folder: Path, cache: Path) -> None:
    source = SourceConfig(path=str(folder), format="datasets", split="train", id_field="key").resolved()
    listing = list_source(0, source)
    (folder / "data" / "train-2.jsonl").write_text('{"key": "late", "text": "late"}\n')
    (folder / "data" / "train-1.jsonl").unlink()
    found = [
        (o.source_id, o.problem.reason if o.problem else o.content)
        for entry in listing.entries
        for o in read_entry(source, entry, LIMIT, Reading(), listing.data_set)
    ]
    assert found == [("k0", "text 0"), ("k1", "text 1"), ("k2", "text 2"), ("train/00001:1", "unreadable")]


def test_a_shard_that_breaks_is_one_record(folder: Path, cache: Path) -> None:
    (folder / "data" / "train-1.jsonl").write_text('{"key": "k3", "text": "x"}\n{"key": broken\n')
    source = SourceConfig(path=str(folder), format="datasets", split="train", id_field="key").resolved()
    listing = list_source(0, source)
    reading = Reading()
    [*_, last] = read_entry(source, listing.entries[1], LIMIT, reading, listing.data_set)
    assert last.problem is not None
    assert last.problem.reason == "corrupt_record"
    assert last.problem.detail
    assert not reading.complete


@pytest.mark.parametrize(
    ("settings", "code", "words"),
    [
        ({"path": "someone/unknown", "format": "datasets"}, 75, "hub cannot be reached"),
        ({"path": "hf://datasets/unknown"}, 75, "not in the cache"),
        ({"path": "/no/such/folder", "format": "datasets"}, 2, "no folder and no name"),
        ({"path": "{folder}", "format": "datasets", "split": "validation"}, 2, "no split 'validation', only"),
        ({"path": "{folder}", "format": "datasets", "config": "other"}, 2, "other"),
        ({"path": "{folder}/data/empty", "format": "datasets"}, 2, "There is no data set|cannot be opened"),
        ({"path": "{folder}", "split": "train"}, 2, "set format to datasets"),
    ],
)
def test_what_cannot_be_opened(folder: Path, cache: Path, settings: dict[str, str], code: int, words: str) -> None:
    (folder / "data" / "empty").mkdir()
    config = IngestConfig(sources=(SourceConfig(**{k: v.format(folder=folder) for k, v in settings.items()}),))  # type: ignore[arg-type]
    with pytest.raises(LakeError, match=words) as error:
        list_sources(config, "")
    assert error.value.exit_code == code
    assert "\n" not in str(error.value)


def test_torch_stays_out(folder: Path) -> None:
    """The library loads torch with its first stream, a second and 300 MB in every reader."""
    code = f"""
import sys
from pipelines.ingest.config import SourceConfig
from pipelines.ingest.listing import list_source
assert "datasets" not in sys.modules
listing = list_source(0, SourceConfig(path={str(folder)!r}, format="datasets").resolved())
assert sum(b.num_rows for split, part in listing.data_set.parts() for b in listing.data_set.batches(split, part)) == 9
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
