"""Loader: tokens a second over one shuffled epoch, beside pyarrow's scan of the tokens column of the same files.

Both start cold each time: a new reader, nothing decoded. The files are in the page cache for both, so that the disk is
not what is measured. The scan reads the column file by file and views it as uint32; the loader yields whole batches
(int64 tokens, segment ids, positions, loss mask), in shuffled order. What the loader does once a training, pinning the
version and reading the ids (open_sequences), is timed apart and in the JSON file.

The same sequences are then written in row groups of 16, and shuffled within windows that are a small part of them. What
is counted there, over one epoch: the distance between sequences that were neighbours in a row group, beside that of a
uniform shuffle of the window; the bytes of files that 8 ranks read, beside those of the columns once; and the most
memory that Arrow held for one rank of 1, beside the room that the loader states.
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
import pyarrow as pa
import pyarrow.parquet as pq
from deltalake import DeltaTable, WriterProperties, write_deltalake

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.corpus import write_sequences
from benchmarks.harness import Different, Result, arguments, compare, finish, out
from model.loader.loader import Batch, SequenceLoader, SequenceReader
from model.loader.order import Order
from model.loader.snapshot import COLUMNS, Snapshot, open_sequences
from model.loader.store import chunks
from pipelines.tables import GOLD_SEQUENCES

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


def distance(snapshot: Snapshot) -> float:
    """How far apart neighbours of a row group come on average in an epoch, over (W + 1) / 3 of a uniform shuffle."""
    at = np.empty(snapshot.num_sequences, dtype=np.int64)
    at[Order(snapshot, 0, (), 1).samples(0, len(at))] = np.arange(len(at))
    same = snapshot.locate(np.arange(1, len(at)))[0] == snapshot.locate(np.arange(len(at) - 1))[0]
    return float(np.abs(np.diff(at))[same].mean() / ((snapshot.window + 1) / 3))


def column_bytes(snapshot: Snapshot) -> int:
    """Of the row groups' columns that the loader reads, in the files, once."""
    footers = [pq.read_metadata(file) for file in snapshot.files]
    places = zip(snapshot.file_G.tolist(), snapshot.row_group_G.tolist(), strict=True)
    return sum(c.total_compressed_size for file, group in places for c in chunks(footers[file], group, COLUMNS))


def one_epoch(snapshot: Snapshot, world_size: int, batch: int = BATCH) -> tuple[int, int]:
    """Bytes that all ranks read in an epoch, by their own readers; the most that Arrow held for any of them."""
    read = held = 0
    for rank in range(world_size):
        order = Order(snapshot, 0, (), batch)
        mine = order.samples(0, snapshot.num_sequences)[rank::world_size]
        reader, before = SequenceReader(snapshot, order.room(world_size)), pa.total_allocated_bytes()
        for _ in reader.batches(iter(np.split(mine, range(batch, len(mine), batch)))):
            held = max(held, pa.total_allocated_bytes() - before)
        read += reader.bytes_read
    return read, held


def windows(folder: str, megabytes: float) -> dict[str, float]:
    """The figures of a shuffle within windows of so many 2^20 bytes of tokens."""
    where = Path(folder) / "windows"
    write_deltalake(
        GOLD_SEQUENCES.uri(str(where)),
        DeltaTable(GOLD_SEQUENCES.uri(folder)).to_pyarrow_table(),
        partition_by=list(GOLD_SEQUENCES.partition_by),
        writer_properties=WriterProperties(max_row_group_size=16),
    )
    snapshot = open_sequences(str(where), window_bytes=int(megabytes * (1 << 20)))
    once, (alone, held), (read, _) = column_bytes(snapshot), one_epoch(snapshot, 1), one_epoch(snapshot, 8)
    return {
        "window_sequences": snapshot.window,
        "row_groups": len(snapshot.file_G),
        "neighbour_distance": round(distance(snapshot), 4),
        "amplification_1_rank": round(alone / once, 4),
        "amplification_8_ranks": round(read / once, 4),
        "held_bytes": held,
        "room_bytes": Order(snapshot, 0, (), BATCH).room(1),
    }


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
    parser.add_argument("--window", type=float, default=4, help="tokens shuffled together, counted (2^20 bytes)")
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
        notes |= windows(folder, asked.window)
        out.print(
            f"loader: windows of {notes['window_sequences']:,} of {notes['row_groups']:,} row groups of 16: neighbours "
            f"are {notes['neighbour_distance']:.3f} of a uniform shuffle's distance apart; the columns are read "
            f"{notes['amplification_8_ranks']:.3f} times by 8 ranks, {notes['amplification_1_rank']:.3f} by one, which "
            f"holds {notes['held_bytes'] / 1e6:.1f} MB in a room of {notes['room_bytes'] / 1e6:.1f} MB"
        )
        return finish("loader", asked.out, lambda: measure(snapshot, asked.repetitions, notes))


if __name__ == "__main__":
    sys.exit(main())
