"""Packed files: the content in bounded pieces, and every byte before a break."""

from __future__ import annotations

import gzip
import io
import os
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.ingest.lines import CHUNK, Broken
from pipelines.ingest.packed import gunzip, inner_name, unpacked, unzstd, zstd

PACKERS: dict[str, tuple[Callable[[bytes], bytes], Callable[[io.BytesIO], Iterator[bytes]]]] = {
    "gzip": (gzip.compress, gunzip),
    "zstd": (lambda data: zstd.compress(data, options={zstd.CompressionParameter.checksum_flag: 1}), unzstd),
}


def unpack(name: str, data: bytes) -> tuple[bytes, str | None]:
    """All that comes out, and the reason of the break."""
    pieces: list[bytes] = []
    try:
        pieces.extend(PACKERS[name][1](io.BytesIO(data)))
        reason = None
    except Broken as broken:
        reason = broken.reason
    assert all(len(piece) <= 4 * CHUNK for piece in pieces)
    return b"".join(pieces), reason


@pytest.mark.parametrize("name", PACKERS)
@given(parts=st.lists(st.binary(max_size=300), min_size=1, max_size=4), cut=st.integers(0, 2000))
def test_members_one_after_the_other_and_cut_anywhere(name: str, parts: list[bytes], cut: int) -> None:
    pack = PACKERS[name][0]
    packed, whole = b"".join(map(pack, parts)), b"".join(parts)
    assert unpack(name, packed) == (whole, None)
    ends = {len(b"".join(map(pack, parts[: n + 1]))) for n in range(len(parts))}
    cut %= len(packed)
    got, reason = unpack(name, packed[:cut])
    assert whole.startswith(got)
    assert reason == (None if cut in ends else "truncated")


@pytest.mark.parametrize("name", PACKERS)
def test_every_byte_before_the_break(name: str) -> None:
    body = os.urandom(700_000).hex().encode()
    packed = bytearray(PACKERS[name][0](body))
    got, reason = unpack(name, bytes(packed[:-9]))
    assert (reason, body.startswith(got)) == ("truncated", True)
    assert len(got) > len(body) - 150_000
    # The error comes in the third chunk, in a step that would have given more before it.
    packed[-4] ^= 0xFF
    assert unpack(name, bytes(packed)) == (body, "corrupt_record")
    assert unpack(name, b"neither the one nor the other") == (b"", "corrupt_record")


def test_a_bad_zstd_block_loses_no_byte_before_it() -> None:
    before, body = os.urandom(1000), os.urandom(400_000).hex().encode()
    frame = zstd.ZstdCompressor()
    blocks = frame.compress(body, zstd.ZstdCompressor.FLUSH_BLOCK)
    reserved = b"\xff" * 100  # a block of the type that there is none of
    assert unpack("zstd", zstd.compress(before) + blocks + reserved) == (before + body, "corrupt_record")


@pytest.mark.parametrize("name", PACKERS)
def test_a_bomb_takes_no_memory(name: str) -> None:
    packed = PACKERS[name][0](b"\0" * 30_000_000)
    tracemalloc.start()
    size = sum(map(len, PACKERS[name][1](io.BytesIO(packed))))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert size == 30_000_000
    assert peak < 8_000_000


@pytest.mark.parametrize("packed", [False, True])
def test_a_dictionary_in_front(packed: bool) -> None:
    trained = zstd.train_dict([f"<html><head><title>page {n}</title>".encode() * 3 for n in range(500)], 2000)
    data = zstd.compress(trained.dict_content) if packed else trained.dict_content
    page = b"<html><head><title>page 7000</title>" * 2
    frames = b"\x5d\x2a\x4d\x18" + len(data).to_bytes(4, "little") + data + zstd.compress(page, zstd_dict=trained) * 2
    assert unpack("zstd", frames) == (page * 2, None)
    broken = frames[:8] + b"\x28\xb5\x2f\xfd" + b"\xff" * (len(data) - 4) + frames[8 + len(data) :]
    assert unpack("zstd", broken)[1] == "corrupt_record"


def test_what_is_packed_is_told_by_name_or_magic(tmp_path: Path) -> None:
    assert [inner_name(n) for n in ("a/README.md.gz", "x.py.ZST", "a.txt")] == ["a/README.md", "x.py", "a.txt"]
    for data in (b"text", gzip.compress(b"text"), zstd.compress(b"text")):
        assert b"".join(unpacked("a.jsonl", io.BytesIO(data))) == b"text"
    with pytest.raises(Broken, match="gzip"):
        list(unpacked("a.jsonl.gz", io.BytesIO(b"text")))
