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
from conftest import draw_image, parse
from PIL import Image

import eval
import train
from eval import load_run
from lib import cache as feature_cache
from lib import pictures, readers, world
from lib.errors import BadInput


@pytest.fixture(scope="module")
def trained(cache, tmp_path_factory):
    """A run of the built-in world."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(feature_cache, "CACHE", cache)
        train.train(*train.resolve(parse(["--shots", 4, "--epochs", 8, "--out", folder])))
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
    (tmp_path / "names.txt").write_text("red circle\n\nblue star\n")
    for names in ("red circle, blue star", tmp_path / "names.txt"):
        status, lines, _ = run_eval(world_run, "--names", names, "--images", photos)
        assert (status, len(lines)) == (0, 3)
        assert all("red circle" in line and "blue star" in line for line in lines)
    status, _, errors = run_eval(world_run, "--names", "red circle,red zebra", "--images", photos)
    assert status == 2 and "never seen the word 'zebra'" in errors[0]
    status, _, errors = run_eval(world_run, "--names", "one", "--images", photos)
    assert status == 2 and "two class names at least" in errors[0]


@pytest.mark.parametrize("method", ["zeroshot", "ensemble"])
def test_clip_as_it_is_answers_with_its_own_scale(run_train, photos, tmp_path, method):
    run_train(f"--method {method} --shots 1")
    run = load_run(tmp_path / "run")
    image = Image.open(next(photos.glob("0*.png")))
    names, probabilities, weights = run.classify([image], ["red circle", "blue star", "red ring"])
    assert probabilities.shape == (1, 3) and weights.shape == (1, 0)
    assert abs(probabilities.sum() - 1) < 1e-6
    assert probabilities.max() > 0.5  # cosines alone would leave them near a third


def test_table_and_sheet_are_written_on_request_and_never_into_the_run(
    world_run, photos, tmp_path, monkeypatch, run_eval
):
    before = sorted(world_run.iterdir())
    output = "--csv", tmp_path / "found.csv", "--sheet", tmp_path / "found.png"
    sheets, save_figure = [], pictures.save_figure
    monkeypatch.setattr(
        pictures, "save_figure", lambda f, *a, **k: sheets.append(f) or save_figure(f, *a, **k)
    )
    status, lines, _ = run_eval(world_run, "--images", photos, *output)
    assert status == 0 and sorted(world_run.iterdir()) == before
    with open(tmp_path / "found.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["image"] for row in rows] == [line.split(": ")[0] for line in lines]
    for row, line in zip(rows, lines):
        assert f"{row['class 1']} {100 * float(row['probability 1']):.1f}%" in line
        weights = [float(row[template]) for template in load_run(world_run).model.templates]
        assert abs(sum(weights) - 1) < 1e-5
    assert np.asarray(Image.open(tmp_path / "found.png")).std() > 1
    for row, line, axes in zip(rows, lines, sheets[0].axes, strict=False):
        shown = np.asarray(Image.open(row["image"]).convert("RGB"))
        assert np.array_equal(axes.images[0].get_array(), shown)
        answer, *prompts = axes.get_title(loc="left").split("\n")
        assert answer == f"{row['class 1']} {100 * float(row['probability 1']):.0f}%"
        assert f"[{' | '.join(prompts)}]" in line
    for flag in ("--csv", "--sheet"):
        status, _, errors = run_eval(world_run, "--images", photos, flag, world_run / "file")
        assert status == 2 and "in the run's own folder" in errors[0]


def test_photos_are_turned_as_their_camera_was_held(world_run, tmp_path):
    upright = world.draw("red", "arrow", "large", 0, "shapes").resize((48, 32))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be rotated by 90 degrees
    upright.rotate(90, expand=True).save(tmp_path / "turned.png", exif=exif)
    photos, images = next(eval.open_photos([tmp_path / "turned.png"]))
    assert images[0].size == (48, 32)
    assert images[0].tobytes() == upright.tobytes()


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
        *("run --names a,b", "run --csv x.csv", "run --sheet x.png", "--table . --images a"),
        *(f"run --images a.jpg --{f}" for f in ("words", "classes new", "dataset b", "data b")),
        *(f"run --words --{f}" for f in ("classes new", "dataset b", "data b")),
    ],
)
def test_flags_that_mean_nothing_beside_others_are_refused(flags, run_eval):
    status, _, errors = run_eval(*flags.split())
    assert status == 2 and "means nothing here" in errors[0]


def test_every_photo_of_many_is_opened_once_and_in_order(tmp_path):
    files = [tmp_path / f"{i:03d}.png" for i in range(70)]
    for i, file in enumerate(files):
        Image.new("RGB", (4, 4), (i, 0, 0)).save(file)
    opened = list(eval.open_photos(files))
    assert [file for some, _ in opened for file in some] == files
    reds = [image.getpixel((0, 0))[0] for _, images in opened for image in images]
    assert reds == list(range(70))
    assert max(len(some) for some, _ in opened) <= 32


@pytest.mark.parametrize("names", ["cat, dog, cat", "Cat,cat"])  # CLIP reads lower case
def test_names_must_differ(names):
    with pytest.raises(BadInput, match="each once"):
        eval.read_names(names)


def test_no_input_is_ever_replaced(world_run, photos, tmp_path, run_eval):
    first = sorted(photos.glob("*.png"))[0]
    names = tmp_path / "names.txt"
    names.write_text("red circle\nblue star\n")
    before = first.read_bytes(), names.read_bytes()
    for flags in (
        ["--csv", first],
        ["--csv", first.parent / "deep/.." / first.name],
        ["--sheet", first],
        ["--names", names, "--csv", names],
        ["--csv", tmp_path / "x", "--sheet", tmp_path / "x"],
    ):
        status, lines, errors = run_eval(world_run, "--images", photos, *flags)
        assert (status, lines) == (2, []) and "would replace a file that is needed" in errors[0]
    for nowhere in (tmp_path, "", tmp_path / "no/such/folder.csv"):
        status, lines, errors = run_eval(world_run, "--images", photos, "--csv", nowhere)
        assert (status, lines) == (2, []) and "cannot write" in errors[0]
    assert (first.read_bytes(), names.read_bytes()) == before


def test_a_photo_is_answered_as_its_camera_was_held(world_run, tmp_path):
    """Also one that a program has opened, and on the sheet."""
    upright = world.draw("red", "arrow", "large", 0, "shapes").crop((0, 0, 32, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees to see it upright
    upright.transpose(Image.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    turned = Image.open(tmp_path / "turned.png")
    assert turned.size == (20, 32)
    _, probabilities, _ = load_run(world_run).classify([upright, turned])
    assert torch.equal(probabilities[0], probabilities[1])
    assert np.array_equal(readers.thumbnail(tmp_path / "turned.png"), upright)


def test_photos_are_found_whatever_their_name(photos, monkeypatch):
    """By a suffix in capitals, by a name that is a pattern, too."""
    monkeypatch.chdir(photos)
    for name in ("holiday [1].png", "DSC_1.PNG"):
        Path(name).write_bytes(next(photos.glob("0*.png")).read_bytes())
    assert eval.find_photos(["holiday [1].png"]) == [Path("holiday [1].png")]
    assert Path("DSC_1.PNG") in eval.find_photos(["."])


def test_of_many_photos_the_sheet_has_the_first(world_run, tmp_path, monkeypatch, run_eval):
    for i in range(102):
        Image.new("RGB", (4, 4), (i, 0, 0)).save(tmp_path / f"{i:03d}.png")
    drawn = []
    monkeypatch.setattr(pictures, "samples_picture", lambda images, *rest: drawn.extend(images))
    output = "--images", *sorted(tmp_path.glob("*.png")), "--sheet", tmp_path / "sheet.png"
    status, lines, _ = run_eval(world_run, *output)
    assert status == 0 and "shows the first 100 of 102 photos" in lines[-1] and len(lines) == 103
    assert [image.getpixel((0, 0))[0] for image in drawn] == list(range(100))


def test_hidden_files_of_an_album_are_left_out(world_run, photos, run_eval):
    (photos / "._0.png").write_bytes(b"a Mac's leftover")
    (photos / ".thumbs").mkdir()
    (photos / ".thumbs/t.png").write_bytes(next(photos.glob("0*.png")).read_bytes())
    status, lines, errors = run_eval(world_run, "--images", photos)
    assert (status, len(lines), errors) == (0, 3, [])


@pytest.mark.parametrize(
    "mode, most, brightest",
    [("I;16", 65535, 255), ("I;16", 25700, 100), ("I", 2**20, 255), ("F", 1.0, 255)],
)
def test_images_of_more_than_8_bits_are_scaled_not_cut_off(tmp_path, mode, most, brightest):
    ramp = np.linspace(0, most, 256).reshape(16, 16)
    kind = {"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode]
    Image.fromarray(ramp.astype(kind)).save(tmp_path / "deep.tif")
    assert Image.open(tmp_path / "deep.tif").mode == mode
    _, (image,) = next(eval.open_photos([tmp_path / "deep.tif"]))
    grey = np.asarray(image)[..., 0].flatten().astype(int)
    assert np.abs(grey - np.linspace(0, brightest, 256)).max() <= 1


def test_a_names_file_may_start_with_a_byte_order_mark(tmp_path):
    (tmp_path / "names.txt").write_text("\ufeffred star\nblue ring\n", encoding="utf-8")
    assert eval.read_names(str(tmp_path / "names.txt")) == ["red star", "blue ring"]


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
    assert torch.equal(probabilities[0], probabilities[1])
    assert torch.allclose(probabilities[0], probabilities[2]) and probabilities.shape == (9, 20)
    with pytest.raises(BadInput, match="there is no image"):
        run.classify([])
