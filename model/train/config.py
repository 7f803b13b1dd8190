"""What a training is told and what it answers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from model.device import DeviceName
from model.errors import ModelError
from model.lake import local_path
from model.loader.mixture import Phase
from model.loader.store import is_local

# The folder of a lake that trainings write to.
TRAININGS = "training"


class TrainConfig(BaseModel):
    """One training. What decides the weights is kept with the output and may not change between its restarts."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field("quickstart", description="the training's name, that of its output folder and MLflow run")
    preset: str = Field("quickstart", description="model preset, a file of conf/models without .yaml")
    overrides: dict[str, Any] = Field(
        default_factory=dict, description="model fields that replace the preset's (vocab_size is the tokenizer's)"
    )
    steps: int = Field(300, ge=1, description="optimizer steps in all")
    global_batch_size: int = Field(16, ge=1, description="sequences a step")
    micro_batch_size: int | None = Field(
        None, ge=1, description="sequences a process in a forward pass; gradients accumulate over a step (default: all)"
    )
    learning_rate: float = Field(1e-3, gt=0, description="peak learning rate")
    schedule: Literal["cosine", "wsd"] = Field("cosine", description="after warm-up: cosine, or stable and then decay")
    warmup_steps: int = Field(20, ge=0, description="steps of linear warm-up")
    decay_fraction: float = Field(0.2, gt=0, le=1, description="wsd: the last part of the steps that decays (fraction)")
    final_learning_rate_fraction: float = Field(0.1, ge=0, le=1, description="last learning rate over the peak")
    weight_decay: float = Field(0.1, ge=0, description="decoupled weight decay, of matrices only")
    beta1: float = Field(0.9, ge=0, lt=1, description="AdamW's first moment's decay a step")
    beta2: float = Field(0.95, ge=0, lt=1, description="AdamW's second moment's decay a step")
    moments: Literal["float32", "bfloat16"] = Field(
        "float32", description="AdamW's moments on GPUs; bfloat16 is a third less to read and write a step"
    )
    gradient_clip: float = Field(1.0, gt=0, description="largest norm of the gradient")
    loss_chunk: int = Field(1024, ge=1, description="tokens whose logits exist at the same time")
    z_loss_weight: float = Field(0.0, ge=0, description="weight of log(Z)^2 of the output's softmax (PaLM: 1e-4)")
    bad_batch: Literal["stop", "skip"] = Field(
        "stop", description="a batch whose loss is not finite, or a spike: stop, or go on without its update"
    )
    spike: float | None = Field(
        None, gt=1, description="a loss above this times the mean of the last 100 is a bad batch (default: none is)"
    )
    expert_parallel: int = Field(1, ge=1, description="neighbouring processes that share the experts among them")
    expert_parallel_chunks: int = Field(
        1, ge=1, description="parts of a batch whose experts compute while another's rows travel; slower on one host"
    )
    activation_checkpointing: Literal["none", "block"] = Field(
        "none", description="block: keep each block's input alone and compute the rest of it again for backward"
    )
    compile: bool = Field(True, description="torch.compile of every block, on a GPU")
    seed: int = Field(0, ge=0, description="of the initial weights and of the order of the data")
    mixture: tuple[Phase, ...] = Field(
        (), description="weights of domains, by phases of steps (default: the domains as they come)"
    )
    sequences_version: int | None = Field(
        None, ge=0, description="Delta version of gold.sequences (default: the latest when the training starts)"
    )
    tokenizer_id: str | None = Field(None, description="edition of gold.sequences; needed where there are several")
    sequence_length: int | None = Field(None, ge=2, description="edition of gold.sequences (tokens a sequence)")
    validate_every: int = Field(
        200, ge=0, description="steps between looks at the validation split, as at the end (0: none)"
    )
    validation_sequences: int = Field(
        128, ge=1, description="sequences of the validation split that are looked at, the same each time"
    )
    checkpoint_every: int = Field(100, ge=1, description="steps between checkpoints")
    keep_checkpoints: int = Field(2, ge=1, description="checkpoints kept, the newest")
    log_every: int = Field(10, ge=1, description="steps between lines where there is no terminal")
    device: DeviceName = Field("auto", description="auto: a CUDA GPU where there is one")
    output: str | None = Field(None, description="folder of this training (default: LAKE/training/NAME)")
    experiment: str = Field("lakemoe", description="MLflow experiment")

    def output_folder(self, lake: str) -> Path:
        """Where checkpoints and metrics go: a local folder. Errors: ModelError (2) where the lake is none."""
        if self.output is not None:
            return Path(self.output)
        if not is_local(lake):
            raise ModelError(
                f"The lake {lake} is no local folder; name a local one as train.output, or the training by its folder.",
                2,
            )
        return local_path(lake) / TRAININGS / self.name

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if not self.name or self.name in (".", "..") or set(self.name) & set("/\\"):
            raise ValueError(f"name {self.name!r} is no name of a folder: take one without slashes")
        if self.moments == "bfloat16" and self.beta2 > 0.98:
            raise ValueError(
                f"beta2 {self.beta2} moves a moment by less than bfloat16 holds: take at most 0.98, or float32 moments"
            )
        return self

    def validates(self, step: int) -> bool:
        """Whether the validation split is looked at after this step (from 1)."""
        return bool(self.validate_every) and (step % self.validate_every == 0 or step == self.steps)

    def identity(self) -> dict[str, Any]:
        """The fields that the weights depend on. The others may change between restarts."""
        free = {"name", "output", "experiment", "device", "checkpoint_every", "keep_checkpoints", "log_every"}
        # They change rounding at most, and what fits a GPU is found out by trying.
        free |= {"expert_parallel", "expert_parallel_chunks", "activation_checkpointing", "compile", "loss_chunk"}
        # The auxiliary loss depends on how a step is cut, and so on the processes' number, which is free.
        free |= {"micro_batch_size"}
        # What is done about a bad batch is decided when there is one.
        free |= {"bad_batch", "spike"}
        # Looking changes nothing.
        free |= {"validate_every", "validation_sequences"}
        return self.model_dump(mode="json", exclude=free)

    @classmethod
    def identity_of(cls, settings: dict[str, Any]) -> dict[str, Any]:
        """The identity that a record was written with; fields which came later have their defaults."""
        known = {name: value for name, value in settings.items() if name in cls.model_fields}
        return cls(**known).identity()


@dataclass(frozen=True, kw_only=True)
class TrainSummary:
    """A finished training. checkpoint: the final one's folder; final_loss: of the last step (nats a token);
    tokens: seen in all; seconds: spent in steps, over all restarts."""

    name: str
    checkpoint: str
    step: int
    mlflow_run_id: str
    final_loss: float
    tokens: int
    seconds: float
