"""The mixture's forward pass, the frozen CLIP beside it, and what a fork may rely on."""

import copy

import pytest
import torch
from conftest import config_of, unit

import losses
import prompts
import router
import train
from lib import parallel
from lib.features import CachedImages
from prompts import template_features
from router import Router

GROUPS = [["a photo of a {}."], ["{} texture."], ["a sketch of a {}.", "a drawing of a {}."]]
NAMES = ["cat", "sea", "Annual Crop Land"]
IMAGES, LABELS = unit(32, 64), torch.arange(32) % 3


def make(clip_model, *words, names=NAMES):
    """A mixture, always with the same start."""
    config = config_of(*words)
    groups = [[t for group in GROUPS for t in group]] if config["one_group"] else GROUPS
    torch.manual_seed(3)
    return train.make_model(clip_model, groups, names, config)


def hard_text(clip_model, groups=GROUPS):
    templates = [template for group in groups for template in group]
    return train.hard_text(template_features(clip_model, templates, NAMES), groups)


def fit(model, **options):
    hard = hard_text(*model.prompts.frozen)
    return train.fit(model, CachedImages(IMAGES), LABELS, hard, **options)


@pytest.fixture
def model(random_clip):
    return make(random_clip)


def test_logits_may_be_those_of_some_classes_and_text_features_stay_complete(model):
    f = unit(5, 64)
    whole, part = model(f), model(f, slice(1, 3))
    assert part.text_features.shape == (3, 3, 64)
    # Products of other shapes are summed in another order on some processors.
    assert torch.allclose(part.logits, whole.logits[:, 1:3], atol=1e-5)


def test_text_features_that_are_given_are_used_and_not_computed(model, monkeypatch):
    f, given = unit(5, 64), unit(3, 3, 64, seed=1)
    monkeypatch.setattr(model, "text_features", None)
    outputs = model(f, text_features=given)
    assert outputs.text_features is given
    expected = model.logit_scale * torch.einsum("bg,gcd,bd->bc", outputs.weights, given, f)
    assert torch.allclose(outputs.logits, expected, atol=1e-4)


def test_prompts_that_start_at_random_start_apart(random_clip):
    starts = torch.stack(list(make(random_clip, "--init", "random").prompts.context_before))
    assert starts.shape == (3, 16, 64)
    assert torch.cdist(starts.flatten(1), starts.flatten(1)).fill_diagonal_(1.0).min() > 0.1


def test_the_frozen_clip_is_no_part_of_what_is_trained(model, random_clip):
    learned = set(model.state_dict())
    assert learned == {
        *(f"prompts.context_{side}.{g}" for side in ("before", "after") for g in range(3)),
        *("router.gate.weight", "router.gate.bias"),
    }
    assert {name for name, _ in model.named_parameters()} == learned
    assert random_clip not in list(model.modules())
    model.train()
    assert model.router.training and not random_clip.training
    assert not any(p.requires_grad for p in random_clip.parameters())


def test_training_leaves_clip_whole(random_clip):
    before, visual = copy.deepcopy(random_clip.state_dict()), random_clip.visual
    fit(make(random_clip, "--epochs", 1))
    assert random_clip.visual is visual
    for name, value in random_clip.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_every_epoch_is_saved_and_the_seconds_before_a_stop_count(random_clip):
    states = []
    model = make(random_clip, "--epochs", 3)
    fit(model, save=lambda state: states.append(copy.deepcopy(state)))
    assert [state["epoch"] for state in states] == [1, 2, 3] and not model.training
    stopped = states[1] | {"seconds": 1000.0}
    seconds, usage = fit(make(random_clip, "--epochs", 3), state=stopped)
    assert 1000 < seconds < 1010 and usage == states[-1]["usage"]


def test_the_epochs_line_shows_every_loss_as_weight_times_value_and_their_sum(model, capsys):
    history = [
        {"image": (1.0, torch.tensor(1.5)), "entropy": (-2.0, torch.tensor(entropy))}
        for entropy in (0.2, 0.4)
    ]
    share = train.print_epoch(0, model, 0.01, history, torch.tensor([16.0, 44.0, 4.0]))
    line = capsys.readouterr().out
    assert "loss 0.900 = image 1 x 1.500 + entropy -2 x 0.300  prompts 25 69  6 %" in line
    assert share == [0.25, 0.6875, 0.0625]


# --------------------------------------------------------------------------------------- forks


class NoisyRouter(Router):
    """A router of one's own, which sees images through noise while it is trained."""

    def forward(self, image_features):
        if self.training:
            image_features = image_features + 0.1 * torch.randn_like(image_features)
        return super().forward(image_features)


