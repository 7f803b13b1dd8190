"""train-tokenizer, tokenize and pack on a small lake: what reaches gold, editions, and second runs."""

from __future__ import annotations

import hashlib
import random
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from pipelines import lake as tables_of
from pipelines.errors import LakeError
from pipelines.pack.config import PackConfig
from pipelines.pack.sequences import TOKENS_A_GROUP, Edition
from pipelines.pack.stage import run as pack
from pipelines.tables import GOLD_SEQUENCES, GOLD_TOKENS, SILVER_DOCUMENTS, SILVER_DUPLICATES
from pipelines.tokenize.config import TokenizeConfig, TrainTokenizerConfig
from pipelines.tokenize.stage import run as tokenize
from pipelines.tokenize.train import run as train_tokenizer
from pipelines.tokenize.train import tokenizer_json

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

TRAIN = TrainTokenizerConfig(vocab_size=400)


def silver_documents() -> list[dict[str, Any]]:
    rng = random.Random(0)
    rows = []
    for i in range(60):
        text = " ".join(rng.choices(["lake", "moe", "<|endoftext|>", "12345", "naïve\n"], k=rng.randrange(1, 200)))
        rows.append(
            {
                "document_id": hashlib.sha256(str(i).encode()).hexdigest(),
                "source": "s",
                "source_id": str(i),
                "kind": "code" if i % 3 else "text",
                "text": text,
                "rejected_by": ["gopher_quality.min_words"] if i == 7 else [],
            }
        )
    return rows


def write(spark: SparkSession, lake: str, table: Any, rows: list[dict[str, Any]]) -> None:
    tables_of.ensure(spark, lake, table)
    schema = tables_of.spark_schema(table.schema)
    tables_of.sync(
        spark, lake, table, spark.createDataFrame([{**dict.fromkeys(schema.names), **r} for r in rows], schema)
    )


@pytest.mark.slow
def test_from_silver_to_sequences(spark: SparkSession, lake: str) -> None:
    rows = silver_documents()
    ids = [r["document_id"] for r in rows]
    write(spark, lake, SILVER_DOCUMENTS, rows)
    # 1 is kept before 2, and all of 10 to 29 are of one cluster's name but kept, to see where the split goes.
    cluster = [{"document_id": ids[i], "cluster_id": ids[1], "method": "near", "kept": i == 1} for i in (1, 2)]
    cluster += [{"document_id": ids[i], "cluster_id": "c", "method": "near", "kept": True} for i in range(10, 30)]
    write(spark, lake, SILVER_DUPLICATES, cluster)
    with pytest.raises(LakeError, match="no tokenizer"):
        tokenize(spark, lake, TokenizeConfig(), run_id="r")
    trained = train_tokenizer(spark, lake, TRAIN, run_id="r").counts
    assert trained["trained"] == 1
    found = train_tokenizer(spark, lake, TRAIN, run_id="r").counts
    assert found == {"trained": 0, "vocabulary": trained["vocabulary"]}

    made = tokenize(spark, lake, TokenizeConfig(validation_fraction=0.3), run_id="r")
    gold = {r["document_id"]: r for r in tables_of.read(spark, lake, GOLD_TOKENS).collect()}
    assert set(gold) == set(ids) - {ids[2], ids[7]}
    tokenizer = Tokenizer.from_str(tokenizer_json(lake, gold[ids[0]]["tokenizer_id"]))
    for row in rows:
        if row["document_id"] in gold:
            tokens = np.frombuffer(gold[row["document_id"]]["tokens"], "<u4")
            assert tokenizer.decode(tokens) == row["text"]
            assert tokens.min() >= 5
    assert len({gold[ids[i]]["split"] for i in range(10, 30)}) == 1
    assert {r["split"] for r in gold.values()} == {"train", "validation"}
    assert tokenize(spark, lake, TokenizeConfig(validation_fraction=0.3), run_id="r").outputs == made.outputs

    packed = pack(spark, lake, PackConfig(sequence_length=64, groups=2), run_id="r")
    tokens_in = sum(r["token_count"] + 1 for r in gold.values())
    assert packed.counts["tokens"] == tokens_in == made.counts["tokens"] + made.counts["documents"]
    assert pack(spark, lake, PackConfig(sequence_length=64, groups=2), run_id="r").outputs == packed.outputs
    assert packed.notes == ()
    [thin] = pack(spark, lake, PackConfig(sequence_length=4096, domain="source"), run_id="r").notes
    assert thin.startswith("The validation split is too thin for an evaluation (sequences: ")
    sequences = tables_of.read(spark, lake, GOLD_SEQUENCES).collect()
    short = [s for s in sequences if s["sequence_length"] == 64]
    assert len(short) == packed.counts["sequences"] < len(sequences)
    for s in short:
        assert {gold[d]["kind"] for d in s["document_ids"]} == {s["domain"]}
        assert {gold[d]["split"] for d in s["document_ids"]} == {s["split"]}
    # What they read is named, the tokenizer too, so that another tokenizer is another input.
    (tokenizer_id,) = {s["tokenizer_id"] for s in sequences}
    assert made.inputs.keys() == {SILVER_DOCUMENTS.name, SILVER_DUPLICATES.name, "tokenizer"}
    assert packed.inputs["tokenizer"] == made.inputs["tokenizer"] == int(tokenizer_id[:16], 16) // 2
    with pytest.raises(LakeError, match="is not there"):
        pack(spark, lake, PackConfig(tokenizer="0" * 64), run_id="r")


def test_groups_follow_the_tokens_where_the_setting_is_too_few(spark: SparkSession) -> None:
    sums = {"few": 64 * 128 + 1, "some": 10**6, "many": 100 * TOKENS_A_GROUP + 1}
    pieces = spark.createDataFrame(
        [("train", name, length) for name, length in sums.items()], "split string, domain string, length long"
    )
    edition = Edition(config=PackConfig(sequence_length=64, groups=8), tokenizer_id="t", end=0, pad=1)
    assert {row["domain"]: row["groups"] for row in edition.groups(pieces).collect()} == {
        "few": 2,
        "some": 8,
        "many": 101,
    }


def test_no_accepted_text_trains_nothing(spark: SparkSession, lake: str) -> None:
    write(spark, lake, SILVER_DOCUMENTS, silver_documents()[7:8])
    tables_of.ensure(spark, lake, SILVER_DUPLICATES)
    with pytest.raises(LakeError, match="no accepted text"):
        train_tokenizer(spark, lake, TRAIN, run_id="r")
