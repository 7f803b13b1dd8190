"""The benchmarks of kernels run to their figures on tiny shapes, and time nothing that is wrong.

Left out: the figures themselves, which are a GPU's.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import block_sparse, gpu, moe_layer, moe_peers
from benchmarks.moe_peers import Contestant


def run(monkeypatch: pytest.MonkeyPatch, benchmark: Any, folder: Path, *flags: str) -> tuple[int, list[dict[str, Any]]]:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(folder / "cache"))
    monkeypatch.setattr(sys, "argv", ["benchmark", "--device=cpu", "--quick", f"--out={folder}", *flags])
    code = benchmark.main()
    name = benchmark.__name__.rpartition(".")[2]
    return code, json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))["results"]


def test_the_layers_are_checked_and_timed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--shapes=7b", "--skew=1", "--tokens=40", "--dtype=float32", "--profile")
    code, results = run(monkeypatch, moe_layer, tmp_path, *flags)
    printed = capsys.readouterr().out
    assert code == 0, printed
    assert "NOT A MEASUREMENT" in printed
    assert "in the kernels below" in printed
    assert [result["skew"] for result in results] == [1]
    for result in results:
        found = result["contestants"]
        assert {"dense", "grouped_mm", "padded", "loop", "lakemoe"} <= found.keys()
        for figures in found.values():
            assert figures["status"] == "right"
            assert figures["both"]["seconds"]["median"] > 0
            assert figures["saved_bytes"] > 0
        assert found["dense"]["forward"]["ratio"]["median"] == 1
        assert found["lakemoe"]["first_call_seconds"] is not None


def test_a_layer_that_is_wrong_or_fails_is_reported_and_not_timed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    known = moe_peers.contestants()
    right = moe_peers.loop

    def forgets_a_weight(x: Tensor, index: Tensor, weight: Tensor, *weights: Tensor) -> Tensor:
        return right(x, index, torch.ones_like(weight) / weight.shape[1] + 0 * weight, *weights)

    def wrong_gradient(x: Tensor, index: Tensor, weight: Tensor, w1: Tensor, v1: Tensor, w2: Tensor) -> Tensor:
        return right(x, index, weight, w1.detach() + 0 * w1, v1, w2)

    def fails(x: Tensor, *rest: Tensor) -> Tensor:
        raise torch.OutOfMemoryError

    bad = {f.__name__: Contestant(name=f.__name__, experts=f) for f in (forgets_a_weight, wrong_gradient, fails)}
    entrants = {"dense": known["dense"]} | bad
    monkeypatch.setattr(moe_layer, "contestants", lambda: entrants)
    _, (result,) = run(
        monkeypatch, moe_layer, tmp_path, "--shapes=dbrx", "--tokens=32", "--dtype=float32", "--forward-only"
    )
    found = result["contestants"]
    assert found["forgets_a_weight"]["status"].startswith("wrong: y, x, expert_weight, w1")
    assert found["wrong_gradient"]["status"] == "wrong: w1"
    assert found["fails"]["status"] == "failed: out of memory"
    assert found["dense"]["status"] == "right"
    assert [name for name, figures in found.items() if "forward" in figures] == ["dense"]
    assert "both" not in found["dense"]


def test_the_sparse_products_are_checked_and_timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    code, results = run(monkeypatch, block_sparse, tmp_path, "--settings=0.5,xs", "--dtype=float32")
    assert code == 0
    assert len(results) == 2 * 3 * 4
    for entry in results:
        assert entry["status"] == "right"
        assert entry["ratio"]["low"] <= entry["ratio"]["median"] <= entry["ratio"]["high"]


def test_a_sparse_product_that_is_wrong_is_not_timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    right = block_sparse.dsd
    monkeypatch.setattr(block_sparse, "dsd", lambda s, b: right(s, b) * 1.03)
    code, results = run(monkeypatch, block_sparse, tmp_path, "--settings=0.5", "--products=dsd", "--layouts=NN,TN")
    assert code == 1
    assert [entry["status"] for entry in results] == ["wrong", "wrong"]
    assert all("ratio" not in entry for entry in results)


def test_a_contestant_that_fails_while_it_is_timed_leaves_the_others_alone() -> None:
    calls = {"good": lambda: None, "bad": lambda: 1 // 0}
    times, failed = gpu.interleave(calls, 4, gpu.Clock(torch.device("cpu")))
    assert failed.keys() == {"bad"}
    assert "ZeroDivisionError" in failed["bad"]
    assert [len(seconds) for seconds in times.values()] == [4]


@pytest.mark.parametrize("benchmark", [moe_layer, block_sparse], ids=["moe_layer", "block_sparse"])
def test_a_cpu_is_refused_as_a_measurement(benchmark: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmark", "--device=cpu", f"--out={tmp_path}"])
    with pytest.raises(SystemExit, match="--quick"):
        benchmark.main()
