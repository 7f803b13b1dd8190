"""Values written into SQL text, for the expressions that are made of configuration and not of columns."""

from __future__ import annotations

from collections.abc import Iterable


def literal(text: str) -> str:
    """A Spark SQL string literal of this text."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def literals(texts: Iterable[str]) -> str:
    """String literals with commas between, as IN takes them."""
    return ", ".join(map(literal, texts))
