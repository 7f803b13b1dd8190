"""Random small trees of every format, good and bad, that know how many records they hold."""

from __future__ import annotations

import gzip
import io
import json
import random
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.ingest.packed import zstd

PACK: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": lambda data: zstd.compress(data, options={zstd.CompressionParameter.checksum_flag: 1}),
}
_TEXTS = ("text", "", None, 3, "nul \0", "\ud800")
_LINES = (b"{broken", b"[1]", b'{"text": "\xff"}', b'{"text": "\0"}', b'{"text": "' + b"x" * 3000 + b'"}')
LIMIT = 2000  # bytes: the largest record of a tree that is a document


def _records(rng: random.Random) -> list[dict[str, object]]:
    # Few ids, so that some come twice, in a file and across files.
    return [{"id": f"i{rng.randrange(30)}", "text": rng.choice(_TEXTS)} for _ in range(rng.randrange(1, 8))]


def _jsonl(rng: random.Random) -> tuple[bytes, int]:
    lines = [json.dumps(record).encode() for record in _records(rng)]
    lines += rng.sample(_LINES, rng.randrange(3))
    rng.shuffle(lines)
    return b"\n".join([*lines, b"", b"  "]), len(lines)


def _warc(rng: random.Random) -> tuple[bytes, int]:
    out, pages = b"", 0
    for _ in range(rng.randrange(1, 6)):
        kind = rng.choice(("conversion", "conversion", "request"))
        content = rng.choice((b"page", b"\xff", b"\0", b"y" * 3000))
        head = f"WARC/1.0\r\nWARC-Type: {kind}\r\nWARC-Target-URI: u:{rng.randrange(4)}\r\nContent-Type: text/plain"
        out += f"{head}\r\nContent-Length: {len(content)}\r\n\r\n".encode() + content + b"\r\n\r\n"
        pages += kind == "conversion" or len(content) > LIMIT
        if rng.random() < 0.2:
            out += b"not a record\r\n"
            pages += 1
    return out, pages


def _parquet(rng: random.Random) -> tuple[bytes, int]:
    texts = [rng.choice(("row", "", None, "z" * 3000)) for _ in range(rng.randrange(1, 9))]
    out = io.BytesIO()
    pq.write_table(pa.table({"text": pa.array(texts, pa.string())}), out)
    return out.getvalue(), len(texts)


def _file(rng: random.Random) -> tuple[bytes, int]:
    return rng.choice((b"prose", b"", b"\xff", b"a\0", b"w" * 3000)), 1


FORMATS: dict[str, tuple[Callable[[random.Random], tuple[bytes, int]], tuple[str, ...]]] = {
    "jsonl": (_jsonl, tuple(PACK)),
    "warc": (_warc, tuple(PACK)),
    "parquet": (_parquet, ("",)),
    "md": (_file, tuple(PACK)),
}


def grow(folder: Path, rng: random.Random) -> int:
    """Make the folder anew, of names that it had and has not; the number of records that it then holds."""
    folder.mkdir(exist_ok=True)
    for path in sorted(folder.iterdir()):
        path.unlink()
    total = 0
    for number in range(rng.randrange(3, 9)):
        ending = rng.choice(tuple(FORMATS))
        make, packed = FORMATS[ending]
        pack = rng.choice(packed)
        data, records = make(rng)
        (folder / f"f{number}.{ending}{pack}").write_bytes(PACK[pack](data))
        total += records
    return total
