"""Column expressions that stages share, each the one spelling of a rule."""

from __future__ import annotations

from pyspark.sql import Column
from pyspark.sql import functions as F

from pipelines.sql import literal
from pipelines.tables import CONTAMINATED

# SQL of ``name``: whether it is a verdict of decontaminate.
IS_CONTAMINATED = f"startswith(name, {literal(CONTAMINATED)})"
# Of a hash as many hexadecimal digits as fit in a bigint with room to spare.
HASH_DIGITS = 12


def hashed(*parts: Column) -> Column:
    """sha256 of the parts, NUL between them, in hexadecimal: as a document_id is made of source and source_id."""
    joined: list[Column] = []
    for part in parts:
        joined += [F.lit("\0"), part]
    return F.sha2(F.concat(*joined[1:]), 256)


def draw(digest: Column) -> Column:
    """An even draw from 0 to 16^HASH_DIGITS - 1 by a hash in hexadecimal."""
    return F.conv(F.substring(digest, 1, HASH_DIGITS), 16, 10).cast("bigint")
