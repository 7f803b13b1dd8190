"""Compiles the products for Hopper down to machine code where no GPU is, and prints each one's shared memory in bytes.

Ends with an error where another number of tokens compiles anything again.

A driver that only names its target stands in for the GPU's, and the launchers compile instead of launching.
"""

from __future__ import annotations

from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver


class Target:
    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


driver.set_active(Target())  # type: ignore[no-untyped-call]

from kernels import hopper, hopper_launch, hopper_layer, hopper_sparse, hopper_weights, portable, routing, sorting  # noqa: E402
from kernels.portable import Tokens  # noqa: E402
from kernels.routing import route  # noqa: E402
from kernels.tiles import tiles  # noqa: E402
from kernels.topology import Topology  # noqa: E402

COMPILED: dict[str, str] = {}


class Compiled:
    """A kernel that is compiled where it would be launched."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*arguments: Any, **options: Any) -> None:
            made = self.kernel.warmup(*arguments, grid=grid, **options)
            assert made.asm["cubin"]
            if made.hash not in COMPILED:
                print(made.metadata.shared)
            COMPILED[made.hash] = self.kernel.__name__

        return launch


class Sorted(Tokens):
    """Rows whose sorted copy is not computed."""

    def sorted(self) -> torch.Tensor:
        return self.x.new_empty(self._routing.order.shape[0], self.x.shape[1])


hopper_layer.rows_kernel = Compiled(hopper.rows_kernel)
hopper_layer.weights_kernel = Compiled(hopper_weights.weights_kernel)
hopper_launch.multiprocessors = lambda _: 132  # type: ignore[assignment]
hopper_sparse.sdd_kernel = Compiled(hopper_sparse.sdd_kernel)
hopper_sparse.product_kernel = Compiled(hopper_sparse.product_kernel)


def compile_layer(T: int, D: int, F: int, gated: bool, activation: str, dtype: torch.dtype) -> None:
    E, K = 4, 2
    sorted_by = route(torch.zeros(T, K, dtype=torch.int64), E)
    products = hopper_layer.Hopper(sorted_by, K, tiles(D, F, 128, 2, gated, E), torch.device("cpu"))
    x = Sorted(torch.empty(T, D, dtype=dtype), sorted_by)
    w = torch.empty(E, F, D, dtype=dtype)
    dhu = torch.empty(2 if gated else 1, T * K, F, dtype=dtype)
    h, _, a = products.up(x, w, w if gated else None, activation)
    products._gradient_of_a(x, w, h)
    products.to_up(dhu, x, E)
    if gated:
        products.down(a, w)
        products.to_x(dhu, w, w)


compile_layer(512, 512, 2048, True, "silu", torch.bfloat16)  # sorted copies
compile_layer(512, 528, 272, False, "gelu", torch.float16)  # gathered tokens, uneven sizes


def compile_sparse(dtype: torch.dtype) -> None:
    for rows, columns in ((3, 2), (2, 3)):  # pairs that share a column, and a row
        topology = Topology.from_mask(torch.ones(rows, columns, dtype=torch.bool), 128)
        values = torch.empty(topology.entries, 128, 128, dtype=dtype)
        (M, N), K = topology.shape, 264
        for turned in (False, True):
            a = torch.empty(*((K, M) if turned else (M, K)), dtype=dtype)
            b = torch.empty(*((K, N) if turned else (N, K)), dtype=dtype)
            hopper_sparse.sdd(values, a, turned, b, not turned, topology)
            hopper_sparse.sdd(values, a, turned, b.view(b.shape[::-1]), turned, topology)
    for transposed in (False, True):
        for turned in (False, True):
            for left in (False, True):
                kept, summed = topology.shape[:: -1 if transposed == left else 1]
                dense = torch.empty(*((summed, K) if turned != left else (K, summed)), dtype=dtype)
                out = torch.empty(*((kept, K) if left else (K, kept)), dtype=dtype)
                hopper_sparse.product(out, values, dense, turned, topology, transposed, left)


compile_sparse(torch.bfloat16)


def compile_all(T: int) -> None:
    """Every kernel of a layer's forward and backward but the products that are compiled above."""
    index, D, F, E = torch.zeros(T, 2, dtype=torch.int64), 512, 2048, 4
    routing._by_triton(index, E, 128)
    compile_layer(T, D, F, True, "silu", torch.bfloat16)
    sorted_by = route(index, E)
    layer = hopper_layer.Hopper(sorted_by, 2, tiles(D, F, 128, 2, True, E), torch.device("cpu"))
    x, w, h = (torch.empty(*size, dtype=torch.bfloat16) for size in ((T, D), (E, F, D), (2 * T, F)))
    layer.through(layer.tokens(x), w, h, h, torch.empty(T, 2), "silu")
    for weight in (None, torch.empty(T, 2)):
        layer.combined(x.new_empty(2 * T, D), weight)


for module, names in (
    (sorting, ("count_kernel", "scan_kernel", "place_kernel")),
    (portable, ("activate_backward_kernel", "combine_kernel", "copy_kernel")),
):
    for name in names:
        setattr(module, name, Compiled(getattr(module, name)))
compile_all(4096)
before = set(COMPILED)
for T in (4095, 1000, 9000):
    compile_all(T)
again = [name for made, name in COMPILED.items() if made not in before]
assert not again, f"compiled again for another number of tokens: {', '.join(again)}"
