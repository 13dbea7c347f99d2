"""The gate, its top K, its target, and the mixture."""

import math

import torch
import torch.nn.functional as F

from router import Router, gate_target, mixed_logits


def unit(*shape, seed=0):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def fixed_router(logits, top_k):
    """A router that scores every image alike."""
    router = Router(4, len(logits), top_k)
    router.gate.weight.data.zero_()
    router.gate.bias.data = torch.tensor(logits)
    return router


def test_softmax_runs_over_the_top_k_alone():
    _, weights = fixed_router([0.0, math.log(3.0), 5.0, math.log(1.0)], 2)(unit(3, 4))
    # exp(5) : 3, not diluted by the two others
    expected = torch.tensor([0.0, 3.0, math.exp(5.0), 0.0]) / (3.0 + math.exp(5.0))
    assert torch.allclose(weights, expected.expand(3, 4))


def test_top_1_gives_all_weight_to_one_prompt_and_top_g_to_none_zero():
    _, one = fixed_router([0.1, 0.3, 0.2], 1)(unit(1, 4))
    assert one.tolist() == [[0.0, 1.0, 0.0]]
    _, every = fixed_router([0.1, 0.3, 0.2], 3)(unit(1, 4))
    assert torch.allclose(every, torch.softmax(torch.tensor([[0.1, 0.3, 0.2]]), -1))


def test_averaging_features_equals_averaging_logits():
    f, t = unit(5, 16), unit(6, 7, 16, seed=1)
    _, weights = Router(16, 6, 2)(f)
    mixed = torch.einsum("bg,gcd->bcd", weights, t)  # the tensor that is never built
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


def test_the_gate_target_lifts_the_k_best_by_ten():
    f = torch.tensor([[1.0, 0.0]])
    p = torch.tensor([[[0.6, 0.8]], [[0.8, 0.6]], [[0.0, 1.0]]])
    target = gate_target(f, p, torch.tensor([0]), top_k=2)
    expected = torch.softmax(torch.tensor([[10.6, 10.8, 0.0]]), dim=-1)
    assert torch.allclose(target, expected)
    target = gate_target(f, p, torch.tensor([0]), top_k=1)
    assert torch.allclose(target, torch.softmax(torch.tensor([[0.6, 10.8, 0.0]]), dim=-1))


def test_unchosen_prompts_get_a_zero_gradient_from_the_mixture():
    f, t = unit(1, 4), unit(3, 5, 4, seed=1).requires_grad_()
    _, weights = fixed_router([0.1, 0.3, 0.2], 2)(f)
    mixed_logits(f, t, weights, 100.0).sum().backward()
    assert t.grad[0].abs().max() == 0
    assert t.grad[1].abs().min() > 0
