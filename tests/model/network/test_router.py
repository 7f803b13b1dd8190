"""The router: weights of the chosen, the auxiliary loss and the load."""

from __future__ import annotations

import pytest
import torch

from model.network.moe import choose


def test_weights_of_the_chosen_by_both_variants() -> None:
    logits = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    probability = logits.softmax(dim=-1)
    plain, normalised = choose(logits, 3, "none"), choose(logits, 3, "l1")
    torch.testing.assert_close(plain.expert_weight_TK, probability.gather(1, plain.expert_index_TK))
    torch.testing.assert_close(normalised.expert_weight_TK.sum(dim=1), torch.ones(50))
    # Softmax, top-k, sum (Mixtral's paper writes top-k, softmax) are the same numbers.
    torch.testing.assert_close(normalised.expert_weight_TK, logits.topk(3).values.softmax(dim=-1))


@pytest.mark.parametrize("chosen", [1, 2, 4])
def test_auxiliary_loss_is_one_when_balanced(chosen: int) -> None:
    experts = 8
    logits = torch.full((experts, experts), -30.0)
    for token in range(experts):
        for k in range(chosen):
            logits[token, (token + k) % experts] = 0.0
    routing = choose(logits, chosen, "l1")
    torch.testing.assert_close(routing.aux_loss, torch.tensor(1.0))
    torch.testing.assert_close(routing.load_E, torch.full((experts,), 1 / experts))


def test_auxiliary_loss_is_the_number_of_experts_when_one_has_all() -> None:
    logits = torch.full((16, 8), -30.0)
    logits[:, 5] = 0.0
    routing = choose(logits, 1, "l1")
    torch.testing.assert_close(routing.aux_loss, torch.tensor(8.0))
    assert routing.load_E.tolist() == [0, 0, 0, 0, 0, 1, 0, 0]


def test_auxiliary_loss_pushes_towards_balance() -> None:
    logits = (torch.randn(64, 4, generator=torch.Generator().manual_seed(1)) + torch.tensor([2.0, 0, 0, 0])).double()
    bias = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    choose(logits + bias, 2, "l1").aux_loss.backward()
    assert bias.grad is not None
    assert bias.grad[0] > 0


def test_transformers_loss_is_the_factor_of_the_docstring() -> None:
    modeling = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    logits = torch.randn(40, 8, generator=torch.Generator().manual_seed(2))
    theirs = modeling.load_balancing_loss_func((logits,), 8, 2)
    torch.testing.assert_close(2 * choose(logits, 2, "l1").aux_loss, theirs)


def test_only_valid_tokens_count_and_none_is_no_error() -> None:
    logits = torch.randn(10, 4, generator=torch.Generator().manual_seed(3))
    valid = torch.arange(10) < 6
    part, alone = choose(logits, 2, "l1", valid), choose(logits[:6], 2, "l1")
    torch.testing.assert_close(part.aux_loss, alone.aux_loss)
    torch.testing.assert_close(part.load_E, alone.load_E)
    assert float(choose(logits, 2, "l1", torch.zeros(10, dtype=torch.bool)).aux_loss) == 0
