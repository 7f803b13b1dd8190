"""A lake's tables -> the figures of its report, every one of them counted by Spark SQL.

Tables are read at the versions that they have at the start, so that the figures agree with each other while another
job writes. What comes to the driver is sums, bins, the first few of a list, and the beginnings of a few samples.
"""

from __future__ import annotations

from typing import TypeVar

from pyspark.sql import Column, DataFrame, Row, SparkSession, Window
from pyspark.sql import functions as F
from tokenizers import Tokenizer as TokenizerFile

from pipelines.errors import LakeError
from pipelines.report import facts
from pipelines.report.histograms import bounds_of, histograms, signals_in_long_form
from pipelines.report.lineage import MOST_ROWS, Lake, last_runs, rules_that_judged, table_states
from pipelines.report.samples import samples
from pipelines.tables import (
    BRONZE_DOCUMENTS,
    BRONZE_QUARANTINE,
    GOLD_SEQUENCES,
    GOLD_TOKENS,
    KINDS,
    OPS_ERASURES,
    SILVER_DOCUMENTS,
    SILVER_DUPLICATES,
)
from pipelines.tokenize.train import default_tokenizer, tokenizer_json

TOP = 25
MOST_SOURCES = 50
MOST_DOMAINS = 40  # of an edition and a split; the others are one
OTHER_DOMAINS = "(other domains)"
T = TypeVar("T")


def figures(spark: SparkSession, uri: str) -> facts.Figures:
    """Count everything that the report shows.

    Raises LakeError (exit code 2) where nothing was ever ingested.
    """
    lake = Lake(spark, uri)
    bronze, quarantine = lake.read(BRONZE_DOCUMENTS), lake.read(BRONZE_QUARANTINE)
    if bronze is None or (bronze.isEmpty() and (quarantine is None or quarantine.isEmpty())):
        raise LakeError(
            f"There is nothing to report on in {uri}: run lakemoe ingest --source PATH --lake {uri} first, "
            "or name another --lake.",
            2,
        )
    judged, rules, recorded = _documents(lake), *rules_that_judged(lake)
    tokenizer, tokens = _edition(lake)
    ingested = bronze.groupBy("source", "kind").agg(
        F.count("*").alias("documents"), F.sum(F.length("content")).alias("characters")
    )
    counted_tokens = None if tokens is None else _counted_tokens(tokens)
    cached = [frame.persist() for frame in (judged, ingested, counted_tokens) if frame is not None]
    try:
        signals = signals_in_long_form(judged, rules) if judged is not None and rules else None
        quality, flags = histograms(signals, bounds_of(rules)) if signals is not None else ((), ())
        sources = _sources(ingested, quarantine, judged, counted_tokens).persist()
        cached.append(sources)
        sequences = _sequences(lake, tokenizer)
        shown, clusters = samples(lake, judged) if judged is not None else ((), ())
        per_length = sorted({row.sequence_length for row in sequences or ()})
        return facts.Figures(
            lake=uri,
            tables=table_states(lake),
            runs=last_runs(lake),
            funnel=_funnel(ingested, judged, has_duplicates=SILVER_DUPLICATES.name in lake.versions),
            quarantine=_quarantined(quarantine),
            sources=_listed(
                sources.orderBy(F.desc("documents"), F.desc("quarantined"), "name"), facts.Source, MOST_SOURCES
            ),
            source_count=sources.count(),
            rules=rules,
            rules_recorded=recorded,
            rejections=None if judged is None else _rejections(judged),
            languages=_shares(judged, "language", kind="text"),
            code_languages=_shares(judged, "code_language", kind="code"),
            license_classes=_shares(judged, "license_class"),
            licenses=_shares(judged, "license"),
            histograms=quality,
            flags=flags,
            duplicates=_duplicates(lake),
            clusters=clusters,
            samples=shown,
            erasures=_erasures(lake),
            tokenizer=tokenizer,
            tokens=None if counted_tokens is None else _tokens(counted_tokens),
            lengths=() if tokens is None else _lengths(tokens, per_length),
            sequences=sequences,
            longer={} if tokens is None else _longer(tokens, per_length),
        )
    finally:
        for frame in cached:
            frame.unpersist()


def _listed(frame: DataFrame, shape: type[T], limit: int) -> tuple[T, ...]:
    """The first rows as dataclasses whose fields are the columns."""
    return tuple(shape(**row.asDict()) for row in frame.head(limit))


def _total(value: Column) -> Column:
    """A sum that is 0 over nothing."""
    return F.coalesce(F.sum(value), F.lit(0))


def _one(frame: DataFrame) -> Row:
    row = frame.head()
    assert row is not None
    return row


