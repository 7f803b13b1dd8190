"""Folders on disk: to the bit there and back, the hub's names, shards, the tokenizer, and whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from model.convert import hugging_face
from model.convert.check import check_files, compare_logits
from model.convert.hugging_face import Exported, from_hugging_face, to_hugging_face
from model.errors import ModelError
from model.network.transformer import Transformer
from model.weights import LazyTensors, weight_files
from pipelines.tokenize.train import train
from tests.model.convert.small import LAYOUT, network, small

TEXT = "Grüße!  def f(x):\n\n\treturn [x, 1_000]  # 🙂 don't"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real one of train-tokenizer: its pre-tokenizer and merges are what AutoTokenizer must not replace."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train([TEXT, "def main(x): return x"] * 3, 270).save(str(path))
    return path


def export(model: Transformer, tokenizer: Path, folder: Path, **options: Any) -> Exported:
    return to_hugging_face(
        model.state_dict(), model.config, tokenizer, folder, **{"dtype": torch.float32, **options}
    )  # fmt: skip


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """By safetensors' own reader."""
    out: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        out |= load_file(file)
    return out


@pytest.mark.parametrize("preset", LAYOUT)
@pytest.mark.parametrize("shard", [5_000_000_000, 20_000])
def test_there_and_back_is_exact_to_the_bit(preset: str, shard: int, tokenizer: Path, tmp_path: Path) -> None:
    model = network(small(preset))
    done = export(model, tokenizer, tmp_path / "out", max_shard_bytes=shard)
    assert (done.layout, done.created) == (LAYOUT[preset], True)
    back = from_hugging_face(done.folder)
    assert back.config == model.config.model_copy(update={"name": done.layout})
    assert not back.training
    for (name, a), (other, b) in zip(model.state_dict().items(), back.state_dict().items(), strict=True):
        assert name == other
        assert torch.equal(a, b), name


@pytest.mark.parametrize("preset", ["dbrx", "mixtral-8x7b", "olmoe"])
def test_names_shapes_and_values_are_those_that_transformers_saves(
    preset: str, tokenizer: Path, tmp_path: Path
) -> None:
    """Loaded by transformers (which fuses experts) and saved by it (which takes them apart): the hub's layout again."""
    export(network(small(preset)), tokenizer, tmp_path / "ours")
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    ours, theirs = stored(tmp_path / "ours"), stored(tmp_path / "theirs")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_names_and_shapes_of_the_hub(tokenizer: Path, tmp_path: Path) -> None:
    """One of each kind, written out: what vLLM's loaders look for."""
    for preset in ("dbrx", "mixtral-8x7b", "olmoe"):
        export(network(small(preset)), tokenizer, tmp_path / preset)
    shapes = {preset: {k: list(v.shape) for k, v in stored(tmp_path / preset).items()} for preset in LAYOUT}
    dbrx, mixtral, olmoe = shapes["dbrx"], shapes["mixtral-8x7b"], shapes["olmoe"]
    assert dbrx["transformer.blocks.1.ffn.experts.mlp.w2"] == [6 * 24, 32]
    assert dbrx["transformer.blocks.0.norm_attn_norm.attn.Wqkv.weight"] == [32 + 2 * 16, 32]
    assert mixtral["model.layers.1.block_sparse_moe.experts.5.w1.weight"] == [24, 32]
    assert mixtral["model.layers.1.block_sparse_moe.experts.5.w2.weight"] == [32, 24]
    assert mixtral["model.layers.0.self_attn.k_proj.weight"] == [16, 32]
    assert olmoe["model.layers.0.mlp.experts.0.down_proj.weight"] == [32, 24]
    assert olmoe["model.layers.0.self_attn.q_norm.weight"] == [32]


def test_shards_are_as_large_as_asked_and_indexed(tokenizer: Path, tmp_path: Path) -> None:
    model = network(small("mixtral-8x7b"))
    seen: list[tuple[int, int]] = []
    limit = 40_000
    folder = export(
        model, tokenizer, tmp_path / "out", max_shard_bytes=limit, progress=lambda *far: seen.append(far)
    ).folder
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = sorted(folder.glob("model-*.safetensors"))
    assert [f.name for f in files] == [
        f"model-{n:05d}-of-{len(files):05d}.safetensors" for n in range(1, len(files) + 1)
    ]
    assert len(files) > 2
    total = 0
    for file in files:
        with safe_open(file, "pt") as handle:
            assert handle.metadata() == {"format": "pt"}
            names = list(handle.keys())
            assert {index["weight_map"][name] for name in names} == {file.name}
            size = sum(handle.get_tensor(name).nbytes for name in names)
            assert size <= limit or len(names) == 1
            total += size
    assert total == index["metadata"]["total_size"] == 4 * model.config.parameters
    assert seen[-1] == (total, total)
    assert seen == sorted(seen)


