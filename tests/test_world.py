"""The built-in world: the same everywhere, and a CLIP that fits it."""

import json

import numpy as np
import pytest
import torch
from conftest import HERE
from PIL import Image

from data import load_split
from lib import world
from lib.catalogue import template_groups
from lib.clip_model import TINY_CLIP, load_clip
from prompts import template_features
from tools import make_world

SHIFTED = ["shapes_v2", "shapes_sketch", "shapes_a", "shapes_r"]


def test_there_are_160_classes_of_which_20_are_downstream():
    assert len(world.CLASSES) == len(set(world.CLASSES)) == 160
    assert len(world.SHAPES_CLASSES) == 20 and set(world.SHAPES_CLASSES) <= set(world.CLASSES)
    assert sorted(world.SHAPES_CLASSES) == world.SHAPES_CLASSES


def test_the_other_tasks_are_different_in_kind():
    tasks = world.TASKS
    assert {name: len(classes) for name, classes in tasks.items()} == {
        "shapes": 20, "shapes_fine": 20, "shapes_many": 40, "shapes_cold": 20
    }  # fmt: skip
    for classes in tasks.values():
        assert set(classes) <= set(world.CLASSES) and classes == sorted(set(classes))
    colours, shapes = zip(*(name.split() for name in tasks["shapes_fine"]))
    assert len(set(colours)) == 5 and len(set(shapes)) == 4  # every colour in every shape
    assert not set(tasks["shapes_cold"]) & set(tasks["shapes"])
    for name, classes in tasks.items():
        split = load_split(name, "anywhere")
        assert split.class_names == classes
        assert [len(part) for part in (split.train, split.val, split.test)] == [
            64 * len(classes), 24 * len(classes), 120 * len(classes)
        ]  # fmt: skip
        assert template_groups(name) == template_groups("shapes")


def test_the_cold_camera_is_cold_dull_and_noisy():
    pixels = {
        name: np.stack([
            np.asarray(world.draw(*c.split(), "photo", "test/000", name)) for c in world.CLASSES
        ]).astype(float)
        for name in ("shapes", "shapes_cold")
    }  # fmt: skip
    warm, cold = pixels["shapes"], pixels["shapes_cold"]
    assert warm[..., 0].mean() > warm[..., 2].mean() + 20
    assert cold[..., 2].mean() > cold[..., 0].mean() + 10
    assert cold.std() < 0.8 * warm.std()

    def noise(images):  # between neighbouring rows
        return np.abs(np.diff(images, axis=1)).mean()

    assert noise(cold) > 1.2 * noise(warm)


def test_every_style_has_a_template_group():
    groups = template_groups("shapes")
    assert len(groups) == len(world.STYLES)
    words = ["photo", "large", "small", "many", "sketch", "pixelated", "blurry", "dark"]
    for style, group, word in zip(world.STYLES, groups, words):
        assert style == word and any(word in template for template in group)


def test_the_few_shot_dataset_has_its_lists():
    split = load_split("shapes", "anywhere")
    assert (len(split.train), len(split.val), len(split.test)) == (20 * 64, 20 * 24, 20 * 120)
    assert len({item.path for item in split.train + split.val + split.test}) == 20 * 208
    for style in world.STYLES:
        assert sum(world.style_of(item.path) == style for item in split.test) == 20 * 15


@pytest.mark.parametrize("dataset", SHIFTED)
def test_shifted_test_sets_have_the_same_classes_and_nothing_to_train_on(dataset):
    split = load_split(dataset, "anywhere")
    assert split.class_names == world.SHAPES_CLASSES
    assert split.train == split.val == []
    assert len(split.test) == 20 * 120


@pytest.mark.parametrize("dataset", [*world.TASKS, *SHIFTED])
def test_an_image_is_drawn_from_its_name_alone(dataset):
    split = load_split(dataset, "anywhere")
    for item in split.test[::400]:
        image = split.open(item.path)
        assert image.size == (32, 32) and image.mode == "RGB"
        assert np.array_equal(image, split.open(item.path))
    first, second = (np.asarray(split.open(item.path)) for item in split.test[:2])
    assert not np.array_equal(first, second)


def test_no_image_is_drawn_twice():
    split = load_split("shapes", "anywhere")
    items = {item.path: item for item in split.train + split.val + split.test}
    drawn = {split.open(path).tobytes() for path in items if path.endswith(("000", "001"))}
    assert len(drawn) == 3 * 2 * 20 * len(world.STYLES)


