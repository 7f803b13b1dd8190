"""The registry on a real MLflow in a lake's folder: register, load, promote, lineage. One lake for the whole file."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlflow
import pyarrow as pa
import pytest
import torch
from deltalake import DeltaTable, write_deltalake
from mlflow import MlflowClient
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from model.config import ModelConfig, dump_config
from model.errors import ModelError
from model.network.generate import SamplingConfig, generate
from model.network.transformer import Transformer
from model.registry.lineage import lineage
from model.registry.load import load
from model.registry.promote import CHALLENGER, PromotionConfig, champion_version, judge, promote
from model.registry.register import RegisteredVersion, register
from model.registry.store import connect, experiment_id, tracking_uri
from model.registry.tables import read_rows
from pipelines.tables import GOLD_SEQUENCES, OPS_PROMOTIONS, OPS_RUNS, SPECIAL_TOKENS, tokenizer_uri


def make_tokenizer(lake: Path) -> str:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate([*SPECIAL_TOKENS, *alphabet])}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer_id = hashlib.sha256(made.to_str().encode()).hexdigest()
    path = Path(tokenizer_uri(str(lake), tokenizer_id))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(made.to_str(), encoding="utf-8")
    return tokenizer_id


def write_table(lake: Path, table: Any, rows: list[dict[str, Any]]) -> str:
    write_deltalake(
        table.uri(str(lake)),
        pa.Table.from_pylist(rows, schema=table.schema),
        mode="append",
        partition_by=list(table.partition_by) or None,
    )
    return str(DeltaTable(table.uri(str(lake))).metadata().id)


def make_checkpoint(folder: Path, data: dict[str, Any], run_id: str | None, seed: int) -> Path:
    """The files of the trainer's checkpoint that the registry reads, with a small random model."""
    folder.mkdir(parents=True)
    torch.manual_seed(seed)
    config = ModelConfig(
        vocab_size=261, max_seq_len=64, layers=1, width=32, heads=4, head_width=8, experts=4, experts_chosen=2,
        expert_width=16, init_std=0.3,
    )  # fmt: skip
    save_file(Transformer(config).state_dict(), folder / "model.safetensors")
    (folder / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    (folder / "training_state.json").write_text("{}", encoding="utf-8")
    files = {
        f.name: {"bytes": f.stat().st_size, "sha256": hashlib.sha256(f.read_bytes()).hexdigest()}
        for f in folder.iterdir()
    }
    manifest = {"data": data, "mlflow_run_id": run_id, "step": 7, "files": files}
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A lake with a tokenizer, gold.sequences, ops.runs, one MLflow run and three checkpoints."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        root = tmp_path_factory.mktemp("registry")
        patch.chdir(root)
        lake = root / "lake"
        tokenizer_id = make_tokenizer(lake)
        sequence: dict[str, Any] = {
            "sequence_id": "a", "split": "train", "domain": "text", "tokens": bytes(16), "segment_lengths": [4],
            "document_ids": ["d"], "pad_count": 0, "tokenizer_id": tokenizer_id, "sequence_length": 4,
        }  # fmt: skip
        table_id = write_table(lake, GOLD_SEQUENCES, [sequence])
        now = datetime(2026, 1, 1, tzinfo=UTC)
        run: dict[str, Any] = {"started_at": now, "status": "succeeded", "counts": []}
        runs = [
            {
                **run, "run_id": "01", "job": "tokenize", "inputs": [{"table": "silver.documents", "version": 2}],
                "outputs": [{"table": "gold.tokens", "version": 4}],
            },
            {
                **run, "run_id": "011", "job": "maintain",
                # 5 is of one that was killed before its row.
                "inputs": [{"table": "bronze.documents", "version": 7}, {"table": "gold.tokens", "version": 5}],
                "outputs": [{"table": "bronze.documents", "version": 8}, {"table": "gold.tokens", "version": 6}],
            },
            {
                **run, "run_id": "02", "job": "pack", "inputs": [{"table": "gold.tokens", "version": 6}],
                "outputs": [{"table": "gold.sequences", "version": 0}],
            },
        ]  # fmt: skip
        write_table(lake, OPS_RUNS, runs)
        client = connect(str(lake))
        run_id = client.create_run(experiment_id(client)).info.run_id
        client.set_terminated(run_id)
        data = {
            "table": "gold.sequences", "table_id": table_id, "version": 0, "tokenizer_id": tokenizer_id,
            "sequence_length": 4,
        }  # fmt: skip
        checkpoints = [make_checkpoint(root / f"step-{seed}", data, run_id, seed) for seed in range(3)]
        first = register(checkpoints[0], lake=str(lake), name="small", metrics={"loss": 3.5})
        yield SimpleNamespace(
            lake=str(lake),
            client=client,
            run_id=run_id,
            checkpoints=checkpoints,
            first=first,
            tokenizer_id=tokenizer_id,
        )


def put(world: Any, number: int, name: str = "small") -> RegisteredVersion:
    return register(world.checkpoints[number], lake=world.lake, name=name)


def test_everything_lies_in_the_lake(world: Any) -> None:
    lake = Path(world.lake)
    assert (lake / "mlflow.db").is_file()
    assert list((lake / "mlartifacts").rglob("model.safetensors"))
    assert not {"mlruns", "mlartifacts", "mlflow.db"} & {p.name for p in lake.parent.iterdir()}


def test_registering_the_same_weights_again_gives_the_same_version(world: Any) -> None:
    assert world.first == RegisteredVersion(name="small", version="1", created=True)
    again = put(world, 0)
    assert (again.version, again.created) == ("1", False)
    assert len(world.client.search_model_versions("name = 'small'")) == 1


def put_killed(world: Any, monkeypatch: pytest.MonkeyPatch, method: str, name: str) -> None:
    """Register, and die where the client's method is called."""

    class Killed(BaseException):
        pass

    def die(*args: Any, **kwargs: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, method, die)
        with pytest.raises(Killed):
            put(world, 2, name)


def test_a_registration_killed_before_the_version_is_finished_with_its_files(
    world: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_killed(world, monkeypatch, "create_model_version", "killed")
    put(world, 2, "killed")
    experiment = experiment_id(world.client)
    assert len([m for m in world.client.search_logged_models([experiment]) if m.name == "killed"]) == 1


def test_a_registration_killed_before_the_alias_gets_it_the_next_time(
    world: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_killed(world, monkeypatch, "set_registered_model_alias", "unnamed")
    assert put(world, 2, "unnamed").created is False
    assert str(world.client.get_model_version_by_alias("unnamed", "challenger").version) == "1"


def test_a_version_leads_back_by_its_tags_version_zero_included(world: Any) -> None:
    version = world.client.get_model_version("small", "1")
    sha = hashlib.sha256((world.checkpoints[0] / "model.safetensors").read_bytes()).hexdigest()
    assert version.tags["lakemoe.weights_sha256"] == sha
    assert version.tags["lakemoe.gold.sequences.version"] == "0"
    assert version.tags["lakemoe.tokenizer_id"] == world.tokenizer_id
    assert version.tags["lakemoe.training_run_id"] == version.run_id == world.run_id
    assert version.tags["lakemoe.loss"] == "3.5"
    assert version.tags["lakemoe.step"] == "7"
    assert world.client.get_run(world.run_id).info.status == "FINISHED"


def test_no_file_is_a_pickle_and_requirements_are_pinned(world: Any) -> None:
    folder = Path(mlflow.artifacts.download_artifacts(artifact_uri="models:/small/1"))
    names = {p.name for p in folder.rglob("*") if p.is_file()}
    assert {"model.safetensors", "config.yaml", "tokenizer.json", "manifest.json", "pyfunc.py"} <= names
    assert not [n for n in names if n.endswith((".pkl", ".pickle", ".pt", ".bin"))]
    lines = (folder / "requirements.txt").read_text(encoding="utf-8").split()
    assert all("==" in line for line in lines)
    assert {"torch", "tokenizers", "mlflow"} <= {line.split("==")[0] for line in lines}


def test_pyfunc_in_a_fresh_process_without_pickle_answers_as_the_network(world: Any) -> None:
    loaded = load("models:/small/1", lake=world.lake)
    sampling = SamplingConfig(max_tokens=12, seed=3)
    wanted = "".join(p.text for p in generate(loaded.transformer, loaded.tokenizer, "def ", sampling))
    code = (
        "import mlflow, pandas as pd, json\n"
        "m = mlflow.pyfunc.load_model('models:/small/1')\n"
        "print(json.dumps(m.predict(pd.DataFrame({'prompt': ['def ']}), params={'max_tokens': 12, 'seed': 3})))\n"
    )
    env = {
        **os.environ,
        "MLFLOW_TRACKING_URI": tracking_uri(world.lake),
        "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
        "PYTHONPATH": str(Path(__file__).parents[3]),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [wanted]


def test_loaded_weights_are_the_checkpoints(world: Any) -> None:
    loaded = load("models:/small@challenger", lake=world.lake)
    torch.manual_seed(0)
    original = Transformer(loaded.config)
    assert all(torch.equal(a, b) for a, b in zip(original.parameters(), loaded.transformer.parameters(), strict=True))
    assert not loaded.transformer.training
    assert (loaded.name, loaded.version) == ("small", "1")


@pytest.mark.parametrize(
    ("uri", "code", "text"),
    [("small", 2, "no model URI"), ("models:/small@nobody", 1, "There is no"), ("models:/other/1", 1, "There is no")],
)
def test_a_model_that_is_not_there_is_a_sentence(world: Any, uri: str, code: int, text: str) -> None:
    with pytest.raises(ModelError, match=text) as error:
        load(uri, lake=world.lake)
    assert error.value.exit_code == code


def test_the_gate_promotes_refuses_and_writes_every_decision(world: Any) -> None:
    name = "gated"
    losses = {"1": 3.5, "2": 3.6, "3": 3.4}
    for number in range(3):
        put(world, number, name)

    def ask(version: str, tolerance: float = 0.0) -> Any:
        return promote(
            name,
            version,
            lake=world.lake,
            held_out_loss=losses.__getitem__,
            config=PromotionConfig(tolerance=tolerance),
            requested_by="test",
        )

    first = ask("1")
    assert (first.promoted, first.champion_version) == (True, None)
    assert ask("1").recorded is False
    refused = ask("2", tolerance=0.05)
    assert (refused.decision, refused.champion_version) == ("refused", "1")
    assert "3.6000 against the champion's 3.5000" in refused.reason
    assert champion_version(world.client, name) == "1"
    assert ask("2", tolerance=0.2).promoted
    assert ask("3").promoted
    assert load(f"models:/{name}@champion", lake=world.lake).version == "3"
    again = ask(CHALLENGER)  # promoted, so that there is none
    assert (again.recorded, again.promoted, again.candidate_version) == (False, True, "3")
    rows = [r for r in read_rows(OPS_PROMOTIONS.uri(world.lake)) if r["model"] == name]
    rows.sort(key=lambda r: r["promotion_id"])
    assert [(r["candidate_version"], r["champion_version"], r["decision"]) for r in rows] == [
        ("1", None, "promoted"), ("2", "1", "refused"), ("2", "1", "promoted"), ("3", "2", "promoted"),
    ]  # fmt: skip
    assert rows[1]["figures"] == {"candidate_loss": 3.6, "champion_loss": 3.5, "tolerance": 0.05}
    assert {r["requested_by"] for r in rows} == {"test"}
    table = DeltaTable(OPS_PROMOTIONS.uri(world.lake))
    assert table.protocol().min_reader_version == 1
    assert table.metadata().configuration["delta.enableChangeDataFeed"] == "true"


def test_a_promotion_killed_before_the_alias_moved_is_finished_with_one_row(
    world: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(world, 1, "cut")
    arguments: dict[str, Any] = {"lake": world.lake, "held_out_loss": lambda _: 1.0}

    class Killed(BaseException):
        pass

    def die(*args: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "set_registered_model_alias", die)
        with pytest.raises(Killed):
            promote("cut", "1", **arguments)
    assert promote("cut", "1", **arguments).promoted
    assert champion_version(world.client, "cut") == "1"
    assert len([r for r in read_rows(OPS_PROMOTIONS.uri(world.lake)) if r["model"] == "cut"]) == 1


def test_the_rule_of_the_gate() -> None:
    assert judge(2.0, None, 0.0)[0]
    assert judge(2.0, 2.0, 0.0)[0]
    assert not judge(2.01, 2.0, 0.0)[0]
    assert judge(2.01, 2.0, 0.02)[0]
    assert not judge(float("nan"), None, 1.0)[0]
    assert not judge(float("inf"), 2.0, 1.0)[0]


def test_lineage_goes_back_through_ops_runs_and_sees_what_is_gone(world: Any) -> None:
    found = lineage("models:/small/1", lake=world.lake)
    assert (found.training_run_id, found.tokenizer_id) == (world.run_id, world.tokenizer_id)
    ways = [(use.table, use.version, use.job, use.missing) for use in found.tables]
    assert ways == [
        ("gold.sequences", 0, "pack", None),
        ("gold.tokens", 6, "tokenize", "the table is gone"),
        ("silver.documents", 2, None, "the table is gone"),
    ]
    assert not found.reproducible
    file = next(Path(GOLD_SEQUENCES.uri(world.lake)).rglob("*.parquet"))
    away = file.with_suffix(".away")
    file.rename(away)
    try:
        assert "VACUUM" in str(lineage("models:/small/1", lake=world.lake).tables[0].missing)
    finally:
        away.rename(file)


def test_a_damaged_checkpoint_and_a_bad_name_are_sentences(world: Any, tmp_path: Path) -> None:
    broken = make_checkpoint(tmp_path / "broken", {}, None, 9)
    (broken / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(ModelError, match="is not what was written"):
        register(broken, lake=world.lake, name="small")
    with pytest.raises(ModelError, match="cannot be a model's name") as error:
        put(world, 0, "a/b")
    assert error.value.exit_code == 2


@pytest.mark.parametrize("read", ["load", "lineage", "promote"])
def test_reading_a_lake_without_a_store_makes_nothing(
    read: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    typo = tmp_path / "typo"
    calls = {
        "load": lambda: load("models:/small@champion", lake=str(typo)),
        "lineage": lambda: lineage("models:/small@champion", lake=str(typo)),
        "promote": lambda: promote("small", "1", lake=str(typo), held_out_loss=lambda _: 1.0),
    }
    with pytest.raises(ModelError, match=f"There is no {typo}/mlflow.db; register and promote a model first") as error:
        calls[read]()
    assert error.value.exit_code == 1
    assert not typo.exists()


FIRST_USE = """
import sys, time
from pathlib import Path
from model.registry.store import connect
lake, ready, go, delay = sys.argv[1:]
Path(ready).touch()
while not Path(go).exists():
    time.sleep(0.01)
time.sleep(float(delay))
print(len(connect(lake).search_experiments()))
"""


@pytest.mark.slow
def test_processes_that_use_a_lake_first_together_make_one_store(tmp_path: Path) -> None:
    lake, go = tmp_path / "lake", tmp_path / "go"
    lake.mkdir()
    (lake / ".mlflow.db.new").write_bytes(b"half of a store that a killed process left")
    ready = [tmp_path / f"ready-{number}" for number in range(3)]
    env = {k: v for k, v in os.environ.items() if k != "MLFLOW_TRACKING_URI"}
    env["PYTHONPATH"] = str(Path(__file__).parents[3])
    processes = [
        # The later ones come while the first one migrates, which takes seconds.
        subprocess.Popen(
            [sys.executable, "-c", FIRST_USE, str(lake), str(path), str(go), str(0.3 * number)],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number, path in enumerate(ready)
    ]
    until = time.monotonic() + 120
    while not all(path.exists() for path in ready):
        assert time.monotonic() < until
        time.sleep(0.01)
    go.touch()
    for process in processes:
        out, errors = process.communicate(timeout=120)
        assert (process.returncode, out.strip()) == (0, "1"), errors
    assert sorted(p.name for p in lake.iterdir()) == [".mlflow.db.lock", "mlflow.db"]


def test_an_object_store_lake_needs_a_tracking_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(ModelError, match="MLFLOW_TRACKING_URI"):
        tracking_uri("s3://bucket/lake")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    assert tracking_uri("s3://bucket/lake") == "http://127.0.0.1:1"
