"""What an exported folder is, proved on the files: names, shapes and types, and transformers' logits beside ours."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import torch
from safetensors import SafetensorError

from model.convert.hugging_face import check_tensors, from_hugging_face, read_config
from model.errors import ModelError
from model.weights import LazyTensors, weight_files

# Two float32 copies of a larger model are more than an export should take from the machine that it runs on.
COMPARED_UP_TO = 500_000_000  # parameters
TOLERANCE = 1e-4
_SEQUENCES, _TOKENS = 8, 16


def check_files(folder: Path) -> int:
    """The number of tensors, after their names, shapes and types were found right; no weight is read.

    Errors: ModelError, one sentence that names the tensor.
    """
    config, layout = read_config(folder)
    try:
        with LazyTensors(weight_files(folder)) as theirs:
            check_tensors(theirs, config, layout, source=str(folder))
            return len(theirs)
    except (OSError, SafetensorError, ValueError) as error:
        raise ModelError(f"{folder} holds no whole model ({error}); export it again.") from error


def compare_logits(folder: Path) -> float | None:
    """How far transformers' float32 logits of the folder are from ours; None where there is nothing to compare.

    That is where transformers is not installed, and for more than COMPARED_UP_TO parameters. The difference is a
    token's largest over the largest logit (where that is above one), and of the tokens the median: where two experts
    tie to the last bit, sound networks may choose differently for one token, and one sequence differs from there on.

    Errors: ModelError where it is more than TOLERANCE, or transformers cannot load the folder.
    """
    config, _ = read_config(folder)
    if find_spec("transformers") is None or config.parameters > COMPARED_UP_TO:
        return None
    shape = (_SEQUENCES, min(_TOKENS, config.max_seq_len))
    tokens = torch.randint(0, config.vocab_size, shape, generator=torch.Generator().manual_seed(0))
    transformers = import_module("transformers")
    bars = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        theirs = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(
            f"transformers cannot load {folder} ({error}); report it as a defect of the export."
        ) from error
    finally:
        if bars:
            transformers.utils.logging.enable_progress_bar()
    with torch.inference_mode():
        ours_BSV = from_hugging_face(folder)(tokens).logits
        difference_BS = (theirs.eval()(tokens).logits - ours_BSV).abs().amax(dim=-1)
    found = float(difference_BS.median() / ours_BSV.abs().max().clamp(min=1))
    # Not "more than", so that NaN is a failure too.
    if not found <= TOLERANCE:
        raise ModelError(
            f"transformers' logits of {folder} differ from ours by {found:.1e} of the largest; "
            "report it as a defect of the export."
        )
    return found
