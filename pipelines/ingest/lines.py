"""Bytes of a stream as lines, through gzip or not, in bounded memory; what came in whole is never lost.

A line longer than the limit is passed over to its end, its first 64 KiB kept. A stream that breaks off (a truncated or
corrupt gzip, a read error) gives every whole line before the break and then one last line that carries the problem.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

RAW_BYTES = 64 * 1024
CHUNK = 256 * 1024
_GZIP = 31  # zlib's window bits for a gzip member of any window, its CRC checked


class Broken(Exception):
    """A stream that ends before its time: the quarantine's reason, and the reader's own words."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True, slots=True)
class Line:
    """A line without its newline. size: its length in bytes, of which `data` holds all, or the first 64 KiB."""

    number: int
    data: bytes
    size: int
    problem: Broken | None = None


def read_chunks(stream: BinaryIO) -> Iterator[bytes]:
    """The stream's bytes. Raises Broken(unreadable) on a read error."""
    while True:
        try:
            chunk = stream.read(CHUNK)
        except OSError as error:
            raise Broken("unreadable", error.strerror or str(error)) from error
        if not chunk:
            return
        yield chunk


def gunzip(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """The content of one or more gzip members, at most 1 MiB a piece.

    Every byte before the break is given. Raises Broken(truncated) where the stream ends inside a member,
    Broken(corrupt_record) on bad data or a wrong checksum.
    """
    member = zlib.decompressobj(_GZIP)
    for chunk in chunks:
        rest = chunk
        while rest:
            if member.eof:
                rest = rest.lstrip(b"\0")  # members may be padded with zeros (RFC 1952 readers allow it)
                if not rest:
                    break
                member = zlib.decompressobj(_GZIP)
            before = member.copy()
            try:
                out = member.decompress(rest, 4 * CHUNK)
            except zlib.error as error:
                yield _before_the_error(before, rest)
                raise Broken("corrupt_record", f"gzip: {error}") from error
            if out:
                yield out
            rest = member.unused_data if member.eof else member.unconsumed_tail
    if not member.eof:
        yield member.flush()
    if not member.eof:
        raise Broken("truncated", "gzip: the file ends before its end marker")


def _before_the_error(member: zlib._Decompress, data: bytes) -> bytes:
    """What decompresses before the byte that zlib rejects: one call drops all of its output on an error."""
    out = bytearray()
    for index in range(len(data)):
        try:
            out += member.decompress(data[index : index + 1])
        except zlib.error:
            break
    return bytes(out)


def split_lines(chunks: Iterator[bytes], max_bytes: int) -> Iterator[Line]:
    """Lines numbered from 1; the last needs no newline. Never holds more than `max_bytes` and a chunk."""
    number, size, held = 1, 0, bytearray()

    def line(problem: Broken | None = None) -> Line:
        return Line(number, bytes(held if size <= max_bytes else held[:RAW_BYTES]), size, problem)

    try:
        for chunk in chunks:
            pieces = chunk.split(b"\n")
            for index, piece in enumerate(pieces):
                if index:
                    yield line()
                    number, size = number + 1, 0
                    held.clear()
                size += len(piece)
                room = max(max_bytes, RAW_BYTES) - len(held)
                held += piece[:room] if room < len(piece) else piece
    except Broken as problem:
        yield line(problem)
        return
    if size:
        yield line()
