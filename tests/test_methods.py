"""The rows of `train.METHODS`, each against something other than itself, and the ablation flags."""

import json
import math

import plain
import pytest
import torch
import torch.nn.functional as F
from conftest import HERE, parse

import eval
import train
from data import few_shot_split
from lib import cache as feature_cache
from lib import grouping, probe
from lib.catalogue import DATASETS, template_groups
from lib.clip_model import load_clip
from lib.errors import BadInput
from lib.images import image_features
from lib.probe import linear_probe, logistic_regression
from lib.templates import all_templates
from lib.tokens import known_tokens, words_of
from lib.world import SHAPES_CLASSES
from prompts import SoftPrompts, template_features

NAMES = ["cat", "sea", "Annual Crop Land"]


def learned(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)["model"]


def config_of(*flags):
    return train.resolve(parse(flags))[0]


def unit(*shape, seed=0):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


# ----------------------------------------------------------------------- CLIP as it is, and probes


def test_the_linear_probe_is_scikit_learns():
    """`scikit_learn.json` holds scikit-learn's own answers on these features."""
    i, j = torch.arange(1.0, 91, dtype=torch.float64), torch.arange(1.0, 17, dtype=torch.float64)
    features, labels = F.normalize(torch.sin(i[:, None] * j**1.5), dim=-1), torch.arange(90) % 3
    features[labels == 1, 0] += 0.5
    answers = json.loads((HERE / "scikit_learn.json").read_text())["answers"]
    assert [answer["C"] for answer in answers] == [0.1, 10.0, 1000.0]
    for answer in answers:
        weight, bias = logistic_regression(features, labels, 3, answer["C"])
        expected = torch.tensor(answer["coef"])
        assert (weight - expected).abs().max() <= 1e-3 * expected.abs().max()
        intercept = torch.tensor(answer["intercept"])
        assert torch.allclose(bias - bias.mean(), intercept, atol=1e-3, rtol=1e-3)


def test_logistic_regression_is_at_its_minimum():
    features, labels, c = unit(60, 8), torch.arange(60) % 3, 5.0
    weight, bias = (
        x.double().requires_grad_() for x in logistic_regression(features, labels, 3, c)
    )
    logits = features.double() @ weight.T + bias
    loss = c * F.cross_entropy(logits, labels, reduction="sum") + weight.square().sum() / 2
    loss.backward()
    assert weight.grad.abs().max() < 1e-3 and bias.grad.abs().max() < 1e-3


def test_the_probes_strength_is_chosen_on_validation_images():
    features, labels = unit(40, 8), torch.arange(40) % 2
    features[labels == 0] += 0.1
    val_features, val_labels = unit(200, 8, seed=1), torch.arange(200) % 2
    val_features[val_labels == 0] += 0.1
    weight, bias, c = linear_probe(features, labels, val_features, val_labels, 2)

    def accuracy(weight, bias):
        return ((val_features @ weight.T + bias).argmax(-1) == val_labels).float().mean()

    best = accuracy(weight, bias)
    for exponent in (6, 4, 2, 0, -2, -4, -6):
        assert best >= accuracy(*logistic_regression(features, labels, 2, 10.0**exponent))
    again = logistic_regression(features, labels, 2, c)
    assert torch.allclose(again[0], weight, atol=1e-4)


def test_the_probes_strength_is_found_between_powers_of_a_hundred(monkeypatch):
    """Of validation images at 0 to 10, a probe of strength c gets right what lies above the
    distance of log10(c) from the best."""

    def regression(features, labels, n_classes, c):
        assert features is train_features and n_classes == 2
        return torch.tensor([[0.0], [1.0]]), torch.tensor([0.0, -abs(math.log10(c) - best)])

    monkeypatch.setattr(probe, "logistic_regression", regression)
    train_features = -torch.linspace(0, 10, 1001)[:, None]
    val_features, ones = torch.linspace(0, 10, 1001)[:, None], torch.ones(1001, dtype=torch.long)
    for best in (2.7, 1.3):  # above and below the nearest power of a hundred
        *_, c = linear_probe(train_features, ones, val_features, ones, 2)
        assert abs(math.log10(c) - best) < 0.01
    *_, c = linear_probe(train_features, ones, val_features + 100, ones, 2)
    assert c == 10.0**6  # all are equally good: CoOp's first


