"""Where the machine ends, or a number does: one line that says what was being done."""

import contextlib
import json
import math
import os
import resource
import subprocess
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import eval
import train
from lib import features, report, runs
from lib.baselines import group_templates
from lib.clip_model import TINY_CLIP
from lib.runs import BadInput
from prompts import PromptError

ROOT = Path(__file__).parents[1]
SHORT = "--shots 1 --epochs 2"


@contextlib.contextmanager
def disk_that_holds(size):
    """No file can grow longer than that many bytes: a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def call(before, *words, **environment):
    """train.py in a process of its own, after some Python: (exit status, lines of errors)."""
    program = (
        f"import os, runpy, sys\n{before}\nsys.argv = sys.argv[1:]\n"
        "sys.path.insert(0, os.path.dirname(sys.argv[0]))\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    variables = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    command = [sys.executable, "-c", program, ROOT / "train.py", *words]
    done = subprocess.run(command, env=variables, capture_output=True, text=True)
    return done.returncode, done.stderr.splitlines()


def files_of(folder):
    return sorted(file.name for file in folder.iterdir())


# ------------------------------------------------------------------------------ what is for show


def test_a_notebooks_backend_is_not_needed(tmp_path, cache):
    """Colab and Jupyter name one in the environment of every command."""
    variables = {"MPLBACKEND": "not_installed", "XDG_CACHE_HOME": str(cache)}
    variables["PYTHONOPTIMIZE"] = "2"  # and Python may have dropped all docstrings
    status, errors = call("", *SHORT.split(), "--out", tmp_path / "run", **variables)
    assert status == 0 and not any("missing" in line for line in errors)
    assert "router.png" in files_of(tmp_path / "run")


def test_pictures_know_nothing_of_the_users_settings(tmp_path):
    result = {"dataset": "d", "classes": "all", "prompt_usage": {"{}": 1.0}}
    result["router"] = {"rows": ["cat", "dog"], "share": [[1.0], [1.0]]}
    with matplotlib.rc_context({"savefig.facecolor": "red", "text.usetex": True}):
        report.router_picture(result, tmp_path / "router.png")
        assert matplotlib.rcParams["savefig.facecolor"] == "red"
    assert np.asarray(Image.open(tmp_path / "router.png"))[0, 0].tolist() == [255] * 4


@pytest.mark.parametrize("reason", ["no matplotlib", "File too large", "any mistake"])
def test_a_picture_that_fails_is_a_line(reason, run_train, run_eval, tmp_path, monkeypatch, capsys):
    save = report.save_figure

    def failing(*arguments, **options):
        if reason == "any mistake":
            raise KeyError(reason)
        with disk_that_holds(100):
            save(*arguments, **options)

    monkeypatch.setattr(report, "save_figure", failing)
    if reason == "no matplotlib":
        monkeypatch.setitem(sys.modules, "matplotlib", None)  # the import fails
    result = run_train(SHORT)
    said = capsys.readouterr()
    assert files_of(tmp_path / "run") == ["checkpoint.pt", "result.json"]
    assert said.out.endswith(f"saved in {tmp_path / 'run'}: checkpoint.pt, result.json\n")
    (line,) = said.err.splitlines()
    assert line.startswith("the router's picture is missing: cannot draw: ")
    assert reason.removeprefix("no ") in line

    status, lines, errors = run_eval(tmp_path / "run")
    again = json.loads((tmp_path / "run/eval_shapes_all.json").read_text())
    assert status == 0 and again["accuracy"] == result["accuracy"]
    assert lines[-1] == f"saved in {tmp_path / 'run'}: eval_shapes_all.json"
    missing = [line.split(" is missing: ")[0] for line in errors]
    assert missing == ["the sheet of samples", "the router's picture"]


def test_where_pictures_are_wanted_a_failure_is_an_error(
    run_train, run_eval, tmp_path, monkeypatch
):
    run_train("--shots 1")
    monkeypatch.setattr(report, "new_figure", lambda *size, **options: {}["no figure"])
    status, lines, errors = run_eval("--plots", tmp_path)
    assert (status, lines, errors) == (2, [], ["cannot draw: 'no figure'"])


def test_a_folder_among_a_runs_files_does_not_cost_the_run(run_train, tmp_path):
    """One whose name is that of an old run's files, which are removed."""
    run_train(SHORT)
    (tmp_path / "run/eval_notes").mkdir()
    (tmp_path / "run/router.png").unlink()
    (tmp_path / "run/router.png").mkdir()
    run_train(SHORT)
    assert files_of(tmp_path / "run") == [
        "checkpoint.pt", "eval_notes", "result.json", "router.png"
    ]  # fmt: skip


