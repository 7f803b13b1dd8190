"""The training loop, from a pinned Delta version to a checkpoint.

One loop that a person can follow. What it is made of lies beside it, a file each: what is trained (plan), how it is
spread over processes (world, parallel), a step (step, loss, optimizer), checkpoints, journal and MLflow (tracking). A
training killed at any moment goes on from its last checkpoint when it is run again, on any number of processes. On one
it ends with the same bytes: weights, moments, random state and the position in the data are restored, and nothing else
enters a step.
"""

from __future__ import annotations

import contextlib
import logging
import math
import signal
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from model.config import ModelConfig
from model.errors import ModelError
from model.files import write_json
from model.loader.loader import Batch, SequenceLoader
from model.loader.snapshot import Snapshot
from model.network.transformer import Transformer
from model.train.checkpoint import CheckpointWriter, find_checkpoint
from model.train.config import TrainConfig, TrainSummary
from model.train.journal import Journal, only_one, write_run
from model.train.metrics import Speed, not_finite, read
from model.train.optimizer import build_optimizer, learning_rate, set_learning_rate
from model.train.parallel import build, check
from model.train.plan import CHECKPOINTS, forget, open_data, parameters, plan, summary
from model.train.progress import TrainingProgress
from model.train.room import within_memory
from model.train.step import compute_gradients, to_device, update
from model.train.system import SystemMetrics
from model.train.tracking import Tracking
from model.train.validation import open_validation
from model.train.world import World, join_world

SPIKE_WINDOW = 100  # losses whose mean a spike is measured by
MOST_REFUSED = 20  # bad batches one after the other that are skipped; then it is not the batches


def train(lake: str, config: TrainConfig, *, code_version: str | None = None) -> TrainSummary:
    """Train on a lake's path, or go on training, or find it done. Every process of the training calls it alike.

    code_version: the caller's version of the code, for the manifests of the checkpoints; a training that goes on keeps
    the one that it began with.
    Raises ModelError: 2 where the settings are wrong or differ from those that the output began with, 1 where the data
    cannot be read or the loss is not finite, 75 where running again goes on (SIGTERM, full disk, MLflow unreachable).
    """
    output = config.output_folder(lake)
    snapshot: Snapshot | None = None
    with join_world(config.device) as world, contextlib.ExitStack() as held:

        def begin() -> dict[str, Any]:
            nonlocal snapshot
            held.enter_context(only_one(output))
            record, snapshot = plan(lake, config, code_version)
            return record

        record = world.from_main(begin)
        if record.get("logged"):
            return summary(output, record)
        tracking: Tracking | None = None
        if record["final"] is None:
            try:
                model = ModelConfig(**record["model"])
                world.from_main(lambda: check(config, model.experts, world.size))
                with within_memory(config, model, world):
                    tracking = _begin(lake, config, record, output, world)
                    result = _run(config, record, snapshot or open_data(lake, config, record), output, world, tracking)
            except BaseException as error:
                code = 75 if isinstance(error, KeyboardInterrupt) else getattr(error, "exit_code", None)
                if tracking:
                    tracking.end("KILLED" if code == 75 else "FAILED")
                if code == 2 and world.main:
                    forget(output)  # the settings are wrong: their name is free for better ones
                raise
            record |= {"final": Path(result.checkpoint).name, "summary": asdict(result)}
        else:
            tracking = _begin(lake, config, record, output, world)
        world.from_main(lambda: _finish(config, record, output, tracking) if tracking else None)
        return summary(output, record)


def _begin(lake: str, config: TrainConfig, record: dict[str, Any], output: Path, world: World) -> Tracking | None:
    """The MLflow run, on rank 0; its id in every rank's record."""
    made: list[Tracking] = []

    def begin() -> str:
        tracking = Tracking(lake, config, record["training_id"], record["mlflow_run_id"])
        made.append(tracking)
        if record["mlflow_run_id"] is None:
            tracking.describe(parameters(record), record["data"])
            write_run(output, {**record, "mlflow_run_id": tracking.run_id})
        return tracking.run_id

    record["mlflow_run_id"] = world.from_main(begin)
    return made[0] if made else None


