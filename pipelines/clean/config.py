"""The clean stage's configuration: the rule table, the licence classes and policy, what is redacted.

Defaults are read from conf/clean.yaml, the one place where thresholds stand, each with its source.
"""

from __future__ import annotations

import difflib
import functools
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from pipelines.tables import LICENSE_CLASSES, SIGNALS

DEFAULTS = Path(__file__).resolve().parents[2] / "conf" / "clean.yaml"
RedactionType = Literal["email", "ip", "phone", "card", "iban", "secret"]


@functools.cache
def _defaults() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(DEFAULTS.read_text(encoding="utf-8"))
    return loaded


class Rule(BaseModel):
    """One rule: the document is rejected when the signal lies outside [min, max]; a null signal is not judged."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(description="family.rule, as it stands in rejected_by", pattern=r"^[a-z0-9_]+\.[a-z0-9_]+$")
    signal: str = Field(description="the signal of silver.documents that it judges")
    kind: Literal["text", "code"] = Field(description="the documents that it judges")
    min: float | None = Field(None, description="least admitted value (the signal's unit)")
    max: float | None = Field(None, description="greatest admitted value (the signal's unit)")
    languages: tuple[str, ...] = Field((), description="judges these languages only; empty: all")
    except_languages: tuple[str, ...] = Field((), description="does not judge these languages")

    @field_validator("signal")
    @classmethod
    def _known_signal(cls, value: str) -> str:
        names = [SIGNALS.field(i).name for i in range(SIGNALS.num_fields)]
        if value not in names:
            near = difflib.get_close_matches(value, names, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"the signals are {', '.join(names)}"
            raise ValueError(f"there is no signal {value!r}; {hint}")
        return value

    @model_validator(mode="after")
    def _bounded(self) -> Rule:
        if self.min is None and self.max is None:
            raise ValueError(f"rule {self.name} has neither min nor max")
        return self


class CleanConfig(BaseModel):
    """Settings of the clean stage."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rules: tuple[Rule, ...] = Field(
        default_factory=lambda: tuple(Rule(**rule) for rule in _defaults()["rules"]),
        description="the rule table, which replaces the default one whole (conf/clean.yaml)",
    )
    license_classes: dict[str, tuple[str, ...]] = Field(
        default_factory=lambda: {k: tuple(v) for k, v in _defaults()["license_classes"].items()},
        description="SPDX identifiers by class, in place of conf/clean.yaml's; what no class names is unknown",
    )
    admitted_licenses: dict[Literal["text", "code"], tuple[str, ...]] = Field(
        default_factory=lambda: {k: tuple(v) for k, v in _defaults()["admitted_licenses"].items()},
        description="licence classes admitted, by kind, in place of conf/clean.yaml's",
    )
    bad_words: dict[str, tuple[str, ...]] = Field(
        default_factory=lambda: {k: tuple(v) for k, v in _defaults()["bad_words"].items()},
        description="words that c4.bad_words looks for, in lower case, by ISO 639-1 language, in place of "
        "conf/clean.yaml's",
    )
    redact: tuple[RedactionType, ...] = Field(get_args(RedactionType), description="what is redacted")

    @model_validator(mode="after")
    def _known(self) -> CleanConfig:
        names = [rule.name for rule in self.rules]
        if len(set(names)) < len(names):
            raise ValueError(f"two rules are called {next(n for n in names if names.count(n) > 1)}")
        for value in [*self.license_classes, *(c for cs in self.admitted_licenses.values() for c in cs)]:
            if value not in LICENSE_CLASSES:
                raise ValueError(f"no licence class {value!r}; the classes are {', '.join(LICENSE_CLASSES)}")
        return self
