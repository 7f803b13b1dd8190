"""What the quickstart ends with: the funnel, the losses, the model, where things lie, the next commands."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

from rich.table import Table

from jobs import console, evaluate
from model.evaluate.held_out import Evaluation
from model.registry.promote import PromotionDecision
from model.registry.store import tracking_uri

REASONS_SHOWN = 5

Counts = Mapping[str, Mapping[str, int]]


def funnel(counts: Counts) -> list[tuple[str, int, str]]:
    """(what, how many, a remark) from records to sequences."""
    ingest, clean, dedup = counts["ingest"], counts["clean"], counts["dedup"]
    tokens, packed = counts["tokenize"], counts["pack"]
    kept = tokens["documents"]
    split = f"train {tokens.get('tokens_train', 0):,}, validation {tokens.get('tokens_validation', 0):,}"
    slots = packed["tokens"] + packed["padding"]
    return [
        ("records", ingest["table_documents"] + ingest["table_quarantine"], ""),
        ("  quarantined", ingest["table_quarantine"], _reasons(ingest, "table_quarantine.")),
        ("documents", clean["documents"], f"redacted: {_reasons(clean, 'redactions.')}"),
        ("  rejected", clean["rejected"], _reasons(clean, "rejected_by.")),
        ("  accepted", clean["accepted"], ""),
        ("  duplicates of accepted", clean["accepted"] - kept, f"{dedup['clusters']:,} clusters in all"),
        ("  kept", kept, ""),
        ("tokens", tokens["tokens"], split),
        ("sequences", packed["sequences"], f"{packed['padding'] / max(1, slots):.1%} padding"),
    ]


def _reasons(counts: Mapping[str, int], prefix: str) -> str:
    """The commonest reasons, by name and number."""
    found = sorted(((n, key.removeprefix(prefix)) for key, n in counts.items() if key.startswith(prefix)), reverse=True)
    shown = ", ".join(f"{name} {n:,}" for n, name in found[:REASONS_SHOWN])
    return shown + (f" and {len(found) - REASONS_SHOWN} more" if len(found) > REASONS_SHOWN else "") or "nothing"


def program(name: str) -> str:
    """How the user calls a command of this environment: by its name where the shell finds it, else by its path."""
    return name if shutil.which(name) else os.path.relpath(Path(sys.executable).with_name(name))


def next_commands(lake: str, model: str) -> list[tuple[str, str]]:
    """(what it is for, the command)."""
    at, lakemoe = shlex.quote(lake), shlex.quote(program("lakemoe"))
    body = json.dumps({"model": model, "prompt": "def main(", "max_tokens": 32})
    return [
        ("report", f"{lakemoe} report --lake {at}"),
        ("serve", f"{lakemoe} serve --model models:/{model}@champion --lake {at}"),
        ("ask it", f"curl -s http://127.0.0.1:8000/v1/completions -H 'Content-Type: application/json' -d '{body}'"),
        ("runs", f"{shlex.quote(program('mlflow'))} ui --backend-store-uri {shlex.quote(tracking_uri(lake))}"),
        ("lineage", f"{lakemoe} lineage --model models:/{model}@champion --lake {at}"),
        ("own data", f"{lakemoe} quickstart --source PATH --lake {at}-own"),
    ]


def show(
    *,
    lake: str,
    counts: Counts,
    evaluation: Evaluation,
    decision: PromotionDecision,
    alias: str,
    prompt: str,
    completion: str,
    seconds: float,
) -> None:
    """Print it all."""
    out = console.out
    table = Table(title="From documents to sequences", title_justify="left", show_header=False, show_edge=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_column(overflow="fold")
    for what, number, remark in funnel(counts):
        table.add_row(what, f"{number:,}", remark)
    out.print()
    out.print(table)
    out.print()
    out.print(evaluate.table(evaluation))
    better = "below" if evaluation.total.beats_baselines else "NOT below"
    console.note(f"The loss is {better} both baselines, which are fitted on sequences of the same training split.")
    out.print()
    console.note(f"models:/{decision.model}@{alias} is version {decision.candidate_version}. {decision.reason}")
    console.note("It says:")
    out.print((prompt + completion).rstrip(), markup=False, style="italic")
    out.print()
    console.note(f"Everything lies in {lake}: tables, tokenizers/, training/, mlflow.db, mlartifacts/.")
    console.note("Next:")
    for what, command in next_commands(lake, decision.model):
        console.note(f"  {what:<9} {command}")
    console.note(f"Done in {seconds:.0f} s.")
