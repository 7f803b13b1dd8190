"""Settings come from file, environment and flags in that order, and a wrong one is named in one sentence."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import BaseModel, ConfigDict, Field

from jobs.clean import Settings as CleanSettings
from jobs.settings import JobSettings, UsageError, load


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    learning_rate: float = Field(3e-4, description="peak (1/step)")
    steps: int = Field(10, description="optimizer steps")


class Settings(JobSettings):
    """A job's settings."""

    source: list[str] = Field([], description="where from")
    train: Section = Field(default_factory=Section, description="training")


def read(*arguments: str) -> Settings:
    return load(Settings, list(arguments), program="lakemoe x")


def test_later_sources_win(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("lake: /file\ntrain:\n  steps: 7\n  learning_rate: 1.0\n")
    monkeypatch.setenv("LAKEMOE_TRAIN__STEPS", "8")
    got = read("--config", str(file), "--train.learning-rate", "2", "--source", "a", "--source", "b")
    assert (got.lake, got.train.steps, got.train.learning_rate, got.source) == ("/file", 8, 2.0, ["a", "b"])


def test_flags_are_taken_in_both_spellings() -> None:
    assert read("--train.learning_rate=2").train.learning_rate == 2.0


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("train:\n  stepz: 7\n", r"a\.yaml: unknown key 'train.stepz'; did you mean 'train.steps'\?"),
        ("train:\n  steps: many\n", r"a\.yaml: train.steps: input should be a valid integer.*not 'many'"),
        ("- 1\n", "must hold a mapping"),
        ("a: [\n", "is not YAML"),
    ],
)
def test_a_wrong_file_is_named_in_one_sentence(tmp_path: Path, text: str, sentence: str) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(text)
    with pytest.raises(UsageError, match=sentence) as caught:
        read("--config", str(file))
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"Cannot read .*none\.yaml"):
        read("--config", str(tmp_path / "none.yaml"))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--train.stepz", "4"), "lakemoe x: unknown flag '--train.stepz'; did you mean '--train.steps'?"),
        (
            ("--train.lerning_rate=4",),
            "lakemoe x: unknown flag '--train.lerning-rate'; did you mean '--train.learning-rate'?",
        ),
        (("--zzz",), "lakemoe x: unknown flag '--zzz'; lakemoe x --help lists the flags."),
        (("--lake",), "lakemoe x: argument --lake: expected one argument; lakemoe x --help lists the flags."),
    ],
)
def test_a_wrong_flag_is_named_in_one_sentence(arguments: tuple[str, ...], sentence: str) -> None:
    with pytest.raises(UsageError) as caught:
        read(*arguments)
    assert str(caught.value) == sentence


def test_an_unknown_section_is_named_in_one_sentence(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("ingets: {}\n")
    with pytest.raises(UsageError) as caught:
        read("--config", str(file))
    assert str(caught.value) == f"{file}: unknown key 'ingets'; did you mean 'ingest'?"


def test_a_validator_s_words_are_not_repeated(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("clean: {rules: [{name: a.b, signal: wordz, kind: text, min: 1}]}\n")
    with pytest.raises(UsageError) as caught:
        load(CleanSettings, ["--config", str(file)], program="lakemoe clean")
    sentence = str(caught.value)
    assert sentence == f"{file}: clean.rules.0.signal: there is no signal 'wordz'; did you mean 'words'?"


def test_help_lists_fields_with_unit_and_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        read("--help")
    assert caught.value.code == 0
    printed = capsys.readouterr().out
    assert "--train.learning-rate" in printed
    assert "(1/step) (default: 0.0003)" in " ".join(printed.split())


def test_the_environment_names_the_file_and_a_flag_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    named, flagged = tmp_path / "named.yaml", tmp_path / "flagged.yaml"
    named.write_text("lake: /named\n")
    flagged.write_text("lake: /flagged\n")
    monkeypatch.setenv("LAKEMOE_CONFIG", str(named))
    assert read().lake == "/named"
    assert read("--config", str(flagged)).lake == "/flagged"


def test_a_file_names_no_other_file(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("config: other.yaml\n")
    with pytest.raises(UsageError, match="unknown key 'config'"):
        read("--config", str(file))


def test_help_names_no_function(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        load(CleanSettings, ["--help"], program="lakemoe clean")
    printed = capsys.readouterr().out
    assert "factory" not in printed
    assert "conf/clean.yaml" in printed
