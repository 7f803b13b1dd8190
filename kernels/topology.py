"""Where the non-zero blocks of a block-sparse matrix are: rows and columns of blocks, in both orders, on the device.

Row-major (compressed sparse row): the blocks of row r are the entries row_offsets[r] to row_offsets[r+1], and entry i
lies at (row_indices[i], column_indices[i]); a matrix's values are stored in this order. Column-major, for products with
the transposed matrix: the blocks of column c are the entries column_offsets[c] to column_offsets[c+1] of a second list,
whose entry j lies in row row_indices_t[j] and has its values at places_t[j] of the first.

A list may be longer than there are blocks, because its length is a shape, which the host must know, and the number of
blocks may be known to the device alone. The entries past the last are inert: their row and column are one past the end,
products skip them and write zeros there. So a mixture of experts builds its topology without waiting for the device.

Left out: values and products (`kernels.block_sparse`).

Legend: R rows of blocks, C columns of blocks, Z entries, E experts.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCKS = (16, 32, 64, 128)

# Rows of blocks that sdd walks through together: of 132 programs at a time, 8 rows share 16 or so columns in L2.
_WALK_ROWS = 8
_LAST = torch.iinfo(torch.int64).max


@dataclass(frozen=True, eq=False)
class Topology:
    """The places of a block-sparse matrix's non-zero blocks. All tensors are int32 on one device."""

    block: int
    """Rows and columns of a block: 16, 32, 64 or 128."""
    shape: tuple[int, int]
    """Rows and columns of the matrix, in elements; both are multiples of block."""
    row_offsets: Tensor
    """[R+1]"""
    column_indices: Tensor
    """[Z], C where inert"""
    row_indices: Tensor
    """[Z], R where inert"""
    column_offsets: Tensor
    """[C+1]"""
    row_indices_t: Tensor
    """[Z] in column-major order, R where inert"""
    places_t: Tensor
    """[Z] the row-major entry of each column-major one"""
    walk: Tensor
    """[Z] every row-major entry once, so that neighbours share rows and columns in the cache"""
    pairs: Tensor
    """[P, 2] the same, two row-major entries of one row at a time (of one column, if `pairs_share_columns`); -1 where a
    second, or both, are missing"""
    row_order: Tensor
    """[R] every row once, those of many blocks first"""
    column_order: Tensor
    """[C] every column likewise"""

    @property
    def entries(self) -> int:
        """Z: the blocks that values are stored for, inert ones too."""
        return self.column_indices.shape[0]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors in the order of the fields, as an operator takes them."""
        return (
            self.row_offsets,
            self.column_indices,
            self.row_indices,
            self.column_offsets,
            self.row_indices_t,
            self.places_t,
            self.walk,
            self.pairs,
            self.row_order,
            self.column_order,
        )

    @property
    def pairs_share_columns(self) -> bool:
        """Whether pairs are of a column: the longer of the two on average leaves fewer entries without a second."""
        return self.shape[0] > self.shape[1]

    @classmethod
    def from_mask(cls, mask: Tensor, block: int, max_blocks: int | None = None) -> Topology:
        """The blocks where `mask` is true.

        Args:
            mask: bool [R, C], on the device that the topology shall be on.
            block: rows and columns of a block.
            max_blocks: how many blocks there are at most, which fixes Z; blocks beyond it, in row-major order, are
                dropped (with LAKEMOE_DEBUG=1 they are an error). None counts them, which waits for the device.

        Raises:
            ValueError: an argument has a wrong shape, dtype or value.
        """
        _check_block(block)
        if mask.dim() != 2 or mask.dtype != torch.bool:
            raise ValueError(f"mask must be a bool tensor of shape [R, C], not {mask.dtype} {list(mask.shape)}")
        if max_blocks is not None and max_blocks < 0:
            raise ValueError(f"max_blocks must be at least 0, not {max_blocks}")
        R, C = mask.shape
        Z = int(mask.sum()) if max_blocks is None else min(max_blocks, R * C)
        _check_size("mask", block, R, C, Z)
        if os.environ.get("LAKEMOE_DEBUG") == "1" and (count := int(mask.sum())) > Z:
            raise ValueError(f"max_blocks is {max_blocks}, but mask has {count} blocks; give at least that")
        # The row-major entry of each place, if it has one.
        number_RC = torch.cumsum(mask.reshape(-1), 0).view(R, C)
        kept_RC = mask & (number_RC <= Z)
        row_offsets, place_Z = _compress(kept_RC, Z)
        column_offsets, place_t_Z = _compress(kept_RC.t(), Z)
        # A place past the end stands for an inert entry.
        row_indices, column_indices = place_Z // max(C, 1), place_Z % max(C, 1)
        inert = torch.arange(Z, device=mask.device) >= row_offsets[-1]
        row_t, column_t = place_t_Z % max(R, 1), place_t_Z // max(R, 1)
        entry_t = number_RC.reshape(-1)[row_t * C + column_t] - 1 if Z else row_t
        return cls._of(
            block,
            (R, C),
            row_offsets,
            column_indices.masked_fill(inert, C),
            row_indices.masked_fill(inert, R),
            column_offsets,
            row_t.masked_fill(inert, R),
            torch.where(inert, torch.arange(Z, device=mask.device), entry_t),
        )

    @classmethod
    def block_diagonal(
        cls, tokens_per_expert: Tensor, columns_per_expert: int, block: int, max_tokens: int
    ) -> Topology:
        """A dropless mixture of experts' activations: expert e's rows of blocks by its own columns.

        Expert e has tokens_per_expert[e] rows, padded to whole blocks, below those of the experts before it. As many
        rows are laid out as max_tokens can come to, however they fall; the last of them may be empty. Nothing is copied
        to the host (MegaBlocks, Gale et al. 2022, copies the counts).

        Args:
            tokens_per_expert: int32 or int64 [E].
            columns_per_expert: width of an expert in elements, a multiple of block.
            block: rows and columns of a block.
            max_tokens: at least the sum of tokens_per_expert (T*K); checked only with LAKEMOE_DEBUG=1, because that
                waits for the device.

        Raises:
            ValueError: an argument has a wrong shape, dtype or value.
        """
        _check_block(block)
        if tokens_per_expert.dim() != 1 or tokens_per_expert.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                f"tokens_per_expert must be int32 or int64 of shape [E], "
                f"not {tokens_per_expert.dtype} {list(tokens_per_expert.shape)}"
            )
        E, device = tokens_per_expert.shape[0], tokens_per_expert.device
        if E < 1:
            raise ValueError("tokens_per_expert must have at least one expert, but it is empty")
        if columns_per_expert < block or columns_per_expert % block:
            raise ValueError(f"columns_per_expert must be a multiple of block={block}, not {columns_per_expert}")
        if max_tokens < 0:
            raise ValueError(f"max_tokens must be at least 0, not {max_tokens}")
        if os.environ.get("LAKEMOE_DEBUG") == "1" and (tokens := int(tokens_per_expert.sum())) > max_tokens:
            raise ValueError(f"max_tokens is {max_tokens}, but tokens_per_expert come to {tokens}; give at least that")
        width = columns_per_expert // block
        # Each expert that has tokens wastes at most block - 1 rows.
        R, C = (max_tokens + min(E, max_tokens) * (block - 1)) // block, E * width
        _check_size("max_tokens", block, R, C, R * width)
        end_E = torch.cumsum((tokens_per_expert + block - 1) // block, 0)
        begin_E = F.pad(end_E[:-1], (1, 0))
        # In both orders expert e's entries are width * begin[e] to width * end[e].
        entry_Z = torch.arange(R * width, device=device)
        row_Z = entry_Z // width
        expert_Z = torch.searchsorted(end_E, row_Z, right=True)
        inert = expert_Z >= E
        owner_Z = expert_Z.clamp(max=E - 1)
        first_Z = begin_E[owner_Z]
        height_Z = (end_E[owner_Z] - first_Z).clamp(min=1)
        within_Z = entry_Z - first_Z * width
        row_t_Z = first_Z + within_Z % height_Z
        column = torch.arange(C + 1, device=device)
        owner_C = (column // width).clamp(max=E - 1)
        height_C = end_E[owner_C] - begin_E[owner_C]
        return cls._of(
            block,
            (R, C),
            torch.minimum(torch.arange(R + 1, device=device), end_E[-1]) * width,
            (owner_Z * width + entry_Z % width).masked_fill(inert, C),
            row_Z.masked_fill(inert, R),
            begin_E[owner_C] * width + (column - owner_C * width) * height_C,
            row_t_Z.masked_fill(inert, R),
            torch.where(inert, entry_Z, row_t_Z * width + within_Z // height_Z),
        )

    @classmethod
    def _of(
        cls,
        block: int,
        grid: tuple[int, int],
        row_offsets: Tensor,
        column_indices: Tensor,
        row_indices: Tensor,
        column_offsets: Tensor,
        row_indices_t: Tensor,
        places_t: Tensor,
    ) -> Topology:
        """The topology of these lists, with the walk: by groups of rows, in a group by columns, inert ones last."""
        R, C = grid
        group = row_indices // _WALK_ROWS
        key = (group.long() * (C + 1) + column_indices) * _WALK_ROWS + row_indices % _WALK_ROWS
        key = key.masked_fill(row_indices == R, _LAST - 1)
        if R > C:
            column_t = torch.where(row_indices_t == R, C, column_indices[places_t])
            pairs = _pairs(column_offsets, column_t, places_t, key)
        else:
            pairs = _pairs(row_offsets, row_indices, torch.arange(key.shape[0], device=key.device), key)
        lists = (
            row_offsets,
            column_indices,
            row_indices,
            column_offsets,
            row_indices_t,
            places_t,
            torch.argsort(key, stable=True),
            pairs,
            *(torch.argsort(offsets.diff(), descending=True, stable=True) for offsets in (row_offsets, column_offsets)),
        )
        return cls(block, (R * block, C * block), *(index.to(torch.int32) for index in lists))


def _compress(mask_RC: Tensor, entries: int) -> tuple[Tensor, Tensor]:
    """(offsets of the rows, place r*C + c of each true entry in row-major order, some false place where inert)."""
    offsets = F.pad(torch.cumsum(mask_RC.sum(1), 0), (1, 0))
    return offsets, torch.argsort(mask_RC.reshape(-1).logical_not(), stable=True)[:entries]


def _pairs(offsets: Tensor, line_Z: Tensor, entry_Z: Tensor, key: Tensor) -> Tensor:
    """Topology.pairs, by the keys of the firsts; entry_Z are the row-major entries, listed line by line."""
    Z, lines = entry_Z.shape[0], offsets.shape[0] - 1
    place_Z = torch.arange(Z, device=key.device)
    first_Z = (place_Z - offsets[line_Z]) % 2 == 0
    follows_Z = F.pad(line_Z[1:] == line_Z[:-1], (0, 1))[:Z]
    second_Z = torch.where(follows_Z, entry_Z.roll(-1), -1)
    # Inert entries are a line of their own; each line has one entry without a second at most.
    order = torch.argsort(key[entry_Z].masked_fill(~first_Z, _LAST), stable=True)[: (Z + lines + 1) // 2]
    pairs = torch.stack([entry_Z, second_Z], 1)[order]
    return pairs.masked_fill(~first_Z[order].unsqueeze(1), -1)


def _check_block(block: int) -> None:
    if block not in BLOCKS:
        raise ValueError(f"block must be one of {', '.join(map(str, BLOCKS))}, not {block}")


def _check_size(name: str, block: int, rows: int, columns: int, entries: int) -> None:
    """Kernels count rows, columns and the rows of all blocks below one another in 32 bits."""
    if max(rows, columns, entries) * block >= 2**31:
        raise ValueError(
            f"{name} makes {rows} x {columns} blocks of {block} with {entries} entries, which is too large: "
            f"each of the three, times {block}, must be below 2^31"
        )
