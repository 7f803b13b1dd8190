"""Loader: tokens a second over one shuffled epoch, beside pyarrow's scan of the tokens column of the same files.

Both start cold each time: a new reader, nothing decoded. The files are in the page cache for both, so that the disk is
not what is measured. The scan reads the column file by file and views it as uint32; the loader yields whole batches
(int64 tokens, segment ids, positions, loss mask), in shuffled order. What the loader does once a training, pinning the
version and reading the ids (open_sequences), is timed apart and in the JSON file.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.corpus import write_sequences
from benchmarks.harness import Different, Result, arguments, compare, finish, out
from model.loader.loader import Batch, SequenceLoader
from model.loader.snapshot import Snapshot, open_sequences

TARGET = 0.5
BATCH = 16  # sequences


def epoch(snapshot: Snapshot) -> Iterator[Batch]:
    """Every sequence once, shuffled, by a new loader; the table is written so that an epoch is whole batches."""
    return islice(SequenceLoader(snapshot, BATCH), snapshot.num_sequences // BATCH)


def scan(files: Iterable[str]) -> Iterator[npt.NDArray[np.uint32]]:
    """The tokens of each file, chunk by chunk, as one array; the values are viewed where Arrow decoded them."""
    for file in files:
        for chunk in pq.ParquetFile(file, memory_map=True).read(columns=["tokens"])["tokens"].chunks:
            _, offsets, values = chunk.buffers()
            ends = np.frombuffer(offsets, np.int32)[chunk.offset : chunk.offset + len(chunk) + 1]
            yield np.frombuffer(values, "<u4")[ends[0] // 4 : ends[-1] // 4]


def drain(arrays: Iterable[object]) -> None:
    """Go through all of it and keep nothing."""
    for _ in arrays:
        pass


def digests(sequences: Iterable[npt.NDArray[np.uint32]]) -> list[bytes]:
    """The sorted digests of the sequences' tokens: equal for the same sequences in any order."""
    return sorted(blake2b(tokens.tobytes(), digest_size=16).digest() for tokens in sequences)


def check(ours: list[bytes], peer: list[bytes]) -> None:
    """Raises Different unless the two multisets of digests are the same."""
    if ours != peer:
        common = len(set(ours) & set(peer))
        raise Different(
            f"the loader yields {len(ours)} sequences and the scan {len(peer)}, {common} distinct ones in common."
        )


def measure(snapshot: Snapshot, repetitions: int, notes: dict[str, float]) -> Result:
    """Check that both read the same sequences, then time them."""
    S = snapshot.sequence_length
    check(
        digests(row.astype("<u4") for batch in epoch(snapshot) for row in batch.tokens.numpy()),
        digests(row for part in scan(snapshot.files) for row in part.reshape(-1, S)),
    )
    return compare(
        claim="loader",
        ours=("SequenceLoader, one shuffled epoch", lambda: drain(epoch(snapshot))),
        peer=("pyarrow scan of tokens", lambda: drain(scan(snapshot.files))),
        target=TARGET,
        tokens=snapshot.num_sequences * S,
        repetitions=repetitions,
        notes=notes,
    )


def main() -> int:
    parser = arguments(__doc__, megabytes=40, repetitions=9)
    parser.add_argument("--sequence-length", type=int, default=2048, help="length of a sequence (tokens)")
    parser.add_argument("--files", type=int, default=4, help="files of the table (count)")
    asked = parser.parse_args()
    with TemporaryDirectory(prefix="lakemoe-bench-") as folder:
        out.print(f"loader: writing sequences of {asked.megabytes:g} MB of text ...")
        length, files = asked.sequence_length, asked.files
        write_sequences(Path(folder), asked.megabytes, sequence_length=length, files=files, multiple=BATCH)
        start = time.perf_counter()
        snapshot = open_sequences(folder)
        notes = {
            "sequences": snapshot.num_sequences,
            "sequence_length": snapshot.sequence_length,
            "files": len(snapshot.files),
            "file_bytes": sum(Path(file).stat().st_size for file in snapshot.files),
            "token_bytes": 4 * snapshot.num_sequences * snapshot.sequence_length,
            "open_seconds": round(time.perf_counter() - start, 4),
        }
        out.print(
            f"loader: {notes['sequences']:,} sequences of {length} tokens in {notes['files']} files, "
            f"{notes['token_bytes'] / 1e6:.0f} MB of tokens, opened in {notes['open_seconds']:.2f} s"
        )
        return finish("loader", asked.out, lambda: measure(snapshot, asked.repetitions, notes))


if __name__ == "__main__":
    sys.exit(main())
