"""Held-out figures against a plain computation, the baselines against hand-made counts, what the lake keeps."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from model.config import ModelConfig
from model.errors import ModelError
from model.evaluate import held_out
from model.evaluate.held_out import EvaluateConfig, evaluate, evaluate_folder, token_bytes
from model.evaluate.ngrams import PRIOR_STRENGTHS, baselines, targets
from model.evaluate.versions import held_out_loss
from model.loader.loader import in_order
from model.loader.snapshot import open_sequences
from model.network.generate import load_tokenizer
from model.network.transformer import Transformer
from model.registry.register import register
from model.train.config import TrainConfig
from model.train.trainer import train
from pipelines.tables import SPECIAL_TOKENS, tokenizer_uri

WriteSequences = Callable[..., str]
TINY = {"layers": 1, "width": 16, "heads": 2, "kv_heads": 1, "head_width": 8, "experts": 4, "expert_width": 16}
TINY |= {"experts_chosen": 2}


def tiny(vocab_size: int) -> Transformer:
    torch.manual_seed(0)
    return Transformer(ModelConfig(**TINY, vocab_size=vocab_size, max_seq_len=32)).eval()


def test_the_loss_is_the_mean_over_every_target(write_sequences: WriteSequences) -> None:
    lake = write_sequences(validation=7)
    split, training = open_sequences(lake, split="validation"), open_sequences(lake)
    tokenizer = load_tokenizer(tokenizer_uri(lake, split.tokenizer_id))
    model = tiny(tokenizer.get_vocab_size())
    found = evaluate(model, tokenizer, split, training, EvaluateConfig(batch_size=3))
    losses: dict[str, list[float]] = {"text": [], "code": []}
    for batch in in_order(split, 1):
        with torch.inference_mode():
            logits = model(batch.tokens, positions_BS=batch.positions, segment_ids_BS=batch.segment_ids).logits
        nats = F.cross_entropy(logits[0, :-1], batch.tokens[0, 1:], reduction="none")
        losses[batch.domains[0]] += nats[batch.loss_mask[0, 1:]].tolist()
    both = losses["text"] + losses["code"]
    assert found.total.targets == len(both)
    assert found.total.loss == pytest.approx(np.mean(both), rel=1e-5)
    for name, score in found.domains.items():
        assert score.loss == pytest.approx(np.mean(losses[name]), rel=1e-5)
        assert score.bits_per_byte == pytest.approx(score.loss * score.targets / math.log(2) / score.bytes)
    # A byte-level tokenizer without merges: a token is a byte, and end tokens are none.
    assert 0.8 * found.total.targets < found.total.bytes <= found.total.targets
    # An untrained model beats nothing.
    assert not found.total.beats_baselines
    again = evaluate(model, tokenizer, split, training, EvaluateConfig(batch_size=2))
    assert again.total.loss == pytest.approx(found.total.loss, rel=1e-6)


def test_baselines_are_the_formulas(write_sequences: WriteSequences) -> None:
    lake = write_sequences()
    split, training = open_sequences(lake, split="validation"), open_sequences(lake)
    pairs = [targets(batch) for batch in in_order(split, 2)]
    before, target = (np.concatenate(part) for part in zip(*pairs, strict=True))
    words: Counter[int] = Counter()
    contexts: Counter[int] = Counter()
    both: Counter[tuple[int, int]] = Counter()
    for batch in in_order(training, 5):
        for v, w in zip(*targets(batch), strict=True):
            words[int(w)] += 1
            contexts[int(v)] += 1
            both[int(v), int(w)] += 1
    size = 300
    found = baselines(in_order(training, 4), before, target, size)
    unigram = [-math.log((words[int(w)] + 1) / (words.total() + size)) for w in target]
    assert found.unigram_N == pytest.approx(unigram)
    sums = []
    for a in PRIOR_STRENGTHS:
        p = [(words[int(w)] + 1) / (words.total() + size) for w in target]
        nats = [
            -math.log((both[int(v), int(w)] + a * q) / (contexts[int(v)] + a))
            for v, w, q in zip(before, target, p, strict=True)
        ]
        sums.append(sum(nats))
    assert found.bigram_N.sum() == pytest.approx(min(sums))


def test_bytes_of_tokens_add_up_to_the_text(write_sequences: WriteSequences) -> None:
    lake = write_sequences()
    tokenizer = load_tokenizer(tokenizer_uri(lake, open_sequences(lake).tokenizer_id))
    sizes = token_bytes(tokenizer, tokenizer.get_vocab_size())
    for text in ("plain", "naïve ☕\n\t", ""):
        assert sizes[tokenizer.encode(text).ids].sum() == len(text.encode())
    assert all(sizes[tokenizer.token_to_id(token)] == 0 for token in SPECIAL_TOKENS)


def test_what_was_measured_once_is_kept_and_versions_are_compared(
    write_sequences: WriteSequences, monkeypatch: pytest.MonkeyPatch
) -> None:
    lake = write_sequences()
    folders = []
    for seed in (0, 1):
        config = TrainConfig(name=f"t{seed}", steps=2, global_batch_size=4, warmup_steps=1, seed=seed, overrides=TINY)
        folders.append(Path(train(lake, config).checkpoint))
    config = EvaluateConfig()
    first = evaluate_folder(folders[0], lake, config)
    assert first.metrics["held_out_loss"] == first.total.loss

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("measured again")

    with monkeypatch.context() as patch:
        patch.setattr(held_out, "evaluate", refuse)
        assert evaluate_folder(folders[0], lake, config) == first
        with pytest.raises(AssertionError, match="measured again"):
            evaluate_folder(folders[1], lake, config)
    versions = [register(folder, lake=lake, name="m", metrics=first.metrics).version for folder in folders]
    loss = held_out_loss("m", "challenger", lake=lake, config=config)
    assert loss(versions[0]) == first.total.loss
    assert loss(versions[1]) == evaluate_folder(folders[1], lake, config).total.loss
    manifest = folders[0] / "manifest.json"
    manifest.write_text(json.dumps({"files": {}}))
    with pytest.raises(ModelError, match="does not say its data"):
        evaluate_folder(folders[0], lake, config)
