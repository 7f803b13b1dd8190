"""The network beside others' code: transformers' DBRX, Mixtral and OLMoE, and Grok-1 written out plainly here.

transformers' models get our weights from an exported folder, and we get theirs from a folder that they saved, so that
each direction is read by code that did not write it.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.nn import functional as F

from model.config import load_preset, preset_names
from model.convert.configs import to_config_json
from model.convert.hugging_face import from_hugging_face, to_hugging_face
from model.convert.layouts import choose_layout
from model.network.cache import KVCache
from model.network.generate import SamplingConfig, generate
from model.network.transformer import Transformer
from tests.model.conftest import byte_tokenizer
from tests.model.convert.small import LAYOUT, SIZES, network, small

LENGTHS = (48, 31, 5)
TOLERANCE = {"rtol": 0.0, "atol": 1e-4}

COMMON: dict[str, Any] = {"vocab_size": 272, "initializer_range": 0.2, "bos_token_id": None, "eos_token_id": 0}
LLAMA_LIKE: dict[str, Any] = {
    **COMMON,
    "max_position_embeddings": 64,
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_attention_heads": 4,
    "num_experts_per_tok": 3,
}
THEIRS: dict[str, Any] = {
    "dbrx": lambda: transformers.DbrxConfig(
        **COMMON,
        max_seq_len=64,
        n_layers=2,
        d_model=32,
        n_heads=4,
        attn_config={"clip_qkv": 0.5, "kv_n_heads": 2, "rope_theta": 5e5},
        rope_parameters={"rope_type": "default", "rope_theta": 5e5},
        ffn_config={"ffn_hidden_size": 24, "moe_num_experts": 6, "moe_top_k": 3, "ffn_act_fn": {"name": "silu"}},
    ),
    "mixtral-8x7b": lambda: transformers.MixtralConfig(
        **LLAMA_LIKE,
        num_key_value_heads=2,
        num_local_experts=6,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    ),
    "olmoe": lambda: transformers.OlmoeConfig(
        **LLAMA_LIKE, num_key_value_heads=4, num_experts=6, rope_parameters={"rope_type": "default", "rope_theta": 1e4}
    ),
}  # fmt: skip
# Fields that are not the preset's, to see that each acts in both networks alike.
OTHER: dict[str, list[dict[str, Any]]] = {
    "dbrx": [{"router_normalize": "none", "qkv_clip": None}, {"activation": "gelu_tanh", "kv_heads": 1}],
    "mixtral-8x7b": [{"head_width": 12, "tied_head": True}, {"activation": "gelu", "norm_eps": 0.1}],
    "olmoe": [{"router_normalize": "l1", "qkv_clip": 0.4, "kv_heads": 2}, {"rope_base": 7.0, "tied_head": True}],
}


def batch(seed: int = 1) -> tuple[Tensor, Tensor]:
    """Tokens [B, S] of unequal lengths, padded with token 0, and which are no padding."""
    tokens = torch.randint(1, SIZES["vocab_size"], (3, max(LENGTHS)), generator=torch.Generator().manual_seed(seed))
    valid = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    return tokens * valid, valid


@torch.no_grad()
def ours_of(model: Transformer) -> Tensor:
    tokens, valid = batch()
    return model(tokens, segment_ids_BS=torch.where(valid, 0, -1)).logits[valid]


@torch.no_grad()
def theirs_of(model: Any) -> Tensor:
    tokens, valid = batch()
    return model(input_ids=tokens, attention_mask=valid.long()).logits[valid]


def exported(model: Transformer, folder: Path) -> Path:
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    return to_hugging_face(
        model.state_dict(), model.config, folder / "tokenizer.json", folder / "out", dtype=torch.float32
    ).folder


@pytest.mark.parametrize(
    ("preset", "fields"), [(preset, fields) for preset in LAYOUT for fields in ({}, *OTHER.get(preset, []))]
)
def test_our_weights_in_transformers_give_our_logits(preset: str, fields: dict[str, Any], tmp_path: Path) -> None:
    model = network(small(preset, **fields))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(exported(model, tmp_path)).eval()
    assert theirs.dtype == torch.float32
    torch.testing.assert_close(theirs_of(theirs), ours_of(model), **TOLERANCE)


@pytest.mark.parametrize("preset", THEIRS)
def test_transformers_weights_in_our_network_give_its_logits(preset: str, tmp_path: Path) -> None:
    torch.manual_seed(3)
    theirs = transformers.AutoModelForCausalLM.from_config(THEIRS[preset]()).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(1.0, 0.3) if parameter.dim() == 1 else parameter.normal_(0.0, 0.2)
    theirs.save_pretrained(tmp_path)
    model = from_hugging_face(tmp_path)
    not_said = {"name": LAYOUT[preset], "balance_loss_weight": model.config.balance_loss_weight}
    assert model.config == small(preset).model_copy(update=not_said)
    torch.testing.assert_close(ours_of(model), theirs_of(theirs), **TOLERANCE)


@pytest.mark.parametrize("preset", THEIRS)
def test_transformers_counts_the_parameters_of_the_preset(preset: str) -> None:
    """Of the whole preset, by transformers' own network on the meta device, made from the config.json that we write."""
    config = load_preset(preset)
    said = to_config_json(config, choose_layout(config))
    with torch.device("meta"):
        theirs = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**said))
    assert sum(p.numel() for p in theirs.parameters()) == config.parameters


