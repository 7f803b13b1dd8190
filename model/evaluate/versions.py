"""The held-out loss of registered versions on the candidate's data, as the promotion gate asks for it."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from model.errors import ModelError
from model.evaluate.held_out import EvaluateConfig, evaluate_folder, read_manifest
from model.registry.load import download, model_uri


def held_out_loss(name: str, candidate: str, *, lake: str, config: EvaluateConfig) -> Callable[[str], float]:
    """A function from a version's number to its loss in nats a token, every version on the candidate's held-out data.

    candidate: a version's number or an alias. The function raises ModelError where a version has another tokenizer:
    its loss a token says nothing beside the candidate's.
    """

    @cache
    def data() -> dict[str, Any]:
        found: dict[str, Any] = read_manifest(download(model_uri(name, candidate), lake=lake))["data"]
        return found

    def loss(version: str) -> float:
        folder = download(model_uri(name, version), lake=lake)
        if (theirs := read_manifest(folder)["data"]["tokenizer_id"]) != data()["tokenizer_id"]:
            raise ModelError(
                f"Version {version} of {name} has the tokenizer {theirs[:12]} and the candidate another, so losses a "
                "token cannot be compared; register the candidate under a name of its own."
            )
        return evaluate_folder(folder, lake, config, data=data()).total.loss

    return loss
