"""What a model is: one frozen configuration for every variant, its presets and its parameter counts.

The variants of the decoder are data here and nowhere else: the network reads these fields and knows no model by name.
How a model is trained is not here (model/train).
"""

from __future__ import annotations

from math import comb
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from model.errors import ModelError

# Beside this room in a checkout and in a wheel. importlib.resources cannot list a namespace package of an editable
# install: its search path then has an entry that is no directory.
PRESETS = Path(__file__).resolve().parents[1] / "conf" / "models"


class ModelConfig(BaseModel):
    """The shape and the variants of one decoder-only mixture-of-experts transformer."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(default="custom", description="what the architecture is called")
    vocab_size: int = Field(default=32000, ge=2, description="rows of the embedding (tokens)")
    max_seq_len: int = Field(default=2048, ge=1, description="longest sequence that the model is made for (tokens)")
    layers: int = Field(default=4, ge=1, description="blocks")
    width: int = Field(default=256, ge=1, description="width of the residual stream (features)")
    heads: int = Field(default=8, ge=1, description="query heads")
    kv_heads: int = Field(default=2, ge=1, description="key and value heads; each serves heads / kv_heads query heads")
    head_width: int = Field(default=32, ge=2, description="width of one head (features)")
    experts: int = Field(default=16, ge=1, description="experts a block")
    experts_chosen: int = Field(default=4, ge=1, description="experts that each token is sent to")
    expert_width: int = Field(default=128, ge=1, description="hidden width of one expert (features)")
    activation: Literal["silu", "gelu", "gelu_tanh"] = Field(
        default="silu", description="the gate's activation in an expert"
    )
    norm: Literal["layer_norm", "rms_norm"] = Field(
        default="layer_norm", description="LayerNorm without bias, or RMSNorm"
    )
    norm_eps: float = Field(default=1e-5, gt=0, description="added to the variance")
    post_norm: bool = Field(default=False, description="also normalise what attention and experts add to the residual")
    qk_norm: bool = Field(default=False, description="RMSNorm over the whole query and the whole key projection")
    qkv_clip: float | None = Field(
        default=None, gt=0, description="clamp queries, keys and values to plus and minus this"
    )
    attention_soft_cap: float | None = Field(
        default=None, gt=0, description="cap * tanh(score / cap) before the softmax"
    )
    rope_base: float = Field(default=1e4, gt=0, description="base of the rotary embedding's wave lengths")
    router_score: Literal["softmax", "sigmoid"] = Field(
        default="softmax", description="scores of the experts: softmax over all of them, or each one's sigmoid"
    )
    router_normalize: Literal["l1", "none"] = Field(
        default="l1", description="weights of the chosen: their scores, made to sum to one (l1) or as they are"
    )
    balance_loss_weight: float = Field(default=0.0, ge=0, description="weight of the auxiliary loss (1 when balanced)")
    router_z_loss_weight: float = Field(
        default=0.0,
        ge=0,
        description="weight of the router's z-loss, the mean squared log of its softmax's denominator",
    )
    router_bias_rate: float | None = Field(
        default=None,
        ge=0,
        description="balancing without loss: what each expert's bias moves by a step (DeepSeek-V3: 0.001); 0 keeps the "
        "biases as they are, none is a router without them",
    )
    router_jitter: float = Field(
        default=0.0, ge=0, lt=1, description="the router's input is multiplied in training by 1 - this to 1 + this"
    )
    tied_head: bool = Field(default=False, description="the head is the embedding")
    embedding_multiplier: float = Field(default=1.0, gt=0, description="factor on the embeddings")
    logit_multiplier: float = Field(default=1.0, gt=0, description="factor on the logits")
    init_std: float = Field(
        default=0.02, gt=0, description="standard deviation of the initial weights; residual ones smaller"
    )

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.heads % self.kv_heads:
            raise ValueError(f"heads ({self.heads}) must be a multiple of kv_heads ({self.kv_heads})")
        if self.head_width % 2:
            raise ValueError(f"head_width ({self.head_width}) must be even: rotary embedding turns pairs of features")
        if self.experts_chosen > self.experts:
            raise ValueError(f"experts_chosen ({self.experts_chosen}) must be at most experts ({self.experts})")
        self._balances()
        return self

    def _balances(self) -> None:
        """Refuse what would train and do nothing, or not what it says."""
        if self.router_z_loss_weight and self.router_score == "sigmoid":
            raise ValueError(
                "router_z_loss_weight bounds the denominator of softmax scores, and sigmoid scores have none: "
                "leave it out, or take router_score softmax"
            )
        if self.experts_chosen == self.experts:
            if self.router_bias_rate is not None:
                raise ValueError("router_bias_rate moves the choice of experts, but all are chosen: leave it out")
        elif self.experts_chosen == 1 and self.router_normalize == "l1":
            raise ValueError(
                "experts_chosen 1 with router_normalize l1 gives every chosen expert the weight 1, from which a router "
                "learns nothing: take router_normalize none"
            )

    @property
    def query_width(self) -> int:
        """Width of all query heads together (features)."""
        return self.heads * self.head_width

    @property
    def kv_width(self) -> int:
        """Width of all key heads together, and of all value heads (features)."""
        return self.kv_heads * self.head_width

    @property
    def expert_parameters(self) -> int:
        """Parameters of one expert: gate, up and down projection."""
        return 3 * self.expert_width * self.width

    @property
    def parameters(self) -> int:
        """All parameters, a tied head counted once."""
        attention = self.width * (self.query_width + 2 * self.kv_width) + self.query_width * self.width
        norms = (4 if self.post_norm else 2) * self.width
        norms += self.query_width + self.kv_width if self.qk_norm else 0
        block = attention + norms + self.width * self.experts + self.experts * self.expert_parameters
        return self.layers * block + (1 if self.tied_head else 2) * self.vocab_size * self.width + self.width

    @property
    def active_parameters(self) -> int:
        """Parameters that take part in one token: all but those of the experts not chosen."""
        return self.parameters - self.layers * (self.experts - self.experts_chosen) * self.expert_parameters

    @property
    def expert_combinations(self) -> int:
        """In how many ways a block's experts can be chosen."""
        return comb(self.experts, self.experts_chosen)


