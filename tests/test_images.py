"""Transforms, views, and the cache of image features."""

import hashlib
import os
import random
import runpy
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import clip
import numpy as np
import pytest
import torch
import torchvision.transforms as T
from conftest import draw_image
from PIL import Image

from data import Item, Split, load_split
from lib import cache, images, processes, world
from lib.clip_model import load_clip
from lib.errors import BadInput
from lib.images import image_features


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "CACHE", tmp_path / "cache")


# -------------------------------------------------------------------------------- transforms


MODES = {"RGB": "jpg", "L": "png", "P": "gif", "CMYK": "jpg", "RGBA": "png", "1": "bmp"}


@pytest.fixture
def photos(tmp_path):
    """A folder with one photo per mode and shape, as a split: RGB, grey, palette, CMYK, ..."""
    rng, items = np.random.default_rng(0), []
    (tmp_path / "photos/a").mkdir(parents=True)
    for mode, suffix in MODES.items():
        for width, height in ((90, 50), (40, 41), (300, 20), (33, 200)):
            pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
            path = f"a/{mode}{width}.{suffix}"
            Image.fromarray(pixels).convert(mode).save(tmp_path / "photos" / path)
            items.append(Item(path, 0))
    return Split("photos", tmp_path / "photos", "coop", ["a"], items, [], items)


def loaded(split, path, view):
    """What CLIP gets of an image: (3, 32, 32)."""
    return images.as_clip_reads([images.load_image(split, path, view, 32)], "cpu")[0]


def test_the_test_transform_is_clips_own_on_images_made_rgb_first_as_coop_does(photos):
    for item in photos.test:
        image = Image.open(photos.folder / item.path).convert("RGB")
        expected = clip.clip._transform(32)(image)
        assert torch.equal(loaded(photos, item.path, None), expected), item.path


def test_a_view_is_what_torchvisions_transforms_draw_from_a_generator_with_its_seed(photos):
    crop = T.RandomResizedCrop(32, scale=(0.08, 1.0), interpolation=T.InterpolationMode.BICUBIC)
    normalise = T.Normalize(images.MEAN, images.STD)
    theirs = T.Compose([crop, T.RandomHorizontalFlip(), T.ToTensor(), normalise])
    for item in photos.train:
        for view in range(6):
            seed = hashlib.sha256(f"{item.path}|{view}".encode()).digest()[:8]
            torch.manual_seed(int.from_bytes(seed, "little"))
            expected = theirs(Image.open(photos.folder / item.path).convert("RGB"))
            assert torch.equal(loaded(photos, item.path, view), expected)


def test_a_view_is_seeded_by_its_path_and_number_alone(eurosat):
    split = load_split("eurosat", eurosat)
    path, other = split.train[0].path, split.train[1].path

    def view(path, number):
        torch.manual_seed(random.randrange(1000))  # whatever else the run drew
        return images.load_image(split, path, number, 32)

    state = torch.get_rng_state()
    images.load_image(split, path, 3, 32)
    assert torch.equal(torch.get_rng_state(), state)  # and takes nothing from the run's own draws
    assert torch.equal(view(path, 3), view(path, 3))
    assert not torch.equal(view(path, 3), view(path, 4))
    assert not torch.equal(view(path, 3), view(other, 3))


def test_images_are_loaded_by_threads_one_batch_ahead():
    loaded, threads = [], set()

    def load(i):
        loaded.append(i)
        threads.add(threading.current_thread())
        return i

    batches = [[(i,) for i in range(start, start + 4)] for start in (0, 4, 8)]
    stream = images._one_ahead(load, batches)
    assert next(stream) == (batches[0], [0, 1, 2, 3])
    while len(loaded) < 8:
        time.sleep(0.001)
    time.sleep(0.05)
    assert sorted(loaded) == list(range(8))  # the second batch, and no more
    assert list(stream) == [(batches[1], [4, 5, 6, 7]), (batches[2], [8, 9, 10, 11])]
    assert threading.main_thread() not in threads


def test_no_more_threads_than_this_process_may_use(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(12)), raising=False)
    assert processes.n_threads() == 12
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")  # torchrun's processes on this machine
    assert processes.n_threads() == 3
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "100")
    assert processes.n_threads() == 1


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


def test_an_image_edited_within_its_size_is_encoded_again(own_eurosat, random_clip, capsys):
    split = load_split("eurosat", own_eurosat)
    encode(random_clip, split, split.test, capsys)
    path = split.folder / split.test[0].path
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    _, said = encode(random_clip, split, split.test, capsys)
    assert "1 to encode" in said


