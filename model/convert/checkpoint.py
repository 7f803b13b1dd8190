"""A checkpoint's or a registered version's folder as a Hugging Face folder, with its lineage beside it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from model.config import parse_config
from model.convert.hugging_face import Exported, to_hugging_face
from model.convert.shards import Progress
from model.errors import ModelError
from model.evaluate.held_out import read_manifest
from model.lake import tokenizer_file
from model.registry.load import CONFIG, TOKENIZER
from model.weights import SHARD_BYTES, LazyTensors, weight_files, weights_sha256


def export_folder(
    source: Path,
    folder: Path,
    *,
    lake: str,
    layout: str = "auto",
    dtype: torch.dtype = torch.bfloat16,
    max_shard_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
) -> tuple[Exported, Mapping[str, Any]]:
    """Export ``source``, a folder with weights, CONFIG and MANIFEST, and say which data the model was trained on.

    The tokenizer is the folder's own, where it has one, else the lake's. lakemoe.json says the weights' sha256, the
    step, the table and its version. Errors: those of to_hugging_face; ModelError where the source is not whole.
    """
    manifest = read_manifest(source)
    data = manifest["data"]
    origin = {
        "weights_sha256": weights_sha256(manifest),
        "step": manifest["step"],
        "training_run_id": manifest.get("mlflow_run_id"),
        "data": {key: data.get(key) for key in ("table", "table_id", "version", "tokenizer_id")},
    }
    tokenizer = source / TOKENIZER
    if not tokenizer.is_file():
        tokenizer = tokenizer_file(lake, data["tokenizer_id"])
    try:
        config = parse_config((source / CONFIG).read_text(encoding="utf-8"), source=str(source / CONFIG))
        with LazyTensors(weight_files(source)) as weights:
            exported = to_hugging_face(
                weights,
                config,
                tokenizer,
                folder,
                layout=layout,
                dtype=dtype,
                max_shard_bytes=max_shard_bytes,
                origin=origin,
                progress=progress,
            )
    except (OSError, ValueError, SafetensorError) as error:
        raise ModelError(f"{source} holds no whole model ({error}); take another checkpoint or version.") from error
    return exported, data
