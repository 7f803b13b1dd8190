"""One file to its records, without Spark: every reason, and what is kept of a file that breaks off."""

from __future__ import annotations

import gzip
import json
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.errors import LakeError
from pipelines.ingest.config import IngestConfig, SourceConfig
from pipelines.ingest.lines import RAW_BYTES, split_lines
from pipelines.ingest.listing import glob_pattern, list_source
from pipelines.ingest.packed import zstd
from pipelines.ingest.read import Reading, read_entry
from pipelines.ingest.records import Outcome

LIMIT = 1 << 20


def read_all(path: Path, max_bytes: int = LIMIT, **settings: Any) -> list[Outcome]:
    """Every record of a source, in order; the reader's own count checked on the way."""
    source = SourceConfig(path=str(path), **settings).resolved()
    outcomes: list[Outcome] = []
    for entry in list_source(0, source).entries:
        reading = Reading()
        found = list(read_entry(source, entry, max_bytes, reading))
        assert reading.records == len(found)
        outcomes += found
    return outcomes


def summary(outcomes: list[Outcome]) -> list[tuple[str, str | None]]:
    """Each record's id with its content, or its reason."""
    return [(o.source_id, o.problem.reason if o.problem else o.content) for o in outcomes]


def write_jsonl(path: Path, *records: object) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"ok \xff", "invalid_utf8"),
        (b"cut \xe2\x82", "invalid_utf8"),
        (b"a\0b", "binary"),
        ("wide".encode("utf-16"), "binary"),
        (b"x" * (LIMIT + 1), "too_large"),
    ],
)
def test_file_that_is_no_document(tmp_path: Path, data: bytes, reason: str) -> None:
    (tmp_path / "a.txt").write_bytes(data)
    [outcome] = read_all(tmp_path)
    assert outcome.problem is not None
    assert outcome.content is None
    assert (outcome.source_id, outcome.problem.reason) == ("a.txt", reason)
    assert outcome.problem.raw == data[:RAW_BYTES]
    assert outcome.problem.detail


@pytest.mark.parametrize("data", [b"", b"\xef\xbb\xbfbom\r\n", "Grüße\u2028".encode(), b"x" * LIMIT, b"\x01\x1b"])
def test_file_comes_in_exactly(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.txt").write_bytes(data)
    [outcome] = read_all(tmp_path)
    assert outcome.content is not None
    assert outcome.content.encode() == data


def test_file_that_vanished_or_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "gone.txt").write_text("x")
    (tmp_path / "link.txt").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop.txt").symlink_to("loop.txt")
    os.mkfifo(tmp_path / "pipe.txt")
    source = SourceConfig(path=str(tmp_path)).resolved()
    entries = list_source(0, source).entries
    (tmp_path / "gone.txt").unlink()
    os.mkfifo(tmp_path / "gone.txt")
    outcomes = [o for entry in entries for o in read_entry(source, entry, LIMIT, Reading())]
    assert summary(outcomes) == [(n, "unreadable") for n in ("gone.txt", "link.txt", "loop.txt", "pipe.txt")]


