"""Checkpoints that are there whole or not at all, written in the background.

A folder ``step-000123`` holds model.safetensors (the whole float32 weights, whoever held which part), optimizer/
(moments and random states, each rank's part in a safetensors file, by torch.distributed.checkpoint),
training_state.json (position, counters), config.yaml (the model's) and manifest.json (every file's size and sha256, the
data, the training's settings). It is written under another name, flushed to disk and renamed; nothing is pickled. Any
world reads what any other has written.
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
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch import distributed as dist

from model.config import ModelConfig, dump_config
from model.errors import ModelError
from model.files import TEMPORARY, flush, write_json
from model.network.distributed import assign, local_part
from model.network.transformer import Transformer
from model.train.optimizer import AdamW
from model.train.world import World

MODEL, OPTIMIZER, STATE = "model.safetensors", "optimizer", "training_state.json"
CONFIG, MANIFEST = "config.yaml", "manifest.json"
PREFIX = "step-"
MOMENTS = ("exp_avg", "exp_avg_sq")


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
        weights = _whole_weights(model, optimizer, self.world)
        parts = _parts(model, optimizer, self.world, copy=True)

        def write() -> None:
            try:
                self._folder = self._write(step, weights, parts, model.config, state, manifest)
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
        weights: dict[str, Tensor],
        parts: dict[str, Tensor],
        config: ModelConfig,
        state: dict[str, Any],
        manifest: dict[str, Any],
    ) -> Path:
        final = self.root / f"{PREFIX}{step:06d}"
        temporary = self.root / f"{TEMPORARY}{final.name}"
        self._together(final, lambda: _prepare(temporary) if self.world.main else None)
        self._together(final, lambda: self._write_part(temporary, parts))

        def finish() -> None:
            if not self.world.main:
                return
            save_file(weights, temporary / MODEL)
            (temporary / CONFIG).write_text(dump_config(config), encoding="utf-8")
            (temporary / STATE).write_text(json.dumps(state, indent=2, sort_keys=True) + "\n", encoding="utf-8")
            names = [p.relative_to(temporary) for p in sorted(temporary.rglob("*")) if p.is_file()]
            files = {}
            for name in names:
                flush(temporary / name)
                files[str(name)] = {"bytes": (temporary / name).stat().st_size, "sha256": _sha256(temporary / name)}
            flush(temporary / OPTIMIZER)
            shards = sum(name.parent.name == OPTIMIZER for name in names)
            if shards != self.world.size:
                raise OSError(f"{shards} of {self.world.size} processes' files are there: it must be a shared folder")
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

    def _together(self, final: Path, part: Callable[[], None]) -> None:
        """One step of the writing on every rank; where one fails, all do, and what was written goes."""
        why = ""
        try:
            part()
        except Exception as error:
            # OSError, SafetensorError, and what torch.distributed.checkpoint wraps them in
            why = str(error) or type(error).__name__
        reasons: list[Any] = [why]
        if self._group is not None:
            reasons = [None] * self.world.size
            dist.all_gather_object(reasons, why, group=self._group)
        if why := next(filter(None, reasons), ""):
            shutil.rmtree(final.with_name(f"{TEMPORARY}{final.name}"), ignore_errors=True)
            raise ModelError(
                f"The checkpoint {final} could not be written ({why.strip().splitlines()[-1]}); "
                "make room or mend the disk and run again.",
                75,
            )


def _prepare(temporary: Path) -> None:
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)


def find_checkpoint(root: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint under root that is whole, and what is wrong with newer ones. Removes half-written ones."""
    for half in root.glob(f"{TEMPORARY}*"):
        shutil.rmtree(half, ignore_errors=True)
    broken: list[str] = []
    for folder in _folders(root):
        try:
            return read_checkpoint(folder), broken
        except ModelError as error:
            broken.append(str(error))
    return None, broken


def read_checkpoint(folder: Path) -> Checkpoint:
    """A checkpoint whose files are all as the manifest says; else ModelError."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        for name, expected in manifest["files"].items():
            file = folder / name
            if file.stat().st_size != expected["bytes"] or _sha256(file) != expected["sha256"]:
                raise ModelError(f"{file} is not what was written; take another checkpoint.")
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{folder} is no whole checkpoint ({error}); take another one.") from error
    return Checkpoint(folder=folder, state=state, manifest=manifest)


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

    with safe_open(checkpoint.folder / MODEL, framework="pt") as weights:
        for name, parameter in model.named_parameters():
            master = torch.empty_like(parameter, dtype=torch.float32)
            assign(master, weights.get_tensor(name))
            optimizer.set_master(parameter, local_part(master))
        for name, buffer in model.named_buffers():
            buffer.copy_(weights.get_tensor(name))
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


def _whole_weights(model: Transformer, optimizer: AdamW, world: World) -> dict[str, Tensor]:
    """Float32 copies on the CPU of rank 0, one parameter after the other; on other ranks nothing is kept."""
    whole = {}
    for name, parameter in model.named_parameters():
        value = _like(parameter, optimizer.master(parameter))
        full_tensor = getattr(value, "full_tensor", None)
        value = value if full_tensor is None else full_tensor()
        if world.main:
            whole[name] = value.to("cpu", copy=True).contiguous()
    if world.main:
        whole |= {name: buffer.to("cpu", copy=True) for name, buffer in model.named_buffers()}
    return whole


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