def _finish(config: TrainConfig, record: dict[str, Any], output: Path, tracking: Tracking) -> None:
    """All that MLflow lacks, then the mark that the training is done."""
    write_run(output, record)
    trouble = tracking.send(Journal(output), config.steps)
    if trouble:
        raise ModelError(f"The training is done, but {trouble}; mend it and run again, nothing is lost.", 75)
    undrawn = tracking.draw(Journal(output), config.steps)
    if undrawn:
        logging.getLogger(__name__).warning("train: %s", undrawn)
    tracking.end("FINISHED")
    record["logged"] = True
    write_run(output, record)


@dataclass
class _Position:
    """Where a training is. seconds are wall-clock seconds in steps; nothing of them decides anything."""

    step: int = 0
    updates: int = 0
    refused: int = 0
    seconds: float = 0.0
    loss: float = math.nan
    recent: deque[float] = field(default_factory=lambda: deque(maxlen=SPIKE_WINDOW))

    def state(self) -> dict[str, Any]:
        return {**vars(self), "recent": list(self.recent)}

    @classmethod
    def of(cls, state: dict[str, Any]) -> _Position:
        return cls(**{**state, "recent": deque(state["recent"], maxlen=SPIKE_WINDOW)})


def _run(
    config: TrainConfig,
    record: dict[str, Any],
    snapshot: Snapshot,
    output: Path,
    world: World,
    tracking: Tracking | None,
) -> TrainSummary:
    """From the last checkpoint, or from nothing, to the last step."""
    with torch.device("meta"):
        model = Transformer(ModelConfig(**record["model"]))
    model = build(config, model, world)
    optimizer = build_optimizer(model.parameters(), config)
    position, journal = _Position(), Journal(output)
    found, broken = find_checkpoint(output / CHECKPOINTS, world)
    show = TrainingProgress(config.steps, found.step if found else 0, config.log_every, quiet=not world.main)
    with show as progress, _signals(world) as stop, contextlib.ExitStack() as background:

        def say(what: str) -> None:
            progress.say(f"train: {what}")

        for reason in broken:
            say(reason)
        loader = SequenceLoader(
            snapshot,
            config.global_batch_size,
            rank=world.rank,
            world_size=world.size,
            seed=config.seed,
            mixture=config.mixture,
            say=say,
        )
        if found:
            found.restore(model, optimizer, world)
            loader.load_state_dict(found.state["loader"])
            position = _Position.of(found.state["position"])
            optimizer.steps = position.updates
            say(f"going on from step {position.step}")
        world.from_main(lambda: journal.cut_to(position.step))
        follow = background.enter_context(tracking.follow(journal, progress.say)) if tracking else None
        writer = CheckpointWriter(output / CHECKPOINTS, world, config.keep_checkpoints, saved=follow)
        background.callback(writer.settle)
        tokens_a_step = config.global_batch_size * snapshot.sequence_length
        validation = open_validation(snapshot, config, world, say) if config.validate_every else None
        speed, system = Speed(model.config, snapshot.sequence_length, world), SystemMetrics(world.main, say)
        batches, saving = iter(loader), 0.0
        background.callback(batches.close)
        while position.step < config.steps:
            started = time.perf_counter()
            batch = to_device(next(batches), world.device)
            figures = compute_gradients(model, optimizer, batch, config, world)
            line, stopping = read(figures, batch, snapshot.domains, stop.is_set(), world)
            rate = learning_rate(config, position.step)
            trouble = _trouble(config, line, position)
            if trouble:
                position.refused += 1
                stop_now = config.bad_batch == "stop" or position.refused > MOST_REFUSED
                _refuse(trouble, stop_now, line, batch, position.step + 1, output, world, progress)
                optimizer.zero_grad()
            else:
                position.refused = 0
                set_learning_rate(optimizer, rate)
                update(model, optimizer, figures, config)
                position.updates += 1
                position.recent.append(line["loss"])
                position.loss = line["loss"]
            position.step += 1
            took = time.perf_counter() - started
            position.seconds += took
            line |= {"learning_rate": rate, "skipped": int(bool(trouble)), **speed.line(tokens_a_step, took)}
            if saving:
                line["checkpoint_seconds"], saving = saving, 0.0
            if validation and config.validates(position.step) and (not stopping or position.step == config.steps):
                line |= validation.losses(model, stop)
            if world.main:
                journal.append({"step": position.step, "time": int(time.time() * 1000), **line, **system.line()})
            progress.step(position.step, line)
            if position.step % config.checkpoint_every == 0 or position.step == config.steps or stopping:
                if world.main:
                    journal.flush()
                started = time.perf_counter()
                writer.save(
                    position.step,
                    model,
                    optimizer,
                    state={"loader": loader.state_dict(), "position": position.state()},
                    manifest={
                        "data": record["data"],
                        "settings": config.identity(),
                        "code_version": record.get("code_version"),
                        "mlflow_run_id": record["mlflow_run_id"],
                        "tokens": position.step * tokens_a_step,
                    },
                )
                saving = time.perf_counter() - started  # told with the next step: this one's line is in the checkpoint
            if stopping and position.step < config.steps:
                writer.wait()
                raise world.everywhere(
                    ModelError(f"Stopped by a signal, saved at step {position.step}; run again to go on.", 75)
                )
        folder = writer.wait() or (found.folder if found else output / CHECKPOINTS)
    return TrainSummary(
        name=config.name,
        checkpoint=str(folder),
        step=position.step,
        mlflow_run_id=record["mlflow_run_id"],
        final_loss=position.loss,
        tokens=position.step * tokens_a_step,
        seconds=position.seconds,
    )


