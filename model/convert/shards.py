"""Safetensors files in shards, written and read one tensor at a time.

safetensors' own save_file wants all tensors of a file in memory at once; its format is a length, a JSON header and the
bytes (https://github.com/huggingface/safetensors, "Format"), so it is written here. It is read by safe_open.
"""

from __future__ import annotations

import json
import os
import struct
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import safe_open
from torch import Tensor

from model.convert.tensors import Published

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16"}

# Told (bytes done, bytes in all).
Progress = Callable[[int, int], None]


class LazyTensors(Mapping[str, Any]):
    """Tensors of several safetensors files as slices that read when they are indexed; nothing is held.

    A context manager: the files are open inside. Errors: OSError, SafetensorError where a file is not readable.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self._files = files
        self._where: dict[str, Any] = {}

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            for file in self._files:
                handle = stack.enter_context(safe_open(file, framework="pt"))
                self._where |= dict.fromkeys(handle.keys(), handle)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._where.clear()
        self._stack.close()

    def __getitem__(self, name: str) -> Any:
        return self._where[name].get_slice(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)


def shape_of(tensor: Any) -> tuple[int, ...]:
    """The shape of a tensor or of a lazy slice."""
    return tuple(tensor.shape) if isinstance(tensor, Tensor) else tuple(tensor.get_shape())


def write_shards(
    folder: Path,
    tensors: Sequence[Published],
    weights: Mapping[str, Any],
    dtype: torch.dtype,
    max_shard_bytes: int,
    progress: Progress | None = None,
) -> list[Path]:
    """Write the tensors, made of our ``weights``, in files of at most max_shard_bytes (one tensor may be more).

    One piece of one tensor is in memory at a time. More than one file has an index beside it. Returns the files.
    """
    shards = _split(tensors, dtype.itemsize, max_shard_bytes)
    total = sum(tensor.numel for tensor in tensors) * dtype.itemsize
    files, done = [], 0
    for number, shard in enumerate(shards, 1):
        name = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        with (folder / name).open("wb") as file:
            file.write(_header(shard, dtype))
            for tensor in shard:
                for piece in tensor.pieces:
                    block = piece.of(weights[piece.name]).detach().to("cpu", dtype).contiguous()
                    file.write(block.view(torch.uint8).numpy().data)
                    done += block.nbytes
                if progress is not None:
                    progress(done, total)
            file.flush()
            os.fsync(file.fileno())
        files.append(folder / name)
    if len(shards) > 1:
        where = {t.name: file.name for file, shard in zip(files, shards, strict=True) for t in shard}
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return files


def shard_files(folder: Path) -> list[Path]:
    """The weight files of a published folder. Errors: FileNotFoundError; ValueError for a broken index."""
    if (folder / INDEX).exists():
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        where = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(where, dict):
            raise ValueError(f"{INDEX} has no weight_map")
        # A name from a file is not a path to follow.
        return sorted({folder / Path(str(name)).name for name in where.values()})
    if not (folder / SINGLE).exists():
        raise FileNotFoundError(f"there is neither {SINGLE} nor {INDEX}")
    return [folder / SINGLE]


def _split(tensors: Sequence[Published], itemsize: int, limit: int) -> list[list[Published]]:
    shards: list[list[Published]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.numel * itemsize > limit:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.numel * itemsize
    return shards


def _header(shard: Sequence[Published], dtype: torch.dtype) -> bytes:
    assert sys.byteorder == "little", "safetensors are little-endian"
    # transformers refuses a file that does not say its framework.
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in shard:
        begin, end = end, end + tensor.numel * dtype.itemsize
        header[tensor.name] = {"dtype": DTYPES[dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text
