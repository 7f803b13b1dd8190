"""The page's sections, one function each: figures in, words and cells out; None where the lake does not go so far."""

from __future__ import annotations

from collections.abc import Callable

from pipelines.clean.config import Rule
from pipelines.report.charts import chart, plain
from pipelines.report.facts import Figures, Histogram, Share, Stage
from pipelines.report.shown import duplicates, erasures, samples
from pipelines.report.views import (
    NONE,
    BarView,
    ChartGroup,
    Section,
    TableView,
    duration,
    number,
    ratio,
    share,
    time,
)
from pipelines.tables import CONTAMINATED, KINDS, LICENSE_CLASSES, SILVER_DUPLICATES, SPLITS

STAGE_NAMES = {
    "documents": "Documents in bronze",
    "rejected": "Rejected by a rule",
    "accepted": "Accepted",
    "duplicates": "Dropped as duplicates",
    "kept": "Kept",
}
DROPPED = ("rejected", "duplicates")


def funnel(figures: Figures) -> Section | None:
    documents = figures.funnel[0]
    quarantined = sum(reason.count for reason in figures.quarantine)
    unknown = (NONE,) * 4
    rows = [
        ("Records ingested", NONE, NONE, number(documents.total + quarantined), *unknown),
        ("Quarantined", NONE, NONE, number(quarantined), *unknown),
        *(_stage_row(stage, documents.total) for stage in figures.funnel),
    ]
    heads = ("Stage", "Text", "Code", "All", "Share", "Text chars", "Code chars", "All chars")
    tables = [TableView(id="t-funnel", caption="Documents and characters by stage", heads=heads, rows=tuple(rows))]
    if figures.tokens:
        tables.append(_tokens(figures))
    most = max(1, documents.total)
    bars = tuple(
        BarView(
            label=STAGE_NAMES[stage.name],
            shares=tuple(round(100 * stage.documents[kind] / most, 2) for kind in KINDS),
            dropped=stage.name in DROPPED,
        )
        for stage in figures.funnel
    )
    text = (
        "A record is a document or lies in quarantine; a document is accepted or rejected; of an accepted cluster of "
    )
    text += "duplicates one is kept."
    return Section(id="funnel", title="From documents to tokens", paragraphs=(text,), bars=bars, tables=tuple(tables))


def _stage_row(stage: Stage, whole: int) -> tuple[str, ...]:
    documents, characters = stage.documents, stage.characters
    return (
        STAGE_NAMES[stage.name],
        *(number(documents[kind]) for kind in KINDS),
        number(stage.total),
        share(stage.total, whole),
        *(number(characters[kind]) for kind in KINDS),
        number(stage.total_characters),
    )


def _tokens(figures: Figures) -> TableView:
    counted = figures.tokens or ()

    def row(name: str, splits: tuple[str, ...]) -> tuple[str, ...]:
        own = [t for t in counted if t.split in splits]
        documents = {kind: sum(t.documents for t in own if t.kind == kind) for kind in KINDS}
        tokens = {kind: sum(t.tokens for t in own if t.kind == kind) for kind in KINDS}
        cells = [*documents.values(), sum(documents.values()), *tokens.values(), sum(tokens.values())]
        return (name, *map(number, cells))

    kept, tokens = figures.stage("kept"), {k: sum(t.tokens for t in counted if t.kind == k) for k in KINDS}
    note = ""
    if kept and kept.total == sum(t.documents for t in counted):
        each = ", ".join(f"{ratio(kept.characters[k], tokens[k])} in {k}" for k in KINDS if tokens[k])
        note = f"Characters a token: {each}."
    return TableView(
        id="t-tokens",
        caption="Documents and tokens by split",
        heads=("Split", "Text docs", "Code docs", "Documents", "Text tokens", "Code tokens", "Tokens"),
        rows=(*(row(split, (split,)) for split in SPLITS), row("all", SPLITS)),
        total=True,
        note=note,
    )


def left_out(figures: Figures) -> Section | None:
    quarantined = sum(reason.count for reason in figures.quarantine)
    paragraphs, tables = [], []
    if figures.quarantine:
        rows = tuple((str(r.name), number(r.count), share(r.count, quarantined)) for r in figures.quarantine)
        heads = ("Reason", "Records", "Share")
        tables.append(TableView(id="t-quarantine", caption="Quarantine by reason", heads=heads, rows=rows))
    else:
        paragraphs.append("No record is in quarantine.")
    if figures.rejections is not None:
        tables.append(_rejections(figures))
        met = {r.rule for r in figures.rejections}
        idle = [rule.name for rule in figures.rules if rule.name not in met]
        if idle:
            paragraphs.append(f"Rules that rejected nothing ({len(idle)}): {', '.join(idle)}.")
    return Section(id="left-out", title="Left out", paragraphs=tuple(paragraphs), tables=tuple(tables))


