"""Where a model computes: the one reading of the setting ``device``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from model.errors import ModelError

if TYPE_CHECKING:
    import torch

DeviceName = Literal["auto", "cpu", "cuda"]


def pick_device(name: DeviceName, setting: str) -> torch.device:
    """auto is a CUDA GPU where there is one. Errors: ModelError (2) where cuda is asked for and not there.

    setting: the flag that asked, such as train.device, for the error's sentence.
    """
    import torch  # seconds that a job need not wait which only reads settings

    if name == "cuda" and not torch.cuda.is_available():
        raise ModelError(f"There is no CUDA device here; take --{setting} cpu or mend the driver.", 2)
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")
