"""Settings of pack."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class PackConfig(BaseModel):
    """Settings ``pack.*``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sequence_length: int = Field(2048, ge=2, description="length of a sequence (tokens)")
    groups: int = Field(
        8,
        ge=1,
        description="hash groups a split and domain is packed in, at most; more beyond 32 M tokens a group (count)",
    )
    mode: Literal["best_fit", "concat"] = Field("best_fit", description="best_fit, or concat: cut through")
    domain: Literal["kind", "source"] = Field("kind", description="the column that is a sequence's domain")
    seed: int = Field(0, description="which documents share a group, and their order (number)")
    fim_rate: float = Field(
        0.0, ge=0, le=1, description="code documents rearranged to fill in the middle; 0: none (fraction)"
    )
    fim_spm_rate: float = Field(
        0.5, ge=0, le=1, description="of these, suffix-prefix-middle and not prefix-suffix-middle (fraction)"
    )
    tokenizer: str | None = Field(None, description="id of a tokenizer of the lake; the lake's own when not given")

    @model_validator(mode="after")
    def _room_for_a_gap(self) -> PackConfig:
        if self.fim_rate and self.sequence_length <= 4:
            raise ValueError("pack.fim_rate needs a pack.sequence_length of more than 4: control tokens take three")
        return self
