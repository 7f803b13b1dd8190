"""Bytes of a stream as lines, in bounded memory; what came in whole is never lost. Unpacking is in `packed.py`.

A line longer than the limit is passed over to its end, its first 64 KiB kept. A stream that breaks off (a truncated or
corrupt gzip or zstd, a read error) gives every whole line before the break and then one last line that carries the
problem.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

RAW_BYTES = 64 * 1024
CHUNK = 256 * 1024


class Broken(Exception):
    """A stream that ends before its time: the quarantine's reason, and the reader's own words."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True, slots=True)
class Block:
    """The bytes of a line without its newline, or of an archive's record with its header.

    size: their number, of which `data` holds all, or the first 64 KiB.
    """

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


def split_lines(chunks: Iterator[bytes], max_bytes: int) -> Iterator[Block]:
    """Lines numbered from 1; the last needs no newline. Never holds more than `max_bytes` and a chunk."""
    number, size, held = 1, 0, bytearray()

    def line(problem: Broken | None = None) -> Block:
        return Block(number, bytes(held if size <= max_bytes else held[:RAW_BYTES]), size, problem)

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
