"""The HTTP side: OpenAI's routes over the worker. Its handlers wait, they never compute.

Leaves out metrics, API keys, request logs and a page at /.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from model.serve.config import ServeConfig
from model.serve.protocol import DONE, ApiError, CompletionRequest, Usage, choice, event, parse_completion
from model.serve.worker import Job, Part, Worker


@dataclass(frozen=True, kw_only=True)
class ServedModel:
    """The version that is served; created is seconds since 1970, alias is None where the URI names a version."""

    uri: str
    name: str
    version: str
    alias: str | None
    created: int

    def goes_by(self, model: str) -> bool:
        """Whether a request for ``model`` means this version."""
        return model in (self.name, self.uri, f"models:/{self.name}/{self.version}")

    def body(self) -> dict[str, Any]:
        """OpenAI's model object."""
        return {"id": self.name, "object": "model", "created": self.created, "owned_by": "lakemoe"}


def build_app(served: ServedModel, worker: Worker, config: ServeConfig) -> FastAPI:
    """The application: GET /health, /v1/models, /v1/models/ID and POST /v1/completions. The worker must be started."""
    # No pages of documentation: they load their scripts from a content network.
    app = FastAPI(title="lakemoe", openapi_url=None)

    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> Response:
        headers = {} if error.retry_after is None else {"Retry-After": str(error.retry_after)}
        return JSONResponse(error.body(), status_code=error.status, headers=headers)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        found = ApiError(error.status_code, f"{request.method} {request.url.path}: {error.detail}.")
        return JSONResponse(found.body(), status_code=found.status, headers=error.headers)

    @app.get("/health")
    async def health() -> Response:
        body = {
            "status": "draining" if worker.draining else "ok",
            "model": served.name,
            "version": served.version,
            "alias": served.alias,
            "requests": worker.load,
        }
        return JSONResponse(body, status_code=503 if worker.draining else 200)

    @app.get("/v1/models")
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": [served.body()]})

    # A path, since models:/NAME@ALIAS has a slash.
    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        _check_model(served, name)
        return JSONResponse(served.body())

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        deadline = asyncio.get_running_loop().time() + config.timeout
        asked = parse_completion(await _read_body(request, config.max_body, deadline), config.max_prompts)
        _check_model(served, asked.model)
        # A long prompt takes time to tokenize, and the event loop has none.
        await asyncio.to_thread(worker.check, asked.prompts, asked.sampling)
        head = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": served.name,
            "system_fingerprint": f"{served.name}/{served.version}",
        }
        parts = _parts(request, worker, asked, config.timeout, deadline)
        if not asked.stream:
            return JSONResponse({**head, **await _collected(parts, asked)})
        # What fails before the first piece is answered with its status; later it can only be an event.
        first = await anext(parts)
        return StreamingResponse(
            _events(first, parts, head, asked),
            media_type="text/event-stream",
            headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
        )

    return app


def _check_model(served: ServedModel, name: str) -> None:
    if not served.goes_by(name):
        message = f"There is no model {name!r} here; this server has {served.name!r}."
        raise ApiError(404, message, param="model", code="model_not_found")


async def _read_body(request: Request, most: int, deadline: float) -> bytes:
    body = bytearray()
    try:
        async with asyncio.timeout_at(deadline):
            async for chunk in request.stream():
                body += chunk
                if len(body) > most:
                    raise ApiError(413, f"The body is larger than {most} bytes; send fewer or shorter prompts.")
    except TimeoutError:
        raise ApiError(408, "The body did not come in time; send it again.") from None
    return bytes(body)


@asynccontextmanager
async def _running(request: Request, worker: Worker, job: Job, timeout: float, deadline: float) -> AsyncIterator[None]:
    """Ends the job when the client goes away, when its time is over, and when the body is left."""

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        worker.cancel(job, ApiError(499, "The client went away."))

    late = ApiError(504, f"The request took longer than {timeout:g} s; lower max_tokens.", code="timeout")
    timer = asyncio.get_running_loop().call_at(deadline, worker.cancel, job, late)
    watcher = asyncio.create_task(watch())
    try:
        yield
    finally:
        worker.cancel(job)
        timer.cancel()
        watcher.cancel()


async def _parts(
    request: Request, worker: Worker, asked: CompletionRequest, timeout: float, deadline: float
) -> AsyncGenerator[Part, None]:
    """Submits the request and gives its pieces. Errors: ApiError."""
    job = worker.submit(asked.prompts, asked.sampling)
    async with _running(request, worker, job, timeout, deadline):
        async for part in job.parts():
            yield part


async def _collected(parts: AsyncGenerator[Part, None], asked: CompletionRequest) -> dict[str, Any]:
    texts = list(asked.prompts) if asked.echo else [""] * len(asked.prompts)
    reasons: dict[int, str | None] = {}
    usage = Usage()
    async for part in parts:
        texts[part.index] += part.piece.text
        reasons[part.index] = part.piece.finish_reason
        usage.add(part.index, part.piece)
    return {"choices": [choice(i, text, reasons[i]) for i, text in enumerate(texts)], "usage": usage.body()}


async def _events(
    first: Part, parts: AsyncGenerator[Part, None], head: dict[str, Any], asked: CompletionRequest
) -> AsyncIterator[str]:
    """The server-sent events of a stream. One that fails ends with an error event and without [DONE]."""
    usage = Usage()
    begun: set[int] = set()
    more: dict[str, Any] = {"usage": None} if asked.include_usage else {}

    def chunk(part: Part) -> str:
        usage.add(part.index, part.piece)
        text = part.piece.text
        if asked.echo and part.index not in begun:
            text = asked.prompts[part.index] + text
        begun.add(part.index)
        return event({**head, "choices": [choice(part.index, text, part.piece.finish_reason)], **more})

    try:
        async with aclosing(parts):
            yield chunk(first)
            async for part in parts:
                yield chunk(part)
    except ApiError as error:
        yield event(error.body())
        return
    if asked.include_usage:
        yield event({**head, "choices": [], "usage": usage.body()})
    yield DONE
