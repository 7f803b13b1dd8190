"""What the published layouts are, as data: names of tensors, keys of config.json, and what a layout cannot say.

A layout is how Hugging Face's hub stores an architecture; transformers (4 and 5) and vLLM read it. Adding one is adding
a row to LAYOUTS. Leaves out quantised and fused variants of the same architectures.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from model.config import ModelConfig
from model.errors import ModelError

# They say how a model is trained or called: another value gives the same logits, so no layout need hold them.
TRAINING_ONLY = frozenset({"name", "init_std", "balance_loss_weight", "router_z_loss_weight", "router_jitter"})
REQUIRED = object()


@dataclass(frozen=True)
class Key:
    """Where config.json says a field: every path (parts split by dots) is written, the first that is there is read.

    absent: the architecture's value where config.json does not say; REQUIRED where it must. values: ours to theirs.
    none: the number that stands for None, where the architecture's code needs one.
    """

    paths: tuple[str, ...]
    absent: Any = REQUIRED
    values: Mapping[Any, Any] | None = None
    none: float | None = None


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One architecture. name is its model_type.

    names: our tensor to theirs; {n} is the block. A tuple is a tensor cut by rows into query, key and value. A name
    with {e} is one tensor an expert, as nn.Linear holds it, [out, in]; without, experts lie stacked as [E * F, D].
    keys: our field to config.json. fixed: fields that the architecture has at one value only. Any other field must
    have its default. says: what config.json says besides; where it is read, it must say this or nothing.
    vllm_fixed: fields that vLLM takes to be so, whatever config.json says (its 0.33; models/dbrx.py and the like).
    """

    name: str
    architecture: str
    names: Mapping[str, str | tuple[str, str, str]]
    keys: Mapping[str, Key]
    fixed: Mapping[str, Any]
    says: Mapping[str, Any]
    vllm_fixed: Mapping[str, Any] = field(default_factory=dict)


_ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}

# transformers 4 and vLLM read the keys that came first, transformers 5 reads rope_parameters.
_ROPE = "rope_parameters.rope_theta"

_DBRX = Layout(
    name="dbrx",
    architecture="DbrxForCausalLM",
    names={
        "embedding.weight": "transformer.wte.weight",
        "blocks.{n}.attention_norm.weight": "transformer.blocks.{n}.norm_attn_norm.norm_1.weight",
        "blocks.{n}.attention.qkv.weight": "transformer.blocks.{n}.norm_attn_norm.attn.Wqkv.weight",
        "blocks.{n}.attention.out.weight": "transformer.blocks.{n}.norm_attn_norm.attn.out_proj.weight",
        "blocks.{n}.moe_norm.weight": "transformer.blocks.{n}.norm_attn_norm.norm_2.weight",
        "blocks.{n}.moe.router.weight": "transformer.blocks.{n}.ffn.router.layer.weight",
        "blocks.{n}.moe.w1": "transformer.blocks.{n}.ffn.experts.mlp.w1",
        "blocks.{n}.moe.v1": "transformer.blocks.{n}.ffn.experts.mlp.v1",
        "blocks.{n}.moe.w2": "transformer.blocks.{n}.ffn.experts.mlp.w2",
        "norm.weight": "transformer.norm_f.weight",
        "head.weight": "lm_head.weight",
    },
    # No key more in the two sections: several versions of transformers, and vLLM, refuse those that they do not know.
    keys={
        "vocab_size": Key(("vocab_size",)),
        "max_seq_len": Key(("max_seq_len",)),
        "layers": Key(("n_layers",)),
        "width": Key(("d_model",)),
        "heads": Key(("n_heads",)),
        "kv_heads": Key(("attn_config.kv_n_heads",)),
        # transformers' DBRX clamps always (5.17, 5.23); float16's largest number is a bound that nothing reaches.
        "qkv_clip": Key(("attn_config.clip_qkv",), absent=None, none=65504.0),
        "rope_base": Key((_ROPE, "attn_config.rope_theta"), absent=10000.0),
        "experts": Key(("ffn_config.moe_num_experts",)),
        "experts_chosen": Key(("ffn_config.moe_top_k",)),
        "expert_width": Key(("ffn_config.ffn_hidden_size",)),
        "activation": Key(("ffn_config.ffn_act_fn.name",), absent="silu", values=_ACTIVATIONS),
        "router_normalize": Key(
            ("ffn_config.moe_normalize_expert_weights",), absent=1.0, values={"l1": 1.0, "none": None}
        ),
        "balance_loss_weight": Key(("ffn_config.moe_loss_weight",), absent=0.01),
        "init_std": Key(("initializer_range",), absent=0.02),
    },
    fixed={"norm": "layer_norm", "norm_eps": 1e-5},
    says={"rope_parameters.rope_type": "default", "tie_word_embeddings": False},
    vllm_fixed={"activation": "silu", "router_normalize": "l1"},
)

