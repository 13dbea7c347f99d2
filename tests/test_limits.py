"""Where the machine ends, or a number does: one line that says what was being done."""

import contextlib
import json
import math
import os
import resource
import sys

import matplotlib
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import eval
import train
from lib import errors, features, files, pictures, runs, settings
from lib.baselines import group_templates
from lib.clip_model import TINY_CLIP
from lib.errors import BadInput
from prompts import PromptError

SHORT = "--shots 1 --epochs 2"

pytestmark = pytest.mark.usefixtures("small_world")


@contextlib.contextmanager
def disk_that_holds(size):
    """No file can grow longer than that many bytes: a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def files_of(folder):
    return sorted(file.name for file in folder.iterdir())


# ------------------------------------------------------------------------------ what is for show


def test_neither_a_notebooks_backend_nor_a_docstring_is_needed(monkeypatch):
    """Colab and Jupyter name a backend for every command; Python may have dropped docstrings."""
    monkeypatch.setenv("MPLBACKEND", "not_installed")
    errors.exit_on_bad_input(settings.Parser(None).format_help)
    assert "MPLBACKEND" not in os.environ


def test_pictures_know_nothing_of_the_users_settings_nor_of_formulas(tmp_path):
    result = {"dataset": "d", "classes": "all", "prompt_usage": {"{}": 1.0}, "n_prompts": 1}
    result["router"] = {"rows": ["cat", "from $5 to $$ \\frac$"], "share": [[1.0], [1.0]]}
    with matplotlib.rc_context({"savefig.facecolor": "red", "text.usetex": True}):
        pictures.router_picture(result, tmp_path / "router.png")
        assert matplotlib.rcParams["savefig.facecolor"] == "red"
    assert np.asarray(Image.open(tmp_path / "router.png"))[0, 0].tolist() == [255] * 4


@pytest.mark.parametrize("reason", ["no matplotlib", "File too large"])
def test_a_picture_that_fails_is_a_line(
    reason, run_train, run_eval, small, tmp_path, monkeypatch, capsys
):
    save = pictures.save_figure

    def failing(*arguments, **options):
        with disk_that_holds(100):
            save(*arguments, **options)

    monkeypatch.setattr(pictures, "save_figure", failing)
    if reason == "no matplotlib":
        monkeypatch.setitem(sys.modules, "matplotlib", None)  # the import fails
    result = run_train(f"{small} {SHORT}")
    assert files_of(tmp_path / "run") == ["checkpoint.pt", "result.json"]
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("the router's picture is missing: cannot ")
    assert reason.removeprefix("no ") in line

    status, _, errors = run_eval(tmp_path / "run")
    again = json.loads((tmp_path / "run/eval_eurosat_all.json").read_text())
    assert status == 0 and again["accuracy"] == result["accuracy"]
    missing = [line.split(" is missing: ")[0] for line in errors]
    assert missing == ["the sheet of samples", "the router's picture"]


# ------------------------------------------------------------------------------------- the disk


def test_a_full_disk_is_named_and_what_was_saved_stays(run_train, small, own_run):
    before = {file.name: file.read_bytes() for file in own_run.iterdir()}
    said = "resume.pt: File too large: make room there and continue with --resume"
    with disk_that_holds(2000), pytest.raises(BadInput, match=said):
        run_train(f"{small} {SHORT}")
    for name, *contents in (
        ("checkpoint.pt", {"model": torch.zeros(6000)}, {"config": {}}),
        ("result.json", {}, {"config": {}, "text": 1000 * "long "}),
    ):
        with disk_that_holds(2000), pytest.raises(BadInput, match=f"cannot write .*run/{name}: F"):
            runs.publish(own_run, *contents, defaults={}, draw=lambda path: None)
    assert {file.name: file.read_bytes() for file in own_run.iterdir()} == before


# ----------------------------------------------------------------------------------- the memory

NO_MEMORY = (
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory",
    "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has",
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
)
WHERE = {"compute_losses": train, "template_features": train, "encode_images": features}


@pytest.mark.parametrize("name", WHERE)
def test_memory_that_runs_out_is_a_line(name, small, monkeypatch, tmp_path, capsys):
    def fail(*arguments, **options):
        raise MemoryError

    monkeypatch.setattr(features, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(WHERE[name], name, fail)
    words = *small.split(), *SHORT.split(), "--out", str(tmp_path / "run")
    monkeypatch.setattr(sys, "argv", ["train.py", *words])
    with pytest.raises(SystemExit) as end:
        train.main()
    assert end.value.code == 2 and not (tmp_path / "run").exists()
    said = "out of memory: try a smaller --chunk or --batch-size, or another --device"
    assert capsys.readouterr().err == f"{said}\n"


def test_a_lack_of_memory_is_known_by_its_words():
    assert all(errors.out_of_memory(RuntimeError(words)) for words in NO_MEMORY)


def test_another_error_keeps_its_traceback():
    def fail():
        raise RuntimeError("size mismatch")

    with pytest.raises(RuntimeError, match="size mismatch"):
        errors.exit_on_bad_input(fail)


def test_a_lack_of_memory_is_not_taken_for_a_damaged_checkpoint(own_run, monkeypatch):
    def fail(*arguments, **options):
        raise MemoryError

    for place, name in ((files.torch, "load"), (eval, "make_model")):
        with monkeypatch.context() as patch:
            patch.setattr(place, name, fail)
            with pytest.raises(MemoryError):
                eval.load_run(own_run)


# ----------------------------------------------------------------------------------- the numbers


TEXT = "CLIP's text features are not finite numbers"
IMAGE = "test/blue ring/photo/000 are not finite numbers"
SCALE = "the scale of the logits should be finite and not 0"


@pytest.mark.parametrize(
    "key, value, flags, said",
    [
        ("text_projection", math.nan, SHORT, TEXT),
        ("text_projection", 0.0, SHORT, TEXT),
        ("text_projection", 1e30, SHORT, TEXT),  # so long that float32 knows no length of them
        ("visual.proj", 0.0, SHORT, IMAGE),
        ("visual.proj", 1e30, SHORT, IMAGE),
        ("visual.proj", 1e30, "--method linear", IMAGE),
        ("logit_scale", 100.0, SHORT, SCALE),  # 100 itself instead of its logarithm
        ("logit_scale", -200.0, SHORT, SCALE),
    ],
)
def test_a_clip_without_directions_or_a_scale_is_refused(
    key, value, flags, said, run_train, tmp_path
):
    state = torch.load(TINY_CLIP, weights_only=True)
    state[key] = torch.full_like(state[key].float(), value)
    torch.save(state, tmp_path / "clip.pt")
    with pytest.raises((BadInput, PromptError), match=said):
        run_train(f"--clip {tmp_path / 'clip.pt'} {flags}")


def test_logits_that_are_not_finite_are_no_answers(own_run, run_eval, tmp_path):
    """They were the first class: 5 % of twenty."""
    file = own_run / "checkpoint.pt"
    checkpoint = torch.load(file, weights_only=True)
    checkpoint["model"]["prompts.context_before.0"][0, 0] = math.nan
    torch.save(checkpoint, file)
    Image.new("RGB", (32, 32)).save(tmp_path / "photo.png")
    for words in ([], ["--images", tmp_path / "photo.png"]):
        status, lines, errors = run_eval(own_run, *words)
        assert (status, len(errors)) == (2, 1) and "the logits should be finite" in errors[0]
        assert not any("%" in line for line in lines)
    assert files_of(own_run) == ["checkpoint.pt", "result.json", "router.png"]


def test_equal_templates_can_be_clustered():
    """Their distance is 0, and the silhouette divides by distances."""
    features = F.normalize(torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(0)), dim=-1)
    features = features[[0, 0, 0, 1, 2]]
    assert group_templates(list("aaabc"), features)[0] == ["a", "a", "a"]
