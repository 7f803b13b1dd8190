"""OpenAI's completions protocol: what a request may say, what an error and an answer look like.

The shapes are those of the OpenAI API reference (Completions, Models, Errors). A field that the server does not support
is refused by name, but taken where it holds the value that changes nothing, since clients send such defaults.

Leaves out prompts of token ids, chat, and the fields in NO_EFFECT at other values.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import from_json

from model.network.generate import Piece, SamplingConfig

# Fields that are not supported, with the values at which they change nothing; null is one of them everywhere.
NO_EFFECT: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "logprobs": (),
    "suffix": ("",),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
}
_SAMPLING = tuple(SamplingConfig.model_fields)


class ApiError(Exception):
    """An error as the client sees it: HTTP status, one sentence, the field's name, a code; retry_after in seconds."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.retry_after = retry_after

    def body(self) -> dict[str, Any]:
        """{"error": {"message", "type", "param", "code"}}."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        if self.status == 429:
            kind = "rate_limit_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


class _StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class _Body(BaseModel):
    """The fields by type; SamplingConfig knows the ranges and the defaults of those that are its own."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str
    prompt: str | list[str]
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    echo: bool | None = None
    user: str | None = None


@dataclass(frozen=True, kw_only=True)
class CompletionRequest:
    """A request that is valid in itself; whether the model is known and the prompts fit is not yet asked."""

    model: str
    prompts: tuple[str, ...]
    sampling: SamplingConfig
    stream: bool
    include_usage: bool
    echo: bool


def parse_completion(text: bytes, max_prompts: int) -> CompletionRequest:
    """The body of POST /v1/completions. Errors: ApiError (400) with the field's name in param."""
    try:
        fields = from_json(text, allow_inf_nan=False)
    except ValueError as error:
        raise ApiError(400, f"The body is not JSON ({error}).") from None
    if not isinstance(fields, dict):
        raise ApiError(400, f"The body must be a JSON object, not {type(fields).__name__}.")
    _refuse_unsupported(fields)
    try:
        body = _Body.model_validate({name: value for name, value in fields.items() if name not in NO_EFFECT})
        given = {name: getattr(body, name) for name in _SAMPLING if getattr(body, name) is not None}
        if "stop" in given:
            given["stop"] = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
        sampling = SamplingConfig.model_validate(given)
    except ValidationError as error:
        raise _field_error(error) from None
    prompts = (body.prompt,) if isinstance(body.prompt, str) else tuple(body.prompt)
    if not 1 <= len(prompts) <= max_prompts:
        raise ApiError(400, f"prompt: {len(prompts)} prompts; send 1 to {max_prompts}.", param="prompt")
    if body.stream_options is not None and not body.stream:
        raise ApiError(400, "stream_options is for stream=true only; leave it out.", param="stream_options")
    return CompletionRequest(
        model=body.model,
        prompts=prompts,
        sampling=sampling,
        stream=bool(body.stream),
        include_usage=bool(body.stream_options and body.stream_options.include_usage),
        echo=bool(body.echo),
    )


def _refuse_unsupported(fields: Mapping[str, Any]) -> None:
    for name, harmless in NO_EFFECT.items():
        value = fields.get(name)
        if value is not None and (isinstance(value, bool) or value not in harmless):
            raise ApiError(400, f"{name} is not supported yet; leave it out.", param=name, code="unsupported_parameter")
    prompt = fields.get("prompt")
    if isinstance(prompt, list) and prompt and all(isinstance(item, int | list) for item in prompt):
        raise ApiError(400, "prompt: token ids are not supported; send text.", param="prompt")


def _field_error(error: ValidationError) -> ApiError:
    first = error.errors(include_url=False, include_context=False)[0]
    name = str(first["loc"][0])
    if first["type"] == "extra_forbidden" and len(first["loc"]) == 1:
        return ApiError(400, f"There is no field {name!r}; leave it out.", param=name, code="unknown_parameter")
    where = ".".join(str(part) for part in first["loc"]) if name == "stream_options" else name
    return ApiError(400, f"{where}: {first['msg'][0].lower()}{first['msg'][1:]}.", param=name)


class Usage:
    """Counts tokens over the pieces of a request's prompts."""

    def __init__(self) -> None:
        self._last: dict[int, Piece] = {}

    def add(self, index: int, piece: Piece) -> None:
        """Piece of the prompt with this index."""
        self._last[index] = piece

    def body(self) -> dict[str, int]:
        """The tokens of all prompts that have been begun."""
        read = sum(piece.prompt_tokens for piece in self._last.values())
        written = sum(piece.completion_tokens for piece in self._last.values())
        return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}


def choice(index: int, text: str, finish_reason: str | None) -> dict[str, Any]:
    """One element of ``choices``; index is the prompt's place in the request."""
    return {"index": index, "text": text, "logprobs": None, "finish_reason": finish_reason}


def event(data: Mapping[str, Any] | str) -> str:
    """One server-sent event (WHATWG HTML, 9.2). JSON escapes line breaks, so the data is one line."""
    return f"data: {data if isinstance(data, str) else json.dumps(data, ensure_ascii=False)}\n\n"


DONE = event("[DONE]")
