"""Other people's CLIPs: state dicts inside checkpoints, and files that cannot be read."""

import pytest
import torch

from lib.clip_model import load_clip
from lib.errors import BadInput


@pytest.fixture
def state(random_clip):
    return dict(random_clip.state_dict())


def renamed(state, prefix):
    return {f"{prefix}{name}": value for name, value in state.items()}


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: {"state_dict": s, "epoch": 3, "optimizer": {"state": {0: {"step": 1}}}},
        lambda s: {"model": renamed(s, "module.clip_model."), "args": None},
        lambda s: renamed(s, "model.") | {"head.weight": torch.ones(2)},
        lambda s: {name: torch.nn.Parameter(weight) for name, weight in s.items()},
    ],
)
def test_a_clip_is_found_in_a_checkpoint(wrap, state, random_clip_file, tmp_path):
    torch.save(wrap(state), tmp_path / "clip.pt")
    model, fingerprint = load_clip(tmp_path / "clip.pt", "cpu")
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert fingerprint == load_clip(random_clip_file, "cpu")[1]


def without(state, part):
    return {name: value for name, value in state.items() if part not in name}


@pytest.mark.parametrize(
    "content, reason",
    [
        (lambda s: without(s, "token_embedding"), "has 0 parameters named token_embedding.weight"),
        (lambda s: renamed(s, "model.") | renamed(s, "ema."), "has 2 parameters"),
        (lambda s: without(s, "visual."), "visual"),
        (lambda s: s | {"visual.lora_a": torch.ones(2)}, "visual.lora_a"),
        (lambda s: s | {"visual.conv1.weight": torch.ones(0, 3, 0, 0)}, "negative power"),
        (lambda s: s | {"token_embedding.weight": torch.ones(250002, 64)}, "vocabulary"),
        (lambda s: torch.nn.Linear(2, 2), "CLIP checkpoint"),  # Python objects, not weights
    ],
)
def test_what_is_not_one_clip_is_refused_with_what_can_be_read(content, reason, state, tmp_path):
    torch.save(content(state), tmp_path / "clip.pt")
    with pytest.raises(BadInput, match=f"clip.pt is not a .*{reason}.*expected a file") as error:
        load_clip(tmp_path / "clip.pt", "cpu")
    assert "\n" not in str(error.value)
