"""Attention of packed documents on a GPU: flex attention (Dong et al. 2024), compiled.

It skips the tiles of scores that the mask leaves empty, keeps grouped queries and the soft cap within one kernel and is
deterministic, backward too. A module of its own, because importing it takes seconds that a CPU run need not wait.
Legend: B sequences, S tokens, N query heads, M key/value heads, H head width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

# Without compilation flex attention would hold all scores. Within a compiled block this is part of its graph.
_flex_attention = torch.compile(flex_attention, dynamic=False)


def document_mask(segment_ids_BS: Tensor) -> BlockMask:
    """A token sees the earlier tokens of its own segment, and padding (-1) sees padding."""

    def same_document(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (q >= k) & (segment_ids_BS[b, q] == segment_ids_BS[b, k])

    batch, length = segment_ids_BS.shape
    return create_block_mask(same_document, batch, None, length, length, segment_ids_BS.device, _compile=True)


def attend(q_BNSH: Tensor, k_BMSH: Tensor, v_BMSH: Tensor, mask: BlockMask, cap: float | None) -> Tensor:
    """[B, N, S, H]; scores over sqrt(H), with ``cap`` cap * tanh(score / cap), then softmax in float32."""
    grouped = q_BNSH.shape[1] != k_BMSH.shape[1]
    out = _flex_attention(
        q_BNSH, k_BMSH, v_BMSH, score_mod=None if cap is None else soft_cap(cap), block_mask=mask, enable_gqa=grouped
    )
    assert isinstance(out, Tensor)
    return out


def soft_cap(cap: float) -> Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]:
    """Flex attention's modification of a score."""

    def modify(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return cap * torch.tanh(score / cap)

    return modify
