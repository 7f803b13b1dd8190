"""A training step on several GPUs of one host: tokens a second, MFU, memory, and how much communication is hidden.

    python benchmarks/parallel.py                                      # every case on the GPUs that are here
    python benchmarks/parallel.py --cases olmoe-16:1:none,olmoe-16:2:block --profile
    python benchmarks/parallel.py --device cpu --gpus 2 --quick        # tries the script out on gloo; no measurement

A case is SHAPE:EXPERT_PARALLEL:CHECKPOINTING. Every GPU has sequences of its own, 16,384 tokens in sequences of
4,096. The step is the trainer's own (model/train/step.py, parallel.py): FSDP2 of bfloat16 weights beside the missing
bits of their float32 masters, moments and reductions in float32. Each case runs in processes of its own. Times are of
whole steps by rank 0's clock, for each of which the host waits: the median and the quartiles of --steps after three.
MFU as in training.py, of all GPUs' peak together.

Of one step more the profiler tells, on rank 0, in milliseconds: computing (some kernel that is none of NCCL's runs),
communicating alone (NCCL's kernels and nothing else: what is not hidden) and idle (nothing runs).

Needs torch, Triton, numpy, pydantic and yaml, nothing else of lakemoe's environment.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks import gpu
from benchmarks.training import PEAK, SEQUENCE, batch, by_kind, mfu, trainer_step
from model.config import ModelConfig, load_preset
from model.train.config import TrainConfig
from model.train.world import World, join_world

SHAPES: dict[str, ModelConfig] = {
    "mixtral-3": load_preset("mixtral-8x7b", layers=3),
    "olmoe-8": load_preset("olmoe", layers=8),
    "olmoe-16": load_preset("olmoe", layers=16),
    "dbrx-2": load_preset("dbrx", layers=2),
}
CASES = "mixtral-3:1:none,mixtral-3:2:none,olmoe-16:1:none,olmoe-16:2:block"
SEQUENCES = 4  # a GPU


def spent(events: Iterable[tuple[str, float, float]]) -> dict[str, float]:
    """computing, communicating alone and idle, of kernels' (name, start, end), in their unit."""
    edges: list[tuple[float, int, int]] = []
    for name, start, end in events:
        at = 1 if "nccl" in name.lower() else 0
        edges += [(start, at, 1), (end, at, -1)]
    edges.sort(key=lambda edge: edge[0])
    running, found, before = [0, 0], {"computing": 0.0, "communicating": 0.0, "idle": 0.0}, None
    for now, at, step in edges:
        if before is not None:
            kind = "computing" if running[0] else "communicating" if running[1] else "idle"
            found[kind] += now - before
        running[at] += step
        before = now
    return found


