"""The mixture's forward pass, the frozen CLIP beside it, and what a fork may rely on."""

import copy

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import parse

import router
import train
from lib.images import StoredFeatures
from lib.progress import Progress
from prompts import template_features
from router import Router

GROUPS = [["a photo of a {}."], ["{} texture."], ["a sketch of a {}."]]
NAMES = ["cat", "sea", "Annual Crop Land"]


def unit(*shape, seed=0):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def config_of(*flags):
    return train.resolve(parse(flags))[0]


@pytest.fixture
def model(random_clip):
    torch.manual_seed(0)
    model = train.make_model(random_clip, GROUPS, config_of())
    model.prompts.set_classes(random_clip, NAMES)
    return model


def test_the_forward_pass_is_the_method_written_out(model, random_clip):
    f = unit(5, 64)
    gate_logits, weights, text_features, logits = model(f)
    t = model.prompts.text_features(random_clip)
    assert torch.equal(text_features, t)
    for b in range(5):
        scores = model.router.gate.weight @ f[b] + model.router.gate.bias
        assert torch.allclose(gate_logits[b], scores, atol=1e-6)
        best = scores.argsort(descending=True)[:2]
        w = torch.softmax(scores[best], dim=0)
        assert torch.allclose(weights[b, best], w, atol=1e-6) and weights[b].count_nonzero() == 2
        mixed = w[0] * t[best[0]] + w[1] * t[best[1]]  # (C, D), not normalised again
        expected = random_clip.logit_scale.exp() * mixed @ f[b]
        assert torch.allclose(logits[b], expected, atol=1e-4)


def test_logits_may_be_those_of_some_classes_and_text_features_stay_complete(model):
    f = unit(5, 64)
    whole, part = model(f), model(f, slice(1, 3))
    assert part[2].shape == (3, 3, 64)
    assert torch.equal(part[3], whole[3][:, 1:3])


def test_text_features_that_are_given_are_used_and_not_computed(model, monkeypatch):
    f, given = unit(5, 64), unit(3, 3, 64, seed=1)
    monkeypatch.setattr(model, "text_features", None)
    _, weights, text_features, logits = model(f, text_features=given)
    assert text_features is given
    expected = model.logit_scale * torch.einsum("bg,gcd,bd->bc", weights, given, f)
    assert torch.allclose(logits, expected, atol=1e-4)


def test_only_selected_prompts_are_encoded_if_nobody_reads_the_others(model):
    f = unit(1, 64)
    _, weights, whole, logits = model(f)
    _, _, some, same = model(f, only="selected")
    chosen = weights[0] > 0
    assert torch.allclose(some[chosen], whole[chosen], atol=1e-6)
    assert some[~chosen].abs().max() == 0
    assert torch.allclose(same, logits, atol=1e-4)


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


def test_training_is_in_training_mode_and_predictions_are_not(model, monkeypatch):
    modes = []
    forward = Router.forward

    def spy(self, f):
        modes.append(self.training)
        return forward(self, f)

    monkeypatch.setattr(Router, "forward", spy)
    fit(model, config_of("--epochs", 1), lambda snapshot: None)
    assert modes == [True]
    model.predict(NAMES, unit(4, 64))
    assert modes == [True, False]


def test_an_unknown_kind_of_router_is_an_error():
    with pytest.raises(ValueError, match="no router of the kind 'clairvoyant'"):
        Router(4, 3, 2, "clairvoyant")


# ------------------------------------------------------------------------------------- forks


def fit(model, config, save, state=None):
    """Trains on 32 images of three classes."""
    features, labels = unit(32, 64), torch.arange(32) % 3
    clip_model, groups = model.clip_model, GROUPS[: len(model.templates)]
    hard_features = template_features(clip_model, [group[0] for group in groups], NAMES)
    stored = StoredFeatures(features)
    return train.fit(model, config, groups, hard_features, slice(None), stored, labels, save, state)


