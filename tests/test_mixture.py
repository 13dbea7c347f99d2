"""The training loop: a router of one's own, and an epoch as on a GPU."""

import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import config_of, unit

import router
import train
from lib import parallel, results
from lib.features import CachedImages
from prompts import HardText
from router import Router

GROUPS = [["a photo of a {}."], ["{} texture."], ["a sketch of a {}.", "a drawing of a {}."]]
NAMES = ["cat", "sea", "Annual Crop Land"]


def make(clip_model, words):
    """A mixture, always with the same start, and features of its hard prompts, drawn at random."""
    torch.manual_seed(3)
    model = train.make_model(clip_model, GROUPS, NAMES, config_of(*words.split()))
    return model, train.hard_text(unit(4, 3, 64), GROUPS)


class NoisyRouter(Router):
    """It sees only a part of each image's feature while it is trained."""

    def forward(self, image_features):
        return super().forward(F.dropout(image_features, 0.1, self.training))


def test_a_router_that_draws_random_numbers_resumes_bit_for_bit(random_clip, monkeypatch):
    monkeypatch.setitem(router.ROUTERS, "noisy", NoisyRouter)
    whole, hard = make(random_clip, "--router noisy --epochs 3")
    resumed, _ = make(random_clip, "--router noisy --epochs 3")
    data, states = (CachedImages(unit(32, 64)), torch.arange(32) % 3, hard), []
    train.fit(whole, *data, save=lambda state: states.append(copy.deepcopy(state)))
    torch.manual_seed(99)  # another process
    seconds, _ = train.fit(resumed, *data, state=states[0] | {"seconds": 1000.0})
    assert 1000 < seconds < 1010
    assert torch.equal(whole.router.gate.weight, resumed.router.gate.weight)
    once, again = (whole.logits(unit(9, 64))[1] for _ in range(2))
    assert torch.equal(once, again)  # no noise after training


@pytest.mark.parametrize("words", ["--chunk 4", "--conditional --text-target templates"])
def test_an_epoch_needs_no_number_from_the_device(random_clip, monkeypatch, words):
    """On the meta device tensors have shapes and no values. So whatever makes a GPU wait for a
    value, such as `item`, `nonzero` or a mask as an index, fails there."""
    clip_model = copy.deepcopy(random_clip)
    model, hard = make(clip_model, f"--epochs 1 --batch-size 4 {words}")
    encoder = model.prompts.encoder
    for part in (encoder, *encoder.batches):
        for name, value in vars(part).items():
            if isinstance(value, torch.Tensor):
                setattr(part, name, value.to("meta"))
    clip_model.to("meta")
    monkeypatch.setattr(results, "print_epoch", lambda *_: None)  # may wait: once an epoch
    monkeypatch.setattr(parallel, "mixed_dtype", lambda device: torch.bfloat16)
    images = CachedImages(torch.zeros(8, 2, 64, device="meta"))
    labels = torch.zeros(8, dtype=torch.long, device="meta")
    train.fit(model.to("meta"), images, labels, HardText(*(part.to("meta") for part in hard)))
