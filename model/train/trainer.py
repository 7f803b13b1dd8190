"""The training of one model by one process: data at a pinned version in, checkpoints out.

Read ``_loop``: it is the training. Around it stand the pieces: the order of the data (model/loader), the loss, the
optimizer and its schedule, checkpoints, the journal and MLflow, a file each. A training killed at any moment goes on
from its last checkpoint when it is run again and ends with the same bytes: weights, moments, random state and the
position in the data are restored, and nothing else enters a step.

Leaves out: more than one process, torch.compile, activation checkpointing.
"""

from __future__ import annotations

import contextlib
import math
import signal
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from tokenizers import Tokenizer

from model.config import ModelConfig, load_preset
from model.device import pick_device
from model.errors import ModelError
from model.loader.loader import Batch, SequenceLoader
from model.loader.snapshot import Snapshot, open_sequences
from model.network.transformer import Transformer
from model.train.checkpoint import find_checkpoint, restore, save_checkpoint, write_json
from model.train.config import TrainConfig, TrainSummary
from model.train.journal import Journal, load_metrics, only_one, read_run, write_run
from model.train.loss import cross_entropy_sum
from model.train.optimizer import build_optimizer, learning_rate, set_learning_rate
from model.train.progress import TrainingProgress
from model.train.tracking import Tracking
from pipelines.tables import tokenizer_uri

CHECKPOINTS = "checkpoints"


def train(lake: str, config: TrainConfig, *, code_version: str | None = None) -> TrainSummary:
    """Train on a lake's path, or go on training, or find it done.

    code_version: the caller's version of the code, for the manifests of the checkpoints; a training that goes on keeps
    the one that it began with.
    Raises ModelError: 2 where the settings are wrong or differ from those that the output began with, 1 where the data
    cannot be read or the loss is not finite, 75 where running again goes on (SIGTERM, full disk, MLflow unreachable).
    """
    output = config.output_folder(lake)
    with only_one(output):
        record = read_run(output)
        if record is not None:
            _same(config.identity(), record["settings"], output)
            if record.get("logged"):
                return _summary(output, record)
        snapshot = _open(lake, config, record)
        model_config = _model_config(lake, config, snapshot)
        if record is None:
            record = {
                "training_id": uuid.uuid4().hex,
                "mlflow_run_id": None,
                "settings": config.identity(),
                "code_version": code_version,
                "model": model_config.model_dump(mode="json"),
                "data": snapshot.describe(),
                "final": None,
            }
            # Before the MLflow run is made: a kill in between leaves the id by which the run is found again.
            write_run(output, record)
        else:
            _same(model_config.model_dump(mode="json"), record["model"], output)
        journal = Journal(output)
        tracking = Tracking(lake, config, record["training_id"], record["mlflow_run_id"])
        if record["mlflow_run_id"] is None:
            tracking.describe(_parameters(config, model_config), record["data"])
            record["mlflow_run_id"] = tracking.run_id
            write_run(output, record)
        if record["final"] is None:
            try:
                summary = _run(config, model_config, snapshot, output, journal, tracking, record.get("code_version"))
            except Exception as error:
                tracking.end("KILLED" if getattr(error, "exit_code", None) == 75 else "FAILED")
                raise
            record |= {"final": Path(summary.checkpoint).name, "summary": asdict(summary)}
            write_run(output, record)
        trouble = tracking.send(journal, config.steps)
        if trouble:
            raise ModelError(f"The training is done, but {trouble}; mend it and run again, nothing is lost.", 75)
        tracking.end("FINISHED")
        record["logged"] = True
        write_run(output, record)
        return _summary(output, record)


def finished(output: Path) -> TrainSummary:
    """The summary of a training that is done. Errors: ModelError (2) where none is in this folder."""
    record = read_run(output)
    if record is None or not record.get("logged"):
        raise ModelError(f"{output} holds no finished training: run lakemoe train, or name another training.", 2)
    return _summary(output, record)


def _summary(output: Path, record: dict[str, Any]) -> TrainSummary:
    """Of a finished training, whose folder may have moved since."""
    folder = output / CHECKPOINTS / record["final"]
    if not folder.is_dir():
        raise ModelError(f"The finished training's checkpoint {folder} is gone; restore it or name another training.")
    return TrainSummary(**{**record["summary"], "checkpoint": str(folder)})


