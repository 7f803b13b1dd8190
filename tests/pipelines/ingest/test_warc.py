"""WARC and WET: what is a document, what is passed over, and that one bad record costs one record."""

from __future__ import annotations

import gzip
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.ingest.config import SourceConfig
from pipelines.ingest.lines import RAW_BYTES, Broken
from pipelines.ingest.listing import list_source
from pipelines.ingest.packed import zstd
from pipelines.ingest.read import Reading, read_entry
from pipelines.ingest.records import Outcome, Rejected
from pipelines.ingest.warc import read_page, split_records

LIMIT = 1 << 16
PAGE = (
    "<html><head><title>T</title>{head}</head><body><nav><a href=/>Home</a></nav><script>var x = 1;</script>"
    "<main><h1>Grüße</h1><p>Ein Absatz, der länger ist als nur kurz.</p></main></body></html>"
)
TEXT = "Grüße\n\nEin Absatz, der länger ist als nur kurz."


def record(number: int, content: bytes, kind: str = "conversion", **headers: str) -> bytes:
    """A record whose content is followed by the two empty lines that end it."""
    fields = {
        "WARC-Type": kind,
        "WARC-Target-URI": f"https://example.org/{number}",
        "WARC-Date": f"2024-05-01T00:00:{number:02}Z",
        "WARC-Record-ID": f"<urn:uuid:{number}>",
        "Content-Type": "application/http; msgtype=response" if kind == "response" else "text/plain",
        "Content-Length": str(len(content)),
    }
    fields |= {name.replace("_", "-"): value for name, value in headers.items()}
    lines = "".join(f"{name}: {value}\r\n" for name, value in fields.items() if value)
    return b"WARC/1.0\r\n" + lines.encode() + b"\r\n" + content + b"\r\n\r\n"


def http(
    content: bytes, media_type: str = "text/html; charset=utf-8", status: str = "200 OK", extra: str = ""
) -> bytes:
    return f"HTTP/1.1 {status}\r\nContent-Type: {media_type}\r\n{extra}\r\n".encode() + content


def read_all(path: Path, **settings: Any) -> tuple[list[Outcome], Reading]:
    source = SourceConfig(path=str(path), **settings).resolved()
    [entry] = list_source(0, source).entries
    assert entry.format == "warc"
    reading = Reading()
    found = list(read_entry(source, entry, LIMIT, reading))
    assert reading.records == len(found)
    return found, reading


def summary(outcomes: list[Outcome]) -> list[tuple[str, str | None]]:
    return [(o.source_id, o.problem.reason if o.problem else o.content) for o in outcomes]


RECORDS = [
    record(0, b"software: x\r\n", "warcinfo"),
    record(1, b"Ein Text.\n", WARC_Identified_Content_Language="deu"),
    record(2, b"GET / HTTP/1.1\r\n\r\n", "request"),
    record(2, http(PAGE.format(head="").encode()), "response"),
    record(3, http(b"moved", status="301 Moved Permanently"), "response"),
    record(4, http(b"\x89PNG", "image/png"), "response"),
    record(5, http(b"%PDF", "application/pdf"), "response"),
    record(6, b"aus einer Datei", "resource", WARC_Target_URI="", Content_Type="text/plain; charset=utf-8"),
]
WANTED = [
    ("https://example.org/1", "Ein Text.\n"),
    ("https://example.org/2", TEXT),
    ("{name}:7", "binary"),
    ("<urn:uuid:6>", "aus einer Datei"),
]
PACKERS = {"": lambda r: r, ".gz": gzip.compress, ".zst": zstd.compress}


