"""Which piece goes into which sequence: best-fit packing and concatenation, on lengths alone.

Best-fit packing is that of Ding et al., "Fewer Truncations Improve Language Modeling" (ICML 2024): a document longer
than a sequence is cut at the sequence length (``cut``), and the pieces, longest first, go each into the fullest
sequence that still has room. No document is cut that fits in one sequence. Lengths count the end token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Part(NamedTuple):
    """``length`` tokens of a piece from ``start`` on; piece: its place in the list of lengths."""

    piece: int
    start: int
    length: int


def cut(length: int, sequence_length: int) -> list[tuple[int, int]]:
    """(offset, length) of a document's pieces: whole sequences, then the rest where there is any."""
    whole = length - length % sequence_length
    pieces = [(offset, sequence_length) for offset in range(0, whole, sequence_length)]
    return [*pieces, (whole, length - whole)] if whole < length else pieces


def best_fit(lengths: Sequence[int], sequence_length: int) -> list[list[Part]]:
    """The sequences' pieces, each whole, in order of opening. Ties go to the piece that comes first.

    lengths: tokens of each piece, 1 to sequence_length.
    """
    sequences: list[list[Part]] = []
    # open_with[r]: the sequences with room for r more tokens; bit r of `rooms` tells whether there are any, so that the
    # least sufficient room is the lowest set bit from the piece's length on.
    open_with: list[list[int]] = [[] for _ in range(sequence_length + 1)]
    rooms = 0
    for piece in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[piece]
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            at = open_with[room].pop()
            if not open_with[room]:
                rooms ^= 1 << room
        else:
            room, at = sequence_length, len(sequences)
            sequences.append([])
        sequences[at].append(Part(piece, 0, length))
        left = room - length
        if left:
            open_with[left].append(at)
            rooms |= 1 << left
    return sequences


def concat(lengths: Sequence[int], sequence_length: int) -> list[list[Part]]:
    """The sequences' parts when the pieces are written one after the other and cut through."""
    sequences: list[list[Part]] = []
    room = 0
    for piece, length in enumerate(lengths):
        start = 0
        while start < length:
            if not room:
                sequences.append([])
                room = sequence_length
            taken = min(room, length - start)
            sequences[-1].append(Part(piece, start, taken))
            start += taken
            room -= taken
    return sequences
