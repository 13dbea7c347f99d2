"""The mixture's forward pass, the frozen CLIP beside it, and what a fork may rely on."""

import copy

import pytest
import torch
from conftest import config_of, unit

import prompts
import router
import train
from lib import parallel, results
from lib.features import CachedImages
from prompts import template_features
from router import Router

GROUPS = [["a photo of a {}."], ["{} texture."], ["a sketch of a {}.", "a drawing of a {}."]]
NAMES = ["cat", "sea", "Annual Crop Land"]
IMAGES, LABELS = unit(32, 64), torch.arange(32) % 3


def make(clip_model, *words):
    """A mixture, always with the same start."""
    config = config_of(*words)
    groups = [[t for group in GROUPS for t in group]] if config["one_group"] else GROUPS
    torch.manual_seed(3)
    return train.make_model(clip_model, groups, NAMES, config)


def hard_text(clip_model, groups=GROUPS):
    templates = [template for group in groups for template in group]
    return train.hard_text(template_features(clip_model, templates, NAMES), groups)


def fit(model, **options):
    hard = hard_text(*model.prompts.frozen)
    return train.fit(model, CachedImages(IMAGES), LABELS, hard, **options)


def test_text_features_that_are_given_are_used_and_not_computed(random_clip, monkeypatch):
    model, f, given = make(random_clip), unit(5, 64), unit(3, 3, 64, seed=1)
    monkeypatch.setattr(model, "text_features", None)
    outputs = model(f, text_features=given)
    assert outputs.text_features is given
    expected = model.logit_scale * torch.einsum("bg,gcd,bd->bc", outputs.weights, given, f)
    assert torch.allclose(outputs.logits, expected, atol=1e-4)


def test_the_frozen_clip_is_no_part_of_what_is_trained(random_clip):
    before, visual = copy.deepcopy(random_clip.state_dict()), random_clip.visual
    model = make(random_clip, "--epochs", 1)
    fit(model)
    assert random_clip.visual is visual and random_clip not in list(model.modules())
    for name, value in random_clip.state_dict().items():
        assert torch.equal(value, before[name]), name


# --------------------------------------------------------------------------------------- forks


class NoisyRouter(Router):
    """A router of one's own, which sees images through noise while it is trained."""

    def forward(self, image_features):
        if self.training:
            image_features = image_features + 0.1 * torch.randn_like(image_features)
        return super().forward(image_features)


def test_what_a_router_of_ones_own_draws_goes_on_bit_for_bit_after_an_interruption(
    random_clip, monkeypatch
):
    monkeypatch.setitem(router.ROUTERS, "noisy", NoisyRouter)
    words = "--router", "noisy", "--epochs", 3, "--warm-up", 0
    states, whole, parts = [], make(random_clip, *words), make(random_clip, *words)
    fit(whole, save=lambda state: states.append(copy.deepcopy(state)))
    assert [state["epoch"] for state in states] == [1, 2, 3]
    torch.manual_seed(99)  # another process
    seconds, usage = fit(parts, state=states[0] | {"seconds": 1000.0})
    assert 1000 < seconds < 1010 and usage == states[-1]["usage"]
    for name, value in whole.state_dict().items():
        assert torch.equal(value, parts.state_dict()[name]), name
    once, again = (whole.logits(unit(9, 64))[1] for _ in range(2))
    assert torch.equal(once, again)  # no noise


# ---------------------------------------------------------------------------------- as on a GPU


@pytest.mark.parametrize("words", ["--chunk 4", "--method lasp --conditional"])
def test_an_epoch_needs_no_number_from_the_device(random_clip, monkeypatch, words):
    """On the meta device tensors have shapes and no values. So whatever makes a GPU wait for a
    value, such as `item`, `nonzero` or a mask as an index, fails there."""
    model = make(random_clip, "--epochs", 1, "--batch-size", 4, *words.split())
    groups = [[t for group in GROUPS for t in group]] if len(model.templates) == 1 else GROUPS
    hard = prompts.HardText(*(part.to("meta") for part in hard_text(random_clip, groups)))
    encoder, clip_model = model.prompts.encoder, copy.deepcopy(random_clip).to("meta")
    for part in (encoder, *encoder.batches):
        for name, value in vars(part).items():
            if isinstance(value, torch.Tensor):
                setattr(part, name, value.to("meta"))
    model.prompts.frozen, encoder.clip_model = (clip_model,), clip_model
    monkeypatch.setattr(results, "print_epoch", lambda *_: None)  # may wait: once an epoch
    monkeypatch.setattr(parallel, "mixed_dtype", lambda device: torch.bfloat16)
    images = CachedImages(torch.zeros(8, 2, 64, device="meta"))
    train.fit(model.to("meta"), images, torch.zeros(8, dtype=torch.long, device="meta"), hard)
    assert all(p.grad is not None for p in model.prompts.parameters() if p.numel())