@pytest.mark.parametrize("preset", ["dbrx", "mixtral-8x7b", "olmoe"])
def test_bfloat16_is_the_rounded_weights_and_loads_as_that(preset: str, tokenizer: Path, tmp_path: Path) -> None:
    model = network(small(preset))
    folder = export(model, tokenizer, tmp_path / "out", dtype=torch.bfloat16).folder
    rounded = Transformer(model.config).eval()
    rounded.load_state_dict({k: v.bfloat16() for k, v in model.state_dict().items()})
    back, half = from_hugging_face(folder), from_hugging_face(folder, dtype=torch.bfloat16)
    for name, tensor in rounded.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor)
        assert torch.equal(half.state_dict()[name], tensor.bfloat16())
    assert transformers.AutoModelForCausalLM.from_pretrained(folder).dtype == torch.bfloat16
    found = compare_logits(folder)
    assert found is not None
    assert found < 1e-4


@pytest.mark.parametrize("preset", ["dbrx", "mixtral-8x7b", "olmoe"])
def test_auto_tokenizer_gives_the_tokens_of_the_training(preset: str, tokenizer: Path, tmp_path: Path) -> None:
    folder = export(network(small(preset)), tokenizer, tmp_path / "out").folder
    ours, theirs = Tokenizer.from_file(str(tokenizer)), transformers.AutoTokenizer.from_pretrained(folder)
    assert theirs(TEXT)["input_ids"] == ours.encode(TEXT, add_special_tokens=False).ids
    assert theirs.decode(theirs(TEXT)["input_ids"]) == TEXT
    assert (theirs.eos_token, theirs.eos_token_id) == ("<|endoftext|>", ours.token_to_id("<|endoftext|>"))
    assert (theirs.pad_token_id, theirs.bos_token, theirs.model_max_length) == (1, None, 64)
    assert theirs.decode([0, 1, 2], skip_special_tokens=True) == ""
    settings = transformers.GenerationConfig.from_pretrained(folder)
    assert (settings.eos_token_id, settings.pad_token_id, settings.bos_token_id) == (0, 1, None)


def test_transformers_generates_and_ends_at_our_end_of_text(tokenizer: Path, tmp_path: Path) -> None:
    """The end is made the most probable token after any other, as a model that has learnt it would say."""
    model = network(small("olmoe"))
    with torch.no_grad():
        model.blocks[0].attention.out.weight.zero_()
        model.head_weight[0] = 50 * model.hidden(torch.tensor([[5]])).states[0, 0]
    folder = export(model, tokenizer, tmp_path / "out").folder
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    out = theirs.generate(torch.tensor([[5]]), attention_mask=torch.ones(1, 1), max_new_tokens=5, do_sample=False)
    assert out.tolist() == [[5, 0]]


class _Failing(dict[str, Any]):
    """Weights that cannot be read from the second block on."""

    def __init__(self, weights: dict[str, Any], error: BaseException) -> None:
        super().__init__(weights)
        self.error, self.reads = error, 0

    def __getitem__(self, name: str) -> Any:
        tensor = super().__getitem__(name)
        self.reads += 1
        if self.reads > len(self) + 5:  # the shapes were asked for first
            raise self.error
        return tensor


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_an_interrupted_export_leaves_nothing(error: BaseException, tokenizer: Path, tmp_path: Path) -> None:
    model = network(small("dbrx"))
    wanted = ModelError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(wanted) as raised:
        to_hugging_face(_Failing(model.state_dict(), error), model.config, tokenizer, tmp_path / "deep" / "out")
    assert list((tmp_path / "deep").iterdir()) == []
    if isinstance(raised.value, ModelError):
        assert raised.value.exit_code == 75
    # And what a kill leaves is no obstacle.
    half = tmp_path / "deep" / ".writing-out"
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"half")
    export(model, tokenizer, tmp_path / "deep" / "out")
    assert check_files(tmp_path / "deep" / "out") == len(stored(tmp_path / "deep" / "out"))
    assert not half.exists()


def test_the_same_again_is_left_and_another_is_refused(tokenizer: Path, tmp_path: Path) -> None:
    model = network(small("dbrx"))
    first = export(model, tokenizer, tmp_path / "out", origin={"weights_sha256": "a"})
    before = (first.folder / "model.safetensors").stat()
    again = export(model, tokenizer, tmp_path / "out", origin={"weights_sha256": "a"})
    assert (first.created, again.created) == (True, False)
    assert (first.folder / "model.safetensors").stat() == before
    for options in (
        {"origin": {"weights_sha256": "b"}},
        {"origin": {"weights_sha256": "a"}, "dtype": torch.bfloat16},
        {},
    ):
        with pytest.raises(ModelError, match="is there and holds something else; name another folder") as error:
            export(model, tokenizer, tmp_path / "out", **options)
        assert error.value.exit_code == 2
    empty = tmp_path / "empty"
    empty.mkdir()
    assert export(model, tokenizer, empty).created


