"""The gate to the alias ``champion``: a version passes when its held-out loss is not worse than the champion's.

Every decision is a row of ops.promotions. Leaves out roll-back, and rules on domains, size and latency.
"""

from __future__ import annotations

import getpass
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal

import pyarrow as pa
from deltalake import DeltaTable, write_deltalake
from deltalake.exceptions import DeltaError
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from pydantic import BaseModel, ConfigDict, Field

from model.errors import ModelError
from model.registry.load import model_uri, resolve
from model.registry.store import connect
from model.registry.tables import read_rows
from pipelines.tables import OPS_PROMOTIONS

CHAMPION, CHALLENGER = "champion", "challenger"


class PromotionConfig(BaseModel):
    """The gate's rule."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tolerance: float = Field(
        default=0.0, ge=0, description="how much worse than the champion's the held-out loss may be (nats a token)"
    )


@dataclass(frozen=True, kw_only=True)
class PromotionDecision:
    """What the gate decided and why. recorded is False where nothing new was decided: it is the champion already."""

    promotion_id: str
    at: datetime
    model: str
    candidate_version: str
    champion_version: str | None
    decision: Literal["promoted", "refused"]
    reason: str
    figures: dict[str, float] = field(default_factory=dict)
    requested_by: str
    recorded: bool = True

    @property
    def promoted(self) -> bool:
        """Whether the candidate is the champion now."""
        return self.decision == "promoted"


def promote(
    name: str,
    version: str,
    *,
    lake: str,
    held_out_loss: Callable[[str], float],
    config: PromotionConfig | None = None,
    requested_by: str | None = None,
) -> PromotionDecision:
    """Asks the gate to make a version, by its number or an alias, the champion.

    held_out_loss gives the loss of a version (its number as text) in nats a token; it is asked for the candidate and,
    where there is one, the champion, and must measure both on the same data. The decision is written before the alias
    moves, so that a kill between the two is finished by the next call. Errors: ModelError.
    """
    client = connect(lake, create=False)
    champion = champion_version(client, name)
    if version == CHALLENGER and champion is not None and _alias(client, name, CHALLENGER) is None:
        version = champion  # it was the challenger; nothing has come since
    version = str(resolve(client, model_uri(name, version)).version)
    who = requested_by or os.environ.get("LAKEMOE_USER") or _user()
    now = datetime.now(UTC)
    common: dict[str, Any] = {"model": name, "candidate_version": version, "requested_by": who, "at": now}
    common["promotion_id"] = f"{time.time_ns():020d}-{os.urandom(4).hex()}"
    if champion == version:
        reason = f"Version {version} is the champion already."
        return PromotionDecision(
            **common, champion_version=champion, decision="promoted", reason=reason, recorded=False
        )
    candidate_loss = held_out_loss(version)
    champion_loss = None if champion is None else held_out_loss(champion)
    passed, reason = judge(candidate_loss, champion_loss, (config or PromotionConfig()).tolerance)
    figures = {"candidate_loss": candidate_loss, "tolerance": (config or PromotionConfig()).tolerance}
    if champion_loss is not None:
        figures["champion_loss"] = champion_loss
    decision = PromotionDecision(
        **common,
        champion_version=champion,
        decision="promoted" if passed else "refused",
        reason=reason,
        figures=figures,
    )
    if not (passed and _pending(lake, decision)):
        _append(lake, decision)
    if passed:
        client.set_registered_model_alias(name, CHAMPION, version)
        if _alias(client, name, CHALLENGER) == version:
            client.delete_registered_model_alias(name, CHALLENGER)
    return decision


def judge(candidate: float, champion: float | None, tolerance: float) -> tuple[bool, str]:
    """Whether the candidate passes, and one sentence why. Losses and tolerance in nats a token."""
    if not math.isfinite(candidate):
        return False, f"The held-out loss {candidate} is no finite number."
    if champion is None:
        return True, f"There was no champion; the held-out loss is {candidate:.4f}."
    compared = f"held-out loss {candidate:.4f} against the champion's {champion:.4f}, tolerance {tolerance:.4f}"
    if not math.isfinite(champion) or candidate <= champion + tolerance:
        return True, f"Not worse: {compared}."
    return False, f"Worse: {compared}."


def champion_version(client: MlflowClient, name: str) -> str | None:
    """The champion's version, None where there is none."""
    return _alias(client, name, CHAMPION)


def _alias(client: MlflowClient, name: str, alias: str) -> str | None:
    try:
        return str(client.get_model_version_by_alias(name, alias).version)
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise ModelError(f"The registry {client.tracking_uri} does not answer ({error.message}).", 75) from error


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container whose user has no name
        return "unknown"


def _pending(lake: str, decision: PromotionDecision) -> bool:
    """Whether the model's last row is this very promotion: written, and killed before the alias moved."""
    rows = [r for r in read_rows(OPS_PROMOTIONS.uri(lake)) if r["model"] == decision.model]
    if not rows:
        return False
    last = max(rows, key=lambda r: r["promotion_id"])
    compared = ("candidate_version", "champion_version", "decision")
    return all(last[key] == getattr(decision, key) for key in compared)


def _append(lake: str, decision: PromotionDecision) -> None:
    row = {key: getattr(decision, key) for key in OPS_PROMOTIONS.schema.names}
    row["figures"] = list(decision.figures.items())
    uri = OPS_PROMOTIONS.uri(lake)
    # The protocol follows from the features; these two are no properties that a table keeps.
    protocol = ("delta.minReaderVersion", "delta.minWriterVersion")
    properties = {key: value for key, value in OPS_PROMOTIONS.table_properties.items() if key not in protocol}
    try:
        table = DeltaTable.create(
            uri,
            OPS_PROMOTIONS.schema,
            mode="ignore",
            name=OPS_PROMOTIONS.name,
            description=OPS_PROMOTIONS.comment,
            configuration=properties,
        )
        write_deltalake(table, pa.Table.from_pylist([row], schema=OPS_PROMOTIONS.schema), mode="append")
    except (DeltaError, OSError) as error:
        raise ModelError(f"The decision could not be written to {uri} ({error}); promote again.", 75) from error
