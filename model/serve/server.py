"""A registered model behind HTTP: binds, loads, serves until a signal, drains, ends.

SIGTERM or SIGINT drains: requests that were accepted finish, new ones are told 503, then ``run`` returns. The time for
it is bounded by ServeConfig.drain, after which what still runs is ended with an error; a second signal does so at once.

Leaves out re-reading the alias (the version is resolved once, at the start), several models, and continuous batching.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import shlex
import signal
import socket
from collections.abc import Iterator
from importlib.util import find_spec
from typing import TYPE_CHECKING

from model.device import pick_device
from model.errors import ModelError
from model.network.generate import SamplingConfig, generate
from model.registry.load import find, load
from model.serve.config import ServeConfig
from model.serve.protocol import ApiError
from model.serve.worker import Worker

if TYPE_CHECKING:
    from model.serve.app import ServedModel

# Once nothing runs any more, how long the last answers may take to reach their clients (s).
FLUSH = 3


class Server:
    """A loaded model and a bound socket; clients that come before ``run`` wait for it."""

    def __init__(self, served: ServedModel, worker: Worker, listener: socket.socket, config: ServeConfig) -> None:
        self.served = served
        self.worker = worker
        self.config = config
        self._listener = listener

    @property
    def address(self) -> str:
        """http://HOST:PORT, for a client on this machine."""
        host, port = self._listener.getsockname()[:2]
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    @property
    def example(self) -> str:
        """A curl command that asks this server for a completion."""
        most = min(32, self.worker.context // 2)
        body = json.dumps({"model": self.served.name, "prompt": "def ", "max_tokens": most}, ensure_ascii=False)
        return f"curl {self.address}/v1/completions -H 'Content-Type: application/json' -d {shlex.quote(body)}"

    def run(self) -> None:
        """Serves until SIGTERM or SIGINT has drained it. Call it in the main thread, once."""
        self.worker.start()
        try:
            asyncio.run(self._serve())
        finally:
            self.worker.stop(FLUSH)
            self._listener.close()

    async def _serve(self) -> None:
        import uvicorn

        from model.serve.app import build_app

        class Uvicorn(uvicorn.Server):
            # uvicorn's own handlers would close the port at once, refuse nobody with 503, and end by the signal.
            @contextlib.contextmanager
            def capture_signals(self) -> Iterator[None]:
                yield

        settings = uvicorn.Config(
            build_app(self.served, self.worker, self.config),
            lifespan="off",
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=FLUSH,
        )
        server = Uvicorn(settings)
        loop = asyncio.get_running_loop()
        drains: list[asyncio.Task[None]] = []

        async def drain() -> None:
            await asyncio.to_thread(self.worker.wait_idle, self.config.drain)
            self._end_all()
            server.should_exit = True

        def on_signal() -> None:
            self.worker.draining = True
            if drains:
                self._end_all()
            else:
                drains.append(asyncio.create_task(drain()))

        signals = (signal.SIGTERM, signal.SIGINT)
        for number in signals:
            loop.add_signal_handler(number, on_signal)
        try:
            await server.serve(sockets=[self._listener])
            await asyncio.gather(*drains)
        finally:
            for number in signals:
                loop.remove_signal_handler(number)

    def _end_all(self) -> None:
        self.worker.cancel_all(ApiError(503, "The server is shutting down.", code="draining"))


def open_server(uri: str, *, lake: str, config: ServeConfig | None = None) -> Server:
    """Binds the address and loads models:/NAME@ALIAS or models:/NAME/VERSION of a lake.

    Errors: ModelError; 2 without the extra ``serve`` or where the address cannot be used, 75 where the port is taken.
    """
    config = config or ServeConfig()
    if any(find_spec(package) is None for package in ("fastapi", "uvicorn")):
        raise ModelError("Serving needs the extra: pip install 'lakemoe[serve]'.", 2)
    from model.serve.app import ServedModel

    device = pick_device(config.device, "serve.device")
    listener = _listen(config.host, config.port)
    try:
        version = find(uri, lake=lake)
        # By its number: the alias may move between the two calls.
        loaded = load(f"models:/{version.name}/{version.version}", lake=lake, device=device)
        # The first token imports and compiles for seconds, which no request shall wait for.
        list(generate(loaded.transformer, loaded.tokenizer, "", SamplingConfig(max_tokens=1)))
    except BaseException:
        listener.close()
        raise
    served = ServedModel(
        uri=uri,
        name=loaded.name,
        version=loaded.version,
        alias=uri.partition("@")[2] or None,
        created=int(version.creation_timestamp) // 1000,
    )
    return Server(served, Worker(loaded.transformer, loaded.tokenizer, config.queue), listener, config)


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=128)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ModelError(
                f"Port {port} of {host} is taken; end what listens there, or name another with --serve.port.", 75
            ) from error
        raise ModelError(
            f"Cannot listen on {host} port {port} ({error.strerror or error}); "
            "name others with --serve.host and --serve.port.",
            2,
        ) from error
