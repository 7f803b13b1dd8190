"""A checkpoint on several GPUs of one host: how long it holds the training up, takes to be whole, and to be read again.

    python benchmarks/checkpoint.py                                  # OLMoE, 4 blocks, all GPUs that are here
    python benchmarks/checkpoint.py --device cpu --gpus 2 --quick    # tries the script out on gloo; no measurement

Ours is the trainer's (model/train/checkpoint.py): whole float32 weights and every rank's moments as safetensors,
flushed to the disk, with sha256 digests, renamed when it is whole; a restart verifies the digests and restores. The
peer is torch.distributed.checkpoint as it comes: async_save and load of the same float32 weights and moments, each
rank's part in a file of its own, not digested. Both write to the same disk, in turn, --rounds times, and what each
reads again is checked to the bit. No step runs beside.

Reported is the slowest rank: seconds that the call holds the training up, until all is written, and to read it again
(ours: verify, then restore); and what a rank's memory has grown by when the call returns, of rank 0 and the others.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor
from torch import distributed as dist

from benchmarks import gpu
from benchmarks.training import draw_on_device
from model.config import load_preset
from model.network.distributed import is_divided, like, local_part
from model.network.transformer import Transformer
from model.train import parallel
from model.train.checkpoint import CheckpointWriter, find_checkpoint
from model.train.config import TrainConfig
from model.train.optimizer import AdamW, build_optimizer
from model.train.share import MOMENTS, moments
from model.train.world import World, join_world


class Sides:
    """Both ways to save and read one model and its optimizer."""

    def __init__(self, root: Path, model: Transformer, optimizer: AdamW, world: World) -> None:
        self.root, self.model, self.optimizer, self.world = root, model, optimizer, world
        self.writer = CheckpointWriter(root / "ours", world, 1)
        self.step = 0

    def ours(self) -> dict[str, float]:
        self.step += 1
        before, begin = _resident(), time.perf_counter()
        self.writer.save(self.step, self.model, self.optimizer, state={}, manifest={})
        held = time.perf_counter() - begin
        grown = _resident() - before
        self.writer.wait()
        whole = time.perf_counter() - begin
        expected = self._kept()
        for parameter in self.optimizer.parameters():
            self.optimizer.set_master(parameter, torch.zeros_like(self.optimizer.master(parameter)))
            for key in MOMENTS:
                self.optimizer.state[parameter][key].zero_()
        begin = time.perf_counter()
        found, broken = find_checkpoint(self.root / "ours", self.world)
        verify = time.perf_counter() - begin
        assert found is not None, broken
        found.restore(self.model, self.optimizer, self.world)
        read = time.perf_counter() - begin - verify
        _check(self._kept(), expected)
        return {"held": held, "whole": whole, "verify": verify, "read": read, "grown": grown}

    def theirs(self) -> dict[str, float]:
        from torch.distributed.checkpoint.state_dict_loader import load
        from torch.distributed.checkpoint.state_dict_saver import async_save

        folder = self.root / "dcp"
        if self.world.main:
            shutil.rmtree(folder, ignore_errors=True)
        state = self._state()
        before, begin = _resident(), time.perf_counter()
        future: Any = async_save(state, checkpoint_id=str(folder), process_group=self.world.background)
        held = time.perf_counter() - begin
        grown = _resident() - before
        future.result()
        whole = time.perf_counter() - begin
        expected = {name: local_part(tensor).clone() for name, tensor in state.items()}
        for tensor in state.values():
            local_part(tensor).zero_()
        begin = time.perf_counter()
        load(state, checkpoint_id=str(folder))
        read = time.perf_counter() - begin
        _check({name: local_part(tensor) for name, tensor in state.items()}, expected)
        return {"held": held, "whole": whole, "read": read, "grown": grown}

    def _kept(self) -> dict[str, Tensor]:
        return {name: local_part(tensor).clone() for name, tensor in self._state().items()}

    def _state(self) -> dict[str, Tensor]:
        state: dict[str, Tensor] = {}
        for name, parameter in self.model.named_parameters():
            state[name] = like(parameter, self.optimizer.master(parameter))
            state |= moments(name, parameter, self.optimizer)
        return state


def _check(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


def _resident() -> int:
    """Bytes of this process in memory (proc(5))."""
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")


def one(flags: argparse.Namespace) -> list[dict[str, Any]]:
    """On this rank: of each round and side the figures of the slowest rank."""
    config = load_preset(flags.model, layers=flags.layers)
    if flags.quick:
        small = {"layers": 2, "width": 64, "head_width": 16, "heads": 4, "kv_heads": 4, "expert_width": 32}
        config = config.model_copy(update={**small, "vocab_size": 97})
    settings = TrainConfig(expert_parallel=flags.expert_parallel, compile=False)
    rounds = []
    with join_world(flags.device) as world, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with torch.device("meta"):
            model = Transformer(config)
        with mock.patch.object(Transformer, "initialize", draw_on_device):
            model = parallel.build(settings, model, world)
        for parameter in model.parameters():
            if not is_divided(parameter):  # every rank has drawn its own
                dist.broadcast(parameter.detach(), 0, group=world.group)
        optimizer = build_optimizer(model.parameters(), settings)
        for parameter in model.parameters():
            rank = world.rank if is_divided(parameter) else 0  # what is whole is the same everywhere
            drawn = torch.Generator(world.device).manual_seed(rank)
            for key in MOMENTS:
                optimizer.state[parameter][key].normal_(generator=drawn)
        sides = Sides(Path(flags.root), model, optimizer, world)
        for _ in range(flags.rounds):
            for side in flags.sides.split(","):
                call: Callable[[], dict[str, float]] = getattr(sides, side)
                every = world.gather(call())
                slowest = {key: max(rank[key] for rank in every) for key in every[0]}
                slowest["grown_main"] = every[0]["grown"]
                slowest["grown"] = max((rank["grown"] for rank in every[1:]), default=0)
                rounds.append({"side": side, **slowest})
                if world.main:
                    print(rounds[-1], file=sys.stderr, flush=True)
    return rounds


def show(side: str, found: list[dict[str, Any]]) -> None:
    """One line. The first save also takes the memory that later ones use again."""
    later = {key: gpu.Spread.of([f[key] for f in found[1:] or found]) for key in found[0] if key != "side"}
    line = f"{side:8} holds up {found[0]['held']:.1f} s at first, then {later['held'].show('{:.1f}')} s, "
    line += f"whole after {later['whole'].show('{:.1f}')} s, "
    line += f"verified in {later['verify'].show('{:.1f}')} s, " if "verify" in later else ""
    line += f"read in {later['read'].show('{:.1f}')} s, "
    first = {key: found[0][key] / 2**30 for key in ("grown_main", "grown")}
    print(f"{line}rank 0 +{first['grown_main']:.1f} GiB, others +{first['grown']:.1f}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="olmoe", help="a preset")
    parser.add_argument("--layers", type=int, default=4, help="blocks of it (count)")
    parser.add_argument("--sides", default="ours,theirs")
    parser.add_argument("--gpus", type=int, help="default: all of this machine")
    parser.add_argument("--expert-parallel", type=int, default=1, help="ranks that share the experts (count)")
    parser.add_argument("--rounds", type=int, default=3, help="of both sides in turn (count)")
    parser.add_argument("--folder", type=Path, help="where to write; default: the temporary folder")
    parser.add_argument("--quick", action="store_true", help="a tiny shape, to try the script out")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=Path, default=gpu.OUT)
    parser.add_argument("--root", help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.root:
        rounds = one(flags)
        if os.environ["RANK"] == "0":
            print(json.dumps(rounds))
        return 0
    device = gpu.device_of(flags.device, flags.quick)
    flags.gpus = flags.gpus or torch.cuda.device_count()
    with tempfile.TemporaryDirectory(dir=flags.folder) as root:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={flags.gpus}"]
        command += [__file__, "--root", root, "--model", flags.model, "--layers", str(flags.layers)]
        command += ["--device", flags.device, "--sides", flags.sides]
        command += ["--expert-parallel", str(flags.expert_parallel), "--rounds", str(flags.rounds)]
        done = subprocess.run(
            [*command, *["--quick"] * flags.quick], stdout=subprocess.PIPE, text=True, timeout=900, check=True
        )
    rounds = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("[")))
    for side in flags.sides.split(","):
        show(side, [found for found in rounds if found["side"] == side])
    report = {
        "machine": gpu.machine(device),
        "model": flags.model,
        "layers": flags.layers,
        "gpus": flags.gpus,
        "rounds": rounds,
    }
    print(f"The figures are in {gpu.write(flags.out, 'checkpoint', report)}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
