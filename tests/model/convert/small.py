"""The presets at sizes that a test can hold: their variants as they are, with every threshold low enough to act."""

from __future__ import annotations

from typing import Any

import torch

from model.config import ModelConfig, load_preset
from model.network.transformer import Transformer

SIZES: dict[str, Any] = {
    "vocab_size": 272,
    "max_seq_len": 64,
    "layers": 2,
    "width": 32,
    "heads": 4,
    "kv_heads": 2,
    "head_width": 8,
    "experts": 6,
    "experts_chosen": 3,
    "expert_width": 24,
    "init_std": 0.2,
}
# What a preset's own numbers would leave without effect at this size.
ACTIVE: dict[str, dict[str, Any]] = {
    "dbrx": {"qkv_clip": 0.5},
    "quickstart": {"qkv_clip": 0.5},
    "grok-1": {"attention_soft_cap": 0.5, "embedding_multiplier": 5.5},
}
LAYOUT = {"dbrx": "dbrx", "quickstart": "dbrx", "mixtral-8x7b": "mixtral", "olmoe": "olmoe"}


def small(preset: str, **fields: Any) -> ModelConfig:
    """The preset at SIZES. OLMoE has as many key heads as query heads, so it keeps that."""
    own = load_preset(preset)
    kept = {"kv_heads": SIZES["heads"]} if own.kv_heads == own.heads else {}
    return load_preset(preset, **{**SIZES, **kept, **ACTIVE.get(preset, {}), **fields})


def network(config: ModelConfig, seed: int = 0) -> Transformer:
    """With random weights, those of the norms too, so that leaving one out or taking another's is seen."""
    torch.manual_seed(seed)
    made = Transformer(config).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() == 1:
                parameter.normal_(1.0, 0.3)
    return made
