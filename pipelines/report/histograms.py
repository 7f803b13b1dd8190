"""Histograms counted in Spark: a scale for each quantity from four statistics, then documents by bin.

A quantity comes in long form, one row a document and quantity: ``name``, ``kind``, ``value`` (double, null: not
measured) and ``outside`` (whether the rules that judge it rejected the document). However many documents there are,
only a bin's counts come back.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from pipelines.clean.config import Rule
from pipelines.report.facts import Flag, Histogram

Bounds = tuple[tuple[str, float], ...]
Key = tuple[str, str]
LINEAR_BINS = 20
BINS_A_DECADE = 5
MOST_DECADES = 8
# From here on a linear axis would press what matters into one bin.
_FAR = 5


@dataclass(frozen=True, kw_only=True)
class Scale:
    """``bins`` equal bins from ``low`` to ``high``, of the value or of its decimal logarithm."""

    low: float
    high: float
    bins: int
    log: bool

    @property
    def edges(self) -> tuple[float, ...]:
        step = (self.high - self.low) / self.bins
        at = [round(self.low + i * step, 12) for i in range(self.bins + 1)]
        return tuple(10**x if self.log else x for x in at)


def scale_of(median: float, most: float, bounds: Bounds) -> Scale:
    """A scale on which the thresholds and nearly all values (up to ``most``, the 99th percentile) can be told apart.

    A threshold lies on an edge wherever that is possible; shares of one stay on a linear axis, counts go to a
    logarithmic one when they reach far beyond their thresholds.
    """
    limits = [value for _, value in bounds if value > 0]
    top = max(limits, default=most) or 1.0
    if top <= 1:
        only_upper = all(side == "max" for side, _ in bounds)
        return Scale(low=0, high=_high(top, most, 1) if only_upper else 1.0, bins=LINEAR_BINS, log=False)
    least = min([*limits, median or top])
    if most > _FAR * top or max(top, most) > 2 * _FAR * max(least, 1):
        decades = min(MOST_DECADES, max(1, math.ceil(math.log10(2 * max(top, most)))))
        return Scale(low=0, high=decades, bins=BINS_A_DECADE * decades, log=True)
    high = _high(top, most, math.inf)
    # Counts are whole: narrower bins than 1 would leave every other one empty.
    return Scale(low=0, high=high, bins=max(1, min(LINEAR_BINS, math.floor(high))), log=False)


def _high(top: float, most: float, bound: float) -> float:
    """The end of a linear axis: a multiple of the threshold whose bins have an edge there, or the bound."""
    ends = [round(times * top, 12) for times in (2, 4, 5) if times * top <= bound]
    return next((end for end in ends if end >= most), ends[-1] if ends else bound)


def signals_in_long_form(documents: DataFrame, rules: tuple[Rule, ...]) -> DataFrame:
    """Every signal that a rule judges, of every document of the rule's kind."""
    entries = []
    for (signal, kind), names in sorted(_rules_by_signal(rules).items()):
        rejected = F.arrays_overlap("rejected_by", F.array(*map(F.lit, names)))
        value = F.when(F.col("kind") == kind, F.col(f"signals.{signal}"))
        entries.append(
            F.struct(
                F.lit(signal).alias("name"),
                F.lit(kind).alias("kind"),
                value.alias("value"),
                F.coalesce(rejected, F.lit(False)).alias("outside"),
            )
        )
    return documents.select(F.explode(F.array(*entries)).alias("entry")).select("entry.*")


def bounds_of(rules: tuple[Rule, ...]) -> dict[Key, Bounds]:
    """The thresholds of each signal and kind, least first."""
    found: dict[Key, set[tuple[str, float]]] = {}
    for rule in rules:
        for side, value in (("min", rule.min), ("max", rule.max)):
            if value is not None:
                found.setdefault((rule.signal, rule.kind), set()).add((side, value))
    return {key: tuple(sorted(bounds, key=lambda b: b[1])) for key, bounds in found.items()}


def histograms(quantities: DataFrame, bounds: Mapping[Key, Bounds]) -> tuple[tuple[Histogram, ...], tuple[Flag, ...]]:
    """Quantities in long form -> their histograms, and those that are flags, in the order of ``bounds``."""
    measured = quantities.where("value IS NOT NULL AND NOT isnan(value)")
    statistics = measured.groupBy("name", "kind").agg(
        F.count("*").alias("documents"),
        F.count_if("outside").alias("rejected"),
        F.max("value").alias("greatest"),
        F.percentile_approx("value", 0.5).alias("median"),
        F.percentile_approx("value", 0.99).alias("most"),
    )
    found = {(row["name"], row["kind"]): row for row in statistics.head(len(bounds))}
    flags, scales = [], {}
    for key, limits in bounds.items():
        if (row := found.get(key)) is None:
            continue
        if all(bound == ("max", 0.0) for bound in limits) and row["greatest"] <= 1:
            flags.append(Flag(name=key[0], kind=key[1], documents=row["documents"], rejected=row["rejected"]))
        else:
            scales[key] = scale_of(row["median"], row["most"], limits)
    counted = _count(measured, scales)
    out = []
    for key, scale in scales.items():
        bins = [counted.get((*key, i), (0, 0)) for i in range(scale.bins)]
        out.append(
            Histogram(
                name=key[0],
                kind=key[1],
                bounds=bounds[key],
                log=scale.log,
                edges=scale.edges,
                counts=tuple(count for count, _ in bins),
                outside=tuple(outside for _, outside in bins),
                median=found[key]["median"],
            )
        )
    return tuple(out), tuple(flags)


def _count(measured: DataFrame, scales: dict[Key, Scale]) -> dict[tuple[str, str, int], tuple[int, int]]:
    """(name, kind, bin) -> (documents, those outside); what lies beyond the ends goes to the bin there."""
    if not scales:
        return {}
    rows = [(*key, float(s.low), float(s.high), s.bins, s.log) for key, s in scales.items()]
    schema = "name string, kind string, low double, high double, bins int, log boolean"
    scaled = measured.join(F.broadcast(measured.sparkSession.createDataFrame(rows, schema)), ["name", "kind"])
    bucket = F.expr("width_bucket(IF(log, log10(greatest(value, 1D)), value), low, high, cast(bins AS bigint))")
    bins = scaled.select(
        "name", "kind", "outside", F.least(F.greatest(bucket, F.lit(1)), F.col("bins")).cast("int").alias("bin")
    )
    grouped = bins.groupBy("name", "kind", "bin").agg(F.count("*"), F.count_if("outside"))
    limit = sum(scale.bins for scale in scales.values())
    return {(name, kind, at - 1): (count, outside) for name, kind, at, count, outside in grouped.head(limit)}


def _rules_by_signal(rules: tuple[Rule, ...]) -> dict[Key, list[str]]:
    found: dict[Key, list[str]] = {}
    for rule in rules:
        found.setdefault((rule.signal, rule.kind), []).append(rule.name)
    return found
