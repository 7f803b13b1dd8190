"""Several processes that are one another's ranks, as torchrun would start them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def run_ranks(size: int, program: str, *arguments: str, **environment: str) -> list[str]:
    """Run a program in so many processes, rank by rank what it said; fails where one does, as the others then wait."""
    common = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    common |= {"PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1", **environment}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program, *arguments],
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(size)
    ]
    try:
        while any(p.poll() is None for p in processes) and not any(p.poll() for p in processes):
            time.sleep(0.1)
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
    outputs = [p.stdout.read() for p in processes if p.stdout is not None]
    assert [p.wait() for p in processes] == [0] * size, "\n".join(o[-3000:] for o in outputs)
    return outputs