def test_weights_and_tokenizers_of_another_model_are_refused(tokenizer: Path, tmp_path: Path) -> None:
    model = network(small("dbrx"))
    with pytest.raises(ModelError, match=r"not those of the configuration: blocks\.1\."):
        to_hugging_face(model.state_dict(), small("dbrx", layers=1), tokenizer, tmp_path / "out")
    little = network(small("dbrx", vocab_size=100))
    with pytest.raises(ModelError, match="has 270 tokens and the model 100; take the tokenizer") as error:
        export(little, tokenizer, tmp_path / "out")
    assert error.value.exit_code == 2
    assert list(tmp_path.iterdir()) == []


def _rewritten(folder: Path, change: Any) -> None:
    tensors = stored(folder)
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t.pop("lm_head.weight"), "lacks tensors: lm_head.weight; it is no olmoe model"),
        (lambda t: t.update(extra=torch.ones(1)), "has unexpected tensors: extra"),
        (lambda t: t.update({"model.norm.weight": torch.ones(3)}), r"model.norm.weight is \[3\] and not \[32\]"),
        (lambda t: t.update({"model.norm.weight": torch.ones(32, dtype=torch.int8)}), "is I8, which is quantised"),
    ],
)
def test_other_tensors_than_the_layouts_are_a_sentence(change: Any, says: str, tokenizer: Path, tmp_path: Path) -> None:
    folder = export(network(small("olmoe")), tokenizer, tmp_path / "out").folder
    _rewritten(folder, change)
    for read in (from_hugging_face, check_files):
        with pytest.raises(ModelError, match=says):
            read(folder)


def test_folders_that_are_not_whole_are_a_sentence(tokenizer: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no readable config\.json"):
        from_hugging_face(tmp_path)
    folder = export(network(small("dbrx")), tokenizer, tmp_path / "out", max_shard_bytes=20_000).folder
    files = sorted(folder.glob("model-*.safetensors"))
    content = files[1].read_bytes()
    files[1].write_bytes(content[:-10])
    with pytest.raises(ModelError, match="holds no whole model"):
        from_hugging_face(folder)
    files[1].unlink()
    with pytest.raises(ModelError, match="holds no whole model"):
        from_hugging_face(folder)
    (folder / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ModelError, match="has no weight_map"):
        check_files(folder)
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(ModelError, match=r"neither model\.safetensors nor model\.safetensors\.index\.json"):
        from_hugging_face(folder)


def test_an_index_does_not_lead_out_of_the_folder(tokenizer: Path, tmp_path: Path) -> None:
    folder = export(network(small("dbrx")), tokenizer, tmp_path / "out").folder
    (folder / "model.safetensors").rename(tmp_path / "model.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "../model.safetensors"}}))
    with pytest.raises(ModelError, match="holds no whole model"):
        from_hugging_face(folder)


def test_a_wrong_conversion_is_found_by_the_logits(tokenizer: Path, tmp_path: Path) -> None:
    """transformers reads another base than we do: what the check is for."""
    folder = export(network(small("mixtral-8x7b")), tokenizer, tmp_path / "out").folder
    found = compare_logits(folder)
    assert found is not None
    assert found < 1e-5
    said = json.loads((folder / "config.json").read_text())
    said |= {"rope_parameters": None, "rope_theta": 3.0, "rms_norm_eps": 0.5}
    (folder / "config.json").write_text(json.dumps(said))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("model.convert.check.from_hugging_face", lambda _: network(small("mixtral-8x7b")))
        with pytest.raises(ModelError, match=r"logits of .* differ from ours"):
            compare_logits(folder)


def test_a_model_that_is_too_large_is_not_compared(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = export(network(small("dbrx")), tokenizer, tmp_path / "out").folder
    monkeypatch.setattr("model.convert.check.COMPARED_UP_TO", 10)
    assert compare_logits(folder) is None


@pytest.fixture
def lazy(tmp_path: Path) -> Iterator[tuple[Transformer, LazyTensors]]:
    model = network(small("olmoe"))
    save_file(model.state_dict(), tmp_path / "ours.safetensors")
    with LazyTensors([tmp_path / "ours.safetensors"]) as weights:
        yield model, weights


def test_a_checkpoints_file_gives_the_very_files_of_the_network(
    lazy: tuple[Transformer, LazyTensors], tokenizer: Path, tmp_path: Path
) -> None:
    model, weights = lazy
    assert weights.keys() == model.state_dict().keys()
    assert len(weights) == len(model.state_dict())
    to_hugging_face(weights, model.config, tokenizer, tmp_path / "a")
    to_hugging_face(model.state_dict(), model.config, tokenizer, tmp_path / "b")
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes(), file.name
    assert hugging_face.ORIGIN in {f.name for f in (tmp_path / "a").iterdir()}
    assert weight_files(tmp_path / "a") == [tmp_path / "a" / "model.safetensors"]
