"""Image features: transforms, views, and the cache.

Features encoded among other neighbours, or by other operations, may differ by rounding: matrix
products may add up in another order. `close` allows for it. Features taken from the cache, and the
same images encoded again in the same batches, are equal to the bit.
"""

import hashlib
import itertools
import os
import random
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import clip
import numpy as np
import pytest
import torch
import torchvision.transforms as T
from conftest import draw_image
from PIL import Image

from data import Item, Split, load_split
from lib import features, world
from lib.clip_model import load_clip
from lib.errors import BadInput
from lib.features import image_features


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(features, "CACHE", tmp_path / "cache")


def close(a, b, atol=1e-6):
    return torch.allclose(a, b, rtol=0, atol=atol)


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
    return features.as_clip_reads([features.load_image(split, path, view, 32)], "cpu")[0]


def test_the_test_transform_is_clips_own_on_images_made_rgb_first_as_coop_does(photos):
    for item in photos.test:
        image = Image.open(photos.folder / item.path).convert("RGB")
        expected = clip.clip._transform(32)(image)
        assert close(loaded(photos, item.path, None), expected), item.path


def noise(width, height, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def differences(image, size=32):
    """From the whole picture resized, then cropped."""
    whole = T.Resize(size, T.InterpolationMode.BICUBIC)(image)
    expected = T.functional.pil_to_tensor(T.CenterCrop(size)(whole))
    return (features.preprocess(image, size).int() - expected.int()).abs()


def test_up_to_eight_times_as_long_not_one_pixel_differs_from_resizing_the_whole():
    rng = random.Random(0)
    for i in range(30):
        short = rng.randrange(1, 70)
        sides = short, min(8 * short, round(short * rng.uniform(1, 8.2)))
        image = noise(*sides[:: rng.choice((1, -1))], seed=i)
        assert differences(image, rng.choice((32, 48, 224))).max() == 0, image.size


def test_beyond_the_part_that_stays_is_resized_alone_and_hardly_differs():
    for i, sides in enumerate([(600, 70), (33, 2001), (64, 513)]):
        assert differences(noise(*sides, seed=i)).max() <= 2, sides  # of 255
    # Its whole resized picture would have 3.3 gigapixels.
    for sides in ((65000, 1), (1, 65000)):
        assert features.preprocess(noise(*sides), 224).shape == (3, 224, 224)


def test_a_view_is_what_torchvisions_transforms_draw_from_a_generator_with_its_seed(photos):
    crop = T.RandomResizedCrop(32, scale=(0.08, 1.0), interpolation=T.InterpolationMode.BICUBIC)
    normalise = T.Normalize(features.MEAN, features.STD)
    theirs = T.Compose([crop, T.RandomHorizontalFlip(), T.ToTensor(), normalise])
    for item in photos.train:
        for view in range(2):
            seed = hashlib.sha256(f"{item.path}|{view}".encode()).digest()[:8]
            torch.manual_seed(int.from_bytes(seed, "little"))
            expected = theirs(Image.open(photos.folder / item.path).convert("RGB"))
            state = torch.get_rng_state()
            assert close(loaded(photos, item.path, view), expected)
            assert torch.equal(torch.get_rng_state(), state)  # nothing of the run's own draws


# --------------------------------------------------------------------------------- the cache


@pytest.fixture
def split(eurosat):
    return load_split("eurosat", eurosat)


@pytest.fixture
def encode(random_clip, capsys):
    """(features, printed line)"""

    def encode(split, items, *views, fingerprint="x"):
        found = image_features(random_clip, fingerprint, split, items, *views)
        return found, capsys.readouterr().out

    return encode


def test_features_are_clips_own_normalised_or_raw(split, random_clip, encode):
    preprocess = clip.clip._transform(32)
    pixels = [preprocess(Image.open(split.folder / item.path)) for item in split.test]
    theirs = random_clip.encode_image(torch.stack(pixels))
    ours, _ = encode(split, split.test)
    # 1e-5: `random_clip` subtracts what its features have in common, and so enlarges rounding.
    assert close(ours, theirs / theirs.norm(dim=-1, keepdim=True), 1e-5)
    raw = image_features(random_clip, "x", split, split.test, raw=True)  # from the cache
    assert torch.allclose(raw, theirs, rtol=1e-5, atol=1e-4)


def test_an_image_is_encoded_once(split, encode):
    together, said = encode(split, split.test, fingerprint="another")
    first, said = encode(split, split.test[::3])  # other neighbours, at other positions
    assert "10, 0 features from the cache, 10 to encode" in said
    again, said = encode(split, split.test)
    assert "30, 10 features from the cache, 20 to encode" in said
    assert torch.equal(again[::3], first) and close(again, together)
    twice, said = encode(split, [split.test[3], split.test[3]])
    assert "1 features from the cache, 0 to encode" in said
    assert torch.equal(twice, first[[1, 1]])


def test_views_are_encoded_once_each_and_differ(split, encode):
    first, said = encode(split, split.train[:5], 3)
    assert first.shape == (5, 3, 64) and "15 to encode" in said
    more, said = encode(split, split.train[:5], 4)
    assert "15 features from the cache, 5 to encode" in said
    assert torch.equal(more[:, :3], first)
    assert not close(first[:, 0], first[:, 1], 1e-3)


def test_a_changed_image_is_encoded_again(own_eurosat, encode):
    split = load_split("eurosat", own_eurosat)
    before, _ = encode(split, split.test)
    path = split.folder / split.test[0].path
    draw_image(path, seed="another drawing")
    after, said = encode(split, split.test)
    assert "1 to encode" in said
    assert not close(after[0], before[0], 1e-3)
    assert torch.equal(after[1:], before[1:])

    content, stat = bytearray(path.read_bytes()), path.stat()
    content[-3] ^= 1  # its size and time stay
    path.write_bytes(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert "1 to encode" in encode(split, split.test)[1]


def test_features_name_how_their_image_was_read_or_drawn(encode, tmp_path, monkeypatch):
    """A photo that is to be turned: CoOp does not."""
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    items, found = [Item("turned.png", 0)], []
    for source in ("coop", "folder"):
        split = Split("photos", tmp_path, source, ["a"], items, [], items)
        rows, said = encode(split, items)
        assert "1 to encode" in said
        found.append(rows)
    assert not close(*found, 1e-3)
    split = load_split("shapes", "nowhere")
    encode(split, split.test[:2])
    monkeypatch.setattr(world, "SOURCE_HASH", "other drawings")
    assert "2 to encode" in encode(split, split.test[:2])[1]


def test_what_encodes_otherwise_shares_nothing(split, encode, monkeypatch):
    """Another CLIP; another Pillow or torchvision, which may resize otherwise; a GPU, in fp16."""
    items, texts, hashed = split.test[:2], [], features._hashed
    monkeypatch.setattr(features, "_hashed", lambda text: texts.append(text) or hashed(text))
    encode(split, items)
    assert any("|cpu|" in text for text in texts)
    assert "2 to encode" in encode(split, items, fingerprint="another")[1]
    for place, name, value in (
        (features.PIL, "__version__", "0.1"),
        (features, "version", lambda library: "0.1"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(place, name, value)
            assert "2 to encode" in encode(split, items)[1]
    assert " 0 to encode" in encode(split, items)[1]


def flip_a_bit(shard):
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)


def hold(change):
    """Makes a shard hold other rows, under valid checksums."""

    def damage(shard):
        with np.load(shard) as file:
            keys, rows = file["keys"], file["rows"]
        np.savez(shard, keys=keys, rows=change(rows))

    return damage


def one_number(column, value):
    """Changes one number in one row, 64 of a unit vector and its norm before scaling."""

    def change(rows):
        rows[3, column] = value
        return rows

    return hold(change)


TERABYTES = b"{'descr': '|u1', 'fortran_order': False, 'shape': (4398046511104,)}"
NO_SHARD = {
    "a flipped bit": flip_a_bit,
    "NaN": one_number(3, np.nan),
    "norm 0": one_number(64, 0),
    "infinite norm": one_number(64, np.inf),
    "longer vectors": hold(lambda rows: 1.002 * rows),
    "int8": hold(lambda rows: rows.astype(np.int8)),
    "float64": hold(lambda rows: rows.astype(np.float64)),
    "objects": hold(lambda rows: rows.astype(object)),
    "another width": hold(lambda rows: rows[:, 1:]),
    "a row too few": hold(lambda rows: rows[1:]),
    "terabytes": lambda shard: shard.write_bytes(b"\x93NUMPY\1\0\x76\0" + TERABYTES.ljust(118)),
    "another program's": lambda shard: np.savez(shard, weight=np.ones(3)),
}


@pytest.mark.parametrize("what", NO_SHARD)
def test_what_is_no_shard_is_neither_trusted_nor_deleted(split, encode, what):
    before, _ = encode(split, split.test)
    (shard,) = features.CACHE.rglob("*.npz")
    good = shard.read_bytes()
    NO_SHARD[what](shard)
    bad, other = shard.read_bytes(), shard.rename(shard.with_name("another name.npz"))
    for _ in range(2):
        after, said = encode(split, split.test)
        assert f"{other} is left out" in said and "30 to encode" in said
        assert torch.equal(after, before)
        assert other.read_bytes() == bad and shard.read_bytes() == good
        shard.write_bytes(bad)  # under the name that the next run writes


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
def test_what_is_no_file_is_not_opened(split, encode, make):
    encode(split, split.test)
    (shard,) = features.CACHE.rglob("*.npz")
    make(other := shard.with_name("another name.npz"))
    assert encode(split, split.test)[1].startswith("images: 30, 30 features from the cache")
    assert other.exists()


def test_what_was_encoded_a_minute_before_a_crash_is_kept(split, encode, monkeypatch):
    """Batches take 20 seconds. In the fourth, 16 features have been saved, and 8 are 20 s old."""
    monkeypatch.setitem(features.BATCH, "cpu", 8)
    whole, _ = encode(split, split.test, fingerprint="another")
    calls, encode_images = [], features.encode_images

    def encode_and_crash(*batch):
        calls.append(batch)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return encode_images(*batch)

    monkeypatch.setattr(features, "time", SimpleNamespace(monotonic=lambda: 20 * len(calls)))
    monkeypatch.setattr(features, "encode_images", encode_and_crash)
    with pytest.raises(KeyboardInterrupt):
        encode(split, split.test)
    found, said = encode(split, split.test)
    assert "16 features from the cache, 14 to encode" in said
    assert torch.equal(found, whole)  # the same batches


def test_the_first_of_two_processes_decides_when_to_save(split, random_clip, encode, monkeypatch):
    """Threads instead. A minute passes in every step of the first one, and never in the other. In
    the third step there is one image, for the first."""
    monkeypatch.setitem(features.BATCH, "cpu", 4)
    alone, _ = encode(split, split.test[:17], fingerprint="another")
    process, things = threading.local(), [None, None]
    barrier, minutes = threading.Barrier(2, timeout=20), itertools.count()

    def gather(thing):
        things[process.rank] = thing
        barrier.wait()
        found = list(things)
        barrier.wait()
        return found

    def run(rank):
        process.rank = rank
        return image_features(random_clip, "x", split, split.test[:17])

    both = SimpleNamespace(world=lambda: 2, rank=lambda: process.rank, gather=gather)
    monkeypatch.setattr(features, "parallel", both)
    clock = SimpleNamespace(monotonic=lambda: 0 if process.rank else 60 * next(minutes))
    monkeypatch.setattr(features, "time", clock)
    with ThreadPoolExecutor(2) as pool:
        for found in pool.map(run, (0, 1)):
            assert close(found, alone)
    assert len(list(features.CACHE.rglob("*.npz"))) == 1 + 3


def test_a_cache_that_cannot_be_written_costs_no_run(split, encode, monkeypatch):
    monkeypatch.setattr(features, "CACHE", Path(os.devnull) / "cache")
    found, said = encode(split, split.test)
    assert len(found) == 30 and "features are not cached" in said


def test_two_runs_may_share_a_cache_at_the_same_time(split, random_clip, encode):
    starts = 0, 5, 10, 0
    with ThreadPoolExecutor(4) as pool:
        jobs = [
            pool.submit(image_features, random_clip, "x", split, split.test[i : i + 20])
            for i in starts
        ]
        found = [job.result() for job in jobs]
    together, said = encode(split, split.test)
    assert "30 features from the cache, 0 to encode" in said
    for start, part in zip(starts, found):
        assert close(part, together[start : start + 20])
    assert not list(features.CACHE.rglob("*.tmp"))


def test_a_copy_of_a_dataset_and_its_cache_finds_everything(
    split, eurosat, encode, tmp_path, monkeypatch
):
    before, _ = encode(split, split.test)
    shutil.copytree(eurosat, tmp_path / "elsewhere")  # new paths, new times
    for item in split.test:
        os.utime(tmp_path / "elsewhere/eurosat" / item.path, (1, 1))
    shutil.copytree(features.CACHE, tmp_path / "copied cache")
    monkeypatch.setattr(features, "CACHE", tmp_path / "copied cache")
    copied = load_split("eurosat", tmp_path / "elsewhere")
    after, said = encode(copied, copied.test)
    assert "30 features from the cache, 0 to encode" in said
    assert torch.equal(after, before)


def test_features_that_are_not_finite_stop_the_run_and_are_never_cached(split, encode, monkeypatch):
    def damaged(clip_model, batch, dtype):
        found = clip_model.visual(batch)
        found[5, 0] = torch.nan
        return found

    monkeypatch.setattr(features, "encode_images", damaged)
    with pytest.raises(BadInput, match=f"{split.test[5].path} are not finite numbers"):
        encode(split, split.test)
    assert not list(features.CACHE.rglob("*.npz"))


# ---------------------------------------------------------------------------- while training


def test_cached_and_live_images_are_the_same_to_a_training_loop():
    """Drawn images, which nobody crops: their one view is the test transform."""
    clip_model, fingerprint = load_clip("bundled", "cpu")
    split = load_split("shapes", "nowhere")
    split = replace(split, train=split.train[:6])
    batches, views = [torch.tensor([4, 1]), torch.tensor([0, 5])], torch.zeros(6, dtype=torch.long)
    expected = image_features(clip_model, fingerprint, split, split.train)
    for live in (False, True):
        images = features.training_features(clip_model, fingerprint, split, 8, live)
        assert images.n_views == 1
        found = list(images.batches(batches, views, epoch=3))
        assert [len(batch) for batch in found] == [2, 2]
        assert close(torch.cat(found), expected[[4, 1, 0, 5]])
