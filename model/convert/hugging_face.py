"""A model as a Hugging Face folder, and back: config.json, safetensors in shards, tokenizer, generation_config.json.

The folder is the hub's layout of DBRX, Mixtral or OLMoE (model/convert/layouts.py), which transformers and vLLM load by
themselves. Weights go through tensor by tensor, so that a model is never in memory twice. Leaves out tokenizers on the
way back: a published one need not have our special tokens.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from model.config import ModelConfig
from model.convert.configs import from_config_json, to_config_json
from model.convert.layouts import Layout, choose_layout, vllm_differs
from model.convert.shards import Progress, shape_of, write_shards
from model.convert.tensors import Published, published, shapes
from model.errors import ModelError
from model.files import TEMPORARY, flush
from model.network.generate import end_of_text_id, load_tokenizer
from model.network.transformer import Transformer
from model.weights import SHARD_BYTES, LazyTensors, weight_files
from pipelines.tables import END_OF_TEXT, PAD, SPECIAL_TOKENS

CONFIG, GENERATION, TOKENIZER, TOKENIZER_CONFIG = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"
)  # fmt: skip
ORIGIN = "lakemoe.json"
FORMAT = 1
# What files of weights hold; anything else is quantised and needs more than a cast.
_READ = ("F32", "BF16", "F16", "F64")


@dataclass(frozen=True, kw_only=True)
class Exported:
    """A written folder. created: False where the same export was there already. differs_in_vllm: fields of the model
    that vLLM does not read from config.json, so that its logits are others."""

    folder: Path
    layout: str
    created: bool
    differs_in_vllm: tuple[str, ...]


def to_hugging_face(
    weights: Mapping[str, Any],
    config: ModelConfig,
    tokenizer: Path,
    folder: Path,
    *,
    layout: str = "auto",
    dtype: torch.dtype = torch.bfloat16,
    max_shard_bytes: int = SHARD_BYTES,
    origin: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Exported:
    """Write the model to ``folder``, which appears whole or not at all.

    weights: a network's state_dict, or LazyTensors of a checkpoint. tokenizer: its tokenizer.json. dtype: float32 keeps
    every bit. origin: what identifies the weights and where they come from, kept in lakemoe.json; where the folder
    holds the same already, nothing is written.

    Errors: ModelError; 2 where no layout, or not the one that is named, holds the model, where the tokenizer has more
    tokens than the model, or where the folder holds something else; 75 where it cannot be written.
    """
    chosen = choose_layout(config, layout)
    tensors = list(published(config, chosen))
    _check_weights(weights, config)
    known = load_tokenizer(str(tokenizer))
    if known.get_vocab_size() > config.vocab_size:
        raise ModelError(
            f"{tokenizer} has {known.get_vocab_size()} tokens and the model {config.vocab_size}; "
            "take the tokenizer that it was trained with.",
            2,
        )
    says = {"format": FORMAT, "layout": chosen.name, "dtype": _name(dtype), **(origin or {})}
    there = Exported(folder=folder, layout=chosen.name, created=False, differs_in_vllm=vllm_differs(config, chosen))
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        if origin is not None and _same(folder, says):
            return there
        raise ModelError(f"{folder} is there and holds something else; name another folder, or remove it.", 2)
    specials = {token: i for token in SPECIAL_TOKENS if (i := known.token_to_id(token)) is not None}
    ids = {"bos_token_id": None, "eos_token_id": end_of_text_id(known), "pad_token_id": specials.get(PAD)}
    with _whole(folder) as temporary:
        write_shards(temporary, tensors, weights, dtype, max_shard_bytes, progress)
        # Both names of one thing: transformers 4 and vLLM read torch_dtype, transformers 5 writes dtype.
        dtypes = {"torch_dtype": _name(dtype), "dtype": _name(dtype)}
        _write_json(temporary / CONFIG, {**to_config_json(config, chosen), **ids, **dtypes})
        _write_json(temporary / GENERATION, ids)
        shutil.copyfile(tokenizer, temporary / TOKENIZER)
        _write_json(temporary / TOKENIZER_CONFIG, _tokenizer_config(config, list(specials)))
        _write_json(temporary / ORIGIN, says)
    return replace(there, created=True)


def from_hugging_face(
    folder: Path, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> Transformer:
    """The network of a published folder, in evaluation mode; its ``config`` is named after the layout.

    Errors: ModelError; 2 for an architecture that is not known or says what the network does not have (configs.py),
    1 where files or tensors are missing, unexpected, or of another shape.
    """
    config, layout = read_config(folder)
    try:
        with LazyTensors(weight_files(folder)) as theirs:
            check_tensors(theirs, config, layout, source=str(folder))
            # Allocated once and filled in place, on meta until then.
            with torch.device("meta"):
                network = Transformer(config)
            network = network.to(dtype).to_empty(device=device)
            ours = network.state_dict()
            for tensor in published(config, layout):
                row = 0
                for piece in tensor.pieces:
                    piece.of(ours[piece.name]).copy_(theirs[tensor.name][row : row + piece.rows])
                    row += piece.rows
    except (OSError, SafetensorError, ValueError) as error:
        raise ModelError(f"{folder} holds no whole model ({error}); fetch or export it again.") from error
    return network.eval()


def read_config(folder: Path) -> tuple[ModelConfig, Layout]:
    """Configuration and layout of a published folder. Errors: ModelError (2)."""
    try:
        said = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{folder} has no readable {CONFIG} ({error}); name a Hugging Face model's folder.", 2
        ) from error
    if not isinstance(said, dict):
        raise ModelError(f"{folder / CONFIG} must be an object; name a Hugging Face model's folder.", 2)
    return from_config_json(said, source=str(folder / CONFIG))


def check_tensors(theirs: Mapping[str, Any], config: ModelConfig, layout: Layout, *, source: str) -> None:
    """That names, shapes and types are those of the layout, without reading a tensor. Errors: ModelError."""
    wanted: dict[str, Published] = {tensor.name: tensor for tensor in published(config, layout)}
    for what, names in (("lacks", wanted.keys() - theirs.keys()), ("has unexpected", theirs.keys() - wanted.keys())):
        if names:
            some = ", ".join(sorted(names)[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            raise ModelError(f"{source} {what} tensors: {some}; it is no {layout.name} model in the hub's layout.")
    for name, tensor in wanted.items():
        found = theirs[name]
        if shape_of(found) != tensor.shape:
            raise ModelError(
                f"{source}: {name} is {list(shape_of(found))} and not {list(tensor.shape)}; export it again."
            )
        if found.get_dtype() not in _READ:
            raise ModelError(
                f"{source}: {name} is {found.get_dtype()}, which is quantised; take the weights before that."
            )


def _check_weights(weights: Mapping[str, Any], config: ModelConfig) -> None:
    wanted = shapes(config)
    found = {name: shape_of(weights[name]) for name in weights}
    if found != wanted:
        wrong = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
        raise ModelError(
            f"The weights are not those of the configuration: {', '.join(wrong[:3])}; take both from one place."
        )


def _tokenizer_config(config: ModelConfig, specials: list[str]) -> dict[str, Any]:
    """What AutoTokenizer needs beside tokenizer.json.

    As everywhere in transformers, a special token that is written in a text is the special token; in training it was
    text (model.network.generate.load_tokenizer).
    """
    others = [token for token in specials if token not in (END_OF_TEXT, PAD)]
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "eos_token": END_OF_TEXT,
        "unk_token": None,
        "pad_token": PAD if PAD in specials else None,
        "additional_special_tokens": others,
        "clean_up_tokenization_spaces": False,
        "model_max_length": config.max_seq_len,
    }


@contextmanager
def _whole(folder: Path) -> Iterator[Path]:
    """A folder to write into that becomes ``folder`` at the end of the body, and is gone where the body fails."""
    temporary = folder.with_name(TEMPORARY + folder.name)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)  # left by a kill
        temporary.mkdir()
        yield temporary
        for file in temporary.iterdir():
            flush(file)
        os.replace(temporary, folder)
        flush(folder.parent)
    except OSError as error:
        raise ModelError(f"{folder} could not be written ({error}); make room or name another folder.", 75) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _same(folder: Path, says: Mapping[str, Any]) -> bool:
    try:
        return bool(json.loads((folder / ORIGIN).read_text(encoding="utf-8")) == json.loads(json.dumps(says)))
    except (OSError, ValueError):
        return False


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
