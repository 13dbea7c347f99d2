"""Classifiers with one vector per class and no prompts; the linear probe among them.

The probe is logistic regression on image features, as CoOp compares with. Its L2 strength is
chosen on the few-shot validation images as CoOp does it: the best of seven powers of a hundred,
then eight steps of bisection around it.

Letters in shapes: N images, C classes, D feature width.
"""

import time

import torch
import torch.nn as nn
import torch.nn.functional as F

from lib.errors import BadInput
from lib.metrics import predictions


class ClassVectors(nn.Module):
    """A weight vector and a bias per class: zero-shot CLIP, the ensemble, or a linear probe."""

    templates, top_k = (), 0  # no prompts

    def __init__(self, class_names, weight, bias=None, scale=1.0):
        """class_names: the C names it answers with. weight: (C, D). bias: None or (C,). scale:
        of the logits; CLIP's for vectors that are text features."""
        super().__init__()
        self.class_names, self.scale = list(class_names), scale
        self.weight = nn.Parameter(weight, requires_grad=False)
        bias = torch.zeros(len(weight), device=weight.device) if bias is None else bias
        self.bias = nn.Parameter(bias, requires_grad=False)

    @torch.no_grad()
    def logits(self, class_names, image_features):
        """Yields class logits (N, C) of images (N, D), and prompt weights (N, 0), as it has none.

        Raises BadInput for classes that it was not made for.
        """
        if list(class_names) != self.class_names:
            raise BadInput(
                "a linear probe holds one vector per class it was trained on and knows no other:"
                " train one on these"
            )
        logits = self.scale * (image_features @ self.weight.T + self.bias)
        yield logits, image_features.new_zeros(len(image_features), 0)

    def predict(self, class_names, image_features):
        """Predicted labels (N,) and prompt weights (N, 0) of images (N, D)."""
        return predictions(self.logits(class_names, image_features))


def logistic_regression(features, labels, n_classes, c):
    """The minimum of  c * sum of cross-entropies + |weight|^2 / 2  (scikit-learn's C): weight
    (C, D), bias (C,). features: (N, D), labels: (N,)."""
    features = features.double()
    weight = features.new_zeros(n_classes, features.shape[1], requires_grad=True)
    bias = features.new_zeros(n_classes, requires_grad=True)
    solver = torch.optim.LBFGS(
        [weight, bias],
        max_iter=1000,
        history_size=20,
        tolerance_grad=1e-7,
        tolerance_change=1e-12,
        line_search_fn="strong_wolfe",
    )

    def objective():
        solver.zero_grad()
        loss = F.cross_entropy(features @ weight.T + bias, labels)
        loss = loss + weight.square().sum() / (2 * c * len(labels))
        loss.backward()
        return loss

    solver.step(objective)
    return weight.detach().float(), bias.detach().float()


def fit_probe(class_names, features, val_features, labels, val_labels):
    """A linear probe as `ClassVectors`, and the seconds it took. Prints the strength it chose."""
    start = time.time()
    weight, bias, c = linear_probe(features, labels, val_features, val_labels, len(class_names))
    print(f"L2 strength chosen on val images: C = {c:.3g}")
    return ClassVectors(class_names, weight, bias), time.time() - start


def linear_probe(features, labels, val_features, val_labels, n_classes):
    """(weight, bias, c) of the strength c that does best on the validation images."""
    tried = {}  # exponent -> (accuracy, weight, bias)

    def accuracy(exponent):
        if exponent not in tried:
            weight, bias = logistic_regression(features, labels, n_classes, 10.0**exponent)
            right = (val_features @ weight.T + bias).argmax(dim=-1) == val_labels
            tried[exponent] = right.float().mean().item(), weight, bias
        return tried[exponent][0]

    best = max((6, 4, 2, 0, -2, -4, -6), key=accuracy)
    left, right = best - 1, best + 1
    for _ in range(8):
        if accuracy(left) < accuracy(right):
            left = (left + right) / 2
        else:
            right = (left + right) / 2
    # CoOp ends with the last step's better half; this with the best of all tried, and the first of
    # equals: few validation images make many of these.
    exponent = max(tried, key=accuracy)
    return *tried[exponent][1:], 10.0**exponent
