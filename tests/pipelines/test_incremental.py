"""One run over everything and many runs over changes end in the same tables, whatever the history.

A lake that follows random changes (added, changed, erased documents, runs that die between two commits) is compared
after each of them with one that sees its present documents for the first time.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pyspark.sql import SparkSession

from pipelines import lake as lakes
from pipelines.clean import stage as clean
from pipelines.clean.config import CleanConfig
from pipelines.decontaminate import stage as decontaminate
from pipelines.decontaminate.config import DecontaminateConfig
from pipelines.dedup import stage as dedup
from pipelines.dedup.config import DedupConfig
from pipelines.lake import StageResult
from pipelines.pack import stage as pack
from pipelines.pack.config import PackConfig
from pipelines.tables import (
    BRONZE_DOCUMENTS,
    GOLD_SEQUENCES,
    GOLD_TOKENS,
    SILVER_DOCUMENTS,
    SILVER_DUPLICATES,
    SILVER_MINHASH,
    Table,
)
from pipelines.tokenize import stage as tokenize
from pipelines.tokenize import train as tokenizers
from pipelines.tokenize.config import TokenizeConfig

LENGTH = 64
RULE = {"name": "gopher_quality.min_words", "signal": "words", "kind": "text", "min": 30}
STAGES: dict[str, tuple[Any, Any]] = {
    "clean": (clean.run, CleanConfig.model_validate({"rules": [RULE]})),
    "decontaminate": (decontaminate.run, DecontaminateConfig()),  # its folder of evaluation sets: Follower
    "dedup": (dedup.run, DedupConfig(source_priority=("first",))),
    "tokenize": (tokenize.run, TokenizeConfig(validation_fraction=0.3)),
    "pack": (pack.run, PackConfig(sequence_length=LENGTH, groups=2)),
}
WORDS = [hashlib.sha256(str(i).encode()).hexdigest()[: 3 + i % 6] for i in range(400)]
Documents = dict[str, dict[str, Any]]


def document(rng: random.Random) -> dict[str, Any]:
    """One of a few texts, as it is or with a word or two changed, so that copies and near copies abound; some short."""
    base = random.Random(rng.randrange(6))
    words = base.choices(WORDS, k=rng.choice([20, 120, 120, 120]))
    for _ in range(rng.choice([0, 0, 1, 2, 30])):
        words[rng.randrange(len(words))] = rng.choice(WORDS)
    kind = "code" if base.random() < 0.3 else "text"
    return {"source": rng.choice(["first", "second"]), "kind": kind, "content": " ".join(words)}


def evaluation_sets(folder: Path) -> Path:
    """A folder with one set, whose item is the middle of one of the few texts."""
    base = random.Random(2)
    words = base.choices(WORDS, k=120)
    folder.mkdir()
    (folder / "leaked.jsonl").write_text(json.dumps({"text": " ".join(words[40:70])}) + "\n", encoding="utf-8")
    return folder


def identified(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def changed(rng: random.Random, documents: Documents, step: int) -> Documents:
    """Some documents erased, some changed, some added, some gone and come again."""
    after = dict(documents)
    for name in sorted(documents):
        fate = rng.random()
        if fate < 0.12:
            del after[name]
        elif fate < 0.24:
            after[name] = document(rng)
    for i in range(rng.randrange(1, 8)):
        after[identified(f"{step} {i}")] = document(rng)
    if rng.random() < 0.5:
        after[identified("0 0")] = document(rng)
    return after


def write_bronze(spark: SparkSession, lake: str, documents: Documents) -> None:
    schema = lakes.spark_schema(BRONZE_DOCUMENTS.schema)
    rows = [
        {
            **dict.fromkeys(schema.names),
            "document_id": key,
            "source_id": f"{key}.txt",
            "content_sha256": hashlib.sha256(value["content"].encode()).hexdigest(),
            **value,
        }
        for key, value in documents.items()
    ]
    lakes.ensure(spark, lake, BRONZE_DOCUMENTS)
    lakes.sync(spark, lake, BRONZE_DOCUMENTS, spark.createDataFrame(rows, schema))


class Follower:
    """A lake whose stages go on from what they saw last, and sometimes die on the way and are run again."""

    def __init__(self, spark: SparkSession, lake: str, sets: Path) -> None:
        self.spark, self.lake = spark, lake
        self.sets = DecontaminateConfig(sets=str(sets))
        self.seen: dict[str, dict[str, int]] = {}

    def run(self, documents: Documents, monkeypatch: pytest.MonkeyPatch | None = None) -> dict[str, StageResult]:
        write_bronze(self.spark, self.lake, documents)
        results = {}
        for name, (stage, config) in (STAGES | {"decontaminate": (decontaminate.run, self.sets)}).items():
            if monkeypatch:
                with monkeypatch.context() as patch:
                    patch.setattr(lakes, "version", dies_after(name))
                    with pytest.raises(OSError, match="killed"):
                        stage(self.spark, self.lake, config, run_id="killed", since=self.seen.get(name))
            result = stage(self.spark, self.lake, config, run_id="r", since=self.seen.get(name))
            self.seen[name] = result.inputs
            results[name] = result
        return results


def dies_after(stage: str) -> Any:
    """``lake.version``, which a sync asks right after its commit, that raises when asked for a table of the stage's."""
    real = lakes.version
    alive = 1 if stage == "decontaminate" else 0  # it asks for the version that it reads first
    written = {
        "clean": SILVER_DOCUMENTS,
        "decontaminate": SILVER_DOCUMENTS,
        "dedup": SILVER_MINHASH,
        "tokenize": GOLD_TOKENS,
        "pack": GOLD_SEQUENCES,
    }

    def version(spark: SparkSession, lake: str, table: Table) -> int | None:
        nonlocal alive
        if table is written[stage]:
            alive -= 1
            if alive < 0:
                raise OSError("killed")
        return real(spark, lake, table)

    return version


