"""`eval.py RUN --images`: photos that no run has seen, on the command line and from Python."""

import csv
import io
import os
import re
import shutil
import struct
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import draw_image, train_run
from PIL import Image

import train
from eval import load_run
from lib import answers, features, pictures, world
from lib.answers import find_photos, write_csv
from lib.catalogue import read_groups
from lib.errors import BadInput, say
from lib.files import read_torch_file
from lib.photos import open_photo, upright_rgb


@pytest.fixture(scope="module", autouse=True)
def tiny_world():
    """The built-in world with 8 test images per class, and runs without a picture."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(world.PER_CLASS, "test", 8)
        patch.setattr(pictures, "router_picture", lambda result, path: None)
        yield


@pytest.fixture(scope="module")
def world_run(tiny_world, tmp_path_factory):
    """A run of the built-in world."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    train_run("--shots 1 --epochs 2 --lr 0.01 --out", folder)
    return folder


@pytest.fixture
def photos(tmp_path):
    """An album with a sub-folder: one drawing per name."""
    for i, name in enumerate(world.SHAPES_CLASSES[:3]):
        file = tmp_path / f"album/{'deep/' * (i == 2)}{i} {name}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        world.draw(*name.split(), "large", "in no list", "shapes").save(file)
    return tmp_path / "album"


def test_each_photo_gets_a_line_and_a_row_of_the_table(world_run, photos, run_eval):
    deep = photos / f"deep/2 {world.SHAPES_CLASSES[2]}.png"
    pattern = photos / "1*.png"
    table = photos.parent / "found.csv"
    status, lines, errors = run_eval(world_run, "--images", deep, pattern, photos, "--csv", table)
    assert (status, errors, len(lines)) == (0, [], 3)  # each photo once
    with open(table, newline="") as file:
        rows = list(csv.DictReader(file))
    run, right = load_run(world_run), 0
    for line, row in zip(lines, rows, strict=True):
        name = re.search(r"\d ([a-z]+ [a-z]+)\.png: ", line)[1]
        names, probabilities, weights = run.classify([Image.open(line.split(".png")[0] + ".png")])
        best = probabilities[0].argmax()
        assert f".png: {names[best]} {100 * probabilities[0, best]:.1f}%" in line
        assert line.count("%") == 3 + 2  # three classes, two prompts
        assert f"{100 * weights.max():.0f}% {run.model.templates[weights.argmax()]}" in line
        assert row["image"] == line.split(": ")[0]
        assert f"{row['class 1']} {100 * float(row['probability 1']):.1f}%" in line
        in_table = [float(row[template]) for template in run.model.templates]
        assert in_table == pytest.approx(weights[0].tolist(), abs=1e-5)
        right += names[best] == name
    assert right >= 2  # of three; chance is 1 in 20


def test_bad_files_are_named_and_the_rest_goes_on(world_run, photos, run_eval):
    (photos / "0 broken.jpg").write_bytes(b"half a photo")  # the first of all
    status, lines, errors = run_eval(world_run, "--images", photos)
    assert (status, len(lines)) == (1, 3)
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
        ("one", "at least two class names"),
        ("Red ring,red ring", "classes 'Red ring' and 'red ring' apart"),  # CLIP reads lower case
    ):
        status, _, errors = run_eval(world_run, "--names", names, "--images", photos)
        assert status == 2 and said in errors[0]


def test_clip_as_it_is_answers_with_its_own_scale(run_train, photos, tmp_path):
    run_train("--method ensemble --shots 1")
    run = load_run(tmp_path / "run")
    image = Image.open(next(photos.glob("0*.png")))
    names, probabilities, weights = run.classify([image], "red circle,blue star,red ring")
    assert names == ["red circle", "blue star", "red ring"] and weights.shape == (1, 0)
    assert abs(probabilities.sum() - 1) < 1e-6
    assert probabilities.max() > 0.5  # cosines alone would leave them near a third


