"""Baselines: the linear probe, and template groups found by clustering."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import unit

from lib import baselines
from lib.catalogue import all_templates, template_groups
from lib.clip_model import load_clip
from lib.world import SHAPES_CLASSES
from prompts import template_features


def test_a_probe_from_zero_shot_is_at_its_minimum_and_learns_no_bias():
    """c * sum of cross-entropies + |weight - start|^2 / 2: the gradients of both cancel."""
    features, labels, c, start = unit(60, 8), torch.arange(60) % 3, 5.0, 10 * unit(3, 8, seed=1)
    weight, bias = baselines.logistic_regression(features, labels, 3, c, start)
    residual = (features @ weight.T).softmax(-1) - F.one_hot(labels)
    assert (weight - start + c * residual.T @ features).abs().max() < 1e-3
    assert bias.abs().max() == 0


@pytest.mark.parametrize("best", [2.7, 1.3])  # above and below the nearest power of a hundred
def test_the_probes_strength_is_found_between_powers_of_a_hundred(monkeypatch, best):
    """In place of the regression, a probe that is right about what lies above d, the distance of
    log10(c) from the best. Validation images lie at 0 to 10."""

    def regression(features, labels, n_classes, c, start):
        return torch.tensor([[0.0], [1.0]]), torch.tensor([0, -abs(math.log10(c) - best)])

    def d(val_features):
        zeros, ones = torch.zeros(3), torch.ones(len(val_features))
        probe, _ = baselines.fit_probe("ab", zeros[:, None], val_features, zeros, ones)
        return -probe.bias[1].item()

    monkeypatch.setattr(baselines, "logistic_regression", regression)
    val_features = torch.linspace(0, 10, 1001)[:, None]
    assert d(val_features) < 0.01
    assert d(val_features + 100) == pytest.approx(6 - best)  # all are right: CoOp's first, 10^6


def test_templates_are_far_apart_by_what_they_do_not_share():
    """Three templates. What they share of either class is one of the first two axes. By the third,
    the first template is with the second in one class, with the last in the other."""
    shared = torch.tensor([[5.0, 0, 0], [0, 5.0, 0]])
    own = torch.tensor([[1.0, 1.0], [1.0, -2.0], [-2.0, 1.0]])
    distance = baselines.distances(shared + own[..., None] * torch.tensor([0, 0, 1.0]))
    expected = torch.tensor([[0, 1.0, 1], [1, 0, 2], [1, 2, 0]])  # 1 - cosine is 0 or 2
    assert torch.allclose(distance, expected, atol=1e-6)


def on_a_line(*points):
    """The distances between points."""
    points = torch.tensor(points)
    return (points[:, None] - points).abs()


def test_templates_are_merged_nearest_first_by_average_linkage():
    """The third is 5 and 3 away from the first two, 4 on average. Nearest neighbours would join it
    to them in both cases, furthest ones in neither."""
    assert baselines.clusters(on_a_line(0, 2, 5, 8.5), 2) == [[0, 1], [2, 3]]
    assert baselines.clusters(on_a_line(0, 2, 5, 9.5), 2) == [[0, 1, 2], [3]]


def test_silhouette_by_hand():
    found = baselines.silhouette(on_a_line(0.0, 2, 10, 14, 17), [[0, 1], [2, 3], [4]])
    # a: 2, 2, 4, 4; b: 12 and 10 to the second group, 7 and 3 to the last, which counts 0
    expected = ((12 - 2) / 12 + (10 - 2) / 10 + (7 - 4) / 7 + (3 - 4) / 4 + 0) / 5
    assert math.isclose(found, expected, rel_tol=1e-6)


def test_groups_are_found_where_there_are_some_and_a_single_one_if_asked_for():
    clip_model, _ = load_clip("bundled", "cpu")
    published = template_groups("shapes")
    templates = all_templates(published)
    features = template_features(clip_model, templates, SHAPES_CLASSES[:8])
    found = baselines.group_templates(templates, features)
    assert sorted(map(sorted, found)) == sorted(map(sorted, published))
    assert baselines.group_templates(templates, features, n_groups=1) == [templates]
