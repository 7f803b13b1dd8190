"""What a cluster's GPU and its wires can do, as far as an estimate needs it: every assumption is a field here.

Three kinds of figures: what the vendor states (memory, peak, bandwidths), what was measured on one H200 with the
project's own kernels (kernels/README.md), and what is assumed because nobody measured it here; each field says which.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

GIB = 1024**3
MachineName = Literal["h200", "h100"]


class Machine(BaseModel):
    """One GPU, its node and the network between nodes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(description="what the GPU is called")
    memory: int = Field(gt=0, description="memory that a process can have (bytes; measured: torch's total_memory)")
    peak_flops: float = Field(gt=0, description="dense bf16 (FLOP/s; stated); MFU is taken of it")
    memory_bandwidth: float = Field(gt=0, description="HBM (bytes/s; stated)")
    gpus_per_node: int = Field(8, ge=1, description="GPUs that NVLink joins")
    nvlink: float = Field(450e9, gt=0, description="NVLink, one way, a GPU (bytes/s; stated)")
    network: float = Field(50e9, gt=0, description="between nodes, one way, a GPU (bytes/s; assumed: 400 Gbit/s)")

    overhead: int = Field(
        int(1.5 * GIB), ge=0, description="CUDA context, libraries' workspaces, NCCL's buffers (bytes; assumed)"
    )
    fragmentation: float = Field(
        0.04, ge=0, description="memory that the allocator holds beyond what is in use (fraction of use; assumed)"
    )

    expert_forward: float = Field(
        0.789, gt=0, le=1, description="expert products, forward (fraction of peak; fitted to kernels/README.md)"
    )
    expert_backward: float = Field(
        0.664, gt=0, le=1, description="expert products, backward (fraction of peak; fitted to kernels/README.md)"
    )
    expert_passes_forward: float = Field(
        4.76, ge=0, description="times that the assignments' rows cross memory beside the products (fitted likewise)"
    )
    expert_passes_backward: float = Field(4.40, ge=0, description="the same in backward (fitted likewise)")
    matmul: float = Field(
        0.70, gt=0, le=1, description="projections and head by cuBLAS (fraction of peak; measured: 0.65 to 0.74)"
    )
    attention: float = Field(
        0.40, gt=0, le=1, description="causal attention, forward and backward (fraction of peak; assumed)"
    )
    elementwise: float = Field(
        0.80, gt=0, le=1, description="passes over memory (fraction of memory_bandwidth; assumed)"
    )
    links: float = Field(0.80, gt=0, le=1, description="collectives (fraction of the links' bytes/s; assumed)")
    latency: float = Field(30e-6, ge=0, description="start of a collective (seconds; assumed)")
    latency_node: float = Field(1e-6, ge=0, description="more for each node in it (seconds; assumed)")
    overlap: float = Field(
        0.90,
        ge=0,
        le=1,
        description="part of a block's compute that can hide the gathers and reductions of parameters (assumed); "
        "all-to-all hides behind nothing",
    )
    imbalance: float = Field(
        1.20,
        ge=1,
        description="assignments on the fullest expert rank over the mean (assumed), whose memory and time count",
    )

    def with_network(self, gigabits: float) -> Machine:
        """The same with another network (Gbit/s a GPU)."""
        return self.model_copy(update={"network": gigabits * 1e9 / 8})


MACHINES: dict[MachineName, Machine] = {
    "h200": Machine(name="H200", memory=int(139.8 * GIB), peak_flops=989e12, memory_bandwidth=4.8e12),
    "h100": Machine(name="H100", memory=int(79.1 * GIB), peak_flops=989e12, memory_bandwidth=3.35e12),
}
