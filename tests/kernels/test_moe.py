"""dropless_moe against a formula in float64 that shares no code with it.

The same tests run on the CPU's reference, in Triton's interpreter (tests/kernels/test_interpreter.py runs this file
again with TRITON_INTERPRET=1, at fewer shapes) and on a GPU when there is one.
"""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.moe import dropless_moe
from kernels.routing import route

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
CUDA = pytest.param(
    "cuda",
    marks=[pytest.mark.gpu, pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="no CUDA device")],
)
DEVICES = ["cpu", CUDA]
NAMES = ["y", "x", "weight", "w1", "w2", "v1"]
ACT = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda h: F.gelu(h, approximate="tanh")}


def formula(x, index, weight, w1, v1, w2, activation="silu"):  # type: ignore[no-untyped-def]
    """The layer token by token: no sorting, every product in the inputs' own dtype, summed over k in the weights'."""
    rows = []
    for t in range(x.shape[0]):
        row = torch.zeros(x.shape[1], dtype=torch.promote_types(x.dtype, weight.dtype), device=x.device)
        for k in range(index.shape[1]):
            e = int(index[t, k])
            a = ACT[activation](w1[e] @ x[t])
            if v1 is not None:
                a = a * (v1[e] @ x[t])
            row = row + weight[t, k] * (a @ w2[e])
        rows.append(row.to(x.dtype))
    return torch.stack(rows) if rows else x * 1


def masked(x, index, weight, w1, v1, w2, activation="silu"):  # type: ignore[no-untyped-def]
    """The same, expert by expert over all its tokens: for shapes where token by token takes too long."""
    y = torch.zeros(x.shape, dtype=torch.promote_types(x.dtype, weight.dtype), device=x.device)
    for e in range(w1.shape[0]):
        t, k = torch.nonzero(index == e, as_tuple=True)
        a = ACT[activation](x[t] @ w1[e].T)
        if v1 is not None:
            a = a * (x[t] @ v1[e].T)
        y = y.index_put((t,), weight[t, k].unsqueeze(1) * (a @ w2[e]), accumulate=True)
    return y.to(x.dtype)


