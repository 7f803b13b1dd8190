"""A real training's checkpoint as a Hugging Face folder: its tokenizer is the lake's, its lineage goes along."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

from jobs.main import main
from model.convert.checkpoint import export_folder
from model.convert.hugging_face import from_hugging_face
from model.errors import ModelError
from model.registry.load import open_weights
from model.train.config import TrainConfig
from model.train.trainer import train


def test_a_trainings_checkpoint_and_its_lakes_tokenizer(
    write_sequences: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    lake = write_sequences()
    sizes = {"layers": 1, "width": 32, "heads": 4, "kv_heads": 2, "head_width": 8, "experts": 4, "experts_chosen": 2}
    done = train(lake, TrainConfig(name="a", steps=2, global_batch_size=4, device="cpu", overrides=sizes))
    flags = ["--lake", lake, "--training", "a", "--to", str(tmp_path / "out"), "--dtype", "float32"]
    assert main(["export", *flags]) == 0
    trained, config = open_weights(Path(done.checkpoint))
    back = from_hugging_face(tmp_path / "out")
    assert all(torch.equal(a, b) for a, b in zip(trained.parameters(), back.parameters(), strict=True))
    manifest = json.loads((Path(done.checkpoint) / "manifest.json").read_text())
    origin = json.loads((tmp_path / "out" / "lakemoe.json").read_text())
    assert origin["weights_sha256"] == manifest["files"]["model.safetensors"]["sha256"]
    assert origin["training_run_id"] == done.mlflow_run_id
    assert origin["data"] == {key: manifest["data"][key] for key in ("table", "table_id", "version", "tokenizer_id")}
    assert len(transformers.AutoTokenizer.from_pretrained(tmp_path / "out")) <= config.vocab_size

    (Path(done.checkpoint) / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(ModelError, match="holds no whole model"):
        export_folder(Path(done.checkpoint), tmp_path / "other", lake=lake)
    assert not (tmp_path / "other").exists()
