"""Large weights in several files, which every rank writes, digests and verifies a share of (gloo)."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow import MlflowClient
from safetensors import safe_open

from model.config import ModelConfig
from model.convert.checkpoint import export_folder
from model.convert.hugging_face import from_hugging_face
from model.errors import ModelError
from model.evaluate.held_out import EvaluateConfig, evaluate_folder
from model.network.transformer import Transformer
from model.registry.load import load, open_weights
from model.registry.register import register
from model.registry.store import tracking_uri
from model.train import checkpoint, parallel, share
from model.train.checkpoint import CheckpointWriter, find_checkpoint, read_checkpoint
from model.train.config import TrainConfig
from model.train.memory import TrainShape, checkpoint_copies
from model.train.optimizer import AdamW, build_optimizer
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
    registered = register(folder, lake=parts.lake, name="large")
    for network in (open_weights(folder)[0], load(registered.uri, lake=parts.lake).transformer):
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


def small(dtype: torch.dtype = torch.float32, vocab_size: int = 64) -> tuple[Transformer, AdamW]:
    """A model and its optimizer; of bfloat16, as on a GPU with bfloat16 moments."""
    halves = dtype == torch.bfloat16
    settings = TrainConfig(moments="bfloat16" if halves else "float32")
    with torch.device("meta"):
        model = Transformer(ModelConfig(**{**SMALLEST, "vocab_size": vocab_size}))
    if halves:
        model.compute_in(torch.bfloat16)
    model = parallel.build(settings, model, ALONE)
    return model, build_optimizer(model.parameters(), settings)


def test_copies_take_what_is_estimated_and_their_memory_again() -> None:
    (model, optimizer), host = small(), share.HostCopies()

    def copies() -> dict[str, torch.Tensor]:
        made = share.copy_share(model, optimizer, ALONE, host)
        named = {**{name: t for tensors in made.weights.values() for name, t in tensors.items()}, **made.parts}
        return {name: tensor for name, tensor in named.items() if not name.startswith("random/")}

    first = copies()
    shape = TrainShape(gpus=1, moments="float32")
    assert sum(tensor.nbytes for tensor in first.values()) == checkpoint_copies(model.config, shape)
    with torch.no_grad():
        model.embedding.weight.add_(1)
    second = copies()
    assert torch.equal(second["embedding.weight"], model.embedding.weight)
    assert {name: t.data_ptr() for name, t in first.items()} == {name: t.data_ptr() for name, t in second.items()}


def test_a_slow_save_holds_what_there_was_when_it_began(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = small()
    real, begun, go_on = share.save_file, threading.Event(), threading.Event()

    def slow(*arguments: Any) -> None:
        begun.set()
        assert go_on.wait(60)
        real(*arguments)

    monkeypatch.setattr(share, "save_file", slow)
    writer, expected = CheckpointWriter(tmp_path, ALONE, 2), bits(model)
    writer.save(1, model, optimizer, state={}, manifest={})
    assert begun.wait(60)
    with torch.no_grad():
        model.embedding.weight.add_(1)
    later = bits(model)
    threading.Timer(0.2, go_on.set).start()
    writer.save(2, model, optimizer, state={}, manifest={})  # waits, before it takes the copies' memory again
    last = writer.wait()
    assert last is not None
    for step, right in ((1, expected), (2, later)):
        found = open_weights(tmp_path / f"step-{step:06d}")[0]
        assert all(torch.equal(a, b) for a, b in zip(bits(found), right, strict=True)), step
    mode = {file.stat().st_mode & 0o777 for file in last.rglob("*") if file.is_file()}
    assert mode == {last.stat().st_mode & 0o666}


def test_what_torch_s_writer_wrote_is_read_and_ours_looks_alike(tmp_path: Path) -> None:
    """Checkpoints of format 2: their optimizer's files are by torch.distributed.checkpoint."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    model, optimizer = small(torch.bfloat16)
    for number, parameter in enumerate(model.parameters()):
        for key in share.MOMENTS:
            optimizer.state[parameter][key].fill_(number + 0.5)
    writer = CheckpointWriter(tmp_path, ALONE, 1)
    writer.save(1, model, optimizer, state={}, manifest={})
    folder = writer.wait()
    assert folder is not None

    def only_file() -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        (path,) = (folder / share.OPTIMIZER).iterdir()
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            told = {key: json.loads(value) if value[0] == "{" else value for key, value in file.metadata().items()}
        path.unlink()
        return tensors, told

    tensors, ours = only_file()
    storage = HuggingFaceStorageWriter(str(folder / share.OPTIMIZER), save_distributed=True)
    save(dict(tensors), storage_writer=storage, no_dist=True)
    other, restored = small(torch.bfloat16)
    share.restore(folder, other, restored, ALONE)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        for key in share.MOMENTS:
            assert optimizer.state[a][key].dtype == restored.state[b][key].dtype
            assert torch.equal(optimizer.state[a][key], restored.state[b][key])
    with pytest.raises(ModelError, match="holds another model's weights"):
        share.restore(folder, *small(vocab_size=65), ALONE)
    assert only_file()[1] == ours


def test_what_cannot_be_read_is_not_taken_for_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = CheckpointWriter(tmp_path, ALONE, 2)
    writer.save(1, *small(), state={}, manifest={})
    writer.wait()

    def stale(path: Path) -> str:
        raise OSError(116, "Stale file handle")

    monkeypatch.setattr(checkpoint, "_sha256", stale)
    with pytest.raises(ModelError, match=r"Stale file handle.*run again") as refused:
        find_checkpoint(tmp_path)
    assert refused.value.exit_code == 75


# Saves twice, or says what it finds. Each rank says the bytes that it digested. Where it is told so, the last rank's
# disk is full.
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

    def full(*arguments):
        raise OSError(28, "No space left on device")

    if sys.argv[2] == "full" and world.rank == world.size - 1:
        share.save_file = full
    try:
        if sys.argv[2] != "load":
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

    # Folders that are not shared, and a disk that is full for one of them.
    for root, what, said in (("own-{rank}", "save", "shared folder"), ("full", "full", "No space")):
        refused = run(2, tmp_path / root, what)
        assert [rank["code"] for rank in refused] == [75, 75]
        assert all(said in str(rank["error"]) for rank in refused)
    assert not [folder for glob in ("own-*/*", "full/*") for folder in tmp_path.glob(glob)]
