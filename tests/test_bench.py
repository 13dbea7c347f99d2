"""What tools/bench.py compares: ways that compute the same, and counts worked out by hand."""

import pytest
import torch

from tools import bench
from tools.measure import Operations
from tools.steps import Setting


@pytest.fixture(scope="module")
def setting():
    return Setting("shapes", torch.device("cpu"))


def test_all_ways_take_the_same_step(setting):
    start = {k: v.clone() for k, v in setting.model.state_dict().items()}
    setting.images = setting.images[:, :, :32, :32]
    ends = {}
    for name, (step, _) in setting.ways().items():
        setting.model.load_state_dict(start)
        setting.optimiser.state.clear()
        step()
        ends[name] = torch.cat([p.detach().flatten() for p in setting.model.parameters()])
    before = torch.cat([v.flatten() for v in start.values()])
    cached = ends.pop("images encoded once")
    del ends["straightforward"]  # its image features are other ones
    assert len(ends) == 5
    for end in ends.values():
        moved = (cached - before).abs().max()
        assert moved > 0 and (end - cached).abs().max() < 1e-4 * moved


def test_each_way_computes_fewer_tokens(setting):
    tokens = {name: n for name, (_, n) in setting.ways().items()}
    assert tokens["straightforward"] == 8 * 20 * 24  # 24 positions, this CLIP's
    assert tokens["stop at EOT"] == 8 * 20 * 11  # a low resolution photo of the x y: 6 + 2 + 3 ...
    assert tokens["shared beginnings"] < tokens["stop at EOT"] / 2


def test_operations_are_counted_by_shape():
    linear = torch.nn.Linear(5, 7)
    x = torch.randn(3, 5, requires_grad=True)
    with Operations() as counted:
        linear(x).sum().backward()
    # forward; gradients of x and of the weight
    shapes = {(3, 5, 7): 1, (3, 7, 5): 1, (7, 3, 5): 1}
    assert counted.products == {(*s, torch.float32): n for s, n in shapes.items()}
    assert counted.flop == 3 * 2 * 3 * 5 * 7
    with Operations() as counted:
        ((x.T + 1) * 2).reshape(-1)  # two that compute, the third copies, and views
    assert counted.launches == 3


def test_memory_of_a_step_is_what_it_adds():
    found = bench.in_fresh_process("memory('shapes', 'shared beginnings', 'cpu')")
    assert 0 < found["added_bytes"] < found["bytes"] / 2


def test_a_tables_figures_are_worked_out_from_seconds(monkeypatch, capsys):
    seconds = {"slow": 8.0, "fast": 2.0}
    monkeypatch.setattr(bench, "VITS", {"a ViT": (64, 2, 16, 4)})  # of 4 images at a time
    monkeypatch.setattr(bench, "image_ways", lambda *sizes: {way: way for way in seconds})
    monkeypatch.setattr(bench, "seconds", seconds.get)
    assert bench.images_table(3, None) == {"a ViT": {"slow": 2.0, "fast": 0.5}}
    said = capsys.readouterr().out
    assert "| slow | 2,000.0 | 1.00 x |" in said and "| fast | 500.0 | 4.00 x |" in said

    monkeypatch.setattr(bench, "in_fresh_process", lambda call, n: {1: 3.0, 2: 2.0}[n])
    bench.processes_table(1)
    assert "| 2 | 2,000 | 1.50 x |" in capsys.readouterr().out

    step = {"seconds": 7.2, "bytes": 5e9}
    monkeypatch.setattr(bench, "in_fresh_process", lambda call: step)
    bench.imagenet_table("cpu")
    assert "| 7.2 | 1.0 | 5.0 |" in capsys.readouterr().out  # 16,000 images, 32 at a time
