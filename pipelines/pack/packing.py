"""Which piece of which document goes into which sequence: best-fit packing and concatenation, on lengths alone.

Best-fit packing is that of Ding et al., "Fewer Truncations Improve Language Modeling" (ICML 2024): a document longer
than a sequence is cut at the sequence length, and the pieces, longest first, go each into the fullest sequence that
still has room. No document is cut that fits in one sequence. A document's length counts its end token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Piece(NamedTuple):
    """``length`` tokens of a document from ``offset`` on."""

    document: int
    offset: int
    length: int


def best_fit(lengths: Sequence[int], sequence_length: int) -> list[list[Piece]]:
    """The sequences' pieces: whole sequences of long documents first, then the packed rest, in order of opening.

    lengths: tokens of each document; those without tokens are left out. Ties go to the document that comes first.
    """
    sequences: list[list[Piece]] = []
    rest: list[Piece] = []
    for document, length in enumerate(lengths):
        whole = length - length % sequence_length
        sequences += [[Piece(document, at, sequence_length)] for at in range(0, whole, sequence_length)]
        if whole < length:
            rest.append(Piece(document, whole, length - whole))
    rest.sort(key=lambda piece: -piece.length)
    # open_with[r]: the sequences with room for r more tokens; bit r of `rooms` tells whether there are any, so that the
    # least sufficient room is the lowest set bit from the piece's length on.
    open_with: list[list[int]] = [[] for _ in range(sequence_length + 1)]
    rooms = 0
    for piece in rest:
        fitting = rooms >> piece.length
        if fitting:
            room = piece.length + (fitting & -fitting).bit_length() - 1
            at = open_with[room].pop()
            if not open_with[room]:
                rooms ^= 1 << room
        else:
            room, at = sequence_length, len(sequences)
            sequences.append([])
        sequences[at].append(piece)
        left = room - piece.length
        if left:
            open_with[left].append(at)
            rooms |= 1 << left
    return sequences


def concat(lengths: Sequence[int], sequence_length: int) -> list[list[Piece]]:
    """The sequences' pieces when the documents are written one after the other and cut through."""
    sequences: list[list[Piece]] = []
    room = 0
    for document, length in enumerate(lengths):
        offset = 0
        while offset < length:
            if not room:
                sequences.append([])
                room = sequence_length
            taken = min(room, length - offset)
            sequences[-1].append(Piece(document, offset, taken))
            offset += taken
            room -= taken
    return sequences
