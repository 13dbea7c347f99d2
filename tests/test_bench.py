"""The bench compares ways that compute the same; what it counts is worked out by hand."""

import pytest
import torch

from lib import world
from tools.bench import STEPS, Operations, Step, clip_of


@pytest.fixture(scope="module")
def steps():
    clip_model = clip_of("shapes", torch.device("cpu"))
    return {name: Step(name, "shapes", clip_model, world.SHAPES_CLASSES) for name in STEPS}


def test_all_rows_take_the_same_step(steps):
    moved = {}
    for name, (_, method, live) in STEPS.items():
        if method == "mocoop" and not live:
            parameters = list(steps[name].model.parameters())
            start = torch.cat([p.detach().flatten() for p in parameters])
            steps[name]()
            moved[name] = torch.cat([p.detach().flatten() for p in parameters]) - start
    expected = moved.pop("images encoded once")
    assert expected.abs().max() > 0 and len(moved) == 5
    for change in moved.values():
        assert (change - expected).abs().max() < 1e-4 * expected.abs().max()


def test_each_row_computes_fewer_tokens(steps):
    tokens = {name: step.n_tokens() for name, step in steps.items()}
    assert tokens["straightforward"] == 8 * 20 * 24  # 24 positions, this CLIP's
    # SOS a low resolution photo of the red ring EOT
    assert tokens["stop at EOT"] == tokens["attention in one kernel"] == 8 * 20 * 11
    assert tokens["each node once"] < tokens["shared beginnings"] < tokens["stop at EOT"] / 2
    assert tokens["CoOp, one prompt, 77 positions, images encoded once"] == 20 * 24


def test_operations_are_counted_by_shape():
    linear = torch.nn.Linear(5, 7)
    x = torch.randn(3, 5, requires_grad=True)
    with Operations() as counted:
        linear(x).sum().backward()
    # forward; gradients of x and of the weight
    shapes = {(3, 5, 7): 1, (3, 7, 5): 1, (7, 3, 5): 1}
    assert counted.products == {(*s, torch.float32): n for s, n in shapes.items()}
    assert counted.flop() == 3 * 2 * 3 * 5 * 7
    with Operations() as counted:
        ((x.T + 1) * 2).reshape(-1)  # two that compute, the third copies, and views
    assert counted.launches == 3
