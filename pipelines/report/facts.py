"""What a report is made of: plain figures, free of Spark and of HTML.

``figures`` counts them in the lake's tables, ``page`` writes them out. None means that the table that would say is not
in the lake yet; an empty tuple means that it is and holds nothing of the sort.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from pipelines.clean.config import Rule


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Documents at one stage of the way. documents, characters: by kind (text, code)."""

    name: str
    documents: dict[str, int]
    characters: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.documents.values())

    @property
    def total_characters(self) -> int:
        return sum(self.characters.values())


@dataclass(frozen=True, kw_only=True)
class Count:
    """How many there are of what has this name; None: the rows that name nothing."""

    name: str | None
    count: int


@dataclass(frozen=True, kw_only=True)
class Rejection:
    """documents: rejected by the rule; alone: by no other rule."""

    rule: str
    documents: int
    alone: int


@dataclass(frozen=True, kw_only=True)
class Share:
    """Documents of silver with one value of a column; kept: accepted, and no other document stands for it."""

    name: str | None
    documents: int
    accepted: int
    kept: int


@dataclass(frozen=True, kw_only=True)
class Source:
    """One source: its documents in bronze, silver and gold, and its records in quarantine. None: no such table yet."""

    name: str
    documents: int
    quarantined: int
    accepted: int | None
    kept: int | None
    tokens: int | None


@dataclass(frozen=True, kw_only=True)
class Histogram:
    """Documents of a kind by the value of one quantity.

    bounds: (``min`` or ``max``, value), the thresholds that judge it. edges: one more than counts; the first and the
    last bin also hold what lies beyond. outside: of counts, the documents that the thresholds' rules rejected.
    """

    name: str
    kind: str
    bounds: tuple[tuple[str, float], ...]
    log: bool
    edges: tuple[float, ...]
    counts: tuple[int, ...]
    outside: tuple[int, ...]
    median: float

    @property
    def documents(self) -> int:
        return sum(self.counts)

    @property
    def rejected(self) -> int:
        return sum(self.outside)


@dataclass(frozen=True, kw_only=True)
class Flag:
    """A signal that is 0 or 1 and whose rule admits 0 alone; rejected: by that rule."""

    name: str
    kind: str
    documents: int
    rejected: int


@dataclass(frozen=True, kw_only=True)
class Duplicates:
    """silver.duplicates in sum: members by how they joined, clusters, the members of the largest."""

    clusters: int
    exact: int
    near: int
    largest: int


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One document of silver. characters: of its whole text, of which `beginning` is the first part."""

    document_id: str
    source: str
    source_id: str
    characters: int
    beginning: str


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Kept documents of the kind `name`, or documents that the rule `name` rejects."""

    name: str
    kept: bool
    samples: tuple[Sample, ...]


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """One cluster of duplicates. shown: of some members how they joined, whether they are kept, and the document."""

    members: int
    shown: tuple[tuple[str, bool, Sample], ...]


@dataclass(frozen=True, kw_only=True)
class Erasure:
    """Documents whose erasure was asked for with one reason. open: those that a table may still hold."""

    reason: str | None
    documents: int
    open: int
    last_requested_at: datetime


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """Documents and tokens of one split and kind, in the edition that the report is about."""

    split: str
    kind: str
    documents: int
    tokens: int


@dataclass(frozen=True, kw_only=True)
class Sequences:
    """The sequences of one edition, split and domain. segments: documents' parts, padding excepted."""

    sequence_length: int
    split: str
    domain: str
    sequences: int
    padding: int
    segments: int
    most_segments: int


@dataclass(frozen=True, kw_only=True)
class Tokenizer:
    """The tokenizer of the edition. vocabulary: None where its file is not in the lake. editions: of gold.tokens."""

    tokenizer_id: str
    vocabulary: int | None
    editions: int


@dataclass(frozen=True, kw_only=True)
class TableState:
    """The version of a table that the report read."""

    table: str
    version: int
    written_at: datetime
    rows: int


@dataclass(frozen=True, kw_only=True)
class Run:
    """The last run of a job. inputs, outputs: table@version. behind: inputs that have a newer version by now."""

    job: str
    run_id: str
    started_at: datetime
    ended_at: datetime | None
    status: str
    code_version: str | None
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    behind: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Figures:
    """Everything that the page shows.

    funnel: as far as the lake goes. rules_recorded: whether ``rules`` are those of the run that judged (ops.runs says),
    else they are the defaults. longer: documents that need more than one sequence, by sequence length.
    """

    lake: str
    tables: tuple[TableState, ...]
    runs: tuple[Run, ...]
    funnel: tuple[Stage, ...]
    quarantine: tuple[Count, ...]
    sources: tuple[Source, ...]
    source_count: int
    rules: tuple[Rule, ...]
    rules_recorded: bool
    rejections: tuple[Rejection, ...] | None
    languages: tuple[Share, ...] | None
    code_languages: tuple[Share, ...] | None
    license_classes: tuple[Share, ...] | None
    licenses: tuple[Share, ...] | None
    histograms: tuple[Histogram, ...]
    flags: tuple[Flag, ...]
    duplicates: Duplicates | None
    clusters: tuple[Cluster, ...]
    samples: tuple[Samples, ...]
    erasures: tuple[Erasure, ...]
    tokenizer: Tokenizer | None
    tokens: tuple[Tokens, ...] | None
    lengths: tuple[Histogram, ...]
    sequences: tuple[Sequences, ...] | None
    longer: dict[int, int]

    def stage(self, name: str) -> Stage | None:
        """The funnel's stage of this name; None where the lake does not go so far."""
        return next((stage for stage in self.funnel if stage.name == name), None)

    def has(self, table: str) -> bool:
        return any(state.table == table for state in self.tables)
