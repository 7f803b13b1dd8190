"""Shingles, signatures and bands against plain Python sets."""

from __future__ import annotations

import random
import re
import subprocess
import sys

import numpy as np
import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.dedup.shingles import lsh, shingle_hashes, shingle_sets, signatures, word_hashes

TEXTS = st.lists(st.text(alphabet="ab c\n\t_.é\u2003", max_size=60), min_size=1, max_size=6)


def plain_shingles(text: str, code: bool, size: int) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", text) if code else text.split()
    if len(words) < size:
        return {tuple(words)} if words else set()
    return {tuple(words[i : i + size]) for i in range(len(words) - size + 1)}


@settings(max_examples=100, deadline=None)
@given(TEXTS, st.booleans(), st.integers(1, 5))
def test_shingle_sets_are_those_of_plain_python(texts: list[str], code: bool, size: int) -> None:
    is_code = np.full(len(texts), code)
    ours = shingle_sets(pa.array(texts), is_code, size)
    plain = [plain_shingles(text, code, size) for text in texts]
    for i, x in enumerate(ours):
        assert len(x) == len(plain[i])
        for j, y in enumerate(ours):
            assert len(np.intersect1d(x, y)) == len(plain[i] & plain[j])


def test_shingles_do_not_depend_on_the_batch() -> None:
    rng = random.Random(0)
    texts = [" ".join(rng.choices("abcdefgh", k=rng.randrange(30))) for _ in range(40)]
    is_code = np.array([i % 3 == 0 for i in range(40)])
    having, buckets = lsh(pa.array(texts), is_code, size=5, bands=14, rows=8)
    sliced = pa.array(["before", *texts]).slice(1)
    assert (lsh(sliced, is_code, size=5, bands=14, rows=8)[1] == buckets).all()
    for i, position in enumerate(having):
        one = lsh(pa.array([texts[position]]), is_code[position : position + 1], size=5, bands=14, rows=8)
        assert (one[1][0] == buckets[i]).all()


def test_signatures_estimate_the_similarity() -> None:
    rng = random.Random(1)
    words = [str(rng.random()) for _ in range(1000)]
    a, b = words[:900], words[100:]
    hashes = word_hashes(pa.array([" ".join(a), " ".join(b)]), np.array([False, False]))
    signature = signatures(shingle_hashes(hashes, 1), 1024)
    assert abs((signature[0] == signature[1]).mean() - 0.8) < 0.06


def test_bands_propose_texts_above_the_threshold() -> None:
    """14 bands of 8 rows meet at similarity 0.9 with probability 0.9996, at 0.3 with 0.001."""
    rng = random.Random(2)
    met_near = met_far = 0
    for _ in range(100):
        words = [str(rng.random()) for _ in range(400)]
        near, far = [*words[:380], *"abcdefghijklmnopqrst"], [*words[:190], *(str(rng.random()) for _ in range(210))]
        _, buckets = lsh(
            pa.array([" ".join(x) for x in (words, near, far)]), np.zeros(3, bool), size=1, bands=14, rows=8
        )
        met_near += bool((buckets[0] == buckets[1]).any())
        met_far += bool((buckets[0] == buckets[2]).any())
    assert met_near >= 98
    assert met_far <= 3


def test_buckets_are_the_same_in_another_process() -> None:
    code = (
        "import pyarrow as pa, numpy as np; from pipelines.dedup.shingles import lsh;"
        "print(lsh(pa.array(['one two three four five six']), np.zeros(1, bool), size=5, bands=2, rows=2)[1].tolist())"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1
    assert outputs != {""}
