"""What prompts may be made of, and the parts of `lib/` that a method can switch on."""

import pytest
import torch
from conftest import checkpoint, same_parameters, unit

import eval
from data import few_shot_split
from lib import features, report
from lib.catalogue import all_templates, template_groups
from lib.features import image_features
from lib.runs import BadInput
from prompts import SoftPrompts, known_tokens, template_features, words_of

pytestmark = pytest.mark.usefixtures("no_pictures")

NAMES = ["cat", "sea", "Annual Crop Land"]


@pytest.mark.parametrize("template", ["a photo of a {}.", "{} texture.", "{}."])
def test_untrained_prompts_with_their_full_stop_are_zero_shot(random_clip, template):
    names = [*NAMES, "U.S.", "crane (bird)"]  # their last sign and the full stop are one token
    prompts = SoftPrompts(random_clip, [template], names, full_stop=True)
    zero_shot = template_features(random_clip, [template], names)
    assert torch.allclose(prompts.text_features(), zero_shot, atol=1e-6)
    bare = SoftPrompts(random_clip, [template], names)
    assert not torch.allclose(bare.text_features(), zero_shot, atol=1e-3)


def test_cocoop_adds_its_shift_to_every_context_vector_of_an_image(random_clip):
    prompts = SoftPrompts(random_clip, ["a photo of a {}.", "{} texture."], NAMES)
    shift = 0.1 * unit(2, 64)
    ours = prompts.text_features(shift=shift)
    starts = [
        [v.detach().clone() for v in c] for c in (prompts.context_before, prompts.context_after)
    ]
    for image in range(2):
        for contexts, start in zip((prompts.context_before, prompts.context_after), starts):
            for vectors, own in zip(contexts, start):
                vectors.data = own + shift[image]
        assert torch.allclose(ours[image], prompts.text_features(), atol=1e-5)


@pytest.mark.parametrize("more", ["--text-bias --full-stop", "--conditional --init random"])
def test_the_plain_text_encoder_gives_the_run_of_the_fast_one(run_train, small, tmp_path, more):
    flags = f"{small} --classes base --shots 2 --epochs 3 --batch-size 5 --warm-up 0 {more}"
    fast = run_train(f"{flags} --out", tmp_path / "fast")
    plain = run_train(f"{flags} --text-encoder plain --out", tmp_path / "plain")
    assert same_parameters(tmp_path / "plain", tmp_path / "fast", tolerance=1e-5)
    # Accuracies are counts of images, none of which is that close to another answer.
    for key in ("accuracy", "val_accuracy", "zero_shot_accuracy", "ensemble_accuracy"):
        assert plain[key] == fast[key], key
    assert plain["per_class_accuracy"] == fast["per_class_accuracy"]


@pytest.mark.parametrize("side, size", [("layer-norms", 2 * 2 * 2 * 64), ("prompts", 4 * 64)])
def test_a_learning_image_encoder_leaves_baselines_and_cache_alone(
    run_train, small, tmp_path, monkeypatch, side, size
):
    """Whoever is the first to use a cache, it holds CLIP's own features."""
    flags = f"{small} --shots 1 --epochs 2 --classes base"
    learning = tmp_path / "learning"
    monkeypatch.setattr(features, "CACHE", tmp_path / "empty")
    first = run_train(f"{flags} --image-side {side} --lr 1 --out", learning)
    again = eval.evaluate(learning)
    for key in ("accuracy", "zero_shot_accuracy", "ensemble_accuracy", "prompt_usage"):
        assert again[key] == first[key]
    run, (_, split) = eval.load_run(learning), few_shot_split(first["config"])
    val = image_features(run.clip_model, run.fingerprint, split, split.val, cached=False)
    answers = run.model.logits(val, split.class_names)[0].argmax(dim=-1)
    assert first["val_accuracy"] == report.accuracy(answers, split.labels(split.val))
    learned = checkpoint(learning)["model"]
    assert sum(v.numel() for k, v in learned.items() if k.startswith("image_side")) == size
    elsewhere = eval.evaluate(learning, classes="new")  # images not met before
    runs = []
    for cache, name in (("empty", "after"), ("another", "plain")):
        monkeypatch.setattr(features, "CACHE", tmp_path / cache)
        result = run_train(f"{flags} --out", tmp_path / name)
        runs.append((result, eval.evaluate(tmp_path / name, classes="new")))
    (after, after_new), (plain, plain_new) = runs
    for key in ("zero_shot_accuracy", "ensemble_accuracy"):
        assert first[key] == plain[key] and elsewhere[key] == plain_new[key]
    for one, other in ((after, plain), (after_new, plain_new)):
        for key in ("accuracy", "val_accuracy", "per_class_accuracy"):
            assert one[key] == other[key]
        # A feature may differ by rounding from one that was encoded beside other images.
        shares = [torch.tensor(result["router"]["share"]) for result in (one, other)]
        assert torch.allclose(*shares, atol=2e-4)


def test_a_single_group_is_made_if_one_is_asked_for(run_train, small, tmp_path):
    result = run_train(f"{small} --shots 1 --epochs 1 --groups auto --n-groups 1")
    (group,) = checkpoint(tmp_path / "run")["groups"]
    assert result["n_prompts"] == result["top_k"] == 1
    assert sorted(group) == sorted(all_templates(template_groups("eurosat")))


def test_the_words_nearest_to_an_untrained_prompt_are_its_own(run_train, small_world, tmp_path):
    run_train("--shots 1 --epochs 1 --lr 1e-9 --warm-up 0")
    nearest = eval.nearest_words(tmp_path / "run")
    said = {template: [vector[0][0] for vector in vectors] for template, vectors in nearest.items()}
    assert said["a low resolution photo of the {}."] == [
        *("a", "low", "resolution", "photo", "of", "the")
    ]
    distances = [distance for _, distance in nearest["a photo of a {}."][1]]
    assert distances[0] < 1e-3 and distances == sorted(distances)


def test_the_words_nearest_to_a_prompt_are_those_of_least_distance(own_run):
    run = eval.load_run(own_run)
    known, embeddings = sorted(known_tokens(run.clip_model)), run.clip_model.token_embedding.weight
    stored = checkpoint(own_run)
    stored["model"]["prompts.context_before.1"] += 0.1 * unit(4, 64)
    torch.save(stored, own_run / "checkpoint.pt")
    vector = stored["model"]["prompts.context_before.1"][1]
    distances = (embeddings[known] - vector).norm(dim=-1)
    words = eval.nearest_words(own_run)["a photo of a {}."][1]
    for (word, distance), i in zip(words, distances.argsort()[:3].tolist(), strict=True):
        assert word == words_of([known[i]])[0] and abs(distance - distances[i]) < 2e-3


def test_a_run_without_prompts_has_no_words(run_train, small, tmp_path):
    run_train(f"{small} --method zeroshot --shots 1")
    with pytest.raises(BadInput, match="it has no prompts"):
        eval.nearest_words(tmp_path / "run")
