"""Other people's CLIPs: state dicts inside checkpoints, and files of other libraries."""

import json
import struct

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
        lambda s: {"checkpoint": {"model_state_dict": s}},
        lambda s: {"state_dict": renamed(s, "module.clip_model.")},
        lambda s: renamed(s, "model.") | {"head.weight": torch.ones(2)},
    ],
)
def test_a_clip_is_found_wherever_it_lies_in_a_checkpoint(wrap, state, random_clip_file, tmp_path):
    torch.save(wrap(state), tmp_path / "clip.pt")
    model, fingerprint = load_clip(tmp_path / "clip.pt", "cpu")
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert fingerprint == load_clip(random_clip_file, "cpu")[1]


HUGGING_FACE = {
    "text_model.embeddings.token_embedding.weight": torch.ones(2, 2),
    "text_model.encoder.layers.0.layer_norm1.weight": torch.ones(2),
    "vision_model.embeddings.class_embedding": torch.ones(2),
    "visual_projection.weight": torch.ones(2, 2),
}
TIMM = {"patch_embed.proj.weight": torch.ones(2), "blocks.0.attn.qkv.weight": torch.ones(2)}


@pytest.mark.parametrize(
    "content, said",
    [
        ({"model": renamed(HUGGING_FACE, "clip.")}, "Hugging Face"),
        (renamed(TIMM, "visual.trunk.") | {"text.token_embedding.weight": torch.ones(2)}, "timm"),
        ({"state_dict": {"ctx": torch.ones(2), "token_suffix": torch.ones(2)}}, "CoOp's prompts"),
        ({"weight": torch.ones(2)}, "lacks an image or a text encoder"),
    ],
)
def test_weights_of_other_libraries_are_named(content, said, tmp_path):
    torch.save(content, tmp_path / "clip.pt")
    with pytest.raises(BadInput, match=f"clip.pt is not a CLIP checkpoint: .*{said}"):
        load_clip(tmp_path / "clip.pt", "cpu")


def test_what_is_more_or_other_than_one_clip_is_refused(state, tmp_path):
    for content, said in (
        (renamed(state, "model.") | renamed(state, "ema."), "several CLIPs"),
        (state | {"visual.lora_a": torch.ones(2)}, "visual.lora_a"),
        (state | {"token_embedding.weight": torch.ones(250002, 64)}, "vocabulary"),
    ):
        torch.save(content, tmp_path / "clip.pt")
        with pytest.raises(BadInput, match=f"is not a CLIP checkpoint: .*{said}"):
            load_clip(tmp_path / "clip.pt", "cpu")


def safetensors(state, file):
    """As the format's description has it: a length, a header in JSON, bytes."""
    header = {"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + bytes(4))


def older(state, file):
    torch.save(state, file, _use_new_zipfile_serialization=False)


def git_lfs(state, file):
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")


@pytest.mark.parametrize(
    "write, said",
    [
        (safetensors, "safetensors"),
        (older, "PyTorch before 1.6"),
        (git_lfs, "Git LFS"),
        (lambda state, file: torch.save(torch.nn.Linear(2, 2), file), "Python objects"),
    ],
)
def test_files_of_another_kind_are_told_apart(write, said, state, tmp_path):
    write(state, tmp_path / "clip.pt")
    with pytest.raises(BadInput, match=f"is not a CLIP checkpoint but .*{said}") as error:
        load_clip(tmp_path / "clip.pt", "cpu")
    assert "damaged" not in str(error.value) and "\n" not in str(error.value)
