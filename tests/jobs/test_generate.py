"""`lakemoe generate` as a process: the prompt and the network's completion, and nothing else, on standard output."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from jobs.main import main
from model.network.generate import SamplingConfig, generate
from model.registry.load import load
from tests.model.serve.process import NAME, environment, make_lake

MODEL = f"models:/{NAME}@champion"


@pytest.fixture(scope="module")
def lake(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_lake(tmp_path_factory.mktemp("generate"))


def completion(lake: str, prompt: str, sampling: SamplingConfig) -> str:
    loaded = load(MODEL, lake=lake)
    return "".join(piece.text for piece in generate(loaded.transformer, loaded.tokenizer, prompt, sampling))


def test_a_prompt_from_standard_input_and_only_text_on_standard_output(lake: str, tmp_path: Path) -> None:
    prompt = "Grüße,\n\n  def f(\n"
    flags = ["--lake", lake, "--model", MODEL, "--prompt", "-", "--sampling.max-tokens", "20", "--sampling.seed", "3"]
    command = [sys.executable, "-m", "jobs.generate", *flags]
    done = subprocess.run(
        command, input=prompt.encode(), env=environment(), cwd=tmp_path, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr
    wanted = prompt + completion(lake, prompt, SamplingConfig(max_tokens=20, seed=3)) + "\n"
    assert done.stdout == wanted.encode()


def test_a_prompt_from_the_flag_with_stop(lake: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = completion(lake, "def ", SamplingConfig(max_tokens=20, temperature=0))
    stop = text[8:10]
    flags = ["--sampling.max-tokens", "20", "--sampling.temperature", "0", "--sampling.stop", stop]
    assert main(["generate", "--lake", lake, "--model", MODEL, "--prompt", "def ", *flags]) == 0
    assert capsys.readouterr().out == "def " + text[: text.index(stop)] + "\n"


@pytest.mark.parametrize(
    ("flags", "code", "says"),
    [
        (["--prompt", "a", "--sampling.max-tokens", "1000000"], 2, "do not fit the model's"),
        (["--prompt", "\udcff"], 2, "The prompt is not UTF-8"),
        ([], 2, "prompt: field required"),
        (["--prompt", "a", "--model", f"models:/{NAME}@nobody"], 1, "There is no models:/"),
    ],
)
def test_what_cannot_be_completed_is_one_sentence(
    lake: str, capsys: pytest.CaptureFixture[str], flags: list[str], code: int, says: str
) -> None:
    assert main(["generate", "--lake", lake, "--model", MODEL, *flags]) == code
    printed = capsys.readouterr()
    assert printed.out == ""
    assert says in printed.err
