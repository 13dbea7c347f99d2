"""The gate loss and the text loss, against numbers worked out by hand."""

import math

import pytest
import torch

from losses import TEXT_LOSSES, gate_loss, text_loss
from train import hard_text

EYE = torch.eye(2)
# The text loss of soft prompts that equal the hard ones of their class, or of the other class.
RIGHT, WRONG = math.log(1 + math.exp(-1)), math.log(1 + math.exp(1))


def test_gate_loss_takes_the_soft_target_over_all_prompts():
    logits = torch.log(torch.tensor([[1.0, 2.0, 5.0]]))  # probabilities 1/8, 1/4, 5/8
    loss = gate_loss(logits, torch.tensor([[0.5, 0.5, 0.0]])).item()
    assert loss == pytest.approx(0.5 * math.log(8) + 0.5 * math.log(4))


def test_text_loss_compares_within_a_group_and_averages_groups_classes_and_images():
    prototypes = torch.stack([EYE, EYE])
    half_right = torch.stack([EYE, EYE.flip(0)])  # group 1 has its classes swapped
    assert text_loss(half_right, prototypes).item() == pytest.approx((RIGHT + WRONG) / 2)
    assert text_loss(half_right, half_right).item() == pytest.approx(RIGHT)
    per_image = torch.stack([half_right, prototypes])
    assert text_loss(per_image, prototypes).item() == pytest.approx((3 * RIGHT + WRONG) / 4)


def test_a_prompt_can_be_compared_with_each_template_of_its_group():
    templates = torch.stack([EYE, EYE, EYE.flip(0)])
    hard = hard_text(templates, [["a"], ["b", "c"]])
    loss = TEXT_LOSSES["templates"](torch.stack([EYE, EYE]), hard, 1.0).item()
    assert loss == pytest.approx((2 * RIGHT + WRONG) / 3)
