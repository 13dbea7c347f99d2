"""The gate loss and the text loss, against numbers worked out by hand."""

import math

import pytest
import torch

from losses import gate_loss, text_loss


def test_the_gate_loss_takes_the_soft_target_over_all_prompts():
    logits = torch.log(torch.tensor([[1.0, 2.0, 5.0]]))  # probabilities 1/8, 1/4, 5/8
    loss = gate_loss(logits, torch.tensor([[0.5, 0.5, 0.0]])).item()
    assert loss == pytest.approx(0.5 * math.log(8) + 0.5 * math.log(4))


def test_the_text_loss_of_orthogonal_classes():
    """Even prompts that equal their prototypes have a loss; with the classes swapped it is 1 more.
    Each prompt is compared with its own group alone, and groups are averaged."""
    equal, swapped = torch.eye(2), torch.eye(2).flip(0)
    floor = math.log(1 + 1 / math.e)
    assert text_loss(equal[None], equal[None]).item() == pytest.approx(floor)
    loss = text_loss(torch.stack([equal, swapped]), torch.stack([equal, equal])).item()
    assert loss == pytest.approx((floor + floor + 1) / 2)
