"""Real tokens in one file, for the benchmarks that train: on a GPU's machine they need torch and numpy, and no text.

    python benchmarks/tokens.py                  # build/benchmarks/tokens.npz, 18 M tokens, 36 MB

The texts are `pipeline_corpus.py`'s originals, half prose and half code of the installed packages, each text once. A
byte-level BPE is trained on the first 4 MB; documents follow each other, each ended by one token. One document in forty
is held out, by its hash. Files that are nearly alike (licences, versions of a module) may lie on both sides, which
makes the held-out loss low and no comparison unfair.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

FILE = ROOT / "build" / "benchmarks" / "tokens.npz"
VOCABULARY = 8192
HELD_OUT = 40  # one document in so many
BYTES_A_TOKEN = 4.2  # at most, of this text and vocabulary; it came to less
_SAMPLE = 4_000_000  # characters that the tokenizer is trained on


class Tokens(NamedTuple):
    """uint16 streams of both splits, and the size of the vocabulary."""

    train: npt.NDArray[np.uint16]
    held_out: npt.NDArray[np.uint16]
    vocabulary: int


def read(path: Path = FILE) -> Tokens:
    """The file's tokens. SystemExit where there is none, with the command that makes it."""
    if not path.exists():
        raise SystemExit(f"There is no {path}; make it with python benchmarks/tokens.py, where lakemoe is installed.")
    with np.load(path) as file:
        return Tokens(file["train"], file["held_out"], int(file["vocabulary"]))


def make(path: Path, count: int) -> Tokens:
    """Write the file with this many tokens in all. SystemExit where this Python's packages hold too little text."""
    # Only here, so that reading needs numpy alone.
    from benchmarks.pipeline_corpus import MEGABYTE, CorpusConfig, build
    from pipelines.tables import END_OF_TEXT
    from pipelines.tokenize.train import train

    with tempfile.TemporaryDirectory() as folder:
        build(CorpusConfig(megabytes=count * BYTES_A_TOKEN / MEGABYTE, exact=0, near=0), Path(folder) / "corpus")
        files = sorted(Path(folder).glob("corpus/*/*.jsonl"))
        # dict: each text once, in order; by hash, so that prose and code come mixed.
        texts = list(dict.fromkeys(json.loads(line)["text"] for file in files for line in file.open(encoding="utf-8")))
    texts.sort(key=_digest)
    sample, size = [], 0
    for text in texts:
        if size >= _SAMPLE:
            break
        sample.append(text)
        size += len(text)
    tokenizer = train(sample, VOCABULARY)
    end = tokenizer.token_to_id(END_OF_TEXT)
    streams: dict[bool, list[npt.NDArray[np.uint16]]] = {False: [], True: []}
    left = count
    for at in range(0, len(texts), 256):
        if left <= 0:
            break
        part = texts[at : at + 256]
        for text, encoding in zip(part, tokenizer.encode_batch_fast(part, add_special_tokens=False), strict=True):
            ids = np.asarray([*encoding.ids, end], dtype=np.uint16)[: max(left, 0)]
            left -= len(ids)
            streams[int(_digest(text), 16) % HELD_OUT == 0].append(ids)
    if left > 0:
        raise SystemExit(f"The texts came to {left:,} tokens less than were asked for; ask for fewer.")
    tokens = Tokens(np.concatenate(streams[False]), np.concatenate(streams[True]), tokenizer.get_vocab_size())
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, train=tokens.train, held_out=tokens.held_out, vocabulary=tokens.vocabulary)
    return tokens


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=18_000_000, help="tokens in all (count; two bytes each)")
    parser.add_argument("--file", type=Path, default=FILE, help="file to write")
    asked = parser.parse_args()
    tokens = make(asked.file, asked.tokens)
    print(f"{asked.file}: {len(tokens.train):,} tokens to train on, {len(tokens.held_out):,} held out.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
