"""Loading a CLIP: every kind of file, and what is not one."""

import copy
import warnings
from pathlib import Path

import clip
import pytest
import torch
from clip.model import CLIP

from lib import clip_model
from lib.clip_model import load_clip
from lib.download import file_sha256
from lib.errors import BadInput


def check_weights(model, expected):
    """To the last bit: loading computes nothing."""
    found = model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name].float(), w.float()) for name, w in expected.items())
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert not model.training and not any(p.requires_grad for p in model.parameters())


def test_a_state_dict_in_fp32_keeps_every_bit(random_clip, random_clip_file):
    model, _ = load_clip(random_clip_file, "cpu")
    check_weights(model, random_clip.state_dict())


def known(file, monkeypatch):
    """From now on, a TorchScript archive counts as OpenAI's ViT-B/16."""
    monkeypatch.setattr(clip_model, "CLIP_CACHE", file.parent)
    url = f"https://openai.example/{file_sha256(file)}/{file.name}"
    monkeypatch.setitem(clip.clip._MODELS, "ViT-B/16", url)


def test_a_torchscript_archive_in_fp16_loads_as_fp32(random_clip, monkeypatch, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        inputs = torch.zeros(1, 3, 32, 32), torch.ones(1, 77, dtype=torch.long)
        archive = torch.jit.trace(copy.deepcopy(random_clip), inputs, check_trace=False)
        torch.jit.save(archive.half(), tmp_path / "archive.pt")
    known(tmp_path / "archive.pt", monkeypatch)
    model, fingerprint = load_clip("ViT-B/16", "cpu")
    rounded = {name: weight.half() for name, weight in random_clip.state_dict().items()}
    check_weights(model, rounded)
    # The same weights in another kind of file are the same CLIP.
    torch.save(rounded, tmp_path / "rounded.pt")
    assert load_clip(tmp_path / "rounded.pt", "cpu")[1] == fingerprint


class WritesAFile(torch.nn.Module):
    """A module whose TorchScript archive writes a file when it is opened."""

    @torch.jit.export
    def __getstate__(self) -> bool:
        return self.training

    @torch.jit.export
    def __setstate__(self, training: bool):
        self.training = training
        torch.save(torch.ones(1), "written")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("openais", [False, True])
def test_code_in_an_archive_runs_only_if_openai_wrote_it(openais, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    torch.jit.save(torch.jit.script(WritesAFile()), "archive.pt")
    reason = r"is a TorchScript archive.*torch.save\(torch.jit.load"
    if openais:
        known(tmp_path / "archive.pt", monkeypatch)
        reason = "is not a CLIP checkpoint"
    with pytest.raises(BadInput, match=reason):
        load_clip("archive.pt", "cpu")
    assert Path("written").exists() == openais


def test_a_resnet_clip_loads_and_encodes(tmp_path):
    resnet = CLIP(64, 64, (1, 1, 1, 1), 16, None, 77, 49408, 64, 1, 1)
    torch.save(resnet.state_dict(), tmp_path / "resnet.pt")
    model, _ = load_clip(tmp_path / "resnet.pt", "cpu")
    check_weights(model, resnet.state_dict())
    assert model.visual.input_resolution == 64
    assert model.encode_image(torch.randn(2, 3, 64, 64)).shape == (2, 64)


def test_other_weights_have_another_fingerprint(random_clip, random_clip_file, tmp_path):
    state = {k: v.clone() for k, v in random_clip.state_dict().items()}
    state["ln_final.bias"][0] += 1e-3
    torch.save(state, tmp_path / "other.pt")
    assert load_clip(tmp_path / "other.pt", "cpu")[1] != load_clip(random_clip_file, "cpu")[1]


def test_files_that_are_no_clip_are_refused_in_one_line(random_clip_file, tmp_path):
    whole = random_clip_file.read_bytes()
    (tmp_path / "text.pt").write_text("hello")
    (tmp_path / "cut.pt").write_bytes(whole[: len(whole) // 2])
    directory = whole.rindex(b"PK\x01\x02")  # the last entry of the archive's directory
    (tmp_path / "directory.pt").write_bytes(whole[:directory] + b"XXXX" + whole[directory + 4 :])
    (tmp_path / "newer.pt").write_bytes(whole[: directory + 6] + b"c" + whole[directory + 7 :])
    torch.save([1, 2], tmp_path / "list.pt")
    incomplete = torch.load(random_clip_file, weights_only=True)
    del incomplete["visual.ln_pre.weight"]
    torch.save(incomplete, tmp_path / "incomplete.pt")
    for file in tmp_path.glob("*.pt"):
        with pytest.raises(BadInput, match=f"{file.name} is not a CLIP checkpoint") as error:
            load_clip(file, "cpu")
        assert "\n" not in str(error.value)


def test_an_unknown_name_gets_the_nearest_one():
    with pytest.raises(BadInput, match="did you mean 'ViT-B/16'"):
        load_clip("ViT-B/61", "cpu")