@pytest.mark.slow
def test_without_a_terminal_nothing_is_shown_and_all_is_computed(tmp_path, cache):
    """Standard error may be closed, and progress bars write to it."""
    words = *SHORT.split(), "--out", tmp_path / "run"
    assert call("sys.stderr = None", *words, XDG_CACHE_HOME=str(cache))[0] == 0
    assert "result.json" in files_of(tmp_path / "run")


# ------------------------------------------------------------------------------------- the disk


def test_a_full_disk_is_named_and_what_was_saved_stays(run_train, tmp_path):
    run_train(SHORT)
    before = {f: (tmp_path / "run" / f).read_bytes() for f in ("checkpoint.pt", "result.json")}
    said = r"resume.pt: File too large: make room there and continue with --resume, or choose .*out"
    with disk_that_holds(50_000), pytest.raises(BadInput, match=said):
        run_train(SHORT)
    assert files_of(tmp_path / "run") == ["checkpoint.pt", "result.json", "router.png"]
    for name, size in (("checkpoint.pt", 20_000), ("result.json", 2_000)):
        contents = {"model": torch.zeros(6000 if size == 20_000 else 0)}, {"text": 1000 * "long "}
        with disk_that_holds(size), pytest.raises(BadInput, match=f"cannot write .*run/{name}: F"):
            runs.publish(tmp_path / "run", *contents)
        with disk_that_holds(size), pytest.raises(BadInput, match="eval_x.json: File too large"):
            runs.save_json("x" * size, tmp_path / "run/eval_x.json")
    assert {f: (tmp_path / "run" / f).read_bytes() for f in before} == before
    assert files_of(tmp_path / "run") == ["checkpoint.pt", "result.json", "router.png"]


@pytest.mark.slow
def test_a_run_that_met_a_full_disk_goes_on_when_there_is_room(run_train, tmp_path, monkeypatch):
    whole = run_train(f"{SHORT} --out {tmp_path / 'whole'}")
    save, saved = runs.save_torch, []

    def second_time(content, path):
        saved.append(path)
        with disk_that_holds(1000) if len(saved) == 2 else contextlib.nullcontext():
            save(content, path)

    monkeypatch.setattr(runs, "save_torch", second_time)
    with pytest.raises(BadInput, match="File too large"):
        run_train(SHORT)
    assert files_of(tmp_path / "run") == ["resume.pt"]
    again = run_train(f"{SHORT} --resume")
    assert again["per_class_accuracy"] == whole["per_class_accuracy"]


