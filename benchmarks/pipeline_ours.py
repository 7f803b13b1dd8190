"""Our stages over a corpus, each measured: ingest, clean, dedup, tokenize and pack, in one Spark session.

The stages' own run functions, as `lakemoe pipeline` calls them. Two ways of setting them:

- ``equal`` does what datatrove is made to do: every record is prose, every signal is measured, no rule rejects, so that
  all but the duplicates is tokenized. What datatrove does not do stays in: language, licence, redaction, verification.
- ``default`` is what a user gets: code judged as code, the default rules, tokens of what is accepted only.

The tokenizer is given, since datatrove has to be given it too. ``functions`` measures instead, on one core and outside
Spark, what signals and MinHash signatures cost by themselves.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.json
from pydantic import BaseModel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.processes import Meter
from pipelines.batches import slices
from pipelines.clean.batch import text_signals
from pipelines.clean.config import CleanConfig
from pipelines.dedup.config import DedupConfig
from pipelines.dedup.shingles import lsh
from pipelines.ingest.config import IngestConfig, SourceConfig
from pipelines.pack.config import PackConfig
from pipelines.tables import LICENSE_CLASSES
from pipelines.tokenize.config import TokenizeConfig

if TYPE_CHECKING:
    from pipelines.lake import StageResult

BATCH = 512  # rows, as the pipeline's session makes them


def equal(corpus: Path) -> tuple[IngestConfig, CleanConfig]:
    """Settings under which every document takes the whole way."""
    ingest = IngestConfig(sources=tuple(SourceConfig(path=str(corpus / kind)) for kind in ("text", "code")))
    return ingest, CleanConfig(rules=(), admitted_licenses={"text": LICENSE_CLASSES, "code": LICENSE_CLASSES})


def default(corpus: Path) -> tuple[IngestConfig, CleanConfig]:
    """A user's settings: the records' kind is said once a source."""
    sources = (
        SourceConfig(path=str(corpus / "text"), kind="text"),
        SourceConfig(path=str(corpus / "code"), kind="code"),
    )
    return IngestConfig(sources=sources), CleanConfig()


SETTINGS: dict[str, Callable[[Path], tuple[IngestConfig, CleanConfig]]] = {"equal": equal, "default": default}


def run(settings: str, corpus: Path, tokenizer: Path, lake: Path, meter: Meter) -> None:
    """All stages into a new lake."""
    ingest, clean = SETTINGS[settings](corpus)
    with meter.stage("start"):
        # Imports and the JVM's start are this stage's cost.
        from tokenizers import Tokenizer

        from pipelines.clean import stage as clean_stage
        from pipelines.dedup import stage as dedup_stage
        from pipelines.ingest import stage as ingest_stage
        from pipelines.pack import stage as pack_stage
        from pipelines.session import spark_session
        from pipelines.tokenize import stage as tokenize_stage
        from pipelines.tokenize.train import save

        save(str(lake), Tokenizer.from_file(str(tokenizer)))
        spark = spark_session()
    steps: tuple[tuple[str, Callable[..., StageResult], BaseModel], ...] = (
        ("ingest", ingest_stage.run, ingest),
        ("clean", clean_stage.run, clean),
        ("dedup", dedup_stage.run, DedupConfig()),
        ("tokenize", tokenize_stage.run, TokenizeConfig()),
        ("pack", pack_stage.run, PackConfig()),
    )
    for name, stage, config in steps:
        with meter.stage(name) as counts:
            counts.update(stage(spark, str(lake), config, run_id="benchmark").counts)
    spark.stop()


def batches(corpus: Path) -> Iterator[pa.RecordBatch]:
    """The corpus as the stages' functions get it: Arrow batches of texts."""
    for path in sorted(corpus.glob("*/*.jsonl")):
        # A block holds whole lines: it must be larger than the longest.
        table = pyarrow.json.read_json(path, read_options=pyarrow.json.ReadOptions(block_size=1 << 26))
        yield from table.select(["text"]).combine_chunks().to_batches(max_chunksize=BATCH)


def functions(corpus: Path, meter: Meter) -> None:
    """Signals and signatures alone, every document as prose; reading is measured by itself."""
    with meter.stage("read alone") as counts:
        read = list(batches(corpus))
        counts["documents"] = sum(batch.num_rows for batch in read)
    with meter.stage("signals alone"):
        for batch in read:
            for part in slices(batch, "text"):
                text_signals(part["text"].to_pylist())
    config = DedupConfig()
    with meter.stage("signatures alone"):
        for batch in read:
            prose = np.zeros(batch.num_rows, bool)
            lsh(batch["text"], prose, size=config.shingle, bands=config.bands, rows=config.rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("settings", choices=(*SETTINGS, "functions"))
    parser.add_argument("corpus", type=Path)
    parser.add_argument("tokenizer", type=Path, help="a tokenizers JSON file")
    parser.add_argument("lake", type=Path, help="a new lake")
    parser.add_argument("out", type=Path, help="JSON file of the figures")
    asked = parser.parse_args()
    meter = Meter()
    if asked.settings == "functions":
        functions(asked.corpus, meter)
    else:
        run(asked.settings, asked.corpus, asked.tokenizer, asked.lake, meter)
    asked.out.write_text(json.dumps({"stages": [asdict(usage) for usage in meter.stages]}, indent=2) + "\n", "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
