"""The three losses. total = image + gate_weight * gate + text_weight * text, weights 1 and 5.

Letters in shapes: B images, C classes, G prompts, D feature width.
"""

import torch
import torch.nn.functional as F

NUMBERS_AT_ONCE = 2**24  # similarities that the text loss computes at a time: 64 MB


def image_loss(logits, labels):
    """Cross-entropy of the mixture's class logits (B, C) with the labels (B,)."""
    return F.cross_entropy(logits, labels)


def gate_loss(gate_logits, target):
    """Cross-entropy of the router's logits with the soft target of `router.gate_target`.

    All G logits take part, not the top K alone: a prompt that is never chosen must still be able
    to learn that it should be. gate_logits (B, G), target (B, G) with rows summing to 1.
    """
    return F.cross_entropy(gate_logits, target)


def text_loss(text_features, prototypes, scale=1.0):
    """Ties each soft prompt to its own group's hard prompts, class by class.

    Soft prompt g with class c should be more like prototype [g, c] than like the prototypes of
    other classes: cross-entropy of scale * t[g] @ p[g].T with the diagonal, averaged over groups
    and classes. `scale` is 1 as in the published code: the softmax never saturates, so every class
    always gets a gradient, and t = p is not yet the minimum, as pushing classes further apart
    lowers the loss. LASP, where the idea comes from, uses CLIP's 100.

    When training sees base classes only, C is still *all* class names: names cost no images, and
    this is meant to keep the new classes in place. text_features and prototypes (G, C, D); with
    more dimensions in front, averaged over these as well.
    """
    n_classes, width = prototypes.shape[-2:]
    prototypes = prototypes.expand_as(text_features).reshape(-1, n_classes, width)
    text_features = text_features.reshape(-1, n_classes, width)
    labels, total = torch.arange(n_classes, device=text_features.device), 0
    # Some groups at a time: 4 groups with 4,000 classes have 64 million similarities.
    at_once = max(1, NUMBERS_AT_ONCE // n_classes**2)
    for soft, hard in zip(text_features.split(at_once), prototypes.split(at_once)):
        logits = (scale * soft @ hard.transpose(-1, -2)).flatten(0, 1)  # (G * C soft, C hard)
        total = total + F.cross_entropy(logits, labels.repeat(len(soft)), reduction="sum")
    return total / len(text_features) / n_classes
