"""Checkpoints that are there whole or not at all, written in the background.

A folder ``step-000123`` holds model.safetensors and optimizer/ (share.py), training_state.json (position, counters),
config.yaml (the model's) and manifest.json (every file's size and sha256, the data, the training's settings). It is
written under another name, flushed to disk and renamed; nothing is pickled. Any world reads what any other has written.

Every rank writes, digests and later verifies its share of the files: of DBRX's 526 GB of weights no rank of 512 keeps
more than a file of 5 GB. Weights up to that are one file, rank 0's.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from torch import distributed as dist

from model.config import ModelConfig, dump_config
from model.errors import ModelError
from model.files import TEMPORARY, flush, write_json
from model.network.transformer import Transformer
from model.train.optimizer import AdamW
from model.train.share import OPTIMIZER, HostCopies, Share, copy_share, restore
from model.train.world import ALONE, World

CONFIG, STATE, MANIFEST = "config.yaml", "training_state.json", "manifest.json"
PREFIX = "step-"
FORMAT, READABLE = 3, (2, 3)  # of the folder; 2 has its weights in one file
THREADS = 4  # that digest, of each process
T = TypeVar("T")


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

    def restore(self, model: Transformer, optimizer: AdamW, world: World) -> None:
        """Weights, moments and random state as they were; every rank calls it. Errors: ModelError."""
        if (found := self.manifest.get("format")) not in READABLE:
            raise world.everywhere(
                ModelError(
                    f"{self.folder} is of format {found}, and this lakemoe goes on with "
                    f"{' and '.join(map(str, READABLE))}; take the lakemoe that wrote it, or train under another name."
                )
            )
        restore(self.folder, model, optimizer, world)


class CheckpointWriter:
    """Writes checkpoints under ``root``, one at a time, while the training goes on; keeps the newest ``keep``.

    Every rank has one and calls it alike. ``saved`` is called, in the background, with each step whose checkpoint is
    whole.
    """

    def __init__(self, root: Path, world: World, keep: int, *, saved: Callable[[int], None] | None = None) -> None:
        self.root, self.world, self.keep, self._saved = root, world, keep, saved
        self._group, self._host = world.background, HostCopies()
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
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
        share = copy_share(model, optimizer, self.world, self._host)

        def write() -> None:
            try:
                self._folder = self._write(step, share, model.config, state, manifest)
                if self._saved is not None:
                    self._saved(step)
            except BaseException as error:  # also Rust's panics: what no one sees would be taken for a whole one
                self._failure = error

        self._folder = None
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
        share: Share,
        config: ModelConfig,
        state: dict[str, Any],
        manifest: dict[str, Any],
    ) -> Path:
        final = self.root / f"{PREFIX}{step:06d}"
        temporary = self.root / f"{TEMPORARY}{final.name}"
        self._together(final, lambda: _prepare(temporary) if self.world.main else None)

        def write() -> dict[str, Any]:
            """This rank's files; their sizes and digests."""
            if not temporary.is_dir():  # rank 0 has made it
                raise OSError("not every process sees it: it must be a shared folder")
            ours = share.write(temporary, self.world)
            if self.world.main:
                (temporary / CONFIG).write_text(dump_config(config), encoding="utf-8")
                (temporary / STATE).write_text(json.dumps(state, indent=2, sort_keys=True) + "\n", encoding="utf-8")
                ours += [temporary / CONFIG, temporary / STATE]
            for path in ours:
                flush(path)
            names = [str(path.relative_to(temporary)) for path in ours]
            digests = _sha256s(ours)
            return {
                name: {"bytes": path.stat().st_size, "sha256": digest}
                for name, path, digest in zip(names, ours, digests, strict=True)
            }

        written = self._together(final, write)

        def finish() -> None:
            if not self.world.main:
                return
            files = {name: said for part in written for name, said in sorted(part.items())}
            there = {str(file.relative_to(temporary)) for file in temporary.rglob("*") if file.is_file()}
            if there != files.keys():
                other = ", ".join(sorted(there ^ files.keys())[:3])
                raise OSError(f"not what all processes have written is there, or more ({other}): is it a shared folder")
            flush(temporary / OPTIMIZER)
            write_json(temporary / MANIFEST, {**manifest, "format": FORMAT, "step": step, "files": files})
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

    def _together(self, final: Path, part: Callable[[], T]) -> list[T]:
        """One step of the writing on every rank, and what each returned; where one fails, all do, and what was written
        goes."""
        why, result = "", None
        try:
            result = part()
        except BaseException as error:
            # OSError, SafetensorError, a panic of safetensors; the others wait to be told
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
    (temporary / OPTIMIZER).mkdir(parents=True)


def find_checkpoint(root: Path, world: World = ALONE) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint under root that is whole, and what is wrong with newer ones. Removes half-written ones.

    Every rank of ``world`` calls it and finds the same. Errors: ModelError (75) where a rank cannot read what is there:
    nothing is judged by that.
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
            if error.exit_code == 75:
                raise
            broken.append(str(error))
    return None, broken


def read_checkpoint(folder: Path, world: World = ALONE) -> Checkpoint:
    """A checkpoint whose files are all as the manifest says, each of which one rank reads.

    Errors: ModelError, 1 where they are not, 75 where a rank cannot read them.
    """

    def read() -> Checkpoint:
        """Rank 0's view of what there is, the files' contents left out."""
        try:
            manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            state = json.loads((folder / STATE).read_text(encoding="utf-8"))
            sizes = {name: (int(said["bytes"]), str(said["sha256"])) for name, said in manifest["files"].items()}
            int(manifest["step"])
            for name, (size, _) in sizes.items():
                if (folder / name).stat().st_size != size:
                    raise ModelError(f"{folder / name} is not what was written; take another checkpoint.")
        except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"{folder} is no whole checkpoint ({error}); take another one.") from error
        except OSError as error:
            raise _unreadable(folder, error) from error
        return Checkpoint(folder=folder, state=state, manifest=manifest)

    def verify(found: Checkpoint) -> ModelError | None:
        files = found.manifest["files"]
        # The largest first, so that every rank has about as much to read.
        names = sorted(files, key=lambda name: (-files[name]["bytes"], name))[world.rank :: world.size]
        try:
            digests = _sha256s([folder / name for name in names])
        except OSError as error:  # rank 0 saw that they are there
            return _unreadable(folder, error)
        other = [name for name, digest in zip(names, digests, strict=True) if digest != files[name]["sha256"]]
        return ModelError(f"{folder / other[0]} is not what was written; take another checkpoint.") if other else None

    found = world.from_main(read)
    wrong = [error for error in world.gather(verify(found)) if error is not None]
    if wrong:  # that one cannot read says nothing of what the others found
        raise world.everywhere(max(wrong, key=lambda error: error.exit_code))
    return found


def _unreadable(folder: Path, error: OSError) -> ModelError:
    return ModelError(
        f"The checkpoint {folder} cannot be read by every process ({error}); "
        "give them all the folder and the right to read it, and run again.",
        75,
    )


def _folders(root: Path) -> list[Path]:
    """Checkpoints by step, the newest first."""
    folders = [f for f in root.glob(f"{PREFIX}*") if f.name.removeprefix(PREFIX).isdigit()]
    return sorted(folders, key=_step, reverse=True)


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix(PREFIX))


def _sha256s(paths: Sequence[Path]) -> list[str]:
    """Of each file, some at a time: one thread digests less than a disk gives."""
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(_sha256, paths))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
