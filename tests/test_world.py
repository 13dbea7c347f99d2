"""The built-in world: the same everywhere, and a CLIP that fits it."""

import json

import numpy as np
import pytest
from conftest import HERE

from data import load_split
from lib import world
from lib.catalogue import template_groups
from lib.clip_model import load_clip
from prompts import template_features


def test_tasks_are_different_in_kind():
    assert len(set(world.CLASSES)) == 160
    tasks = world.TASKS
    assert {name: len(classes) for name, classes in tasks.items()} == {
        "shapes": 20, "shapes_fine": 20, "shapes_many": 40, "shapes_cold": 20
    }  # fmt: skip
    colours, shapes = zip(*(name.split() for name in tasks["shapes_fine"]))
    assert len(set(colours)) == 5 and len(set(shapes)) == 4  # every colour in every shape
    assert not set(tasks["shapes_cold"]) & set(tasks["shapes"])
    for name, classes in tasks.items():
        assert set(classes) <= set(world.CLASSES) and classes == sorted(set(classes))
        split, n = load_split(name, "anywhere"), len(classes)
        assert split.class_names == classes
        assert (len(split.train), len(split.val), len(split.test)) == (64 * n, 24 * n, 120 * n)
        for style in world.STYLES:
            assert sum(world.style_of(item.path) == style for item in split.test) == 15 * n


def test_every_style_has_a_template_group():
    groups = template_groups("shapes")
    assert len(groups) == len(world.STYLES)
    for style, group in zip(world.STYLES, groups):
        assert any(style in template for template in group)


def test_an_image_is_drawn_from_its_name_alone_and_no_image_twice():
    split = load_split("shapes", "anywhere")
    items = split.train[::8] + split.val[::3] + split.test[::15]  # one of each class and style
    drawn = [split.open(item.path) for item in items]
    assert len({image.tobytes() for image in drawn}) == 3 * 20 * 8
    for item, image in list(zip(items, drawn))[::24]:
        assert np.array_equal(split.open(item.path), image)


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


def test_the_bundled_clip_knows_only_the_worlds_words():
    model, _ = load_clip("bundled", "cpu")
    known = ~model.token_embedding.weight.isnan().any(dim=1)
    assert 40 <= known.sum() <= 60
    templates = [template for group in template_groups("shapes") for template in group]
    template_features(model, templates, [*world.COLOURS, *world.SHAPES])  # it reads all
