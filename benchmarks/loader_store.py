"""Loader from an object store that is slow: tokens a second over one shuffled epoch with and without reading ahead.

    python benchmarks/loader_store.py --latency 0.05        # needs moto

The store is moto's S3 server on localhost, in a process of its own, behind a proxy in this process that lets each
request wait. The peer is the same code with one batch of horizon and one thread: row groups are read one after the
other, each when a batch needs it.
"""

from __future__ import annotations

import http.client
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest import mock

from pyarrow import fs

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.corpus import write_sequences
from benchmarks.harness import Result, arguments, compare, finish, out
from benchmarks.loader import BATCH, check, digests, drain
from model.loader import loader, readahead
from model.loader.loader import Batch, SequenceLoader
from model.loader.snapshot import Snapshot, open_sequences

TARGET = 2.0
# It ends with the process that started it, however that ends: its standard input is closed then.
SERVER = """
import logging, os, sys, threading
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server
server = make_server("127.0.0.1", 0, DomainDispatcherApplication(create_backend_app), threaded=True)
logging.getLogger("werkzeug").setLevel(logging.ERROR)
print(server.server_port, flush=True)
threading.Thread(target=lambda: os._exit(bool(sys.stdin.read())), daemon=True).start()
server.serve_forever()
"""
BUCKET = "lake"
# A fault of one request: a status to answer with, or what is done to the true answer.
CUT, RESET = "cut", "reset"
Fault = int | str | None


@contextmanager
def s3_server() -> Iterator[int]:
    """moto's server with an empty bucket; its port on localhost."""
    with subprocess.Popen(
        [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            port = int(process.stdout.readline())
            connection = http.client.HTTPConnection("127.0.0.1", port)
            connection.request("PUT", f"/{BUCKET}")
            assert connection.getresponse().status == 200
            yield port
        finally:
            process.terminate()


class Proxy:
    """Passes requests on to a port of localhost, after `latency` seconds, with the faults that `fault` says.

    fault: of a method and path, called once a request: a status to answer with instead, CUT (half of the body, then the
    connection is closed), RESET (closed without an answer) or None. seen: method, path and fault of each request.
    """

    def __init__(self, upstream: int) -> None:
        self.latency = 0.0
        self.fault: Callable[[str, str], Fault] = lambda method, path: None
        self.seen: list[tuple[str, str, Fault]] = []
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_expect_100(self) -> bool:
                # Azure's client waits for a 100 also where it sends nothing. A server may leave it out there (RFC 9110,
                # section 10.1.1). Where one reaches the client in one piece with the answer, it takes the answer's
                # headers for its body, and ends the process where that should be XML.
                return self.headers.get("Content-Length", "0") == "0" or super().handle_expect_100()

            def _pass(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                time.sleep(proxy.latency)
                fault = proxy.fault(self.command, self.path)
                proxy.seen.append((self.command, self.path, fault))
                if fault == RESET:
                    self.close_connection = True
                    return
                if isinstance(fault, int):
                    code = {403: "AccessDenied", 404: "NoSuchKey", 503: "SlowDown"}.get(fault, "InternalError")
                    self._answer(fault, [], f"<Error><Code>{code}</Code><Message>{code}</Message></Error>".encode())
                    return
                connection = http.client.HTTPConnection("127.0.0.1", upstream)
                connection.request(self.command, self.path, body, dict(self.headers))
                response = connection.getresponse()
                answer = response.read()
                kept = [
                    (k, v) for k, v in response.getheaders() if k.lower() not in ("connection", "transfer-encoding")
                ]
                self._answer(response.status, kept, answer, cut=fault == CUT)
                connection.close()

            def _answer(self, status: int, headers: list[tuple[str, str]], body: bytes, cut: bool = False) -> None:
                self.send_response_only(status)
                for name, value in headers:
                    self.send_header(name, value)
                if not any(name.lower() == "content-length" for name, _ in headers):
                    self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body[: len(body) // 2] if cut else body)
                self.close_connection = self.close_connection or cut

            do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _pass

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def environment(port: int) -> dict[str, str]:
    """What deltalake and the loader look for, for a server on this port."""
    return {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ALLOW_HTTP": "true",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }


def upload(folder: str, port: int, name: str) -> str:
    """A lake's files into the bucket; its URI there."""
    store = fs.S3FileSystem(
        access_key="key", secret_key="secret", region="us-east-1", endpoint_override=f"127.0.0.1:{port}", scheme="http"
    )
    fs.copy_files(folder, f"{BUCKET}/{name}", destination_filesystem=store)
    return f"s3://{BUCKET}/{name}"


def epoch(snapshot: Snapshot) -> Iterator[Batch]:
    return islice(SequenceLoader(snapshot, BATCH), snapshot.num_sequences // BATCH)


def without_readahead(snapshot: Snapshot) -> Iterator[Batch]:
    with mock.patch.object(readahead, "HORIZON", 1), mock.patch.object(loader, "THREADS_REMOTE", 1):
        yield from epoch(snapshot)


def measure(local: Snapshot, remote: Snapshot, latency: float, repetitions: int) -> Result:
    """Check that both read what lies on the disk, then time them."""
    rows = [
        digests(row.astype("<u4") for batch in batches for row in batch.tokens.numpy())
        for batches in (epoch(local), epoch(remote), without_readahead(remote))
    ]
    check(rows[1], rows[0])
    check(rows[2], rows[0])
    result = compare(
        claim="loader, slow store",
        ours=("SequenceLoader, one shuffled epoch", lambda: drain(epoch(remote))),
        peer=("the same without reading ahead", lambda: drain(without_readahead(remote))),
        target=TARGET,
        tokens=remote.num_sequences * remote.sequence_length,
        repetitions=repetitions,
        notes={"latency_seconds": latency, "row_groups": len(remote.file_G), "sequences": remote.num_sequences},
    )
    return replace(result, reached=result.ratio.median >= TARGET)  # waiting takes no CPU time


def main() -> int:
    parser = arguments(__doc__, megabytes=40, repetitions=5)
    parser.add_argument("--latency", type=float, default=0.05, help="that each request waits (seconds)")
    parser.add_argument("--window", type=float, default=8, help="tokens shuffled together (2^20 bytes)")
    asked = parser.parse_args()
    with TemporaryDirectory(prefix="lakemoe-bench-") as folder, s3_server() as port:
        write_sequences(Path(folder), asked.megabytes, sequence_length=2048, files=64, multiple=BATCH)
        lake = upload(folder, port, "bench")
        proxy = Proxy(port)
        with mock.patch.dict(os.environ, environment(proxy.port)):
            window = int(asked.window * (1 << 20))
            local = open_sequences(folder, window_bytes=window)
            proxy.latency = asked.latency
            start = time.perf_counter()
            remote = open_sequences(lake, window_bytes=window)
            out.print(f"loader: opened in {time.perf_counter() - start:.2f} s, {len(remote.file_G)} row groups")
            code = finish("loader_store", asked.out, lambda: measure(local, remote, asked.latency, asked.repetitions))
        proxy.close()
    return code


if __name__ == "__main__":
    sys.exit(main())
