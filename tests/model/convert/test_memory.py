"""A model is never in memory twice while it is converted, in either direction.

What is measured is anonymous memory: pages of a file that is read by mmap are the kernel's to drop, and are no copy.
"""

from __future__ import annotations

import ctypes
import gc
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from model.convert.hugging_face import from_hugging_face, to_hugging_face
from model.convert.tensors import shapes
from model.weights import LazyTensors
from tests.model.conftest import byte_tokenizer
from tests.model.convert.small import network, small

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc and trims glibc's heap")


def anonymous() -> int:
    """RssAnon of this process in bytes (proc(5))."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))


def most(work: Callable[[], object]) -> int:
    """The most bytes that ``work`` takes above what there was, looked at every half millisecond."""
    gc.collect()
    # What was freed goes back to the kernel, so that taking it again is seen.
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = peak = anonymous()
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, anonymous())
            time.sleep(0.0005)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        kept = work()
        peak = max(peak, anonymous())
        del kept
    finally:
        done.set()
        thread.join()
    return peak - before


def test_the_measure_sees_a_copy() -> None:
    kept = torch.ones(4_000_000)
    assert most(lambda: kept.clone()) > 0.9 * kept.nbytes
    assert most(lambda: kept.sum()) < 0.1 * kept.nbytes


@pytest.mark.parametrize("preset", ["dbrx", "mixtral-8x7b"])
def test_a_model_of_64_mb_goes_through_in_pieces(preset: str, tmp_path: Path) -> None:
    config = small(preset, vocab_size=2048, width=256, head_width=64, layers=4, experts=8, expert_width=640)
    size = 4 * config.parameters
    assert size > 60_000_000
    model = network(config)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    del model
    byte_tokenizer().save(str(tmp_path / "tokenizer.json"))

    def export() -> None:
        with LazyTensors([tmp_path / "model.safetensors"]) as weights:
            to_hugging_face(weights, config, tmp_path / "tokenizer.json", tmp_path / "out")

    shapes(config)  # the first network on the meta device imports a great deal
    # Beside what a direction makes (nothing; a model), no more than a few tensors, the largest of which is 2 MB.
    assert most(export) < 0.2 * size
    assert 0.9 * size < most(lambda: from_hugging_face(tmp_path / "out")) < 1.2 * size
