"""Peak GPU memory of real training steps beside its estimate (model/train/estimate.py).

    python benchmarks/memory.py                                # every shape that the GPU holds, with and without
    python benchmarks/memory.py --shapes dbrx-1,olmoe-8 --checkpointing none --parts
    python benchmarks/memory.py --gpus 4 --expert-parallel 2 --shapes dbrx-2
    python benchmarks/memory.py --device cpu                   # the estimates alone; measures nothing

Each shape is some blocks of a published model with its whole vocabulary, 16,384 tokens a GPU in sequences of 4,096.
Model and step are the trainer's own (model/train/parallel.py, step.py). Each runs in a process of its own, three steps:
the first compiles and has no moments of AdamW; the peak is that of the other two. What counts is the ratio of the
estimate, without context and gaps, to torch.cuda.max_memory_allocated of the fullest GPU; wanted is 0.90 to 1.10.
``held`` is what the allocator took from the device, gaps included, beside the same with the estimate's allowance.

Needs torch, Triton, numpy, pydantic and yaml, nothing else of lakemoe's environment.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from model.config import ModelConfig, load_preset
from model.train.estimate import Estimate, estimate
from model.train.machine import GIB, MACHINES
from model.train.memory import TrainShape, moments

SEQUENCE, TOKENS = 4096, 16384
SHAPES = {
    f"{short}-{layers}": load_preset(preset, layers=layers)
    for short, preset, depths in (
        ("dbrx", "dbrx", (1, 2)),
        ("mixtral", "mixtral-8x7b", (2, 3, 4)),
        ("olmoe", "olmoe", (4, 8, 16)),
    )
    for layers in depths
}
WANTED = (0.90, 1.10)


def shape(flags: argparse.Namespace, checkpointing: str, passes: int) -> TrainShape:
    """16,384 tokens a GPU in so many forward passes."""
    return TrainShape(
        gpus=flags.gpus,
        expert_parallel=flags.expert_parallel,
        sequence_length=SEQUENCE,
        micro_batch_size=TOKENS // SEQUENCE // passes,
        accumulation=passes,
        activation_checkpointing=checkpointing,
    )


def measure(config: ModelConfig, how: TrainShape) -> dict[str, int]:
    """Bytes allocated and held at most, on the fullest GPU, during a step that is not the first."""
    import torch

    from benchmarks.training import batch, trainer_step
    from model.train.config import TrainConfig
    from model.train.world import join_world

    settings = TrainConfig(
        global_batch_size=how.gpus * how.micro_batch_size * how.accumulation,
        micro_batch_size=how.micro_batch_size,
        loss_chunk=how.loss_chunk,
        expert_parallel=how.expert_parallel,
        activation_checkpointing=how.activation_checkpointing,
    )
    with join_world("cuda") as world:
        tokens = batch(config, how.micro_batch_size * how.accumulation, how.sequence_length, 4)
        step = trainer_step(config, tokens, settings, world)
        for number in range(3):
            if number == 1:
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            step()
        torch.cuda.synchronize()
        allocated = max(world.gather(torch.cuda.max_memory_allocated()))
        return {"allocated": allocated, "held": max(world.gather(torch.cuda.max_memory_reserved()))}


def memory_of_gpu() -> int:
    import torch

    return torch.cuda.get_device_properties(0).total_memory


def in_a_process(name: str, how: TrainShape) -> tuple[dict[str, int] | None, str]:
    """The measurement, or why there is none: what one leaves behind must not count in the next."""
    several = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={how.gpus}"] if how.gpus > 1 else []
    command = [sys.executable, *several, __file__, "--one", name, how.model_dump_json()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    if done.returncode == 0:
        return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{"))), ""
    return None, (done.stderr.strip().splitlines() or ["no reason given"])[-1][:160]


def show_parts(found: Estimate) -> None:
    for moment, memory in moments(found.config, found.shape, found.machine).items():
        parts = ", ".join(f"{part} {size / GIB:.1f}" for part, size in asdict(memory).items() if size)
        print(f"    {moment:29} {memory.allocated / GIB:6.1f}: {parts}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default=",".join(SHAPES), help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--checkpointing", default="none,block", help="none, block or both")
    parser.add_argument("--passes", default="1", help="forward passes a step: 1, 2 or 4, or several of them")
    parser.add_argument("--gpus", type=int, default=1, help="GPUs of this machine")
    parser.add_argument("--expert-parallel", type=int, default=1, help="GPUs that share the experts among them")
    parser.add_argument("--parts", action="store_true", help="print the estimate of each moment by part (GiB)")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "out" / "memory.json")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.one:
        name, how = flags.one
        print(json.dumps(measure(SHAPES[name], TrainShape.model_validate_json(how))))
        return 0
    machine = MACHINES["h200"]
    there = memory_of_gpu() if flags.device == "cuda" else machine.memory
    rows: list[dict[str, Any]] = []
    print(f"{'shape':10} {'checkpointing':13} passes  estimate  measured  ratio  held: estimate  measured (GiB)")
    for name in flags.shapes.split(","):
        for checkpointing in flags.checkpointing.split(","):
            for passes in map(int, flags.passes.split(",")):
                found = estimate(SHAPES[name], shape(flags, checkpointing, passes), machine)
                expected, held = found.memory.allocated, int(found.memory.allocated * (1 + machine.fragmentation))
                row: dict[str, Any] = {"shape": name, "checkpointing": checkpointing, "passes": passes}
                row |= {"estimate": expected, "moment": found.moment}
                line = f"{name:10} {checkpointing:13} {passes:6}  {expected / GIB:8.1f}"
                if expected > there:
                    line += "  larger than the GPU"
                elif flags.device == "cuda":
                    peak, why = in_a_process(name, found.shape)
                    if peak is None:
                        line += f"  failed: {why}"
                        row["failed"] = why
                    else:
                        row |= peak | {"ratio": expected / peak["allocated"]}
                        line += f"  {peak['allocated'] / GIB:8.1f}  {row['ratio']:5.3f}"
                        line += f"  {held / GIB:14.1f}  {peak['held'] / GIB:8.1f}"
                print(line, flush=True)
                if flags.parts:
                    show_parts(found)
                rows.append(row)
    flags.out.parent.mkdir(parents=True, exist_ok=True)
    flags.out.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    ratios = [row["ratio"] for row in rows if "ratio" in row]
    if flags.device == "cpu":
        return 0
    if ratios:
        print(f"ratios {min(ratios):.3f} to {max(ratios):.3f}, wanted {WANTED[0]:.2f} to {WANTED[1]:.2f}")
    good = ratios and not any("failed" in row for row in rows) and all(WANTED[0] <= r <= WANTED[1] for r in ratios)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