# -------------------------------------------------------------------------- prompts of one's own


@pytest.mark.parametrize("template", ["a photo of a {}.", "{} texture.", "{}."])
def test_untrained_prompts_with_their_full_stop_are_zero_shot(random_clip, template):
    names = [*NAMES, "U.S.", "crane (bird)"]  # their last sign and the full stop are one token
    prompts = SoftPrompts(random_clip, [template], full_stop=True)
    prompts.set_classes(random_clip, names)
    zero_shot = template_features(random_clip, [template], names)
    assert torch.allclose(prompts.text_features(random_clip), zero_shot, atol=1e-6)
    bare = SoftPrompts(random_clip, [template])
    bare.set_classes(random_clip, names)
    assert not torch.allclose(bare.text_features(random_clip), zero_shot, atol=1e-3)


def test_the_number_of_epochs_follows_the_shots_in_coop():
    epochs = {
        n: config_of("--method", "coop", "--shots", n)["epochs"] for n in (1, 2, 4, 8, 16, 32)
    }
    assert epochs == {1: 50, 2: 100, 4: 100, 8: 200, 16: 200, 32: 200}
    assert config_of("--method", "coop", "--shots", 16, "--dataset", "imagenet")["epochs"] == 50


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


@pytest.mark.parametrize("method", train.METHODS)
def test_every_method_has_settings_for_every_dataset(method):
    for dataset in DATASETS:
        config = config_of("--method", method, "--dataset", dataset)
        folder = f"out/{dataset}/{method}_16shot_all_seed1"
        assert config["out"] == folder and not isinstance(config.get("epochs"), dict)
        clip = "bundled" if dataset.startswith("shapes") else "ViT-B/16"
        assert (config["clip"], config["data"]) == (clip, "data")


def test_cocoop_adds_its_shift_to_every_context_vector_of_an_image(random_clip):
    prompts = SoftPrompts(random_clip, ["a photo of a {}.", "{} texture."])
    prompts.set_classes(random_clip, NAMES, chunk=5)
    shift = 0.1 * unit(2, 64)
    ours = prompts.text_features(random_clip, shift=shift)
    starts = [
        [v.detach().clone() for v in c] for c in (prompts.context_before, prompts.context_after)
    ]
    for image in range(2):
        for contexts, start in zip((prompts.context_before, prompts.context_after), starts):
            for vectors, own in zip(contexts, start):
                vectors.data = own + shift[image]
        assert torch.allclose(ours[image], prompts.text_features(random_clip), atol=1e-5)


# -------------------------------------------------------------------------------- ablation flags


def test_one_group_has_all_templates_and_one_prompt(run_train, small, tmp_path):
    result = run_train(f"{small} --shots 1 --epochs 1 --one-group")
    assert result["n_prompts"] == result["top_k"] == 1
    groups = torch.load(tmp_path / "run/checkpoint.pt", weights_only=True)["groups"]
    assert groups == [all_templates(template_groups("eurosat"))]


def test_the_mixture_may_have_cocoops_network(run_train, small, tmp_path):
    groups = "--groups auto --n-groups 2 --classes base"
    result = run_train(f"{small} --shots 1 --epochs 1 --conditional --batch-size 4 {groups}")
    assert result["n_prompts"] == 2
    assert learned(tmp_path / "run")["shift.0.weight"].shape == (4, 64)
    assert eval.evaluate(tmp_path / "run")["accuracy"] == result["accuracy"]