class NoisyRouter(Router):
    """A fourth kind: Gaussian noise on the gate's logits, in training only."""

    def forward(self, image_features):
        kept = self.gate.bias.data
        if self.training:
            self.gate.bias.data = kept + torch.randn(self.n_prompts)
        try:
            return super().forward(image_features)
        finally:
            self.gate.bias.data = kept


@pytest.fixture
def noisy(monkeypatch, random_clip):
    """Makes a new mixture with a noisy router, always from the same start."""
    monkeypatch.setattr(router, "KINDS", (*router.KINDS, "noisy"))
    monkeypatch.setattr(train, "Router", NoisyRouter)

    def make():
        torch.manual_seed(3)
        model = train.make_model(random_clip, GROUPS, config_of() | {"router": "noisy"})
        model.prompts.set_classes(random_clip, NAMES)
        return model

    return make


def test_a_new_kind_of_router_is_trained_and_guided(noisy, capsys):
    model = noisy()
    before = model.router.gate.weight.detach().clone()
    fit(model, config_of("--epochs", 2, "--warm-up", 0), lambda snapshot: None)
    assert (model.router.gate.weight - before).abs().max() > 1e-4
    assert capsys.readouterr().out.count(" + gate 1 x ") == 2
    once, again = (model.predict(NAMES, unit(9, 64))[1] for _ in range(2))
    assert torch.equal(once, again)  # no noise


def test_what_a_router_draws_goes_on_bit_for_bit_after_an_interruption(noisy):
    config, states = config_of("--epochs", 4, "--warm-up", 0), []
    whole, parts = noisy(), noisy()
    fit(whole, config, lambda snapshot: states.append(copy.deepcopy(snapshot)))
    torch.manual_seed(99)  # another process
    fit(parts, config, lambda snapshot: None, states[1])
    for name, value in whole.state_dict().items():
        assert torch.equal(value, parts.state_dict()[name]), name
    fit(noisy(), config, lambda snapshot: states.append(copy.deepcopy(snapshot)))
    assert torch.equal(
        states[-1]["model"]["router.gate.weight"], whole.state_dict()["router.gate.weight"]
    )


def test_the_epochs_line_shows_every_loss_as_weight_times_value_and_their_sum(capsys):
    parts = {"model": nn.Linear(1, 1)}
    progress = Progress(parts, 1, 2, lambda state: None)
    for _ in progress.epochs():
        for entropy in (0.2, 0.4):
            losses = {"image": (1.0, torch.tensor(1.5)), "entropy": (-2.0, torch.tensor(entropy))}
            progress.step(losses, torch.tensor([[0.25, 0.75]]))
        progress.end_epoch(0.01)
    line = capsys.readouterr().out
    assert "loss 0.900 = image 1 x 1.500 + entropy -2 x 0.300  prompts 25 75 %" in line


def test_the_seconds_before_a_stop_count_and_every_epoch_is_saved():
    parts = {"model": nn.Linear(1, 1), "order": torch.Generator()}
    states = []
    for state in (None, {"seconds": 1000.0, "epoch": 2}):
        state = state and states[1] | state
        progress = Progress(parts, 4, 1, states.append, state)
        done = []
        for epoch in progress.epochs():
            progress.step({"image": (1.0, torch.tensor(1.0))}, torch.tensor([[0.25, 0.75]]))
            progress.end_epoch(0.01)
            done.append(epoch)
        assert done == ([0, 1, 2, 3] if state is None else [2, 3])
    assert [s["epoch"] for s in states] == [1, 2, 3, 4, 3, 4]
    assert 1000 < states[-1]["seconds"] <= progress.seconds < 1010
    assert states[3]["seconds"] < 10