def test_features_name_how_their_image_was_read_or_drawn(
    random_clip, tmp_path, capsys, monkeypatch
):
    """A photo that is to be turned: CoOp does not."""
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    items, found = [Item("turned.png", 0)], []
    for source in ("coop", "folder"):
        split = Split("photos", tmp_path, source, ["a"], items, [], items)
        features, said = encode(random_clip, split, items, capsys)
        assert "1 to encode" in said
        found.append(features)
    assert not torch.allclose(*found, atol=1e-3)
    split = load_split("shapes", "nowhere")
    encode(random_clip, split, split.test[:2], capsys)
    monkeypatch.setattr(world, "SOURCE_HASH", "other drawings")
    assert "2 to encode" in encode(random_clip, split, split.test[:2], capsys)[1]


def test_rows_that_are_no_features_are_not_taken(eurosat, random_clip, capsys):
    split = load_split("eurosat", eurosat)
    before, _ = encode(random_clip, split, split.test, capsys)
    (shard,) = cache.CACHE.rglob("*.npz")
    with np.load(shard) as file:
        keys, rows = file["keys"], file["rows"]
    for damaged in (np.where(np.arange(65) == 3, np.nan, rows), rows[:, :-1], rows[:-1]):
        np.savez(shard, keys=keys, rows=damaged)
        after, said = encode(random_clip, split, split.test, capsys)
        assert "is damaged" in said and "30 to encode" in said
        assert torch.equal(after, before)
        (shard,) = cache.CACHE.rglob("*.npz")


def test_what_encodes_otherwise_shares_nothing(eurosat, random_clip, capsys, monkeypatch):
    """Another CLIP; another Pillow or torchvision, which may resize otherwise; a GPU, in fp16."""
    split, texts, hashed = load_split("eurosat", eurosat), [], cache.hashed
    monkeypatch.setattr(cache, "hashed", lambda text: texts.append(text) or hashed(text))
    encode(random_clip, split, split.test, capsys)
    assert any("|cpu|" in text for text in texts)
    image_features(random_clip, "another fingerprint", split, split.test)
    assert "30 to encode" in capsys.readouterr().out
    for library in ("Pillow", "torchvision"):
        with monkeypatch.context() as patch:
            if library == "Pillow":
                patch.setattr(images.PIL, "__version__", "0.1")
            else:
                patch.setattr(images, "version", lambda name: "0.1")
            assert "30 to encode" in encode(random_clip, split, split.test, capsys)[1]
    assert " 0 to encode" in encode(random_clip, split, split.test, capsys)[1]


@pytest.mark.parametrize("place", ["/elsewhere", ""])
def test_the_cache_is_where_the_user_has_caches(place, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", place)
    monkeypatch.setenv("HOME", "/home/somebody")
    found = runpy.run_path(cache.__file__)["CACHE"]
    assert str(found) == f"{place or '/home/somebody/.cache'}/mocoop"


def test_drawn_images_are_not_cropped_while_the_encoder_learns():
    clip_model, fingerprint = load_clip("bundled", "cpu")
    split = load_split("shapes", "nowhere")
    split = replace(split, train=split.train[:6])
    load = images.training_features(clip_model, fingerprint, split, split.views(8), live=True)
    (found,) = load([torch.arange(6)], torch.zeros(6, dtype=torch.long), 3)
    expected = image_features(clip_model, fingerprint, split, split.train)
    assert torch.allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("damage", ["cut", "flip"])
def test_a_damaged_cache_file_is_recomputed_never_trusted(eurosat, random_clip, capsys, damage):
    split = load_split("eurosat", eurosat)
    before, _ = encode(random_clip, split, split.test, capsys)
    (shard,) = cache.CACHE.rglob("*.npz")
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

    def encode_and_crash(clip_model, batch, dtype):
        calls.append(len(batch))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return clip_model.visual(batch)

    monkeypatch.setitem(images.BATCH, "cpu", 8)
    monkeypatch.setattr(images, "encode_images", encode_and_crash)
    with pytest.raises(KeyboardInterrupt):
        encode(random_clip, split, split.test, capsys)
    calls += [0] * 3  # no more crashes
    _, said = encode(random_clip, split, split.test, capsys)
    assert "16 features from the cache, 14 to encode" in said


def test_a_cache_that_cannot_be_written_costs_no_run(eurosat, random_clip, capsys, monkeypatch):
    monkeypatch.setattr(cache, "CACHE", Path(os.devnull) / "cache")
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
    monkeypatch.setattr(cache, "CACHE", tmp_path / "another")
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
    assert not list(cache.CACHE.rglob("*.tmp"))


def test_a_copy_of_a_dataset_and_its_cache_finds_everything(
    eurosat, random_clip, tmp_path, monkeypatch, capsys
):
    split = load_split("eurosat", eurosat)
    before, _ = encode(random_clip, split, split.test, capsys)
    shutil.copytree(eurosat, tmp_path / "elsewhere")  # new paths, new times
    for file in (tmp_path / "elsewhere").rglob("*.jpg"):
        os.utime(file, (1, 1))
    shutil.copytree(cache.CACHE, tmp_path / "copied cache")
    monkeypatch.setattr(cache, "CACHE", tmp_path / "copied cache")
    copied = load_split("eurosat", tmp_path / "elsewhere")
    after, said = encode(random_clip, copied, copied.test, capsys)
    assert "30 features from the cache, 0 to encode" in said
    assert torch.equal(after, before)


def test_files_are_read_for_their_digest_once(eurosat, random_clip, capsys, monkeypatch):
    split = load_split("eurosat", eurosat)
    encode(random_clip, split, split.test, capsys)
    read = []
    original = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda file: read.append(file) or original(file))
    encode(random_clip, split, split.test, capsys)
    assert read == []
    (cache.CACHE / "eurosat/index.json").write_text("[damaged")
    _, said = encode(random_clip, split, split.test, capsys)
    assert len(read) == 30 and "0 to encode" in said


