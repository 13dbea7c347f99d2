"""The router's weights, the mixture and the gate's target, against numbers worked out by hand."""

import math

import pytest
import torch
from conftest import unit

from router import Router, gate_target, mixed_logits


@pytest.mark.parametrize("top_k, shares", [(2, [0, 3, 5]), (3, [1, 3, 5])])
def test_softmax_runs_over_the_top_k_alone(top_k, shares):
    """With K = G it is the plain softmax."""
    router = Router(4, 3, top_k)
    router.gate.weight.data.zero_()  # every image gets the same scores
    router.gate.bias.data = torch.tensor([1.0, 3.0, 5.0]).log()
    _, weights = router(unit(6, 4))
    assert torch.allclose(weights, (torch.tensor(shares) / sum(shares)).expand(6, 3))


def test_averaging_features_equals_averaging_logits():
    f, t, weights = unit(5, 16), unit(6, 7, 16), unit(5, 6).abs()
    mixed = torch.einsum("bg,gcd->bcd", weights, t)  # mixed_logits never builds these features
    expected = 100 * torch.einsum("bd,bcd->bc", f, mixed)
    assert torch.allclose(mixed_logits(f, t, weights, 100.0), expected, atol=1e-4)


def test_the_average_is_not_normalised_again():
    f = torch.tensor([[1.0, 0.0]])
    t = torch.tensor([[[0.6, 0.8]], [[0.6, -0.8]]])  # two prompts that disagree about a class
    logits = mixed_logits(f, t, torch.tensor([[0.5, 0.5]]), 100.0)
    assert torch.allclose(logits, torch.tensor([[60.0]]))  # normalised again it would be 100


def test_the_gate_target_depends_on_the_images_own_class_alone():
    f = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    # Prompt 0 knows class 0, prompt 1 knows class 1.
    p = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[0.0, 1.0], [1.0, 0.0]]])
    target = gate_target(f, p, torch.tensor([0, 1]), top_k=1)
    high = 1 / (1 + math.exp(-11.0))  # similarity 1 + 10 against 0
    assert torch.allclose(target, torch.tensor([[high, 1 - high], [1 - high, high]]))
