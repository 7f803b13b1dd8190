"""The decoder: causality, packed documents, the cache, and each variant beside a plain computation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from model.config import ModelConfig
from model.network.attention import Attention, rotary_angles, rotate
from model.network.cache import KVCache
from model.network.norm import Norm
from model.network.router import router_losses
from model.network.transformer import Transformer

SMALL: dict[str, Any] = {
    "vocab_size": 97,
    "max_seq_len": 64,
    "layers": 2,
    "width": 32,
    "heads": 4,
    "kv_heads": 2,
    "head_width": 8,
    "experts": 4,
    "experts_chosen": 2,
    "expert_width": 16,
    "init_std": 0.2,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "dbrx": {"qkv_clip": 8.0, "rope_base": 5e5},
    "mixtral": {"norm": "rms_norm", "rope_base": 1e6},
    "grok": {
        "norm": "rms_norm",
        "post_norm": True,
        "attention_soft_cap": 3.0,
        "tied_head": True,
        "activation": "gelu_tanh",
        "router_normalize": "none",
        "embedding_multiplier": 5.5,
        "logit_multiplier": 0.5,
    },
    "olmoe": {"norm": "rms_norm", "qk_norm": True, "kv_heads": 4, "router_normalize": "none"},
}


def make(variant: str, seed: int = 0) -> Transformer:
    torch.manual_seed(seed)
    return Transformer(ModelConfig(**{**SMALL, **VARIANTS[variant]})).eval()


def tokens_of(batch: int, length: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, SMALL["vocab_size"], (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("variant", VARIANTS)
def test_output_has_its_shapes_and_gradients_reach_every_parameter(variant: str) -> None:
    model = make(variant)
    out = model(tokens_of(2, 24))
    assert out.logits.shape == (2, 24, 97)
    assert out.router.assignments.sum(dim=1).tolist() == [2 * 24 * 2] * 2
    assert out.router.probability.shape == (2, 4)
    (out.logits.square().mean() + router_losses(out.router, 2).balance).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_later_token_changes_nothing_before_it(variant: str) -> None:
    model, tokens = make(variant), tokens_of(1, 16)
    changed = tokens.clone()
    changed[0, 10] = (changed[0, 10] + 1) % 97
    with torch.no_grad():
        a, b = model(tokens).logits, model(changed).logits
    torch.testing.assert_close(a[:, :10], b[:, :10])
    assert (a[:, 10:] - b[:, 10:]).abs().max() > 1e-3


@pytest.mark.parametrize("variant", VARIANTS)
def test_packed_documents_are_as_if_alone(variant: str) -> None:
    """Three documents and padding in one sequence: each has the logits it has alone; changing one moves no other."""
    model = make(variant)
    lengths = (7, 5, 9)
    tokens = tokens_of(1, 24)
    segments = torch.tensor([[i for i, n in enumerate(lengths) for _ in range(n)] + [-1] * 3], dtype=torch.int32)
    positions = torch.tensor([[p for n in (*lengths, 3) for p in range(n)]], dtype=torch.int32)
    with torch.no_grad():
        packed = model(tokens, positions_BS=positions, segment_ids_BS=segments).logits
        start = 0
        for length in lengths:
            alone = model(tokens[:, start : start + length]).logits
            torch.testing.assert_close(packed[:, start : start + length], alone, rtol=1e-4, atol=1e-5)
            start += length
        changed = tokens.clone()
        changed[0, 7:12] = (changed[0, 7:12] + 13) % 97
        other = model(changed, positions_BS=positions, segment_ids_BS=segments).logits
    assert torch.isfinite(packed).all()
    torch.testing.assert_close(other[:, :7], packed[:, :7], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(other[:, 12:], packed[:, 12:], rtol=1e-4, atol=1e-5)
    assert (other[:, 7:12] - packed[:, 7:12]).abs().max() > 1e-3


@pytest.mark.parametrize("variant", VARIANTS)
def test_padding_counts_neither_in_the_loss_nor_in_the_load(variant: str) -> None:
    model, tokens = make(variant), tokens_of(1, 20)
    segments = torch.tensor([[0] * 12 + [-1] * 8])
    with torch.no_grad():
        whole, alone = model(tokens, segment_ids_BS=segments), model(tokens[:, :12])
    assert torch.equal(whole.router.assignments, alone.router.assignments)
    torch.testing.assert_close(whole.router.probability, alone.router.probability, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_cache_gives_the_logits_of_the_full_forward(variant: str) -> None:
    model, tokens = make(variant), tokens_of(2, 20)
    cache = KVCache(model.config, 2, 32, device=model.device, dtype=torch.float32)
    with torch.no_grad():
        full = model(tokens).logits
        pieces = [model(tokens[:, :9], cache=cache).logits]
        pieces += [model(tokens[:, i : i + 1], cache=cache).logits for i in range(9, 20)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), full, rtol=1e-4, atol=1e-5)
    assert cache.length == 20


def test_cache_refuses_more_than_it_holds_and_segments() -> None:
    model = make("dbrx")
    cache = KVCache(model.config, 1, 4, device=model.device, dtype=torch.float32)
    with pytest.raises(ValueError, match="5 tokens do not fit"):
        model(tokens_of(1, 5), cache=cache)
    with pytest.raises(ValueError, match="segment_ids_BS"):
        model(tokens_of(1, 2), cache=cache, segment_ids_BS=torch.zeros(1, 2))


def test_soft_cap_without_effect_is_plain_attention() -> None:
    """With a cap far above every score, capped attention is scaled_dot_product_attention."""
    torch.manual_seed(3)
    capped = Attention(ModelConfig(**{**SMALL, "attention_soft_cap": 1e4}), 0)
    plain = Attention(ModelConfig(**SMALL), 0)
    plain.load_state_dict(capped.state_dict())
    x = torch.randn(2, 10, 32)
    rotary = rotary_angles(torch.arange(10).expand(2, -1), 8, 1e4)
    torch.testing.assert_close(capped(x, rotary, None), plain(x, rotary, None), rtol=1e-4, atol=1e-5)


def test_rotary_scores_depend_on_the_distance_only() -> None:
    torch.manual_seed(4)
    q, k = torch.randn(1, 1, 1, 8), torch.randn(1, 1, 1, 8)

    def score(i: int, j: int) -> torch.Tensor:
        a = rotate(q, *rotary_angles(torch.tensor([[i]]), 8, 1e4))
        b = rotate(k, *rotary_angles(torch.tensor([[j]]), 8, 1e4))
        return (a * b).sum()

    torch.testing.assert_close(score(7, 3), score(104, 100), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(score(7, 3), score(8, 3))
    torch.testing.assert_close(rotate(q, *rotary_angles(torch.tensor([[0]]), 8, 1e4)), q)


def test_clip_bounds_queries_keys_and_values() -> None:
    """Values clamped to 0.1 and an identity for the output: no output passes 0.1."""
    attention = Attention(ModelConfig(**{**SMALL, "qkv_clip": 0.1}), 0)
    torch.nn.init.eye_(attention.out.weight)
    y = attention(100 * torch.randn(1, 6, 32), rotary_angles(torch.arange(6)[None], 8, 1e4), None)
    assert y.abs().max() <= 0.1 + 1e-6


@pytest.mark.parametrize("kind", ["layer_norm", "rms_norm"])
def test_norm_is_computed_in_float32(kind: Any) -> None:
    norm = Norm(kind, 64, 1e-5)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(5, 64) * 3 + 1
    centred = x - x.mean(-1, keepdim=True) if kind == "layer_norm" else x
    wanted = centred * (centred.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * norm.weight
    torch.testing.assert_close(norm(x), wanted)
    assert norm(x.bfloat16()).dtype == torch.bfloat16


def test_initialisation_is_a_function_of_the_seed_and_starts_near_uniform() -> None:
    config = ModelConfig(vocab_size=512)
    torch.manual_seed(7)
    first = Transformer(config)
    torch.manual_seed(7)
    second = Transformer(config)
    for (name, a), (_, b) in zip(first.named_parameters(), second.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    assert float(first.blocks[0].moe.w2.detach().std()) == pytest.approx(0.02 / 8**0.5, rel=0.02)
    tokens = torch.randint(0, 512, (2, 33))
    with torch.no_grad():
        logits = first(tokens[:, :-1]).logits
    loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    assert float(loss) == pytest.approx(float(torch.tensor(512.0).log()), rel=0.05)


def test_tied_head_is_the_embedding() -> None:
    model = make("grok")
    assert model.head_weight is model.embedding.weight
    assert "head.weight" not in model.state_dict()
    hidden = model.hidden(tokens_of(1, 6))
    torch.testing.assert_close(F.linear(hidden.states, model.head_weight), model(tokens_of(1, 6)).logits)


def test_bfloat16_products_stay_near_and_leave_norms_and_routers() -> None:
    model, tokens = make("dbrx"), tokens_of(1, 12)
    with torch.no_grad():
        full = model(tokens).logits
        half = model.compute_in(torch.bfloat16)(tokens).logits
    assert half.dtype == torch.bfloat16
    assert F.cosine_similarity(full.flatten(), half.float().flatten(), dim=0) > 0.99
    kept = {name for name, p in model.named_parameters() if p.dtype == torch.float32}
    assert kept == {name for name, p in model.named_parameters() if p.dim() == 1 or "router" in name}


def test_recomputed_blocks_give_the_same_gradients() -> None:
    tokens = tokens_of(2, 12)
    gradients = []
    for recompute in (False, True):
        model = make("dbrx").train()
        model.recompute = recompute
        model(tokens).logits.square().mean().backward()
        gradients.append([p.grad for p in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, atol=0, rtol=0)
