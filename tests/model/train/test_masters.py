"""The weights that GPUs train, bfloat16 beside the missing bits of their float32 masters, on every mesh (gloo)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.model.conftest import SMALLEST, WriteSequences
from tests.model.ranks import run_ranks

# What GPUs train: bfloat16 matrices, and AdamW with the missing bits. Updates by made-up gradients, which every rank
# draws whole; saves, or restores, and says sums of the whole float32 weights.
MASTERS = """
import json, sys
from functools import partial
from pathlib import Path
import torch
from model.config import ModelConfig
from model.network.distributed import assign
from model.network.transformer import Transformer
from model.train import parallel, share
from model.train.checkpoint import CheckpointWriter, find_checkpoint
from model.train.config import TrainConfig
from model.train.optimizer import build_optimizer
from model.train.world import join_world

# So that every rank writes files of its own.
share.split = partial(share.split, limit=4000)
root, degree, loads = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "load"
settings = TrainConfig(expert_parallel=degree, learning_rate=0.1)
with join_world("cpu") as world:
    with torch.device("meta"):
        model = Transformer(ModelConfig(**json.loads(sys.argv[4])))
    # As it is on a GPU.
    model = parallel.build(settings, model.compute_in(parallel.COMPUTE), world)
    optimizer = build_optimizer(model.parameters(), settings)

    def update(seed):
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            gradient = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
            parameter.grad = torch.empty_like(parameter)
            assign(parameter.grad, gradient)
        norm = optimizer.gradient_norm(world.group)
        optimizer.step(gradient_scale=1 / norm)
        return float(norm)

    if loads:
        find_checkpoint(root, world)[0].restore(model, optimizer, world)
        optimizer.steps = 2
    else:
        print("norms", update(1), update(2))
        writer = CheckpointWriter(root, world, 1)
        writer.save(2, model, optimizer, state={}, manifest={})
        writer.wait()
    update(3)
    mix = lambda count: torch.arange(count).double().sin()  # so that exchanged weights are seen
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    files = share.copy_share(model, optimizer, world, share.HostCopies()).weights
    assert files, "a rank writes nothing"
    for name, master in (item for tensors in files.values() for item in tensors.items()):
        mixed, lost = master.flatten().double() @ mix(master.numel()), master - master.bfloat16()
        print(name, dtypes[name], float(mixed), float(lost.abs().sum()))
"""


@pytest.mark.slow
def test_weights_of_gpus_keep_their_float32_masters_on_every_mesh(tmp_path: Path) -> None:
    model = json.dumps({**SMALLEST, "vocab_size": 3})
    alone = run_ranks(1, MASTERS, str(tmp_path / "one"), "1", "save", model)[0]
    assert "moe.w1 torch.bfloat16" in alone
    assert "router.weight torch.float32" in alone
    rest = alone.split("norms")[1].splitlines()[1:]
    assert any(float(line.split()[-1]) > 0 for line in rest if "bfloat16" in line), "nothing is lost to rounding"
    for size, degree in ((2, 1), (4, 2)):
        folder = str(tmp_path / f"{size}-{degree}")
        assert near("".join(run_ranks(size, MASTERS, folder, str(degree), "save", model)), alone)
        # What one mesh saved another goes on with, and one process.
        assert near("".join(run_ranks(2, MASTERS, folder, "2", "load", model)), alone)
        assert near(run_ranks(1, MASTERS, folder, "1", "load", model)[0], alone)


def near(output: str, expected: str) -> bool:
    """Whether the weights that two programs told are the same but for the norm's last bits."""
    found, right = ([line.split() for line in text.splitlines() if " torch." in line] for text in (output, expected))
    assert [line[:2] for line in found] == [line[:2] for line in right]
    for a, b in zip(found, right, strict=True):
        assert float(a[2]) == pytest.approx(float(b[2]), rel=1e-5, abs=1e-4), a[0]
    return len(found) > 0


TRAIN = """
import json, os, sys
import torch
torch.set_num_threads(1)
from model.train import parallel, trainer
from model.train.config import TrainConfig
build = trainer.build
# As it is on a GPU.
trainer.build = lambda config, model, world: build(config, model.compute_in(parallel.COMPUTE), world)
settings = json.loads(sys.argv[1])
trainer.train(settings.pop("lake"), TrainConfig(**settings))
"""


@pytest.mark.slow
def test_bfloat16_on_every_mesh_gives_one_curve(write_sequences: WriteSequences, tmp_path: Path) -> None:
    lake, uri = write_sequences(), f"sqlite:///{tmp_path / 'mlflow.db'}"
    curves = []
    for size, degree in ((1, 1), (2, 1), (4, 2)):
        name = f"{size}-{degree}"
        settings = {"lake": lake, "name": name, "overrides": SMALLEST, "expert_parallel": degree, "steps": 6}
        settings |= {"global_batch_size": 8, "micro_batch_size": 1, "warmup_steps": 2, "learning_rate": 1e-2}
        run_ranks(size, TRAIN, json.dumps({**settings, "device": "cpu"}), MLFLOW_TRACKING_URI=uri)
        lines = (Path(lake) / "training" / name / "metrics.jsonl").read_text().splitlines()
        curves.append([[line["loss"], line["gradient_norm"]] for line in map(json.loads, lines)])
    one, *others = curves
    assert one[-1][0] < one[0][0] - 0.1
    for other in others:
        for a, b in zip(other, one, strict=True):
            assert a == pytest.approx(b, rel=0.02)
