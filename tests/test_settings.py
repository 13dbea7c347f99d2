"""Settings: what the command line says, what a method changes, what is refused, a run's name."""

import math
from pathlib import Path

import plain
import pytest
from conftest import config_of

import train
from lib.catalogue import DATASETS
from lib.errors import BadInput
from lib.runs import run_label
from lib.settings import dashed, defaults_of, given_settings
from lib.world import SHAPES
from prompts import token_ids

# ------------------------------------------------------------------------------------- methods


@pytest.mark.parametrize(
    "method, paper",
    [
        ("mocoop", plain.MOCOOP),
        ("coop", plain.COOP),
        ("cocoop", plain.COCOOP),
        ("lasp", plain.LASP),
    ],
)
def test_a_methods_settings_are_its_papers(method, paper):
    config = config_of("--method", method, "--shots", 4)
    names = {
        "epochs": "epochs", "warm_up": "warm_up", "batch_size": "batch", "lr": "lr",
        "max_grad_norm": "clip", "gate_weight": "gate", "text_weight": "text",
        "text_scale": "scale", "text_bias": "bias", "full_stop": "stop", "views": "views",
        "conditional": "conditional", "router": "router",
    }  # fmt: skip
    assert {ours: config[ours] for ours in names} == {o: paper[t] for o, t in names.items()}
    assert config["init"] == (paper["init"] or "template")
    assert config["top_k"] == 2 and config["image_side"] == "frozen"
    assert (config["text_target"] == "templates") == paper["per_template"]


def test_the_number_of_epochs_follows_the_shots_in_coop():
    epochs = {n: config_of("--method", "coop", "--shots", n)["epochs"] for n in (1, 2, 7, 8, 32)}
    assert epochs == {1: 50, 2: 100, 7: 100, 8: 200, 32: 200}
    assert config_of("--method", "coop", "--shots", 16, "--dataset", "imagenet")["epochs"] == 50


def test_the_learning_rate_grows_with_the_batch():
    def lr(*words):
        return config_of(*words)["lr"]

    assert lr() == 0.032
    assert math.isclose(lr("--batch-size", 64), 0.064)
    assert lr("--batch-size", 64, "--lr", 0.1) == 0.1
    assert lr("--method", "cocoop") == 0.002  # for its own batch, which is 1
    assert math.isclose(lr("--method", "cocoop", "--batch-size", 4), 0.008)


@pytest.mark.parametrize("method", train.METHODS)
def test_every_method_has_settings_for_every_dataset(method):
    for dataset in DATASETS:
        config = config_of("--method", method, "--dataset", dataset)
        assert config["out"] == f"out/{dataset}/{method}_16shot_all_seed1"
        assert not isinstance(config["epochs"], dict) and config["data"] == str(
            Path("data").resolve()
        )
        assert config["clip"] == ("bundled" if dataset.startswith("shapes") else "ViT-B/16")


@pytest.mark.parametrize("words", ["--method coop --shots 1 --help", "-h --shots 1 --method coop"])
def test_help_shows_the_defaults_of_the_method_that_is_named(words, capsys):
    with pytest.raises(SystemExit) as end:
        config_of(*words.split())
    assert end.value.code == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "passes over the training images (default: 50)" in said  # CoOp's, with one shot
    assert "how prompts get their weights (default: uniform)" in said
    assert (
        "initial words: template (the first of each group), random vectors, or one template" in said
    )
    assert "training images per class (default: 16)" in said and "None" not in said
    assert all(dashed(name) in said for name in defaults_of(*train.SETTINGS.values()))


def test_numbers_have_the_kind_of_their_default():
    rows = {"a": (0.0, 0, ""), "b": (None, 1, ""), "c": (2, 0, ""), "d": (1.5, 1e-9, "")}
    words = ["--a=0.5", "--b=3", "--c=1", "--d=2"]
    parsed = given_settings({"losses": rows}, None, words)
    assert [type(value) for value in parsed.values()] == [float, int, int, float]


# -------------------------------------------------------------------------------- from Python


