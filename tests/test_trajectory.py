"""A whole training of the published method against an independent one.

`golden/golden_trajectory_base.npz`: 12 epochs on the base classes, computed in float64 by an
implementation that shares no line with this one; `meta` in it says how. Given are image features,
labels, the order of the images in every epoch and the gate's start; its CLIP is that of
`golden_eurosat_base.npz`.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from clip.model import CLIP
from conftest import config_of

import train
from lib.features import CachedImages
from prompts import template_features

GOLDEN = Path(__file__).parent / "golden"


def load(name):
    with np.load(GOLDEN / name) as file:
        return dict(file)


@pytest.fixture(scope="module")
def golden():
    return load("golden_trajectory_base.npz")


@pytest.fixture(scope="module")
def clip_model():
    arrays = load("golden_eurosat_base.npz")
    model = CLIP(*json.loads(str(arrays["meta"]))["clip_args"]).float()
    state = {k[5:]: torch.tensor(v) for k, v in arrays.items() if k.startswith("clip/")}
    table = torch.full_like(model.token_embedding.weight, torch.nan)
    table[state.pop("token_embedding.ids")] = state.pop("token_embedding.rows")
    model.load_state_dict({**state, "token_embedding.weight": table})
    return model.requires_grad_(False).eval()


def test_twelve_epochs_of_the_published_method_are_followed(
    golden, clip_model, monkeypatch, capsys
):
    meta = json.loads(str(golden["meta"]))
    names, n_trained = meta["all_class_names"], len(meta["train_class_names"])
    template = iter(meta["templates"])
    groups = [[next(template) for _ in range(n)] for n in meta["groups"]]
    flags = f"--epochs {meta['epochs']} --batch-size {meta['batch']} --lr {meta['lr']}"
    config = config_of(*flags.split())
    assert (config["gate_weight"], config["text_weight"]) == (meta["gate"], meta["text"])

    model = train.MoCoOp(clip_model, groups, names, config)
    model.router.gate.weight.data = torch.tensor(golden["gate_weight_0"])
    model.router.gate.bias.data = torch.tensor(golden["gate_bias_0"])
    hard = train.hard_text(template_features(clip_model, meta["templates"], names), groups)
    features, labels = torch.tensor(golden["image_features"]), torch.tensor(golden["labels"])
    orders = iter(torch.tensor(golden["order"]))
    monkeypatch.setattr(torch, "randperm", lambda n, generator: next(orders))
    after = {}

    def keep(snapshot):
        after[snapshot["epoch"]] = {k: v.clone() for k, v in model.state_dict().items()}

    train.fit(model, CachedImages(features), labels, hard, slice(n_trained), keep)

    ours_by_theirs = {"router.gate.weight": "gate_weight", "router.gate.bias": "gate_bias"}
    for g in range(len(groups)):
        ours_by_theirs[f"prompts.context_before.{g}"] = f"ctx_before_{g}"
        ours_by_theirs[f"prompts.context_after.{g}"] = f"ctx_after_{g}"
    for epoch in (1, 3, 6, 12):
        assert after[epoch].keys() == ours_by_theirs.keys()
        for ours, theirs in ours_by_theirs.items():
            expected = torch.tensor(golden[f"after_epoch_{epoch}/{theirs}"])
            assert after[epoch][ours].shape == expected.shape
            if expected.numel():
                difference = (after[epoch][ours] - expected).abs().max()
                assert difference <= 1e-5 * expected.abs().max()
    moved = golden["after_epoch_12/gate_weight"] - golden["gate_weight_0"]
    assert np.abs(moved).max() > 1e-3  # a thousand times what is let pass

    # loss 13.997 = image 1 x 1.666 + gate 1 x 1.758 + text 5 x 2.115
    printed = capsys.readouterr().out.splitlines()
    for line, expected in zip(printed, golden["epoch_losses"], strict=True):
        terms = line.split("  ")[3].replace(" = ", " + ").split(" + ")
        losses = {term.split()[0]: float(term.split()[-1]) for term in terms}
        ours = [losses[name] for name in ("loss", "image", "gate", "text")]
        assert np.allclose(ours, expected, atol=6e-4)