@pytest.mark.parametrize("packed", PACKERS)
def test_documents_and_what_is_passed_over(tmp_path: Path, packed: str) -> None:
    path = tmp_path / f"crawl.warc{packed}"
    path.write_bytes(b"".join(map(PACKERS[packed], RECORDS)))
    outcomes, reading = read_all(path, license="CC0-1.0")
    assert summary(outcomes) == [(i.format(name=path.name), text) for i, text in WANTED]
    assert (reading.passed, reading.complete) == (4, True)
    first, page = outcomes[0], outcomes[1]
    assert (first.media_type, first.kind, first.license) == ("text/plain", "text", "CC0-1.0")
    assert page.media_type == "text/html"
    assert first.metadata == {
        "WARC-Target-URI": "https://example.org/1",
        "WARC-Date": "2024-05-01T00:00:01Z",
        "WARC-Record-ID": "<urn:uuid:1>",
        "WARC-Identified-Content-Language": "deu",
    }
    assert first.crawled_us == 1_714_521_601_000_000
    by_record, _ = read_all(path, id_field="WARC-Record-ID", language_field="WARC-Identified-Content-Language")
    assert (by_record[0].source_id, by_record[0].language) == ("<urn:uuid:1>", "deu")


@pytest.mark.parametrize("packed", [".gz", ".zst"])
def test_a_truncated_archive_keeps_what_came_before(tmp_path: Path, packed: str) -> None:
    path = tmp_path / f"crawl.wet{packed}"
    members = [PACKERS[packed](record(n, random.Random(n).randbytes(300).hex().encode())) for n in range(6)]
    path.write_bytes(b"".join(members[:3]) + members[3][:200])
    outcomes, reading = read_all(path)
    assert [s for s, _ in summary(outcomes)] == [*(f"https://example.org/{n}" for n in range(3)), f"{path.name}:4"]
    assert outcomes[-1].problem is not None
    assert outcomes[-1].problem.reason == "truncated"
    assert not reading.complete
    path.write_bytes(b"".join(members[:3]) + b"\xff" * 50 + b"".join(members[3:]))
    outcomes, reading = read_all(path)
    assert summary(outcomes)[3:] == [(f"{path.name}:4", "corrupt_record")]
    assert not reading.complete


GOOD = [record(n, b"text %d" % n) for n in range(3)]
BROKEN = {
    "garbage": b"garbage\r\n\r\nmore\r\n",
    "another version": GOOD[1].replace(b"WARC/1.0", b"WORC/1.0"),
    "no length": record(1, b"text", Content_Length=""),
    "a length that is none": record(1, b"text", Content_Length="many"),
    "too short": record(1, b"text one", Content_Length="3"),
    "too long": record(1, b"text", Content_Length="100"),
    "no end of header": b"WARC/1.0\r\n" + b"x" * (64 * 1024) + b"\r\n",
}


@pytest.mark.parametrize("bad", BROKEN.values(), ids=BROKEN)
@pytest.mark.parametrize("step", [7, 1 << 20])
def test_a_bad_record_costs_one_record(bad: bytes, step: int) -> None:
    data = GOOD[0] + bad + GOOD[2]
    blocks = list(split_records(iter([data[i : i + step] for i in range(0, len(data), step)]), LIMIT))
    assert [b.number for b in blocks] == [1, 2, 3]
    assert [b.data for b in blocks[::2]] == [GOOD[0][:-4], GOOD[2][:-4]]
    problem = blocks[1].problem
    assert problem is not None
    assert problem.reason == "corrupt_record"
    assert blocks[1].data == bad[:RAW_BYTES]


def test_a_cut_record_and_a_large_one() -> None:
    large = record(1, b"x" * (LIMIT + 1))
    blocks = list(split_records(iter([GOOD[0], large, GOOD[1][:-7]]), LIMIT))
    assert [b.problem and b.problem.reason for b in blocks] == [None, "too_large", "truncated"]
    assert [len(b.data) for b in blocks] == [len(GOOD[0]) - 4, RAW_BYTES, len(GOOD[1]) - 7]
    [cut] = split_records(iter([large[:-10]]), LIMIT)
    assert cut.problem is not None
    assert cut.problem.reason == "truncated"
    assert list(split_records(iter([]), LIMIT)) == []


