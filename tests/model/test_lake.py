"""A lake's small files, by path and by URI."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import quote

import pytest

from model.errors import ModelError
from model.lake import keep, local_path, read_kept, tokenizer_file
from model.loader.store import is_local
from model.registry.store import lake_folder
from model.train.config import TrainConfig
from tests.model.conftest import WriteSequences


def test_a_path_and_its_uri_are_the_same_lake(write_sequences: WriteSequences) -> None:
    lake = write_sequences("a lake 100%")
    uri = f"file://{quote(lake)}"
    assert "%20" in uri
    assert is_local(uri)
    assert local_path(uri) == local_path(lake) == Path(lake)
    assert lake_folder(uri) == Path(lake)
    assert TrainConfig(name="a").output_folder(uri) == Path(lake, "training", "a")
    (file,) = Path(lake, "tokenizers").glob("*.json")
    assert tokenizer_file(uri, file.stem) == tokenizer_file(lake, file.stem) == file
    keep(uri, "evaluations/x.json", {"loss": 1.5})
    assert read_kept(lake, "evaluations/x.json") == read_kept(uri, "evaluations/x.json") == {"loss": 1.5}
    assert read_kept(uri, "evaluations/y.json") is None


def test_a_tokenizer_that_was_changed_is_refused(write_sequences: WriteSequences) -> None:
    lake = write_sequences()
    (file,) = Path(lake, "tokenizers").glob("*.json")
    file.write_text(file.read_text() + " ")
    with pytest.raises(ModelError, match="its sha256 is not its name"):
        tokenizer_file(f"file://{lake}", file.stem)
    with pytest.raises(ModelError, match="There is no tokenizer"):
        tokenizer_file(lake, "0" * 64)


def test_a_store_that_does_not_answer_is_worth_another_try(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"ACCESS_KEY_ID": "a", "SECRET_ACCESS_KEY": "b", "REGION": "us-east-1"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setattr("model.lake.ATTEMPTS", 1)
    for act in (lambda: read_kept("s3://bucket/lake", "x"), lambda: keep("s3://bucket/lake", "x", {})):
        with pytest.raises(ModelError, match="look after the store") as failed:
            act()
        assert failed.value.exit_code == 75
