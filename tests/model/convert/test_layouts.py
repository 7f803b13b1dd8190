"""Layouts and config.json: what the hub publishes is read as the presets, and what a layout cannot say is refused."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.config import ModelConfig, load_preset
from model.convert.configs import from_config_json, to_config_json
from model.convert.layouts import LAYOUTS, TRAINING_ONLY, choose_layout, objection, vllm_differs
from model.convert.tensors import published
from model.errors import ModelError
from tests.model.convert.small import LAYOUT, small

# The keys that say the architecture, as the hub's config.json has them.
HUB: dict[str, dict[str, Any]] = {
    # databricks/dbrx-base
    "dbrx": {
        "architectures": ["DbrxForCausalLM"],
        "attn_config": {"clip_qkv": 8, "kv_n_heads": 8, "model_type": "", "rope_theta": 500000},
        "d_model": 6144,
        "emb_pdrop": 0.0,
        "ffn_config": {
            "ffn_hidden_size": 10752,
            "model_type": "",
            "moe_jitter_eps": 0.01,
            "moe_loss_weight": 0.05,
            "moe_num_experts": 16,
            "moe_top_k": 4,
        },
        "initializer_range": 0.02,
        "max_seq_len": 32768,
        "model_type": "dbrx",
        "n_heads": 48,
        "n_layers": 40,
        "resid_pdrop": 0.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vocab_size": 100352,
    },
    # mistralai/Mixtral-8x7B-v0.1
    "mixtral-8x7b": {
        "architectures": ["MixtralForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "initializer_range": 0.02,
        "intermediate_size": 14336,
        "max_position_embeddings": 32768,
        "model_type": "mixtral",
        "num_attention_heads": 32,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "rms_norm_eps": 1e-05,
        "rope_theta": 1000000.0,
        "router_aux_loss_coef": 0.02,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "vocab_size": 32000,
    },
    # allenai/OLMoE-1B-7B-0924
    "olmoe": {
        "architectures": ["OlmoeForCausalLM"],
        "attention_bias": False,
        "clip_qkv": None,
        "eos_token_id": 50279,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "initializer_range": 0.02,
        "intermediate_size": 1024,
        "max_position_embeddings": 4096,
        "model_type": "olmoe",
        "norm_topk_prob": False,
        "num_attention_heads": 16,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 16,
        "num_key_value_heads": 16,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "router_aux_loss_coef": 0.01,
        "tie_word_embeddings": False,
        "vocab_size": 50304,
    },
}


@pytest.mark.parametrize("preset", HUB)
def test_the_hubs_config_is_the_preset(preset: str) -> None:
    config, layout = from_config_json(HUB[preset], source="config.json")
    assert config == load_preset(preset).model_copy(update={"name": layout.name})
    assert layout.name == LAYOUT[preset]


@pytest.mark.parametrize("preset", HUB)
def test_what_is_written_says_what_the_hub_says(preset: str) -> None:
    """So that what reads the hub's file (vLLM, transformers 4) reads ours; transformers 5 reads rope_parameters."""
    config = load_preset(preset)
    said = to_config_json(config, choose_layout(config))
    for key in said.keys() & HUB[preset].keys():
        hub = HUB[preset][key]
        if isinstance(hub, dict):
            # vLLM and transformers 4 refuse keys in these sections that they do not know.
            known = {"ffn_act_fn", "moe_normalize_expert_weights", *hub}
            assert said[key].keys() <= known
            assert {k: said[key][k] for k in said[key].keys() & hub.keys()} == {
                k: hub[k] for k in said[key] if k in hub
            }
        else:
            assert said[key] == hub, key
    assert said["rope_parameters"] == {"rope_type": "default", "rope_theta": config.rope_base}
    base = said["attn_config"] if preset == "dbrx" else said
    assert base["rope_theta"] == config.rope_base


@st.composite
def configs(draw: st.DrawFn) -> ModelConfig:
    """A model that some layout holds."""
    preset = draw(st.sampled_from(sorted(HUB)))
    heads, half = draw(st.integers(1, 4)), draw(st.integers(1, 6))
    fields: dict[str, Any] = {
        "heads": heads,
        "kv_heads": draw(st.sampled_from([n for n in range(1, heads + 1) if heads % n == 0])),
        "head_width": 2 * half,
        "width": 2 * half * heads,
        "rope_base": draw(st.floats(1.0, 1e7)),
        "activation": draw(st.sampled_from(["silu", "gelu", "gelu_tanh"])),
        "balance_loss_weight": draw(st.floats(0, 1)),
        "layers": draw(st.integers(1, 3)),
        "expert_width": draw(st.integers(1, 9)),
    }
    experts = draw(st.integers(2, 9))
    fields |= {"experts": experts, "experts_chosen": draw(st.integers(2, experts))}
    if preset != "mixtral-8x7b":
        fields["router_normalize"] = draw(st.sampled_from(["l1", "none"]))
        fields["qkv_clip"] = draw(st.none() | st.floats(0.1, 100))
    else:
        fields["width"] = draw(st.integers(1, 40))
    if preset != "dbrx":
        fields["norm_eps"] = draw(st.floats(1e-8, 1e-2))
        fields["tied_head"] = draw(st.booleans())
    return load_preset(preset, **fields)


