"""Checkpoints that are there whole or not at all, written in the background.

A folder ``step-000123`` holds model.safetensors (the whole float32 weights, whoever held which part; several files
where they are large, weights.py), optimizer/ (moments and random states, each rank's part in a safetensors file, by
torch.distributed.checkpoint), training_state.json (position, counters), config.yaml (the model's) and manifest.json
(every file's size and sha256, the data, the training's settings). It is written under another name, flushed to disk and
renamed; nothing is pickled. Any world reads what any other has written.

Every rank writes, digests and later verifies its share of the files, so that nothing grows with the model alone: of
DBRX's 526 GB of weights no rank of 512 holds more than a file of 5 GB.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch import distributed as dist

from model.config import ModelConfig, dump_config
from model.errors import ModelError
from model.files import TEMPORARY, flush, write_json
from model.network.distributed import local_part
from model.network.transformer import Transformer
from model.train.optimizer import AdamW
from model.train.world import ALONE, World
from model.weights import INDEX, LazyTensors, split, weight_files, write_index

OPTIMIZER, STATE = "optimizer", "training_state.json"
CONFIG, MANIFEST = "config.yaml", "manifest.json"
PREFIX = "step-"
MOMENTS = ("exp_avg", "exp_avg_sq")
T = TypeVar("T")
Weights = dict[str, dict[str, Tensor]]  # whole tensors by name, by file


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A verified checkpoint's folder and its JSON."""

    folder: Path
    state: dict[str, Any]
    manifest: dict[str, Any]

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return int(self.manifest["step"])


class CheckpointWriter:
    """Writes checkpoints under ``root``, one at a time, while the training goes on; keeps the newest ``keep``.

    Every rank has one and calls it alike. ``saved`` is called, in the background, with each step whose checkpoint is
    whole.
    """

    def __init__(self, root: Path, world: World, keep: int, *, saved: Callable[[int], None] | None = None) -> None:
        self.root, self.world, self.keep, self._saved = root, world, keep, saved
        self._group = world.background
        self._thread: threading.Thread | None = None
        self._failure: Exception | None = None
        self._folder: Path | None = None

    def save(
        self,
        step: int,
        model: Transformer,
        optimizer: AdamW,
        *,
        state: dict[str, Any],
        manifest: dict[str, Any],
    ) -> None:
        """Copy all that step's checkpoint holds, and write it in the background. Waits for the one before.

        Errors: ModelError (75) where that one could not be written.
        """
        self.wait()
        sizes = _sizes(model)
        weights = _whole_weights(model, optimizer, self.world, sizes)
        parts = _parts(model, optimizer, self.world, copy=True)

        def write() -> None:
            try:
                self._folder = self._write(step, sizes, weights, parts, model.config, state, manifest)
                if self._saved is not None:
                    self._saved(step)
            except Exception as error:
                self._failure = error

        self._thread = threading.Thread(target=write, name=f"checkpoint-{step}")
        self._thread.start()

    def wait(self) -> Path | None:
        """The folder of the last checkpoint, once it is whole. Errors: ModelError (75) where it could not be."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise self.world.everywhere(failure) if isinstance(failure, ModelError) else failure
        return self._folder

    def settle(self) -> None:
        """End the writing where a training ends by another error, which is the one that is told."""
        with contextlib.suppress(Exception):
            self.wait()

    def _write(
        self,
        step: int,
        sizes: dict[str, int],
        weights: Weights,
        parts: dict[str, Tensor],
        config: ModelConfig,
        state: dict[str, Any],
        manifest: dict[str, Any],
    ) -> Path:
        final = self.root / f"{PREFIX}{step:06d}"
        temporary = self.root / f"{TEMPORARY}{final.name}"
        self._together(final, lambda: _prepare(temporary) if self.world.main else None)
        self._together(final, lambda: self._write_part(temporary, parts))

        def write() -> dict[str, Any]:
            """This rank's files of the rest; the sizes and digests of all that are its own."""
            for file, tensors in weights.items():
                save_file(tensors, temporary / file)
            ours = [temporary / file for file in weights]
            ours += (temporary / OPTIMIZER).glob(f"shard-{self.world.rank + 1:05d}-*")
            if self.world.main:
                (temporary / CONFIG).write_text(dump_config(config), encoding="utf-8")
                (temporary / STATE).write_text(json.dumps(state, indent=2, sort_keys=True) + "\n", encoding="utf-8")
                write_index(temporary, split(sizes), sum(sizes.values()))
                ours += [temporary / CONFIG, temporary / STATE, *temporary.glob(INDEX)]
            for path in ours:
                flush(path)
            return {
                str(path.relative_to(temporary)): {"bytes": path.stat().st_size, "sha256": _sha256(path)}
                for path in ours
            }

        written = self._together(final, write)

        def finish() -> None:
            if not self.world.main:
                return
            files = {name: said for part in written for name, said in sorted(part.items())}
            there = {str(file.relative_to(temporary)) for file in temporary.rglob("*") if file.is_file()}
            if there != files.keys() or not all(written):
                raise OSError("not every process's files are there: it must be a shared folder")
            flush(temporary / OPTIMIZER)
            write_json(temporary / MANIFEST, {**manifest, "format": 2, "step": step, "files": files})
            if final.exists():  # one that could not be read when this run resumed from an older one
                shutil.rmtree(final)
            os.replace(temporary, final)
            flush(self.root)
            # Later ones could not be read when this run began from an earlier one: their steps come again.
            kept = [folder for folder in _folders(self.root) if _step(folder) <= step]
            for old in set(_folders(self.root)) - set(kept[: self.keep]):
                shutil.rmtree(old, ignore_errors=True)

        self._together(final, finish)
        return final

    def _write_part(self, temporary: Path, parts: dict[str, Tensor]) -> None:
        from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
        from torch.distributed.checkpoint.state_dict_saver import save

        writer = HuggingFaceStorageWriter(str(temporary / OPTIMIZER), save_distributed=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a world of one
            save(dict(parts), storage_writer=writer, process_group=self._group, no_dist=self._group is None)

    def _together(self, final: Path, part: Callable[[], T]) -> list[T]:
        """One step of the writing on every rank, and what each returned; where one fails, all do, and what was written
        goes."""
        why, result = "", None
        try:
            result = part()
        except Exception as error:
            # OSError, SafetensorError, and what torch.distributed.checkpoint wraps them in
            why = str(error) or type(error).__name__
        said: list[Any] = [(why, result)]
        if self._group is not None:
            said = [None] * self.world.size
            dist.all_gather_object(said, (why, result), group=self._group)
        if why := next(filter(None, (reason for reason, _ in said)), ""):
            shutil.rmtree(final.with_name(f"{TEMPORARY}{final.name}"), ignore_errors=True)
            raise ModelError(
                f"The checkpoint {final} could not be written ({why.strip().splitlines()[-1]}); "
                "make room or mend the disk and run again.",
                75,
            )
        return [result for _, result in said]


def _prepare(temporary: Path) -> None:
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)


