"""config.json from a ModelConfig and back, by a layout's table of keys. Leaves out everything but the architecture."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from model.config import ModelConfig
from model.convert.layouts import LAYOUTS, REQUIRED, Key, Layout
from model.errors import ModelError

_ABSENT = object()
# Each of them changes what the network computes, or what its tensors mean, and none is known here.
_REFUSED = ("rope_scaling", "quantization_config")


def to_config_json(config: ModelConfig, layout: Layout) -> dict[str, Any]:
    """The architecture as config.json says it, for a model that the layout holds (layouts.choose_layout).

    The balance loss's weight is carried as the number that it is; transformers' loss is top-k times ours
    (model.network.moe.balance_loss).
    """
    out: dict[str, Any] = {"architectures": [layout.architecture], "model_type": layout.name}
    for name, key in layout.keys.items():
        value = getattr(config, name)
        if key.values is not None:
            value = key.values[value]
        for path in key.paths:
            _put(out, path, key.none if value is None else value)
    for path, value in layout.says.items():
        _put(out, path, value)
    return out


def from_config_json(said: Mapping[str, Any], *, source: str) -> tuple[ModelConfig, Layout]:
    """Configuration and layout that a config.json means; ``source`` names it in errors.

    Errors: ModelError (2), one sentence that names the key, for an unknown architecture, a key that is missing or
    contradicts another, and a value that the network does not have.
    """
    layout = LAYOUTS.get(str(said.get("model_type")))
    if layout is None:
        known = ", ".join(LAYOUTS)
        raise ModelError(f"{source}: model_type {said.get('model_type')!r} is not known; these are: {known}.", 2)
    for path, value in [*layout.says.items(), *((path, None) for path in _REFUSED)]:
        if (found := _get(said, path)) is not _ABSENT and found != value:
            raise ModelError(f"{source}: {path} {found!r} is not supported, only {value!r} is.", 2)
    fields = {name: _read(said, name, key, source) for name, key in layout.keys.items()}
    if fields.get("head_width") is None:
        if fields["width"] % fields["heads"]:
            raise ModelError(f"{source}: the width {fields['width']} is no multiple of {fields['heads']} heads.", 2)
        fields["head_width"] = fields["width"] // fields["heads"]
    try:
        return ModelConfig(name=layout.name, **layout.fixed, **fields), layout
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or "the model"
        raise ModelError(f"{source}: {key}: {first['msg']}; correct it.", 2) from error


def _read(said: Mapping[str, Any], name: str, key: Key, source: str) -> Any:
    found = {path: value for path in key.paths if (value := _get(said, path)) is not _ABSENT}
    if not found and key.absent is REQUIRED:
        raise ModelError(f"{source} does not say {key.paths[0]}; add it.", 2)
    values = list(found.values()) or [key.absent]
    if any(value != values[0] for value in values):
        both = " and ".join(f"{path} {value!r}" for path, value in found.items())
        raise ModelError(f"{source}: {both} contradict each other; correct one.", 2)
    if key.values is None:
        return None if values[0] == key.none else values[0]
    for ours, theirs in key.values.items():
        if theirs == values[0]:
            return ours
    raise ModelError(f"{source}: {key.paths[0]} {values[0]!r} is not supported, only {list(key.values.values())}.", 2)


def _get(tree: Mapping[str, Any], path: str) -> Any:
    at: Any = tree
    for part in path.split("."):
        if not isinstance(at, Mapping) or part not in at:
            return _ABSENT
        at = at[part]
    return at


def _put(tree: dict[str, Any], path: str, value: Any) -> None:
    *sections, last = path.split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
    tree[last] = value
