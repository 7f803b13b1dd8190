"""What the command line makes of its sources."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs.ingest import Settings, config_of
from jobs.settings import UsageError, load


def test_flags_are_added_to_the_file(tmp_path: Path) -> None:
    file = tmp_path / "sources.yaml"
    file.write_text("ingest: {sources: [{path: someone/corpus, format: datasets, split: train, text_field: a.b}]}")
    flags = ["--config", str(file), "--source", "docs", "--source", "hf://datasets/x/y@v1", "--mirror"]
    config = config_of(load(Settings, flags, program="lakemoe ingest"))
    assert [source.path for source in config.sources] == ["someone/corpus", "docs", "hf://datasets/x/y@v1"]
    assert config.mirror
    assert not config_of(load(Settings, flags[:4], program="lakemoe ingest")).mirror
    hub = config.resolved_sources()[2]
    assert (hub.name, hub.format, hub.path, hub.revision) == ("y", "datasets", "x/y", "v1")


def test_what_is_of_a_data_set_alone(tmp_path: Path) -> None:
    file = tmp_path / "sources.yaml"
    file.write_text("ingest: {sources: [{path: docs, format: jsonl, split: train}]}")
    with pytest.raises(UsageError, match="split is of a Hugging Face data set"):
        load(Settings, ["--config", str(file)], program="lakemoe ingest")
