"""`eval.py RUN --images`: photos that no run has seen, on the command line and from Python."""

import csv
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import config_of, draw_image
from PIL import Image

import eval
import train
from eval import load_run
from lib import features as feature_cache
from lib import world
from lib.photos import find_photos, open_photo
from lib.runs import BadInput


@pytest.fixture(scope="module")
def trained(cache, tmp_path_factory):
    """A run of the built-in world."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(feature_cache, "CACHE", cache)
        train.run(config_of("--shots", 4, "--epochs", 8, "--out", folder))
    return folder


@pytest.fixture
def world_run(trained, tmp_path):
    """A copy that a test may damage."""
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def photos(tmp_path):
    """An album with a sub-folder: one drawing per name."""
    for i, name in enumerate(world.SHAPES_CLASSES[:3]):
        file = tmp_path / f"album/{'deep/' * (i == 2)}{i} {name}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        world.draw(*name.split(), "large", "in no list", "shapes").save(file)
    return tmp_path / "album"


def test_each_photo_gets_a_line_with_classes_and_prompts(world_run, photos, run_eval):
    deep = photos / f"deep/2 {world.SHAPES_CLASSES[2]}.png"
    pattern = photos / "1*.png"
    status, lines, errors = run_eval(world_run, "--images", deep, pattern, photos)
    assert (status, errors, len(lines)) == (0, [], 3)  # each photo once
    run, right = load_run(world_run), 0
    for line in lines:
        name = re.search(r"\d ([a-z]+ [a-z]+)\.png: ", line)[1]
        names, probabilities, weights = run.classify([Image.open(line.split(".png")[0] + ".png")])
        best = probabilities[0].argmax()
        assert f".png: {names[best]} {100 * probabilities[0, best]:.1f}%" in line
        assert line.count("%") == 3 + 2  # three classes, two prompts
        assert f"{100 * weights.max():.0f}% {run.model.templates[weights.argmax()]}" in line
        right += names[best] == name
    assert right >= 2  # of three; chance is 1 in 20


def test_bad_files_are_named_and_the_rest_goes_on(world_run, photos, run_eval):
    _, answers, _ = run_eval(world_run, "--images", photos)
    (photos / "0 broken.jpg").write_bytes(b"half a photo")  # the first of all
    status, lines, errors = run_eval(world_run, "--images", photos)
    assert (status, lines) == (1, answers) and len(lines) == 3
    assert len(errors) == 1 and "0 broken.jpg" in errors[0]
    status, lines, errors = run_eval(world_run, "--images", photos / "0 broken.jpg")
    assert (status, lines) == (2, []) and "none of 1 images could be read" in errors[-1]
    status, lines, errors = run_eval(world_run, "--images", "nowhere*.png")
    assert (status, lines, errors) == (2, [], ["nowhere*.png names no image"])


def test_class_names_of_ones_own(world_run, photos, tmp_path, run_eval):
    (tmp_path / "names.txt").write_text("\ufeffred circle\n\nblue star\n", encoding="utf-8")
    for names in ("red circle, blue star", tmp_path / "names.txt"):
        status, lines, _ = run_eval(world_run, "--names", names, "--images", photos)
        assert (status, len(lines)) == (0, 3)
        assert all("red circle" in line and "blue star" in line for line in lines)
    for names, said in (
        ("red circle,red zebra", "never seen the word 'zebra'"),
        ("one", "two class names at least"),
        ("red ring, blue ring, red ring", "each once"),
        ("Red ring,red ring", "each once"),  # CLIP reads lower case
    ):
        status, _, errors = run_eval(world_run, "--names", names, "--images", photos)
        assert status == 2 and said in errors[0]


@pytest.mark.parametrize("method", ["zeroshot", "ensemble"])
def test_clip_as_it_is_answers_with_its_own_scale(run_train, photos, tmp_path, method):
    run_train(f"--method {method} --shots 1")
    run = load_run(tmp_path / "run")
    image = Image.open(next(photos.glob("0*.png")))
    names, probabilities, weights = run.classify([image], ["red circle", "blue star", "red ring"])
    assert probabilities.shape == (1, 3) and weights.shape == (1, 0)
    assert abs(probabilities.sum() - 1) < 1e-6
    assert probabilities.max() > 0.5  # cosines alone would leave them near a third


def test_a_table_is_written_on_request(world_run, photos, tmp_path, run_eval):
    table = tmp_path / "found.csv"
    status, lines, _ = run_eval(world_run, "--images", photos, "--csv", table)
    assert status == 0
    with open(table, newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["image"] for row in rows] == [line.split(": ")[0] for line in lines]
    for row, line in zip(rows, lines):
        assert f"{row['class 1']} {100 * float(row['probability 1']):.1f}%" in line
        weights = [float(row[template]) for template in load_run(world_run).model.templates]
        assert sum(weights) == pytest.approx(1, abs=1e-5)


def test_no_table_replaces_an_input_or_lies_in_the_run(world_run, photos, tmp_path, run_eval):
    names = tmp_path / "names.txt"
    names.write_text("red circle\nblue star\n")
    first, *_ = sorted(photos.glob("*.png"))
    for table, said in (
        (first, "would replace a file that is needed"),
        (first.parent / "deep/.." / first.name, "would replace a file that is needed"),
        (names, "would replace a file that is needed"),
        (world_run / "file", "in the run's own folder"),
        (tmp_path, "cannot write"),
        ("", "cannot write"),
        (tmp_path / "no/such/folder.csv", "cannot write"),
    ):
        how = "--images", photos, "--names", names, "--csv", table
        status, lines, errors = run_eval(world_run, *how)
        assert (status, lines) == (2, []) and said in errors[0]


def test_a_photo_is_answered_as_its_camera_was_held(world_run, tmp_path):
    """Also one that a program has opened."""
    upright = world.draw("red", "arrow", "large", 0, "shapes").crop((0, 0, 32, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees to see it upright
    upright.transpose(Image.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    turned = Image.open(tmp_path / "turned.png")
    assert turned.size == (20, 32)
    _, probabilities, _ = load_run(world_run).classify([upright, turned])
    assert torch.allclose(probabilities[0], probabilities[1], rtol=0, atol=1e-6)
    assert np.array_equal(open_photo(tmp_path / "turned.png"), upright)


def test_a_run_needs_neither_its_dataset_nor_its_cache(
    run_train, random_clip_file, tmp_path, cache
):
    """A run on a folder of photos, on a machine that has the run alone."""
    for name in ("cat", "dog"):
        for i in range(6):
            draw_image(tmp_path / f"photos/{name}/{i}.jpg", f"{name}{i}")
    flags = "--epochs 1 --views 1 --clip"
    run_train(flags, random_clip_file, "--dataset", tmp_path / "photos")
    kept = Image.open(tmp_path / "photos/cat/0.jpg").copy()
    for file in (tmp_path / "photos").rglob("*.jpg"):
        file.unlink()
    before = sorted(cache.rglob("*"))
    names, probabilities, _ = load_run(tmp_path / "run").classify([kept])
    assert names == ["cat", "dog"] and probabilities.shape == (1, 2)
    assert sorted(cache.rglob("*")) == before


@pytest.mark.parametrize(
    "flags",
    [
        *("run --names a,b", "run --csv x.csv", "--table . --images a"),
        *(f"run --images a.jpg --{f}" for f in ("words", "classes new", "dataset b", "data b")),
        *(f"run --words --{f}" for f in ("classes new", "dataset b", "data b")),
    ],
)
def test_settings_without_effect_are_refused(flags, run_eval):
    status, _, errors = run_eval(*flags.split())
    assert status == 2 and "has no effect here" in errors[0]


def test_photos_are_found_whatever_their_name(photos, monkeypatch):
    """By a suffix in capitals, by a name that is a pattern, too."""
    monkeypatch.chdir(photos)
    for name in ("holiday [1].png", "DSC_1.PNG"):
        Path(name).write_bytes(next(photos.glob("0*.png")).read_bytes())
    assert find_photos(["holiday [1].png"]) == [Path("holiday [1].png")]
    assert Path("DSC_1.PNG") in find_photos(["."])


def test_hidden_files_of_an_album_are_left_out(world_run, photos, run_eval):
    (photos / "._0.png").write_bytes(b"a Mac's leftover")
    (photos / ".thumbs").mkdir()
    (photos / ".thumbs/t.png").write_bytes(next(photos.glob("0*.png")).read_bytes())
    status, lines, errors = run_eval(world_run, "--images", photos)
    assert (status, len(lines), errors) == (0, 3, [])


@pytest.mark.parametrize(
    "mode, kind, most, brightest",
    [
        ("I;16", "<u2", 65535, 255),
        ("I;16", "<u2", 25700, 100),
        ("I;16B", ">u2", 25700, 100),
        ("I", "<i4", 2**20, 255),
        ("F", "<f4", 1.0, 255),
    ],
)
def test_images_of_more_than_8_bits_are_scaled_not_cut_off(tmp_path, mode, kind, most, brightest):
    ramp = np.linspace(0, most, 256).astype(kind)
    Image.frombytes(mode, (16, 16), ramp.tobytes()).save(tmp_path / "deep.tif")
    assert Image.open(tmp_path / "deep.tif").mode == mode
    grey = np.asarray(open_photo(tmp_path / "deep.tif"))[..., 0].flatten().astype(int)
    assert np.abs(grey - np.linspace(0, brightest, 256)).max() <= 1


def test_a_file_name_that_is_no_unicode_costs_nothing(
    world_run, photos, tmp_path, capsys, monkeypatch
):
    odd = os.fsencode(photos) + b"/\xff.png"
    os.rename(next(photos.glob("0*.png")), odd)
    flags = "--images", photos, "--csv", tmp_path / "found.csv"
    done = subprocess.run(
        [sys.executable, "eval.py", world_run, *flags],
        cwd=eval.Path(eval.__file__).parent, capture_output=True,
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
    )  # fmt: skip
    assert done.returncode == 0 and done.stderr == b"" and done.stdout.count(b"\n") == 3
    assert odd in (tmp_path / "found.csv").read_bytes()


def test_photos_of_any_mode_and_one_photo_twice_are_answered_from_python(world_run):
    run = load_run(world_run)
    photo = world.draw("red", "arrow", "large", 0, "shapes").resize((48, 40))
    modes = ["RGB", "L", "P", "RGBA", "CMYK", "LA", "1"]
    _, probabilities, _ = run.classify([photo, photo, *(photo.convert(m) for m in modes)])
    assert torch.allclose(probabilities[0], probabilities[1:3], rtol=0, atol=1e-6)
    assert probabilities.shape == (9, 20)
    with pytest.raises(BadInput, match="there is no image"):
        run.classify([])
