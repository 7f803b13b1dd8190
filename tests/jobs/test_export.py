"""`lakemoe export`: a registered model and a training's checkpoint as folders that transformers loads."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
import transformers

from jobs import export, runs
from jobs.main import main
from model.convert.hugging_face import Exported
from model.network.generate import SamplingConfig, generate
from model.registry.load import load
from tests.model.serve.process import NAME, make_lake

MODEL = f"models:/{NAME}@champion"


@pytest.fixture(scope="module")
def lake(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_lake(tmp_path_factory.mktemp("export"))


def test_an_exported_version_says_in_transformers_what_it_says_here(
    lake: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    to = tmp_path / "out"
    flags = [
        "export",
        "--lake",
        lake,
        "--model",
        MODEL,
        "--to",
        str(to),
        "--dtype",
        "float32",
        "--max-shard-gb",
        "2e-5",
    ]
    assert main(flags) == 0
    printed = capfd.readouterr().out
    assert "transformers loads it and gives our logits" in printed
    assert f"The model is in {to}, in dbrx's layout." in printed
    assert f"Next: vllm serve {to}" in printed
    assert len(list(to.glob("model-*.safetensors"))) > 1

    loaded = load(MODEL, lake=lake)
    sampling = SamplingConfig(max_tokens=12, temperature=0)
    wanted = "".join(piece.text for piece in generate(loaded.transformer, loaded.tokenizer, "def f", sampling))
    tokenizer = transformers.AutoTokenizer.from_pretrained(to)
    model = transformers.AutoModelForCausalLM.from_pretrained(to)
    prompt = tokenizer("def f", return_tensors="pt")
    out = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    assert tokenizer.decode(out[0, prompt["input_ids"].shape[1] :]) == wanted

    origin = json.loads((to / "lakemoe.json").read_text())
    assert (origin["step"], origin["data"]["table"], origin["data"]["version"]) == (7, "gold.sequences", 0)
    (run,) = runs.runs(lake, "export")
    assert (run["status"], runs.versions(run["inputs"])) == ("succeeded", {"gold.sequences": 0})

    assert main(flags) == 0
    assert "export: unchanged" in capfd.readouterr().out
    assert main([*flags, "--dtype", "bfloat16"]) == 2
    assert "is there and holds something else; name another folder" in capfd.readouterr().err


def test_where_transformers_is_not_installed_the_folder_is_written_all_the_same(
    lake: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "transformers", None)  # type: ignore[arg-type]
        assert main(["export", "--lake", lake, "--model", MODEL, "--to", str(tmp_path / "out")]) == 0
    assert "logits were not compared" in capfd.readouterr().out
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16


def test_a_model_that_vllm_reads_otherwise_is_not_sent_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(export, "compare_logits", lambda folder: None)
    export.report(Exported(folder=tmp_path, layout="olmoe", created=True, differs_in_vllm=("qkv_clip", "tied_head")))
    printed = capfd.readouterr()
    assert "vLLM does not read qkv_clip and tied_head of olmoe models" in printed.err
    assert "vllm serve" not in printed.out
    assert "Next: transformers" in printed.out


@pytest.mark.parametrize(
    ("flags", "code", "says"),
    [
        ([], 2, "to: field required"),
        (["--to", "x", "--layout", "mixtral"], 2, "mixtral layout cannot hold"),
        (["--to", "x", "--training", "nobody"], 2, "name one"),
        (["--to", "x", "--model", f"models:/{NAME}@nobody"], 1, "There is no models:/"),
        (["--to", "x", "--max-shard-gb", "0"], 2, "max_shard_gb: input should be greater than 0"),
        (["--to", "/proc/x"], 75, "could not be written"),
    ],
)
def test_what_cannot_be_exported_is_one_sentence(
    lake: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    flags: list[str], code: int, says: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert main(["export", "--lake", lake, "--model", MODEL, *flags]) == code
    error = capsys.readouterr().err.strip()
    assert says in error
    assert "\n" not in error


def test_a_training_that_is_not_there_cannot_be_exported(
    lake: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["export", "--lake", lake, "--to", "x", "--training", "nobody"]) == 2
    assert "holds no finished training" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
