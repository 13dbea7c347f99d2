"""The gate, its top K, its target, and the mixture."""

import math

import pytest
import torch
from conftest import unit

from router import Router, gate_target, mixed_logits


def router_that_says(logits, top_k):
    """A router that scores every image alike."""
    router = Router(4, len(logits), top_k)
    router.gate.weight.data.zero_()
    router.gate.bias.data = torch.tensor(logits)
    return router


@pytest.mark.parametrize("top_k, shares", [(1, [0, 0, 5]), (2, [0, 3, 5]), (3, [1, 3, 5])])
def test_softmax_runs_over_the_top_k_alone(top_k, shares):
    gate_logits, weights = router_that_says([0.0, math.log(3), math.log(5)], top_k)(unit(6, 4))
    assert torch.allclose(gate_logits.exp(), torch.tensor([1.0, 3.0, 5.0]).expand(6, 3))
    assert torch.allclose(weights, (torch.tensor(shares) / sum(shares)).expand(6, 3))


@pytest.mark.parametrize("shape", [(6, 7, 16), (5, 6, 7, 16)])  # of all images, or of each
def test_averaging_features_equals_averaging_logits(shape):
    f, weights, t = unit(5, 16), unit(5, 6).abs(), unit(*shape)
    mixed = torch.einsum("bg,bgcd->bcd", weights, t.expand(5, 6, 7, 16))  # is never built
    expected = 100 * torch.einsum("bd,bcd->bc", f, mixed)
    assert torch.allclose(mixed_logits(f, t, weights, 100.0), expected, atol=1e-4)


def test_the_average_is_not_normalised_again():
    f = torch.tensor([[1.0, 0.0]])
    t = torch.tensor([[[0.6, 0.8]], [[0.6, -0.8]]])  # two prompts at odds about one class
    logits = mixed_logits(f, t, torch.tensor([[0.5, 0.5]]), 100.0)
    assert torch.allclose(logits, torch.tensor([[60.0]]))  # normalised again it would be 100


def test_the_gate_target_looks_at_the_images_own_class_alone():
    f = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    # Prompt 0 knows class 0, prompt 1 knows class 1.
    p = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[0.0, 1.0], [1.0, 0.0]]])
    target = gate_target(f, p, torch.tensor([0, 1]), top_k=1)
    high = 1 / (1 + math.exp(-11.0))  # similarity 1 + 10 against 0
    assert torch.allclose(target, torch.tensor([[high, 1 - high], [1 - high, high]]))


@pytest.mark.parametrize("top_k, lifted", [(1, [0.6, 10.8, 0.0]), (2, [10.6, 10.8, 0.0])])
def test_the_gate_target_lifts_the_k_best_by_ten(top_k, lifted):
    f = torch.tensor([[1.0, 0.0]])
    p = torch.tensor([[[0.6, 0.8]], [[0.8, 0.6]], [[0.0, 1.0]]])
    target = gate_target(f, p, torch.tensor([0]), top_k)
    assert torch.allclose(target, torch.tensor([lifted]).softmax(dim=-1))