def test_an_image_of_the_same_size_and_time_but_other_bytes_is_noticed(
    own_eurosat, random_clip, capsys
):
    """After its index entry is gone, as on another machine."""
    split = load_split("eurosat", own_eurosat)
    before, _ = encode(random_clip, split, split.test, capsys)
    path = split.folder / split.test[0].path
    content, stat = bytearray(path.read_bytes()), path.stat()
    content[-3] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    (cache.CACHE / "eurosat/index.json").unlink()
    _, said = encode(random_clip, split, split.test, capsys)
    assert "1 to encode" in said


def test_shards_can_be_read_by_whoever_the_umask_allows(eurosat, random_clip, capsys):
    before = os.umask(0o022)
    try:
        split = load_split("eurosat", eurosat)
        encode(random_clip, split, split.test, capsys)
    finally:
        os.umask(before)
    modes = {file.stat().st_mode & 0o777 for file in cache.CACHE.rglob("*.*")}
    assert modes == {0o644}


def test_the_norm_of_a_feature_is_kept_beside_it(eurosat, random_clip, capsys):
    split = load_split("eurosat", eurosat)
    unit, _ = encode(random_clip, split, split.test, capsys)
    (shard,) = cache.CACHE.rglob("*.npz")
    rows = torch.from_numpy(np.load(shard)["rows"])
    pixels = [loaded(split, item.path, None) for item in split.test]
    raw = random_clip.encode_image(torch.stack(pixels))
    assert torch.allclose(rows[:, :-1] * rows[:, -1:], raw, atol=1e-4)
    assert torch.equal(rows[:, :-1], unit)


def test_features_that_are_not_finite_stop_the_run_and_are_never_cached(
    eurosat, random_clip, monkeypatch
):
    split = load_split("eurosat", eurosat)

    def damaged(clip_model, batch, dtype):
        features = clip_model.visual(batch)
        features[5, 0] = torch.nan
        return features

    monkeypatch.setattr(images, "encode_images", damaged)
    with pytest.raises(BadInput, match=f"{split.test[5].path} are not finite numbers"):
        image_features(random_clip, "x", split, split.test)
    assert not list(cache.CACHE.rglob("*.npz"))


def test_what_killed_runs_left_in_the_cache_goes_when_it_is_old(eurosat, random_clip, capsys):
    split = load_split("eurosat", eurosat)
    encode(random_clip, split, split.test[:3], capsys)
    (shard,) = cache.CACHE.rglob("*.npz")
    old, young = shard.with_name("old.tmp"), shard.with_name("young.tmp")
    old.write_text("half"), young.write_text("half")
    os.utime(old, (1, 1))
    encode(random_clip, split, split.test, capsys)
    assert young.exists() and not old.exists()
