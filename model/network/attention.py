"""Causal self-attention: grouped queries, rotary embedding, and the variants that the configuration names.

Packed documents are kept apart by a mask: on a GPU in model/network/flex.py, elsewhere in scaled_dot_product_attention.
Legend: B sequences, S tokens of this call, C tokens in the cache, N query heads, M key/value heads, H head width,
D width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.config import ModelConfig
from model.network.cache import KVCache
from model.network.norm import Norm

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


def rotary_angles(positions_BS: Tensor, head_width: int, base: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine [B, 1, S, H/2] in float32 of position * base^(-2i/H) (Su et al. 2021)."""
    exponents = torch.arange(0, head_width, 2, dtype=torch.float32, device=positions_BS.device) / head_width
    angles_BSh = positions_BS.float()[:, :, None] * base**-exponents
    return angles_BSh.cos()[:, None], angles_BSh.sin()[:, None]


def rotate(x_BNSH: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns the pairs (i, i + H/2): GPT-NeoX's half-split layout, not the interleaved one. Same shape and dtype."""
    a, b = x_BNSH.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x_BNSH.dtype)


def attention_mask(
    segment_ids_BS: Tensor | None, positions_BS: Tensor, capacity: int | None
) -> Tensor | BlockMask | None:
    """Who attends to whom; None where plain causal attention says it.

    With segments, a token sees the earlier tokens of its own segment only; padding (-1) sees padding, so that no row is
    empty: bool [B, 1, S, S], on a GPU a BlockMask that says the same. With a cache of ``capacity`` slots, a token sees
    every slot up to its own position: bool [B, 1, S, C].
    """
    if capacity is not None:
        slots = torch.arange(capacity, device=positions_BS.device)
        return (slots <= positions_BS[:, :, None])[:, None]
    if segment_ids_BS is None:
        return None
    if segment_ids_BS.is_cuda:
        from model.network.flex import document_mask

        return document_mask(segment_ids_BS)
    length = segment_ids_BS.shape[1]
    same = segment_ids_BS[:, :, None] == segment_ids_BS[:, None, :]
    causal = torch.ones(length, length, dtype=torch.bool, device=segment_ids_BS.device).tril()
    return (same & causal)[:, None]


class Attention(nn.Module):
    """x [B, S, D] -> [B, S, D]. Query, key and value weights are one matrix, also where a published model has three."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.config = config
        self.layer = layer
        self.qkv = nn.Linear(config.width, config.query_width + 2 * config.kv_width, bias=False)
        self.out = nn.Linear(config.query_width, config.width, bias=False)
        # OLMoE normalises the whole projection, not head by head, before it is cut into heads.
        self.q_norm = Norm("rms_norm", config.query_width, config.norm_eps) if config.qk_norm else None
        self.k_norm = Norm("rms_norm", config.kv_width, config.norm_eps) if config.qk_norm else None

    def forward(
        self,
        x_BSD: Tensor,
        rotary: tuple[Tensor, Tensor],
        mask: Tensor | BlockMask | None,
        cache: KVCache | None = None,
    ) -> Tensor:
        c = self.config
        batch, length, _ = x_BSD.shape
        q, k, v = self.qkv(x_BSD).split([c.query_width, c.kv_width, c.kv_width], dim=-1)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if c.qkv_clip is not None:
            q, k, v = (t.clamp(-c.qkv_clip, c.qkv_clip) for t in (q, k, v))
        q = rotate(q.view(batch, length, c.heads, c.head_width).transpose(1, 2), *rotary)
        k = rotate(k.view(batch, length, c.kv_heads, c.head_width).transpose(1, 2), *rotary)
        v = v.view(batch, length, c.kv_heads, c.head_width).transpose(1, 2)
        if cache is not None:
            k, v = cache.write(self.layer, k, v)
        if mask is not None and not isinstance(mask, Tensor):
            from model.network.flex import attend

            y = attend(q, k, v, mask, c.attention_soft_cap)
            return self.out(y.transpose(1, 2).reshape(batch, length, c.query_width))
        groups = c.heads // c.kv_heads
        # Expanded here and not by enable_gqa: with a mask, that falls back to the unfused path on a GPU.
        k, v = (t.repeat_interleave(groups, dim=1) if groups > 1 else t for t in (k, v))
        if c.attention_soft_cap is not None:
            y = _soft_capped(q, k, v, mask, c.attention_soft_cap)
        else:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return self.out(y.transpose(1, 2).reshape(batch, length, c.query_width))


def _soft_capped(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, cap: float) -> Tensor:
    """Attention with cap * tanh(score / cap), which no fused operator of torch offers; the scores are in float32."""
    scores = (q @ k.transpose(-1, -2)).float() * q.shape[-1] ** -0.5
    scores = cap * torch.tanh(scores / cap)
    if mask is None:
        mask = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()
    return scores.masked_fill(~mask, float("-inf")).softmax(dim=-1).to(v.dtype) @ v
