"""An image encoder that learns, and the words that prompts have come near to."""

import pytest
import torch

import eval
from data import load_split
from lib import features, world
from lib.clip_model import load_clip
from lib.features import image_features
from prompts import known_tokens, words_of

pytestmark = pytest.mark.usefixtures("no_pictures")


def test_a_learning_image_encoder_leaves_the_cache_alone(run_train, small, tmp_path, monkeypatch):
    """Though it is the first to use a cache, it leaves CLIP's own features there."""
    monkeypatch.setattr(features, "CACHE", tmp_path / "cache")
    flags = "--shots 1 --epochs 2 --classes base --image-side prompts --lr 1"
    first = run_train(f"{small} {flags}")
    again = eval.evaluate(tmp_path / "run")
    eval.evaluate(tmp_path / "run", classes="new")  # images not met before
    for key in ("accuracy", "zero_shot_accuracy", "ensemble_accuracy", "prompt_usage"):
        assert again[key] == first[key]
    clip_model, fingerprint = load_clip(first["config"]["clip"], "cpu")
    split = load_split("eurosat", first["config"]["data"])
    found, encoded = (
        image_features(clip_model, fingerprint, split, split.test, cached=cached)
        for cached in (True, False)
    )
    assert torch.allclose(found, encoded, atol=1e-5)


def test_the_words_nearest_to_a_prompt_are_those_of_least_distance(
    run_train, tmp_path, monkeypatch
):
    """With the bundled CLIP, which knows some words of the vocabulary only."""
    monkeypatch.setitem(world.PER_CLASS, "test", 8)
    run_train("--shots 1 --epochs 1")
    run = eval.load_run(tmp_path / "run")
    known, embeddings = sorted(known_tokens(run.clip_model)), run.clip_model.token_embedding.weight
    vector = run.model.prompts.context_before[0][1]
    distances = (embeddings[known] - vector).norm(dim=-1)
    words = eval.nearest_words(run)[run.model.templates[0]][1]
    for (word, distance), i in zip(words, distances.argsort()[:3].tolist(), strict=True):
        assert word == words_of([known[i]])[0] and abs(distance - distances[i]) < 2e-3