def preset_names() -> list[str]:
    """The presets in conf/models, in alphabetical order."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def load_preset(name: str, **overrides: Any) -> ModelConfig:
    """The preset conf/models/NAME.yaml, with single fields replaced by ``overrides``.

    Errors: ModelError (2) where there is no such preset, or a key is unknown or ill-typed.
    """
    if name not in preset_names():
        raise ModelError(f"There is no model preset {name!r}; take one of {', '.join(preset_names())}.", 2)
    text = (PRESETS / f"{name}.yaml").read_text(encoding="utf-8")
    return parse_config(text, source=f"conf/models/{name}.yaml", **overrides)


def parse_config(text: str, *, source: str, **overrides: Any) -> ModelConfig:
    """A configuration from YAML text; ``source`` names it in errors. Errors: ModelError (2)."""
    try:
        fields = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ModelError(f"{source} is not valid YAML ({error}); correct it.", 2) from error
    if not isinstance(fields, dict):
        raise ModelError(f"{source} must be a mapping of the model's fields; correct it.", 2)
    try:
        return ModelConfig(**{**fields, **overrides})
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or "the model"
        said = first["msg"].removeprefix("Value error, ")
        if overrides:  # the file is right by itself
            source = f"{source} with overrides of {', '.join(sorted(overrides))}"
        raise ModelError(f"{source}: {key}: {said}; correct it.", 2) from error


def dump_config(config: ModelConfig) -> str:
    """YAML text that parse_config reads back to an equal configuration."""
    return yaml.safe_dump(config.model_dump(), sort_keys=False)
