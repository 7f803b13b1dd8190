"""Time tile sizes of the mixture's products and print the best for each shape: the source of kernels/tiles.py.

Beside them, on a Hopper GPU, stand the same products of kernels/hopper.py, with sorted copies and gathering.

Every candidate is compiled once, in parallel, on a small problem on which its result is checked; those that do not
compile or are wrong are named and left out. Then each is timed at each shape.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kernels.portable import Halves, Portable, Tokens
from kernels.routing import route
from kernels.tiles import Tile, tiles

SHAPES = {  # T, D, F, E, K
    "dbrx": (8192, 6144, 10752, 16, 4),
    "mixtral": (16384, 4096, 14336, 8, 2),
    "olmoe": (32768, 2048, 1024, 64, 8),
    "qwen3moe": (32768, 2048, 768, 128, 8),
    "30b": (32768, 4096, 1024, 128, 8),
    "7b": (32768, 1536, 256, 128, 8),
}
SMALL = (512, 512, 512, 4, 2)
PRODUCTS = ("up", "down", "down_backward", "to_x", "to_weights_up", "to_weights_down")


def candidates(name: str) -> list[Tile]:
    two: dict[str, Any] = {"flatten": False, "programs": 2}
    out: list[Tile] = []
    copies = (False,) if name in ("down", "to_x") else (False, True)
    for copy in copies:
        out += [Tile(128, 256, 64, 8, s, copy=copy) for s in (3, 4)]
        out += [Tile(128, 256, 64, 8, 3, copy=copy, flatten=False), Tile(128, 128, 64, 4, 3, copy=copy, **two)]
        if copy or len(copies) == 1:
            out += [Tile(128, 256, 64, 8, 3, group=16, copy=copy)]
        if name.startswith("to_weights"):
            out += [Tile(256, 128, 64, 8, 3, copy=copy)]
        else:
            out += [Tile(128, 128, 64, 8, 4, copy=copy)]
    return out


class Problem:
    """The inputs of a layer and of each product, and the products by name."""

    def __init__(self, T: int, D: int, F: int, E: int, K: int) -> None:
        g = torch.Generator("cuda").manual_seed(0)

        def normal(*size: int, scale: float = 1.0) -> Tensor:
            return torch.randn(*size, generator=g, device="cuda", dtype=torch.bfloat16) * scale

        self.index = torch.randn(T, E, generator=g, device="cuda").topk(K).indices
        self.routing = route(self.index, E)
        self.x, self.dy = normal(T, D), normal(T, D)
        self.w1, self.v1, self.w2 = (normal(E, F, D, scale=s) for s in (D**-0.5, D**-0.5, F**-0.5))
        N = T * K
        self.h, self.a = normal(2, N, F), normal(N, F)
        self.c, self.c3 = torch.empty_like(self.h), torch.empty_like(self.a)
        self.out = torch.empty(N, D, device="cuda", dtype=torch.bfloat16)
        self.weight = torch.rand(T, K, generator=g, device="cuda")
        self.K, self.F, self.D, self.N, self.E = K, F, D, N, E
        self.layer = Portable(self.routing, K, tiles(D, F, 128, 2, True, E))
        self.copies = {id(t): self.layer.tokens(t).sorted() for t in (self.x, self.dy)}
        self.flops = {"up": 4, "down": 2, "down_backward": 2, "to_x": 4, "to_weights_up": 4, "to_weights_down": 2}

    def tokens(self, x: Tensor) -> Tokens:
        """Tokens whose sorted copy is made already: it is timed by itself."""
        tokens = self.layer.tokens(x)
        tokens._sorted = self.copies[id(x)]
        return tokens

    def run(self, name: str, tile: Tile) -> tuple[Tensor, ...]:
        layer = self.layer

        def rows(x: Tensor) -> Tensor | Tokens:
            return self.tokens(x).sorted() if tile.copy else self.tokens(x)

        if name == "up":
            layer._rows(tile, rows(self.x), Halves(self.w1, self.v1), self.c[0], activation="silu", c2=self.c[1],
                        c3=self.c3)  # fmt: skip
            return self.c[0], self.c[1], self.c3
        if name == "down":
            layer._rows(tile, self.a, Halves(self.w2), self.out, by_depth=True)
            return (self.out,)
        if name == "down_backward":
            layer._rows(tile, rows(self.dy), Halves(self.w2), self.c[0])
            return (self.c[0],)
        if name == "to_x":
            layer._rows(tile, self.h, Halves(self.w1, self.v1), self.out, by_depth=True)
            return (self.out,)
        if name == "to_weights_up":
            return tuple(layer._to_weights(tile, self.h, self.tokens(self.x), self.E))
        return tuple(layer._to_weights(tile, self.a[None], self.tokens(self.dy), self.E))

    def run_hopper(self, name: str, gather: bool) -> tuple[Tensor, ...]:
        from kernels import hopper_layer

        below = (1 << 30) if gather else 0
        hopper_layer._GATHER_UP_BELOW = hopper_layer._GATHER_BACKWARD_BELOW = below
        layer = hopper_layer.Hopper(self.routing, self.K, self.layer.tiles, self.x.device)
        if name == "up":
            h, u, a = layer.up(self.tokens(self.x), self.w1, self.v1, "silu")
            assert u is not None
            return h, u, a
        if name == "down":
            return (layer.down(self.a, self.w2),)
        if name == "down_backward":
            layer._gradient_of_a(self.tokens(self.dy), self.w2, self.c[0])
            return (self.c[0],)
        if name == "to_x":
            return (layer.to_x(self.h, self.w1, self.v1),)
        if name == "to_weights_up":
            return tuple(layer.to_up(self.h, self.tokens(self.x), self.E))
        return (layer.to_down(self.a, self.tokens(self.dy), self.E),)

    def truth(self, name: str) -> tuple[Tensor, ...]:
        """The same in float32, expert by expert."""
        token, offsets = self.routing.token.long(), self.routing.offsets.tolist()
        x, dy = self.x.float()[token], self.dy.float()[token]
        spans = list(pairwise(offsets))

        def per(product: Callable[[slice, int], Tensor]) -> Tensor:
            return torch.cat([product(slice(b, e), i) for i, (b, e) in enumerate(spans)])

        w1, v1, w2, h, u, a = (t.float() for t in (self.w1, self.v1, self.w2, *self.h, self.a))
        if name == "up":
            p, q = per(lambda r, i: x[r] @ w1[i].T), per(lambda r, i: x[r] @ v1[i].T)
            return p, q, torch.nn.functional.silu(p) * q
        if name == "down":
            return (per(lambda r, i: a[r] @ w2[i]),)
        if name == "down_backward":
            return (per(lambda r, i: dy[r] @ w2[i].T),)
        if name == "to_x":
            return (per(lambda r, i: h[r] @ w1[i] + u[r] @ v1[i]),)

        def outer(left: Tensor, right: Tensor) -> Tensor:
            return torch.stack([left[b:e].T @ right[b:e] for b, e in spans])

        if name == "to_weights_up":
            return outer(h, x), outer(u, x)
        return (outer(a, dy),)

    def library(self, name: str) -> Callable[[], object]:
        """cuBLAS's dense product of as many multiply-adds, of the same layouts."""
        N, D, F = self.N, self.D, self.F
        rows = torch.empty(N, D, device="cuda", dtype=torch.bfloat16).normal_()
        wide = torch.empty(N, F, device="cuda", dtype=torch.bfloat16).normal_()
        w = self.w1[0]
        return {
            "up": lambda: (rows @ w.T, rows @ w.T), "down": lambda: wide @ w, "down_backward": lambda: rows @ w.T,
            "to_x": lambda: (wide @ w, wide @ w), "to_weights_up": lambda: (wide.T @ rows, wide.T @ rows),
            "to_weights_down": lambda: wide.T @ rows,
        }[name]  # fmt: skip


