"""Baselines for the mixture: one vector per class, and groups found by clustering.

The linear probe is CoOp's baseline, logistic regression on image features. `--groups auto`
clusters templates, which are otherwise grouped by hand.

Dimensions: N images, C classes, T templates, D feature width.
"""

import time

import torch
import torch.nn as nn
import torch.nn.functional as F

from lib.errors import BadInput, finite

# -------------------------------------------------------------------------- one vector per class


class ClassVectors(nn.Module):
    """A weight vector and a bias per class: zero-shot CLIP, the ensemble, or a linear probe."""

    templates, top_k = (), 0  # no prompts

    def __init__(self, class_names, weight, bias=None, scale=1.0):
        """class_names: the names of its C classes. weight: (C, D). bias: None or (C,). scale:
        factor of the logits; CLIP's if the vectors are text features."""
        super().__init__()
        self.class_names, self.scale = list(class_names), scale
        self.weight = nn.Parameter(weight, requires_grad=False)
        bias = torch.zeros(len(weight), device=weight.device) if bias is None else bias
        self.bias = nn.Parameter(bias, requires_grad=False)

    def check_classes(self, class_names):
        """Raises BadInput for classes other than its own."""
        if list(class_names) != self.class_names:
            raise BadInput(
                "a linear probe holds one vector per class it was trained on and knows no other:"
                " train one on these"
            )

    @torch.no_grad()
    def logits(self, image_features, class_names=None):
        """Class logits (N, C) of images (N, D), and prompt weights (N, 0), as it has no prompts.

        Raises BadInput for classes other than its own.
        """
        self.check_classes(self.class_names if class_names is None else class_names)
        logits = self.scale * (image_features @ self.weight.T + self.bias)
        return finite(logits, "the logits"), image_features.new_zeros(len(image_features), 0)


def logistic_regression(features, labels, n_classes, c, start=None):
    """The minimum of  c * sum of cross-entropies + |weight - start|^2 / 2  (scikit-learn's C, where
    start is 0): weight (C, D), bias (C,).

    features: (N, D), labels: (N,). start: None, or the weight (C, D) to start from and stay near;
    the bias is then fixed at 0.
    """
    features = features.double()
    centre = features.new_zeros(n_classes, features.shape[1]) if start is None else start.double()
    weight = centre.clone().requires_grad_()
    bias = features.new_zeros(n_classes, requires_grad=start is None)
    solver = torch.optim.LBFGS(
        [parameter for parameter in (weight, bias) if parameter.requires_grad],
        max_iter=1000,
        history_size=20,
        tolerance_grad=1e-7,
        tolerance_change=1e-12,
        line_search_fn="strong_wolfe",
    )

    def objective():
        solver.zero_grad()
        loss = F.cross_entropy(features @ weight.T + bias, labels)
        loss = loss + (weight - centre).square().sum() / (2 * c * len(labels))
        loss.backward()
        return loss

    solver.step(objective)
    return weight.detach().float(), bias.detach().float()


def fit_probe(class_names, features, val_features, labels, val_labels, start=None):
    """A linear probe as `ClassVectors`, and the seconds it took. start: as in the regression.

    The L2 strength is chosen on the few-shot validation images by CoOp's search: the best of seven
    powers of a hundred, then eight steps of bisection around it.
    """
    began = time.time()
    tried = {}  # exponent -> (accuracy, weight, bias)

    def accuracy(exponent):
        if exponent not in tried:
            c = 10.0**exponent
            weight, bias = logistic_regression(features, labels, len(class_names), c, start)
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
    # CoOp ends with the better half of the last step. This takes the best of all tried, the
    # first in case of a tie; with few validation images, ties are common.
    exponent = max(tried, key=accuracy)
    print(f"L2 strength chosen on val images: C = {10.0**exponent:.3g}")
    _, weight, bias = tried[exponent]
    return ClassVectors(class_names, weight, bias), time.time() - began


# ---------------------------------------------------------------------------------- groups found


def distances(features):
    """Distances between templates: 1 - cosine, after subtracting the mean over all templates of a
    class, averaged over classes. (T, C, D) -> (T, T)."""
    centred = F.normalize(features - features.mean(dim=0), dim=-1)
    return 1 - torch.einsum("tcd,ucd->tu", centred, centred) / features.shape[1]


def clusters(distance, n):
    """Clusters T items into n groups by average linkage, merging the nearest two first. Returns
    lists of indices, ordered by their first index."""
    groups = [[i] for i in range(len(distance))]
    while len(groups) > n:
        pairs = [(a, b) for a in range(len(groups)) for b in range(a)]
        a, b = min(pairs, key=lambda p: distance[groups[p[0]]][:, groups[p[1]]].mean().item())
        groups[b] = sorted(groups[b] + groups.pop(a))
    return sorted(groups)


def silhouette(distance, groups):
    """How well groups are separated, from -1 to 1 (Rousseeuw 1987): the mean over all items of
    (b - a) / max(a, b), where a is the item's mean distance to its own group and b that to the
    nearest other group. An item alone in its group counts as 0."""
    total = 0.0
    for group in groups:
        for i in group if len(group) > 1 else []:
            a = distance[i, group].sum().item() / (len(group) - 1)
            b = min(distance[i, other].mean().item() for other in groups if other is not group)
            total += (b - a) / max(a, b, 1e-9)  # templates may be equal
    return total / len(distance)


def group_templates(templates, features, n_groups=0):
    """Clusters templates into groups, lists of strings, and prints them.

    features: (T, C, D), text features of all templates and classes. n_groups: number of groups; 0
    picks the number with the best silhouette. Raises BadInput for more groups than templates.
    """
    if n_groups > len(templates):
        raise BadInput(f"--n-groups {n_groups} is above the number of templates, {len(templates)}")
    distance = distances(features.cpu())
    sizes = [n_groups] if n_groups else range(2, len(templates))
    tries = [clusters(distance, n) for n in sizes] or [[[i] for i in range(len(templates))]]
    best = max(tries, key=lambda groups: silhouette(distance, groups) if len(groups) > 1 else 0)
    groups = [[templates[i] for i in group] for group in best]
    print("groups found: " + " | ".join(", ".join(group) for group in groups))
    return groups
