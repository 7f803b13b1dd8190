"""The thread that owns the model: requests wait in a bounded queue, and their text comes out on the event loop.

The event loop calls submit and cancel and never computes; the thread computes and never touches a connection. A job's
pieces go to its own queue on the event loop, which the request's max_tokens bounds, so a slow reader holds nobody up.

Leaves out continuous batching: one prompt at a time, a request's prompts one after the other. A later change adds it.
A cancelled job ends at its next piece of text, not inside one.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import threading
import time
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass

from tokenizers import Tokenizer

from model.errors import ModelError
from model.network.generate import Piece, SamplingConfig, encode_prompt, generate
from model.network.transformer import Transformer
from model.serve.protocol import ApiError

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Part:
    """A piece of the completion of the prompt with this index."""

    index: int
    piece: Piece


class Job:
    """One request's prompts on their way through the worker. Made and read on the event loop ``loop``."""

    def __init__(self, prompts: tuple[str, ...], sampling: SamplingConfig, loop: asyncio.AbstractEventLoop) -> None:
        self.prompts = prompts
        self.sampling = sampling
        self.ended = threading.Event()
        self._loop = loop
        self._events: asyncio.Queue[Part | ApiError | None] = asyncio.Queue()

    async def parts(self) -> AsyncIterator[Part]:
        """The pieces as they come. Errors: ApiError, where the job failed or was cancelled with one."""
        while (got := await self._events.get()) is not None:
            if isinstance(got, ApiError):
                raise got
            yield got

    def put(self, event: Part | ApiError | None) -> None:
        """Called by the worker's thread; None is the end."""
        # At the end of the process the loop may be closed, and nobody reads.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)


class Worker:
    """One model, one thread. queue is the most jobs that wait beside the one that runs.

    submit and cancel belong to the event loop; the other methods may be called from any thread. ``draining`` refuses
    new jobs.
    """

    def __init__(self, transformer: Transformer, tokenizer: Tokenizer, queue: int) -> None:
        self._transformer = transformer
        self._tokenizer = tokenizer
        self._queue = queue
        self._waiting: deque[Job] = deque()
        self._running: Job | None = None
        self._seconds = 1.0
        self._stopping = False
        self._changed = threading.Condition()
        # A daemon: a step that hangs must not keep the process from ending.
        self._thread = threading.Thread(target=self._run, name="lakemoe-worker", daemon=True)
        self.draining = False

    @property
    def context(self) -> int:
        """Most tokens of a prompt and its completion together."""
        return self._transformer.config.max_seq_len

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self, timeout: float) -> None:
        """End the thread; the job that runs ends at its next piece, which is waited for at most ``timeout`` seconds."""
        self.cancel_all(ApiError(503, "The server is shutting down."))
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        self._thread.join(timeout)

    def check(self, prompts: tuple[str, ...], sampling: SamplingConfig) -> None:
        """Whether every prompt fits the model; for any thread. Errors: ApiError (400)."""
        param = "max_tokens" if sampling.max_tokens >= self.context else "prompt"
        for prompt in prompts:
            try:
                encode_prompt(self._transformer, self._tokenizer, prompt, sampling.max_tokens)
            except ModelError as error:
                raise ApiError(400, str(error), param=param, code="context_length_exceeded") from None

    def submit(self, prompts: tuple[str, ...], sampling: SamplingConfig) -> Job:
        """A job at the queue's end. Errors: ApiError, 503 while draining, 429 where the queue is full."""
        if self.draining:
            raise ApiError(503, "The server is shutting down; send the request to another one.", code="draining")
        job = Job(prompts, sampling, asyncio.get_running_loop())
        with self._changed:
            if self.load > self._queue:
                raise ApiError(
                    429,
                    f"{self.load} requests run or wait already; try again later.",
                    code="queue_full",
                    retry_after=max(1, math.ceil(self._seconds)),
                )
            self._waiting.append(job)
            self._changed.notify_all()
        return job

    def cancel(self, job: Job, error: ApiError | None = None) -> None:
        """Ends a job: one that waits leaves the queue, one that runs stops. Its reader gets ``error``, if any."""
        if job.ended.is_set():
            return
        if error is not None:
            job.put(error)
        job.ended.set()
        with self._changed, contextlib.suppress(ValueError):
            self._waiting.remove(job)
            self._changed.notify_all()

    def cancel_all(self, error: ApiError) -> None:
        """Ends every job that runs or waits; the readers get ``error``."""
        with self._changed:
            jobs = [*self._waiting, *([self._running] if self._running else [])]
        for job in jobs:
            self.cancel(job, error)

    def wait_idle(self, timeout: float) -> bool:
        """Waits until no job runs or waits, at most ``timeout`` seconds; whether that came. It blocks."""
        with self._changed:
            return self._changed.wait_for(lambda: self.load == 0, timeout)

    @property
    def load(self) -> int:
        """Jobs that run or wait."""
        return len(self._waiting) + (self._running is not None)

    def _next(self) -> Job | None:
        with self._changed:
            while not (self._waiting or self._stopping):
                self._changed.wait()
            # One critical section, so that a job is always seen as waiting or as running.
            self._running = self._waiting.popleft() if self._waiting else None
            return self._running

    def _run(self) -> None:
        while (job := self._next()) is not None:
            began = time.monotonic()
            end = self._complete(job)
            # After a cancel the reader has its error, and an end could overtake it.
            if not job.ended.is_set():
                job.put(end)
                job.ended.set()
            with self._changed:
                self._running = None
                self._seconds += 0.2 * (time.monotonic() - began - self._seconds)
                self._changed.notify_all()

    def _complete(self, job: Job) -> ApiError | None:
        """Puts a job's pieces out until it ends or was cancelled; the error that it ended with."""
        try:
            for index, prompt in enumerate(job.prompts):
                for piece in generate(self._transformer, self._tokenizer, prompt, job.sampling):
                    if job.ended.is_set():
                        return None
                    job.put(Part(index=index, piece=piece))
        except ModelError as error:
            return ApiError(400, str(error), param="prompt")
        except Exception:
            # The thread must outlive one request's failure; the client is not told what is inside.
            log.exception("a request failed")
            return ApiError(500, "The server failed on this request; its log says why.")
        return None
