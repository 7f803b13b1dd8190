"""A model from the registry: models:/NAME@ALIAS or models:/NAME/VERSION to a network with its tokenizer."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import mlflow
import torch
from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from safetensors import SafetensorError
from safetensors.torch import load_file
from tokenizers import Tokenizer

from model.config import ModelConfig, parse_config
from model.errors import ModelError
from model.network.generate import load_tokenizer
from model.network.transformer import Transformer
from model.registry.store import connect
from model.weights import weight_files

CONFIG, TOKENIZER, MANIFEST = "config.yaml", "tokenizer.json", "manifest.json"
_URI = re.compile(r"models:/(?P<name>[^/@:]+)(?:@(?P<alias>[^/@]+)|/(?P<version>\d+))")


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A registered version in memory. folder holds its files: weights, CONFIG, TOKENIZER, MANIFEST."""

    transformer: Transformer
    tokenizer: Tokenizer
    config: ModelConfig
    name: str
    version: str
    folder: Path


def resolve(client: MlflowClient, uri: str) -> ModelVersion:
    """The version that a URI means. Errors: ModelError, 2 where the URI has another form, 1 where it is not there."""
    match = _parsed(uri)
    try:
        if match["alias"]:
            return client.get_model_version_by_alias(match["name"], match["alias"])
        return client.get_model_version(match["name"], match["version"])
    except MlflowException as error:
        raise ModelError(
            f"There is no {uri} in {client.tracking_uri} ({error.message}); register and promote a model first."
        ) from error


def find(uri: str, *, lake: str) -> ModelVersion:
    """``resolve`` in a lake's store, which is not made where it is absent. Errors: as there."""
    _parsed(uri)  # a wrong URI is said first
    return resolve(connect(lake, create=False), uri)


def _parsed(uri: str) -> re.Match[str]:
    match = _URI.fullmatch(uri)
    if match is None:
        raise ModelError(f"{uri!r} is no model URI; write models:/NAME@ALIAS or models:/NAME/VERSION.", 2)
    return match


def load(uri: str, *, lake: str = "./lake", device: str | torch.device = "cpu") -> LoadedModel:
    """The model behind models:/NAME@ALIAS or models:/NAME/VERSION, in evaluation mode, float32 as it was trained.

    Errors: ModelError, where it is not there or its files are not whole.
    """
    version = find(uri, lake=lake)
    folder = download(uri, lake=lake)
    transformer, tokenizer, config = open_folder(folder, device)
    return LoadedModel(
        transformer=transformer,
        tokenizer=tokenizer,
        config=config,
        name=str(version.name),
        version=str(version.version),
        folder=folder,
    )


def model_uri(name: str, version_or_alias: str) -> str:
    """models:/NAME/VERSION for a number, models:/NAME@ALIAS for anything else."""
    return f"models:/{name}{'/' if version_or_alias.isdigit() else '@'}{version_or_alias}"


def download(uri: str, *, lake: str) -> Path:
    """The folder with a version's files, those of LoadedModel. Errors: ModelError."""
    version = find(uri, lake=lake)
    try:
        root = mlflow.artifacts.download_artifacts(artifact_uri=f"models:/{version.name}/{version.version}")
    except (MlflowException, OSError) as error:
        raise ModelError(f"The files of {uri} cannot be read ({error}); register it again.") from error
    return Path(root) / "artifacts"


def open_folder(folder: Path, device: str | torch.device = "cpu") -> tuple[Transformer, Tokenizer, ModelConfig]:
    """Network, tokenizer and configuration of a folder with the files of LoadedModel. Errors: ModelError."""
    transformer, config = open_weights(folder, device)
    return transformer, load_tokenizer(str(folder / TOKENIZER)), config


def open_weights(folder: Path, device: str | torch.device = "cpu") -> tuple[Transformer, ModelConfig]:
    """Network, in evaluation mode, and configuration of a folder with weights and CONFIG, a checkpoint's too."""
    try:
        config = parse_config((folder / CONFIG).read_text(encoding="utf-8"), source=str(folder / CONFIG))
        # On meta first: the weights are neither initialised for nothing nor held twice.
        with torch.device("meta"):
            transformer = Transformer(config)
        weights: dict[str, torch.Tensor] = {}
        for file in weight_files(folder):
            weights |= load_file(file, device=str(device))
        transformer.load_state_dict(weights, assign=True)
    except (OSError, ValueError, SafetensorError, RuntimeError) as error:
        raise ModelError(f"{folder} holds no whole model ({error}); register it again.") from error
    return transformer.eval(), config
