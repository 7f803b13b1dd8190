"""datatrove's stages over a corpus, each measured: read, filters, the four steps of MinHash, tokenization.

Runs in an environment of datatrove's own, which pipeline.py names: its dependencies are none of lakemoe's. ``shipped``
is datatrove as it comes: spaCy's English tokenizer splits words and its sentencizer sentences (``spacy.blank``, no
model is loaded). ``regex`` puts two regular expressions in their place: a word is a run of letters, digits and
underscores or one other mark, a sentence ends at a mark of its end.

Every stage sees every document: each filter judges each, and what it rejects goes on to MinHash and tokenization, as
ours keep rejected documents and measure every signal. The parameters are datatrove's own (5-word shingles, 14 buckets
of 8); as many tasks and workers as there are cores, as Spark has. Left out: PII, and language, which needs a download.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

os.environ["TOKENIZERS_PARALLELISM"] = "false"

from datatrove.data import Document, DocumentsPipeline
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.dedup import MinhashDedupBuckets, MinhashDedupCluster, MinhashDedupFilter, MinhashDedupSignature
from datatrove.pipeline.filters import (
    C4QualityFilter,
    FineWebQualityFilter,
    GopherQualityFilter,
    GopherRepetitionFilter,
)
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.tokens import DocumentTokenizer
from datatrove.utils import word_tokenizers
from datatrove.utils.stats import PipelineStats

from benchmarks.processes import Meter

WORKERS = os.cpu_count() or 2
BUCKETS = 14
_WORD = re.compile(r"\w+|[^\w\s]")
_SENTENCE = re.compile(r"\S[^.!?]*(?:[.!?]+|\Z)")


class RegexTokenizer(word_tokenizers.WordTokenizer):
    """What takes spaCy's place in the run ``regex``."""

    def word_tokenize(self, text: str) -> list[str]:
        return _WORD.findall(text)

    def sent_tokenize(self, text: str) -> list[str]:
        return _SENTENCE.findall(text)

    def span_tokenize(self, text: str) -> list[tuple[int, int]]:
        return [match.span() for match in _SENTENCE.finditer(text)]


class Judges(PipelineStep):
    """The filters, each over every document; what one rejects another still sees, and all go on as they came."""

    type, name = "filters", "every filter on everything"

    def __init__(self) -> None:
        super().__init__()
        self.filters = [GopherRepetitionFilter(), GopherQualityFilter(), C4QualityFilter(), FineWebQualityFilter()]

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        for document in data:
            text = document.text
            kept = True
            for judge in self.filters:
                verdict = judge.filter(document)
                document.text = text  # C4's filter cuts it
                if verdict is not True:
                    kept = False
                    self.stat_update(f"rejected.{type(judge).__name__}")
            self.stat_update("accepted" if kept else "rejected")
            yield document


class Count(PipelineStep):
    """Takes the documents in and counts them."""

    type, name = "count", "count"

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> None:
        for document in data:
            self.stat_update("documents")
            self.stat_update("bytes", value=len(document.text.encode()))


def run(corpus: Path, tokenizer: Path, folder: Path, meter: Meter) -> None:
    """All stages, from the corpus's JSONL to token files in the folder."""

    def stage(name: str, steps: list[Any], *, tasks: int = WORKERS) -> None:
        with meter.stage(name) as counts:
            # Forked workers inherit the tokenizer that was put in place.
            executor = LocalPipelineExecutor(
                pipeline=steps,
                tasks=tasks,
                workers=min(tasks, WORKERS),
                logging_dir=str(folder / "logs" / name),
                start_method="fork",
            )
            counts.update(_counts(executor.run()))

    def read() -> JsonlReader:
        return JsonlReader(str(corpus), recursive=True, glob_pattern="*/*.jsonl")

    stage("read", [read(), Count()])
    stage("filters", [read(), Judges(), Count()])
    signatures, pairs, remove = (str(folder / name) for name in ("signatures", "pairs", "remove"))
    stage("signatures", [read(), MinhashDedupSignature(signatures)])
    stage("buckets", [MinhashDedupBuckets(signatures, pairs)], tasks=BUCKETS)
    stage("clusters", [MinhashDedupCluster(pairs, remove)], tasks=1)
    stage("dedup filter", [read(), MinhashDedupFilter(remove), Count()])
    stage("tokenize", [read(), DocumentTokenizer(str(folder / "tokens"), str(tokenizer), eos_token="<|endoftext|>")])


def _counts(stats: PipelineStats) -> dict[str, int]:
    """The totals that the steps counted, whatever step it was."""
    return {
        key: int(value.total)
        for step in stats.stats
        for key, value in step.stats.items()
        if key in ("documents", "bytes", "accepted", "rejected", "to_remove", "tokens", "dropped")
        or key.startswith("rejected.")
    }


def use_regex() -> None:
    """Put RegexTokenizer in the place of every language's tokenizer, in this process and those that it forks."""
    replaced: Callable[..., Any] = lambda *_: RegexTokenizer()  # noqa: E731
    word_tokenizers.load_word_tokenizer = replaced
    from datatrove.pipeline.dedup import minhash

    minhash.load_word_tokenizer = replaced


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("splitter", choices=("shipped", "regex"))
    parser.add_argument("corpus", type=Path)
    parser.add_argument("tokenizer", type=Path, help="a tokenizers JSON file")
    parser.add_argument("folder", type=Path, help="an empty folder to write to")
    parser.add_argument("out", type=Path, help="JSON file of the figures")
    asked = parser.parse_args()
    if asked.splitter == "regex":
        use_regex()
    meter = Meter()
    run(asked.corpus, asked.tokenizer, asked.folder, meter)
    versions = {name: version(name) for name in ("datatrove", "spacy", "tokenizers", "numpy")}
    figures = {"stages": [asdict(usage) for usage in meter.stages], "versions": versions}
    asked.out.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
