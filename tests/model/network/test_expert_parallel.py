"""Experts on several ranks give what the layer gives where all are, and its gradients; also on two GPUs."""

from __future__ import annotations

import pytest
import torch

from tests.model.ranks import run_ranks

# One rank: its own tokens, its share of the experts. Every rank draws all of it, so that each can compute the whole.
PROGRAM = """
import os, sys, torch
from torch import distributed as dist
from torch.utils.checkpoint import checkpoint
from kernels.moe import dropless_moe
from model.network.expert_parallel import expert_parallel_moe

device = torch.device(sys.argv[1], int(os.environ["RANK"]) if sys.argv[1] == "cuda" else None)
dtype = torch.bfloat16 if device.type == "cuda" else torch.float64
if device.type == "cuda":
    torch.cuda.set_device(device)
dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
rank, size = dist.get_rank(), dist.get_world_size()
D, F, E, K = (256, 128, 8, 2) if device.type == "cuda" else (6, 5, 8, 2)
big = 600 if device.type == "cuda" else 1
for chunks in (1, 2, 3):
    for recompute in (False, True):
        for trial, counts in enumerate(((5, 5), (1, 7), (0, 3), (4, 2))):
            generator = torch.Generator().manual_seed(trial)
            def draw(*shape):
                return (torch.randn(*shape, generator=generator) / shape[-1] ** 0.5).to(device, dtype)
            weights = [draw(E, F, D) for _ in range(3)]
            tokens = [draw(big * counts[r % 2], D) for r in range(size)]
            # Some experts get no token at all.
            scores = [torch.rand(len(x), E - trial, generator=generator).to(device) for x in tokens]
            grads = [draw(len(x), D) for x in tokens]
            chosen = [s.topk(K, dim=1) for s in scores]
            here = [w.chunk(size)[rank].clone().requires_grad_() for w in weights]
            x, (weight, index) = tokens[rank].requires_grad_(), chosen[rank]
            weight = weight.clone().requires_grad_()
            junk = [torch.full((big, D), float("nan"), device=device) for _ in range(8)]  # memory that was used
            del junk
            call = lambda x, weight: expert_parallel_moe(x, index, weight, *here, "silu", dist.group.WORLD, chunks)
            y = checkpoint(call, x, weight, use_reentrant=False) if recompute else call(x, weight)
            y.backward(grads[rank])

            whole = [w.requires_grad_() for w in weights]
            # The whole batch, so that the experts' gradients are all ranks'.
            xs = torch.cat([t.detach() for t in tokens]).requires_grad_()
            ws = torch.cat([c.values for c in chosen]).detach().requires_grad_()
            ys = dropless_moe(xs, torch.cat([c.indices for c in chosen]), ws, *whole, activation="silu")
            ys.backward(torch.cat(grads))
            begin = sum(len(t) for t in tokens[:rank])
            mine = slice(begin, begin + len(x))
            exact = {"atol": 1e-6, "rtol": 1e-5} if dtype == torch.float64 else {"atol": 3e-2, "rtol": 3e-2}
            torch.testing.assert_close(y, ys[mine], **exact)
            torch.testing.assert_close(x.grad, xs.grad[mine], **exact)
            torch.testing.assert_close(weight.grad, ws.grad[mine], **exact)
            for part, all_of_it in zip(here, whole, strict=True):
                torch.testing.assert_close(part.grad, all_of_it.grad.chunk(size)[rank], **exact)
dist.destroy_process_group()
"""


@pytest.mark.parametrize(
    ("device", "size"),
    [
        ("cpu", 2),
        ("cpu", 4),
        pytest.param("cuda", 2, marks=pytest.mark.skipif(torch.cuda.device_count() < 2, reason="no two CUDA devices")),
    ],
)
def test_results_and_gradients_are_the_whole_layers(device: str, size: int) -> None:
    run_ranks(size, PROGRAM, device)