def test_no_table_replaces_an_input_or_lies_in_the_run(world_run, photos, tmp_path, run_eval):
    names = tmp_path / "names.txt"
    names.write_text("red circle\nblue star\n")
    first, *_ = sorted(photos.glob("*.png"))
    for table, said in (
        (first, "is not an earlier output"),
        (names, "is not an earlier output"),
        (world_run / "file", "in the run's own folder"),
        (tmp_path, "cannot write"),
        (tmp_path / "no/such/folder.csv", "cannot write"),
    ):
        how = "--images", photos, "--names", names, "--csv", table
        status, lines, errors = run_eval(world_run, *how)
        assert (status, lines) == (2, []) and said in errors[0]


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
    shutil.rmtree(tmp_path / "photos")
    before = sorted(cache.rglob("*"))
    names, probabilities, _ = load_run(tmp_path / "run").classify([kept])
    assert names == ["cat", "dog"] and probabilities.shape == (1, 2)
    assert sorted(cache.rglob("*")) == before


@pytest.mark.parametrize(
    "flags",
    [
        *("--table . --images a", "run --export x.npz --csv x.csv", "run --export x.npz --words"),
        *("run --images a.jpg --words", "run --images a.jpg --data b", "run --words --csv x.csv"),
    ],
)
def test_settings_without_effect_are_refused(flags, run_eval):
    status, _, errors = run_eval(*flags.split())
    assert status == 2 and "has no effect here" in errors[0]


def test_photos_are_found_whatever_their_name_unless_they_are_hidden(photos, monkeypatch):
    """By a suffix in capitals, by a name that is a pattern, too."""
    monkeypatch.chdir(photos)
    before = find_photos(["."])
    Path(".thumbs").mkdir()
    for name in ("holiday [1].png", "DSC_1.PNG", "._0.png", ".thumbs/t.png"):
        Path(name).write_bytes(before[0].read_bytes())
    assert find_photos(["holiday [1].png"]) == [Path("holiday [1].png")]
    assert {*find_photos(["."])} == {*before, Path("holiday [1].png"), Path("DSC_1.PNG")}


def test_a_file_name_that_is_no_unicode_stays_itself_in_the_table(tmp_path):
    name = os.fsdecode(b"\xff.png")
    write_csv(tmp_path / "found.csv", [(name, "", [("cat", 1.0)], [1.0])], ["a photo of a {}."])
    assert b"\n\xff.png,cat,1.000000,1.000000" in (tmp_path / "found.csv").read_bytes()