def test_datasets_are_drawn_differently():
    drawn = [
        np.asarray(world.draw("red", "star", world.DATASETS[dataset][0], "test/000", dataset))
        for dataset in [*world.TASKS, *SHIFTED]
    ]
    for i, image in enumerate(drawn):
        assert not any(np.array_equal(image, other) for other in drawn[:i])


def look(dataset, style):
    """Mean red, green and blue, and the mean change from pixel to pixel, of some drawings."""
    drawn = [
        np.asarray(world.draw(*name.split(), style, "test/000", dataset), dtype=float)
        for name in world.CLASSES[::4]
    ]
    pixels = np.stack(drawn)
    changes = (np.abs(np.diff(pixels, axis=axis)).mean() for axis in (1, 2))
    return [*pixels.mean(axis=(0, 1, 2)), *changes]


def test_drawings_look_as_they_always_did():
    """Every number in README.md and docs/RESULTS.md is of these drawings. `world_look.json` holds
    what `look` says of them; libraries may round a little otherwise."""
    expected = json.loads((HERE / "world_look.json").read_text())
    found = {f"{d}/{s}": look(d, s) for d, styles in world.DATASETS.items() for s in styles}
    assert found.keys() == expected.keys()
    for name, numbers in found.items():
        assert numbers == pytest.approx(expected[name], rel=0.01, abs=0.1), name


def test_a_red_star_is_red_and_a_ring_has_a_hole():
    star = np.asarray(world.draw("red", "star", "large", 0)).astype(int)
    middle = star[14:18, 14:18].mean((0, 1))
    assert middle[0] > middle[1] + 80 and middle[0] > middle[2] + 80
    ring = np.asarray(world.draw("blue", "ring", "large", 0)).astype(int)
    blueness = ring[..., 2] - ring[..., 0]
    assert blueness[14:18, 14:18].mean() < 20 < blueness.max()


def test_the_bundled_clip_is_small_and_knows_only_the_worlds_words():
    assert TINY_CLIP.stat().st_size <= 4_000_000
    model, _ = load_clip("bundled", "cpu")
    known = ~model.token_embedding.weight.isnan().any(dim=1)
    assert 40 <= known.sum() <= 60
    # every template of the world with every one of its 160 classes can be read
    templates = [template for group in template_groups("shapes") for template in group]
    assert template_features(model, templates, world.CLASSES).shape == (len(templates), 160, 128)
    state = torch.load(TINY_CLIP, weights_only=True)
    assert all(v.dtype == torch.float16 for k, v in state.items() if k != "token_ids")


def test_the_sheet_shows_every_style_and_shifted_set(tmp_path):
    make_world.draw_sheet(tmp_path / "sheet.png")
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    shape, *_ = world.SHAPES
    rows = [sheet[y : y + 64, 130:194] for y in range(0, len(sheet), 68)]  # its column

    def is_shown(dataset, style):
        drawn = [world.draw(c, shape, style, 0, dataset) for c in world.COLOURS]
        drawn = [np.asarray(image.resize((64, 64), Image.NEAREST)) for image in drawn]
        return any(np.array_equal(row, image) for row in rows for image in drawn)

    for style in world.STYLES:
        assert is_shown(None, style)
    for dataset in ("shapes", "shapes_cold", "shapes_v2", "shapes_a"):
        assert is_shown(dataset, "photo")
    for dataset in ("shapes_sketch", "shapes_r"):
        assert all(is_shown(dataset, style) for style in world.DATASETS[dataset])


def test_training_its_clip_lowers_the_loss_and_saves_what_can_be_loaded(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(make_world, "TINY_CLIP", tmp_path / "assets/tiny_clip.pt")
    for name, value in {"IMAGES_PER_STYLE": 1, "BATCH": 32, "STEPS": 16, "WARM_UP": 2}.items():
        monkeypatch.setattr(make_world, name, value)
    monkeypatch.setattr(make_world.multiprocessing, "Pool", _OneProcess)
    make_world.train_clip()
    losses = [
        float(line.split()[3]) for line in capsys.readouterr().out.splitlines() if "loss" in line
    ]
    assert losses[-1] < losses[0] - 0.5
    model, _ = load_clip(tmp_path / "assets/tiny_clip.pt", "cpu")
    assert template_features(model, ["a photo of a {}."], ["red star"]).isfinite().all()


class _OneProcess:
    """multiprocessing.Pool without processes, so that the changed settings are seen."""

    def __enter__(self):
        return self

    def __exit__(self, *args):
        pass

    imap = staticmethod(map)