def _open(lake: str, config: TrainConfig, record: dict[str, Any] | None) -> Snapshot:
    """The training's data: what it began with, else what the settings name, else the latest version."""
    if record is None:
        return open_sequences(lake, config.sequences_version, "train", config.tokenizer_id, config.sequence_length)
    data = record["data"]
    snapshot = open_sequences(lake, data["version"], "train", data["tokenizer_id"], data["sequence_length"])
    if (snapshot.table_id, snapshot.content) != (data["table_id"], data["content"]):
        raise ModelError(
            f"{snapshot.uri} at version {snapshot.version} is not the table that this training began with; "
            "name another output to train on it."
        )
    return snapshot


def _model_config(lake: str, config: TrainConfig, snapshot: Snapshot) -> ModelConfig:
    """The preset with its overrides and the vocabulary of the tokenizer that the data was made with."""
    file = tokenizer_uri(lake.removeprefix("file://"), snapshot.tokenizer_id)
    try:
        vocabulary = Tokenizer.from_file(file).get_vocab_size(with_added_tokens=True)
    except Exception as error:  # tokenizers raises Exception itself
        raise ModelError(f"The tokenizer {file} cannot be read ({error}); restore it or tokenize again.") from error
    overrides = {"vocab_size": vocabulary, **config.overrides}
    model_config = load_preset(config.preset, **overrides)
    if model_config.vocab_size < vocabulary:
        raise ModelError(
            f"vocab_size {model_config.vocab_size} is less than the tokenizer's {vocabulary}; leave it out.", 2
        )
    if model_config.max_seq_len < snapshot.sequence_length:
        raise ModelError(
            f"The data's sequences have {snapshot.sequence_length} tokens, the model takes {model_config.max_seq_len}; "
            "override max_seq_len or pack shorter sequences.",
            2,
        )
    return model_config


def _same(now: dict[str, Any], then: dict[str, Any], output: Path) -> None:
    different = [f"{k} was {then.get(k)!r} and is now {v!r}" for k, v in now.items() if then.get(k) != v]
    if different:
        raise ModelError(
            f"{output} holds a training with other settings ({'; '.join(different)}); "
            "name another training or take those settings.",
            2,
        )


def _parameters(config: TrainConfig, model_config: ModelConfig) -> dict[str, Any]:
    settings = {k: v for k, v in config.identity().items() if k != "overrides"}
    shape = {f"model.{k}": v for k, v in model_config.model_dump(mode="json").items()}
    counts = {"parameters": model_config.parameters, "active_parameters": model_config.active_parameters}
    return {**settings, **shape, **counts}


@dataclass
class _Position:
    """Where a training is. seconds are wall-clock seconds in steps; nothing of it but step decides anything."""

    step: int = 0
    seconds: float = 0.0
    loss: float = math.nan


def _run(
    config: TrainConfig,
    model_config: ModelConfig,
    snapshot: Snapshot,
    output: Path,
    journal: Journal,
    tracking: Tracking,
    code_version: str | None,
) -> TrainSummary:
    """From the last checkpoint, or from nothing, to the last step."""
    device = pick_device(config.device, "train.device")
    torch.manual_seed(config.seed)
    # Made on the CPU whatever the device, so that a seed means the same weights everywhere.
    model = Transformer(model_config).to(device)
    optimizer = build_optimizer(model.parameters(), config)
    position = _Position()
    found, broken = find_checkpoint(output / CHECKPOINTS)
    with TrainingProgress(config.steps, found.step if found else 0, config.log_every) as progress:
        for reason in broken:
            progress.say(f"train: {reason}")
        loader = SequenceLoader(
            snapshot,
            config.global_batch_size,
            seed=config.seed,
            mixture=config.mixture,
            say=lambda what: progress.say(f"train: {what}"),
        )
        if found:
            restore(found, model, optimizer)
            loader.load_state_dict(found.state["loader"])
            position = _Position(found.step, found.state["seconds"], found.state["loss"])
            progress.say(f"train: going on from step {position.step}")
        journal.cut_to(position.step)

        def save() -> Path:
            journal.flush()
            return save_checkpoint(
                output / CHECKPOINTS,
                position.step,
                model,
                optimizer,
                model_config,
                state={"loader": loader.state_dict(), "seconds": position.seconds, "loss": position.loss},
                manifest={
                    "data": snapshot.describe(),
                    "settings": config.identity(),
                    "code_version": code_version,
                    "mlflow_run_id": tracking.run_id,
                    "tokens": position.step * config.global_batch_size * snapshot.sequence_length,
                },
                keep=config.keep_checkpoints,
            )

        folder = found.folder if found else output / CHECKPOINTS
        with _sigterm() as stop:
            batches = iter(loader)
            while position.step < config.steps:
                started = time.perf_counter()
                line = _step(config, model, optimizer, next(batches), position.step, output)
                position.step += 1
                took = time.perf_counter() - started
                position.seconds += took
                position.loss = line["loss"]
                speed = config.global_batch_size * snapshot.sequence_length / took
                journal.append(
                    {"step": position.step, "time": int(time.time() * 1000), **line, "tokens_per_second": speed}
                )
                progress.step(position.step, position.loss, speed)
                if position.step % config.checkpoint_every == 0 or position.step == config.steps or stop.is_set():
                    folder = save()
                    trouble = tracking.send(journal, position.step)
                    if trouble:
                        progress.say(f"train: {trouble}; the next checkpoint tries again")
                if stop.is_set() and position.step < config.steps:
                    raise ModelError(f"Stopped by SIGTERM, saved at step {position.step}; run again to go on.", 75)
    return TrainSummary(
        checkpoint=str(folder),
        step=position.step,
        mlflow_run_id=tracking.run_id,
        final_loss=position.loss,
        tokens=position.step * config.global_batch_size * snapshot.sequence_length,
        seconds=position.seconds,
    )