@pytest.mark.parametrize(
    ("preset", "fields"),
    [
        ("dbrx", {"qkv_clip": None}),
        ("olmoe", {"qk_norm": False}),
        ("grok-1", {"attention_soft_cap": None}),
        ("grok-1", {"post_norm": False}),
        ("grok-1", {"activation": "gelu"}),
    ],
)
def test_the_variant_acts_at_this_size(preset: str, fields: dict[str, Any]) -> None:
    """Else the tests above would hold without it."""
    model = network(small(preset))
    without = Transformer(small(preset, **fields)).eval()
    without.load_state_dict(model.state_dict(), strict=False)
    assert (ours_of(without) - ours_of(model)).abs().max() > 5 * TOLERANCE["atol"]


def grok(model: Transformer, tokens_S: Tensor) -> Tensor:
    """Grok-1's logits [S, V] of one sequence, token by token and expert by expert.

    After xai-org/grok-1, model.py: four RMSNorms a block, the second and fourth on what is added; attention scores
    30 * tanh(x / 30) after scaling; rotary halves; the router's softmax over all experts, then the largest, as they
    are; gelu (JAX's default, the tanh form) on the gate; embeddings and logits times a constant; the head is the
    embedding.
    """
    c, w = model.config, {name: tensor.double() for name, tensor in model.state_dict().items()}
    length, groups = len(tokens_S), c.heads // c.kv_heads

    def norm(x: Tensor, name: str) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + c.norm_eps).sqrt() * w[name]

    def turn(x_SNH: Tensor) -> Tensor:
        half = c.head_width // 2
        angle = torch.arange(length)[:, None, None] / c.rope_base ** (torch.arange(half).double() / half)
        a, b = x_SNH[..., :half], x_SNH[..., half:]
        return torch.cat((a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()), -1)

    def attend(x_SD: Tensor, block: str) -> Tensor:
        q, k, v = (x_SD @ w[f"{block}attention.qkv.weight"].T).split([c.query_width, c.kv_width, c.kv_width], -1)
        q, k = turn(q.view(length, c.heads, -1)), turn(k.view(length, c.kv_heads, -1))
        out = torch.zeros(length, c.heads, c.head_width, dtype=torch.float64)
        assert c.attention_soft_cap is not None
        for t in range(length):
            for head in range(c.heads):
                scores = k[: t + 1, head // groups] @ q[t, head] / c.head_width**0.5
                scores = c.attention_soft_cap * (scores / c.attention_soft_cap).tanh()
                out[t, head] = scores.softmax(0) @ v.view(length, c.kv_heads, -1)[: t + 1, head // groups]
        return out.flatten(1) @ w[f"{block}attention.out.weight"].T

    def experts(x_SD: Tensor, block: str) -> Tensor:
        chance_SE = (x_SD @ w[f"{block}moe.router.weight"].T).softmax(-1)
        out = torch.zeros_like(x_SD)
        for t in range(length):
            for e in chance_SE[t].argsort(descending=True)[: c.experts_chosen]:
                gate = F.gelu(w[f"{block}moe.w1"][e] @ x_SD[t], approximate="tanh")
                out[t] += chance_SE[t, e] * ((gate * (w[f"{block}moe.v1"][e] @ x_SD[t])) @ w[f"{block}moe.w2"][e])
        return out

    x = w["embedding.weight"][tokens_S] * c.embedding_multiplier
    for n in range(c.layers):
        block = f"blocks.{n}."
        x = x + norm(attend(norm(x, f"{block}attention_norm.weight"), block), f"{block}attention_post_norm.weight")
        x = x + norm(experts(norm(x, f"{block}moe_norm.weight"), block), f"{block}moe_post_norm.weight")
    return norm(x, "norm.weight") @ w["embedding.weight"].T * c.logit_multiplier


def test_grok_is_its_published_computation() -> None:
    model = network(small("grok-1"))
    tokens, _ = batch()
    wanted = torch.cat([grok(model, row[:length]) for row, length in zip(tokens, LENGTHS, strict=True)])
    torch.testing.assert_close(ours_of(model).double(), wanted, **TOLERANCE)


@pytest.mark.parametrize("preset", preset_names())
def test_every_preset_reads_packed_documents_as_if_alone(preset: str) -> None:
    model, (tokens, _) = network(small(preset)), batch()
    documents = [row[:length] for row, length in zip(tokens, (13, 31, 4), strict=True)]
    segments = torch.cat([torch.full_like(d, i) for i, d in enumerate(documents)])[None]
    positions = torch.cat([torch.arange(len(d)) for d in documents])[None]
    with torch.no_grad():
        packed = model(torch.cat(documents)[None], positions_BS=positions, segment_ids_BS=segments).logits[0]
        alone = torch.cat([model(d[None]).logits[0] for d in documents])
    torch.testing.assert_close(packed, alone, **TOLERANCE)


@pytest.mark.parametrize("preset", preset_names())
def test_every_preset_gives_over_a_cache_what_it_gives_at_once(preset: str) -> None:
    model, (tokens, _) = network(small(preset)), batch()
    cache = KVCache(model.config, 3, 48, device=model.device, dtype=torch.float32)
    with torch.no_grad():
        full = model(tokens).logits
        pieces = [model(tokens[:, a:b], cache=cache).logits for a, b in pairwise([0, 20, *range(21, 49)])]
    torch.testing.assert_close(torch.cat(pieces, dim=1), full, **TOLERANCE)


@pytest.mark.parametrize("preset", preset_names())
def test_every_preset_generates_what_the_full_forward_gives(preset: str) -> None:
    model, tokenizer = network(small(preset)), byte_tokenizer()
    ids = tokenizer.encode("def main").ids
    prompt = len(ids)
    with torch.no_grad():
        for _ in range(24):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1, : tokenizer.get_vocab_size()].argmax()))
            if ids[-1] == 0:
                break
    pieces = list(generate(model, tokenizer, "def main", SamplingConfig(max_tokens=24, temperature=0)))
    assert "".join(piece.text for piece in pieces) == tokenizer.decode(ids[prompt:], skip_special_tokens=True)
    assert pieces[-1].completion_tokens == len(ids) - prompt
