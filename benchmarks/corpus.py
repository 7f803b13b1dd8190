"""Real text and code from this machine, and a gold.sequences table made of it, for the benchmarks.

The texts are the quickstart's: the standard library's sources and the installed packages' documentation. Where more is
asked for than there is, they come again. What they are depends on what is installed; on one machine two calls give the
same. Tokens and sequences are made by the stages' own functions. Leaves out: cleaning, deduplication and Spark, which
neither the tokenizer nor the loader would notice, and a validation split.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow as pa
from deltalake import write_deltalake

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from jobs.quickstart import default_sources
from pipelines.ingest.listing import list_source
from pipelines.pack.config import PackConfig
from pipelines.pack.pieces import cut_documents
from pipelines.pack.sequences import Edition
from pipelines.tables import END_OF_TEXT, GOLD_SEQUENCES, PAD
from pipelines.tokenize.config import TrainTokenizerConfig
from pipelines.tokenize.stage import encode, plain_text_tokenizer
from pipelines.tokenize.train import save, train

MEGABYTE = 1_000_000
# What a vocabulary of this size is trained on: more text changes the merges little and the benchmark's length a lot.
SAMPLE = 4 * MEGABYTE


@dataclass(frozen=True, kw_only=True)
class Document:
    """One file. kind: text or code, as in gold.tokens; copy: 0 the first time that it comes, then 1, 2 ..."""

    name: str
    kind: str
    text: str
    copy: int = 0

    @property
    def document_id(self) -> str:
        return hashlib.sha256(f"{self.name} {self.copy}".encode()).hexdigest()


def documents(megabytes: float) -> list[Document]:
    """Documents of this much UTF-8 in all (10^6 bytes), the last one whole, in the order of their names' hashes."""
    once = _read()
    sizes = [len(document.text.encode()) for document in once]
    found: list[Document] = []
    size = 0
    while size < megabytes * MEGABYTE:
        number = len(found)
        found.append(replace(once[number % len(once)], copy=number // len(once)))
        size += sizes[number % len(once)]
    return found


def _read() -> list[Document]:
    """All of the quickstart's files that are UTF-8 and not empty. The order by hash mixes text and code evenly."""
    read: list[Document] = []
    for index, source in enumerate(default_sources()):
        for entry in list_source(index, source.resolved()).entries:
            if entry.problem is not None:
                continue
            try:
                text = Path(os.fsdecode(entry.raw_path)).read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError):
                continue
            if text:
                read.append(Document(name=f"{source.name}/{entry.relative}", kind=source.kind or "code", text=text))
    if not read:
        raise SystemExit("This Python has neither standard library sources nor package documentation to run on.")
    return sorted(read, key=lambda document: document.document_id)


def tokenizer_json(texts: list[Document]) -> str:
    """A byte-level BPE of train-tokenizer's default vocabulary, trained on the first of the documents."""
    size, sample = 0, []
    for document in texts:
        if size >= SAMPLE:
            break
        sample.append(document.text)
        size += len(document.text)
    return str(train(sample, TrainTokenizerConfig().vocab_size).to_str(pretty=False))


def write_sequences(lake: Path, megabytes: float, *, sequence_length: int, files: int, multiple: int) -> None:
    """A lake with one edition of gold.sequences, all of it split train, in at most this many files.

    megabytes: of UTF-8 that becomes sequences (10^6 bytes); a token is about 3.5 bytes of it and 4 bytes of a sequence.
    multiple: the sequences of a file are a multiple of it, the few beyond are left out. Raises SystemExit where too
    little text was asked for to fill one file.
    """
    texts = documents(megabytes)
    tokenizer = plain_text_tokenizer(tokenizer_json(texts))
    tokenizer_id = save(str(lake), tokenizer)
    end, pad = tokenizer.token_to_id(END_OF_TEXT), tokenizer.token_to_id(PAD)
    assert end is not None  # train() puts both in
    assert pad is not None
    config = PackConfig(sequence_length=sequence_length)
    edition = Edition(config=config, tokenizer_id=tokenizer_id, end=end, pad=pad)
    # What comes again is encoded once.
    first = [document for document in texts if document.copy == 0]
    tokens, _ = encode(tokenizer, pa.array([document.text for document in first]))
    tokens_of = dict(zip((document.name for document in first), tokens, strict=True))
    written = 0
    # A part is packed and written as a hash group is: the documents of a group become the rows of one file.
    for part in (texts[number::files] for number in range(files)):
        rows: list[pa.RecordBatch] = []
        for kind in sorted({document.kind for document in part}):
            of_kind = [document for document in part if document.kind == kind]
            ids = [document.document_id for document in of_kind]
            values = pa.array([tokens_of[document.name].as_py() for document in of_kind], pa.binary())
            same = {"split": ["train"] * len(ids), "domain": [kind] * len(ids)}
            pieces = cut_documents(pa.record_batch({"document_id": ids, **same, "tokens": values}), config, end)
            drawn = pa.table(pieces).append_column("draw", pieces["document_id"])
            rows.extend(edition.sequences("train", kind, drawn))
        sequences = pa.Table.from_batches(rows, GOLD_SEQUENCES.schema)
        count = len(sequences) - len(sequences) % multiple
        if not count:
            continue
        write_deltalake(
            GOLD_SEQUENCES.uri(str(lake)),
            sequences.slice(0, count),
            partition_by=list(GOLD_SEQUENCES.partition_by),
            configuration=None if written else GOLD_SEQUENCES.table_properties,
            mode="append" if written else "error",
        )
        written += count
    if not written:
        raise SystemExit(
            f"{megabytes:g} MB of text in {files} files are no {multiple} sequences of {sequence_length} tokens each; "
            "ask for more text, or for fewer files or shorter sequences."
        )


def batches(texts: list[Document], rows: int = 512) -> list[pa.RecordBatch]:
    """The documents as Arrow batches of at most so many rows, 512 as the pipeline's Spark session makes them."""
    parts = [texts[at : at + rows] for at in range(0, len(texts), rows)]
    return [
        pa.record_batch({"document_id": [d.document_id for d in part], "text": [d.text for d in part]})
        for part in parts
    ]


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Write a lake with gold.sequences of this machine's text and code.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("lake", type=Path, help="folder to write, which must not hold gold.sequences yet")
    parser.add_argument("--megabytes", type=float, default=20, help="text that becomes sequences (10^6 bytes of UTF-8)")
    parser.add_argument("--sequence-length", type=int, default=2048, help="length of a sequence (tokens)")
    parser.add_argument("--files", type=int, default=4, help="files of the table, at most (count)")
    asked = parser.parse_args()
    if Path(GOLD_SEQUENCES.uri(str(asked.lake))).exists():
        parser.error(f"{asked.lake} holds gold.sequences already; name another folder.")
    write_sequences(asked.lake, asked.megabytes, sequence_length=asked.sequence_length, files=asked.files, multiple=1)
    print(f"{GOLD_SEQUENCES.name} is in {asked.lake}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