def find_checkpoint(root: Path, world: World = ALONE) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint under root that is whole, and what is wrong with newer ones. Removes half-written ones.

    Every rank of ``world`` calls it and finds the same.
    """

    def look() -> list[Path]:
        for half in root.glob(f"{TEMPORARY}*"):
            shutil.rmtree(half, ignore_errors=True)
        return _folders(root)

    broken: list[str] = []
    for folder in world.from_main(look):
        try:
            return read_checkpoint(folder, world), broken
        except ModelError as error:
            broken.append(str(error))
    return None, broken


def read_checkpoint(folder: Path, world: World = ALONE) -> Checkpoint:
    """A checkpoint whose files are all as the manifest says, each of which one rank reads; else ModelError."""

    def read() -> Checkpoint:
        try:
            manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            state = json.loads((folder / STATE).read_text(encoding="utf-8"))
            _ = [(said["bytes"], said["sha256"]) for said in manifest["files"].values()]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"{folder} is no whole checkpoint ({error}); take another one.") from error
        return Checkpoint(folder=folder, state=state, manifest=manifest)

    def wrong(found: Checkpoint) -> str:
        files = found.manifest["files"]
        # The largest first, so that every rank has about as much to read.
        names = sorted(files, key=lambda name: (-files[name]["bytes"], name))
        for name in names[world.rank :: world.size]:
            file = folder / name
            try:
                if file.stat().st_size != files[name]["bytes"] or _sha256(file) != files[name]["sha256"]:
                    return f"{file} is not what was written; take another checkpoint."
            except OSError as error:
                return f"{folder} is no whole checkpoint ({error}); take another one."
        return ""

    found = world.from_main(read)
    if reason := next(filter(None, world.gather(wrong(found))), ""):
        raise world.everywhere(ModelError(reason))
    return found


@torch.no_grad()
def restore(checkpoint: Checkpoint, model: Transformer, optimizer: AdamW, world: World) -> None:
    """Weights, moments and random state as they were. Errors: ModelError where the files do not fit the model.

    The optimizer's count of updates is in the state that the caller kept.
    """
    if checkpoint.manifest.get("format") != 2:
        raise ModelError(
            f"{checkpoint.folder} was written by an earlier lakemoe, whose trainings cannot be gone on with; "
            "train under another name."
        )
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    with LazyTensors(weight_files(checkpoint.folder)) as weights:
        for name, parameter in model.named_parameters():
            master = torch.empty_like(local_part(parameter), dtype=torch.float32)
            if master.numel():  # else there are fewer rows than ranks
                master.copy_(weights[name][_where(parameter)])
            optimizer.set_master(parameter, master)
        for name, buffer in model.named_buffers():
            buffer.copy_(weights[name][:])
    parts = _parts(model, optimizer, world, copy=False)
    reader = HuggingFaceStorageReader(str(checkpoint.folder / OPTIMIZER))
    known = reader.read_metadata().state_dict_metadata
    # A world of more ranks begins the random states that no rank had.
    kept = {name: part for name, part in parts.items() if not name.startswith("random/") or name in known}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a world of one
        load(kept, storage_reader=reader, process_group=world.group, no_dist=world.group is None)
    for name, part in kept.items():
        if name.startswith("random/cpu"):
            torch.set_rng_state(part.cpu())
        elif name.startswith("random/cuda"):
            torch.cuda.set_rng_state(part.cpu())


def _sizes(model: Transformer) -> dict[str, int]:
    """Bytes of each whole tensor as a checkpoint holds it: parameters in float32."""
    sizes = {name: 4 * parameter.numel() for name, parameter in model.named_parameters()}
    return sizes | {name: buffer.nbytes for name, buffer in model.named_buffers()}


def _whole_weights(model: Transformer, optimizer: AdamW, world: World, sizes: dict[str, int]) -> Weights:
    """Float32 copies on the CPU of the files that this rank writes; gathered one parameter after the other.

    Files are dealt out at equal distances, so that machines of several ranks have as many each.
    """
    layout = split(sizes)
    ours = {file: layout[file] for n, file in enumerate(layout) if n * world.size // len(layout) == world.rank}
    file_of = {name: file for file, names in ours.items() for name in names}
    whole: Weights = {file: {} for file in ours}
    for name, parameter in model.named_parameters():
        value = _like(parameter, optimizer.master(parameter))
        full_tensor = getattr(value, "full_tensor", None)
        value = value if full_tensor is None else full_tensor()
        if name in file_of:
            whole[file_of[name]][name] = value.to("cpu", copy=True).contiguous()
    for name, buffer in model.named_buffers():
        if name in file_of:
            whole[file_of[name]][name] = buffer.to("cpu", copy=True)
    return whole


def _where(parameter: Tensor) -> tuple[slice, ...]:
    """Which part of the whole tensor this rank has; of one that is not distributed, all of it."""
    if not hasattr(parameter, "device_mesh"):
        return (slice(None),) * parameter.dim()
    # What torch.distributed.checkpoint asks of a tensor.
    (chunk,) = parameter.__create_chunk_list__()  # type: ignore[attr-defined]
    return tuple(slice(start, start + size) for start, size in zip(chunk.offsets, chunk.sizes, strict=True))


def _parts(model: Transformer, optimizer: AdamW, world: World, *, copy: bool) -> dict[str, Tensor]:
    """This rank's part of moments and random states, as tensors that say which part it is; a copy is on the CPU."""
    parts: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        for key in MOMENTS:
            moment = optimizer.state[parameter][key]
            parts[f"{key}/{name}"] = _like(parameter, moment.to("cpu", copy=True) if copy else moment)
    parts[f"random/cpu/{world.rank}"] = torch.get_rng_state()
    if world.device.type == "cuda":
        parts[f"random/cuda/{world.rank}"] = torch.cuda.get_rng_state()
    return parts


def _like(parameter: Tensor, local: Tensor) -> Tensor:
    """A local tensor as the part of a distributed one that the parameter's own local part is."""
    if not hasattr(parameter, "device_mesh"):
        return local
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor

    assert isinstance(parameter, DTensor)
    mesh = parameter.device_mesh
    if mesh.device_type != local.device.type:
        mesh = DeviceMesh(local.device.type, mesh.mesh, mesh_dim_names=mesh.mesh_dim_names, _init_backend=False)
    return DTensor.from_local(
        local, mesh, parameter.placements, run_check=False, shape=parameter.shape, stride=parameter.stride()
    )


def _folders(root: Path) -> list[Path]:
    """Checkpoints by step, the newest first."""
    folders = [f for f in root.glob(f"{PREFIX}*") if f.name.removeprefix(PREFIX).isdigit()]
    return sorted(folders, key=_step, reverse=True)


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix(PREFIX))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
