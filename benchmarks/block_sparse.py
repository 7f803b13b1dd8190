"""sdd, dsd and dds beside cuBLAS on the same useful work, in every transposition, on one GPU.

    python benchmarks/block_sparse.py                                # all settings, products and transpositions
    python benchmarks/block_sparse.py --settings 0.1,0.9 --products dsd
    python benchmarks/block_sparse.py --sweep --settings 0.5         # the portable kernels at other tiles, best first
    python benchmarks/block_sparse.py --device cpu --quick           # tries the script out; no measurement

Settings: random topologies of 8192 x 8192 with blocks of 128 and K = 8192, by their density; and the block diagonals of
MegaBlocks' paper (Gale et al. 2022, MoE-XS, -Small and -Medium: 64 experts, top-1, uniform, tokens x width x expert
width) by name. For a sparse s [M, N] the products are

    sdd    a [M, K] b [K, N]     NN, NT, TN, TT: the layout of a and of b
    dsd    s [M, N] b [N, K]     and s^T [N, M] b [M, K]: whether s is transposed, the layout of b
    dds    a [K, M] s [M, N]     and a [K, N] s^T [N, M]: the layout of a, whether s is transposed

`dense` is the cuBLAS product of the same layouts and about as many multiply-adds: in place of the sparse matrix stands
a dense one with as many entries in a row (of the result, else of the sum) as the sparse has stored on average, rounded
to 128, where cuBLAS is at its best. Rates are by each one's own multiply-adds. Each product is first held to float64
for some of its rows of blocks. MegaBlocks' own kernels (stk) are not here: they refuse this Triton.

Legend: M rows, N columns, K the dense operand's other side; Z blocks.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

from benchmarks import gpu
from benchmarks.gpu import Clock, Spread, errors, judge
from kernels.block_sparse import BlockSparse, dds, dsd, sdd
from kernels.topology import Topology

TARGET = 0.95
PRODUCTS = ("sdd", "dsd", "dds")
LAYOUTS = ("NN", "NT", "TN", "TT")


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A topology of M x N, random of a density or the block diagonal of `experts`, and the dense operands' side K."""

    M: int
    N: int
    K: int
    block: int = 128
    density: float = 0.0
    experts: int = 0

    def topology(self, device: torch.device) -> Topology:
        if self.experts:
            # Whole blocks for every expert, as in the paper: no row is padded.
            rows, columns = (side // self.experts // self.block for side in (self.M, self.N))
            mask = torch.eye(self.experts, dtype=torch.bool, device=device)
            return Topology.from_mask(mask.repeat_interleave(rows, 0).repeat_interleave(columns, 1), self.block)
        g = torch.Generator(device).manual_seed(0)
        grid = (self.M // self.block, self.N // self.block)
        return Topology.from_mask(torch.rand(grid, generator=g, device=device) < self.density, self.block)


SETTINGS = {str(d): Setting(M=8192, N=8192, K=8192, density=d) for d in (0.1, 0.3, 0.5, 0.9)} | {
    "xs": Setting(M=65536, N=64 * 2048, K=512, experts=64),
    "small": Setting(M=32768, N=64 * 3072, K=768, experts=64),
    "medium": Setting(M=8192, N=64 * 4096, K=1024, experts=64),
}
TINY = {
    name: replace(s, M=192, N=128 if s.density else 256, K=48, block=16, experts=4 if s.experts else 0)
    for name, s in SETTINGS.items()
}


@dataclass(frozen=True)
class Product:
    """One product in one transposition: ours, cuBLAS's of as much work, and the multiply-adds of each, twice."""

    ours: Callable[[], Tensor]
    dense: Callable[[], Tensor]
    flops: int
    dense_flops: int
    check: Callable[[Tensor], tuple[dict[str, float], dict[str, float]]]  # errors of ours and of the plain product


def operand(rows: int, columns: int, turned: bool, like: Tensor) -> Tensor:
    """A random matrix, as the view of its transpose if `turned`."""
    shape = (columns, rows) if turned else (rows, columns)
    matrix = torch.randn(*shape, device=like.device, dtype=like.dtype)
    return matrix.t() if turned else matrix


def strips(s: BlockSparse) -> list[tuple[int, Tensor, Tensor]]:
    """Of some rows of blocks: the row's number, its blocks side by side [block, n], and their columns [n]."""
    topology, block = s.topology, s.topology.block
    offsets, indices = topology.row_offsets, topology.column_indices
    values = s.values
    if s.transposed:
        offsets, indices = topology.column_offsets, topology.row_indices_t
    ends = offsets.tolist()
    found = []
    for r in sorted({0, (len(ends) - 1) // 3, (len(ends) - 1) // 2, len(ends) - 2}):
        entries = slice(ends[r], ends[r + 1])
        blocks = values[topology.places_t[entries].long()].transpose(1, 2) if s.transposed else values[entries]
        within = torch.arange(block, device=values.device)
        columns = (indices[entries].long().unsqueeze(1) * block + within).reshape(-1)
        found.append((r, blocks.transpose(0, 1).reshape(block, -1), columns))
    return found


def compare(
    found: Sequence[Tensor], factors: Sequence[tuple[Tensor, Tensor]]
) -> tuple[dict[str, float], dict[str, float]]:
    """Largest errors of these parts of a result, and of the plain products of the factors that they should be."""
    truth = {"result": torch.cat([(a.double() @ b.double()).reshape(-1) for a, b in factors])}
    plain = {"result": torch.cat([(a @ b).reshape(-1) for a, b in factors])}
    return errors({"result": torch.cat([part.reshape(-1) for part in found])}, truth), errors(plain, truth)


def make(kind: str, layout: str, setting: Setting, topology: Topology, dtype: torch.dtype) -> Product:
    """The product's operands and calls; see the module's docstring for what each letter of `layout` says."""
    M, N, K, block = setting.M, setting.N, setting.K, setting.block
    first, second = (letter == "T" for letter in layout)
    like = torch.empty(0, device=topology.row_offsets.device, dtype=dtype)
    stored = topology.entries * block * block
    flops = 2 * stored * K

    def average(side: int) -> int:
        """The stored entries that a row (of `side` rows) has on average, as whole blocks of cuBLAS's."""
        return max(1, round(stored / side / 128)) * 128 if stored / side >= 64 else max(1, round(stored / side))

    if kind == "sdd":
        a_MK, b_KN = operand(M, K, first, like), operand(K, N, second, like)
        dense_KN = operand(K, average(M), second, like)

        def check_blocks(values: Tensor) -> tuple[dict[str, float], dict[str, float]]:
            picked = sorted({n * (topology.entries - 1) // 23 for n in range(24)})
            rows, columns = topology.row_indices.tolist(), topology.column_indices.tolist()
            factors = [(a_MK[rows[i] * block :][:block], b_KN[:, columns[i] * block :][:, :block]) for i in picked]
            return compare([values[i] for i in picked], factors)

        return Product(
            lambda: sdd(a_MK, b_KN, topology).values,
            lambda: a_MK @ dense_KN,
            flops,
            2 * M * K * dense_KN.shape[1],
            check_blocks,
        )
    transposed = first if kind == "dsd" else second
    values = torch.randn(topology.entries, block, block, device=like.device, dtype=dtype)
    s = BlockSparse(values, topology, transposed)
    rows, columns = s.shape
    if kind == "dsd":
        b = operand(columns, K, second, like)
        depth = average(rows)
        dense_s, dense_b = operand(rows, depth, first, like), operand(depth, K, second, like)

        def check_rows(y: Tensor) -> tuple[dict[str, float], dict[str, float]]:
            parts = strips(s)
            return compare([y[r * block :][:block] for r, _, _ in parts], [(strip, b[c]) for _, strip, c in parts])

        return Product(lambda: dsd(s, b), lambda: dense_s @ dense_b, flops, 2 * rows * depth * K, check_rows)
    a = operand(K, rows, first, like)
    depth = average(columns)
    dense_a, dense_s = operand(K, depth, first, like), operand(depth, columns, second, like)

    def check_columns(y: Tensor) -> tuple[dict[str, float], dict[str, float]]:
        parts = strips(s.t())
        return compare([y[:, r * block :][:, :block] for r, _, _ in parts], [(a[:, c], x.t()) for _, x, c in parts])

    return Product(lambda: dds(a, s), lambda: dense_a @ dense_s, flops, 2 * K * depth * columns, check_columns)


def sweep_tiles(kind: str) -> dict[str, Callable[[Callable[[], Tensor]], Tensor]]:
    """Ways to call a product of the portable kernels with other tiles than their own, by name."""
    from kernels import sparse_products
    from kernels.sparse_products import Tile

    table = "sdd" if kind == "sdd" else "product"
    sizes = [(128, 64, 4, 3), (128, 64, 4, 4), (128, 64, 8, 3), (128, 64, 8, 4), (128, 128, 8, 3), (128, 32, 4, 4)]
    if table == "product":
        sizes += [(256, 64, 8, 3), (256, 64, 8, 4), (256, 32, 8, 4), (64, 64, 4, 4)]

    def call(tile: Tile, product: Callable[[], Tensor]) -> Tensor:
        # On Hopper blocks of 128 have kernels of their own, whose tiles are fixed.
        portable = patch.object(sparse_products, "hopper", lambda _: False)
        with portable, patch.dict(sparse_products.TILES, {table: tile}):
            return product()

    return {str(size): partial(call, Tile(*size)) for size in sizes}


def run_product(
    name: str, kind: str, setting: Setting, topology: Topology, clock: Clock, asked: argparse.Namespace
) -> list[dict[str, Any]]:
    """Check, time and print one product in all its transpositions."""
    dtype = getattr(torch, asked.dtype)
    entries: list[dict[str, Any]] = []
    calls: dict[str, Callable[[], object]] = {}
    products: dict[str, Product] = {}
    for layout in asked.layouts:
        product = make(kind, layout, setting, topology, dtype)
        entry: dict[str, Any] = {"setting": name, "product": kind, "layout": layout, **asdict(setting)}
        entry |= {"blocks": topology.entries, "dtype": asked.dtype}
        entries.append(entry)
        checked, why = gpu.attempt(lambda product=product: product.check(product.ours()))  # type: ignore[misc]
        if checked is None:
            entry["status"] = f"failed: {why}"
            continue
        found, plain = checked
        entry |= {"error": found["result"], "plain_error": plain["result"]}
        entry["status"] = "wrong" if judge(found, plain, dtype) else "right"
        if entry["status"] == "right":
            products[layout] = product
            calls |= {f"{layout} dense": product.dense, f"{layout} ours": product.ours}
            if asked.sweep:
                calls |= {f"{layout} {tile}": partial(call, product.ours) for tile, call in sweep_tiles(kind).items()}
    times, failed = gpu.interleave(calls, asked.repeats, clock)
    for entry in entries:
        layout = entry["layout"]
        label = f"  {name:8}{kind:5}{layout:4}"
        for who in ("dense", "ours"):
            if f"{layout} {who}" in failed:
                entry["status"] = f"failed: {failed[f'{layout} {who}']}"
        if entry["status"] != "right":
            print(f"{label}{entry['status']}", flush=True)
            continue
        product = products[layout]
        flops = {"dense": product.dense_flops, "ours": product.flops}
        for who in flops:
            seconds = times[f"{layout} {who}"]
            entry[who] = {
                "seconds": asdict(Spread.of(seconds)),
                "tflops": asdict(Spread.of([flops[who] / s / 1e12 for s in seconds])),
            }
        scale = product.flops / product.dense_flops
        ratio = gpu.ratios([s * scale for s in times[f"{layout} dense"]], times[f"{layout} ours"])
        entry["ratio"] = asdict(ratio)
        rates = [Spread(**entry[who]["tflops"]).show("{:.1f}") for who in flops]
        mark = "" if ratio.median >= TARGET or not clock.cuda else "  MISSED"
        print(f"{label}{rates[0]:>24}{rates[1]:>24}{ratio.show('{:.3f}'):>24}{mark}", flush=True)
        if asked.sweep:
            tiles = {
                tile: product.flops / Spread.of(times[f"{layout} {tile}"]).median / 1e12
                for tile in sweep_tiles(kind)
                if f"{layout} {tile}" in times
            }
            entry["sweep_tflops"] = tiles
            best = sorted(tiles.items(), key=lambda item: -item[1])
            print("      " + ", ".join(f"{tile} {rate:.0f}" for tile, rate in best), flush=True)
    return entries


def arguments() -> argparse.Namespace:
    def words(text: str) -> list[str]:
        return [word for word in text.split(",") if word]

    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--settings", type=words, default=list(SETTINGS), help="names, with commas between")
    parser.add_argument("--products", type=words, default=list(PRODUCTS), help="names, with commas between")
    parser.add_argument("--layouts", type=words, default=list(LAYOUTS), help="names, with commas between")
    parser.add_argument("--repeats", type=int, default=20, help="rounds (count)")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16", help="of all")
    parser.add_argument("--sweep", action="store_true", help="time other tiles too: columns, depth, warps, stages")
    parser.add_argument("--quick", action="store_true", help="three rounds; on a CPU also tiny shapes")
    parser.add_argument("--device", dest="where", choices=("cuda", "cpu"), default="cuda", help="where it runs")
    parser.add_argument("--out", type=Path, default=gpu.OUT, help="folder of the JSON and picture")
    asked = parser.parse_args()
    asked.repeats = min(asked.repeats, 3) if asked.quick else asked.repeats
    for flag, known in (("settings", SETTINGS), ("products", PRODUCTS), ("layouts", LAYOUTS)):
        if unknown := [word for word in getattr(asked, flag) if word not in known]:
            parser.error(f"--{flag}: {', '.join(unknown)} is not known; choose from {', '.join(known)}")
    if asked.repeats < 1:
        parser.error("--repeats must be at least 1")
    return asked


def run(asked: argparse.Namespace) -> int:
    device = gpu.device_of(asked.where, asked.quick)
    if device.type == "cpu":
        print("On a CPU, tiny shapes: this tries the script out; it is NOT A MEASUREMENT.")
    torch.manual_seed(0)
    clock = Clock(device)
    results: list[dict[str, Any]] = []
    report = {"machine": gpu.machine(device), "argv": sys.argv[1:], "results": results}
    print(f"{report['machine']}\n\n  {'':17}{'dense TFLOP/s':>24}{'ours TFLOP/s':>24}{'ratio':>24}")
    for name in asked.settings:
        setting = (SETTINGS if device.type == "cuda" else TINY)[name]
        topology = setting.topology(device)
        for kind in asked.products:
            results += run_product(name, kind, setting, topology, clock, asked)
            path = gpu.write(asked.out, "block_sparse", report)
            gpu.release()
    panels: dict[str, dict[str, dict[str, float]]] = {}
    for entry in results:
        if "ratio" in entry:
            panel = panels.setdefault(entry["product"], {}).setdefault(entry["layout"], {})
            panel[entry["setting"]] = entry["ratio"]["median"]
    picture = gpu.bars(path.with_suffix(".png"), panels, "times cuBLAS") if panels else "No picture: nothing was timed."
    print(f"\nFigures: {path}\n{picture}")
    return 0 if all(entry["status"] == "right" for entry in results) else 1


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="lakemoe-triton-") as cache:
        os.environ.setdefault("TRITON_CACHE_DIR", cache)
        return run(arguments())


if __name__ == "__main__":
    sys.exit(main())