def _trouble(config: TrainConfig, line: dict[str, Any], position: _Position) -> str:
    """What is wrong with a batch whose update would do harm, or nothing. The same on every rank."""
    if not_finite(line):
        return "The loss is not finite"
    mean = sum(position.recent) / max(1, len(position.recent))
    full = len(position.recent) == SPIKE_WINDOW
    if config.spike is not None and full and line["loss"] > config.spike * mean:
        return f"The loss {line['loss']:.3f} is above {config.spike} times the last {SPIKE_WINDOW} steps' {mean:.3f}"
    return ""


def _refuse(
    trouble: str,
    stop: bool,
    line: dict[str, Any],
    batch: Batch,
    step: int,
    output: Path,
    world: World,
    progress: TrainingProgress,
) -> None:
    """Write a bad batch's sequences down; stop, or say that the training goes on without its update."""
    ids = [i for part in world.gather(batch.sequence_ids) for i in part]
    file = output / ("bad_batch.json" if stop else f"bad_batch-{step:06d}.json")
    figures = {name: str(line[name]) for name in ("loss", "gradient_norm")}  # NaN is no JSON
    if world.main:
        write_json(file, {"step": step, "sequence_ids": ids, **figures})
    if stop:
        raise world.everywhere(
            ModelError(
                f"{trouble} at step {step}; {file} names the batch's sequences. "
                "Look at their documents, run again with train.bad_batch skip, or train anew at a lower learning rate."
            )
        )
    progress.say(f"train: {trouble} at step {step}: skipped, {file.name} names the batch's sequences")


@contextlib.contextmanager
def _signals(world: World) -> Iterator[threading.Event]:
    """An event that SIGTERM and SIGINT set, so that a step is finished and saved before the process ends.

    A second SIGINT ends one process at once. Of several each may get two, from the terminal and from their launcher.
    """
    stop = threading.Event()

    def ask(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and stop.is_set() and world.size == 1:
            raise KeyboardInterrupt
        stop.set()

    if threading.current_thread() is not threading.main_thread():  # only the main thread may handle signals
        yield stop
        return
    before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