def test_read_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("x")

    def refuse(*_: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pipelines.ingest.read._open_regular", refuse)
    [outcome] = read_all(tmp_path)
    assert outcome.problem is not None
    assert (outcome.problem.reason, outcome.problem.detail) == ("unreadable", "Permission denied")


def test_jsonl_records_and_their_reasons(tmp_path: Path) -> None:
    lines = [
        b'\xef\xbb\xbf{"text": "first", "id": "a", "n": [1, "\xc3\xbc"], "url": "u", "none": null}',
        b"",
        b"  \t",
        b'{"text": ""}',
        b'{"text": "nul \\u0000 stays", "id": 7}',
        b'{"id": "b"}',
        b'{"id": "c", "text": null}',
        b'{"id": "d", "text": 3}',
        b'{"id": ["e"], "text": "x"}',
        b"[1]",
        b"{broken",
        b'{"text": "\xff"}',
        b'{"text": "raw \0 nul"}',
        b'{"text": "\\ud800"}',
        b'{"text": "ok", "\\ud800": "k"}',
        b"[" * 100_000,
        b'{"text": 1' + b"0" * 5000 + b"}",
        b'{"text": "' + b"y" * LIMIT + b'"}',
        b'{"text": "last", "license": "MIT", "language": ["de"]}',
    ]
    (tmp_path / "r.jsonl").write_bytes(b"\n".join(lines))
    outcomes = read_all(tmp_path / "r.jsonl")
    assert summary(outcomes) == [
        ("a", "first"),
        ("r.jsonl:4", ""),
        ("7", "nul \0 stays"),
        ("b", "missing_text"),
        ("c", "missing_text"),
        ("d", "wrong_type"),
        ("r.jsonl:9", "wrong_type"),
        ("r.jsonl:10", "wrong_type"),
        ("r.jsonl:11", "corrupt_record"),
        ("r.jsonl:12", "invalid_utf8"),
        ("r.jsonl:13", "binary"),
        ("r.jsonl:14", "invalid_utf8"),
        ("r.jsonl:15", "invalid_utf8"),
        ("r.jsonl:16", "corrupt_record"),
        ("r.jsonl:17", "corrupt_record"),
        ("r.jsonl:18", "too_large"),
        ("r.jsonl:19", "last"),
    ]
    assert outcomes[0].metadata == {"n": '[1, "ü"]', "url": "u"}
    assert (outcomes[-1].license, outcomes[-1].metadata) == ("MIT", {"language": '["de"]'})
    assert all(len(o.problem.raw) <= RAW_BYTES for o in outcomes if o.problem)
    assert outcomes[9].problem is not None
    assert outcomes[9].problem.raw == lines[11]


def test_field_map_given_and_guessed(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "r.jsonl", {"content": "a", "key": "k", "lang": "en"}, {"content": "b", "text": "c"})
    assert summary(read_all(path)) == [("r.jsonl:1", "a"), ("r.jsonl:2", "b")]
    [first, second] = read_all(
        path, text_field="text", id_field="key", language_field="lang", kind="code", license="MIT"
    )
    assert summary([first, second]) == [("k", "missing_text"), ("r.jsonl:2", "c")]
    assert (second.kind, second.license) == ("code", "MIT")


@pytest.mark.parametrize(
    ("record", "settings", "wanted", "metadata"),
    [
        (
            {"meta": {"license": "MIT", "lang": "en", "n": 1}, "doc": {"body": {"text": "a"}, "key": 7}},
            {"text_field": "doc.body.text", "id_field": "doc.key", "license_field": "meta.license"},
            ("7", "a", "MIT", None),
            {"meta": '{"lang": "en", "n": 1}'},
        ),
        # A key with a dot is itself before it is a path.
        (
            {"doc.text": "flat", "doc": {"text": "deep"}, "language": "de"},
            {"text_field": "doc.text"},
            (None, "flat", None, "de"),
            {"doc": '{"text": "deep"}'},
        ),
        # What a path leads past is no field, nor is one that is no string a licence.
        (
            {"text": "t", "meta": {"license": ["MIT"]}, "id": {"a": 1}},
            {"id_field": "id.b.c", "license_field": "meta.license", "license": "CC0-1.0"},
            (None, "t", "CC0-1.0", None),
            {"meta": '{"license": ["MIT"]}', "id": '{"a": 1}'},
        ),
    ],
)
def test_nested_fields(
    tmp_path: Path,
    record: dict[str, Any],
    settings: dict[str, str],
    wanted: tuple[str | None, ...],
    metadata: dict[str, str],
) -> None:
    path = write_jsonl(tmp_path / "r.jsonl", record)
    pq.write_table(pa.Table.from_pylist([record]), tmp_path / "r.parquet")
    for source in (path, tmp_path / "r.parquet"):
        [outcome] = read_all(source, **settings)
        found = (outcome.source_id, outcome.content, outcome.license, outcome.language)
        assert found == (wanted[0] or f"{source.name}:1", *wanted[1:])
        assert outcome.metadata == metadata


def test_nested_text_that_is_none(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "r.jsonl", {"a": {"b": None}}, {"a": {}}, {"a": "b"}, {"a": {"b": 1}})
    details = [(o.problem.reason, o.problem.detail) for o in read_all(path, text_field="a.b") if o.problem]
    assert details == [
        ("missing_text", "a.b is null"),
        ("missing_text", "a.b is absent"),
        ("missing_text", "a.b is absent"),
        ("wrong_type", "a.b is a number, not a string"),
    ]


@pytest.mark.parametrize(("ending", "pack"), [("gz", gzip.compress), ("zst", zstd.compress)])
def test_a_packed_file_is_its_text(tmp_path: Path, ending: str, pack: Callable[[bytes], bytes]) -> None:
    noise = os.urandom(30_000).hex().encode()
    files = {
        "README.md": pack(b"# Title\r\n"),
        "bomb.txt": pack(b"a" * (LIMIT + 1)),
        "cut.txt": pack(noise)[:-1000],
        "data.tar": pack(b"name" + b"\0" * 600),
        "latin.txt": pack(b"\xe9t\xe9"),
        "run": pack(b"#!/usr/bin/env python3\n"),
        "wrong.txt": b"not packed",
    }
    for name, data in files.items():
        (tmp_path / f"{name}.{ending}").write_bytes(data)
    outcomes = read_all(tmp_path)
    reasons = ("too_large", "truncated", "binary", "invalid_utf8")
    readme, *bad, script, wrong = summary(outcomes)
    assert readme == (f"README.md.{ending}", "# Title\r\n")
    assert tuple(reason for _, reason in bad) == reasons
    assert script == (f"run.{ending}", "#!/usr/bin/env python3\n")
    assert wrong == (f"wrong.txt.{ending}", "corrupt_record")
    assert [o.kind for o in (outcomes[0], outcomes[-2])] == ["text", "code"]
    cut = outcomes[2].problem
    assert cut is not None
    assert noise.startswith(cut.raw)


def test_zstd_truncated_anywhere_keeps_every_whole_record(tmp_path: Path) -> None:
    texts = [os.urandom(200).hex() for _ in range(1000)]
    body = "".join(json.dumps({"text": t}) + "\n" for t in texts).encode()
    whole = zstd.compress(body[: len(body) // 2]) + zstd.compress(body[len(body) // 2 :])
    path = tmp_path / "r.jsonl.zst"
    path.write_bytes(whole)
    assert [o.content for o in read_all(path)] == texts
    (tmp_path / "r.jsonl").write_bytes(whole)  # known by its magic number
    assert [o.content for o in read_all(tmp_path / "r.jsonl")] == texts
    for cut in (0, 3, 5000, len(whole) // 2 + 100, len(whole) - 3):
        path.write_bytes(whole[:cut])
        *documents, tail = read_all(path)
        assert [o.content for o in documents] == texts[: len(documents)]
        assert tail.problem is not None
        assert (tail.source_id, tail.problem.reason) == (f"r.jsonl.zst:{len(documents) + 1}", "truncated")
    assert len(documents) > 600


def test_gzip_truncated_anywhere_keeps_every_whole_record(tmp_path: Path) -> None:
    texts = [f"record {i} " + os.urandom(20).hex() for i in range(200)]
    body = "".join(json.dumps({"text": t}) + "\n" for t in texts).encode()
    whole = gzip.compress(body[: len(body) // 2]) + gzip.compress(body[len(body) // 2 :])
    path = tmp_path / "r.jsonl.gz"
    path.write_bytes(whole)
    assert [o.content for o in read_all(path)] == texts
    for cut in (0, 5, 1000, len(whole) // 2 + 700, len(whole) - 3):
        path.write_bytes(whole[:cut])
        *documents, tail = read_all(path)
        assert [o.content for o in documents] == texts[: len(documents)]
        assert tail.problem is not None
        assert (tail.source_id, tail.problem.reason) == (f"r.jsonl.gz:{len(documents) + 1}", "truncated")
    assert len(documents) == len(texts)


def test_gzip_with_a_bad_byte_keeps_what_came_before(tmp_path: Path) -> None:
    texts = [os.urandom(500).hex() for _ in range(400)]
    data = bytearray(gzip.compress("".join(json.dumps({"text": t}) + "\n" for t in texts).encode()))
    data[-5] ^= 0xFF  # the checksum
    (tmp_path / "r.jsonl.gz").write_bytes(data)
    *documents, tail = read_all(tmp_path / "r.jsonl.gz")
    assert [o.content for o in documents] == texts
    assert tail.problem is not None
    assert tail.problem.reason == "corrupt_record"
    (tmp_path / "r.jsonl.gz").write_bytes(b"no gzip at all")
    assert summary(read_all(tmp_path / "r.jsonl.gz")) == [("r.jsonl.gz:1", "corrupt_record")]


def test_gzip_is_known_by_its_content_and_may_be_padded(tmp_path: Path) -> None:
    (tmp_path / "r.jsonl").write_bytes(gzip.compress(b'{"text": "a"}\n') + b"\0" * 100)
    assert summary(read_all(tmp_path / "r.jsonl")) == [("r.jsonl:1", "a")]


@pytest.mark.parametrize("step", [1, 2, 3, 7, 100])
def test_lines_are_the_same_however_the_bytes_arrive(step: int) -> None:
    data = b"one\n\ntwo two two two\r\nlong " + b"x" * 40 + b"\nlast"
    lines = list(split_lines(iter([data[i : i + step] for i in range(0, len(data), step)]), 20))
    assert [(line.number, line.size) for line in lines] == [(1, 3), (2, 0), (3, 16), (4, 45), (5, 4)]
    assert [line.data for line in lines][:3] == [b"one", b"", b"two two two two\r"]


def test_a_huge_line_does_not_fill_the_memory(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    with path.open("wb") as out:
        out.write(b'{"text": "before"}\n{"text": "')
        for _ in range(200):
            out.write(b"z" * (1 << 20))
        out.write(b'"}\n{"text": "after"}\n')
    tracemalloc.start()
    outcomes = read_all(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert summary(outcomes) == [("r.jsonl:1", "before"), ("r.jsonl:2", "too_large"), ("r.jsonl:3", "after")]
    assert outcomes[1].problem is not None
    assert len(outcomes[1].problem.raw) == RAW_BYTES
    assert peak < 8 * LIMIT


def test_parquet_rows_and_their_reasons(tmp_path: Path) -> None:
    bad = pa.Array.from_buffers(
        pa.string(), 1, [None, pa.array([0, 2], pa.int32()).buffers()[1], pa.py_buffer(b"\xff\xfe")]
    )
    text = pa.chunked_array([pa.array(["a", None, "", "y" * (LIMIT + 1)]), bad])
    table = pa.table({"id": [1, 2, 3, 4, 5], "text": text, "tags": [["x"]] * 5, "blob": [b"\0"] * 5})
    pq.write_table(table, tmp_path / "p.parquet")
    outcomes = read_all(tmp_path / "p.parquet")
    reasons = [("1", "a"), ("2", "missing_text"), ("3", ""), ("4", "too_large"), ("5", "invalid_utf8")]
    assert summary(outcomes) == reasons
    assert outcomes[0].metadata == {"tags": '["x"]', "blob": "AA=="}
    assert all(o.problem.raw for o in outcomes if o.problem)
    assert {o.problem.reason for o in read_all(tmp_path / "p.parquet", text_field="tags") if o.problem} == {
        "wrong_type"
    }
    dictionary = pa.table({"text": pa.array(["d", "d"]).dictionary_encode()})
    pq.write_table(dictionary, tmp_path / "d.parquet")
    assert summary(read_all(tmp_path / "d.parquet")) == [("d.parquet:1", "d"), ("d.parquet:2", "d")]


def test_parquet_that_is_broken(tmp_path: Path) -> None:
    path = tmp_path / "p.parquet"
    texts = [os.urandom(50).hex() for _ in range(300)]
    pq.write_table(pa.table({"text": texts}), path, row_group_size=100, compression="gzip", use_dictionary=False)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert summary(read_all(path)) == [("p.parquet", "truncated")]
    path.write_bytes(b"not parquet")
    assert summary(read_all(path)) == [("p.parquet", "corrupt_record")]
    middle = pq.ParquetFile(pa.BufferReader(whole)).metadata.row_group(1).column(0).data_page_offset
    path.write_bytes(whole[: middle + 100] + b"\xff" * 500 + whole[middle + 600 :])
    outcomes = read_all(path)
    assert len(outcomes) == 300
    assert [o.content for o in outcomes[:100] + outcomes[200:]] == texts[:100] + texts[200:]
    assert {o.problem.reason for o in outcomes[100:200] if o.problem} == {"corrupt_record"}


def test_listing_of_a_folder(tmp_path: Path) -> None:
    for name in (
        "b.py",
        "a/x.txt",
        ".git/config",
        "a/.hg/store",
        "__init__.py",
        "c.pyc",
        "i.PNG",
        "z.zip",
        "lake/t.parquet",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    (tmp_path / "round").symlink_to(tmp_path)
    source = SourceConfig(path=str(tmp_path)).resolved()
    listing = list_source(0, source, exclude=str(tmp_path / "lake"))
    assert sorted(entry.relative for entry in listing.entries) == ["__init__.py", "a/x.txt", "b.py", "z.zip"]
    assert listing.skipped == 3
    assert sorted(listing.folders) == [".", "a"]
    assert source.name == tmp_path.name


def test_listing_names_that_are_not_utf8(tmp_path: Path) -> None:
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.txt")).write_text("x")
    assert summary(read_all(tmp_path)) == [("\\xff.txt", "x")]


def test_folder_that_cannot_be_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "shut").mkdir()
    (tmp_path / "a.txt").write_text("x")
    scandir = os.scandir

    def refuse(path: str) -> Any:
        if str(path).endswith("shut"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert summary(read_all(tmp_path)) == [("a.txt", "x"), ("shut", "unreadable")]
    with pytest.raises(LakeError, match="Permission denied") as error:
        read_all(tmp_path / "shut")
    assert error.value.exit_code == 2


@pytest.mark.parametrize(
    ("pattern", "there"),
    [
        ("*.py", ["a.py"]),
        ("**/*.py", ["a.py", "d/b.py", "d/e/c.py"]),
        ("d/**", ["d/b.py", "d/e/c.py", "d/x[1].py"]),
        ("*/[!x]*.py", ["d/b.py"]),
        ("d/?.py", ["d/b.py"]),
        ("[a-c].py", ["a.py"]),
    ],
)
def test_glob(tmp_path: Path, pattern: str, there: list[str]) -> None:
    names = ["a.py", "a.txt", "d/b.py", "d/e/c.py", "d/x[1].py"]
    expected = [n for n in names if n in there]
    if pattern == "**/*.py":
        expected = sorted([*expected, "d/x[1].py"])
    assert sorted(n for n in names if glob_pattern(pattern).fullmatch(n)) == expected
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    source = SourceConfig(path=f"{tmp_path}/{pattern}").resolved()
    base = Path(source.path.split("*")[0].split("[")[0].split("?")[0].rsplit("/", 1)[0])
    found = sorted(str((base / e.relative).relative_to(tmp_path)) for e in list_source(0, source).entries)
    assert found == expected
    assert source.name == base.name


@pytest.mark.parametrize(
    ("path", "name"),
    [("x/data.jsonl.gz", "data"), ("x/.bashrc", "bashrc"), ("x/docs", "docs"), ("x/v1.0/*.txt", "v1.0")],
)
def test_source_is_named_by_its_path(tmp_path: Path, path: str, name: str) -> None:
    (tmp_path / "x" / "docs").mkdir(parents=True)
    (tmp_path / "x" / "v1.0").mkdir()
    assert SourceConfig(path=str(tmp_path / path)).resolved().name == name


@pytest.mark.parametrize(
    ("paths", "words"),
    [
        ([], "no source"),
        (["a/docs", "b/docs"], "both called 'docs'"),
        (["s3://bucket/x"], "no local path"),
        (["/"], "name of its own"),
    ],
)
def test_sources_that_cannot_be(tmp_path: Path, paths: list[str], words: str) -> None:
    config = IngestConfig(sources=tuple(SourceConfig(path=p) for p in paths))
    with pytest.raises(LakeError, match=words) as error:
        config.resolved_sources()
    assert error.value.exit_code == 2


@pytest.mark.parametrize(("path", "words"), [("nowhere", "does not exist"), ("*.nothing", "No file matches")])
def test_path_that_is_not_there(tmp_path: Path, path: str, words: str) -> None:
    with pytest.raises(LakeError, match=words) as error:
        read_all(tmp_path / path)
    assert error.value.exit_code == 2


def test_include_and_exclude(tmp_path: Path) -> None:
    for name in ("a.py", "a.txt", "test/b.py", "lib/c.py", "lib/test/d.py", "lib/vendor/e.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    source = SourceConfig(path=str(tmp_path), include=("**/*.py",), exclude=("**/test/**", "lib/vendor/*"))
    listing = list_source(0, source.resolved())
    assert [entry.relative for entry in listing.entries] == ["a.py", "lib/c.py"]
    # A folder that is left out whole is not even listed.
    assert listing.folders == [".", "lib", "lib/vendor"]