class Scaler:
    """Stands for `torch.amp.GradScaler`, which works on GPUs alone: gradients are 65,536 times as
    large until they are to be clipped or used."""

    def __init__(self, enabled):
        self.factor, self.scaled = 2.0**16 if enabled else 1.0, False

    def scale(self, loss):
        self.scaled = True
        return self.factor * loss

    def unscale_(self, optimiser):
        assert self.scaled
        self.scaled = False
        for part in optimiser.param_groups:
            for p in part["params"]:
                p.grad /= self.factor

    def step(self, optimiser):
        if self.scaled:
            self.unscale_(optimiser)
        optimiser.step()

    def update(self):
        pass

    def state_dict(self):
        return {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradients_are_scaled_for_fp16_and_clipped_as_they_are(random_clip, monkeypatch, dtype):
    """A GPU's way on a CPU: products in the dtype, a scaler if that has a small range."""
    scalers, learned = [], []
    monkeypatch.setattr(
        torch.amp, "GradScaler", lambda enabled: scalers.append(Scaler(enabled)) or scalers[-1]
    )
    for products in (torch.float32, dtype):
        monkeypatch.setattr(train.processes, "mixed_dtype", lambda device, d=products: d)
        torch.manual_seed(3)
        model = train.make_model(random_clip, GROUPS, config_of())
        model.set_classes(NAMES)
        before = {k: v.clone() for k, v in model.state_dict().items()}
        fit(model, config_of("--epochs", 3, "--warm-up", 0), lambda snapshot: None)
        learned.append({k: v - before[k] for k, v in model.state_dict().items()})
        predicted = model.eval().text_features()
        monkeypatch.setattr(train.processes, "mixed_dtype", lambda device: torch.float32)
        assert torch.equal(predicted, model.text_features())  # predictions are in fp32
    assert [scaler.factor > 1 for scaler in scalers] == [False, dtype is torch.float16]
    for name, moved in learned[0].items():
        if moved.numel():
            assert (learned[1][name] - moved).norm() <= 0.1 * moved.norm(), name


def test_what_is_trained_is_what_requires_gradients(random_clip):
    config = config_of("--router", "frozen", "--text-bias")
    model = train.make_model(random_clip, GROUPS, config)
    (part,) = model.parameter_groups()
    names = {id(p): name for name, p in model.named_parameters()}
    trained = {names[id(p)] for p in part["params"]}
    assert "text_bias" in trained and not any("gate" in name for name in trained)
    assert part["factor"] == 1.0 and len(trained) == 7


@pytest.mark.parametrize("flags", ["", "--text-weight 0", "--method lasp", "--conditional"])
def test_an_epoch_needs_no_number_from_the_device(model, random_clip, monkeypatch, flags):
    """On the meta device tensors have shapes and no values. So whatever makes a GPU wait for a
    value, such as `item`, `nonzero` or a mask as an index, fails there."""
    config = config_of("--epochs", 1, "--batch-size", 4, *flags.split())
    groups = [[t for group in GROUPS for t in group]] if config["one_group"] else GROUPS
    model = train.make_model(random_clip, groups, config)
    model.set_classes(NAMES)
    hard = template_features(random_clip, [t for group in groups for t in group], NAMES)
    sentences = model.prompts.sentences
    for part in (sentences, *sentences.batches):
        for name, value in vars(part).items():
            if isinstance(value, torch.Tensor):
                setattr(part, name, value.to("meta"))
    model.__dict__["clip_model"] = copy.deepcopy(random_clip).to("meta")
    monkeypatch.setattr(Progress, "end_epoch", lambda self, lr: None)  # may wait: once an epoch
    labels = torch.zeros(12, dtype=torch.long, device="meta")
    monkeypatch.setattr(train.processes, "mixed_dtype", lambda device: torch.bfloat16)
    train.fit(
        model.to("meta"), config, groups, hard.to("meta"), slice(None),
        StoredFeatures(torch.zeros(12, 2, 64, device="meta")), labels, save=None,
    )  # fmt: skip
    assert all(p.grad is not None for p in model.prompts.parameters() if p.numel())
