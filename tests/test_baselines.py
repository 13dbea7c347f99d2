"""Baselines: the linear probe, and template groups found by clustering."""

import json
import math

import torch
import torch.nn.functional as F
from conftest import HERE, unit

from lib import baselines
from lib.baselines import fit_probe, logistic_regression
from lib.catalogue import all_templates, template_groups
from lib.clip_model import load_clip
from lib.world import SHAPES_CLASSES
from prompts import template_features


def test_the_linear_probe_is_scikit_learns():
    """`scikit_learn.json` holds scikit-learn's own answers on these features."""
    i, j = torch.arange(1.0, 91, dtype=torch.float64), torch.arange(1.0, 17, dtype=torch.float64)
    features, labels = F.normalize(torch.sin(i[:, None] * j**1.5), dim=-1), torch.arange(90) % 3
    features[labels == 1, 0] += 0.5
    answers = json.loads((HERE / "scikit_learn.json").read_text())["answers"]
    assert [answer["C"] for answer in answers] == [0.1, 10.0, 1000.0]
    for answer in answers:
        weight, bias = logistic_regression(features, labels, 3, answer["C"])
        expected = torch.tensor(answer["coef"])
        assert (weight - expected).abs().max() <= 1e-3 * expected.abs().max()
        intercept = torch.tensor(answer["intercept"])
        assert torch.allclose(bias - bias.mean(), intercept, atol=1e-3, rtol=1e-3)


def test_a_probe_from_zero_shot_is_at_its_minimum_and_learns_no_bias():
    """c * sum of cross-entropies + |weight - start|^2 / 2: the gradients of both cancel."""
    features, labels, c, start = unit(60, 8), torch.arange(60) % 3, 5.0, 10 * unit(3, 8, seed=1)
    weight, bias = logistic_regression(features, labels, 3, c, start)
    residual = (features @ weight.T).softmax(-1) - F.one_hot(labels)
    assert (weight - start + c * residual.T @ features).abs().max() < 1e-3
    assert bias.abs().max() == 0 and (weight - start).abs().max() > 0.1
    weight, _ = logistic_regression(features, labels, 3, 1e-9, start)
    assert torch.allclose(weight, start, atol=1e-4)  # few or weak images: zero-shot as it is


def test_the_probes_strength_is_found_between_powers_of_a_hundred(monkeypatch):
    """Of validation images at 0 to 10, a probe of strength c gets right what lies above the
    distance of log10(c) from the best."""

    def regression(features, labels, n_classes, c, start):
        assert features is train_features and labels is train_labels and n_classes == 2
        return c * torch.tensor([[0.0], [1.0]]), c * torch.tensor([0, -abs(math.log10(c) - best)])

    def strength(val_features):
        probe, _ = fit_probe("ab", train_features, val_features, train_labels, ones)
        return probe.weight[1].item()

    monkeypatch.setattr(baselines, "logistic_regression", regression)
    train_features, train_labels = torch.zeros(3, 1), torch.zeros(3, dtype=torch.long)
    val_features, ones = torch.linspace(0, 10, 1001)[:, None], torch.ones(1001, dtype=torch.long)
    for best in (2.7, 1.3):  # above and below the nearest power of a hundred
        assert abs(math.log10(strength(val_features)) - best) < 0.01
    assert strength(val_features + 100) == 10.0**6  # all are equally good: CoOp's first


def test_templates_are_merged_nearest_first_by_average_linkage():
    """From 0 and 1, which come first, thing 2 is 1 and 5 away: 3 on average. Nearest neighbours
    would join it to them at any rate, furthest ones only if thing 3 were 5 away."""

    def groups(from_2_to_3):
        distance = torch.full((4, 4), 10.0)
        for i, j, d in ((0, 1, 0.1), (0, 2, 1.0), (1, 2, 5.0), (2, 3, from_2_to_3)):
            distance[i, j] = distance[j, i] = d
        return baselines.clusters(distance, 2)

    assert groups(2.5) == [[0, 1], [2, 3]]
    assert groups(4.0) == [[0, 1, 2], [3]]


def test_templates_are_far_apart_by_what_they_do_not_share():
    """Two classes, whose own directions all templates share, and three templates."""
    own = torch.tensor([[3.0, 0, 0, 0], [0, 3.0, 0, 0]])
    of_template = torch.tensor([[0, 0, 1.0, 0.2], [0, 0, 1.0, -0.2], [0, 0, -1.0, 0]])
    features = F.normalize(own + of_template[:, None], dim=-1)
    distance = baselines.distances(features)
    centred = features - (features[0] + features[1] + features[2]) / 3
    cosine = F.cosine_similarity(centred[0], centred[2], dim=-1).mean()
    assert math.isclose(distance[0, 2], 1 - cosine, rel_tol=1e-5)
    assert distance[0, 1] < 0.2 and cosine < -0.5


def test_silhouette_by_hand():
    points = torch.tensor([0.0, 2.0, 10.0, 14.0])
    distance = (points[:, None] - points).abs()
    # a: 2, 2, 4, 4; b: mean of 10 and 14, of 8 and 12, of 10 and 8, of 14 and 12
    expected = (10 / 12 + 8 / 10 + 5 / 9 + 9 / 13) / 4
    assert math.isclose(baselines.silhouette(distance, [[0, 1], [2, 3]]), expected, rel_tol=1e-6)
    # The third is alone and counts 0; a of the others: 8, 7, 13; b: 10, 8, 4
    expected = ((10 - 8) / 10 + (8 - 7) / 8 + (4 - 13) / 13) / 4
    assert math.isclose(baselines.silhouette(distance, [[0, 1, 3], [2]]), expected, rel_tol=1e-6)


def test_groups_are_found_where_there_are_some_and_a_single_one_if_asked_for():
    model, _ = load_clip("bundled", torch.device("cpu"))
    templates = all_templates(template_groups("shapes"))
    features = template_features(model, templates, SHAPES_CLASSES[:8])
    found = baselines.group_templates(templates, features)
    assert sorted(map(sorted, found)) == sorted(map(sorted, template_groups("shapes")))
    assert baselines.group_templates(templates, features, n_groups=1) == [templates]
