"""`--groups auto`: template groups found by clustering instead of by hand.

Two templates are alike if CLIP's text encoder says so: their features with the same class name,
compared for every class. Groups are merged pair by pair, nearest first (average linkage), and the
number of groups is the one with the best silhouette, or the one that was asked for.
"""

import torch

from lib.errors import BadInput


def distances(features):
    """How unlike templates are: 1 - cosine, after taking out what all templates of a class share,
    averaged over classes. (T, C, D) -> (T, T)."""
    centred = features - features.mean(dim=0)
    centred = torch.nn.functional.normalize(centred, dim=-1)
    return 1 - torch.einsum("tcd,ucd->tu", centred, centred) / features.shape[1]


def clusters(distance, n):
    """T things in n groups by average linkage: lists of indices, in the order of their firsts."""
    groups = [[i] for i in range(len(distance))]
    while len(groups) > n:
        pairs = [(a, b) for a in range(len(groups)) for b in range(a)]
        a, b = min(pairs, key=lambda p: distance[groups[p[0]]][:, groups[p[1]]].mean().item())
        groups[b] = sorted(groups[b] + groups.pop(a))
    return sorted(groups)


def silhouette(distance, groups):
    """How well groups are set apart, from -1 to 1 (Rousseeuw 1987): the mean over all things of
    (b - a) / max(a, b), with a the mean distance to its own group and b to the nearest other. A
    thing alone in its group counts 0."""
    scores = []
    for group in groups:
        for i in group:
            others = [distance[i, other].mean().item() for other in groups if other is not group]
            if len(group) == 1:
                scores.append(0.0)
                continue
            a = distance[i, group].sum().item() / (len(group) - 1)
            scores.append((min(others) - a) / max(min(others), a))
    return sum(scores) / len(scores)


def group_templates(templates, features, n_groups=0):
    """The templates in groups: lists of strings. Prints them.

    features: (T, C, D) from `prompts.template_features`. n_groups: how many; 0: as many as give
    the best silhouette. Raises BadInput for more groups than templates.
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
