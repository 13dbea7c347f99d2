"""Settings: what the command line says, what a method changes, what is refused, a run's name."""

import math
from pathlib import Path

import plain
import pytest
from conftest import config_of

import train
from lib.catalogue import DATASETS
from lib.runs import BadInput, run_label

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


def test_help_shows_the_defaults_of_the_method_that_is_named(capsys):
    for words, lines in (
        ([], ("passes over the training images (default: 50)", "rate of 1e-5; at most")),
        (
            ["--method", "coop", "--shots", "4"],
            ("passes over the training images (default: 100)", "batch size (default: 0.002)"),
        ),
        (["--method", "cocoop"], ("per step (default: 1)", "CoCoOp does (default: True)")),
    ):
        with pytest.raises(SystemExit):
            train.configure([*words, "--help"])
        shown = " ".join(capsys.readouterr().out.split())
        for line in lines:
            assert line in shown


# -------------------------------------------------------------------------------- from Python


@pytest.mark.parametrize("method", train.METHODS)
def test_from_python_settings_are_those_of_the_command_line(method):
    assert train.default_config(method=method) == config_of("--method", method)
    config = train.default_config(method=method, shots=4, dataset="dtd", seed=3)
    assert config == config_of(*f"--method {method} --shots 4 --dataset dtd --seed 3".split())
    assert config["shots"] == 4 and config["seed"] == 3 and config["dataset"] == "dtd"


@pytest.mark.parametrize("value", [True, False])
def test_a_switch_is_on_or_off_from_python(value):
    for name in ("one_group", "full_stop", "conditional", "text_bias"):
        assert train.default_config(method="lasp", **{name: value})[name] is value


# ------------------------------------------------------------------------------------- refused

NO_EFFECT = [  # also where the value that is given is the default
    ("groups", "--groups auto --one-group", "without groups"),
    ("groups", "--groups auto --method lasp", "without groups"),
    ("n_groups", "--n-groups 0", "without --groups auto"),
    ("top_k", "--router uniform --top-k 2", "with --router uniform"),
    ("gate_weight", "--router frozen --gate-weight 1", "without --router trained"),
    ("gate_weight", "--router uniform --gate-weight 1", "without --router trained"),
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
    with pytest.raises(BadInput, match=f"{train.dashed(name)} has no effect {why}: leave it out"):
        config_of(*words.split())


def test_all_that_has_no_effect_was_tried():
    tried = {(name, why) for name, _, why in NO_EFFECT}
    assert tried == {(name, why) for name, _, why in train.NO_EFFECT if why != "without prompts"}


@pytest.mark.parametrize("method", ["zeroshot", "ensemble", "linear", "linear_zeroshot"])
def test_a_baseline_has_no_settings_of_prompts(method):
    config = config_of("--method", method)
    assert {"epochs", "init", "text_bias", "router", "lr"} <= train.PUBLISHED.keys()
    for name, value in train.PUBLISHED.items():
        assert config[name] is None
        with pytest.raises(BadInput, match=f"{train.dashed(name)} has no effect without prompts"):
            train.default_config(method=method, **{name: value})


# --------------------------------------------------------------------------------- a run's name


def folder_of(*words):
    return config_of(*words)["out"]


def test_a_run_is_named_after_what_it_is():
    assert folder_of() == "out/shapes/mocoop_16shot_all_seed1"
    base = folder_of("--dataset", "eurosat", "--shots", 4, "--classes", "base", "--seed", 3)
    assert base == "out/eurosat/mocoop_4shot_base_seed3"
    changed = folder_of("--top-k", 1, "--text-bias")
    assert changed == "out/shapes/mocoop-text_bias-top_k1_16shot_all_seed1"
    assert folder_of("--top-k", 2) == folder_of()  # the preset's own value
    assert folder_of("--out", "here") == "here"
    assert folder_of("--batch-size", 64) == "out/shapes/mocoop-batch_size64_16shot_all_seed1"
    real = folder_of("--dataset", "eurosat", "--clip", "ViT-L/14")
    assert real == "out/eurosat/mocoop-clipViT-L-14_16shot_all_seed1"
    init = folder_of("--method", "coop", "--init", "a painting of {}.")
    assert init == "out/shapes/coop-inita-painting-of-._16shot_all_seed1"
    stopped = folder_of("--method", "coop", "--no-full-stop")
    assert stopped == "out/shapes/coop-full_stopFalse_16shot_all_seed1"
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
    for name, value in train.PUBLISHED.items():
        other = others.get(name) or (not value if isinstance(value, bool) else value + 1)
        groups = {"groups": "auto"} if name == "n_groups" else {}
        folder = train.default_config(**task, **{name: other}, **groups)["out"]
        assert folder not in names, (name, names[folder])
        names[folder] = name
