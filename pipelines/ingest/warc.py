"""WARC and WET archives (ISO 28500) to records with a text, as the field map takes them.

`split_records` cuts the unpacked bytes and finds the next record after a bad one, so that a wrong length or header
costs one record; FastWARC reads each record's headers and its HTTP message; Resiliparse extracts a page's main text.
A record is known by its target URI, so that a page crawled again is the same document, newer.

A `conversion` record (WET) is its text; of a `response` or `resource` record HTML is extracted, and plain text and
Markdown are taken as they are. What is about a crawl (warcinfo, request, metadata, revisit), what HTTP says is no page
(a status other than 2xx), pictures, sound, film, fonts, styles and scripts are passed over and counted; other media
types are quarantined as `binary`, so that text in them is missed loudly. Left out: segmented records (`continuation`),
PDF, and a search for the next gzip member after a bad one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime

from fastwarc.warc import WarcRecord
from resiliparse.extract.html2text import extract_plain_text
from resiliparse.parse.encoding import detect_encoding, map_encoding_to_html5

from pipelines.ingest.lines import RAW_BYTES, Block, Broken
from pipelines.ingest.records import Rejected

HTML = ("text/html", "application/xhtml+xml")
_PLAIN = ("text/plain", "text/markdown", "text/x-markdown")
_NO_TEXT = ("image/", "audio/", "video/", "font/")
_NO_PROSE = ("text/css", "text/javascript", "application/javascript", "application/x-javascript")
_PAGES = ("conversion", "response", "resource")
# What is kept of a record's header; the rest is about the archive.
_KEPT = (
    "WARC-Target-URI",
    "WARC-Date",
    "WARC-Record-ID",
    "WARC-Identified-Content-Language",
    "WARC-Identified-Payload-Type",
    "WARC-Truncated",
)

_HEADER_BYTES = 32 * 1024
_END = b"\r\n\r\n"
_MAGIC = b"WARC/1."
_LENGTH = re.compile(rb"^content-length:[ \t]*([0-9]{1,15})[ \t]*\r$", re.IGNORECASE | re.MULTILINE)
_META_CHARSET = re.compile(rb"""<meta[^>]{0,256}?charset\s*=\s*["']?\s*([\w.:-]{2,40})""", re.IGNORECASE)
_CHARSET = re.compile(r"""charset\s*=\s*["']?\s*([\w.:-]{2,40})""", re.IGNORECASE)
_META_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Page:
    """A record with a text: fields for the field map (`id`, `text`, `WARC-…`), its media type, when it was crawled."""

    fields: dict[str, str]
    media_type: str
    crawled_us: int | None