def _step(
    config: TrainConfig,
    model: Transformer,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    step: int,
    output: Path,
) -> dict[str, Any]:
    """One optimizer step: forward and backward by micro-batches, clip, update. The step's metrics.

    The loss is the mean over the targets of the whole batch, whatever the micro-batches; the auxiliary loss is each
    micro-batch's own, weighted by its share of the sequences.
    """
    device = model.device
    size = config.micro_batch_size or len(batch)
    targets = int(batch.loss_mask.sum())
    if targets == 0:
        raise ModelError("A batch has no target: every document has one token; pack longer documents.")
    loss = torch.zeros((), device=device)
    aux_loss = torch.zeros((), device=device)
    load_LE = torch.zeros(model.config.layers, model.config.experts, device=device)
    model.train()
    for start in range(0, len(batch), size):
        part = batch.slice(start, start + size)
        share = len(part) / len(batch)
        tokens_BS = part.tokens.to(device)
        target_mask = part.loss_mask[:, 1:].to(device)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
            hidden = model.hidden(
                tokens_BS, positions_BS=part.positions.to(device), segment_ids_BS=part.segment_ids.to(device)
            )
            part_loss = cross_entropy_sum(
                hidden.states[:, :-1][target_mask], model.head_weight, tokens_BS[:, 1:][target_mask], config.loss_chunk
            )
        total = part_loss / targets + model.config.balance_loss_weight * hidden.aux_loss * share
        total.backward()
        loss += part_loss.detach() / targets
        aux_loss += hidden.aux_loss.detach() * share
        load_LE += hidden.router_load * share
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.gradient_clip)
    figures = {"loss": loss.item(), "aux_loss": aux_loss.item(), "gradient_norm": float(norm)}
    if not all(math.isfinite(v) for v in figures.values()):
        write_json(output / "bad_batch.json", {"step": step + 1, "sequence_ids": batch.sequence_ids, **_words(figures)})
        raise ModelError(
            f"The loss is not finite at step {step + 1}; {output / 'bad_batch.json'} names the batch's sequences. "
            "Lower the learning rate or look at their documents."
        )
    rate = learning_rate(config, step)
    set_learning_rate(optimizer, rate)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return {**figures, "learning_rate": rate, **load_metrics(load_LE)}


def _words(figures: dict[str, float]) -> dict[str, str]:
    """NaN is no JSON."""
    return {k: str(v) for k, v in figures.items()}


@contextlib.contextmanager
def _sigterm() -> Iterator[threading.Event]:
    """An event that SIGTERM sets, so that a step is finished and saved before the process ends."""
    stop = threading.Event()

    def ask(number: int, frame: FrameType | None) -> None:
        stop.set()

    if threading.current_thread() is not threading.main_thread():  # only the main thread may handle signals
        yield stop
        return
    before = signal.signal(signal.SIGTERM, ask)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, before)