def _documents(lake: Lake) -> DataFrame | None:
    """silver.documents without its texts, and whether each is accepted and kept (without dedup: all accepted ones)."""
    silver = lake.read(SILVER_DOCUMENTS)
    if silver is None:
        return None
    columns = ("document_id", "source", "kind", "language", "code_language", "license", "license_class", "signals")
    narrow = silver.select(
        *columns,
        "rejected_by",
        F.length("text").alias("characters"),
        (F.size("rejected_by") == 0).alias("accepted"),
    )
    duplicates = lake.read(SILVER_DUPLICATES)
    if duplicates is None:
        return narrow.withColumn("kept", F.col("accepted"))
    stands = duplicates.select("document_id", F.col("kept").alias("stands"))
    joined = narrow.join(stands, "document_id", "left")
    return joined.withColumn("kept", F.expr("accepted AND coalesce(stands, true)")).drop("stands")


def _funnel(ingested: DataFrame, judged: DataFrame | None, *, has_duplicates: bool) -> tuple[facts.Stage, ...]:
    whole = ingested.groupBy("kind").agg(F.sum("documents"), F.sum("characters"))
    stages = [_stage("documents", {kind: (n, characters) for kind, n, characters in whole.head(len(KINDS))})]
    if judged is None:
        return tuple(stages)
    sums: list[Column] = []
    for condition in ("NOT accepted", "accepted", "accepted AND NOT kept", "kept"):
        chosen = F.expr(condition)
        sums += [F.count_if(chosen), _total(F.when(chosen, F.col("characters")))]
    rows = {row[0]: row[1:] for row in judged.groupBy("kind").agg(*sums).head(len(KINDS))}
    names = ("rejected", "accepted", "duplicates", "kept") if has_duplicates else ("rejected", "accepted")
    stages += [_stage(n, {k: (row[2 * i], row[2 * i + 1]) for k, row in rows.items()}) for i, n in enumerate(names)]
    return tuple(stages)


def _stage(name: str, by_kind: dict[str, tuple[int, int]]) -> facts.Stage:
    known = {kind: by_kind.get(kind, (0, 0)) for kind in KINDS}
    return facts.Stage(
        name=name,
        documents={kind: int(n) for kind, (n, _) in known.items()},
        characters={kind: int(c or 0) for kind, (_, c) in known.items()},
    )


def _quarantined(quarantine: DataFrame | None) -> tuple[facts.Count, ...]:
    if quarantine is None:
        return ()
    reasons = quarantine.groupBy(F.col("reason").alias("name")).agg(F.count("*").alias("count"))
    return _listed(reasons.orderBy(F.desc("count"), "name"), facts.Count, MOST_ROWS)


def _rejections(judged: DataFrame) -> tuple[facts.Rejection, ...]:
    each = judged.select(F.explode("rejected_by").alias("rule"), (F.size("rejected_by") == 1).alias("only"))
    rules = each.groupBy("rule").agg(F.count("*").alias("documents"), F.count_if("only").alias("alone"))
    return _listed(rules.orderBy(F.desc("documents"), "rule"), facts.Rejection, MOST_ROWS)


def _shares(judged: DataFrame | None, column: str, *, kind: str | None = None) -> tuple[facts.Share, ...] | None:
    """The most common values of a column, of the documents of a kind or of all."""
    if judged is None:
        return None
    chosen = judged if kind is None else judged.where(F.col("kind") == kind)
    values = chosen.groupBy(F.col(column).alias("name")).agg(
        F.count("*").alias("documents"), F.count_if("accepted").alias("accepted"), F.count_if("kept").alias("kept")
    )
    return _listed(values.orderBy(F.desc("documents"), "name"), facts.Share, TOP)


def _sources(
    ingested: DataFrame, quarantine: DataFrame | None, judged: DataFrame | None, tokens: DataFrame | None
) -> DataFrame:
    """One row a source, in the columns of facts.Source. A source whose records are all in quarantine is one too."""
    rows = ingested.groupBy("source").agg(F.sum("documents").alias("documents"))
    parts = {
        "quarantined": None if quarantine is None else (quarantine, F.count("*")),
        "accepted": None if judged is None else (judged, F.count_if("accepted")),
        "kept": None if judged is None else (judged, F.count_if("kept")),
        "tokens": None if tokens is None else (tokens, _total(F.col("tokens"))),
    }
    for name, part in parts.items():
        if part is not None:
            rows = rows.join(part[0].groupBy("source").agg(part[1].alias(name)), "source", "full_outer")
    known = [name for name, part in parts.items() if part is not None or name == "quarantined"]
    columns = [
        F.coalesce(name, F.lit(0)).alias(name) if name in rows.columns else F.lit(0).alias(name) for name in known
    ]
    absent = [F.lit(None).cast("bigint").alias(name) for name in parts if name not in known]
    return rows.select(
        F.col("source").alias("name"), F.coalesce("documents", F.lit(0)).alias("documents"), *columns, *absent
    )


