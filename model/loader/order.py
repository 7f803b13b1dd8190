"""The order of samples: a pure function of (key, epoch, sample index).

The key is a digest of the table's content, split and seed. Nothing of ranks, files or restarts enters, which is what
makes a resume exact on any number of ranks.
"""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt


def epoch_order(key: str, epoch: int, n: int) -> npt.NDArray[np.int64]:
    """A permutation of 0..n-1 drawn uniformly (up to ties of 64-bit numbers) for this key and epoch; int64 [n].

    Sorts n words of the counter-based generator Philox (Salmon et al. 2011). numpy promises its raw stream for ever
    (NEP 19), which it does not for Generator.permutation.
    """
    digest = hashlib.sha256(f"{key}\0{epoch}".encode()).digest()
    words = np.random.Philox(key=int.from_bytes(digest[:16], "little")).random_raw(n)
    return np.argsort(words, kind="stable").astype(np.int64)