def _rejections(figures: Figures) -> TableView:
    rules = {rule.name: rule for rule in figures.rules}
    judged = sum(s.total for s in figures.funnel if s.name in ("accepted", "rejected"))
    rows = tuple(
        (r.rule, number(r.documents), share(r.documents, judged), number(r.alone), *_bounds(r.rule, rules.get(r.rule)))
        for r in figures.rejections or ()
    )
    if figures.rules_recorded:
        note = "The bounds are those of the last run of clean, as ops.runs records it."
    else:
        note = "ops.runs names no run of clean: the bounds are the default ones, and may not be those that judged."
    return TableView(
        id="t-rejections",
        caption="Documents rejected, by rule",
        heads=("Rule", "Documents", "Share", "Alone", "Admits", "Judges"),
        rows=rows,
        words=(0, 4, 5),
        note="Alone: rejected by no other rule. " + note,
    )


def _bounds(name: str, rule: Rule | None) -> tuple[str, str]:
    """What the rule admits, and which documents it judges."""
    if rule is None:
        if name.startswith(CONTAMINATED):
            return "no text of the evaluation set", "all"
        family, _, what = name.partition(".")
        known = family == "license" and what in LICENSE_CLASSES
        return ("by the licence policy" if known else NONE), NONE
    if rule.min is not None and rule.max is not None:
        admits = f"{plain(rule.min)} to {plain(rule.max)}"
    else:
        admits = f"at least {plain(rule.min)}" if rule.min is not None else f"at most {plain(rule.max or 0)}"
    judges = str(rule.kind)
    if rule.languages:
        judges += f", {', '.join(rule.languages)} only"
    if rule.except_languages:
        judges += f", not {', '.join(rule.except_languages)}"
    return admits, judges


def languages_and_licences(figures: Figures) -> Section | None:
    if figures.languages is None:
        return None
    parts: tuple[tuple[str, str, str, str, tuple[Share, ...] | None, tuple[str, ...]], ...] = (
        ("t-languages", "Languages of text", "Language", "not identified", figures.languages, ("text",)),
        ("t-code", "Languages of code", "Language", "not identified", figures.code_languages, ("code",)),
        ("t-classes", "Licence classes", "Class", "none", figures.license_classes, KINDS),
        ("t-licences", "Licences, SPDX expressions", "Licence", "none found", figures.licenses, KINDS),
    )
    tables = tuple(
        _shares(figures, id_, caption, head, none, shares, kinds)
        for id_, caption, head, none, shares, kinds in parts
        if shares
    )
    return Section(id="languages", title="Languages and licences", tables=tables, narrow=True)


def _shares(
    figures: Figures, id_: str, caption: str, head: str, none: str, shares: tuple[Share, ...], kinds: tuple[str, ...]
) -> TableView:
    has_kept = figures.has(SILVER_DUPLICATES.name)

    def row(name: str, documents: int, accepted: int, kept: int) -> tuple[str, ...]:
        numbers = (documents, accepted, kept) if has_kept else (documents, accepted)
        return (name, *map(number, numbers), share(numbers[-1], documents))

    rows = [row(s.name if s.name is not None else none, s.documents, s.accepted, s.kept) for s in shares]
    totals = {s.name: sum(s.documents[kind] for kind in kinds) for s in figures.funnel}
    documents = totals["accepted"] + totals["rejected"] - sum(s.documents for s in shares)
    if documents:
        accepted = totals["accepted"] - sum(s.accepted for s in shares)
        kept = totals.get("kept", totals["accepted"]) - sum(s.kept for s in shares)
        rows.append(row("all others", documents, accepted, kept))
    last = ("Kept", "Kept share") if has_kept else ("Accepted share",)
    return TableView(id=id_, caption=caption, heads=(head, "Documents", "Accepted", *last), rows=tuple(rows))


def signals(figures: Figures) -> Section | None:
    if not (figures.histograms or figures.flags):
        return None
    groups = []
    for kind in KINDS:
        own = [h for h in figures.histograms if h.kind == kind]
        charts = tuple(chart(h, title=h.name, notes=_describe(h)) for h in own)
        if charts:
            groups.append(ChartGroup(title=f"Signals of {kind}", charts=charts))
    tables: tuple[TableView, ...] = ()
    if figures.flags:
        rows = tuple(
            (f.name, f.kind, number(f.documents), number(f.rejected), share(f.rejected, f.documents))
            for f in figures.flags
        )
        heads = ("Signal", "Kind", "Measured", "Rejected", "Share")
        tables = (TableView(id="t-flags", caption="Signals that are yes or no", heads=heads, rows=rows, words=(0, 1)),)
    text = (
        "Every signal that a rule judges, measured on documents of the rule's kind. Dashed lines are the thresholds; "
        "the strong part of a bar was rejected by them. A rule that judges some languages only leaves the others "
        "standing beyond its line. Heights follow the square root of the count, and the bins at the ends hold all "
        "that lies beyond."
    )
    return Section(id="signals", title="Signals", paragraphs=(text,), tables=tables, charts=tuple(groups))


