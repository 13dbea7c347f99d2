"""A whole training of the published method against an independent one.

`golden/golden_trajectory_base.npz`: 12 epochs on the base classes, computed in float64 by an
implementation that shares no line with this one; `meta` in it says how. Given are image features,
labels, the order of the images in every epoch and the gate's start; its CLIP is that of
`golden_eurosat_base.npz`.
"""

import numpy as np
import torch
from conftest import config_of
from test_golden import clip_of, close, groups_of, load

import train
from lib.features import CachedImages
from prompts import template_features


def test_twelve_epochs_of_the_published_method_are_followed(monkeypatch):
    (golden, meta), clip_model = load("trajectory_base"), clip_of(*load("eurosat_base"))
    names, n_trained = meta["all_class_names"], len(meta["train_class_names"])
    groups = groups_of(meta)
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
            close(after[epoch][ours], golden[f"after_epoch_{epoch}/{theirs}"])
    moved = golden["after_epoch_12/gate_weight"] - golden["gate_weight_0"]
    assert np.abs(moved).max() > 1e-3  # a thousand times what is let pass
