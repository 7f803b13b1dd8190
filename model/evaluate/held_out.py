"""Held-out loss and bits a byte, in all and by domain, beside the n-gram baselines of the same tokens.

What was measured once is kept in the lake (``evaluations/``), under a name made of all that it depends on: the weights,
both splits and the baselines' bound. Leaves out confidence intervals and evaluation suites.

Legend: N held-out targets, B sequences, S tokens a sequence.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from tokenizers import Tokenizer

from model.errors import ModelError
from model.evaluate.ngrams import baselines, targets
from model.lake import keep, read_kept, tokenizer_file
from model.loader.loader import in_order
from model.loader.snapshot import Snapshot, open_sequences
from model.network.generate import load_tokenizer
from model.network.transformer import Transformer
from model.registry.load import MANIFEST, open_weights
from model.train.loss import token_losses
from model.weights import weights_sha256
from pipelines.tables import SPECIAL_TOKENS

FORMAT = 1  # of the files in evaluations/


class EvaluateConfig(BaseModel):
    """Settings ``evaluate.*``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    batch_size: int = Field(default=16, ge=1, description="sequences a forward pass")
    baseline_sequences: int = Field(
        default=20_000, ge=1, description="training sequences that the n-gram baselines are fitted on, at most"
    )


@dataclass(frozen=True, kw_only=True)
class Score:
    """Over some targets: nats a token of the model and of the baselines, and the model's bits a byte."""

    targets: int
    bytes: int
    loss: float
    bits_per_byte: float
    unigram: float
    bigram: float

    @property
    def beats_baselines(self) -> bool:
        """Whether the model's loss is below both baselines'."""
        return self.loss < min(self.unigram, self.bigram)


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Of one model on one split. data: what identifies the split (Snapshot.describe)."""

    weights_sha256: str
    data: dict[str, Any]
    total: Score
    domains: dict[str, Score]

    @property
    def metrics(self) -> dict[str, float]:
        """Flat, for MLflow: held_out_loss, held_out_bits_per_byte, each also with /DOMAIN, and the baselines'."""
        out = {
            "held_out_loss": self.total.loss,
            "held_out_bits_per_byte": self.total.bits_per_byte,
            "held_out_unigram_loss": self.total.unigram,
            "held_out_bigram_loss": self.total.bigram,
        }
        for name, score in self.domains.items():
            out |= {f"held_out_loss/{name}": score.loss, f"held_out_bits_per_byte/{name}": score.bits_per_byte}
        return out


