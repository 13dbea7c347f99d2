"""The published code's own numbers, on a tiny random CLIP: every array and every gradient.

`golden/golden_eurosat_all.npz` trains on all classes with a text bias, `golden_eurosat_base.npz`
on the base classes without one. `meta` in each says how it was made.
"""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from clip.model import CLIP
from conftest import HERE

from lib.fast_text import FastTextEncoder
from losses import gate_loss, image_loss, text_loss
from prompts import SoftPrompts, TextEncoder, hard_prototypes, template_features
from router import Router, gate_target, mixed_logits


def close(ours, golden):
    """max |a - b| <= 1e-5 max |b|, as the arrays' own trial reached 2e-6."""
    ours = ours.detach().numpy()
    assert ours.shape == golden.shape
    if golden.size:
        assert np.abs(ours - golden).max() <= 1e-5 * np.abs(golden).max()


def load(name):
    """(arrays, what its `meta` says)"""
    with np.load(HERE / f"golden/golden_{name}.npz") as file:
        golden = dict(file)
    return golden, json.loads(str(golden["meta"]))


def groups_of(meta):
    template = iter(meta["templates"])
    return [[next(template) for _ in range(n)] for n in meta["groups"]]


def clip_of(golden, meta):
    model = CLIP(*meta["clip_args"]).float()
    state = {k[5:]: torch.tensor(v) for k, v in golden.items() if k.startswith("clip/")}
    table = torch.full_like(model.token_embedding.weight, torch.nan)
    table[state.pop("token_embedding.ids")] = state.pop("token_embedding.rows")
    model.load_state_dict({**state, "token_embedding.weight": table})
    return model.requires_grad_(False).eval()


@pytest.mark.parametrize("text_encoder", [TextEncoder, FastTextEncoder])
@pytest.mark.parametrize("classes", ["all", "base"])
def test_every_array_and_gradient_of_the_published_code_is_matched(classes, text_encoder):
    golden, meta = load(f"eurosat_{classes}")
    model, groups = clip_of(golden, meta), groups_of(meta)
    names, n_train = meta["all_class_names"], len(meta["train_class_names"])
    labels = torch.tensor(golden["labels"])
    bias = None
    if meta["text_bias"]:
        bias = torch.tensor(golden["text_bias"], requires_grad=True)

    image_features = F.normalize(model.encode_image(torch.tensor(golden["images"])), dim=-1)
    close(image_features, golden["image_features"])
    features = template_features(model, meta["templates"], names, text_encoder)
    prototypes = hard_prototypes(features, groups)
    close(prototypes, golden["grouped_prototypes"])

    firsts = [group[0] for group in groups]
    prompts = SoftPrompts(model, firsts, names, text_encoder=text_encoder)
    for g in range(len(groups)):
        # The golden contexts have moved away from their start: training had begun.
        prompts.context_before[g].data = torch.tensor(golden[f"ctx_before_{g}"])
        prompts.context_after[g].data = torch.tensor(golden[f"ctx_after_{g}"])
    text_features = prompts.text_features(bias=bias)  # all classes, base and new
    close(text_features[:, :n_train], golden["expert_text_features"])

    router = Router(64, len(groups), meta["top_k"])
    router.gate.weight.data = torch.tensor(golden["gate_weight"])
    router.gate.bias.data = torch.tensor(golden["gate_bias"])
    gate_logits, weights = router(image_features)
    close(gate_logits, golden["gate_logits"])
    chosen = [set(row.nonzero().flatten().tolist()) for row in weights]
    assert chosen == [set(row) for row in golden["topk_indices"].tolist()]
    mixed = torch.einsum("bg,gcd->bcd", weights, text_features[:, :n_train])
    close(mixed, golden["mixed_text_features"])
    scale = model.logit_scale.exp()
    logits = mixed_logits(image_features, text_features[:, :n_train], weights, scale)
    close(logits, golden["logits"])
    target = gate_target(image_features, prototypes[:, :n_train], labels, meta["top_k"])
    close(target, golden["gate_target"])

    image, gate = image_loss(logits, labels), gate_loss(gate_logits, target)
    text = text_loss(text_features, prototypes)
    total = image + meta["gate_loss_weight"] * gate + meta["text_loss_weight"] * text
    for name, loss in {"image": image, "gate": gate, "text": text, "total": total}.items():
        close(loss, golden[f"loss_{name}"])
    total.backward()
    close(router.gate.weight.grad, golden["gate_weight_grad"])
    close(router.gate.bias.grad, golden["gate_bias_grad"])
    for g in range(len(groups)):
        close(prompts.context_before[g].grad, golden[f"ctx_before_{g}_grad"])
        assert golden[f"ctx_after_{g}_grad"].size == 0  # no such template in these files
    if bias is not None:
        close(bias.grad, golden["text_bias_grad"])