@pytest.fixture
def noisy(monkeypatch):
    monkeypatch.setitem(router.ROUTERS, "noisy", NoisyRouter)
    return "--router", "noisy", "--warm-up", 0, "--epochs"


def test_a_router_of_ones_own_is_trained_and_guided(noisy, random_clip, capsys):
    start, model = make(random_clip, *noisy, 2), make(random_clip, *noisy, 2)
    fit(model)
    assert (model.router.gate.weight - start.router.gate.weight).abs().max() > 1e-4
    assert capsys.readouterr().out.count(" + gate 1 x ") == 2
    once, again = (model.logits(unit(9, 64))[1] for _ in range(2))
    assert torch.equal(once, again)  # no noise


def test_what_a_router_draws_goes_on_bit_for_bit_after_an_interruption(noisy, random_clip):
    states, whole, parts = [], make(random_clip, *noisy, 3), make(random_clip, *noisy, 3)
    fit(whole, save=lambda state: states.append(copy.deepcopy(state)))
    torch.manual_seed(99)  # another process
    fit(parts, state=states[0])
    for name, value in whole.state_dict().items():
        assert torch.equal(value, parts.state_dict()[name]), name


def test_a_text_loss_of_ones_own_pulls_as_it_says(monkeypatch, random_clip):
    def distance(text_features, hard, scale):
        return scale * (text_features - hard.prototypes).norm(dim=-1).mean()

    monkeypatch.setitem(losses.TEXT_LOSSES, "distance", distance)
    words = "--text-target", "distance", "--text-scale", 3, "--text-weight", 50, "--epochs", 5
    model, hard = make(random_clip, *words), hard_text(random_clip)
    before = distance(model.text_features(), hard, 3.0)
    found = train.compute_losses(model, IMAGES, LABELS, model(IMAGES), hard, slice(None))
    weight, value = found["text"]
    assert weight == 50 and torch.allclose(value, before, atol=1e-6)
    fit(model)
    assert distance(model.text_features(), hard, 3.0) < 0.9 * before


def test_a_loop_of_ones_own_learns_what_fit_learns(random_clip):
    words = "--epochs", 2, "--batch-size", 8, "--lr", 0.01
    fitted, model = make(random_clip, *words), make(random_clip, *words)
    fit(fitted)

    hard = hard_text(random_clip)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    rng = torch.Generator().manual_seed(1)  # the seed of a run unless another is given
    for epoch in range(2):
        optimiser.param_groups[0]["lr"] = train.learning_rate(0.01, epoch, 2, warm_up=5)
        order = torch.randperm(32, generator=rng)
        torch.randint(1, (32,), generator=rng)  # `fit` draws a view of each image
        for batch in order.split(8):
            f, labels = IMAGES[batch], LABELS[batch]
            outputs = model(f)
            parts = train.compute_losses(model, f, labels, outputs, hard, slice(None))
            loss = sum(weight * value for weight, value in parts.values())
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
    for name, value in fitted.state_dict().items():
        assert torch.allclose(model.state_dict()[name], value, atol=1e-6), name


# ---------------------------------------------------------------------------------- as on a GPU


def test_training_in_bf16_learns_nearly_the_same_and_predicts_in_fp32(random_clip, monkeypatch):
    learned = []
    start = make(random_clip).state_dict()
    for dtype in (torch.float32, torch.bfloat16):
        with monkeypatch.context() as patch:
            patch.setattr(parallel, "mixed_dtype", lambda device, dtype=dtype: dtype)
            model = make(random_clip, "--epochs", 3, "--warm-up", 0)
            fit(model)
            with torch.no_grad():
                predicted = model.text_features()
        assert torch.allclose(predicted, model.text_features(), atol=1e-6)  # bf16 is 1e-3 off
        learned.append({name: value - start[name] for name, value in model.state_dict().items()})
    assert (learned[0]["router.gate.weight"] - learned[1]["router.gate.weight"]).abs().max() > 0
    for name, moved in learned[0].items():
        if moved.numel():
            assert (learned[1][name] - moved).norm() <= 0.1 * moved.norm(), name


@pytest.mark.parametrize("words", ["", "--method lasp", "--conditional"])
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
    monkeypatch.setattr(train, "print_epoch", lambda *_: None)  # may wait: once an epoch
    monkeypatch.setattr(parallel, "mixed_dtype", lambda device: torch.bfloat16)
    images = CachedImages(torch.zeros(12, 2, 64, device="meta"))
    train.fit(model.to("meta"), images, torch.zeros(12, dtype=torch.long, device="meta"), hard)
    assert all(p.grad is not None for p in model.prompts.parameters() if p.numel())
