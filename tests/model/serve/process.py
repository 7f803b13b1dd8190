"""What the tests of serving share: a lake with a registered model, and `lakemoe serve` as a process.

The model is small and random, but shaped so that it writes printable ASCII and never ends by itself: what runs when is
then the test's to say, and not a matter of time.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import openai
import pytest
import torch
from safetensors.torch import save_file

from model.config import ModelConfig, dump_config
from model.network.transformer import Transformer
from model.registry.register import register
from model.registry.store import connect
from pipelines.tables import tokenizer_uri
from tests.model.conftest import byte_tokenizer

ROOT = Path(__file__).parents[3]
NAME = "small"
CONTEXT = 131_072  # tokens
DEADLINE = 120  # seconds after which a test that waits has failed


def make_lake(root: Path) -> str:
    """A lake whose registry holds the model ``small``, version 1, with the alias champion."""
    lake = root / "lake"
    tokenizer = byte_tokenizer()
    vocabulary = tokenizer.get_vocab()
    tokenizer_id = hashlib.sha256(tokenizer.to_str().encode()).hexdigest()
    file = Path(tokenizer_uri(str(lake), tokenizer_id))
    file.parent.mkdir(parents=True)
    file.write_text(tokenizer.to_str(), encoding="utf-8")

    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=len(vocabulary), max_seq_len=CONTEXT, layers=1, width=32, heads=4, head_width=8, experts=4,
        experts_chosen=2, expert_width=16, init_std=0.3,
    )  # fmt: skip
    state = Transformer(config).state_dict()
    # Feature 0 is large in every state, and only the head's rows of unwanted tokens look at it.
    state["embedding.weight"][:, 0] = 8.0
    state["head.weight"][:, 0] = 0.0
    unwanted = [i for token, i in vocabulary.items() if not re.fullmatch("[!-~]", token)]
    state["head.weight"][unwanted, 0] = -20.0

    checkpoint = root / "step-7"
    checkpoint.mkdir()
    save_file(state, checkpoint / "model.safetensors")
    (checkpoint / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    (checkpoint / "training_state.json").write_text("{}", encoding="utf-8")
    files = {
        f.name: {"bytes": f.stat().st_size, "sha256": hashlib.sha256(f.read_bytes()).hexdigest()}
        for f in checkpoint.iterdir()
    }
    data = {
        "table": "gold.sequences", "table_id": "t", "version": 0, "tokenizer_id": tokenizer_id, "sequence_length": 64,
    }  # fmt: skip
    manifest = {"data": data, "mlflow_run_id": None, "step": 7, "files": files}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.chdir(root)
        version = register(checkpoint, lake=str(lake), name=NAME).version
        connect(str(lake)).set_registered_model_alias(NAME, "champion", version)
    return str(lake)


def environment() -> dict[str, str]:
    """For a process that runs a job of this checkout: one thread, no store but the lake's."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("LAKEMOE_", "MLFLOW_"))}
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**env, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}


class Process:
    """``python -m jobs.serve`` on a free port; after ``wait_ready``, ``headline`` and ``curl`` are what it printed."""

    def __init__(self, lake: str, *flags: str) -> None:
        self.process = subprocess.Popen(
            [
                sys.executable, "-m", "jobs.serve", "--lake", lake, "--model", f"models:/{NAME}@champion",
                "--serve.port", "0", *flags,
            ],
            env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def wait_ready(self) -> None:
        assert self.process.stdout is not None
        self.headline, self.curl = self.process.stdout.readline(), self.process.stdout.readline()
        found = re.search(r"http://\S+", self.headline)
        if found is None:
            raise AssertionError(self.process.communicate(timeout=DEADLINE)[1])
        self.address = found[0]
        self.http = httpx.Client(base_url=self.address, timeout=DEADLINE)
        self.client = openai.OpenAI(base_url=f"{self.address}/v1", api_key="none", max_retries=0, timeout=DEADLINE)
        assert self.http.get("/health").status_code == 200

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def end(self) -> tuple[int, str]:
        """Waits for the end; exit code and standard error."""
        error = self.process.communicate(timeout=DEADLINE)[1]
        return self.process.returncode, error
