"""Experts on several ranks: each token's vector goes to the ranks that hold its experts and the results come back.

    dispatch    assignments sorted by expert, and so by rank; one all-to-all of the counts, one of the vectors
    compute     the layer of kernels/moe.py with one choice a row, over the experts that lie here
    combine     the same all-to-all backwards; each token adds up its K weighted rows

Nothing is dropped or padded: each rank receives as many rows as were sent (GShard's layer, Lepikhin et al. 2021,
without its capacity). The counts of rows must be known to the host, the one copy to it in a layer; torch's
all_to_all_single takes them from there. Backward runs the all-to-alls the other way and needs no copy.

Legend: T tokens, D width, E experts in all, K chosen, F expert width, P ranks of the group, N = T*K, R rows received.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, _functional_collectives

from kernels.moe import dropless_moe
from kernels.routing import route
from model.network.distributed import local_part


@torch.compiler.disable
def expert_parallel_moe(
    x_TD: Tensor,
    expert_index_TK: Tensor,
    expert_weight_TK: Tensor,
    w1: Tensor,
    v1: Tensor,
    w2: Tensor,
    activation: str,
    group: ProcessGroup,
) -> Tensor:
    """What dropless_moe gives where all experts are: [T, D] of this rank's tokens. Every rank of the group calls it.

    w1, v1, w2: this rank's experts, [E / P, F, D] each, plain or the local part of distributed tensors; rank p holds
    the experts p * E / P to (p + 1) * E / P - 1.
    """
    w1, v1, w2 = map(local_part, (w1, v1, w2))
    ranks = group.size()
    here = w1.shape[0]
    T, K = expert_index_TK.shape
    routing = route(expert_index_TK, here * ranks)
    sent_PE = routing.tokens_per_expert.view(ranks, here).to(torch.int64)
    received_PE = _functional_collectives.all_to_all_single(sent_PE, None, None, group)
    # Both at once: the only wait for the device.
    sent, received = torch.stack((sent_PE.sum(1), received_PE.sum(1))).tolist()
    x_ND = x_TD[routing.token]
    x_RD = _functional_collectives.all_to_all_single_autograd(x_ND, received, sent, group)
    # Of each sending rank the rows come sorted by expert.
    expert_R = torch.arange(here, device=x_TD.device).repeat(ranks)
    expert_R = expert_R.repeat_interleave(received_PE.flatten(), output_size=sum(received))
    ones_R = torch.ones(len(expert_R), 1, device=x_TD.device)
    y_RD = dropless_moe(x_RD, expert_R[:, None], ones_R, w1, v1, w2, activation=activation)
    y_ND = _functional_collectives.all_to_all_single_autograd(y_RD, sent, received, group)
    y_TKD = y_ND[routing.inverse].view(T, K, -1)
    # A product, summed in float32 inside and kept for backward in y's dtype.
    return torch.bmm(expert_weight_TK[:, None].to(y_TKD.dtype), y_TKD)[:, 0]
