"""Verdicts from stored signals: one Spark SQL expression made of the rule table.

The expression reads kind, language, code_language, license_class and signals of silver.documents and nothing else, so
that new thresholds judge the corpus again without its text. It names every rule that rejects, in the table's
order, then ``license.CLASS`` where the policy does not admit the licence's class.
"""

from __future__ import annotations

from pipelines.clean.config import CleanConfig, Rule
from pipelines.sql import literal, literals
from pipelines.tables import LICENSE_CLASSES


def condition(rule: Rule) -> str:
    """SQL: whether the rule rejects; never null."""
    value = f"signals.`{rule.signal}`"
    outside = []
    if rule.min is not None:
        outside.append(f"{value} < {rule.min!r}D")
    if rule.max is not None:
        outside.append(f"{value} > {rule.max!r}D")
    parts = [f"kind = {literal(rule.kind)}", "(" + " OR ".join(outside) + ")"]
    language = "language" if rule.kind == "text" else "code_language"
    if rule.languages:
        parts.append(f"{language} IN ({literals(rule.languages)})")
    if rule.except_languages:
        parts.append(f"coalesce({language} NOT IN ({literals(rule.except_languages)}), true)")
    return f"coalesce({' AND '.join(parts)}, false)"


def rejected_by(config: CleanConfig) -> str:
    """SQL for the array of the names of every rule that rejects the document; empty: accepted."""
    entries = [f"IF({condition(rule)}, {literal(rule.name)}, NULL)" for rule in config.rules]
    for kind, admitted in sorted(config.admitted_licenses.items()):
        entries += [
            f"IF(kind = '{kind}' AND license_class = '{refused}', 'license.{refused}', NULL)"
            for refused in LICENSE_CLASSES
            if refused not in admitted
        ]
    return f"array_compact(array({', '.join(entries)}))" if entries else "cast(array() AS array<string>)"
