"""What classifies images: a mixture of prompts, or class vectors that need none; and how well.

Every method here is one of these two. `MoCoOp` is soft prompts with a router; with one prompt and
without the extra losses it is CoOp, with a network that shifts the context it is CoCoOp. `Probe`
is a vector a class: zero-shot CLIP, the ensemble of templates, a linear probe.

Letters in shapes: B or N images, C classes, G prompts, D feature width, W text encoder's width.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

from backbone import BadInput
from encoder import CHUNK
from prompts import SoftPrompts, template_features, zero_shot_template
from router import Router, mixed_logits


class MoCoOp(nn.Module):
    """The mixture: soft prompts, a router over them, and whatever the flags add.

    Holds only what is learned; the frozen CLIP is passed in where it is needed.
    """

    def __init__(self, clip_model, groups, config):
        """groups: lists of templates, a prompt each. config: flags as in `train.METHODS`."""
        super().__init__()
        text_width, width = clip_model.text_projection.shape
        templates = [group[0] for group in groups]
        if len(groups) == 1 and "{}" in config["init"]:
            templates = [config["init"]]  # a prompt goes by what it started from
        self.prompts = SoftPrompts(clip_model, templates, config["init"])
        self.router = Router(
            width, len(groups), min(config["top_k"], len(groups)), config["router"]
        )
        self.text_bias = nn.Parameter(torch.zeros(1, width)) if config["text_bias"] else None
        self.shift = None  # CoCoOp's network: from the image to a shift of all context vectors
        if config["conditional"]:
            self.shift = nn.Sequential(
                nn.Linear(width, width // 16), nn.ReLU(), nn.Linear(width // 16, text_width)
            )
        self.visual_ln = None  # the image encoder's own LayerNorms, unfrozen
        if config["tune_visual_ln"]:
            if not hasattr(clip_model.visual, "transformer"):
                raise BadInput("--tune-visual-ln needs a CLIP with a ViT: this one has none")
            blocks = clip_model.visual.transformer.resblocks
            norms = [norm for block in blocks for norm in (block.ln_1, block.ln_2)]
            self.visual_ln = nn.ModuleList(norms).requires_grad_(True)
        self.logit_scale = clip_model.logit_scale.exp().item()  # CLIP's, frozen
        self.chunk = config.get("chunk", CHUNK)  # sentences that are encoded at a time

    def text_features(self, clip_model, image_features=None, only=None):
        """(G, C, D) of the classes that `prompts.set_classes` was given last; (B, G, C, D) if the
        context depends on the image. only: (G,) bool, the prompts that will be read."""
        shift = None if self.shift is None else self.shift(image_features)
        return self.prompts.text_features(clip_model, self.text_bias, shift, only, self.chunk)

    @torch.no_grad()
    def predict(self, clip_model, class_names, image_features):
        """Predicted labels (N,) and prompt weights (N, G) of images (N, D), for any classes."""
        self.prompts.set_classes(clip_model, class_names)
        _, weights = self.router(image_features)
        text_features = None if self.shift else self.text_features(clip_model)
        n_at_once = max(1, 2**20 // (weights.shape[1] * len(class_names)))
        n_at_once = min(64 if self.shift else 1024, n_at_once)  # bounds (B, G, C)
        predictions = []
        for f, w in zip(image_features.split(n_at_once), weights.split(n_at_once)):
            t = self.text_features(clip_model, f) if self.shift else text_features
            predictions.append(mixed_logits(f, t, w, self.logit_scale).argmax(dim=-1))
        return torch.cat(predictions), weights


class Probe(nn.Module):
    """A weight vector and a bias a class, and no prompts."""

    def __init__(self, class_names, weight, bias=None):
        super().__init__()
        self.class_names = list(class_names)
        self.weight = nn.Parameter(weight, requires_grad=False)  # (C, D)
        bias = torch.zeros(len(weight), device=weight.device) if bias is None else bias
        self.bias = nn.Parameter(bias, requires_grad=False)  # (C,)

    def predict(self, clip_model, class_names, image_features):
        """Predicted labels (N,), and weights (N, 0), as there is no prompt.

        Raises BadInput for classes that it was not made for.
        """
        if list(class_names) != self.class_names:
            raise BadInput(
                "a linear probe holds a vector for each class it was trained on and knows no other:"
                " train one on these"
            )
        predictions = (image_features @ self.weight.T + self.bias).argmax(dim=-1)
        return predictions, image_features.new_zeros(len(image_features), 0)


@torch.no_grad()
def clip_as_it_is(clip_model, dataset, class_names, hard_features):
    """The baselines that learn nothing: {"zeroshot": Probe, "ensemble": Probe}.

    zeroshot: the dataset's one template. ensemble: all hard templates, features averaged.
    hard_features: (T, C, D) of all templates with these class names.
    """
    one = template_features(clip_model, [zero_shot_template(dataset)], class_names)[0]
    return {
        "zeroshot": Probe(class_names, one),
        "ensemble": Probe(class_names, F.normalize(hard_features.mean(dim=0), dim=-1)),
    }


def percent(right):
    return round(100 * right.float().mean().item(), 2)


def measure(clip_model, model, split, items, features):
    """A model on images: ({accuracy, per_class_accuracy, prompt_usage}, weights (N, G), predicted
    labels (N,)). items: from the split's lists, with features (N, D)."""
    predictions, weights = model.predict(clip_model, split.class_names, features)
    predictions, weights = predictions.cpu(), weights.cpu()
    labels = torch.tensor([item.label for item in items])
    per_class = {}
    for label, name in enumerate(split.class_names):
        own = labels == label
        key = name if name not in per_class else f"{name} ({label})"  # ImageNet repeats a few
        per_class[key] = percent(predictions[own] == label) if own.any() else None
    templates = model.prompts.templates if isinstance(model, MoCoOp) else []
    usage = dict(zip(templates, weights.mean(dim=0).tolist()))
    measured = {
        "accuracy": percent(predictions == labels),
        "per_class_accuracy": per_class,
        "prompt_usage": {template: round(share, 4) for template, share in usage.items()},
    }
    return measured, weights, predictions
