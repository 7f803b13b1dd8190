"""Settings of erase."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field, model_validator


class EraseConfig(BaseModel):
    """Which documents: by one of the three ways."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    document_id: tuple[str, ...] = Field((), description="documents to erase, by document_id")
    source: tuple[str, ...] = Field((), description="sources to erase whole, quarantined records too, by name")
    where: str = Field("", description="a SQL condition on bronze.documents, such as \"path LIKE '%/private/%'\"")
    with_duplicates: bool = Field(False, description="erase also the documents that have the very same text")
    reason: str = Field("", description="why, as ops.erasures will say")
    restore: bool = Field(False, description="take the erasure back: the documents may be ingested again")

    @model_validator(mode="after")
    def _one_way(self) -> EraseConfig:
        if sum(map(bool, (self.document_id, self.source, self.where))) != 1:
            raise ValueError("say what to erase by one of --document-id, --source and --where")
        if self.restore and not self.document_id:
            raise ValueError("--restore takes documents by --document-id; ops.erasures has the ids")
        if self.restore and self.with_duplicates:
            raise ValueError("--with-duplicates says what to erase: leave it out with --restore")
        return self
