"""Fill-in-the-middle: the tokens of a document in another order, so that a model learns to fill a gap.

Bavarian et al. 2022, "Efficient Training of Language Models to Fill in the Middle": a document is cut at two places
drawn evenly, and its middle goes to the end. Section 3: PSM is prefix, suffix, middle, each behind its control token.
Section 3.1: SPM is suffix, then prefix and middle in one piece; the tokens for prefix and suffix stand side by side, as
in that paper's training on both, so that SPM looks like a PSM with an empty prefix.

Cuts fall between tokens. The paper cuts between characters before it tokenizes, and finds cuts between tokens worse
where the gap at inference lies within a token; gold.tokens holds the text's own tokens, which other readers rely on, so
a prompt should end its prefix where a token ends. A document longer than a sequence is cut first and each piece
rearranged by itself, so that a sequence always holds a gap with all that is around it: section 3.2 calls that FIM
on the level of contexts, and section 4.4 finds it better than pieces of a rearranged document, which lose their control
tokens. Left out: the end token.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from pipelines.errors import LakeError
from pipelines.tables import SPECIAL_TOKENS

Tokens = npt.NDArray[np.uint32]

FIM_TOKENS = SPECIAL_TOKENS[2:]
# What rearranging adds to a document (tokens).
ADDED = len(FIM_TOKENS)
_KIND = "code"


@dataclass(frozen=True, kw_only=True)
class FillInTheMiddle:
    """Which documents are rearranged, and how; the same document always in the same way.

    prefix, middle, suffix: ids of the control tokens; rate: share of code documents (0 to 1); spm_rate: share of SPM
    among those (0 to 1), the others are PSM; seed: another one draws other documents and cuts.
    """

    prefix: int
    middle: int
    suffix: int
    rate: float
    spm_rate: float
    seed: int

    def applies(self, document_id: str, kind: str) -> bool:
        """Whether the document is rearranged: only code is."""
        return kind == _KIND and self._draws(document_id)[0] < round(self.rate * 2**64)

    def rearrange(self, document_id: str, tokens: Tokens) -> Tokens:
        """The document's n tokens with its middle last, n + 3 in all, whether or not ``applies`` draws it."""
        _, spm, *cuts = self._draws(document_id)
        # n tokens have n + 1 places to cut, both ends among them: every part may be empty.
        start, end = sorted(cut * (len(tokens) + 1) >> 64 for cut in cuts)
        before, gap, after = tokens[:start], tokens[start:end], tokens[end:]
        prefix, middle, suffix = (np.array([token], tokens.dtype) for token in (self.prefix, self.middle, self.suffix))
        if spm < round(self.spm_rate * 2**64):
            return np.concatenate((prefix, suffix, after, middle, before, gap))
        return np.concatenate((prefix, before, suffix, after, middle, gap))

    def rearrange_pieces(self, document_id: str, tokens: Tokens, length: int) -> Tokens:
        """The document so that each `length` tokens of the result are a piece of it, rearranged by itself.

        length: more than ``ADDED``. The last piece may be shorter.
        """
        room = length - ADDED
        # The first piece is drawn as the document: one that fits is rearranged as it always was.
        return np.concatenate(
            [
                self.rearrange(f"{document_id}/{start}" if start else document_id, tokens[start : start + room])
                for start in range(0, len(tokens), room)
            ]
        )

    def _draws(self, document_id: str) -> tuple[int, int, int, int]:
        """Four even draws from 0 to 2^64 - 1."""
        digest = hashlib.sha256(f"fim/{self.seed}/{document_id}".encode()).digest()
        first, second, third, fourth = np.frombuffer(digest, "<u8").tolist()
        return first, second, third, fourth


def fill_in_the_middle(tokenizer: Tokenizer, *, rate: float, spm_rate: float, seed: int) -> FillInTheMiddle:
    """With the tokenizer's control tokens. Raises LakeError (exit code 2) when it lacks one of them."""
    ids: list[int] = []
    for token in FIM_TOKENS:
        found = tokenizer.token_to_id(token)
        if found is None:
            raise LakeError(f"The tokenizer lacks {token}: train one, add it, or set pack.fim_rate to 0.", 2)
        ids.append(found)
    prefix, middle, suffix = ids
    return FillInTheMiddle(prefix=prefix, middle=middle, suffix=suffix, rate=rate, spm_rate=spm_rate, seed=seed)