def _duplicates(lake: Lake) -> facts.Duplicates | None:
    duplicates = lake.read(SILVER_DUPLICATES)
    if duplicates is None:
        return None
    clusters = duplicates.groupBy("cluster_id").agg(
        F.count("*").alias("members"), F.count_if(F.col("method") == "exact").alias("exact")
    )
    row = _one(
        clusters.agg(
            F.count("*").alias("clusters"),
            _total(F.col("exact")).alias("exact"),
            _total(F.col("members") - F.col("exact")).alias("near"),
            F.coalesce(F.max("members"), F.lit(0)).alias("largest"),
        )
    )
    return facts.Duplicates(**row.asDict())


def _erasures(lake: Lake) -> tuple[facts.Erasure, ...]:
    erasures = lake.read(OPS_ERASURES)
    if erasures is None:
        return ()
    by_reason = erasures.groupBy("reason").agg(
        F.count("*").alias("documents"),
        F.count_if(F.col("completed_at").isNull()).alias("open"),
        F.max("requested_at").alias("last_requested_at"),
    )
    return _listed(by_reason.orderBy(F.desc("last_requested_at"), "reason"), facts.Erasure, MOST_ROWS)


def _edition(lake: Lake) -> tuple[facts.Tokenizer | None, DataFrame | None]:
    """The edition of gold.tokens that the report is about: the lake's own tokenizer's, else the largest."""
    tokens, own, ids = lake.read(GOLD_TOKENS), default_tokenizer(lake.uri), []
    if tokens is not None:
        editions = tokens.groupBy("tokenizer_id").agg(F.sum("token_count").alias("n"))
        ids = [row[0] for row in editions.orderBy(F.desc("n"), "tokenizer_id").head(MOST_ROWS)]
    chosen = own if own in ids or not ids else ids[0]
    if chosen is None:
        return None, None
    try:
        vocabulary = TokenizerFile.from_str(tokenizer_json(lake.uri, chosen)).get_vocab_size()
    except LakeError:
        vocabulary = None
    of_edition = None if tokens is None else tokens.where(F.col("tokenizer_id") == chosen)
    return facts.Tokenizer(tokenizer_id=chosen, vocabulary=vocabulary, editions=len(ids)), of_edition


def _counted_tokens(tokens: DataFrame) -> DataFrame:
    return tokens.groupBy("source", "split", "kind").agg(
        F.count("*").alias("documents"), F.sum("token_count").alias("tokens")
    )


def _tokens(counted: DataFrame) -> tuple[facts.Tokens, ...]:
    rows = counted.groupBy("split", "kind").agg(F.sum("documents").alias("documents"), F.sum("tokens").alias("tokens"))
    return _listed(rows.orderBy("split", F.desc("kind")), facts.Tokens, MOST_ROWS)


def _lengths(tokens: DataFrame, sequence_lengths: list[int]) -> tuple[facts.Histogram, ...]:
    """Tokens a document, by kind, the sequence lengths drawn in."""
    quantity = tokens.select(
        F.lit("tokens").alias("name"),
        "kind",
        F.col("token_count").cast("double").alias("value"),
        F.lit(False).alias("outside"),
    )
    bounds = tuple(("length", float(length)) for length in sequence_lengths)
    return histograms(quantity, {("tokens", kind): bounds for kind in KINDS})[0]


def _longer(tokens: DataFrame, sequence_lengths: list[int]) -> dict[int, int]:
    """By sequence length: the documents that do not fit into one sequence with their end token."""
    if not sequence_lengths:
        return {}
    row = _one(tokens.agg(*[F.count_if(F.col("token_count") + 1 > length) for length in sequence_lengths]))
    return dict(zip(sequence_lengths, map(int, row), strict=True))


def _sequences(lake: Lake, tokenizer: facts.Tokenizer | None) -> tuple[facts.Sequences, ...] | None:
    sequences = lake.read(GOLD_SEQUENCES)
    if sequences is None or tokenizer is None:
        return None
    by_domain = (
        sequences.where(F.col("tokenizer_id") == tokenizer.tokenizer_id)
        .groupBy("sequence_length", "split", "domain")
        .agg(
            F.count("*").alias("sequences"),
            F.sum("pad_count").alias("padding"),
            F.sum(F.size("document_ids")).alias("segments"),
            F.max(F.size("document_ids")).alias("most_segments"),
        )
    )
    # The page adds up what is listed: the smallest domains are one row, and none is missing.
    place = F.row_number().over(
        Window.partitionBy("sequence_length", "split").orderBy(F.desc("sequences"), F.asc("domain"))
    )
    rows = (
        by_domain.withColumn("domain", F.when(place <= MOST_DOMAINS, F.col("domain")).otherwise(OTHER_DOMAINS))
        .groupBy("sequence_length", "split", "domain")
        .agg(
            *(F.sum(name).alias(name) for name in ("sequences", "padding", "segments")),
            F.max("most_segments").alias("most_segments"),
        )
    )
    return _listed(rows.orderBy("sequence_length", "split", F.desc("sequences")), facts.Sequences, MOST_ROWS)