def evaluate_folder(
    folder: Path,
    lake: str,
    config: EvaluateConfig,
    *,
    device: str = "cpu",
    data: Mapping[str, Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Evaluate a checkpoint's or a registered model's folder on the validation split of the data it was trained on.

    data: a snapshot's description (Snapshot.describe) to evaluate on in place of the model's own. progress is told
    sequences done and in all. Errors: ModelError where the model or its data is not there.
    """
    manifest = read_manifest(folder)
    data, weights = data or manifest["data"], weights_sha256(manifest)
    edition = (data["tokenizer_id"], data["sequence_length"])
    held_out = open_sequences(lake, data["version"], "validation", *edition)
    # The description is the training split's, so its content is known before it is opened.
    named = {"format": FORMAT, "weights": weights, "held_out": held_out.content, "train": data["content"]}
    named["baseline_sequences"] = str(config.baseline_sequences)
    key = hashlib.sha256(json.dumps(named, sort_keys=True).encode()).hexdigest()
    known = read_kept(lake, f"evaluations/{key}.json")
    if known is not None:
        return _parsed(known)
    train = open_sequences(lake, data["version"], "train", *edition)
    model, _ = open_weights(folder, device)
    tokenizer = load_tokenizer(str(tokenizer_file(lake, data["tokenizer_id"])))
    evaluation = evaluate(model, tokenizer, held_out, train, config, weights_sha256=weights, progress=progress)
    try:
        keep(lake, f"evaluations/{key}.json", asdict(evaluation))
    except ModelError as error:  # the figures are what was asked for
        logging.getLogger(__name__).warning("evaluate: %s", error)
    return evaluation


def evaluate(
    model: Transformer,
    tokenizer: Tokenizer,
    held_out: Snapshot,
    train: Snapshot,
    config: EvaluateConfig,
    *,
    weights_sha256: str = "",
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Every target of ``held_out`` once, in canonical order; the same weights and data give the same figures."""
    losses, befores, words, domains = [], [], [], []
    model.eval()
    if model.device.type == "cuda":
        model.compute_in(torch.bfloat16)
    for done, batch in enumerate(in_order(held_out, config.batch_size)):
        mask = batch.loss_mask[:, 1:]
        with torch.inference_mode():
            hidden = model.hidden(
                batch.tokens.to(model.device),
                positions_BS=batch.positions.to(model.device),
                segment_ids_BS=batch.segment_ids.to(model.device),
            )
            states_ND = hidden.states[:, :-1][mask.to(model.device)]
            nats_N = token_losses(states_ND, model.head_weight, batch.tokens[:, 1:][mask].to(model.device))
        losses.append(nats_N.double().cpu().numpy())
        before, word = targets(batch)
        befores.append(before)
        words.append(word)
        domains.append(np.repeat([held_out.domains.index(d) for d in batch.domains], mask.sum(dim=1).numpy()))
        if progress is not None:
            progress(min((done + 1) * config.batch_size, held_out.num_sequences), held_out.num_sequences)
    loss_N, before_N, target_N = np.concatenate(losses), np.concatenate(befores), np.concatenate(words)
    domain_N = np.concatenate(domains)
    if not len(loss_N):
        raise ModelError("The validation split has no target: raise tokenize.validation_fraction and pack again.")
    batches = islice(in_order(train, config.batch_size), math.ceil(config.baseline_sequences / config.batch_size))
    known = baselines(batches, before_N, target_N, model.config.vocab_size)
    bytes_N = token_bytes(tokenizer, model.config.vocab_size)[target_N]

    def score(of_N: Any) -> Score:
        nats, count = float(loss_N[of_N].sum()), int(np.count_nonzero(of_N))
        size = int(bytes_N[of_N].sum())
        return Score(
            targets=count,
            bytes=size,
            loss=nats / count,
            bits_per_byte=nats / math.log(2) / max(1, size),
            unigram=float(known.unigram_N[of_N].mean()),
            bigram=float(known.bigram_N[of_N].mean()),
        )

    return Evaluation(
        weights_sha256=weights_sha256,
        data=held_out.describe(),
        total=score(np.ones(len(loss_N), bool)),
        domains={name: score(domain_N == i) for i, name in enumerate(held_out.domains) if (domain_N == i).any()},
    )


def token_bytes(tokenizer: Tokenizer, vocab_size: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Bytes of text that each token of a byte-level tokenizer stands for, [V]; control tokens none.

    Byte-level alphabets write every byte as one character (Radford et al. 2019, section 2.2).
    """
    out = np.zeros(vocab_size, np.int64)
    for token, number in tokenizer.get_vocab(with_added_tokens=True).items():
        out[number] = 0 if token in SPECIAL_TOKENS else len(token)
    return out


def _parsed(record: dict[str, Any]) -> Evaluation:
    domains = {name: Score(**score) for name, score in record["domains"].items()}
    return Evaluation(**{**record, "total": Score(**record["total"]), "domains": domains})


def read_manifest(folder: Path) -> dict[str, Any]:
    """manifest.json of a checkpoint's or registered model's folder. Errors: ModelError where it is not there."""
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder / MANIFEST} cannot be read ({error}); name another checkpoint or model.") from error
    if "data" not in manifest:
        raise ModelError(f"{folder / MANIFEST} does not say its data; train the model again with this version.")
    return manifest
