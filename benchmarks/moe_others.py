"""Other systems' mixture-of-experts layers behind the benchmark's call, where they can be imported; none is required.

    megablocks    its grouped path: ops.sort, gather and scatter around the memory-optimised grouped GLU
    scattermoe    parallel_linear, gate and up projection in one matrix as its GLUMLP has them
    sonicmoe      moe_general_routing_inputs, gate and up rows interleaved as its kernels want them

Their interfaces change between versions. One that fails is reported by the benchmark and left out, and none is timed
before its results are checked.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.moe_peers import Contestant


def _megablocks() -> Contestant:
    ops = importlib.import_module("megablocks.ops")
    glu = importlib.import_module("megablocks.layers.glu").memory_optimized_grouped_glu

    def experts(x: Tensor, index: Tensor, weight: Tensor, w1: Tensor, v1: Tensor, w2: Tensor) -> Tensor:
        E, K = w1.shape[0], index.shape[1]
        expert_N = index.reshape(-1).int()
        bin_ids, indices = ops.sort(expert_N, max(1, (E - 1).bit_length()))
        tokens_per_expert = ops.histogram(expert_N, E)
        bins = ops.inclusive_cumsum(tokens_per_expert, 0)
        x_ND = ops.gather(x, indices, bin_ids, bins, K)
        out_ND = glu(x_ND, w1, v1, w2, tokens_per_expert.cpu().to(torch.long), F.silu)
        y: Tensor = ops.scatter(out_ND, indices, bin_ids, weight.reshape(-1).to(x.dtype), bins, K)
        return y

    return Contestant(name="megablocks", experts=experts)


def _scattermoe() -> Contestant:
    module = importlib.import_module("scattermoe.parallel_experts")

    def experts(x: Tensor, index: Tensor, weight: Tensor, up: Tensor, w2: Tensor) -> Tensor:
        K = index.shape[1]
        expert, order, offsets = module.flatten_sort_count(index, num_experts=up.shape[0])
        both = module.parallel_linear(x, up.permute(0, 2, 1), K, expert, order, offsets, grouped_out=True)
        h, u = both.chunk(2, dim=-1)
        y: Tensor = module.parallel_linear(
            F.silu(h) * u, w2, 1, expert, order, offsets, grouped_in=True, gates=weight.to(x.dtype)
        )
        return y

    def gradients(found: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return (*found[0].chunk(2, dim=1), found[1])

    return Contestant(
        name="scattermoe",
        experts=experts,
        prepare=lambda w1, v1, w2: (torch.cat([w1, v1], 1), w2),
        gradients=gradients,
    )


def _sonicmoe() -> Contestant:
    layer = importlib.import_module("sonicmoe.functional").moe_general_routing_inputs
    swiglu = importlib.import_module("sonicmoe.enums").ActivationType.SWIGLU

    def experts(x: Tensor, index: Tensor, weight: Tensor, up: Tensor, down: Tensor) -> Tensor:
        T, K = index.shape
        token = torch.arange(T, device=x.device, dtype=torch.int32).repeat_interleave(K, output_size=T * K)
        y: Tensor = layer(
            x, weight.reshape(-1), token, index.reshape(-1).int(),
            up.permute(1, 2, 0), None, down.permute(1, 2, 0), None,
            up.shape[0], torch.cuda.current_stream().cuda_stream, swiglu,
        )[0]  # fmt: skip
        return y

    def prepare(w1: Tensor, v1: Tensor, w2: Tensor) -> tuple[Tensor, ...]:
        return torch.stack([w1, v1], 2).flatten(1, 2), w2.transpose(1, 2).contiguous()

    def gradients(found: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return found[0][:, 0::2], found[0][:, 1::2], found[1].transpose(1, 2)

    return Contestant(name="sonicmoe", experts=experts, prepare=prepare, gradients=gradients)


def importable() -> dict[str, Contestant]:
    """Those whose modules import here."""
    found: dict[str, Contestant] = {}
    makers: tuple[Callable[[], Contestant], ...] = (_megablocks, _scattermoe, _sonicmoe)
    for make in makers:
        try:
            contestant = make()
        except Exception:  # a package that is missing or does not fit this torch is simply not there
            continue
        found[contestant.name] = contestant
    return found