def test_features_that_cannot_be_cached_cost_no_run(run_train, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(features, "CACHE", tmp_path / "cache")
    with disk_that_holds(90_000):
        run_train(SHORT)
    assert "features are not cached: cannot write" in capsys.readouterr().out


# ----------------------------------------------------------------------------------- the memory

NO_MEMORY = [
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate"
                 " memory: you tried to allocate 7864320 bytes. Error code 12"),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has"),
    RuntimeError("CUDA error: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
]  # fmt: skip
WHERE = {
    "training": (train, "compute_losses", "a smaller --chunk or --batch-size"),
    "reading templates": (train, "template_features", "a smaller --chunk"),
    "encoding images": (features, "encode_images", "another --device"),
    "computing": (train, "load_clip", "another --device"),
}


@pytest.mark.parametrize(
    "what, error",
    [*((what, MemoryError()) for what in WHERE), *(("training", error) for error in NO_MEMORY)],
)
def test_memory_that_runs_out_is_a_line(what, error, monkeypatch, tmp_path, capsys):
    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr(features, "CACHE", tmp_path / "cache")
    place, name, way_out = WHERE[what]
    if what != "encoding images":  # by itself that takes a second
        monkeypatch.setattr(features, "encode_images", lambda m, x, d: torch.ones(len(x), 128))
    monkeypatch.setattr(place, name, fail)
    monkeypatch.setattr(sys, "argv", ["train.py", *SHORT.split(), "--out", str(tmp_path / "run")])
    with pytest.raises(SystemExit) as end:
        train.main()
    assert end.value.code == 2 and not (tmp_path / "run").exists()
    assert capsys.readouterr().err == f"out of memory while {what}: try {way_out}\n"


def test_other_errors_are_not_taken_for_a_lack_of_memory():
    with pytest.raises(RuntimeError, match="size mismatch"), runs.doing("x", "y"):
        raise RuntimeError("size mismatch")


@pytest.mark.slow
def test_memory_that_really_ends_in_training_is_a_line(tmp_path, cache):
    """The process may take 4 MB more than it has when training begins."""
    program = (
        f"import resource, sys; sys.path.insert(0, {str(ROOT)!r}); import train\n"
        "fit = train.fit\n"
        "def limited(*arguments):\n"
        "    size = int(open('/proc/self/statm').read().split()[0]) * 4096\n"
        "    resource.setrlimit(resource.RLIMIT_AS, (size + 2**22, size + 2**22))\n"
        "    return fit(*arguments)\n"
        "train.fit = limited\n"
        "train.main()"
    )
    words = "--dataset", "shapes_many", *SHORT.split(), "--text-encoder", "plain"
    command = [sys.executable, "-c", program, *words, "--out", tmp_path / "run"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(cache)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    expected = "out of memory while training: try a smaller --chunk or --batch-size\n"
    assert (done.returncode, done.stderr) == (2, expected)
    assert not (tmp_path / "run").exists()


def test_a_lack_of_memory_is_not_taken_for_damage(run_train, tmp_path, monkeypatch):
    """Cached features would be deleted, a checkpoint called damaged."""
    monkeypatch.setattr(features, "CACHE", tmp_path / "cache")
    run_train(SHORT)
    shards = list((tmp_path / "cache").rglob("*.npz"))

    def fail(*arguments, **options):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(features.np, "load", fail)
        with pytest.raises(MemoryError):
            run_train(SHORT)
    assert list((tmp_path / "cache").rglob("*.npz")) == shards
    for place, name in ((runs.torch, "load"), (eval, "make_model")):
        with monkeypatch.context() as patch:
            patch.setattr(place, name, fail)
            with pytest.raises(MemoryError):
                eval.load_run(tmp_path / "run")


# ----------------------------------------------------------------------------------- the numbers


@pytest.fixture
def spoiled(tmp_path):
    """`spoiled(key, value)` is a file of the built-in CLIP with that in all of one tensor."""

    def spoil(key, value):
        state = torch.load(TINY_CLIP, weights_only=True)
        state[key] = torch.full_like(state[key].float(), value)
        torch.save(state, tmp_path / "spoiled.pt")
        return tmp_path / "spoiled.pt"

    return spoil


@pytest.mark.parametrize("value", [math.nan, math.inf, 0.0, 1e30])
def test_text_features_without_a_direction_are_refused(value, spoiled, run_train):
    """Not finite, all 0, or so long that float32 knows no length of them."""
    file = spoiled("text_projection", value)
    with pytest.raises(PromptError, match="CLIP's text features are not finite numbers"):
        run_train(f"--clip {file}")


@pytest.mark.parametrize("value", [math.nan, math.inf, 0.0, 1e30])
@pytest.mark.parametrize("raw", [False, True])
def test_image_features_without_a_direction_are_refused(value, raw, spoiled, run_train):
    method = "--method linear" if raw else SHORT
    with pytest.raises(BadInput, match="test/blue ring/photo/000 are not finite numbers"):
        run_train(f"--clip {spoiled('visual.proj', value)} {method}")


@pytest.mark.parametrize("value", [100.0, math.nan, -200.0])
def test_a_logit_scale_that_is_no_factor_is_refused(value, spoiled, run_train):
    """100 itself instead of its logarithm, for example."""
    file = spoiled("logit_scale", value)
    with pytest.raises(BadInput, match="the scale of the logits should be finite and not 0"):
        run_train(f"--clip {file}")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_not_finite_are_no_answers(value, run_train, run_eval, tmp_path):
    """They were the first class: 5 % of twenty."""
    run_train(SHORT)
    file = tmp_path / "run/checkpoint.pt"
    checkpoint = torch.load(file, weights_only=True)
    checkpoint["model"]["prompts.context_before.0"][0, 0] = value
    torch.save(checkpoint, file)
    Image.new("RGB", (32, 32)).save(tmp_path / "photo.png")
    for words in ([], ["--images", tmp_path / "photo.png"]):
        status, lines, errors = run_eval(tmp_path / "run", *words)
        assert (status, errors) == (
            2, ["the logits should be finite and not 0: are the weights damaged?"]
        )  # fmt: skip
        assert not any("%" in line for line in lines)
    assert files_of(tmp_path / "run") == ["checkpoint.pt", "result.json", "router.png"]


def test_equal_templates_can_be_clustered():
    """Their distance is 0, and the silhouette divides by distances."""
    features = F.normalize(torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(0)), dim=-1)
    features = features[[0, 0, 0, 1, 2]]
    assert group_templates(list("aaabc"), features)[0] == ["a", "a", "a"]


# -------------------------------------------------------------------------------- the environment


@pytest.mark.slow
def test_a_user_without_a_home_has_caches_among_temporary_files(tmp_path):
    """As in a container that runs under a number of its own."""
    before = (
        "import pwd\n"
        "def unknown(number): raise KeyError(number)\n"
        "pwd.getpwuid = unknown\n"
        "for name in ('HOME', 'XDG_CACHE_HOME'): os.environ.pop(name, None)"
    )
    words = *SHORT.split(), "--out", tmp_path / "run"
    assert call(before, *words, TMPDIR=str(tmp_path))[0] == 0
    assert (tmp_path / ".cache/mocoop/shapes").is_dir()