@pytest.mark.parametrize("side, size", [("layer-norms", 2 * 2 * 2 * 64), ("prompts", 4 * 64)])
def test_a_learning_image_encoder_leaves_baselines_and_cache_alone(
    run_train, small, tmp_path, monkeypatch, side, size
):
    """Whoever is the first to use a cache, it holds CLIP's own features."""
    flags = f"{small} --shots 2 --epochs 3 --classes base"
    monkeypatch.setattr(feature_cache, "CACHE", tmp_path / "empty")
    first = run_train(f"{flags} --image-side {side} --lr 1 --out", tmp_path / "learning")
    again = eval.evaluate(tmp_path / "learning")
    for key in ("accuracy", "zero_shot_accuracy", "ensemble_accuracy", "prompt_usage"):
        assert again[key] == first[key]
    run, config = eval.load_run(tmp_path / "learning"), first["config"]
    _, split = few_shot_split(config)
    val = image_features(run.clip_model, run.fingerprint, split, split.val, cached=False)
    assert first["val_accuracy"] == train.accuracy_on(run.model, split, split.val, val)
    parameters = learned(tmp_path / "learning")
    assert sum(v.numel() for k, v in parameters.items() if k.startswith("image_side")) == size
    elsewhere = eval.evaluate(tmp_path / "learning", classes="new")  # images not met before
    runs = []
    for cache, name in (("empty", "after"), ("another", "plain")):
        monkeypatch.setattr(feature_cache, "CACHE", tmp_path / cache)
        result = run_train(f"{flags} --out", tmp_path / name)
        runs.append((result, eval.evaluate(tmp_path / name, classes="new")))
    (after, after_new), (plain, plain_new) = runs
    for key in ("zero_shot_accuracy", "ensemble_accuracy"):
        assert first[key] == plain[key] and elsewhere[key] == plain_new[key]
    for key in ("accuracy", "val_accuracy", "per_class_accuracy", "zero_shot_accuracy", "router"):
        assert after[key] == plain[key] and after_new[key] == plain_new[key]


@pytest.mark.parametrize(
    "flags, said",
    [
        ("--method linear --epochs 3", "--method linear has no --epochs"),
        ("--method zeroshot --text-bias", "--method zeroshot has no --text-bias"),
        ("--init photo", "the template 'photo' needs one {}"),
        ("--n-groups 3", "--n-groups means nothing without --groups auto"),
        ("--groups auto --one-group", "several groups, and --one-group has one"),
        ("--groups auto --method lasp", "several groups, and --method lasp has one"),
        ("--method zeroshot --text-weight 0", "--method zeroshot has no --text-weight"),
        ("--router uniform --top-k 1", "--top-k means nothing without a router that chooses"),
        (
            "--router frozen --gate-weight 2",
            "--gate-weight means nothing without a router that is trained",
        ),
        (
            "--router uniform --gate-weight 2",
            "--gate-weight means nothing without a router that is trained",
        ),
        (
            "--method coop --text-target templates",
            "--text-target means nothing without a --text-weight",
        ),
        ("--method coop --text-scale 9", "--text-scale means nothing without a --text-weight"),
        ("--image-side layer-norms --views 3", "--views means nothing without stored crops"),
        ("--views 3", "--views means nothing without stored crops"),  # of drawn images
        ("--one-group --top-k 2", "--top-k 2 is above the number of prompts, 1"),
        ("--groups auto --n-groups 3 --top-k 4", "--top-k 4 is above the number of prompts, 3"),
        ("--groups auto --n-groups 30", "--n-groups 30 is above the number of templates, 20"),
    ],
)
def test_flags_that_do_not_fit_are_refused(run_train, flags, said):
    with pytest.raises(BadInput, match=said.replace("{", r"\{")):
        run_train(f"--shots 1 {flags}")


# ---------------------------------------------------------------------------------- groups found


def test_templates_are_merged_nearest_first_by_average_linkage():
    """From 0 and 1, which come first, thing 2 is 1 and 5 away: 3 on average. Nearest neighbours
    would join it to them at any rate, furthest ones only if thing 3 were 5 away."""

    def groups(from_2_to_3):
        distance = torch.full((4, 4), 10.0)
        for i, j, d in ((0, 1, 0.1), (0, 2, 1.0), (1, 2, 5.0), (2, 3, from_2_to_3)):
            distance[i, j] = distance[j, i] = d
        return grouping.clusters(distance, 2)

    assert groups(2.5) == [[0, 1], [2, 3]]
    assert groups(4.0) == [[0, 1, 2], [3]]


