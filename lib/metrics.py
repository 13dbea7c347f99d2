"""Numbers from predictions and labels. Nothing here knows a model or a dataset."""

import numpy as np
import torch


def predictions(logits):
    """Predicted labels (N,) and prompt weights (N, G), from what a model's `logits` yields."""
    labels, weights = zip(*((some.argmax(dim=-1), w) for some, w in logits))
    return torch.cat(labels), torch.cat(weights)


def accuracy(predictions, labels):
    """Top-1 accuracy in percent of predicted labels (N,)."""
    return _percent(predictions.cpu() == labels)


def per_class_accuracy(predictions, labels, class_names):
    """{class name: top-1 accuracy in percent, None without images}."""
    found = {}
    for label, name in enumerate(class_names):
        own = labels == label
        key = name if name not in found else f"{name} ({label})"  # ImageNet has a few names twice
        found[key] = _percent(predictions[own] == label) if own.any() else None
    return found


def prompt_usage(weights, templates):
    """{template: its prompt's share of the router's weight}, of weights (N, G); sums to 1."""
    return {t: round(share, 4) for t, share in zip(templates, weights.mean(dim=0).tolist())}


def usage_by_kind(weights, kinds, names):
    """The mean weight of every prompt over each kind of image, as it goes to `result.json`.

    weights: (N, G). kinds: the kind of each image, an index into names.
    Returns {"rows": names, "share": G numbers that sum to 1, per row}.
    """
    weights, kinds = weights.numpy(), np.array(kinds)
    share = [weights[kinds == row].mean(axis=0) for row in range(len(names))]
    return {"rows": list(names), "share": [row.round(4).tolist() for row in share]}


def harmonic_mean(base, new):
    """The field's H of base and new accuracy."""
    return 2 * base * new / (base + new) if base + new else 0.0


def mean_std(values):
    """Mean and population standard deviation, as CoOp reports them."""
    values = np.fromiter(values, float)
    return values.mean(), values.std()


def _percent(right):
    return round(100 * right.float().mean().item(), 2)