@pytest.mark.parametrize("left", [4, 3, 0, -1])
def test_a_break_behind_a_whole_record_is_told(left: int) -> None:
    """left: how many bytes of the empty lines are still to come; -1: the next record has begun."""

    def breaking() -> Iterator[bytes]:
        yield (GOOD[0] + GOOD[1])[: len(GOOD[0]) - left]
        raise Broken("truncated", "the file ends")

    first, last = split_records(breaking(), LIMIT)
    assert (first.data, first.problem) == (GOOD[0][:-4], None)
    assert last.problem is not None
    assert last.problem.reason in ("truncated", "corrupt_record")


latin = PAGE.format(head="<meta charset=iso-8859-1>").encode("latin-1")
CONTENTS: dict[str, tuple[bytes, str]] = {
    "charset of the header": (http(PAGE.format(head="").encode("latin-1"), "text/html; charset=latin1"), TEXT),
    "charset of the page": (http(latin, "text/html"), TEXT),
    "no charset, UTF-8": (http(PAGE.format(head="").encode(), "text/html"), TEXT),
    "no charset, detected": (http(PAGE.format(head="").encode("cp1252"), "application/xhtml+xml"), TEXT),
    "byte order mark": (http(b"\xef\xbb\xbf" + PAGE.format(head="").encode(), "text/html; charset=latin1"), TEXT),
    "wrong charset": (http(latin), "invalid_utf8"),
    "gzip": (http(gzip.compress(PAGE.format(head="").encode()), extra="Content-Encoding: gzip\r\n"), TEXT),
    "chunked": (http(b"5\r\nhello\r\n0\r\n\r\n", "text/plain", extra="Transfer-Encoding: chunked\r\n"), "hello"),
    "not gzip": (http(b"nonsense", extra="Content-Encoding: gzip\r\n"), "corrupt_record"),
    "bomb": (http(gzip.compress(b"a" * (LIMIT + 1)), extra="Content-Encoding: gzip\r\n"), "too_large"),
    "NUL": (http(b"a\0b", "text/plain"), "binary"),
    "no type": (b"HTTP/1.1 200 OK\r\n\r\ntext", "binary"),
    "no HTTP": (b"text", "corrupt_record"),
    "empty": (http(b"", "text/plain"), ""),
}


@pytest.mark.parametrize(("content", "wanted"), CONTENTS.values(), ids=CONTENTS)
def test_contents(content: bytes, wanted: str) -> None:
    page = read_page(record(1, content, "response")[:-4], LIMIT)
    assert page is not None
    got = page.reason if isinstance(page, Rejected) else page.fields["text"]
    assert got == wanted


def test_a_damaged_content_type_is_told() -> None:
    page = read_page(record(1, http(b"a"), "response", Content_Type="application/http\0 msgtype=response")[:-4], LIMIT)
    assert isinstance(page, Rejected)
    assert page.reason == "corrupt_record"


def test_a_wet_text_is_utf8_or_nothing() -> None:
    page = read_page(record(1, b"caf\xe9")[:-4], LIMIT)
    assert isinstance(page, Rejected)
    assert page.reason == "invalid_utf8"


@given(data=st.data())
def test_whatever_is_damaged_is_accounted_for(data: st.DataObject) -> None:
    """Bytes changed anywhere: nothing raises, and every byte but the empty lines lies in a block."""
    whole = bytearray(b"".join(RECORDS))
    for at in data.draw(st.lists(st.integers(0, len(whole) - 1), max_size=5)):
        whole[at] = data.draw(st.integers(0, 255))
    blocks = list(split_records(iter([bytes(whole[i : i + 97]) for i in range(0, len(whole), 97)]), LIMIT))
    # A changed byte may have become part of an empty line.
    assert sum(b.size for b in blocks) + 4 * len(blocks) + 5 >= len(whole)
    for block in blocks:
        if block.problem is None:
            read_page(block.data, LIMIT)
