"""Pieces: what a document is cut into for packing, and what stored sequences are made of.

A piece is whole, as long as a sequence, or it is a tail, the shorter rest of a document. A document has one tail at
most, and which sequence a tail lies in is all that packing decides: a whole piece is a sequence by itself.

Both ways give rows of PIECES. offset: the tokens before a whole piece in its document. A tail's is null: it follows
from the rest of its document, and a stored sequence does not tell it.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pyarrow as pa
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from pipelines.batches import Batches
from pipelines.pack.config import PackConfig
from pipelines.pack.fim import FillInTheMiddle
from pipelines.pack.packing import cut

PIECES = "document_id string, split string, domain string, offset int, length int, tokens binary"
_NAMES = ["document_id", "split", "domain", "offset", "length", "tokens"]
_TYPES = [pa.string(), pa.string(), pa.string(), pa.int32(), pa.int32(), pa.binary()]


def pieces_of_documents(
    tokens: DataFrame, config: PackConfig, end: int, fim: FillInTheMiddle | None = None
) -> DataFrame:
    """Rows of gold.tokens -> their pieces, closed by the end token; documents without tokens have none.

    In the mode ``concat`` a document is one piece, as long as it is: it is cut where a sequence happens to end.
    """
    documents = tokens.where("token_count > 0").select(
        "document_id", "split", F.col(config.domain).alias("domain"), "kind", "tokens"
    )
    return documents.mapInArrow(_cutter(config, end, fim), PIECES)


def _cutter(config: PackConfig, end: int, fim: FillInTheMiddle | None) -> Callable[[Batches], Batches]:
    def cut_batches(batches: Batches) -> Batches:
        for batch in batches:
            yield cut_documents(batch, config, end, fim)

    return cut_batches


def cut_documents(
    documents: pa.RecordBatch, config: PackConfig, end: int, fim: FillInTheMiddle | None = None
) -> pa.RecordBatch:
    """The pieces of documents, given with document_id, split, domain, tokens and, for fim, kind."""
    rows: list[tuple[object, ...]] = []
    for i, stored in enumerate(documents["tokens"]):
        known = [documents[name][i].as_py() for name in _NAMES[:3]]
        document = np.frombuffer(stored.as_buffer(), "<u4")
        # By the document alone, so that a tail is the same in every run; held-out text stays as it reads.
        if fim and known[1] == "train" and fim.applies(known[0], documents["kind"][i].as_py()):
            if config.mode == "concat":  # where it will be cut depends on what stands before it
                document = fim.rearrange(known[0], document)
            else:
                document = fim.rearrange_pieces(known[0], document, config.sequence_length)
        document = np.append(document, np.uint32(end))
        if config.mode == "concat":
            rows.append((*known, 0, len(document), document.tobytes()))
            continue
        for offset, length in cut(len(document), config.sequence_length):
            is_tail = length < config.sequence_length
            rows.append((*known, None if is_tail else offset, length, document[offset : offset + length].tobytes()))
    columns = zip(*rows, strict=True) if rows else [()] * len(_TYPES)
    return pa.RecordBatch.from_arrays([pa.array(c, t) for c, t in zip(columns, _TYPES, strict=True)], _NAMES)


def tails_of_sequences(sequences: DataFrame) -> DataFrame:
    """Rows of gold.sequences -> their tails, each with its sequence_id; sequences that are a whole piece have none."""
    start = "aggregate(slice(segment_lengths, 1, at), 0, (sum, n) -> sum + n)"
    return (
        sequences.where("segment_lengths[0] < sequence_length")
        .select("*", F.posexplode("document_ids").alias("at", "document_id"))
        .select(
            "sequence_id",
            "document_id",
            "split",
            "domain",
            F.lit(None).cast("int").alias("offset"),
            F.expr("segment_lengths[at]").alias("length"),
            F.expr(f"substring(tokens, 4 * {start} + 1, 4 * segment_lengths[at])").alias("tokens"),
        )
    )