@pytest.mark.parametrize(
    "mode, kind, most, brightest",
    [
        ("I;16", "<u2", 4095, 255),  # 12 bits
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


def test_python_takes_images_of_any_kind_and_mode(world_run, tmp_path):
    run, photo = load_run(world_run), world.draw("red", "arrow", "large", 0, "shapes")
    photo.save(file := tmp_path / "photo.png")
    modes = ["RGB", "L", "P", "RGBA", "CMYK", "LA", "1"]
    several = [photo, file, str(file), np.asarray(photo), *(photo.convert(m) for m in modes)]
    _, probabilities, _ = run.classify(iter(several))
    assert torch.allclose(probabilities[0], probabilities[1:5], rtol=0, atol=1e-6)
    assert probabilities.shape == (11, 20)
    for one in several[:4]:
        assert torch.equal(run.classify(one)[1], run.classify([one])[1])
    pixels = np.asarray(photo)
    for images in (5, b"photo", [photo, None], pixels / 255, pixels[..., 0], pixels[None]):
        with pytest.raises(TypeError, match=r"not a path, PIL image or array \(H, W, 3\) of uint8"):
            run.classify(images)
    for images, said in (([], "there is no image"), ("nowhere", "cannot read the image nowhere")):
        with pytest.raises(BadInput, match=said):
            run.classify(images)


def test_features_are_float_and_of_length_1_but_for_the_linear_probe(world_run):
    run = load_run(world_run)
    good = run.photo_features(world.draw("red", "arrow", "large", 0, "shapes"))
    whole_numbers = torch.eye(good.shape[1], dtype=torch.long)
    too_long = torch.cat([good, 1.01 * good])
    for features_ in (too_long, whole_numbers, good.double(), good[0], good / 0):
        with pytest.raises(BadInput, match="features should be as photo_features returns them"):
            run.classify(features_)
    probe = replace(run, config={**run.config, "method": "linear"})
    assert len(probe.classify(too_long)[1]) == 2
    for features_ in (whole_numbers, good / 0):
        with pytest.raises(BadInput):
            probe.classify(features_)


def test_an_image_that_is_open_is_not_looked_up_by_its_name(tmp_path):
    """Pillow maps files of grey pixels, and opens them again for that."""
    Image.new("L", (8, 8), 9).save(tmp_path / "photo.tif")
    photo = Image.open(tmp_path / "photo.tif")
    (tmp_path / "photo.tif").unlink()
    Image.new("L", (8, 8), 200).save(tmp_path / "photo.tif")
    assert open_photo(photo).getpixel((0, 0)) == (9, 9, 9)


# ------------------------------------------------------------------------------ what is opened


@pytest.mark.parametrize("as_coop", [False, True])
def test_only_pictures_of_half_a_gigapixel_at_most_are_opened(as_coop, tmp_path):
    """For an EPS, Pillow would start Ghostscript."""
    large = chunk(b"IHDR", struct.pack(">II5B", 2**15, 2**14 + 1, 8, 2, 0, 0, 0))
    for content, said in (
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "cannot identify"),
        (png().replace(png()[8:33], large), "exceeds limit of 536870912 pixels"),
    ):
        (tmp_path / "photo.jpg").write_bytes(content)
        with pytest.raises(BadInput, match=f"cannot read the image {tmp_path}/photo.jpg: .*{said}"):
            open_photo(tmp_path / "photo.jpg", as_coop)


@pytest.mark.parametrize("make", [lambda path: os.symlink("/dev/null", path), os.mkfifo])
def test_pipes_and_devices_are_no_files(make, tmp_path):
    """Reading from them may never end."""
    make(tmp_path / "a.png")
    for read in (open_photo, read_groups, lambda path: read_torch_file(path, "checkpoint", {})):
        with pytest.raises((BadInput, OSError), match="a.png is not a file"):
            read(tmp_path / "a.png")


# --------------------------------------------------------------------------------- transparency


@pytest.mark.parametrize(
    "kind, mode",
    [("PNG", mode) for mode in ("RGBA", "LA", "P", "RGB", "L")]
    + [("TIFF", "RGBA"), ("WEBP", "RGBA"), ("GIF", "P")],
)
def test_what_is_transparent_is_white_except_in_the_fields_datasets(kind, mode, tmp_path):
    image = Image.new("RGBA", (2, 1), (255, 0, 0, 0))
    image.putpixel((1, 0), (0, 0, 255, 255))
    if "A" not in mode:
        image = image.convert("RGB").convert(mode)
        image.info["transparency"] = image.getpixel((0, 0))
    file = tmp_path / "photo"
    image.convert(mode).save(file, kind, lossless=True, exact=True)
    own, coops = (np.asarray(open_photo(file, as_coop))[0].tolist() for as_coop in (False, True))
    assert own == [[255, 255, 255], coops[1]]
    assert np.array_equal([coops], Image.open(file).convert("RGB"))


# ------------------------------------------------------------------------- metadata and pixels


PIXELS = np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8)
LOSSLESS = {"WEBP": {"lossless": True}}


def encoded(kind, **options):
    Image.fromarray(PIXELS).save(file := io.BytesIO(), kind, **options)
    return file.getvalue()


def chunk(kind, content, wrong=0):
    checksum = zlib.crc32(kind + content) ^ wrong
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)


def png(*chunks):
    """chunks: between the header and the pixels."""
    whole = encoded("PNG")
    return whole[:33] + b"".join(chunks) + whole[33:]


