"""Files packed by gzip or zstd, as their content in bounded pieces; every byte before a break is given.

A file is packed where its name ends in .gz or .zst, and records also where their file begins with either's magic
number. Left out: bzip2, xz and archives of several files (tar, zip), and a search for the next member after a bad one:
what follows a break is not looked for.
"""

from __future__ import annotations

import sys
import zlib
from collections.abc import Callable, Iterator
from typing import BinaryIO

from pipelines.ingest.lines import CHUNK, Broken, read_chunks

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

Unpack = Callable[[BinaryIO], Iterator[bytes]]

_PIECE = 4 * CHUNK  # the most bytes that one step gives
_GZIP = 31  # zlib's window bits for a gzip member of any window, its CRC checked
# `zstd --long=31` makes files that need it (public dumps do); a file takes no more memory than it was written with.
_ZSTD: dict[int, int] = {zstd.DecompressionParameter.window_log_max: 31}
_ZSTD_FRAME = b"\x28\xb5\x2f\xfd"
_ZSTD_DICTIONARY = b"\x5d\x2a\x4d\x18"
_DICTIONARY_BYTES = 16 * 1024 * 1024


def unpacker(name: str) -> Unpack | None:
    """How a file of this name is unpacked; None for one that its name does not call packed."""
    lower = name.lower()
    if lower.endswith(".gz"):
        return gunzip
    return unzstd if lower.endswith(".zst") else None


def inner_name(name: str) -> str:
    """The name of what is packed: without the ending that says so."""
    return name.rpartition(".")[0] if unpacker(name) else name


def unpacked(name: str, stream: BinaryIO) -> Iterator[bytes]:
    """The stream's content, unpacked by its name or its magic number. Raises Broken as the unpackers do."""
    unpack = unpacker(name)
    if unpack is None:
        magic = stream.read(4)
        stream.seek(0)
        if magic[:2] == b"\x1f\x8b":
            unpack = gunzip
        elif magic in (_ZSTD_FRAME, _ZSTD_DICTIONARY):
            unpack = unzstd
    return unpack(stream) if unpack else read_chunks(stream)


def gunzip(stream: BinaryIO) -> Iterator[bytes]:
    """The content of one or more gzip members (RFC 1952), at most 1 MiB a piece.

    Raises Broken(truncated) where the stream ends inside a member, Broken(corrupt_record) on bad data or a wrong
    checksum.
    """
    member = zlib.decompressobj(_GZIP)
    for chunk in read_chunks(stream):
        rest = chunk
        while rest:
            if member.eof:
                rest = rest.lstrip(b"\0")  # members may be padded with zeros, as tapes were
                if not rest:
                    break
                member = zlib.decompressobj(_GZIP)
            before = member.copy()
            try:
                out = member.decompress(rest, _PIECE)
            except zlib.error as error:
                yield from _bytewise(before.decompress, rest, zlib.error)
                raise Broken("corrupt_record", f"gzip: {error}") from error
            if out:
                yield out
            rest = member.unused_data if member.eof else member.unconsumed_tail
    if not member.eof:
        yield member.flush()
    if not member.eof:
        raise Broken("truncated", "gzip: the file ends before its end marker")


def unzstd(stream: BinaryIO) -> Iterator[bytes]:
    """The content of one or more zstd frames (RFC 8878), at most 1 MiB a piece. `stream` must be seekable.

    A dictionary in a skippable frame at the front serves all frames (the IIPC's "WARC zstd compression", 1.0).
    Raises Broken as `gunzip` does.
    """
    dictionary = _dictionary(stream)

    def new() -> zstd.ZstdDecompressor:
        return zstd.ZstdDecompressor(zstd_dict=dictionary, options=_ZSTD)

    frame, begins, position, given = new(), stream.tell(), stream.tell(), 0
    for chunk in read_chunks(stream):
        rest = chunk
        while rest:
            if frame.eof:
                frame, begins, given = new(), position + len(chunk) - len(rest), 0
            try:
                for out in _pieces(frame, rest):
                    given += len(out)
                    yield out
            except zstd.ZstdError as error:
                yield from _again(stream, new(), begins, max(begins, position), given)
                raise Broken("corrupt_record", f"zstd: {error}") from error
            rest = frame.unused_data if frame.eof else b""
        position += len(chunk)
    if not frame.eof:
        raise Broken("truncated", "zstd: the file ends inside a frame")


def _dictionary(stream: BinaryIO) -> zstd.ZstdDict | None:
    """The dictionary in front of the frames, itself packed or not; the stream is left behind it."""
    head = stream.read(8)
    size = int.from_bytes(head[4:], "little")
    if head[:4] != _ZSTD_DICTIONARY or size > _DICTIONARY_BYTES:
        stream.seek(0)
        return None
    data = stream.read(size)
    try:
        return zstd.ZstdDict(zstd.decompress(data) if data.startswith(_ZSTD_FRAME) else data)
    except (zstd.ZstdError, ValueError) as error:
        raise Broken("corrupt_record", f"zstd: the dictionary in front: {error}") from error


def _pieces(frame: zstd.ZstdDecompressor, data: bytes) -> Iterator[bytes]:
    while True:
        yield frame.decompress(data, _PIECE)
        if frame.eof or frame.needs_input:
            return
        data = b""


def _again(stream: BinaryIO, frame: zstd.ZstdDecompressor, begins: int, last: int, given: int) -> Iterator[bytes]:
    """What a frame gives beyond `given` bytes before its error: the call that failed dropped its output.

    The frame, which begins at `begins`, is read a second time: whole up to the chunk at `last`, that one byte by byte.
    """
    stream.seek(begins)
    passed = 0
    while room := last - stream.tell():
        passed += sum(len(out) for out in _pieces(frame, stream.read(min(room, CHUNK))))
    for out in _bytewise(frame.decompress, stream.read(CHUNK), zstd.ZstdError):
        yield out[max(0, given - passed) :]
        passed += len(out)


def _bytewise(decompress: Callable[[bytes], bytes], data: bytes, error: type[Exception]) -> Iterator[bytes]:
    """What decompresses before the byte that is rejected: one call drops all of its output on an error."""
    for index in range(len(data)):
        try:
            out = decompress(data[index : index + 1])
        except error:
            return
        yield out
