"""Evaluation sets come whole or not at all: every mistake is one sentence that names the file and the line."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from pipelines.decontaminate import sets as module
from pipelines.decontaminate.config import DecontaminateConfig
from pipelines.decontaminate.ngrams import build
from pipelines.decontaminate.sets import read_sets, sets_input
from pipelines.errors import LakeError


def config(folder: Path, **fields: str) -> DecontaminateConfig:
    return DecontaminateConfig(sets=str(folder), fields=fields)


def test_sets_are_read_by_name_and_field(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SLICE", 5)
    lines = [json.dumps({"text": "first\u2028part"}, ensure_ascii=False), "", json.dumps({"text": "second"}), " "]
    (tmp_path / "b.v2.jsonl").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"question": "third", "text": 4}\n{"question": "\\ud800"}'))
    (tmp_path / ".hidden").write_text("{")
    first, second = read_sets(config(tmp_path, a="question"))
    assert (first.name, second.name) == ("a", "b.v2")
    assert list(first.items()) == ["third", "?"]
    assert [array.to_pylist() for array in second.texts()] == [["first\u2028part"], ["second"]]
    assert read_sets(DecontaminateConfig()) == ()


def test_the_record_of_a_run_tells_sets_apart(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one"}')
    seen = [sets_input(()), sets_input(read_sets(config(tmp_path)))]
    assert seen[0] == {"sets": 0}
    assert sets_input(read_sets(config(tmp_path))) == seen[1]
    (tmp_path / "a.jsonl").write_text('{"text": "two"}')
    seen.append(sets_input(read_sets(config(tmp_path))))
    (tmp_path / "a.jsonl").rename(tmp_path / "b.jsonl")
    seen.append(sets_input(read_sets(config(tmp_path))))
    assert len({one["sets"] for one in seen}) == 4
    assert all(0 <= one["sets"] < 2**63 for one in seen)


GOOD = b'{"text": "a good line"}\n'


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", GOOD + b"\n{bad\n", "a.jsonl, line 3: no JSON"),
        ("a.jsonl", GOOD + b'{"text": "\xff"}', "a.jsonl, line 2: no JSON"),
        ("a.jsonl", GOOD + b"[" * 100_000, "a.jsonl, line 2: no JSON"),
        ("a.jsonl", GOOD + b'{"question": "x"}', "line 2: no text in a field 'text'; mend the line, or name the field"),
        ("a.jsonl", b'{"text": null}', "a.jsonl, line 1: no text"),
        ("a.jsonl", b'["text"]', "a.jsonl, line 1: no text"),
        ("a.jsonl.gz", GOOD, "a.jsonl.gz is no whole gzip file"),
        ("a.jsonl.gz", gzip.compress(GOOD * 1000)[:-12], "a.jsonl.gz is no whole gzip file"),
        ("a.json", b"{}", "a.json is no evaluation set"),
        (".jsonl", GOOD, "has no evaluation set"),
    ],
)
def test_a_broken_file_is_one_sentence(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(LakeError) as caught:
        build(((one.name, one.texts()) for one in read_sets(config(tmp_path))), 13)
    assert words in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert str(caught.value).count("\n") == 0
    assert str(caught.value).endswith(".")
    assert caught.value.exit_code == 2


def test_a_wrong_folder_is_one_sentence(tmp_path: Path) -> None:
    def mistake(settings: DecontaminateConfig) -> str:
        with pytest.raises(LakeError) as caught:
            read_sets(settings)
        assert caught.value.exit_code == 2
        return str(caught.value)

    assert "is no folder: name the folder" in mistake(config(tmp_path / "none"))
    assert "has no evaluation set" in mistake(config(tmp_path))
    assert "is no local path" in mistake(DecontaminateConfig(sets="s3://bucket/evals"))
    (tmp_path / "a.jsonl").write_bytes(GOOD)
    assert "names the set 'b'" in mistake(config(tmp_path, b="question"))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(GOOD))
    assert "are both the set 'a'" in mistake(config(tmp_path))
    (tmp_path / "a.jsonl.gz").unlink()
    (tmp_path / "sub").mkdir()
    assert "is no evaluation set" in mistake(config(tmp_path))