@settings(max_examples=60, deadline=None)
@given(configs())
def test_a_config_that_a_layout_holds_comes_back_equal_and_has_every_tensor_once(config: ModelConfig) -> None:
    layout = choose_layout(config)
    back, same = from_config_json(to_config_json(config, layout), source="config.json")
    assert same is layout
    assert back == config.model_copy(update={"name": layout.name})
    tensors = list(published(config, layout))
    assert len({tensor.name for tensor in tensors}) == len(tensors)
    assert sum(tensor.numel for tensor in tensors) == config.parameters


@pytest.mark.parametrize(
    ("preset", "layout", "fields", "says"),
    [
        ("dbrx", "dbrx", {"attention_soft_cap": 30.0}, "dbrx layout cannot hold attention_soft_cap 30.0"),
        ("dbrx", "dbrx", {"norm_eps": 1e-6}, r"dbrx layout cannot hold norm_eps 1e-06 \(it has 1e-05\)"),
        ("dbrx", "dbrx", {"tied_head": True}, "dbrx layout cannot hold tied_head True"),
        ("dbrx", "dbrx", {"head_width": 12}, r"cannot hold head_width 12 \(it takes width / heads, 32 / 4\)"),
        ("mixtral-8x7b", "mixtral", {"qkv_clip": 8.0}, "mixtral layout cannot hold qkv_clip 8.0"),
        ("mixtral-8x7b", "mixtral", {"post_norm": True}, "mixtral layout cannot hold post_norm True"),
        ("mixtral-8x7b", "mixtral", {"router_normalize": "none"}, r"cannot hold router_normalize none \(it has l1\)"),
        ("mixtral-8x7b", "olmoe", {}, r"olmoe layout cannot hold qk_norm False \(it has True\)"),
        ("olmoe", "olmoe", {"embedding_multiplier": 2.0}, "olmoe layout cannot hold embedding_multiplier 2.0"),
        ("olmoe", "llama", {}, "There is no layout 'llama'; take one of auto, dbrx, mixtral, olmoe"),
        ("grok-1", "auto", {}, "No Hugging Face layout holds this model: dbrx cannot hold .*; mixtral cannot hold"),
    ],
)
def test_what_a_layout_cannot_hold_is_refused_by_its_name(
    preset: str, layout: str, fields: dict[str, Any], says: str
) -> None:
    with pytest.raises(ModelError, match=says) as error:
        choose_layout(small(preset, **fields), layout)
    assert error.value.exit_code == 2


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_field_of_a_model_is_held_or_refused(name: str) -> None:
    """A field that is added to ModelConfig is refused at any value but its default, until a layout says it."""
    layout = LAYOUTS[name]
    assert not layout.keys.keys() & layout.fixed.keys()
    plain = next(small(preset) for preset, of in LAYOUT.items() if of == name)
    assert objection(plain, layout) is None
    for field in ModelConfig.model_fields.keys() - layout.keys.keys() - TRAINING_ONLY:
        other = plain.model_copy(update={field: "something else"})
        found = "head_width" if field == "head_width" else objection(other, layout)
        assert found is not None
        assert found.startswith(field)


def test_vllms_own_reading_is_said() -> None:
    assert vllm_differs(small("olmoe", qkv_clip=0.4, tied_head=True), LAYOUTS["olmoe"]) == ("qkv_clip", "tied_head")
    assert vllm_differs(small("dbrx", router_normalize="none"), LAYOUTS["dbrx"]) == ("router_normalize",)
    assert not any(vllm_differs(load_preset(preset), LAYOUTS[name]) for preset, name in LAYOUT.items())


@pytest.mark.parametrize(
    ("preset", "change", "says"),
    [
        ("dbrx", {"model_type": "llama"}, "model_type 'llama' is not known; these are: dbrx, mixtral, olmoe"),
        ("dbrx", {"n_layers": None}, "layers: Input should be a valid integer"),
        ("dbrx", {"ffn_config": {}}, "does not say ffn_config.moe_num_experts"),
        ("dbrx", {"rope_parameters": {"rope_theta": 1e4}}, "rope_theta 10000.0 and attn_config.rope_theta 5"),
        ("dbrx", {"n_heads": 47}, "the width 6144 is no multiple of 47 heads"),
        ("mixtral-8x7b", {"sliding_window": 4096}, "sliding_window 4096 is not supported"),
        ("mixtral-8x7b", {"hidden_act": "relu"}, "hidden_act 'relu' is not supported"),
        ("mixtral-8x7b", {"quantization_config": {"bits": 4}}, "quantization_config .* is not supported"),
        ("mixtral-8x7b", {"num_key_value_heads": 5}, "must be a multiple of kv_heads"),
        ("olmoe", {"rope_scaling": {"type": "yarn"}}, "rope_scaling .* is not supported"),
        ("olmoe", {"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters.rope_type 'yarn' is not supported"),
        ("olmoe", {"attention_bias": True}, "attention_bias True is not supported"),
    ],
)  # fmt: skip
def test_a_config_that_the_network_cannot_follow_is_a_sentence(preset: str, change: dict[str, Any], says: str) -> None:
    with pytest.raises(ModelError, match=says) as error:
        from_config_json({**HUB[preset], **change}, source="config.json")
    assert error.value.exit_code == 2
    assert str(error.value).startswith("config.json")
