"""Checkpoints that are there whole or not at all.

A folder ``step-000123`` holds model.safetensors, training_state.safetensors (moments, random state),
training_state.json (position, counters), config.yaml (the model's) and manifest.json (every file's size and sha256, the
data, the training's settings). It is written under another name, flushed to disk and renamed; nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from model.config import ModelConfig, dump_config
from model.errors import ModelError

MODEL, STATE_TENSORS, STATE = "model.safetensors", "training_state.safetensors", "training_state.json"
CONFIG, MANIFEST = "config.yaml", "manifest.json"
PREFIX, TEMPORARY = "step-", ".writing-"


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


def write_json(path: Path, value: Any) -> None:
    """Replace a JSON file in one step: a reader, or a restart after a kill, sees the old one or the new one."""
    temporary = path.with_name(TEMPORARY + path.name)
    temporary.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    _flush(temporary)
    os.replace(temporary, path)
    _flush(path.parent)


def save_checkpoint(
    root: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    config: ModelConfig,
    *,
    state: dict[str, Any],
    manifest: dict[str, Any],
    keep: int,
) -> Path:
    """Write step's checkpoint under root, then remove all but the newest ``keep``. ModelError (75) where it cannot."""
    final = root / f"{PREFIX}{step:06d}"
    temporary = root / f"{TEMPORARY}{final.name}"
    try:
        root.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        save_file({k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}, temporary / MODEL)
        save_file(_training_tensors(model, optimizer), temporary / STATE_TENSORS)
        (temporary / CONFIG).write_text(dump_config(config), encoding="utf-8")
        (temporary / STATE).write_text(json.dumps(state, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        for name in (MODEL, STATE_TENSORS, CONFIG, STATE):
            _flush(temporary / name)
        files = {f.name: {"bytes": f.stat().st_size, "sha256": _sha256(f)} for f in sorted(temporary.iterdir())}
        write_json(temporary / MANIFEST, {**manifest, "format": 1, "step": step, "files": files})
        if final.exists():  # one that could not be read when this run resumed from an older one
            shutil.rmtree(final)
        os.replace(temporary, final)
        _flush(root)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise ModelError(
            f"The checkpoint {final} could not be written ({error}); make room or mend the disk and run again.", 75
        ) from error
    for old in _folders(root)[keep:]:
        shutil.rmtree(old, ignore_errors=True)
    return final


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


def restore(checkpoint: Checkpoint, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Weights, moments and random state as they were."""
    model.load_state_dict(load_file(checkpoint.folder / MODEL))
    tensors = load_file(checkpoint.folder / STATE_TENSORS)
    for name, parameter in model.named_parameters():
        # Set directly: load_state_dict knows parameters by number, and a number says nothing in a file.
        # Moments as AdamW allocates them: the parameter's device; fused AdamW counts steps there too.
        kept = {key: tensors[f"{key}/{name}"].to(parameter.device) for key in ("step", "exp_avg", "exp_avg_sq")}
        optimizer.state[parameter] = kept
    torch.set_rng_state(tensors["random/cpu"])
    if "random/cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["random/cuda"])


def _training_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    tensors = {
        f"{key}/{name}": optimizer.state[parameter][key].detach().cpu().contiguous()
        for name, parameter in model.named_parameters()
        for key in ("step", "exp_avg", "exp_avg_sq")
    }
    tensors["random/cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["random/cuda"] = torch.cuda.get_rng_state()
    return tensors


def _folders(root: Path) -> list[Path]:
    """Checkpoints by step, the newest first."""
    folders = [f for f in root.glob(f"{PREFIX}*") if f.name.removeprefix(PREFIX).isdigit()]
    return sorted(folders, key=lambda f: int(f.name.removeprefix(PREFIX)), reverse=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
