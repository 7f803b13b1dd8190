"""Safetensors files in shards, written one tensor at a time (they are read by model/weights.py's LazyTensors).

safetensors' own save_file wants all tensors of a file in memory at once; its format is a length, a JSON header and the
bytes (https://github.com/huggingface/safetensors, "Format"), so it is written here.
"""

from __future__ import annotations

import json
import os
import struct
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.convert.tensors import Published
from model.weights import split, write_index

DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16"}

# Told (bytes done, bytes in all).
Progress = Callable[[int, int], None]


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
    by_name = {tensor.name: tensor for tensor in tensors}
    sizes = {name: tensor.numel * dtype.itemsize for name, tensor in by_name.items()}
    files, total, done = split(sizes, max_shard_bytes), sum(sizes.values()), 0
    for name, names in files.items():
        shard = [by_name[n] for n in names]
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
    write_index(folder, files, total)
    return [folder / name for name in files]


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