class _Buffer:
    """Bytes to come, with what was read of them so far."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self.held = bytearray()
        self.broken: Broken | None = None
        self._chunks = chunks

    def more(self) -> bool:
        """Read on; False at the end, or where the stream breaks (`broken` says how)."""
        try:
            self.held += next(self._chunks)
        except StopIteration:
            return False
        except Broken as problem:
            self.broken = problem
            self._chunks = iter(())
            return False
        return True

    def fill(self, size: int) -> bool:
        """Hold at least so many bytes; False where there are not so many."""
        while len(self.held) < size:
            if not self.more():
                return False
        return True

    def take(self, size: int) -> bytes:
        data = bytes(self.held[:size])
        del self.held[:size]
        return data

    def drop(self, size: int) -> bool:
        """Pass over so many bytes without holding them; False where there are not so many."""
        while size > len(self.held):
            size -= len(self.held)
            self.held.clear()
            if not self.more():
                return False
        del self.held[:size]
        return True


def split_records(chunks: Iterator[bytes], max_bytes: int) -> Iterator[Block]:
    """Records numbered from 1. Never holds more than `max_bytes`, a header and a chunk.

    What is no record, up to where the next one begins, is one block with the problem `corrupt_record`; a record whose
    content is larger than `max_bytes` has the problem `too_large`; a stream that ends inside a record, or breaks, gives
    a last block with that problem.
    """
    buffer = _Buffer(chunks)
    number = 0
    while True:
        while buffer.fill(1) and buffer.held[0] in b"\r\n":
            del buffer.held[:1]
        if not buffer.held:
            break
        number += 1
        block = _next(buffer, number, max_bytes)
        yield block
        # A stream may break behind a record that is whole: then no block has said so yet.
        if buffer.broken is not None and block.problem is buffer.broken:
            return
    if buffer.broken is not None:
        yield Block(number + 1, b"", 0, buffer.broken)


def _next(buffer: _Buffer, number: int, max_bytes: int) -> Block:
    while (end := buffer.held.find(_END)) < 0 and len(buffer.held) < _HEADER_BYTES and buffer.more():
        pass
    if not _MAGIC.startswith(buffer.held[: len(_MAGIC)]):
        return _bad(buffer, number, 0, "no WARC header")
    if not 0 <= end < _HEADER_BYTES:
        if len(buffer.held) < _HEADER_BYTES:
            return _cut(buffer, number)
        return _bad(buffer, number, 0, "a WARC header without end")
    head = end + len(_END)
    length = _LENGTH.search(buffer.held, 0, head)
    if length is None:
        return _bad(buffer, number, head, "a WARC header without a length")
    size = head + int(length[1])
    if size > max_bytes + head:
        if not buffer.fill(min(size, RAW_BYTES)):
            return _cut(buffer, number)
        data = bytes(buffer.held[: min(size, RAW_BYTES)])
        if buffer.drop(size):
            return Block(number, data, size, Broken("too_large", f"{size} bytes, limit {max_bytes}"))
        return Block(number, data, size, buffer.broken or _ENDS_INSIDE)
    if not buffer.fill(size):
        return _cut(buffer, number)
    # The content ends with two empty lines; where it does not, its length is wrong, and a record may lie within it.
    if buffer.fill(size + len(_END)) and buffer.held[size : size + len(_END)] != _END:
        return _bad(buffer, number, head, "the content's length is wrong")
    return Block(number, buffer.take(size), size)


_ENDS_INSIDE = Broken("truncated", "the file ends inside a record")


def _cut(buffer: _Buffer, number: int) -> Block:
    size = len(buffer.held)
    return Block(number, buffer.take(size)[:RAW_BYTES], size, buffer.broken or _ENDS_INSIDE)


def _bad(buffer: _Buffer, number: int, after: int, words: str) -> Block:
    """Pass over bytes up to the next line that begins a record, looked for from `after` on."""
    kept, size, mark = b"", 0, b"\n" + _MAGIC
    while (found := buffer.held.find(mark, after)) < 0:
        # The mark may lie across two chunks.
        passed = buffer.take(max(0, len(buffer.held) - len(mark)))
        kept, size, after = (kept + passed)[:RAW_BYTES], size + len(passed), max(0, after - len(passed))
        if not buffer.more():
            found = len(buffer.held) - 1
            break
    passed = buffer.take(found + 1)
    return Block(number, (kept + passed)[:RAW_BYTES], size + len(passed), Broken("corrupt_record", words))


def read_page(data: bytes, max_bytes: int) -> Page | Rejected | None:
    """One record's bytes to its text; None for a record that is no page, or whose media type holds no text.

    max_bytes: the most that its content may have when it is decoded (HTTP sends it packed, and a bomb is small).
    """
    head = data[:RAW_BYTES]
    try:
        record = WarcRecord.from_bytes(data)
        header = {name.lower(): value for name, value in record.headers.items()}
        kind = header.get("warc-type", "").lower()
        if kind not in _PAGES:
            return None
        http = header.get("content-type", "").lower().startswith("application/http")
        if http:
            record.parse_http(auto_decode="all")
        content = record.reader.read(max_bytes + 1)
    except (OSError, ValueError) as error:
        return Rejected("corrupt_record", f"WARC: {error}"[:500], head)
    declared = header.get("content-type", "")
    if http:
        # None where the archive's own content type is damaged behind its start, so that no HTTP was looked for.
        status = None if record.http_headers is None else record.http_headers.status_code
        if status is None:
            return Rejected("corrupt_record", "WARC: the HTTP message has no status", head)
        if not 200 <= status < 300:
            return None
        declared = record.http_headers.get("Content-Type") or ""
    media_type = (header.get("warc-identified-payload-type") or declared).split(";")[0].strip().lower()
    if media_type.startswith(_NO_TEXT) or media_type in _NO_PROSE:
        return None
    if media_type not in HTML + _PLAIN:
        return Rejected("binary", f"the media type {media_type or 'is not said and'} is not read"[:500], head)
    if len(content) > max_bytes:
        return Rejected("too_large", f"more than {max_bytes} bytes when decoded", head)
    if b"\0" in content:
        return Rejected("binary", f"NUL at byte {content.index(0)}", head)
    # What converts an archive to text (WET) writes UTF-8, and does not say so.
    text = _decode(content, "charset=utf-8" if kind == "conversion" else declared, media_type in HTML)
    if isinstance(text, Rejected):
        return Rejected(text.reason, text.detail, head)
    if media_type in HTML:
        # A byte order mark would put the page's title into its body, as HTML parsers mend what comes before <html>.
        text = extract_plain_text(text.removeprefix("\ufeff"), main_content=True, alt_texts=False)
    fields = {name: header[name.lower()] for name in _KEPT if name.lower() in header}
    identifier = header.get("warc-target-uri", "").strip("<>") or header.get("warc-record-id", "")
    return Page({**fields, "id": identifier, "text": text}, media_type, _microseconds(header.get("warc-date", "")))


def _decode(content: bytes, declared: str, html: bool) -> str | Rejected:
    """The text, strictly: by its byte order mark, else the charset declared, else UTF-8, else the one detected.

    A text that is not in the charset that it declares is no document: what else it is would be a guess.
    """
    charset = _CHARSET.search(declared)
    label = charset[1] if charset else None
    if content.startswith(b"\xef\xbb\xbf"):
        label = "utf-8"
    elif label is None and html and (found := _META_CHARSET.search(content[:_META_BYTES])):
        label = found[1].decode("ascii", "replace")
    if label is not None:
        encodings = [map_encoding_to_html5(label) or "utf-8"]
    else:
        encodings = ["utf-8", detect_encoding(content) or "utf-8"]
    words = ""
    for encoding in encodings:
        try:
            return content.decode(encoding)
        except UnicodeDecodeError as error:
            words = f"{'declared' if label else 'taken for'} {encoding}: {error.reason} at byte {error.start}"
        except LookupError:
            words = f"{encoding}: an unknown charset"
    return Rejected("invalid_utf8", words)


def _microseconds(date: str) -> int | None:
    """WARC-Date (ISO 8601, UTC) since the epoch; None where it is none."""
    try:
        moment = datetime.fromisoformat(date)
    except ValueError:
        return None
    moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    return int(moment.timestamp() * 1_000_000)
