"""Tables of many small row groups, and an S3 server on localhost behind a proxy that fails as it is told."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from deltalake import WriterProperties, write_deltalake

from benchmarks.loader_store import Proxy, environment, s3_server
from model.loader import store
from pipelines.tables import GOLD_SEQUENCES

WriteMany = Callable[..., str]


@pytest.fixture
def write_many(tmp_path: Path) -> WriteMany:
    """write_many(count, row_group=.., files=..) -> a lake; token 0 of a sequence is its number, by file and row."""

    def write(
        count: int,
        *,
        row_group: int = 16,
        files: int = 1,
        length: int = 32,
        validation: int = 0,
        domains: tuple[str, ...] = ("text",),
        lake: str = "many",
    ) -> str:
        where, rng = str(tmp_path / lake), np.random.default_rng(0)
        tokens = rng.integers(0, 50_000, size=(count + validation, length), dtype=np.uint32)
        tokens[:, 0] = np.arange(len(tokens))
        bounds = [len(tokens) * n // files for n in range(files + 1)]
        for part, (begin, end) in enumerate(itertools.pairwise(bounds)):
            numbers = range(begin, end)
            columns = {
                "sequence_id": [hashlib.sha256(f"{n}".encode()).hexdigest() for n in numbers],
                # The others of another split lie between them.
                "split": [
                    "validation" if validation and n % (count // validation + 1) == 0 else "train" for n in numbers
                ],
                "domain": [domains[n % len(domains)] for n in numbers],
                "tokens": [tokens[n].tobytes() for n in numbers],
                "segment_lengths": [[length - 8, 8]] * len(numbers),
                "document_ids": [[f"{n}-0", f"{n}-1"] for n in numbers],
                "pad_count": [0] * len(numbers),
                "tokenizer_id": ["0" * 64] * len(numbers),
                "sequence_length": [length] * len(numbers),
            }
            write_deltalake(
                GOLD_SEQUENCES.uri(where),
                pa.table(columns, schema=GOLD_SEQUENCES.schema),
                partition_by=list(GOLD_SEQUENCES.partition_by),
                mode="append" if part else "error",
                configuration=None if part else GOLD_SEQUENCES.table_properties,
                writer_properties=WriterProperties(max_row_group_size=row_group, compression="UNCOMPRESSED"),
            )
        return where

    return write


@pytest.fixture(scope="session")
def s3_port() -> Iterator[int]:
    with s3_server() as port:
        yield port


@pytest.fixture
def s3(s3_port: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """A proxy before the server; both clients' environment names it, and tries are repeated at once."""
    proxy = Proxy(s3_port)
    for name, value in environment(proxy.port).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(store, "_FIRST_WAIT", 0.001)
    monkeypatch.setattr(store, "_LONGEST_WAIT", 0.01)
    yield proxy
    proxy.close()
