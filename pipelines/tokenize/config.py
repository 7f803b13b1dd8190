"""Settings of train-tokenizer and tokenize."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from pipelines.tables import SPECIAL_TOKENS

# Every byte and every control token has an id of its own.
SMALLEST = 256 + len(SPECIAL_TOKENS)


class TrainTokenizerConfig(BaseModel):
    """Settings ``train_tokenizer.*``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    vocab_size: int = Field(8192, ge=SMALLEST, description="vocabulary, bytes and special tokens included (tokens)")
    sample_bytes: int = Field(32 << 20, ge=1, description="text that it is trained on, at most (characters)")
    seed: int = Field(0, description="which documents are sampled (number)")
    retrain: bool = Field(False, description="train again where the lake has a tokenizer")


class TokenizeConfig(BaseModel):
    """Settings ``tokenize.*``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tokenizer: str | None = Field(None, description="id of a tokenizer of the lake; the lake's own when not given")
    validation_fraction: float = Field(0.01, ge=0, le=1, description="clusters that go to validation (fraction)")
