"""Settings of decontaminate; Spark-free, so that a command line that only shows them starts nothing."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class DecontaminateConfig(BaseModel):
    """Settings ``decontaminate.*``. 13 words: Brown et al. 2020 (GPT-3), appendix C."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sets: str | None = Field(
        None,
        description="folder of evaluation sets, one .jsonl or .jsonl.gz file each; none: no search (path)",
    )
    ngram: int = Field(13, ge=2, le=100, description="words in a row that document and item share (words)")
    fields: dict[str, str] = Field({}, description="the field with an item's text by set; text where not named (names)")
