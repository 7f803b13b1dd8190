"""The products for Hopper, at loads that fill their tiles: correct on such a GPU, and compilable anywhere.

Gluon has no interpreter. Where there is no GPU the kernels are compiled for one, down to its machine code, which finds
what the compiler can find: types, layouts, shared memory beyond a multiprocessor's. test_moe.py has them whole in
torch.compile and in a CUDA graph.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton")
from triton import language as tl  # noqa: E402

from kernels.moe import dropless_moe  # noqa: E402
from tests.kernels.test_moe import call, check, make, masked  # noqa: E402

hopper = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="no Hopper GPU"
    ),
]
on_hopper = lambda test: hopper[0](hopper[1](test))  # noqa: E731
HALF = [torch.bfloat16, torch.float16]
T = TypeVar("T")
SHAPES = [  # T, D, F, E, K, experts that are chosen
    (1024, 128, 256, 4, 2, 4),
    (700, 512, 528, 5, 2, 5),
    (900, 528, 272, 7, 3, 7),
    (1000, 144, 2064, 6, 2, 4),
    (1537, 64, 64, 1, 1, 1),
    (3000, 1040, 80, 8, 4, 5),
    (900, 200, 264, 4, 2, 4),
]


@on_hopper
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_result_and_gradients_equal_the_formula(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    *size, experts = shape
    check(make(*size, dtype, "cuda", experts=experts), naive=masked)


@on_hopper
@pytest.mark.parametrize("width", [272, 640])
def test_rows_of_any_stride_that_tma_takes(width: int) -> None:
    case = make(900, 512, width, 4, 2, torch.bfloat16, "cuda")
    expected = every(case)
    wide = torch.nn.functional.pad(case["x"].detach(), (0, 8))
    case["x"] = wide[:, :512].requires_grad_()
    assert case["x"].stride() == (520, 1)
    assert all(torch.equal(a, b) for a, b in zip(expected, every(case), strict=True))


@on_hopper
@pytest.mark.parametrize("gate", [True, False], ids=["gated", "plain"])
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("width", [272, 640])  # tokens are gathered, and copied
def test_every_activation_with_and_without_gate(width: int, gate: bool, activation: str) -> None:
    case = make(800, 208, width, 5, 2, torch.bfloat16, "cuda", gate=gate, weight_dtype=torch.bfloat16)
    check(case, activation, naive=masked)


def every(case: dict[str, Any]) -> list[Tensor]:
    dy = torch.randn(case["x"].shape, generator=torch.Generator().manual_seed(1)).to(case["x"])
    return call(dropless_moe, case, "silu", dy)


@on_hopper
@pytest.mark.parametrize("width", [272, 640])
def test_the_same_bits_in_twenty_runs(width: int) -> None:
    case = make(4000, 512, width, 8, 2, torch.bfloat16, "cuda")
    first = every(case)
    for _ in range(20):
        assert all(torch.equal(a, b) for a, b in zip(first, every(case), strict=True))


@on_hopper
@pytest.mark.parametrize("width", [272, 640])
def test_a_bad_token_leaves_the_others_bits_alone(width: int) -> None:
    case = make(1000, 208, width, 4, 2, torch.bfloat16, "cuda")
    clean = every(case)
    for bad in (torch.nan, torch.inf):
        with torch.no_grad():
            case["x"][8] = bad
        spoilt = every(case)
        others = [t for t in range(1000) if t != 8]
        for before, after in list(zip(clean, spoilt, strict=True))[:3]:  # y and the gradients of x and weight
            assert torch.equal(before[others], after[others])
        assert not torch.isfinite(spoilt[0][8]).all()
        # Experts that never saw the token have finite gradients of their weights.
        unseen = [e for e in range(4) if e not in case["index"][8].tolist()]
        assert all(torch.isfinite(gradient[unseen]).all() for gradient in spoilt[3:])


@on_hopper
def test_experts_without_tokens_are_never_read_and_get_zero_gradients() -> None:
    case = make(1000, 208, 400, 7, 2, torch.bfloat16, "cuda", experts=3)
    with torch.no_grad():
        for name in ("w1", "v1", "w2"):
            case[name][3:] = torch.nan
    results = every(case)
    assert all(torch.isfinite(t).all() for t in results)
    for gradient in results[3:]:
        assert (gradient[3:] == 0).all()
        assert (gradient[:3] != 0).any()


@triton.jit
def busy_kernel(out, rounds, SIZE: tl.constexpr):
    x = tl.arange(0, SIZE).to(tl.float32)
    for _ in range(rounds):
        x = x * 0.999 + 1.0
    tl.store(out + tl.program_id(0), tl.sum(x, 0))


def beside_another_kernel(call: Callable[[], T]) -> T:
    """The call's result, begun while another kernel holds 64 multiprocessors."""
    out = torch.empty(64, device="cuda")
    torch.cuda.synchronize()
    other = torch.cuda.Stream()
    begin, start, end = (torch.cuda.Event(enable_timing=True) for _ in range(3))
    with torch.cuda.stream(other):
        begin.record()
        busy_kernel[(64,)](out, 1_000_000, SIZE=1 << 15, num_warps=32)  # all of their registers
        end.record()
    start.record()
    found = call()
    torch.cuda.synchronize()
    assert begin.elapsed_time(start) < begin.elapsed_time(end), "the other kernel had ended before ours began"
    return found


@on_hopper
def test_it_goes_on_where_its_programs_cannot_all_run_at_once() -> None:
    """Programs that meet must not wait for those that another kernel keeps from starting."""
    case = make(4096, 512, 1024, 4, 2, torch.bfloat16, "cuda")
    expected = every(case)
    found = beside_another_kernel(lambda: every(case))
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


@pytest.mark.slow
def test_it_compiles_for_hopper_where_no_gpu_is(tmp_path: Path) -> None:
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}
    program = [sys.executable, "-m", "tests.kernels.compile_hopper"]
    run = subprocess.run(
        program,
        cwd=Path(__file__).parents[2],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    shared = [int(line) for line in run.stdout.split()]
    assert len(shared) == 31
    assert max(shared) <= 227 * 1024  # what a program may have on such a GPU