def check(job: tuple[str, Tile]) -> tuple[str, Tile, str]:
    """Compile and run a candidate on the small problem: nothing, or what is wrong with it."""
    name, tile = job
    torch.cuda.set_per_process_memory_fraction(0.05)
    try:
        problem = Problem(*SMALL)
        for ours, truth in zip(problem.run(name, tile), problem.truth(name), strict=True):
            error = ((ours.float() - truth).abs().max() / truth.abs().max()).item()
            if not error < 0.02:
                return name, tile, f"wrong: {error:.3g}"
        torch.cuda.synchronize()
    except Exception as error:
        return name, tile, (str(error).strip() or type(error).__name__).splitlines()[-1][:160]
    return name, tile, ""


def timed(function: Callable[[], object], repeats: int) -> float:
    """Median milliseconds."""
    function()
    function()
    torch.cuda.synchronize()
    marks = [
        (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))  # type: ignore[no-untyped-call]
        for _ in range(repeats)
    ]
    for first, last in marks:
        first.record()
        function()
        last.record()
    torch.cuda.synchronize()
    return float(sorted(first.elapsed_time(last) for first, last in marks)[repeats // 2])


def copied(problem: Problem) -> Tensor:
    return problem.layer.tokens(problem.x).sorted()


def label(tile: Tile) -> str:
    flags = "".join(f for f, on in (("F", tile.flatten), ("C", tile.copy)) if on)
    return (
        f"{tile.rows}x{tile.columns}x{tile.depth} w{tile.warps} s{tile.stages} p{tile.programs} g{tile.group} {flags}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--products", default=",".join(PRODUCTS))
    parser.add_argument("--best", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=480)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    start = time.monotonic()
    products = arguments.products.split(",")
    jobs = [(name, tile) for name in products for tile in candidates(name)]
    good: dict[str, list[Tile]] = {name: [] for name in products}
    with multiprocessing.get_context("spawn").Pool(min(14, os.cpu_count() or 1)) as pool:
        for name, tile, fault in pool.imap_unordered(check, jobs):
            if fault:
                print(f"{name:<16} {label(tile):<32} {fault}", flush=True)
            else:
                good[name].append(tile)
    print(
        f"{torch.cuda.get_device_name()}; {len(jobs)} candidates compiled in {time.monotonic() - start:.0f} s",
        flush=True,
    )
    records = []
    for shape in arguments.shapes.split(","):
        torch.cuda.empty_cache()
        problem = Problem(*SHAPES[shape])
        _, D, F, E, _ = SHAPES[shape]
        for name in products:
            if time.monotonic() - start > arguments.seconds:
                print("out of time", flush=True)
                break
            flops = problem.flops[name] * problem.N * D * F
            dense = flops / timed(problem.library(name), 10) / 1e9
            found = []
            for tile in good[name]:
                try:
                    found.append((flops / timed(partial(problem.run, name, tile), 10) / 1e9, tile))
                except Exception as error:
                    print(shape, name, label(tile), str(error).splitlines()[0][:100], flush=True)
            found.sort(key=lambda pair: -pair[0])
            records += [{"shape": shape, "product": name, "tflops": v, "tile": asdict(t)} for v, t in found]
            hopper = []
            if torch.cuda.get_device_capability() == (9, 0):
                for gather in (False, True):
                    speed = flops / timed(partial(problem.run_hopper, name, gather), 10) / 1e9
                    hopper.append(f"{speed:.0f}{' gathering' if gather else ''}")
            text = "; ".join(f"{v:.0f} {label(t)}" for v, t in found[: arguments.best])
            print(f"{shape:<9}{name:<16} cuBLAS {dense:.0f} | hopper.py {', '.join(hopper)} | {text}", flush=True)
        layer = problem.layer
        rest: dict[str, Callable[[], object]] = {
            "route": partial(route, problem.index, E),
            "copy": partial(copied, problem),
            "down_backward and activation": partial(
                layer.through,
                problem.tokens(problem.dy),
                problem.w2,
                problem.h[0],
                problem.h[1],
                problem.weight,
                "silu",
            ),
            "combine": partial(layer.combined, problem.out, problem.weight),
        }
        print(shape, *(f"{name} {timed(f, 10):.3f} ms" for name, f in rest.items()), flush=True)
        del rest
        torch.cuda.empty_cache()
    if arguments.out:
        (arguments.out / "tune.json").write_text(json.dumps(records))


if __name__ == "__main__":
    main()