_LLAMA_LIKE: Mapping[str, str | tuple[str, str, str]] = {
    "embedding.weight": "model.embed_tokens.weight",
    "blocks.{n}.attention_norm.weight": "model.layers.{n}.input_layernorm.weight",
    "blocks.{n}.attention.qkv.weight": (
        "model.layers.{n}.self_attn.q_proj.weight",
        "model.layers.{n}.self_attn.k_proj.weight",
        "model.layers.{n}.self_attn.v_proj.weight",
    ),
    "blocks.{n}.attention.out.weight": "model.layers.{n}.self_attn.o_proj.weight",
    "blocks.{n}.moe_norm.weight": "model.layers.{n}.post_attention_layernorm.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
}
_LLAMA_LIKE_KEYS = {
    "vocab_size": Key(("vocab_size",)),
    "max_seq_len": Key(("max_position_embeddings",)),
    "layers": Key(("num_hidden_layers",)),
    "width": Key(("hidden_size",)),
    "heads": Key(("num_attention_heads",)),
    "kv_heads": Key(("num_key_value_heads",)),
    "experts_chosen": Key(("num_experts_per_tok",)),
    "expert_width": Key(("intermediate_size",)),
    "activation": Key(("hidden_act",), absent="silu", values=_ACTIVATIONS),
    "norm_eps": Key(("rms_norm_eps",), absent=1e-5),
    "tied_head": Key(("tie_word_embeddings",), absent=False),
    "init_std": Key(("initializer_range",), absent=0.02),
}

_MIXTRAL = Layout(
    name="mixtral",
    architecture="MixtralForCausalLM",
    names={
        **_LLAMA_LIKE,
        "blocks.{n}.moe.router.weight": "model.layers.{n}.block_sparse_moe.gate.weight",
        "blocks.{n}.moe.w1": "model.layers.{n}.block_sparse_moe.experts.{e}.w1.weight",
        "blocks.{n}.moe.v1": "model.layers.{n}.block_sparse_moe.experts.{e}.w3.weight",
        "blocks.{n}.moe.w2": "model.layers.{n}.block_sparse_moe.experts.{e}.w2.weight",
    },
    keys={
        **_LLAMA_LIKE_KEYS,
        "head_width": Key(("head_dim",), absent=None),
        "rope_base": Key((_ROPE, "rope_theta"), absent=1e6),
        "experts": Key(("num_local_experts",)),
        "balance_loss_weight": Key(("router_aux_loss_coef",), absent=0.001),
    },
    fixed={"norm": "rms_norm", "router_normalize": "l1"},
    says={"rope_parameters.rope_type": "default", "sliding_window": None},
    vllm_fixed={"activation": "silu"},
)

_OLMOE = Layout(
    name="olmoe",
    architecture="OlmoeForCausalLM",
    names={
        **_LLAMA_LIKE,
        "blocks.{n}.attention.q_norm.weight": "model.layers.{n}.self_attn.q_norm.weight",
        "blocks.{n}.attention.k_norm.weight": "model.layers.{n}.self_attn.k_norm.weight",
        "blocks.{n}.moe.router.weight": "model.layers.{n}.mlp.gate.weight",
        "blocks.{n}.moe.w1": "model.layers.{n}.mlp.experts.{e}.gate_proj.weight",
        "blocks.{n}.moe.v1": "model.layers.{n}.mlp.experts.{e}.up_proj.weight",
        "blocks.{n}.moe.w2": "model.layers.{n}.mlp.experts.{e}.down_proj.weight",
    },
    keys={
        **_LLAMA_LIKE_KEYS,
        "qkv_clip": Key(("clip_qkv",), absent=None),
        "rope_base": Key((_ROPE, "rope_theta"), absent=10000.0),
        "experts": Key(("num_experts",)),
        "router_normalize": Key(("norm_topk_prob",), absent=False, values={"l1": True, "none": False}),
        "balance_loss_weight": Key(("router_aux_loss_coef",), absent=0.01),
    },
    fixed={"norm": "rms_norm", "qk_norm": True},
    says={"rope_parameters.rope_type": "default", "attention_bias": False},
    vllm_fixed={
        "activation": "silu",
        "router_normalize": "none",
        "qkv_clip": None,
        "norm_eps": 1e-5,
        "tied_head": False,
    },
)

LAYOUTS: Mapping[str, Layout] = {layout.name: layout for layout in (_DBRX, _MIXTRAL, _OLMOE)}


def objection(config: ModelConfig, layout: Layout) -> str | None:
    """The first field that the layout cannot hold, as a part of a sentence; None where it holds the model."""
    for name, info in ModelConfig.model_fields.items():
        value = getattr(config, name)
        if name == "head_width" and name not in layout.keys:
            if config.query_width != config.width:
                return f"head_width {value} (it takes width / heads, {config.width} / {config.heads})"
        elif name in layout.fixed:
            if value != layout.fixed[name]:
                return f"{name} {value} (it has {layout.fixed[name]})"
        elif name not in layout.keys and name not in TRAINING_ONLY and value != info.default:
            return f"{name} {value}"
    return None


def choose_layout(config: ModelConfig, name: str = "auto") -> Layout:
    """The layout of this name; with "auto", the first that holds the model.

    Errors: ModelError (2), which names the field that does not fit, or the layouts that there are.
    """
    if name == "auto":
        objections = {key: objection(config, layout) for key, layout in LAYOUTS.items()}
        for key, found in objections.items():
            if found is None:
                return LAYOUTS[key]
        why = "; ".join(f"{key} cannot hold {found}" for key, found in objections.items())
        raise ModelError(f"No Hugging Face layout holds this model: {why}.", 2)
    if name not in LAYOUTS:
        raise ModelError(f"There is no layout {name!r}; take one of auto, {', '.join(LAYOUTS)}.", 2)
    if found := objection(config, LAYOUTS[name]):
        raise ModelError(f"The {name} layout cannot hold {found}; take another layout, or train a model without it.", 2)
    return LAYOUTS[name]


def vllm_differs(config: ModelConfig, layout: Layout) -> tuple[str, ...]:
    """The fields that config.json says and vLLM does not read: with them, its logits are not this model's."""
    return tuple(name for name, value in layout.vllm_fixed.items() if getattr(config, name) != value)
