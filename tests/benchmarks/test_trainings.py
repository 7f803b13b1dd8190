"""The benchmarks that train: their peers compute what they say, and the scripts run to their table on a CPU."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks import balance, checkpoint, dropless, tokens
from benchmarks.capacity import CapacityMoE, capacity_moe, capacity_of
from benchmarks.small_training import smoothed
from kernels.moe import dropless_moe
from model.config import ModelConfig
from model.network.router import choose

T, D, E, K, F = 24, 8, 4, 2, 6


def operands(skew: float = 0.0) -> tuple[Tensor, Tensor, list[Tensor]]:
    """index [T, K], weight [T, K] and x, w1, v1, w2, which want gradients; skew prefers the first expert."""
    generator = torch.Generator().manual_seed(0)
    x, w1, v1, w2 = (
        torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()
        for shape in ((T, D), (E, F, D), (E, F, D), (E, F, D))
    )
    logits = torch.randn(T, E, generator=generator) + torch.tensor([skew, *[0.0] * (E - 1)])
    routing = choose(logits, K, "l1")
    return routing.expert_index_TK, routing.expert_weight_TK, [x, w1, v1, w2]


def kept_by_the_rule(index_TK: Tensor, capacity: int) -> Tensor:
    """First choices before second ones, earlier tokens before later ones, by a loop."""
    taken, kept_TK = [0] * E, torch.zeros(T, K, dtype=torch.bool)
    for k in range(K):
        for t in range(T):
            expert = int(index_TK[t, k])
            kept_TK[t, k] = taken[expert] < capacity
            taken[expert] += 1
    return kept_TK


@pytest.mark.parametrize("factor", [0.5, 1.0, 1.25, 4.0])
def test_capacity_is_dropless_without_the_dropped_assignments(factor: float) -> None:
    index, weight, leaves = operands(skew=1.0)
    kept = kept_by_the_rule(index, capacity_of(factor, T, K, E))
    assert bool(kept.all()) == (factor == 4.0)
    expected = dropless_moe(leaves[0], index, weight * kept, *leaves[1:])
    found = capacity_moe(leaves[0], index, weight, *leaves[1:], factor)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    upstream = torch.randn(T, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    theirs = torch.autograd.grad(expected, leaves, upstream)
    for a, b in zip(torch.autograd.grad(found, leaves, upstream), theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_share_that_is_dropped_is_what_the_rule_drops() -> None:
    index, _, _ = operands(skew=2.0)
    counts = torch.bincount(index.flatten(), minlength=E)[None, None]
    kept = kept_by_the_rule(index, capacity_of(1.0, T, K, E))
    assert dropless.dropped(counts, 1.0, T, K) == pytest.approx(1 - float(kept.float().mean()))


def test_a_layer_that_does_not_drop_is_ours() -> None:
    config = ModelConfig(width=D, experts=E, experts_chosen=K, expert_width=F)
    layer = CapacityMoE(config, 0.5)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(2 * T, D)
    dropping, _ = layer(x)
    layer.dropping = False
    whole, _ = layer(x)
    routing, _ = layer.router(x)
    expected = dropless_moe(x, routing.expert_index_TK, routing.expert_weight_TK, layer.w1, layer.v1, layer.w2)
    torch.testing.assert_close(whole, expected)
    assert not torch.allclose(dropping, whole)


def test_when_a_loss_was_reached() -> None:
    points = [{"seconds": 2.0, "held_out_loss": 5.0}, {"seconds": 4.0, "held_out_loss": 4.0}]
    assert dropless.reached(points, 4.5) == 3.0
    assert dropless.reached(points, 6.0) == 2.0
    assert dropless.reached(points, 3.9) is None
    assert smoothed([2, 4, 6, 8], 2) == [2, 3, 5, 7]


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    # A walk with small steps, so that there is something to learn.
    walk = np.cumsum(rng.integers(1, 3, size=30_000)) % 97
    path = tmp_path / "tokens.npz"
    np.savez(path, train=walk[:25_000].astype(np.uint16), held_out=walk[25_000:].astype(np.uint16), vocabulary=97)
    return path


@pytest.mark.parametrize("script", [balance, dropless])
def test_scripts_run_to_their_table_and_picture(
    script: object, token_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = script.__name__.split(".")[-1]  # type: ignore[attr-defined]
    flags = ["--device=cpu", "--tiny", f"--tokens={token_file}", f"--out={tmp_path}", "--steps=12"]
    assert script.main(flags) == 0  # type: ignore[attr-defined]
    report = json.loads((tmp_path / f"{name}.json").read_text(encoding="utf-8"))
    names = list(balance.METHODS) if script is balance else list(dropless.CONTESTANTS)
    assert [run["name"] for run in report["runs"]] == names
    for run in report["runs"]:
        assert run["steps"] == 12
        assert run["held_out_loss"] < run["points"][0]["held_out_loss"] < run["curve"][0]
    first = report["runs"][0]
    others = [run for run in report["runs"] if run["name"] in ("auxiliary", "z", "capacity 2")]
    assert all(run["curve"][0] == pytest.approx(first["curve"][0], rel=1e-5) for run in others)  # one seed
    picture = tmp_path / f"{name}.png"
    picture.unlink(missing_ok=True)
    assert script.main([f"--draw={tmp_path / name}.json"]) == 0  # type: ignore[attr-defined]
    assert picture.exists() or "matplotlib is not installed" in capsys.readouterr().out


def test_without_tokens_or_device_a_sentence_says_what_to_do(token_file: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"make it with python benchmarks/tokens\.py"):
        tokens.read(tmp_path / "none.npz")
    with pytest.raises(SystemExit, match="add --tiny"):
        balance.main(["--device=cpu", f"--tokens={token_file}"])
    with pytest.raises(SystemExit, match="no contestant wide; take of dropless"):
        dropless.main(["--device=cpu", "--tiny", "--only=wide", f"--tokens={token_file}"])


@pytest.mark.slow
def test_both_sides_of_the_checkpoint_benchmark_read_what_they_wrote(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    flags = ["--device", "cpu", "--gpus", "2", "--quick", "--rounds", "1", "--out", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["checkpoint.py", *flags])
    assert checkpoint.main() == 0
    rounds = json.loads((tmp_path / "checkpoint.json").read_text())["rounds"]
    assert [found["side"] for found in rounds] == ["ours", "theirs"]
    assert all(found["whole"] >= found["held"] > 0 for found in rounds)
