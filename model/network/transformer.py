"""The decoder: embedding, blocks of attention and mixture of experts, head. One code for every preset.

Leaves out the loss (model/train) and sampling (model/network/generate.py).
Legend: B sequences, S tokens, D width, V vocabulary, L layers, E experts.
"""

from __future__ import annotations

from math import sqrt
from typing import TYPE_CHECKING, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from model.config import ModelConfig
from model.network.attention import Attention, attention_mask, rotary_angles
from model.network.cache import KVCache
from model.network.distributed import assign
from model.network.moe import MoE
from model.network.norm import Norm
from model.network.router import RouterSums

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


class Hidden(NamedTuple):
    """states [B, S, D]: times head_weight they are the logits; router: the sums of all layers, [L, ...]."""

    states: Tensor
    router: RouterSums


class Output(NamedTuple):
    """logits [B, S, V]; router: the sums of all layers, [L, ...]."""

    logits: Tensor
    router: RouterSums


def computes(name: str, parameter: Tensor) -> bool:
    """Whether a parameter is cast to the dtype of the products: matrices, but for the routers' (ST-MoE, section 4)."""
    return parameter.dim() > 1 and not name.endswith("router.weight")


class Block(nn.Module):
    """x + attention(norm(x)), then x + moe(norm(x)); with post_norm, what is added is normalised too (Grok-1)."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()

        def norm() -> Norm:
            return Norm(config.norm, config.width, config.norm_eps)

        self.attention_norm = norm()
        self.attention = Attention(config, layer)
        self.attention_post_norm = norm() if config.post_norm else nn.Identity()
        self.moe_norm = norm()
        self.moe = MoE(config)
        self.moe_post_norm = norm() if config.post_norm else nn.Identity()

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor],
        mask: Tensor | BlockMask | None,
        valid_T: Tensor | None,
        cache: KVCache | None,
    ) -> tuple[Tensor, RouterSums]:
        x, normed = self.attend(x, rotary, mask, cache)
        y_TD, sums = self.moe(normed.flatten(0, 1), valid_T)
        return self.add(x, y_TD), sums

    def attend(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor],
        mask: Tensor | BlockMask | None,
        cache: KVCache | None,
    ) -> tuple[Tensor, Tensor]:
        """x + attention(norm(x)), and its norm for the experts. Apart from them, so that it can be compiled alone."""
        x = x + self.attention_post_norm(self.attention(self.attention_norm(x), rotary, mask, cache))
        return x, self.moe_norm(x)

    def add(self, x: Tensor, y_TD: Tensor) -> Tensor:
        """x and what the experts give."""
        return x + self.moe_post_norm(y_TD.view(x.shape))


class Transformer(nn.Module):
    """A decoder made from its configuration. On the meta device nothing is allocated and nothing initialised."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        table = torch.empty(config.vocab_size, config.width)
        # On meta its own normal_ would import a compiler, for seconds; elsewhere it is part of the random stream.
        self.embedding = nn.Embedding(config.vocab_size, config.width, _weight=table if table.is_meta else None)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.layers))
        self.norm = Norm(config.norm, config.width, config.norm_eps)
        # Keep only each block's input for backward and run the block again there (Chen et al. 2016).
        self.recompute = False
        self.head = None if config.tied_head else nn.Linear(config.width, config.vocab_size, bias=False)
        self.initialize()

    @torch.no_grad()
    def initialize(self) -> None:
        """Normal weights of init_std; those that write to the residual over sqrt(2 * layers) (GPT-2); norms one.

        Biases of routers zero. A function of torch's random state on the CPU and the configuration, whatever the device
        and however the parameters are distributed: each is drawn whole, in order, and every rank keeps its part.
        """
        std = self.config.init_std
        for name, parameter in self.named_parameters():
            if parameter.is_meta:
                continue
            if parameter.dim() == 1:
                parameter.fill_(1.0)
                continue
            residual = name.endswith(("attention.out.weight", "moe.w2"))
            scale = std / sqrt(2 * self.config.layers) if residual else std
            assign(parameter, torch.empty(parameter.shape, dtype=torch.float32, device="cpu").normal_(0.0, scale))
        for buffer in self.buffers():
            if not buffer.is_meta:
                buffer.zero_()  # the routers' biases, which to_empty leaves as they come

    def compute_in(self, dtype: torch.dtype) -> Self:
        """Cast all matrices but the routers' to ``dtype``: what products run in. Norms and routers stay as they are."""
        for name, parameter in self.named_parameters():
            if computes(name, parameter):
                parameter.data = parameter.data.to(dtype)
        return self

    @property
    def head_weight(self) -> Tensor:
        """The head's weight [V, D]; the embedding's where the head is tied."""
        return self.embedding.weight if self.head is None else self.head.weight

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        return self.embedding.weight.device

    def hidden(
        self,
        tokens_BS: Tensor,
        *,
        positions_BS: Tensor | None = None,
        segment_ids_BS: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Hidden:
        """All but the head, so that the loss can be computed in chunks of the sequence.

        tokens int64 [B, S]; positions default to 0, 1, ... after the cache's; segment ids keep packed documents apart,
        -1 is padding. Errors: ValueError for segments with a cache.
        """
        c = self.config
        if cache is not None and segment_ids_BS is not None:
            raise ValueError("segment_ids_BS: packed documents cannot be read into a cache")
        if positions_BS is None:
            start = 0 if cache is None else cache.length
            row = torch.arange(start, start + tokens_BS.shape[1], device=tokens_BS.device)
            positions_BS = row.expand(tokens_BS.shape[0], -1)
        rotary = rotary_angles(positions_BS, c.head_width, c.rope_base)
        if cache is None:
            mask = attention_mask(segment_ids_BS, positions_BS, None)
        else:
            mask = attention_mask(None, positions_BS, cache.capacity)
        valid_T = None if segment_ids_BS is None else (segment_ids_BS >= 0).flatten()
        x = self.embedding(tokens_BS) * c.embedding_multiplier
        layers = []
        for block in self.blocks:
            if self.recompute and torch.is_grad_enabled():
                x, sums = checkpoint(block, x, rotary, mask, valid_T, cache, use_reentrant=False)
            else:
                x, sums = block(x, rotary, mask, valid_T, cache)
            layers.append(sums)
        if cache is not None:
            cache.advance(tokens_BS.shape[1])
        states = self.norm(x) * c.logit_multiplier
        return Hidden(states, RouterSums(*(torch.stack(of_layers) for of_layers in zip(*layers, strict=True))))

    def forward(
        self,
        tokens_BS: Tensor,
        *,
        positions_BS: Tensor | None = None,
        segment_ids_BS: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Output:
        """tokens int64 [B, S] -> logits [B, S, V] of each next token; the arguments are those of ``hidden``."""
        states, router = self.hidden(tokens_BS, positions_BS=positions_BS, segment_ids_BS=segment_ids_BS, cache=cache)
        return Output(F.linear(states, self.head_weight), router)