UPRIGHT = {  # {EXIF's orientation: what makes stored pixels upright}
    1: lambda p: p,
    2: lambda p: p[:, ::-1],
    3: lambda p: p[::-1, ::-1],
    4: lambda p: p[::-1],
    5: lambda p: p.swapaxes(0, 1),
    6: lambda p: np.rot90(p, -1),
    7: lambda p: p[::-1, ::-1].swapaxes(0, 1),
    8: lambda p: np.rot90(p),
}


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_a_photo_is_turned_once_as_its_camera_says(kind, orientation, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    (tmp_path / "photo").write_bytes(encoded(kind, exif=exif, **LOSSLESS.get(kind, {})))
    image = open_photo(tmp_path / "photo")
    assert np.array_equal(image, UPRIGHT[orientation](PIXELS))
    assert np.array_equal(open_photo(Image.open(tmp_path / "photo")), image)
    assert np.array_equal(open_photo(image), image)


@pytest.mark.parametrize(
    "content",
    [
        png(chunk(b"eXIf", b"\0\x08rubbish")),
        png(chunk(b"tEXt", b"Raw profile type exif\0\nexif\n 4\nzzzz")),
        png() + b"rubbish",
    ],
)
def test_damaged_metadata_leaves_the_pixels_as_they_lie(content, tmp_path):
    (tmp_path / "photo").write_bytes(content)
    assert np.array_equal(open_photo(tmp_path / "photo"), PIXELS)


def test_damaged_pixels_are_no_image(tmp_path):
    whole = png()
    at = whole.index(b"IDAT") + 40
    for content in (
        whole[: len(whole) // 2],
        whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :],
        *(encoded(kind)[:-700] for kind in ("JPEG", "GIF")),
    ):
        (tmp_path / "photo").write_bytes(content)
        with pytest.raises(BadInput, match=f"cannot read the image {tmp_path}/photo: "):
            open_photo(tmp_path / "photo")


def test_of_several_pictures_in_a_file_the_first_is_read(tmp_path):
    image, other = Image.fromarray(PIXELS), Image.new("RGB", (40, 24))
    for name in ("a.png", "a.tif"):
        image.save(tmp_path / name, save_all=True, append_images=[other])
        assert np.array_equal(open_photo(tmp_path / name), PIXELS)


# ------------------------------------------------------------------------------ an album streams


def test_an_album_is_read_photo_by_photo_and_its_class_names_once(
    world_run, photos, run_eval, monkeypatch
):
    opened, printed, read = [], [], []
    open_one, text_features = features.open_photo, train.MoCoOp.text_features

    def say_and_count(text):
        printed.append(len(opened))
        say(text)

    monkeypatch.setattr(
        train.MoCoOp, "text_features", lambda *a: read.append(a) or text_features(*a)
    )
    monkeypatch.setattr(features, "open_photo", lambda f: opened.append(f) or open_one(f))
    monkeypatch.setattr(answers, "say", say_and_count)
    status, lines, errors = run_eval(world_run, "--images", photos)
    assert (status, errors, len(lines), len(read)) == (0, [], 3, 1)
    assert printed == [1, 2, 3]


# ------------------------------------------------------------------- pixels of more than 8 bits

RAMP = np.linspace(0, 1, 64).reshape(8, 8)


@pytest.mark.parametrize("missing", [np.nan, -np.inf, -9999, 3.4e38])
def test_missing_pixels_are_black_and_change_no_other(missing):
    """They made the whole picture black, or all the rest of it white."""
    whole = np.asarray(upright_rgb(Image.fromarray(RAMP.astype(np.float32))))
    pixels = RAMP.astype(np.float32)
    pixels[0, 1] = missing
    found = np.array(upright_rgb(Image.fromarray(pixels)))
    assert found[0, 1].tolist() == [0, 0, 0] and found[-1, -1].tolist() == [255, 255, 255]
    found[0, 1] = whole[0, 1]
    assert np.array_equal(found, whole)


def test_a_picture_without_numbers_is_none(tmp_path):
    Image.fromarray(np.full((8, 8), np.nan, np.float32)).save(tmp_path / "scan.tif")
    with pytest.raises(BadInput, match="scan.tif: none of its pixels is a number"):
        open_photo(tmp_path / "scan.tif")
