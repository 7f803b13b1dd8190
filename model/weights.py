"""A model's weights as files: safetensors, in one file or in several with an index, laid out as Hugging Face's are.

    model.safetensors                                                           up to SHARD_BYTES, or one tensor
    model-00001-of-00003.safetensors, ..., model.safetensors.index.json         more

Which tensor is in which file follows from names and sizes alone, never from how many processes wrote them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

from safetensors import safe_open

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD_BYTES = 5_000_000_000


def split(sizes: Mapping[str, int], limit: int = SHARD_BYTES) -> dict[str, list[str]]:
    """The files of tensors of these sizes in bytes: {file name: its tensors}, each file of at most ``limit`` bytes.

    A larger tensor has a file to itself.
    """
    shards: list[list[str]] = [[]]
    held = 0
    for name, size in sizes.items():
        if shards[-1] and held + size > limit:
            shards.append([])
            held = 0
        shards[-1].append(name)
        held += size
    if len(shards) == 1:
        return {WEIGHTS: shards[0]}
    return {f"model-{n:05d}-of-{len(shards):05d}.safetensors": shard for n, shard in enumerate(shards, 1)}


def write_index(folder: Path, files: Mapping[str, Sequence[str]], total: int) -> bool:
    """Whether there is an index: of several files, which hold ``total`` bytes of tensors; one file has none."""
    if len(files) == 1:
        return False
    where = {name: file for file, names in files.items() for name in names}
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return True


def weight_files(folder: Path) -> list[Path]:
    """The weight files of a folder. Errors: FileNotFoundError; ValueError for a broken index."""
    if (folder / INDEX).exists():
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        where = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(where, dict):
            raise ValueError(f"{INDEX} has no weight_map")
        # A name from a file is not a path to follow.
        return sorted({folder / Path(str(name)).name for name in where.values()})
    if not (folder / WEIGHTS).exists():
        raise FileNotFoundError(f"there is neither {WEIGHTS} nor {INDEX}")
    return [folder / WEIGHTS]


def weights_sha256(manifest: Mapping[str, Any]) -> str:
    """What identifies the weights of a checkpoint, by its manifest: the sha256 of the one file, or, of several, of the
    lines that ``sha256sum model-*.safetensors`` prints.

    Errors: KeyError where the manifest names no weights.
    """
    files = manifest["files"]
    several = sorted(name for name in files if name.startswith("model-") and name.endswith(".safetensors"))
    if not several:
        return str(files[WEIGHTS]["sha256"])
    lines = "".join(f"{files[name]['sha256']}  {name}\n" for name in several)
    return hashlib.sha256(lines.encode()).hexdigest()


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
