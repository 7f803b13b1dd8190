"""Large weights in several files, which every rank writes, digests and verifies a share of (gloo)."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient

from model.config import ModelConfig
from model.convert.checkpoint import export_folder
from model.convert.hugging_face import from_hugging_face
from model.errors import ModelError
from model.evaluate.held_out import EvaluateConfig, evaluate_folder
from model.network.transformer import Transformer
from model.registry.load import load, open_weights
from model.registry.register import register
from model.registry.store import tracking_uri
from model.train import parallel, share
from model.train.checkpoint import find_checkpoint, read_checkpoint
from model.train.config import TrainConfig
from model.train.memory import TrainShape, checkpoint_copies
from model.train.optimizer import build_optimizer
from model.train.world import ALONE
from model.weights import WEIGHTS, weight_files, weights_sha256
from tests.model.conftest import SMALLEST
from tests.model.ranks import run_ranks
from tests.model.train.cases import Case, curve, stop_after, train

LIMIT = 10_000  # bytes a file


def bits(model: Transformer) -> list[torch.Tensor]:
    return [tensor.clone() for tensor in model.state_dict().values()]


def test_a_model_in_several_files_goes_all_the_way(
    settings: Callable[..., Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, parts = settings("whole"), settings("parts")
    expected, _ = open_weights(Path(train(whole).checkpoint))
    monkeypatch.setattr(share, "split", partial(share.split, limit=LIMIT))
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 7)
        with pytest.raises(KeyboardInterrupt):
            train(parts)
    folder = Path(train(parts).checkpoint)
    assert curve(parts) == curve(whole)
    files = weight_files(folder)
    assert len(files) > 3
    assert not (folder / WEIGHTS).exists()
    for model in (open_weights(folder)[0], load(register(folder, lake=parts.lake, name="large").uri, lake=parts.lake)):
        network = model if isinstance(model, Transformer) else model.transformer
        assert all(torch.equal(a, b) for a, b in zip(bits(network), bits(expected), strict=True))
    version = MlflowClient(tracking_uri=tracking_uri(parts.lake)).get_model_version("large", "1")
    digest = weights_sha256(read_checkpoint(folder).manifest)
    assert version.tags["lakemoe.weights_sha256"] == digest
    assert register(folder, lake=parts.lake, name="large").created is False
    assert evaluate_folder(folder, parts.lake, EvaluateConfig()).weights_sha256 == digest
    export_folder(folder, tmp_path / "out", lake=parts.lake, dtype=torch.float32)
    back = from_hugging_face(tmp_path / "out")
    assert all(torch.equal(a, b) for a, b in zip(back.parameters(), expected.parameters(), strict=True))

    files[1].unlink()
    found, broken = find_checkpoint(folder.parent)
    assert found is not None
    assert found.step == 6
    assert files[1].name in broken[0]
    with pytest.raises(ModelError, match="holds no whole model"):
        open_weights(folder)


def test_copies_take_what_is_estimated_and_their_memory_again() -> None:
    config, settings = ModelConfig(**{**SMALLEST, "vocab_size": 64}), TrainConfig()
    with torch.device("meta"):
        model = Transformer(config)
    model = parallel.build(settings, model, ALONE)
    optimizer, host = build_optimizer(model.parameters(), settings), share.HostCopies()

    def copies() -> dict[str, torch.Tensor]:
        made = share.copy_share(model, optimizer, ALONE, host)
        named = {**{name: t for tensors in made.weights.values() for name, t in tensors.items()}, **made.parts}
        return {name: tensor for name, tensor in named.items() if not name.startswith("random/")}

    first = copies()
    shape = TrainShape(gpus=1, moments="float32")
    assert sum(tensor.nbytes for tensor in first.values()) == checkpoint_copies(config, shape)
    with torch.no_grad():
        model.embedding.weight.add_(1)
    second = copies()
    assert torch.equal(second["embedding.weight"], model.embedding.weight)
    assert {name: t.data_ptr() for name, t in first.items()} == {name: t.data_ptr() for name, t in second.items()}


# Saves twice, or says what it finds. Each rank says the bytes that it wrote of the weights.
RANKS = """
import json, sys
from functools import partial
from pathlib import Path
import torch
from model.config import ModelConfig
from model.errors import ModelError
from model.network.transformer import Transformer
from model.train import checkpoint, parallel, share
from model.train.config import TrainConfig
from model.train.optimizer import build_optimizer
from model.train.world import join_world

share.split = partial(share.split, limit=int(sys.argv[3]))
read = []
digest = checkpoint._sha256
checkpoint._sha256 = lambda path: read.append(path.stat().st_size) or digest(path)
with join_world("cpu") as world:
    root = Path(sys.argv[1].format(rank=world.rank))
    with torch.device("meta"):
        model = Transformer(ModelConfig(**json.loads(sys.argv[4])))
    settings = TrainConfig()
    model = parallel.build(settings, model, world)
    optimizer = build_optimizer(model.parameters(), settings)
    told = {}
    try:
        if sys.argv[2] == "save":
            writer = checkpoint.CheckpointWriter(root, world, 2)
            for step in (1, 2):
                writer.save(step, model, optimizer, state={}, manifest={})
            writer.wait()
        else:
            found, told["broken"] = checkpoint.find_checkpoint(root, world)
            found.restore(model, optimizer, world)
            told["step"] = found.step
    except ModelError as error:
        told["error"], told["code"] = str(error), error.exit_code
    print(json.dumps({**told, "read": sum(read)}))
"""


@pytest.mark.slow
def test_ranks_share_the_files_and_find_the_same_one_whole(tmp_path: Path) -> None:
    model = json.dumps({**SMALLEST, "vocab_size": 64})

    def run(size: int, root: Path | str, what: str) -> list[dict[str, object]]:
        outputs = run_ranks(size, RANKS, str(root), what, str(LIMIT), model)
        return [json.loads(output.splitlines()[-1]) for output in outputs]

    shared = tmp_path / "shared"
    saved = run(4, shared, "save")
    sizes = [said["bytes"] for said in read_checkpoint(shared / "step-000002").manifest["files"].values()]
    # Each reads its own once a checkpoint, and none much more than another.
    each = [int(str(rank["read"])) for rank in saved]
    assert sum(each) == 2 * sum(sizes)
    assert max(each) < 2 * min(each)
    newest = weight_files(shared / "step-000002")
    newest[-1].write_bytes(newest[-1].read_bytes()[:-1] + b"\0")
    found = run(2, shared, "load")
    assert [rank["step"] for rank in found] == [1, 1]
    assert all(newest[-1].name in str(rank["broken"]) for rank in found)
    each = [int(str(rank["read"])) for rank in found]
    assert max(each) < 2 * min(each)

    # Folders that are not shared.
    refused = run(2, str(tmp_path / "own-{rank}"), "save")
    assert [rank["code"] for rank in refused] == [75, 75]
    assert all("shared folder" in str(rank["error"]) for rank in refused)
    assert not list(tmp_path.glob("own-*/step-*"))
    shutil.rmtree(shared)