def test_templates_are_far_apart_by_what_they_do_not_share():
    """Two classes, whose own directions all templates share, and three templates."""
    own = torch.tensor([[3.0, 0, 0, 0], [0, 3.0, 0, 0]])
    of_template = torch.tensor([[0, 0, 1.0, 0.2], [0, 0, 1.0, -0.2], [0, 0, -1.0, 0]])
    features = F.normalize(own + of_template[:, None], dim=-1)
    distance = grouping.distances(features)
    assert distance[0, 1] < 0.2 and distance[0, 2] > 1.5 and distance[1, 2] > 1.5
    centred = features - (features[0] + features[1] + features[2]) / 3
    cosine = F.cosine_similarity(centred[0], centred[2], dim=-1).mean()
    assert math.isclose(distance[0, 2], 1 - cosine, rel_tol=1e-5)


def test_silhouette_by_hand():
    points = torch.tensor([0.0, 2.0, 10.0, 14.0])
    distance = (points[:, None] - points).abs()
    # a: 2, 2, 4, 4; b: mean of 10 and 14, of 8 and 12, of 10 and 8, of 14 and 12
    expected = (10 / 12 + 8 / 10 + 5 / 9 + 9 / 13) / 4
    assert math.isclose(grouping.silhouette(distance, [[0, 1], [2, 3]]), expected, rel_tol=1e-6)
    # The third is alone and counts 0; a of the others: 8, 7, 13; b: 10, 8, 4
    expected = ((10 - 8) / 10 + (8 - 7) / 8 + (4 - 13) / 13) / 4
    assert math.isclose(grouping.silhouette(distance, [[0, 1, 3], [2]]), expected, rel_tol=1e-6)


def test_groups_are_found_where_there_are_some(capsys):
    model, _ = load_clip("bundled", torch.device("cpu"))
    templates = all_templates(template_groups("shapes"))
    features = template_features(model, templates, SHAPES_CLASSES)
    found = grouping.group_templates(templates, features)
    assert sorted(map(sorted, found)) == sorted(map(sorted, template_groups("shapes")))
    assert "groups found: " in capsys.readouterr().out


def test_as_many_groups_are_made_as_are_asked_for(run_train, small, tmp_path):
    for n in (1, 3):
        auto = f"{small} --shots 1 --epochs 1 --groups auto --n-groups {n} --out"
        result = run_train(auto, tmp_path / f"{n}")
        groups = torch.load(tmp_path / f"{n}/checkpoint.pt", weights_only=True)["groups"]
        assert result["n_prompts"] == len(groups) == n and result["top_k"] == min(n, 2)
        assert sorted(all_templates(groups)) == sorted(all_templates(template_groups("eurosat")))


# ------------------------------------------------------------------------------------- words


def test_the_words_nearest_to_an_untrained_prompt_are_its_own(run_train, tmp_path):
    run_train("--shots 1 --epochs 1 --lr 1e-9 --warm-up 0")
    nearest = eval.nearest_words(tmp_path / "run")
    said = {template: [vector[0][0] for vector in vectors] for template, vectors in nearest.items()}
    assert said["a low resolution photo of the {}."] == [
        *("a", "low", "resolution", "photo", "of", "the")
    ]
    assert nearest["a photo of a {}."][1][0][1] < 1e-3  # its distance
    assert [d for _, d in nearest["a photo of a {}."][1]] == sorted(
        d for _, d in nearest["a photo of a {}."][1]
    )
    run_train("--shots 1 --epochs 1 --lr 1 --warm-up 0 --out", tmp_path / "moved")
    run = eval.load_run(tmp_path / "moved")
    known, embeddings = sorted(known_tokens(run.clip_model)), run.clip_model.token_embedding.weight
    vector = run.model.prompts.context_before[0][1].detach()
    distances = {token: (embeddings[token] - vector).norm().item() for token in known}
    words = eval.nearest_words(tmp_path / "moved")["a photo of a {}."][1]
    for (word, distance), token in zip(words, sorted(known, key=distances.get)[:3]):
        assert word == words_of([token])[0] and abs(distance - distances[token]) < 2e-3
    run_train("--method zeroshot --shots 1 --out", tmp_path / "none")
    with pytest.raises(BadInput, match="it has no prompts"):
        eval.nearest_words(tmp_path / "none")


@pytest.mark.parametrize("method", ["zeroshot", "ensemble", "linear"])
def test_methods_without_prompts_have_no_use_for_found_groups(method):
    with pytest.raises(BadInput, match=f"--method {method} has no prompts, so no use for"):
        config_of("--method", method, "--groups", "auto")
