"""Settings of the jobs: a YAML file, then the environment (``LAKEMOE_…``), then flags; later ones win.

A job's settings class lists its sections (``clean: CleanConfig``); one YAML file may hold the sections of many jobs,
and a job takes those that are its own. A key that no job knows is an error that names the file, the key and the
nearest valid one.
"""

from __future__ import annotations

import difflib
import importlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, Field, ValidationError
from pydantic_settings import (
    BaseSettings,
    CliSettingsSource,
    EnvSettingsSource,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from jobs.catalog import JOBS


class UsageError(Exception):
    """Wrong usage or configuration, in one sentence."""

    exit_code = 2


class _Flags(CliSettingsSource[Any]):
    """The command line; its help leaves out defaults that are made by a function, whose description names them."""

    def _help_format(self, *arguments: Any, **named: Any) -> str:
        return _FACTORY.sub("", super()._help_format(*arguments, **named))


class JobSettings(BaseSettings):
    """What every job takes."""

    model_config = SettingsConfigDict(
        extra="forbid", env_prefix="LAKEMOE_", env_nested_delimiter="__", nested_model_default_partial_update=True
    )

    # Settings that a job ships with (a file of conf/); a user's file, environment and flags win over them.
    default_file: ClassVar[Path | None] = None

    lake: str = Field("./lake", description="the lake's folder, a local path")
    config: Path | None = Field(None, description="YAML file of settings")
    debug: bool = Field(False, description="show the traceback of an error")


_NEAR = 0.5  # how alike a key must be to be named for another (difflib's ratio)
_FACTORY = re.compile(r" ?\(default factory: .*\)")
_UNKNOWN_FLAG = re.compile(r"unrecognized arguments: (--[^\s=]+)")
_FILE = "config"  # the field that names the file, so none that the file may hold
CONF = Path(__file__).resolve().parent.parent / "conf"

SettingsT = TypeVar("SettingsT", bound=JobSettings)


def keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every dotted key of a settings class."""
    for name, info in model.model_fields.items():
        yield prefix + name
        for kind in (info.annotation, *get_args(info.annotation)):
            if isinstance(kind, type) and get_origin(kind) is None and issubclass(kind, BaseModel):
                yield from keys(kind, f"{prefix}{name}.")


def known_sections() -> set[str]:
    """The sections and fields of all jobs; imports every job's module, so it is called for a wrong key only."""
    names: set[str] = set()
    for job in JOBS.values():
        names |= set(importlib.import_module(job.module).Settings.model_fields)
    return names - {_FILE}


def load(settings: type[SettingsT], arguments: list[str], *, program: str) -> SettingsT:
    """Settings from ``--config`` (else the file that LAKEMOE_CONFIG names), the environment and flags.

    Raises UsageError in one sentence; argparse itself ends the process with 0 for --help.
    """
    arguments = _normalised(arguments)
    file = _config_path(arguments)
    values = _from_yaml(settings, settings.default_file) if settings.default_file else {}
    values = merged(values, _from_yaml(settings, file) if file else {})

    class Source(settings):  # type: ignore[misc, valid-type]
        @classmethod
        def settings_customise_sources(
            cls, settings_cls: type[BaseSettings], **_: Any
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            flags = _Flags(
                settings_cls,
                cli_exit_on_error=False,
                cli_prog_name=program,
                cli_parse_args=arguments,
                cli_kebab_case=True,
                cli_implicit_flags=True,
                cli_hide_none_type=True,
                cli_avoid_json=True,
            )
            return flags, EnvSettingsSource(settings_cls), InitSettingsSource(settings_cls, init_kwargs=values)

    Source.__name__ = settings.__name__
    Source.__doc__ = settings.__doc__
    try:
        return Source()
    except ValidationError as error:
        raise UsageError(_explain(error, settings, file, values)) from None
    except SettingsError as error:
        raise UsageError(_explain_flags(str(error), settings, program)) from None


def _explain_flags(words: str, settings: type[BaseModel], program: str) -> str:
    """One sentence for what argparse says: of an unknown flag the nearest one."""
    if unknown := _UNKNOWN_FLAG.search(words):
        flags = {"--" + key.replace("_", "-") for key in keys(settings)}
        near = difflib.get_close_matches(unknown[1], flags, n=1, cutoff=_NEAR)
        hint = f"did you mean {near[0]!r}?" if near else f"{program} --help lists the flags."
        return f"{program}: unknown flag {unknown[1]!r}; {hint}"
    said = " ".join(words.removeprefix("error parsing CLI: ").split()).rstrip(".")
    return f"{program}: {said}; {program} --help lists the flags."


def _normalised(arguments: list[str]) -> list[str]:
    """Flags in the kebab case that the parser knows: ``--train.learning_rate`` is taken as well."""
    out = []
    for argument in arguments:
        if argument.startswith("--") and "_" in argument.split("=")[0]:
            name, mark, value = argument.partition("=")
            argument = name.replace("_", "-") + mark + value
        out.append(argument)
    return out


def _config_path(arguments: list[str]) -> Path | None:
    for index, argument in enumerate(arguments):
        if argument.startswith("--config="):
            return Path(argument.partition("=")[2])
        if argument == "--config" and index + 1 < len(arguments):
            return Path(arguments[index + 1])
    named = os.environ.get("LAKEMOE_CONFIG")
    return Path(named) if named else None


def _from_yaml(settings: type[BaseModel], file: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"Cannot read {file}: {error.strerror}; name another file with --config.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{file} is not YAML: {' '.join(str(error).split())}.") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UsageError(f"{file} must hold a mapping of sections, and holds a {type(values).__name__}.")
    own = set(settings.model_fields) - {_FILE}
    if unknown := [name for name in values if name not in own]:
        everything = known_sections()
        for name in unknown:
            if name not in everything:
                raise UsageError(f"{file}: unknown key {name!r}; {_nearest(str(name), everything)}")
    return {name: value for name, value in values.items() if name in own}


def merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """``over`` laid over ``base``, sections key by key."""
    out = dict(base)
    for name, value in over.items():
        both = isinstance(value, dict) and isinstance(out.get(name), dict)
        out[name] = merged(out[name], value) if both else value
    return out


def _nearest(key: str, valid: set[str]) -> str:
    """The end of a sentence about an unknown key."""
    found = difflib.get_close_matches(key, valid, n=1, cutoff=_NEAR)
    return f"did you mean {found[0]!r}?" if found else f"valid keys are {', '.join(sorted(valid)[:8])}."


def _explain(error: ValidationError, settings: type[BaseModel], file: Path | None, values: dict[str, Any]) -> str:
    """One sentence for the first error: where it was written, the key, what is wrong, the nearest valid key."""
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    where = f"{file}: " if file and _holds(values, first["loc"]) else ""
    if first["type"] == "extra_forbidden":
        return f"{where}unknown key {key!r}; {_nearest(key, set(keys(settings)))}"
    # What a validator of ours says is a sentence that names the value by itself.
    message = first["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    got = "" if first["type"] in ("missing", "value_error") else f", not {first['input']!r}"
    end = "" if message.endswith((".", "?")) else "."
    return f"{where}{key or 'settings'}: {message}{got}{end}"


def _holds(values: Any, path: tuple[int | str, ...]) -> bool:
    for part in path:
        try:
            values = values[part]
        except (KeyError, IndexError, TypeError):
            return False
    return True
