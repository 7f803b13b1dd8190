"""What a model has to beat: unigram and bigram models of the same tokens.

Fitted on the training split's targets, scored on the held-out targets, each document's first token left out as it is
for the network. Only pairs that the held-out split has are counted, so memory is bounded by that split.

    unigram  p(w) = (c(w) + 1) / (n + V)
    bigram   p(w | v) = (c(v, w) + a p(w)) / (c(v) + a)      (Dirichlet prior: MacKay and Peto 1995)

The prior's strength ``a`` is the one of a grid that does best on the held-out tokens themselves, which no honest model
may do: the baseline is given that advantage.

Legend: N held-out targets, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from model.loader.loader import Batch

PRIOR_STRENGTHS = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)
Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Baselines:
    """Nats of every held-out target, [N] each, in the order in which ``targets`` gives them."""

    unigram_N: Floats
    bigram_N: Floats


def targets(batch: Batch) -> tuple[Ints, Ints]:
    """(tokens before, targets) of a batch's targets, [N] each, row by row."""
    mask = batch.loss_mask[:, 1:].numpy()
    tokens = batch.tokens.numpy()
    return tokens[:, :-1][mask], tokens[:, 1:][mask]


def baselines(train: Iterable[Batch], before_N: Ints, target_N: Ints, vocab_size: int) -> Baselines:
    """Fit on the batches of ``train``, score the held-out targets."""
    pairs, where_N = np.unique(before_N * vocab_size + target_N, return_inverse=True)
    pair_counts = np.zeros(len(pairs), np.int64)
    word_counts, before_counts = np.zeros(vocab_size, np.int64), np.zeros(vocab_size, np.int64)
    for batch in train:
        before, target = targets(batch)
        word_counts += np.bincount(target, minlength=vocab_size)
        before_counts += np.bincount(before, minlength=vocab_size)
        seen, counts = np.unique(before * vocab_size + target, return_counts=True)
        at = np.minimum(np.searchsorted(pairs, seen), max(0, len(pairs) - 1))
        known = pairs[at] == seen if len(pairs) else np.zeros(len(seen), bool)
        pair_counts[at[known]] += counts[known]
    p_word_N = ((word_counts + 1) / (word_counts.sum() + vocab_size))[target_N]
    pair_N, context_N = pair_counts[where_N], before_counts[before_N]
    every = [-np.log((pair_N + a * p_word_N) / (context_N + a)) for a in PRIOR_STRENGTHS]
    best = min(every, key=lambda nats: float(nats.sum()))
    return Baselines(unigram_N=-np.log(p_word_N), bigram_N=best)
