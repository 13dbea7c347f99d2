"""Transforms, views, and the cache of image features."""

import os
import random
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import clip
import numpy as np
import pytest
import torch
from conftest import draw_image
from PIL import Image

from data import load_split
from lib import images
from lib.errors import BadInput
from lib.images import image_features


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "CACHE", tmp_path / "cache")


@pytest.fixture
def own_eurosat(eurosat, tmp_path):
    """A copy that a test may damage."""
    shutil.copytree(eurosat, tmp_path / "data")
    return tmp_path / "data"


# -------------------------------------------------------------------------------- transforms


def test_the_test_transform_is_clips_own():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 90, 3), dtype=np.uint8))
    assert torch.equal(images.test_transform(32)(image), clip.clip._transform(32)(image))


def test_a_view_is_seeded_by_its_path_and_number_alone(eurosat):
    split = load_split("eurosat", eurosat)
    transform = images.train_transform(32)
    path, other = split.train[0].path, split.train[1].path

    def view(path, number):
        torch.manual_seed(random.randrange(1000))  # whatever else the run drew
        return images._Preprocessed(split, transform, [(path, number)])[0]

    assert torch.equal(view(path, 3), view(path, 3))
    assert not torch.equal(view(path, 3), view(path, 4))
    assert not torch.equal(view(path, 3), view(other, 3))


# --------------------------------------------------------------------------------- the cache


def encode(model, split, items, capsys, views=None):
    """(features, printed line)"""
    found = image_features(model, "fingerprint", split, items, views)
    return found, capsys.readouterr().out


def test_features_are_clips_own_and_normalised(eurosat, random_clip, capsys):
    split = load_split("eurosat", eurosat)
    ours, _ = encode(random_clip, split, split.test, capsys)
    preprocess = clip.clip._transform(32)
    preprocessed = [preprocess(Image.open(split.folder / item.path)) for item in split.test]
    theirs = random_clip.encode_image(torch.stack(preprocessed))
    theirs = theirs / theirs.norm(dim=-1, keepdim=True)
    assert torch.allclose(ours, theirs, atol=1e-5)


def test_an_image_is_encoded_once(eurosat, random_clip, capsys):
    split = load_split("eurosat", eurosat)
    first, said = encode(random_clip, split, split.test[:20], capsys)
    assert "20, 0 features from the cache, 20 to encode" in said
    again, said = encode(random_clip, split, split.test, capsys)
    assert "30, 20 features from the cache, 10 to encode" in said
    assert torch.equal(again[:20], first)


def test_views_are_encoded_once_each_and_differ(eurosat, random_clip, capsys):
    split = load_split("eurosat", eurosat)
    first, said = encode(random_clip, split, split.train[:5], capsys, views=3)
    assert first.shape == (5, 3, 64) and "15 to encode" in said
    more, said = encode(random_clip, split, split.train[:5], capsys, views=4)
    assert "15 features from the cache, 5 to encode" in said
    assert torch.equal(more[:, :3], first)
    assert not torch.allclose(first[:, 0], first[:, 1])


def test_a_changed_image_is_encoded_again(own_eurosat, random_clip, capsys):
    split = load_split("eurosat", own_eurosat)
    before, _ = encode(random_clip, split, split.test, capsys)
    draw_image(split.folder / split.test[0].path, seed="another drawing")
    after, said = encode(random_clip, split, split.test, capsys)
    assert "1 to encode" in said
    assert not torch.allclose(after[0], before[0])
    assert torch.equal(after[1:], before[1:])


def test_another_clip_shares_nothing(eurosat, random_clip, capsys):
    split = load_split("eurosat", eurosat)
    encode(random_clip, split, split.test, capsys)
    image_features(random_clip, "another fingerprint", split, split.test)
    assert "30 to encode" in capsys.readouterr().out


