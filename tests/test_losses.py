"""The three losses, against numbers worked out by hand."""

import math

import torch

import losses
from losses import gate_loss, image_loss, text_loss


def test_image_loss_is_cross_entropy():
    logits = torch.tensor([[math.log(3.0), 0.0], [0.0, 0.0]])
    expected = (math.log(4 / 3) + math.log(2)) / 2
    assert math.isclose(image_loss(logits, torch.tensor([0, 1])).item(), expected, rel_tol=1e-6)


def test_gate_loss_takes_the_soft_target_over_all_prompts():
    logits = torch.log(torch.tensor([[1.0, 2.0, 5.0]]))  # probabilities 1/8, 1/4, 5/8
    target = torch.tensor([[0.5, 0.5, 0.0]])
    expected = 0.5 * math.log(8) + 0.5 * math.log(4)
    assert math.isclose(gate_loss(logits, target).item(), expected, rel_tol=1e-6)


def test_text_loss_has_no_temperature_and_averages_groups_and_classes():
    eye = torch.eye(2)
    text_features = torch.stack([eye, eye.flip(0)])  # group 0 in place, group 1 swapped
    prototypes = torch.stack([eye, eye])
    right, wrong = math.log(1 + math.exp(-1.0)), math.log(1 + math.exp(1.0))
    expected = (right + wrong) / 2
    assert math.isclose(text_loss(text_features, prototypes).item(), expected, rel_tol=1e-6)


def test_text_loss_does_not_depend_on_how_many_groups_are_computed_at_a_time(monkeypatch):
    rng = torch.Generator().manual_seed(0)
    soft, hard = torch.randn(2, 5, 4, 8, generator=rng)
    whole = text_loss(soft, hard)
    for groups in (1, 2):
        monkeypatch.setattr(losses, "NUMBERS_AT_ONCE", 4**2 * groups)
        assert torch.allclose(text_loss(soft, hard), whole, rtol=1e-6)


def test_text_loss_compares_within_a_group_only():
    eye = torch.eye(2)
    prototypes = torch.stack([eye, eye.flip(0)])
    matched = text_loss(prototypes, prototypes).item()
    crossed = text_loss(prototypes.flip(0), prototypes).item()
    assert matched < crossed


def test_text_scale_multiplies_the_similarities():
    eye = torch.eye(2)[None]
    expected = math.log(1 + math.exp(-100.0))
    assert math.isclose(text_loss(eye, eye, scale=100.0).item(), expected, abs_tol=1e-6)
    assert math.isclose(
        text_loss(eye, eye, scale=2.0).item(), math.log(1 + math.exp(-2.0)), rel_tol=1e-5
    )
