"""Write a registered model, or a training's last checkpoint, as a Hugging Face folder, and check what was written."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field

from jobs import console, runs
from jobs.main import main
from jobs.settings import JobSettings, UsageError
from model.convert.check import check_files, compare_logits
from model.convert.checkpoint import export_folder
from model.convert.hugging_face import Exported
from model.registry.load import download
from model.train.plan import finished

GB = 1_000_000_000


class Settings(JobSettings):
    """Write a registered model, or a finished training's last checkpoint, as a Hugging Face folder."""

    to: Path = Field(description="folder to write; it must not be there, or hold this very export")
    model: str = Field("models:/quickstart@champion", description="models:/NAME@ALIAS or models:/NAME/VERSION")
    training: str = Field(
        "", description="name of a finished training, or its output folder, in place of a registered model"
    )
    layout: Literal["auto", "dbrx", "mixtral", "olmoe"] = Field("auto", description="whose layout; auto: what fits")
    dtype: Literal["bfloat16", "float32"] = Field("bfloat16", description="of the weights; float32 keeps every bit")
    max_shard_gb: float = Field(5.0, gt=0, description="largest file of weights (10^9 bytes)")


def run(settings: Settings) -> None:
    lake = settings.lake
    if settings.training and "model" in settings.model_fields_set:
        raise UsageError("--training and --model are two things to export; name one.")
    if settings.training:
        source = Path(finished(lake, settings.training).checkpoint)
    else:
        source = download(settings.model, lake=lake)
    with runs.recorded(lake, "export", settings.model_dump(mode="json", exclude={"lake", "config", "debug"})) as run:
        with console.counting("export", "bytes of weights") as progress:
            exported, data = export_folder(
                source,
                settings.to,
                lake=lake,
                layout=settings.layout,
                dtype=getattr(torch, settings.dtype),
                max_shard_bytes=int(settings.max_shard_gb * GB),
                progress=progress,
            )
        run.inputs = {data["table"]: data["version"]}
        run.counts = {"tensors": check_files(exported.folder)}
        run.status = "succeeded" if exported.created else "unchanged"
    console.done("export", run.status, run.counts)
    report(exported)


def report(exported: Exported) -> None:
    """Compare its logits, and say where it lies and what to do next."""
    difference = compare_logits(exported.folder)
    if difference is None:
        console.note("Names and shapes are right; logits were not compared (no transformers here, or a large model).")
    else:
        console.note(f"transformers loads it and gives our logits (to {difference:.0e}, float32).")
    console.note(f"The model is in {exported.folder}, in {exported.layout}'s layout.")
    if exported.differs_in_vllm:
        fields = " and ".join(exported.differs_in_vllm)
        console.warn(f"vLLM does not read {fields} of {exported.layout} models and would give other logits.")
        console.note(f"Next: transformers.AutoModelForCausalLM.from_pretrained({str(exported.folder)!r})")
    else:
        console.note(f"Next: vllm serve {shlex.quote(str(exported.folder))}")


if __name__ == "__main__":
    sys.exit(main(["export", *sys.argv[1:]]))
