"""Loader: tokens a second over one shuffled epoch, beside MosaicML's StreamingDataset and `datasets` streaming.

    python benchmarks/loader_peers.py                  # whichever of the two is installed

All read the same sequences from local disk, in the page cache, in one process and without workers, shuffle over all of
them and yield int64 tokens in batches of 16; ours yields segment ids, positions and loss mask as well. The peers'
batches come from torch's DataLoader, as their documentation has it; MosaicML's reads its own format (MDS, written
beforehand and not timed), `datasets` the table's Parquet files. Each starts cold: a new reader, nothing decoded.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from torch import Tensor
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.corpus import write_sequences
from benchmarks.harness import Result, arguments, compare, finish, out
from benchmarks.loader import BATCH, check, digests, drain, epoch
from model.loader.snapshot import Snapshot, open_sequences

TARGET = 3.0


def collate(samples: list[dict[str, Any]]) -> Tensor:
    """Samples' tokens, as bytes or an array, as int64 [b, S]."""
    arrays = [np.frombuffer(s["tokens"], "<u4") if isinstance(s["tokens"], bytes) else s["tokens"] for s in samples]
    return torch.from_numpy(np.stack(arrays).astype(np.int64))


def of_datasets(snapshot: Snapshot, _folder: Path) -> Callable[[], Iterator[Tensor]]:
    """`datasets`, streaming, with a buffer that holds every sequence."""
    from datasets import load_dataset

    def batches() -> Iterator[Tensor]:
        data = load_dataset("parquet", data_files=list(snapshot.files), split="train", streaming=True)
        data = data.select_columns(["tokens"]).shuffle(seed=0, buffer_size=snapshot.num_sequences)
        yield from DataLoader(data, batch_size=BATCH, collate_fn=collate)

    return batches


def of_mosaicml(snapshot: Snapshot, folder: Path) -> Callable[[], Iterator[Tensor]]:
    """MosaicML's StreamingDataset, which shuffles blocks of the size given; here one of all sequences."""
    streaming = import_module("streaming")
    clean_stale_shared_memory = import_module("streaming.base.util").clean_stale_shared_memory

    with streaming.MDSWriter(
        out=str(folder / "mds"), columns={"tokens": f"ndarray:uint32:{snapshot.sequence_length}"}
    ) as writer:
        for file in snapshot.files:
            for value in pq.ParquetFile(file).read(columns=["tokens"])["tokens"]:
                writer.write({"tokens": np.frombuffer(value.as_buffer(), "<u4")})

    def batches() -> Iterator[Tensor]:
        clean_stale_shared_memory()
        data = streaming.StreamingDataset(
            local=str(folder / "mds"), shuffle=True, batch_size=BATCH, num_canonical_nodes=1,
            shuffle_block_size=snapshot.num_sequences,
        )  # fmt: skip
        yield from DataLoader(data, batch_size=BATCH, collate_fn=collate)

    return batches


PEERS = {"datasets": ("datasets", of_datasets), "mosaicml": ("streaming", of_mosaicml)}


def measure(name: str, snapshot: Snapshot, batches: Callable[[], Iterator[Tensor]], repetitions: int) -> Result:
    """Check that both read the same sequences, then time them."""
    check(
        digests(row.astype("<u4") for batch in epoch(snapshot) for row in batch.tokens.numpy()),
        digests(row.astype("<u4") for batch in batches() for row in batch.numpy()),
    )
    return compare(
        claim=f"loader, {name}",
        ours=("SequenceLoader, one shuffled epoch", lambda: drain(epoch(snapshot))),
        peer=(name, lambda: drain(batches())),
        target=TARGET,
        tokens=snapshot.num_sequences * snapshot.sequence_length,
        repetitions=repetitions,
        notes={"sequences": snapshot.num_sequences},
    )


def main() -> int:
    parser = arguments(__doc__, megabytes=40, repetitions=5)
    parser.add_argument("--sequence-length", type=int, default=2048, help="length of a sequence (tokens)")
    asked = parser.parse_args()
    code = 0
    with TemporaryDirectory(prefix="lakemoe-bench-") as made:
        folder = Path(made)
        write_sequences(folder, asked.megabytes, sequence_length=asked.sequence_length, files=4, multiple=BATCH)
        snapshot = open_sequences(made)
        for name, (module, peer) in PEERS.items():
            if find_spec(module) is None:
                out.print(f"{name} is not installed: left out")
                continue
            timed = partial(measure, name, snapshot, peer(snapshot, folder), asked.repetitions)
            code = max(code, finish(f"loader_{name}", asked.out, timed))
    return code


if __name__ == "__main__":
    sys.exit(main())