def profile(step: Callable[[], object], rank: int, all_kinds: bool) -> dict[str, Any]:
    """spent() of one step in milliseconds, and the kernels of it by kind; of rank 0. Every rank calls it."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    with record(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        step()
        torch.cuda.synchronize()
    if rank:
        return {}
    events = [
        (e.name(), e.start_ns() / 1e6, e.end_ns() / 1e6)
        for e in recorded.profiler.kineto_results.events()
        if str(e.device_type()) == "DeviceType.CUDA" and not e.name().startswith(("gloo", "ProfilerStep", "FSDP"))
        and not e.is_user_annotation()
    ]  # fmt: skip
    found: dict[str, Any] = spent(events)
    rows: dict[str, tuple[int, float]] = {}
    for name, start, end in events:
        count, took = rows.get(name, (0, 0.0))
        rows[name] = (count + 1, took + end - start)
    kernels = sorted(((name, *row) for name, row in rows.items()), key=lambda row: -row[2])
    nccl = sum(took for name, _, took in kernels if "nccl" in name.lower())
    found["kinds"] = [("NCCL", nccl), *by_kind([row for row in kernels if "nccl" not in row[0].lower()])]
    if all_kinds:
        found["kernels"] = kernels[:25]
    return found


def measure(config: ModelConfig, length: int, flags: argparse.Namespace) -> dict[str, Any]:
    """One case on this rank."""
    settings = TrainConfig(
        global_batch_size=SEQUENCES * flags.gpus,
        loss_chunk=4096,
        expert_parallel=flags.expert_parallel,
        expert_parallel_chunks=flags.chunks,
        activation_checkpointing=flags.checkpointing,
    )
    with join_world(flags.device) as world:
        step = trainer_step(config, batch(config, SEQUENCES, length, 4), settings, world)
        return _timed(step, world, flags)


def _timed(step: Callable[[], float], world: World, flags: argparse.Namespace) -> dict[str, Any]:
    cuda = world.device.type == "cuda"
    losses, seconds = [], []
    for number in range(3 + flags.steps):
        if number == 3 and cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        begin = time.perf_counter()
        losses.append(step())
        if number >= 3:
            seconds.append(time.perf_counter() - begin)
    peak = torch.cuda.max_memory_allocated() if cuda else 0
    found: dict[str, Any] = {"seconds": seconds, "losses": losses, "peak": max(world.gather(peak))}
    if cuda:
        found["profile"] = profile(step, world.rank, flags.profile)
    return found


def in_processes(case: str, flags: argparse.Namespace) -> tuple[dict[str, Any] | None, str]:
    """The case's figures, or why there are none."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={flags.gpus}"]
    command += [__file__, "--one", case, "--device", flags.device, "--gpus", str(flags.gpus)]
    command += [
        "--chunks",
        str(flags.chunks),
        "--steps",
        str(flags.steps),
        *["--profile"] * flags.profile,
        *["--quick"] * flags.quick,
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    if done.returncode == 0:
        return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{"))), ""
    errors = [line for line in done.stderr.splitlines() if "Error" in line and "ChildFailed" not in line]
    return None, (errors or done.stderr.strip().splitlines() or ["no reason given"])[0][:200]


def one(case: str, flags: argparse.Namespace) -> tuple[ModelConfig, int]:
    """The shape of a case and its sequence length; the case's other parts into the flags."""
    name, degree, flags.checkpointing = case.split(":")
    flags.expert_parallel = int(degree)
    config = SHAPES[name]
    if not flags.quick:
        return config, SEQUENCE
    small = {"layers": 2, "width": 64, "head_width": 16, "expert_width": 32, "vocab_size": 97}
    return config.model_copy(update=small | {"heads": 4, "kv_heads": min(config.kv_heads, 4)}), 64


def show(case: str, config: ModelConfig, length: int, found: dict[str, Any], gpus: int) -> dict[str, Any]:
    """One line, and the profile's."""
    spread = gpu.Spread.of([gpus * SEQUENCES * length / s for s in found["seconds"]])
    found["mfu"] = mfu(config, length, spread.median / gpus)
    line = f"{case:18} {spread.show('{:,.0f}')} tokens/s  MFU {found['mfu']:.3f}  peak {found['peak'] / 2**30:.1f} GiB"
    if "profile" in found:
        told = found["profile"]
        line += f"  computing {told['computing']:.0f} ms, communicating alone {told['communicating']:.0f}"
        line += f", idle {told['idle']:.0f}"
    print(f"{line}  losses {' '.join(f'{x:.3f}' for x in found['losses'][:4])}", flush=True)
    if "profile" in found:
        print("    " + ", ".join(f"{kind} {took:.0f} ms" for kind, took in found["profile"]["kinds"]), flush=True)
        for name, count, took in found["profile"].get("kernels", ()):
            print(f"    {took:9.2f} ms {count:5d} x  {name[:110]}", flush=True)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default=CASES, help="SHAPE:EXPERT_PARALLEL:none or block, several of them")
    parser.add_argument("--gpus", type=int, help="default: all of this machine")
    parser.add_argument("--steps", type=int, default=8, help="timed steps (count)")
    parser.add_argument("--chunks", type=int, default=1, help="chunks of expert parallelism (count)")
    parser.add_argument("--profile", action="store_true", help="also print the longest kernels")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, to try the script out")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=Path, default=gpu.OUT)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    flags = parser.parse_args()
    flags.gpus = flags.gpus or torch.cuda.device_count()
    if flags.one:
        config, length = one(flags.one, flags)
        found = measure(config, length, flags)
        if os.environ["RANK"] == "0":
            print(json.dumps(found))
        return 0
    results: dict[str, Any] = {}
    for case in flags.cases.split(","):
        found_here, why = in_processes(case, flags)
        if found_here is None:
            print(f"{case:18} failed: {why}", flush=True)
            continue
        results[case] = show(case, *one(case, flags), found_here, flags.gpus)
    report = {"machine": gpu.machine(torch.device(flags.device)), "gpus": flags.gpus, "peak": PEAK, "results": results}
    print(f"The figures are in {gpu.write(flags.out, 'parallel', report)}.")
    return 0 if len(results) == len(flags.cases.split(",")) else 1


if __name__ == "__main__":
    sys.exit(main())
