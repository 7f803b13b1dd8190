"""One record, JSON or Parquet, to a document or to the reason why it is none.

The text is taken exactly as it is. A text or id that is absent or null is told apart from one of another type: the
first is `missing_text` (an absent id is none), the second `wrong_type`. A field is named by its key, or by the keys
that lead to it with dots between (`meta.license`). Other fields go to the metadata, strings as they are, everything
else as JSON.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pipelines.ingest.config import SourceConfig
from pipelines.ingest.lines import RAW_BYTES

_TEXT_FIELDS = ("text", "content")
_ABSENT = object()


@dataclass(frozen=True, slots=True)
class Rejected:
    """Why a record is no document: a reason of the contract, the reader's own words, the record's first 64 KiB."""

    reason: str
    detail: str
    raw: bytes = b""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What one record came to. location: `path`, or `path:line`; source_id: the id field where there is one.

    content is None exactly where `problem` is not. media_type and crawled_us (since the epoch): where they are the
    record's own, not the file's.
    """

    location: str
    source_id: str
    content: str | None = None
    kind: str = "text"
    license: str | None = None
    language: str | None = None
    metadata: dict[str, str] = field(default_factory=dict)
    problem: Rejected | None = None
    media_type: str | None = None
    crawled_us: int | None = None

    @staticmethod
    def rejected(location: str, problem: Rejected, source_id: str | None = None) -> Outcome:
        return Outcome(location=location, source_id=source_id or location, problem=problem)


@dataclass(slots=True)
class FieldMap:
    """Which fields of a file's records mean what; the text's is guessed from the first record that has one."""

    text: str = ""
    id: str = "id"
    language: str = "language"
    license: str = "license"

    @staticmethod
    def of(source: SourceConfig) -> FieldMap:
        return FieldMap(source.text_field, source.id_field, source.language_field, source.license_field)

    def guess(self, names: Iterable[str]) -> str:
        """The text's field, settled by the first record that has `text` or `content`."""
        if not self.text:
            there = set(names)
            self.text = next((name for name in _TEXT_FIELDS if name in there), "")
        return self.text or _TEXT_FIELDS[0]


