"""Settings of dedup; Spark-free, so that a command line that only shows them starts nothing."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class DedupConfig(BaseModel):
    """Settings ``dedup.*``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    threshold: float = Field(
        0.8, ge=0, le=1, description="Jaccard similarity of shingle sets from which texts are near"
    )
    bands: int = Field(14, ge=1, description="LSH bands (count)")
    rows: int = Field(8, ge=1, description="MinHash values a band (count)")
    shingle: int = Field(5, ge=1, description="shingle length (words of text, tokens of code)")
    bucket_limit: int = Field(1000, ge=2, description="texts of a bucket up to which all pairs are looked at (count)")
    source_priority: tuple[str, ...] = Field((), description="sources whose copy is kept first, best first (names)")
