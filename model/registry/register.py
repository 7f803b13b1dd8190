"""A checkpoint becomes a version of a registered model: safetensors and code as text, no pickle, lineage as tags.

Registering the same weights under the same name again gives the version that is there.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import mlflow
import pandas as pd
from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.models import ModelSignature
from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema

from model.errors import ModelError
from model.lake import tokenizer_file
from model.registry.load import CONFIG, MANIFEST, TOKENIZER
from model.registry.store import connect, experiment_id
from model.train.checkpoint import read_checkpoint
from model.weights import INDEX, weight_files, weights_sha256

PREFIX = "lakemoe."
WEIGHTS_TAG = PREFIX + "weights_sha256"
REQUIREMENTS = ("lakemoe", "mlflow", "torch", "safetensors", "tokenizers", "pydantic", "pyyaml", "pandas", "numpy")
SIGNATURE = ModelSignature(
    inputs=Schema([ColSpec(DataType.string, "prompt")]),
    outputs=Schema([ColSpec(DataType.string)]),
    params=ParamSchema(
        [
            ParamSpec("max_tokens", DataType.long, 16),
            ParamSpec("temperature", DataType.double, 1.0),
            ParamSpec("top_p", DataType.double, 1.0),
            ParamSpec("seed", DataType.long, 0),
        ]
    ),
)


@dataclass(frozen=True, kw_only=True)
class RegisteredVersion:
    """A version in the registry; created is False where the same weights were there already."""

    name: str
    version: str
    created: bool

    @property
    def uri(self) -> str:
        """models:/NAME/VERSION."""
        return f"models:/{self.name}/{self.version}"


def register(
    checkpoint: str | Path,
    *,
    lake: str,
    name: str,
    metrics: Mapping[str, float] | None = None,
    tags: Mapping[str, str] | None = None,
) -> RegisteredVersion:
    """Registers a checkpoint's folder under ``name``; its tokenizer comes from the lake.

    metrics (held-out loss and the like) and lineage are the version's tags, ``lakemoe.loss``,
    ``lakemoe.gold.sequences.version`` and so on; ``tags`` are more of them, without the prefix.
    Killed anywhere, the next call ends in the same one version. Errors: ModelError.
    """
    read = read_checkpoint(Path(checkpoint))
    weights = weights_sha256(read.manifest)
    tokenizer = tokenizer_file(lake, str(_data(read.manifest)["tokenizer_id"]))
    client = connect(lake)
    if found := _version_of(client, name, weights):
        _challenge(client, name, found)  # a kill may have come between the version and its alias
        return RegisteredVersion(name=name, version=str(found.version), created=False)
    known = lineage_tags(read.manifest)
    known.update({PREFIX + key: str(value) for key, value in {**(metrics or {}), **(tags or {})}.items()})
    files = {"config": read.folder / CONFIG, "manifest": read.folder / MANIFEST, "tokenizer": tokenizer}
    shards = weight_files(read.folder)
    files |= {f"weights-{n}" if n else "weights": file for n, file in enumerate(shards)}
    if len(shards) > 1:
        files["index"] = read.folder / INDEX
    run_id = read.manifest.get("mlflow_run_id")
    experiment = client.get_run(run_id).info.experiment_id if run_id else experiment_id(client)
    try:
        model_id = _logged(client, experiment, weights) or _log(name, known, files, run_id, experiment)
        version_ = _create_version(client, name, model_id, run_id, known)
    except (MlflowException, OSError) as error:
        raise ModelError(f"{checkpoint} could not be registered as {name} ({error}); run it again.", 75) from error
    _challenge(client, name, version_)
    return RegisteredVersion(name=name, version=str(version_.version), created=True)


def lineage_tags(manifest: Mapping[str, Any]) -> dict[str, str]:
    """What leads from a version back to its data, code and training. Table version 0 is tagged like any other."""
    data = _data(manifest)
    table = PREFIX + str(data["table"])
    found = {
        WEIGHTS_TAG: weights_sha256(manifest),
        f"{table}.version": data["version"],
        f"{table}.table_id": data["table_id"],
        PREFIX + "tokenizer_id": data["tokenizer_id"],
        PREFIX + "sequence_length": data["sequence_length"],
        PREFIX + "step": manifest["step"],
        PREFIX + "training_run_id": manifest.get("mlflow_run_id"),
        PREFIX + "code_version": manifest.get("code_version") or _installed("lakemoe"),
    }
    return {key: str(value) for key, value in found.items() if value is not None}


def requirements() -> list[str]:
    """The packages that the model needs, each at the version that is installed here (build labels left off)."""
    return [f"{package}=={found.split('+')[0]}" for package in REQUIREMENTS if (found := _installed(package))]


def _data(manifest: Mapping[str, Any]) -> Mapping[str, Any]:
    data = manifest.get("data")
    if not isinstance(data, Mapping):
        raise ModelError("The checkpoint's manifest.json does not say its data; train it again with this version.")
    return data


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _version_of(client: MlflowClient, name: str, weights: str) -> ModelVersion | None:
    query = f"name = '{_quotable(name)}' and tag.`{WEIGHTS_TAG}` = '{weights}'"
    found = client.search_model_versions(query)
    return min(found, key=lambda v: int(v.version)) if found else None


def _challenge(client: MlflowClient, name: str, version_: ModelVersion) -> None:
    """The alias challenger to the newest version, unless that is the champion already."""
    newest = max(int(v.version) for v in client.search_model_versions(f"name = '{_quotable(name)}'"))
    champion = client.get_registered_model(name).aliases.get("champion")
    if int(version_.version) == newest and str(champion) != str(version_.version):
        client.set_registered_model_alias(name, "challenger", version_.version)


def _quotable(name: str) -> str:
    # MLflow's filter language has no escape for a quote, and its URIs none for these.
    if not name or set(name) & set("'\"`/:@"):
        raise ModelError(f"{name!r} cannot be a model's name; leave out quotes, slashes, colons and @.", 2)
    return name


def _logged(client: MlflowClient, experiment: str, weights: str) -> str | None:
    """A LoggedModel of the same weights that a killed registration left whole."""
    found = client.search_logged_models([experiment], filter_string=f"tags.`{WEIGHTS_TAG}` = '{weights}'")
    ready = [m for m in found if str(m.status) == "READY"]
    return str(ready[0].model_id) if ready else None


def _log(name: str, tags: dict[str, str], files: Mapping[str, Path], run_id: str | None, experiment: str) -> str:
    active = mlflow.active_run()
    context: AbstractContextManager[Any] = nullcontext()
    if run_id and (active is None or active.info.run_id != run_id):
        context = mlflow.start_run(run_id=run_id, nested=active is not None)
    elif not run_id:
        mlflow.set_experiment(experiment_id=experiment)
    with context, _quiet(), TemporaryDirectory() as folder:
        # MLflow keeps the files' own names, and in the lake the tokenizer is named by its id.
        paths = {**files, "tokenizer": Path(shutil.copyfile(files["tokenizer"], Path(folder) / TOKENIZER))}
        info = mlflow.pyfunc.log_model(
            name=name,
            python_model=str(Path(__file__).with_name("pyfunc.py")),
            artifacts={key: str(path) for key, path in paths.items()},
            signature=SIGNATURE,
            input_example=(pd.DataFrame({"prompt": ["def main("]}), {"max_tokens": 4}),
            pip_requirements=requirements(),
            tags=tags,
        )
    return str(info.model_id)


@contextmanager
def _quiet() -> Iterator[None]:
    """MLflow warns that lakemoe is in no package index and that type hints are better than a signature."""
    logger = logging.getLogger("mlflow")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _create_version(
    client: MlflowClient, name: str, model_id: str, run_id: str | None, tags: dict[str, str]
) -> ModelVersion:
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    # The tags come with the version and not after it, so that a version without lineage never exists.
    return client.create_model_version(name, f"models:/{model_id}", run_id=run_id, tags=tags, model_id=model_id)