def parse_json(data: bytes) -> dict[str, Any] | Rejected:
    """One JSON object. `data` is its line's bytes."""
    head = data[:RAW_BYTES]
    if b"\0" in data:
        return Rejected("binary", f"NUL at byte {data.index(0)}", head)
    try:
        record = json.loads(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        return Rejected("invalid_utf8", f"{error.reason} at byte {error.start}", head)
    except json.JSONDecodeError as error:
        return Rejected("corrupt_record", f"JSON: {error.msg} at character {error.pos}", head)
    except (ValueError, RecursionError) as error:
        return Rejected("corrupt_record", f"JSON: {error}", head)
    if not isinstance(record, dict):
        return Rejected("wrong_type", f"the record is {_kind_of(record)}, not an object", head)
    return record


def from_fields(
    location: str,
    record: Mapping[str, Any],
    raw: bytes,
    source: SourceConfig,
    fields: FieldMap,
    limit: int | None = None,
) -> Outcome:
    """A record's fields to a document, or to why it is none.

    limit: the most bytes that its fields may have in all; None where the record's own length was measured before.
    """
    text_field = fields.guess(record)
    identifier = find(record, fields.id)
    if isinstance(identifier, int) and not isinstance(identifier, bool):
        identifier = str(identifier)
    elif isinstance(identifier, bytes):
        identifier = identifier.decode("utf-8", "backslashreplace")
    if identifier is None or identifier is _ABSENT:
        identifier = ""
    elif not isinstance(identifier, str):
        words = f"{fields.id} is {_kind_of(identifier)}, not a string"
        return Outcome.rejected(location, Rejected("wrong_type", words, raw))
    elif not _encodable(identifier):
        return Outcome.rejected(location, Rejected("invalid_utf8", f"{fields.id} holds a lone surrogate", raw))
    # Two records with the id "" are two records, not one and its duplicate.
    source_id = identifier or location

    text = find(record, text_field)
    if isinstance(text, bytes):
        try:
            text = text.decode("utf-8")
        except UnicodeDecodeError as error:
            words = f"{text_field}: {error.reason} at byte {error.start}"
            return Outcome.rejected(location, Rejected("invalid_utf8", words, raw), source_id)
    if text is None or text is _ABSENT:
        words = f"{text_field} is {'absent' if text is _ABSENT else 'null'}"
        return Outcome.rejected(location, Rejected("missing_text", words, raw), source_id)
    if not isinstance(text, str):
        words = f"{text_field} is {_kind_of(text)}, not a string"
        return Outcome.rejected(location, Rejected("wrong_type", words, raw), source_id)

    taken = {text_field, fields.id}
    declared: dict[str, str | None] = {"license": source.license, "language": source.language}
    for meaning, name in (("license", fields.license), ("language", fields.language)):
        value = find(record, name)
        if isinstance(value, str) and name not in taken:
            declared[meaning] = value
            taken.add(name)
    rest = record
    for name in taken:
        rest = _without(rest, name)
    try:
        metadata = {k: _as_string(v) for k, v in rest.items() if v is not None}
    except RecursionError:
        return Outcome.rejected(location, Rejected("corrupt_record", "JSON: nested too deep", raw), source_id)

    size = 0
    for name, value in ((text_field, text), *declared.items(), *metadata.items()):
        try:
            size += len(name.encode()) + len((value or "").encode())
        except UnicodeEncodeError:
            words = f"{name.encode('utf-8', 'backslashreplace').decode()} holds a lone surrogate"
            return Outcome.rejected(location, Rejected("invalid_utf8", words, raw), source_id)
    if limit is not None and size > limit:
        return Outcome.rejected(location, Rejected("too_large", f"{size} bytes, limit {limit}", raw), source_id)
    return Outcome(
        location=location,
        source_id=source_id,
        content=text,
        kind=source.kind or "text",
        license=declared["license"],
        language=declared["language"],
        metadata=metadata,
    )


def find(record: Mapping[str, Any], name: str) -> Any:
    """The field's value: under that very key, else along the keys that its dots part; _ABSENT where there is none."""
    if name in record:
        return record[name]
    head, dot, rest = name.partition(".")
    inner = record.get(head) if dot else None
    return find(inner, rest) if isinstance(inner, Mapping) else _ABSENT


def _without(record: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """The record without a field that `find` finds, and without the objects that held nothing else."""
    if name in record:
        return {k: v for k, v in record.items() if k != name}
    head, dot, rest = name.partition(".")
    inner = record.get(head) if dot else None
    if not isinstance(inner, Mapping):
        return record
    left = _without(inner, rest)
    return {k: left if k == head else v for k, v in record.items() if k != head or left}


def raw_of(record: Mapping[str, Any]) -> bytes:
    """A Parquet row's first 64 KiB, written as JSON; a long value is cut before it is written."""
    short = {k: v[:RAW_BYTES] if isinstance(v, str | bytes) else v for k, v in record.items()}
    return json.dumps(short, default=_plain).encode()[:RAW_BYTES]


def _as_string(value: Any) -> str:
    if isinstance(value, bytes):
        return _plain(value)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=_plain)


def _plain(value: Any) -> str:
    """Bytes as base64 (RFC 4648); dates and the rest as Python writes them."""
    return base64.b64encode(value).decode() if isinstance(value, bytes) else str(value)


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _kind_of(value: Any) -> str:
    """The value's type in JSON's words."""
    names = {
        bool: "a boolean",
        int: "a number",
        float: "a number",
        str: "a string",
        list: "an array",
        dict: "an object",
    }
    return "null" if value is None else names.get(type(value), f"a {type(value).__name__}")
