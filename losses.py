"""The three losses. total = image + gate_weight * gate + text_weight * text, with weights 1 and 5.

Dimensions: B images, C classes, G prompts, T templates, D feature width.
"""

import torch
import torch.nn.functional as F


def image_loss(logits, labels):
    """Cross-entropy of the mixture's class logits (B, C) with the labels (B,)."""
    return F.cross_entropy(logits, labels)


def gate_loss(gate_logits, target):
    """Cross-entropy of the router's logits with the soft target of `router.gate_target`.

    It uses all G logits, not only the top K: the router must be able to learn to choose a prompt
    that it has never chosen. gate_logits (B, G), target (B, G) with rows summing to 1.
    """
    return F.cross_entropy(gate_logits, target)


def text_loss(text_features, prototypes, scale=1.0):
    """Ties each soft prompt to its own group's hard prompts, class by class.

    Soft prompt g with class c should be more similar to prototype [g, c] than to those of other
    classes: cross-entropy of scale * t[g] @ p[g].T with the diagonal, averaged over groups
    and classes. `scale` is 1, as in the published code: the softmax never saturates, so every class
    always gets a gradient. Even t = p is not the minimum: two orthogonal classes have a loss of
    ln(1 + 1/e) = 0.313, and pushing them further apart lowers it. LASP, where the idea comes
    from, uses CLIP's 100.

    When only base classes have images, C still covers *all* class names, since a name needs none;
    this should stop prompts from drifting away from the new classes. text_features and prototypes
    (G, C, D); the loss is also averaged over any further leading dimensions of text_features.
    """
    logits = scale * text_features @ prototypes.transpose(-1, -2)  # (G, C soft, C hard)
    diagonal = torch.arange(logits.shape[-1], device=logits.device)
    return F.cross_entropy(logits.flatten(0, -2), diagonal.expand(logits.shape[:-1]).flatten())


# The choices of `--text-target`. Each takes text features (..., G, C, D), `prompts.HardText` and
# the scale. "templates" is LASP's: it compares each soft prompt with every template of its group.
TEXT_LOSSES = {
    "prototypes": lambda text_features, hard, scale: text_loss(
        text_features, hard.prototypes, scale
    ),
    "templates": lambda text_features, hard, scale: text_loss(
        text_features.index_select(-3, hard.prompt_of), hard.features, scale
    ),
}