def _describe(histogram: Histogram) -> tuple[str, str]:
    rejected, documents = histogram.rejected, histogram.documents
    return f"{number(rejected)} of {number(documents)} rejected ({share(rejected, documents)})", _median(histogram)


def _median(histogram: Histogram) -> str:
    return f"median {plain(histogram.median)}" + (", logarithmic axis" if histogram.log else "")


def sequences(figures: Figures) -> Section | None:
    if not (figures.sequences or figures.lengths):
        return None
    rows, tables = [], []
    for s in figures.sequences or ():
        room = s.sequences * s.sequence_length
        cells = (number(s.sequences), number(room - s.padding), number(s.padding), share(s.padding, room))
        segments = (ratio(s.segments, s.sequences), number(s.most_segments))
        rows.append((number(s.sequence_length), s.split, s.domain, *cells, *segments))
    if rows:
        heads = ("Length", "Split", "Domain", "Sequences", "Tokens", "Padding", "Waste", "Segments each", "Most")
        note = "Tokens count the end token that closes each document. Waste is padding, as a share of all places."
        tables.append(
            TableView(id="t-sequences", caption="Sequences", heads=heads, rows=tuple(rows), words=(0, 1, 2), note=note)
        )
    documents = sum(t.documents for t in figures.tokens or ())
    longer = tuple(
        f"{number(n)} of {number(documents)} documents ({share(n, documents)}) are longer than a sequence of "
        f"{number(length)} tokens."
        for length, n in figures.longer.items()
    )
    charts = tuple(
        chart(
            h,
            title=h.kind,
            notes=(f"{number(h.documents)} documents", _median(h)),
        )
        for h in figures.lengths
    )
    groups = (ChartGroup(title="Tokens a document", charts=charts),) if charts else ()
    return Section(id="sequences", title="Sequences", paragraphs=longer, tables=tuple(tables), charts=groups)


def sources(figures: Figures) -> Section | None:
    heads = ("Source", "Documents", "Quarantined", "Accepted", "Kept", "Tokens")
    known_kept = figures.has(SILVER_DUPLICATES.name)
    rows = tuple(
        (s.name, *map(number, (s.documents, s.quarantined, s.accepted, s.kept if known_kept else None, s.tokens)))
        for s in figures.sources
    )
    rest = figures.source_count - len(rows)
    note = f"{number(rest)} smaller sources are not listed." if rest else ""
    table = TableView(id="t-sources", caption="Documents and tokens by source", heads=heads, rows=rows, note=note)
    return Section(id="sources", title="Sources", tables=(table,))


def lineage(figures: Figures) -> Section | None:
    tables = [
        TableView(
            id="t-versions",
            caption="Table versions that this page was made from",
            heads=("Table", "Written (UTC)", "Version", "Rows"),
            rows=tuple((t.table, time(t.written_at), number(t.version), number(t.rows)) for t in figures.tables),
            words=(0, 1),
        )
    ]
    if figures.runs:
        heads = ("Job", "Started (UTC)", "Took", "Status", "Run", "Code version", "Read", "Wrote")
        rows = tuple(
            (
                r.job,
                time(r.started_at),
                duration(r.started_at, r.ended_at),
                r.status,
                r.run_id,
                r.code_version or NONE,
                ", ".join(r.inputs) or NONE,
                ", ".join(r.outputs) or NONE,
            )
            for r in figures.runs
        )
        tables.append(
            TableView(
                id="t-runs", caption="The last run of each job", heads=heads, rows=rows, words=tuple(range(len(heads)))
            )
        )
    paragraphs = []
    if figures.tokenizer:
        vocabulary = figures.tokenizer.vocabulary
        size = "its file is not in the lake" if vocabulary is None else f"{number(vocabulary)} tokens in its vocabulary"
        paragraphs.append(f"Tokenizer {figures.tokenizer.tokenizer_id}, {size}.")
        if figures.tokenizer.editions > 1:
            paragraphs.append(
                f"gold.tokens holds {figures.tokenizer.editions} editions; the page is about this tokenizer's."
            )
    if not figures.runs:
        paragraphs.append("ops.runs records no run: the stages were run without the command line.")
    return Section(id="lineage", title="Lineage", paragraphs=tuple(paragraphs), tables=tuple(tables))


SECTIONS: tuple[Callable[[Figures], Section | None], ...] = (
    funnel,
    left_out,
    languages_and_licences,
    signals,
    samples,
    duplicates,
    sequences,
    sources,
    erasures,
    lineage,
)