@pytest.mark.parametrize("chunk", [7, 20])
def test_the_chunk_of_the_command_line_is_the_encoders(chunk, random_clip):
    sentences = [[[49406, *token_ids(f"a red {name}"), 49407] for name in SHAPES]]
    encoder = train.text_encoder_of(config_of("--chunk", chunk))(random_clip, sentences)
    sizes = [len(batch.sentence) for batch in encoder.batches]
    assert sum(sizes) == len(SHAPES) and len(sizes) == -(-len(SHAPES) // chunk)


def test_from_python_settings_are_those_of_the_command_line():
    config = train.default_config(method="coop", shots=4, dataset="dtd")
    assert config == config_of("--method", "coop", "--shots", 4, "--dataset", "dtd")
    for value in (True, False):
        assert train.default_config(method="lasp", text_bias=value)["text_bias"] is value


def test_home_is_home_in_every_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("clip.pt", "groups.txt"):
        (tmp_path / name).touch()
    (tmp_path / "pets").mkdir()
    words = "--data=~/data --dataset ~/pets --clip=~/clip.pt --groups ~/groups.txt --out=~/run"
    config = config_of(*words.split())
    expected = {"data": "data", "dataset": "pets", "clip": "clip.pt", "groups": "groups.txt"}
    for name, file in (expected | {"out": "run"}).items():
        assert config[name] == str(tmp_path / file)


# ------------------------------------------------------------------------------------- refused

NO_EFFECT = [  # also where the value that is given is the default
    ("groups", "--groups auto --method lasp", "without groups"),
    ("n_groups", "--n-groups 0", "without --groups auto"),
    ("top_k", "--router uniform --top-k 2", "with --router uniform"),
    ("gate_weight", "--router frozen --gate-weight 1", "without --router trained"),
    ("gate_target", "--method coop --gate-target label", "without --router trained"),
    ("gate_target", "--gate-weight 0 --gate-target mean", "with --gate-weight 0"),
    ("text_scale", "--method coop --text-scale 1", "with --text-weight 0"),
    ("text_target", "--text-weight 0 --text-target prototypes", "with --text-weight 0"),
    ("text_names", "--method coop --classes base --text-names seen", "with --text-weight 0"),
    ("text_names", "--text-names all", "with --classes all, where all are seen"),
    ("chunk", "--text-encoder plain --chunk 9", "with --text-encoder plain"),
    ("views", "--dataset dtd --image-side prompts --views 8", "with --image-side, which crops anew"
        " in every epoch"),
    ("views", "--views 8", "on drawn images, never cropped"),
]  # fmt: skip


@pytest.mark.parametrize("name, words, why", NO_EFFECT)
def test_what_has_no_effect_is_refused(name, words, why):
    with pytest.raises(BadInput, match=f"{dashed(name)} has no effect {why}"):
        config_of(*words.split())


def test_all_that_has_no_effect_was_tried():
    tried = {(name, why) for name, _, why in NO_EFFECT}
    every = {(name, why) for name, _, why in train.no_effect(config_of())}
    assert tried == {(name, why) for name, why in every if why != "without prompts"}


def test_a_baseline_has_no_settings_of_prompts():
    config = config_of("--method", "linear")
    assert {"epochs", "init", "text_bias", "router", "lr"} <= train.SETTINGS["method"].keys()
    for name, value in defaults_of(train.SETTINGS["method"]).items():
        assert config[name] is None
        with pytest.raises(BadInput, match=f"{dashed(name)} has no effect without prompts"):
            train.default_config(method="linear", **{name: value})


# --------------------------------------------------------------------------------- a run's name


def folder_of(*words):
    return config_of(*words)["out"]


def test_a_run_is_named_after_what_it_is():
    assert folder_of() == "out/shapes/mocoop_16shot_all_seed1"
    base = folder_of("--shots", 4, "--classes", "base", "--seed", 3)
    assert base == "out/shapes/mocoop_4shot_base_seed3"
    changed = folder_of("--top-k", 1, "--text-bias")
    assert changed == "out/shapes/mocoop-text_bias-top_k1_16shot_all_seed1"
    assert folder_of("--top-k", 2) == folder_of()  # the preset's own value
    assert folder_of("--out", "here") == "here"
    init = folder_of("--method", "coop", "--init", "a painting of {}.")
    assert init == "out/shapes/coop-inita-painting-of-._16shot_all_seed1"
    gone = {"groups": "/home/me/my groups.txt"}  # the same name without the file
    assert run_label("coop", gone) == "coop-groupsmy-groups"


def test_every_setting_of_a_method_shows_in_the_runs_name():
    """So that no run is taken for another, nor shares its row in a table."""
    others = {
        "init": "random", "image_side": "prompts", "router": "frozen", "gate_target": "mean",
        "text_target": "templates", "text_names": "seen",
    }  # fmt: skip
    task = {"dataset": "dtd", "classes": "base"}
    names = {train.default_config(**task)["out"]: "nothing changed"}
    for name, value in defaults_of(train.SETTINGS["method"]).items():
        other = others.get(name) or (not value if isinstance(value, bool) else value + 1)
        groups = {"groups": "auto"} if name == "n_groups" else {}
        folder = train.default_config(**task, **{name: other}, **groups)["out"]
        assert folder not in names, (name, names[folder])
        names[folder] = name