@pytest.mark.parametrize("damage", ["cut", "flip"])
def test_a_damaged_cache_file_is_recomputed_never_trusted(eurosat, random_clip, capsys, damage):
    split = load_split("eurosat", eurosat)
    before, _ = encode(random_clip, split, split.test, capsys)
    (shard,) = images.CACHE.rglob("*.npz")
    content = bytearray(shard.read_bytes())
    if damage == "cut":
        content = content[:-300]
    else:
        content[len(content) // 2] ^= 1  # one bit
    shard.write_bytes(content)
    after, said = encode(random_clip, split, split.test, capsys)
    assert "is damaged" in said and "30 to encode" in said
    assert torch.equal(after, before)


def test_what_was_encoded_before_a_crash_is_kept(eurosat, random_clip, capsys, monkeypatch):
    monkeypatch.setattr(images, "SHARD", 8)
    split = load_split("eurosat", eurosat)
    calls = []

    def encode_and_crash(clip_model, batch):
        calls.append(len(batch))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return clip_model.visual(batch)

    monkeypatch.setitem(images.BATCH, "cpu", 8)
    monkeypatch.setattr(type(random_clip), "encode_image", encode_and_crash)
    with pytest.raises(KeyboardInterrupt):
        encode(random_clip, split, split.test, capsys)
    calls += [0] * 3  # no more crashes
    _, said = encode(random_clip, split, split.test, capsys)
    assert "16 features from the cache, 14 to encode" in said


def test_a_cache_that_cannot_be_written_costs_no_run(eurosat, random_clip, capsys, monkeypatch):
    monkeypatch.setattr(images, "CACHE", Path(os.devnull) / "cache")
    split = load_split("eurosat", eurosat)
    found, said = encode(random_clip, split, split.test, capsys)
    assert len(found) == 30 and "features are not cached" in said


def test_an_unreadable_image_is_named(own_eurosat, random_clip):
    split = load_split("eurosat", own_eurosat)
    path = own_eurosat / "eurosat" / split.test[0].path
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(BadInput, match=f"cannot read the image {path}"):
        image_features(random_clip, "x", split, split.test)


def test_a_link_that_leads_nowhere_is_named(own_eurosat, random_clip):
    split = load_split("eurosat", own_eurosat)
    path = own_eurosat / "eurosat" / split.test[0].path
    path.unlink()
    path.symlink_to("nowhere.jpg")
    with pytest.raises(BadInput, match=f"cannot read the image {path}"):
        image_features(random_clip, "x", split, split.test)


def test_features_do_not_depend_on_what_was_cached_before(
    eurosat, random_clip, tmp_path, monkeypatch
):
    split = load_split("eurosat", eurosat)
    together = image_features(random_clip, "x", split, split.test)
    monkeypatch.setattr(images, "CACHE", tmp_path / "another")
    image_features(random_clip, "x", split, split.test[::3])  # other neighbours in the batch
    assert torch.equal(image_features(random_clip, "x", split, split.test), together)


def test_an_image_asked_for_twice_is_answered_twice(eurosat, random_clip):
    split = load_split("eurosat", eurosat)
    found = image_features(random_clip, "x", split, [split.test[0], split.test[1], split.test[0]])
    assert found.shape == (3, 64) and torch.equal(found[0], found[2])


def test_two_runs_may_share_a_cache_at_the_same_time(eurosat, random_clip, capsys):
    split = load_split("eurosat", eurosat)
    with ThreadPoolExecutor(4) as pool:
        jobs = [
            pool.submit(image_features, random_clip, "x", split, split.test[i : i + 20])
            for i in (0, 5, 10, 0)
        ]
        found = [job.result() for job in jobs]
    capsys.readouterr()
    together = image_features(random_clip, "x", split, split.test)
    assert "30 features from the cache, 0 to encode" in capsys.readouterr().out
    for start, part in zip((0, 5, 10, 0), found):
        assert torch.equal(part, together[start : start + 20])
    assert not list(images.CACHE.rglob("*.tmp"))
