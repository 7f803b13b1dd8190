"""The page's sections that show documents, and those that show that documents are gone: samples, clusters, erasures."""

from __future__ import annotations

from pipelines.report.facts import Figures, Sample, Samples
from pipelines.report.views import SampleGroup, SampleView, Section, TableView, number, time


def duplicates(figures: Figures) -> Section | None:
    found, dropped = figures.duplicates, figures.stage("duplicates")
    if found is None or dropped is None:
        return None
    rows = (
        ("Clusters of two and more", number(found.clusters)),
        ("Members that are exact copies", number(found.exact)),
        ("Members that are near copies", number(found.near)),
        ("Members of the largest cluster", number(found.largest)),
        ("Accepted documents dropped", number(dropped.total)),
    )
    table = TableView(id="t-duplicates", caption="Clusters of duplicates", heads=("What", "Count"), rows=rows)
    text = "Rejected documents take part, and are kept only where a cluster has no accepted one."
    groups = tuple(
        SampleGroup(
            title=f"A cluster of {number(cluster.members)}",
            note=f"{len(cluster.shown)} of them",
            samples=tuple(
                _sample(document, "kept" if kept else f"{method} copy") for method, kept, document in cluster.shown
            ),
        )
        for cluster in figures.clusters
    )
    return Section(id="duplicates", title="Duplicates", paragraphs=(text,), tables=(table,), samples=groups)


def _sample(document: Sample, note: str = "") -> SampleView:
    length = f"{number(document.characters)} characters"
    return SampleView(
        head=f"{document.source}: {document.source_id}",
        note=f"{note}, {length}" if note else length,
        text=document.beginning,
        more=document.characters > len(document.beginning),
    )


def samples(figures: Figures) -> Section | None:
    if not figures.samples:
        return None
    rejected = {r.rule: r.documents for r in figures.rejections or ()}
    kept = figures.stage("kept") or figures.stage("accepted")

    def of(group: Samples) -> int | None:
        if group.kept:
            return kept.documents[group.name] if kept else None
        return rejected.get(group.name)

    groups = tuple(
        SampleGroup(
            title=f"Kept {group.name}" if group.kept else group.name,
            note=f"{len(group.samples)} of {number(of(group))}",
            samples=tuple(_sample(document) for document in group.samples),
        )
        for group in sorted(figures.samples, key=lambda g: (not g.kept, -(of(g) or 0), g.name))
    )
    text = (
        "Beginnings of documents as silver holds them, kept ones first, then by the rule that rejects them, chosen by "
        "the hash of their ids. What is erased later stays in this page."
    )
    return Section(id="samples", title="Samples", paragraphs=(text,), samples=groups)


def erasures(figures: Figures) -> Section | None:
    if not figures.erasures:
        return None
    rows = tuple(
        (e.reason or "no reason given", number(e.documents), number(e.open), time(e.last_requested_at))
        for e in figures.erasures
    )
    still = sum(e.open for e in figures.erasures)
    text = (
        f"{number(still)} of these documents may still be in a table: lakemoe erase goes on with them."
        if still
        else "No table holds any of these documents now; files of older versions go with lakemoe maintain."
    )
    heads = ("Reason", "Documents", "Not completed", "Last asked for (UTC)")
    table = TableView(id="t-erasures", caption="Erased documents", heads=heads, rows=rows, words=(0, 3))
    return Section(id="erasures", title="Erasures", paragraphs=(text,), tables=(table,))
