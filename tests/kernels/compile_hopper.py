"""Compiles the products for Hopper down to machine code where no GPU is, and prints each one's shared memory in bytes.

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

from kernels import hopper, hopper_layer, hopper_weights  # noqa: E402
from kernels.portable import Tokens  # noqa: E402
from kernels.routing import route  # noqa: E402
from kernels.tiles import tiles  # noqa: E402


class Compiled:
    """A kernel that is compiled where it would be launched."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*arguments: Any, **options: Any) -> None:
            made = self.kernel.warmup(*arguments, grid=grid, **options)
            assert made.asm["cubin"]
            print(made.metadata.shared)

        return launch


class Sorted(Tokens):
    """Rows whose sorted copy is not computed."""

    def sorted(self) -> torch.Tensor:
        return self.x.new_empty(self._routing.order.shape[0], self.x.shape[1])


hopper_layer.rows_kernel = Compiled(hopper.rows_kernel)
hopper_layer.weights_kernel = Compiled(hopper_weights.weights_kernel)
hopper_layer.multiprocessors = lambda _: 132  # type: ignore[assignment]


def compile_layer(D: int, F: int, gated: bool, activation: str, dtype: torch.dtype) -> None:
    T, E, K = 512, 4, 2
    routing = route(torch.zeros(T, K, dtype=torch.int64), E)
    products = hopper_layer.Hopper(routing, K, tiles(D, F, 128, 2, gated), torch.device("cpu"))
    x = Sorted(torch.empty(T, D, dtype=dtype), routing, K)
    w = torch.empty(E, F, D, dtype=dtype)
    dhu = torch.empty(2 if gated else 1, T * K, F, dtype=dtype)
    h, _, a = products.up(x, w, w if gated else None, activation)
    products._gradient_of_a(x, w, h)
    products.to_up(dhu, x, E)
    if gated:
        products.down(a, w)
        products.to_x(dhu, w, w)


compile_layer(512, 1024, True, "silu", torch.bfloat16)  # sorted copies
compile_layer(528, 272, False, "gelu", torch.float16)  # gathered tokens, uneven sizes
