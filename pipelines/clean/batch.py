"""The clean stage's one pass over text: Arrow batches of bronze documents in, silver rows without verdicts out.

Order: normalise, language, signals, redaction; so the signals are those of the text as it was written. Documents are
taken in slices of a bounded number of bytes, which bounds memory and makes no difference to the result.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.batches import slices
from pipelines.clean import c4, code, fineweb, gopher
from pipelines.clean.config import CleanConfig
from pipelines.clean.language import language
from pipelines.clean.licenses import license_class, of_license_text, spdx_tag
from pipelines.clean.normalise import normalise
from pipelines.clean.redact import redact
from pipelines.clean.words import Floats, index_words
from pipelines.ingest.languages import code_language
from pipelines.tables import SIGNALS, SILVER_DOCUMENTS

SIGNAL_NAMES = tuple(SIGNALS.field(i).name for i in range(SIGNALS.num_fields))
OUTPUT = pa.schema([f for f in SILVER_DOCUMENTS.schema if f.name not in ("rejected_by", "run_id")])
LICENSE_OUTPUT = pa.schema([(name, pa.string()) for name in ("source", "directory", "license")])


def text_signals(texts: list[str]) -> dict[str, Floats]:
    """The signals of D prose texts by name, each [D]; NaN where not measured."""
    words = index_words(texts)
    return {
        **gopher.quality(texts, words),
        **gopher.repetition(texts, words),
        **c4.signals(texts),
        **fineweb.signals(texts, words),
    }


def clean_rows(rows: dict[str, list[Any]], config: CleanConfig) -> dict[str, Any]:
    """The silver columns, verdicts excepted, of D bronze rows given by column; ``license_nearest`` may be null."""
    kinds: list[str] = rows["kind"]
    texts = [normalise(t, k) for t, k in zip(rows["content"], kinds, strict=True)]
    prose = [i for i, kind in enumerate(kinds) if kind == "text"]
    signals = {name: np.full(len(texts), np.nan) for name in SIGNAL_NAMES}
    if prose:
        for name, values in text_signals([texts[i] for i in prose]).items():
            signals[name][prose] = values
    out: dict[str, list[Any]] = {name: [None] * len(texts) for name in OUTPUT.names}
    for name in ("document_id", "source", "source_id", "kind", "content_sha256"):
        out[name] = rows[name]
    for i, text in enumerate(texts):
        is_code = kinds[i] == "code"
        if is_code:
            declared = rows["language_declared"][i]
            by_name = code_language(rows["source_id"][i], text[:256]) or (declared.lower() if declared else None)
            out["code_language"][i] = by_name
            for signal, value in code.signals(text, rows["source_id"][i], by_name).items():
                signals[signal][i] = value
        else:
            out["language"][i], out["language_score"][i] = language(text)
            signals["bad_words"][i] = c4.bad_words(text, out["language"][i], config.bad_words)
        found = spdx_tag(text) or rows["license_nearest"][i] or rows["license_declared"][i]
        out["license"][i] = found
        out["license_class"][i] = license_class(found, config.license_classes)
        redacted, counts = redact(text, code=is_code, types=config.redact)
        out["text"][i] = redacted
        out["redactions"][i] = list(counts.items())
        out["text_sha256"][i] = hashlib.sha256(redacted.encode()).hexdigest()
    columns: dict[str, Any] = dict(out)
    columns["signals"] = pa.StructArray.from_arrays(
        [pa.array(signals[name], pa.float64(), mask=np.isnan(signals[name])) for name in SIGNAL_NAMES],
        fields=[SIGNALS.field(i) for i in range(SIGNALS.num_fields)],
    )
    return columns


def clean_batches(batches: Iterable[pa.RecordBatch], config: CleanConfig) -> Iterator[pa.RecordBatch]:
    """The mapInArrow function of the stage: bronze columns and ``license_nearest`` in, OUTPUT out."""
    for batch in batches:
        for part in slices(batch, "content"):
            columns = clean_rows(part.to_pydict(), config)
            arrays = [
                columns[f.name] if isinstance(columns[f.name], pa.Array) else pa.array(columns[f.name], f.type)
                for f in OUTPUT
            ]
            yield pa.RecordBatch.from_arrays(arrays, schema=OUTPUT)


def license_batches(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """The mapInArrow function over LICENSE files alone: (source, source_id, content) in, LICENSE_OUTPUT out."""
    for batch in batches:
        rows = batch.to_pydict()
        yield pa.RecordBatch.from_pydict(
            {
                "source": rows["source"],
                "directory": [source_id.rpartition("/")[0] for source_id in rows["source_id"]],
                "license": [of_license_text(content) for content in rows["content"]],
            },
            schema=LICENSE_OUTPUT,
        )


def cleaner(config: CleanConfig) -> partial[Iterator[pa.RecordBatch]]:
    """``clean_batches`` with its configuration, to hand to mapInArrow."""
    return partial(clean_batches, config=config)