def make(
    T: int, D: int, F_: int, E: int, K: int, dtype: torch.dtype, device: str = "cpu", *, gate: bool = True,
    experts: int | None = None, weight_dtype: torch.dtype | None = None, seed: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """Unit-scale inputs; only the first `experts` experts are ever chosen."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=g) * scale).to(device, dtype).requires_grad_()

    index = torch.rand(T, experts or E, generator=g).argsort(1)[:, :K]
    weight = torch.rand(T, K, generator=g) + 0.1
    return {
        "x": normal(T, D),
        "index": index.to(device),
        "weight": weight.to(device, weight_dtype or torch.promote_types(dtype, torch.float32)).requires_grad_(),
        "w1": normal(E, F_, D, scale=D**-0.5),
        "v1": normal(E, F_, D, scale=D**-0.5) if gate else None,
        "w2": normal(E, F_, D, scale=F_**-0.5),
    }


def call(function, case, activation, dy):  # type: ignore[no-untyped-def]
    """The result and the gradients of x, weight, w1, w2 (and v1)."""
    y = function(case["x"], case["index"], case["weight"], case["w1"], case["v1"], case["w2"], activation)
    leaves = [case[n] for n in NAMES[1:] if case[n] is not None]
    gradients = torch.autograd.grad(y, leaves, dy.to(y.dtype), materialize_grads=True)
    return [y.detach(), *gradients]


def widened(case: dict[str, Any]) -> dict[str, Any]:
    leaf = {n: v.detach().double().requires_grad_() for n, v in case.items() if v is not None and n != "index"}
    return {"v1": None, "index": case["index"], **leaf}


def check(case: dict[str, Any], activation: str = "silu", naive: Any = formula) -> None:
    """Each error against float64, relative to the largest entry, is about that of the unfused computation."""
    dy = torch.randn(case["x"].shape, generator=torch.Generator().manual_seed(1)).to(case["x"])
    ours = call(dropless_moe, case, activation, dy)
    plain = call(naive, case, activation, dy)
    truth = call(naive, widened(case), activation, dy)
    # In float32 only the order of summation differs, which is luck of a few units in the last place either way.
    slack = torch.finfo(case["x"].dtype).eps * (4 if case["x"].dtype == torch.float32 else 1)
    for name, o, p, t in zip(NAMES, ours, plain, truth, strict=False):
        like = case["x" if name == "y" else name]
        assert o.shape == like.shape
        assert o.dtype == like.dtype
        scale = t.abs().max() if t.numel() else 0
        if scale == 0:
            assert (o == 0).all()
        else:
            error, allowed = (o.double() - t).abs().max() / scale, (p.double() - t).abs().max() / scale
            assert error <= 1.5 * allowed + slack, f"{name}: {error:.2e}, unfused {allowed:.2e}"


def dtypes() -> list[torch.dtype]:
    every = [torch.float32, torch.float16, torch.bfloat16]
    return every[:2] if INTERPRETED else every


SHAPES = [  # T, D, F, E, K, experts that are chosen
    (0, 16, 16, 4, 2, 4),
    (1, 16, 32, 4, 1, 4),
    (7, 32, 16, 5, 3, 3),
    (19, 48, 80, 4, 4, 4),
    (33, 16, 16, 3, 1, 1),
    (5, 16, 16, 1, 1, 1),
    (40, 24, 40, 16, 4, 16),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", dtypes(), ids=str)
def test_result_and_gradients_equal_the_formula(device: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    *size, experts = shape
    check(make(*size, dtype, device, experts=experts))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("gate", [True, False], ids=["gated", "plain"])
@pytest.mark.parametrize("activation", list(ACT))
def test_every_activation_with_and_without_gate(device: str, gate: bool, activation: str) -> None:
    for dtype in dtypes():
        check(make(11, 32, 48, 5, 2, dtype, device, gate=gate), activation)


@pytest.mark.parametrize("device", DEVICES)
def test_weights_may_have_the_inputs_dtype_and_the_index_32_bits(device: str) -> None:
    case = make(9, 32, 16, 6, 2, torch.float16, device, weight_dtype=torch.float16)
    case["index"] = case["index"].int()
    check(case)


@st.composite
def sizes(draw: st.DrawFn) -> dict[str, Any]:
    experts = draw(st.integers(1, 12))
    chosen = draw(st.integers(1, experts))
    return {
        "T": draw(st.integers(0, 30 if INTERPRETED else 90)),
        "D": 16 * draw(st.integers(1, 6)),
        "F_": 16 * draw(st.integers(1, 6)),
        "E": experts,
        "K": chosen,
        "experts": draw(st.integers(chosen, experts)),
        "gate": draw(st.booleans()),
        "dtype": draw(st.sampled_from(dtypes())),
        "seed": draw(st.integers(0, 1000)),
    }


@settings(max_examples=6 if INTERPRETED else 40, deadline=None)
@given(sizes())
def test_any_shape(size: dict[str, Any]) -> None:
    check(make(**size), naive=masked)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@settings(max_examples=12, deadline=None)  # a new shape may compile kernels
@given(sizes())
def test_any_shape_on_a_gpu(size: dict[str, Any]) -> None:
    check(make(**size, device="cuda"), naive=masked)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(
    "shape", [(1024, 512, 768, 16, 4, 16), (3000, 256, 1024, 8, 2, 5), (2048, 1024, 256, 64, 8, 64)], ids=str
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_larger_shapes_on_a_gpu(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    *size, experts = shape
    check(make(*size, dtype, "cuda", experts=experts), naive=masked)


@pytest.mark.parametrize("device", DEVICES)
def test_strided_inputs_give_the_same_result(device: str) -> None:
    case = make(13, 32, 48, 5, 2, torch.float32, device)

    def strided(t: Tensor, dims: tuple[int, ...]) -> Tensor:
        inverse = tuple(sorted(range(len(dims)), key=lambda d: dims[d]))
        moved = t.detach().permute(dims).contiguous().permute(inverse)
        # Every second row of a tensor twice as long, so that no stride is the usual one.
        return torch.stack([moved, moved.new_full(moved.shape, torch.nan)], -1)[..., 0].requires_grad_()

    other = {n: strided(t, tuple(reversed(range(t.dim())))) for n, t in case.items() if n != "index"}
    other["index"] = case["index"].t().contiguous().t()
    assert not any(t.is_contiguous() for t in other.values())
    dy = torch.ones((), device=device).expand(13, 32)
    for a, b in zip(call(dropless_moe, case, "silu", dy), call(dropless_moe, other, "silu", dy), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_bad_token_leaves_the_others_bits_alone(device: str, bad: float) -> None:
    case = make(21, 32, 48, 4, 2, torch.float32, device)
    dy = torch.ones(21, 32, device=device)
    clean = call(dropless_moe, case, "silu", dy)
    with torch.no_grad():
        case["x"][8] = bad
    spoilt = call(dropless_moe, case, "silu", dy)
    others = [t for t in range(21) if t != 8]
    for before, after in list(zip(clean, spoilt, strict=True))[:3]:  # y and the gradients of x and weight
        assert torch.equal(before[others], after[others])
    assert not torch.isfinite(spoilt[0][8]).all()


@pytest.mark.parametrize("device", DEVICES)
def test_experts_without_tokens_are_never_read_and_get_zero_gradients(device: str) -> None:
    case = make(9, 32, 16, 5, 2, torch.float32, device, experts=3)
    with torch.no_grad():
        for name in ("w1", "v1", "w2"):
            case[name][3:] = torch.nan
    y, dx, dweight, dw1, dw2, dv1 = call(dropless_moe, case, "silu", torch.ones(9, 32, device=device))
    assert all(torch.isfinite(t).all() for t in (y, dx, dweight, dw1, dw2, dv1))
    for gradient in (dw1, dw2, dv1):
        assert (gradient[3:] == 0).all()
        assert (gradient[:3] != 0).any()


@pytest.mark.parametrize("device", DEVICES)
def test_the_same_bits_every_time(device: str) -> None:
    size = (600, 128, 256, 16, 4) if device == "cuda" else (23, 32, 16, 6, 3)
    case = make(*size, torch.float32, device)
    dy = torch.randn(size[0], size[1], device=device)
    first = call(dropless_moe, case, "silu", dy)
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, call(dropless_moe, case, "silu", dy), strict=True))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("frozen", ["x", "weight", "w1", "v1", "w2"])
def test_a_frozen_input_changes_no_other_gradient(device: str, frozen: str) -> None:
    case = make(9, 32, 16, 4, 2, torch.float32, device)
    names = ("x", "weight", "w1", "v1", "w2")
    args = lambda: (case["x"], case["index"], *(case[n] for n in names[1:]))  # noqa: E731
    dropless_moe(*args()).sum().backward()
    full = {n: case[n].grad.clone() for n in names}
    for n in names:
        case[n].grad = None
    case[frozen].requires_grad_(False)
    dropless_moe(*args()).sum().backward()
    assert case[frozen].grad is None
    assert all(torch.equal(full[n], case[n].grad) for n in names if n != frozen)


@pytest.mark.skipif(INTERPRETED, reason="the reference only")
def test_the_reference_passes_gradcheck_in_float64() -> None:
    case = make(5, 4, 3, 4, 2, torch.float64)
    leaves = [case[n] for n in ("x", "weight", "w1", "v1", "w2")]
    assert torch.autograd.gradcheck(lambda x, g, *w: dropless_moe(x, case["index"], g, *w), leaves)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("x_TD", torch.randn(2, 3, 16)),
        ("x_TD", torch.zeros(6, 16, dtype=torch.int64)),
        ("expert_index_TK", torch.zeros(6, 2)),
        ("expert_index_TK", torch.zeros(5, 2, dtype=torch.int64)),
        ("expert_index_TK", torch.zeros(6, 0, dtype=torch.int64)),
        ("expert_weight_TK", torch.rand(6, 3)),
        ("expert_weight_TK", torch.rand(6, 2, dtype=torch.float64)),
        ("w1_EFD", torch.randn(4, 32)),
        ("w1_EFD", torch.randn(4, 32, 17)),
        ("w1_EFD", torch.randn(0, 32, 16)),
        ("v1_EFD", torch.randn(4, 31, 16)),
        ("v1_EFD", torch.randn(4, 32, 16, device="meta")),
        ("w2_EFD", torch.randn(4, 32, 16).half()),
        ("w2_EFD", torch.randn(4, 16, 32)),
        ("activation", "relu"),
    ],
    ids=lambda v: v if isinstance(v, str) else f"{list(v.shape)} {v.dtype}",
)
def test_a_wrong_argument_is_named(name: str, value: Any) -> None:
    case = make(6, 16, 32, 4, 2, torch.float32)
    arguments: dict[str, Any] = {
        "x_TD": case["x"], "expert_index_TK": case["index"], "expert_weight_TK": case["weight"],
        "w1_EFD": case["w1"], "v1_EFD": case["v1"], "w2_EFD": case["w2"], "activation": "silu",
    }  # fmt: skip
    with pytest.raises(ValueError, match=name):
        dropless_moe(**{**arguments, name: value})


def test_more_choices_than_experts_are_refused() -> None:
    case = make(6, 16, 32, 4, 4, torch.float32)
    index, weight = torch.zeros(6, 5, dtype=torch.int64), torch.rand(6, 5)
    with pytest.raises(ValueError, match=r"expert_index_TK .*K=5"):
        dropless_moe(case["x"], index, weight, case["w1"], case["v1"], case["w2"])


@pytest.mark.parametrize("device", DEVICES)
def test_debug_names_an_index_out_of_range(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAKEMOE_DEBUG", "1")
    case = make(6, 16, 32, 4, 2, torch.float32, device)
    case["index"][3, 1] = 4
    with pytest.raises(ValueError, match="expert_index_TK"):
        dropless_moe(*case.values())


@pytest.mark.skipif(INTERPRETED, reason="one run is enough")
def test_the_module_imports_and_runs_where_triton_is_missing() -> None:
    program = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch; from kernels.moe import dropless_moe\n"
        "w = torch.ones(2, 16, 16); i = torch.zeros(3, 1, dtype=torch.int64)\n"
        "assert dropless_moe(torch.ones(3, 16), i, torch.ones(3, 1), w, w, w).isfinite().all()\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=300)


@pytest.mark.parametrize("device", DEVICES)
def test_the_operators_pass_opcheck(device: str) -> None:
    if device == "cpu" and not INTERPRETED:
        pytest.skip("the operators belong to the Triton path")
    from kernels import moe

    for gate in (True, False):
        case = make(6, 16, 32, 4, 2, torch.float32, device, gate=gate)
        arguments = (case["x"], case["weight"], case["w1"], case["v1"], case["w2"], *route(case["index"], 4), "silu")
        # y alone is differentiated: the pre-activations are for backward and have no gradient of their own.
        utils = ("test_schema", "test_autograd_registration", "test_faketensor")
        torch.library.opcheck(moe._forward, arguments, test_utils=utils)
        _, h, u = moe._forward(*arguments)
        detached = [a.detach() if isinstance(a, Tensor) else a for a in arguments]
        needs = [True, True, True, gate, True]
        backward = (torch.ones(6, 16, device=device), *detached[:5], h.detach(), u.detach(), *detached[5:], needs)
        torch.library.opcheck(moe._backward, backward, test_utils=("test_schema", "test_faketensor"))


# T, D, F, E, K: few rows an expert, and enough to fill the tiles of a GPU that has products of its own.
LOADS = [(64, 64, 128, 8, 2), (2048, 256, 640, 8, 2)]


@pytest.mark.parametrize("device", [CUDA])
@pytest.mark.parametrize("size", LOADS, ids=str)
def test_it_compiles_whole_and_runs_in_a_cuda_graph(device: str, size: tuple[int, ...]) -> None:
    T, _, _, E, K = size
    case = make(*size, torch.bfloat16, device)
    args = [case["x"], case["index"], case["weight"], case["w1"], case["v1"], case["w2"]]
    leaves = [a for a in args if a.requires_grad]

    # No graph of autograd outlives a step: its leaves would tie the capture to the stream that they were made on.
    def step(layer: Any = dropless_moe) -> list[Tensor]:
        y = layer(*args)
        return [y.detach(), *torch.autograd.grad(y.sum(), leaves)]

    expected = step()
    compiled = step(torch.compile(dropless_moe, fullgraph=True))
    assert all(torch.equal(a, b) for a, b in zip(expected, compiled, strict=True))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # a copy to the host or a synchronisation would fail the capture
        captured = step()
    with torch.no_grad():
        case["index"].copy_(torch.rand(T, E, device=device).argsort(1)[:, :K])  # other experts, the same graph
    for _ in range(3):
        graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(step(), captured, strict=True))


@pytest.mark.parametrize("device", [CUDA])
@pytest.mark.parametrize("size", LOADS, ids=str)
def test_nothing_waits_for_the_device(device: str, size: tuple[int, ...]) -> None:
    case = make(*size, torch.bfloat16, device)
    args = [case["x"], case["index"], case["weight"], case["w1"], case["v1"], case["w2"]]
    dropless_moe(*args).sum().backward()  # compiles the kernels, which may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        dropless_moe(*args).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
