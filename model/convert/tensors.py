"""Which rows of our tensors make which published tensor, for a whole model: what both directions follow.

Legend: E experts, F expert width, D width, V vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from model.config import ModelConfig
from model.convert.layouts import Layout
from model.errors import ModelError
from model.network.transformer import Transformer


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Rows ``start`` to ``stop`` of our tensor ``name``; ``rows`` rows of the published one (all where transposed)."""

    name: str
    start: int
    stop: int
    rows: int
    transposed: bool = False

    def of(self, ours: Any) -> Tensor:
        """The piece as it is published, [rows, ...]. From a tensor it is a view, so that it can be written to.

        ours: a tensor, or a lazy slice of a safetensors file.
        """
        block = ours[self.start : self.stop]
        if block.dim() == 3:
            block = block.flatten(0, 1)
        return block.T if self.transposed else block


@dataclass(frozen=True, kw_only=True)
class Published:
    """A tensor of the layout: the pieces, one under the other."""

    name: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]

    @property
    def numel(self) -> int:
        """Elements."""
        return prod(self.shape)


def shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The network's tensors by name; nothing is allocated."""
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in Transformer(config).state_dict().items()}


def published(config: ModelConfig, layout: Layout) -> Iterator[Published]:
    """Every tensor of the layout for this model, in the order of our own.

    Errors: ModelError (2) where the network has a tensor that the layout has no name for.
    """
    for name, shape in shapes(config).items():
        block = re.match(r"blocks\.(\d+)\.", name)
        n = int(block[1]) if block else 0
        theirs = layout.names.get(re.sub(r"^blocks\.\d+\.", "blocks.{n}.", name))
        if theirs is None:
            raise ModelError(f"The {layout.name} layout has no place for the tensor {name}; take another layout.", 2)
        if isinstance(theirs, tuple):
            cuts = [config.query_width, config.kv_width, config.kv_width]
            start = 0
            for part, rows in zip(theirs, cuts, strict=True):
                piece = Piece(name=name, start=start, stop=start + rows, rows=rows)
                yield Published(name=part.format(n=n), shape=(rows, *shape[1:]), pieces=(piece,))
                start += rows
        elif "{e}" in theirs:
            # nn.Linear holds [out, in]: w1 and v1 [F, D] are that already, w2 [F, D] is the transpose.
            turned = name.endswith(".w2")
            out = shape[:0:-1] if turned else shape[1:]
            for e in range(shape[0]):
                piece = Piece(name=name, start=e, stop=e + 1, rows=out[0], transposed=turned)
                yield Published(name=theirs.format(n=n, e=e), shape=out, pieces=(piece,))
        elif len(shape) == 3:
            pieces = tuple(Piece(name=name, start=e, stop=e + 1, rows=shape[1]) for e in range(shape[0]))
            yield Published(name=theirs.format(n=n), shape=(shape[0] * shape[1], shape[2]), pieces=pieces)
        else:
            piece = Piece(name=name, start=0, stop=shape[0], rows=shape[0])
            yield Published(name=theirs.format(n=n), shape=shape, pieces=(piece,))
