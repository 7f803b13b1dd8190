"""What one rank writes of a training's tensors, and how any world reads what another wrote.

    model.safetensors (or several files, weights.py)   float32 weights, whole, whichever ranks held their parts; each
                                                       file is one rank's to write
    optimizer/rank-00000-model.safetensors, ...        each rank's part of the moments, and its random states; several
                                                       files, too, where they are large

The second are in torch.distributed.checkpoint's format of safetensors, by whose HuggingFaceStorageReader they are read;
its writer builds each file in memory, at 0.15 GB/s, which safetensors' own writes at 3 GB/s without a copy. Whole
weights pass every rank's GPU, one tensor after the other, and stay on the rank that writes them.
"""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from model.errors import ModelError
from model.network.distributed import is_divided, like, local_part, place, whole
from model.network.transformer import Transformer
from model.train.optimizer import AdamW
from model.train.world import World
from model.weights import INDEX, LazyTensors, split, weight_files, write_index

OPTIMIZER = "optimizer"
MOMENTS = ("exp_avg", "exp_avg_sq")
# torch.distributed.checkpoint's keys in a file's metadata: where in the whole tensors the parts begin, and its format.
_PLACES, _VERSION = "DCP_SHARDING_INFO", {"DCP_VERSION": "1.0", "format": "pt"}


class HostCopies:
    """Copies on the CPU whose memory the next ones of the same names take again: fresh pages cost more than copying."""

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}

    def of(self, name: str, tensor: Tensor) -> Tensor:
        if name not in self._kept:
            self._kept[name] = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
        return self._kept[name].copy_(tensor)


@dataclass(frozen=True, kw_only=True)
class Share:
    """What a rank writes: weights by name by file; its own part; where in the whole tensors those that are not whole
    begin. sizes: in bytes, of all weights."""

    weights: dict[str, dict[str, Tensor]]
    parts: dict[str, Tensor]
    begins: dict[str, list[int]]
    sizes: dict[str, int]

    def write(self, folder: Path, world: World) -> list[Path]:
        """This rank's files, which are returned; rank 0 writes the index as well. Errors: OSError, SafetensorError."""
        written = [folder / name for name in self.weights]
        for path, tensors in zip(written, self.weights.values(), strict=True):
            save_file(tensors, path)
        for file, names in split({name: part.nbytes for name, part in self.parts.items()}).items():
            written.append(folder / OPTIMIZER / f"rank-{world.rank:05d}-{file}")
            places = {name: {"saved_offsets": self.begins.get(name, [0] * self.parts[name].dim())} for name in names}
            metadata = {_PLACES: json.dumps(places), **_VERSION}
            save_file({name: self.parts[name] for name in names}, written[-1], metadata)
        for path in written:  # safetensors makes files that only their owner may read
            path.chmod(folder.stat().st_mode & 0o666)
        if world.main and write_index(folder, split(self.sizes), sum(self.sizes.values())):
            written.append(folder / INDEX)
        return written


@torch.no_grad()
def copy_share(model: Transformer, optimizer: AdamW, world: World, host: HostCopies) -> Share:
    """This rank's share as it is now, on the CPU. Every rank calls it: whole weights are gathered one after the other.

    Files of weights are dealt out at equal distances, so that machines of several ranks have as many each.
    """
    sizes = {name: 4 * parameter.numel() for name, parameter in model.named_parameters()}
    sizes |= {name: buffer.nbytes for name, buffer in model.named_buffers()}
    layout = split(sizes)
    files = [file for n, file in enumerate(layout) if n * world.size // len(layout) == world.rank]
    file_of = {name: file for file in files for name in layout[file]}
    weights: dict[str, dict[str, Tensor]] = {file: {} for file in files}
    parts, begins = {}, {}
    for name, parameter in model.named_parameters():
        value = whole(like(parameter, optimizer.master(parameter)))
        if name in file_of:
            weights[file_of[name]][name] = host.of(name, value)
        if (world.main or is_divided(parameter)) and local_part(parameter).numel():
            for key in MOMENTS:
                part = f"{key}/{name}"
                parts[part] = host.of(part, optimizer.state[parameter][key])
                begins[part] = [where.start for where in place(parameter)]
    for name, buffer in model.named_buffers():
        if name in file_of:
            weights[file_of[name]][name] = host.of(name, buffer)
    return Share(weights=weights, parts=parts | _random_states(world), begins=begins, sizes=sizes)


@torch.no_grad()
def restore(folder: Path, model: Transformer, optimizer: AdamW, world: World) -> None:
    """Weights, moments and random state as they were, of each tensor this rank's part; every rank calls it.

    The optimizer's count of updates is in the state that the caller kept. Errors: ModelError where the weights are
    another model's.
    """
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    with LazyTensors(weight_files(folder)) as weights:
        wanted = {name: [*tensor.shape] for name, tensor in (*model.named_parameters(), *model.named_buffers())}
        found = {name: weights[name].get_shape() for name in weights}
        if found != wanted:
            wrong = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
            why = f"{folder} holds another model's weights ({', '.join(wrong[:3])}); train under another name."
            raise world.everywhere(ModelError(why))
        for name, parameter in model.named_parameters():
            if local_part(parameter).numel():  # else there are fewer rows than ranks
                optimizer.set_master(parameter, weights[name][place(parameter)])
        for name, buffer in model.named_buffers():
            buffer.copy_(weights[name][:])
    reader = HuggingFaceStorageReader(str(folder / OPTIMIZER))
    known = reader.read_metadata().state_dict_metadata
    parts = {key: part for n, p in model.named_parameters() for key, part in moments(n, p, optimizer).items()}
    # A world of more ranks begins the random states that no rank had.
    parts |= {name: state for name, state in _random_states(world).items() if name in known}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a world of one
        load(parts, storage_reader=reader, process_group=world.group, no_dist=world.group is None)
    for name, part in parts.items():
        if name.startswith("random/cpu"):
            torch.set_rng_state(part.cpu())
        elif name.startswith("random/cuda"):
            torch.cuda.set_rng_state(part.cpu())


def moments(name: str, parameter: Tensor, optimizer: AdamW) -> dict[str, Tensor]:
    """By name in a checkpoint; distributed as the parameter is, sharing the optimizer's memory."""
    return {f"{key}/{name}": like(parameter, optimizer.state[parameter][key]) for key in MOMENTS}


def _random_states(world: World) -> dict[str, Tensor]:
    states = {f"random/cpu/{world.rank}": torch.get_rng_state()}
    if world.device.type == "cuda":
        states[f"random/cuda/{world.rank}"] = torch.cuda.get_rng_state()
    return states