def rows(spark: SparkSession, lake: str, table: Table, *left_out: str) -> Iterator[tuple[Any, ...]]:
    names = [n for n in table.schema.names if n not in ("run_id", *left_out)]
    yield from sorted(tuple(map(repr, row)) for row in lakes.read(spark, lake, table).select(*names).collect())


def verdicts(spark: SparkSession, lake: str) -> Iterator[tuple[Any, ...]]:
    return rows(spark, lake, SILVER_DOCUMENTS, *(n for n in SILVER_DOCUMENTS.schema.names if n != "rejected_by"))


def encoded(spark: SparkSession, lake: str) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """By document what its sequences depend on."""
    for row in lakes.read(spark, lake, GOLD_TOKENS).collect():
        yield row["document_id"], (row["split"], row["kind"], bytes(row["tokens"]))


def clusters(spark: SparkSession, lake: str) -> set[frozenset[str]]:
    found: dict[str, set[str]] = {}
    for row in lakes.read(spark, lake, SILVER_DUPLICATES).collect():
        found.setdefault(row["cluster_id"], set()).add(row["document_id"])
    return {frozenset(members) for members in found.values()}


def check_sequences(spark: SparkSession, lake: str, end: int) -> dict[str, list[str]]:
    """Every document's tokens are in the sequences, once; returns the sequences' documents by their ids."""
    tokens = {row["document_id"]: row for row in lakes.read(spark, lake, GOLD_TOKENS).collect()}
    pieces: dict[str, list[list[int]]] = {}
    held = {}
    for row in lakes.read(spark, lake, GOLD_SEQUENCES).collect():
        values = np.frombuffer(row["tokens"], "<u4").tolist()
        held[row["sequence_id"]] = row["document_ids"]
        for key, length in zip(row["document_ids"], row["segment_lengths"], strict=False):
            pieces.setdefault(key, []).append(values[:length])
            values = values[length:]
            assert (tokens[key]["split"], tokens[key]["kind"]) == (row["split"], row["domain"])
    assert pieces.keys() == tokens.keys()
    for key, parts in pieces.items():
        expected = [*np.frombuffer(tokens[key]["tokens"], "<u4").tolist(), end]
        cut = [expected[at : at + LENGTH] for at in range(0, len(expected), LENGTH)]
        assert sorted(parts) == sorted(cut)
    return held


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0])
def test_any_history_ends_as_one_run_does(
    spark: SparkSession, lake: str, seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(seed)
    sets = evaluation_sets(tmp_path / "sets")
    documents: Documents = {identified(f"0 {i}"): document(rng) for i in range(30)}
    follower = Follower(spark, lake, sets)
    tokenizer = tokenizers.train([d["content"] for d in documents.values()], 400)
    tokenizers.save(lake, tokenizer)
    end = tokenizer.token_to_id("<|endoftext|>")
    names: dict[frozenset[str], str] = {}
    for step in range(1, 4):
        before = check_sequences(spark, lake, end) if step > 1 else {}
        old = dict(encoded(spark, lake)) if step > 1 else {}
        results = follower.run(documents, monkeypatch if step == 2 else None)
        fresh = f"{lake}-{step}"
        tokenizers.save(fresh, tokenizer)
        Follower(spark, fresh, sets).run(documents)

        for table in (SILVER_DOCUMENTS, SILVER_MINHASH):
            assert list(rows(spark, lake, table)) == list(rows(spark, fresh, table))
        assert any("contaminated:leaked" in row[-1] for row in verdicts(spark, lake))
        assert clusters(spark, lake) == clusters(spark, fresh)
        for table, history in ((SILVER_DUPLICATES, "cluster_id"), (GOLD_TOKENS, "split")):
            assert list(rows(spark, lake, table, history)) == list(rows(spark, fresh, table, history))
        names = named_as_before(spark, lake, names)
        # Sequences whose documents are as they were have stayed.
        after = check_sequences(spark, lake, end)
        new = dict(encoded(spark, lake))
        same = {key for key in old if new.get(key) == old[key]}
        for sequence, held in before.items():
            assert (sequence in after) == all(key in same for key in held)
        if step > 1:
            assert results["dedup"].counts["documents_looked_at"] < len(documents) or len(documents) < 12
        again = follower.run(documents)
        before_again = {n: v for result in results.values() for n, v in result.outputs.items()}  # by the last writer
        assert {n: v for result in again.values() for n, v in result.outputs.items()} == before_again
        assert again["clean"].outputs == results["decontaminate"].outputs
        documents = changed(rng, documents, step)


def named_as_before(spark: SparkSession, lake: str, before: dict[frozenset[str], str]) -> dict[frozenset[str], str]:
    """A cluster's id is its own: no other cluster's, and none of another cluster's members."""
    duplicates = lakes.read(spark, lake, SILVER_DUPLICATES).collect()
    cluster_of = {row["document_id"]: row["cluster_id"] for row in duplicates}
    for row in duplicates:
        assert cluster_of.get(row["cluster_id"], row["cluster_id"]) == row["cluster_id"]
    now = {frozenset(k for k, c in cluster_of.items() if c == name): name for name in set(cluster_of.values())}
    for members, name in before.items():
        if members in now:
            assert now[members] <= name or now[members] == min(members)
    return now
