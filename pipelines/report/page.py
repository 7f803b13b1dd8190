"""Figures -> one self-contained HTML page: no script, no font, nothing loaded, every value escaped.

The layout is page.html.jinja, the words are in ``sections``. Needs no Spark.
"""

from __future__ import annotations

import re
import shlex
from datetime import datetime
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from pipelines.report.facts import Figures
from pipelines.report.sections import SECTIONS
from pipelines.report.views import Notice, Tile, number, share, time
from pipelines.tables import GOLD_SEQUENCES, GOLD_TOKENS, SILVER_DOCUMENTS, SILVER_DUPLICATES

TEMPLATE = "page.html.jinja"
# Jobs that follow their inputs; training and what comes after it stay at the versions that they were asked for.
_FOLLOWING = ("clean", "decontaminate", "dedup", "tokenize", "pack")


def render(figures: Figures, *, made_at: datetime) -> str:
    """The page. made_at: UTC."""
    folder = Path(__file__).resolve().parent
    # The template's name does not end in .html, so that autoescape is asked for by itself.
    environment = Environment(loader=FileSystemLoader(folder), autoescape=True, undefined=StrictUndefined)
    environment.filters["breakable"] = breakable
    made = (section(figures) for section in SECTIONS)
    return environment.get_template(TEMPLATE).render(
        title=f"Lake report, {figures.lake}",
        lake=figures.lake,
        made_at=time(made_at),
        notices=notices(figures),
        tiles=tiles(figures),
        sections=[section for section in made if section is not None],
    )


def breakable(name: str) -> Markup:
    """The name, escaped, that may go on in another line after a rule's family."""
    return Markup(re.sub(r"\.(?=[a-z])", ".<wbr>", str(escape(name))))


def notices(figures: Figures) -> list[Notice]:
    """The jobs that failed or whose inputs have changed since, and the next command where the lake stops short."""
    where = f"--lake {shlex.quote(figures.lake)}"
    found = []
    for run in figures.runs:
        if run.status == "failed":
            found.append(Notice(text=f"The last run of {run.job} failed ({run.run_id})."))
        elif run.behind and run.job in _FOLLOWING:
            text = f"{', '.join(run.behind)} changed after {run.job} had read it. To follow:"
            found.append(Notice(text=text, commands=(f"lakemoe {run.job} {where}",)))
    if missing := _missing(figures):
        table, jobs = missing
        text = f"{table} holds nothing yet, and what follows from it is left out of this page. Next:"
        found.append(Notice(text=text, commands=tuple(f"lakemoe {job} {where}" for job in jobs)))
    return found


def _missing(figures: Figures) -> tuple[str, tuple[str, ...]] | None:
    """The first table of the way that holds nothing, and the jobs that make it."""
    filled = {state.table for state in figures.tables if state.rows}
    # No duplicates is a result too: the table is enough.
    filled |= {SILVER_DUPLICATES.name} if figures.has(SILVER_DUPLICATES.name) else set()
    tokenize = ("tokenize",) if figures.tokenizer else ("train-tokenizer", "tokenize")
    way: tuple[tuple[str, tuple[str, ...]], ...] = (
        (SILVER_DOCUMENTS.name, ("clean",)),
        (SILVER_DUPLICATES.name, ("dedup",)),
        (GOLD_TOKENS.name, tokenize),
        (GOLD_SEQUENCES.name, ("pack",)),
    )
    return next(((table, jobs) for table, jobs in way if table not in filled), None)


def tiles(figures: Figures) -> list[Tile]:
    """The few figures that say most."""
    documents = figures.funnel[0].total
    quarantined = sum(reason.count for reason in figures.quarantine)
    out = [Tile(name="Documents", value=number(documents), note=f"{number(quarantined)} records in quarantine")]
    if accepted := figures.stage("accepted"):
        out.append(
            Tile(name="Accepted", value=share(accepted.total, documents), note=f"{number(accepted.total)} documents")
        )
    if kept := figures.stage("kept"):
        out.append(Tile(name="Kept", value=share(kept.total, documents), note=f"{number(kept.total)} documents"))
    if figures.tokens:
        tokens = sum(t.tokens for t in figures.tokens)
        validation = sum(t.tokens for t in figures.tokens if t.split == "validation")
        out.append(Tile(name="Tokens", value=number(tokens), note=f"{number(validation)} of them for validation"))
    if figures.sequences:
        sequences = sum(s.sequences for s in figures.sequences)
        lengths = sorted({s.sequence_length for s in figures.sequences})
        note = f"of {' or '.join(map(number, lengths))} tokens"
        out.append(Tile(name="Sequences", value=number(sequences), note=note))
        padding = sum(s.padding for s in figures.sequences)
        room = sum(s.sequences * s.sequence_length for s in figures.sequences)
        out.append(Tile(name="Waste", value=share(padding, room), note=f"{number(padding)} padding tokens"))
    return out
