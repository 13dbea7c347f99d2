"""Folders of one's own: what belongs to a class, what is left out, what their names mean."""

import json
import os
import random
import re
from dataclasses import replace

import pytest
import torch
from conftest import draw_image
from PIL import Image

import eval
import train
from data import Item, Split, load_split, select_classes
from lib import features, results
from lib.answers import find_photos
from lib.catalogue import read_groups
from lib.errors import BadInput
from lib.features import _content_names, image_features
from lib.runs import find_runs
from prompts import PromptError


def make(folder, *classes, n=6):
    """A folder with n drawn images in each of its class folders."""
    for name in classes:
        for i in range(n):
            draw_image(folder / name / f"{i}.jpg", f"{name}{i}")
    return folder


def paths_of(split):
    return {item.path for part in (split.train, split.val, split.test) for item in part}


# ------------------------------------------------------------------------- what belongs to a class


def test_images_in_folders_below_a_class_folder_belong_to_it(tmp_path, capsys):
    make(tmp_path / "photos", "cat", "cat/2023/may", "dog", n=4)
    make(tmp_path / "elsewhere", "", n=3)
    os.symlink(tmp_path / "elsewhere", tmp_path / "photos/dog/linked")
    os.symlink(tmp_path / "photos/dog", tmp_path / "photos/dog/itself")
    split = load_split(str(tmp_path / "photos"), "")
    assert split.class_names == ["cat", "dog"]
    below = {"cat": "", "cat/2023/may": "", "dog": ""}
    expected = {f"{name}/{i}.jpg" for name in below for i in range(4)}
    assert paths_of(split) == expected | {f"dog/linked/{i}.jpg" for i in range(3)}
    said = capsys.readouterr().out.splitlines()
    assert said == [
        f"{split.folder}: 1 files are not images in a class folder and are left out, the first is"
        " dog/itself",
        f"{split.folder}: 7 images are in subfolders of their class folder, the first is"
        " cat/2023/may/0.jpg",
    ]


@pytest.mark.parametrize("n, parts", [(2, (1, 0)), (3, (2, 0)), (4, (2, 1)), (10, (5, 2))])
def test_a_folder_is_split_as_ever_50_20_30_per_class(tmp_path, n, parts):
    split = load_split(str(make(tmp_path, "cat", "red_dog", n=n)), "")
    assert split.class_names == ["cat", "red dog"] and split.source == "seeded"
    for label, name in enumerate(["cat", "red_dog"]):
        order = sorted(f"{name}/{i}.jpg" for i in range(n))
        random.Random(0).shuffle(order)
        n_train, n_val = parts
        lists = split.train, split.val, split.test
        found = [[i.path for i in items if i.label == label] for items in lists]
        assert found == [
            order[:n_train],
            order[n_train : n_train + n_val],
            order[n_train + n_val :],
        ]


@pytest.mark.parametrize("first, val", [("train", "validation"), ("Training", "Valid")])
def test_the_parts_of_a_split_have_several_names(tmp_path, first, val):
    for part in (first, val, "test"):
        make(tmp_path / part, "cat", "dog", n=2)
    split = load_split(str(tmp_path), "")
    assert split.source == "folder" and split.class_names == ["cat", "dog"]
    assert [item.path for item in split.val[:2]] == [f"{val}/cat/0.jpg", f"{val}/cat/1.jpg"]
    assert (len(split.train), len(split.test)) == (4, 4)
    make(tmp_path / "VAL", "cat", "dog", n=2)
    with pytest.raises(BadInput, match=f"has two folders for val: VAL/ and {val}/"):
        load_split(str(tmp_path), "")


def test_train_and_test_that_hold_images_themselves_are_classes_among_others(tmp_path):
    split = load_split(str(make(tmp_path, "bus", "invalid", "test", "toy_train", "train")), "")
    assert split.source == "seeded"
    assert split.class_names == ["bus", "invalid", "test", "toy train", "train"]


SORTED = "train/cat", "train/dog", "test/cat", "test/dog"


@pytest.mark.parametrize(
    "folders, said",
    [
        (["train", "test"], "/test holds images and no class folders"),
        ([*SORTED[:2], "Testing"], "/Testing holds images and no class folders"),
        ([*SORTED, "val"], "/val holds images and no class folders"),
        (["cat/train", "cat/test", "dog/train"], "/cat/test holds images and no class folders"),
        ([f"data/{folder}" for folder in SORTED], " holds data/, which is not a class"),
        (["seg_train/seg_train/cat", "seg_test/seg_test/cat"], " holds seg_test/, which is not a"),
        (["train2017", "val2017"], " holds train2017/, which is not a class"),
        (["archive/cat", "archive/dog"], " has one class only, 'archive'"),
    ],
)
def test_a_structure_is_understood_or_refused(folders, said, tmp_path):
    make(tmp_path, *folders, n=3)
    expected = ".*: expected <class>/<image>, or train/<class>/<image> and test/<class>/<image>"
    with pytest.raises(BadInput, match=str(tmp_path) + said + expected):
        load_split(str(tmp_path), "")


@pytest.mark.parametrize(
    "system", ["@eaDir", "#recycle", "$RECYCLE.BIN", "lost+found", "__MACOSX", "_old", ".thumbs"]
)
def test_folders_of_systems_hold_no_images(system, tmp_path, capsys):
    """Names of images may begin with an underscore."""
    make(tmp_path, "cat", "dog", n=3)
    (tmp_path / "cat/0.jpg").rename(tmp_path / "cat/_DSC1.jpg")
    make(tmp_path, system, f"cat/{system}/deep", n=1)
    assert len(paths_of(load_split(str(tmp_path), ""))) == len(find_photos([str(tmp_path)])) == 6
    said = capsys.readouterr()
    assert ("2 files" in said.out) == ("2 files" in said.err) == (system != ".thumbs")
    assert len(find_photos([str(tmp_path / system)])) == 1  # named by the user


def test_whatever_is_not_an_image_of_a_class_is_counted_in_one_line(tmp_path, capsys):
    folder = make(tmp_path / "photos", "cat", "dog")
    before = paths_of(load_split(str(folder), ""))
    assert capsys.readouterr().out == ""
    make(folder, "_old", n=1)
    os.symlink("nowhere.jpg", folder / "cat/dangling.jpg")
    for path in ("cat/DSC0001", "cat/x.xyz", "dog/more.zip", "fox.tar.gz", "loose.jpg"):
        draw_image(tmp_path / "one.jpg", path)
        (folder / path).write_bytes((tmp_path / "one.jpg").read_bytes())
    (folder / ".DS_Store").write_text("what a system leaves behind is not the user's")
    (folder / "cat/._0.jpg").write_text("nor is this")
    assert paths_of(load_split(str(folder), "")) == before
    assert capsys.readouterr().out == (
        f"{folder}: 7 files are not images in a class folder and are left out, the first is"
        " _old/0.jpg\n"
    )


def test_half_of_two_classes_is_refused():
    items = [Item(f"{label}.jpg", label) for label in range(3)]
    for n, half in ((2, "base"), (2, "new"), (3, "new")):
        split = Split("pets", None, "coop", ["cat", "dog", "fox"][:n], items[:n], [], items[:n])
        with pytest.raises(BadInput, match=f"pets: the {half} half is a single class"):
            select_classes(split, half)
    assert select_classes(split, "base").class_names == ["cat", "dog"]


# -------------------------------------------------------------------------------------- albums


def test_what_an_album_leaves_out_is_said(tmp_path, monkeypatch, capsys):
    make(tmp_path, "album/deep", n=2)
    (tmp_path / "album/drawing.eps").write_text("no image")
    (tmp_path / "album/deep/raw").write_text("no image")
    monkeypatch.chdir(tmp_path)
    images = [f"album/deep/{i}.jpg" for i in range(2)]
    assert [str(f) for f in find_photos(["album"])] == images
    assert capsys.readouterr().err == (
        "left out 2 files that are not images, the first is album/deep/raw\n"
    )
    for pattern, n in (("alb*", 2), ("**/*.jpg", 2), ("album/**/0.jpg", 1)):
        assert [str(f) for f in find_photos([pattern])] == images[:n]


# ------------------------------------------------------------------------------ unreadable images


def test_unreadable_images_are_named_all_at_once(tmp_path, random_clip):
    split = load_split(str(make(tmp_path, "cat", "dog")), "")
    broken = [split.train[0], split.val[1], split.test[0], split.test[3]]
    for item in broken:
        (tmp_path / item.path).write_bytes(b"half a photo")
    (tmp_path / broken[2].path).unlink()
    live = features.LiveImages(random_clip, split)
    for start in (
        lambda: image_features(random_clip, "x", split, split.train),
        lambda: image_features(random_clip, "x", split, split.test),  # has no content to name
        lambda: list(live.batches([torch.tensor([0])], None, 1)),
    ):
        with pytest.raises(BadInput) as error:
            start()
        lines = str(error.value).splitlines()
        assert len(lines) == 4
        for line, item in zip(lines, broken):
            assert line.startswith(f"cannot read the image {tmp_path / item.path}: ")


# -------------------------------------------------------------------------------------- names


@pytest.mark.parametrize(
    "one, other, alike",
    [
        ("red  fox", "Red fox", True),
        ("caf\u00e9", "cafe\u0301", True),
        ("red fox", "redfox", False),
    ],
)
def test_names_are_alike_if_clips_tokenizer_reads_them_alike(tmp_path, one, other, alike):
    folder = make(tmp_path / "photos", "dog", one, other)
    if alike:
        first, second = sorted([one, other])
        with pytest.raises(PromptError, match=f"classes {first!r} and {second!r} apart"):
            load_split(str(folder), "")
    else:
        assert len(load_split(str(folder), "").class_names) == 3


def test_a_file_gives_class_folders_their_names(tmp_path, capsys):
    folder = make(tmp_path / "photos", "n02085620", "n02085782")
    file = folder / "classnames.txt"
    file.write_text("n02085782 Japanese_spaniel\n\nn02085620\tChihuahua\nn1 not here\n")
    assert load_split(str(folder), "").class_names == ["Chihuahua", "Japanese spaniel"]
    assert capsys.readouterr().out == ""
    for text, said in (
        ("n02085620 Chihuahua", "classnames.txt has no name for the folder n02085782"),
        ("n02085620\nn02085782", "no name for the folder n02085620"),
        ("n02085620 Pug\nn02085620 Cat\nn02085782 Dog", "names a folder twice"),
        ("n02085620 Pug\nn02085782 pug", "the classes 'n02085620' and 'n02085782' apart"),
    ):
        file.write_text(text)
        with pytest.raises((BadInput, PromptError), match=said):
            load_split(str(folder), "")


def test_a_line_names_the_longest_folder_that_it_begins_with(tmp_path):
    folder = make(tmp_path / "photos", "red", "red fox", "c++", n=3)
    file = folder / "classnames.txt"
    file.write_bytes(b"red  one colour\r\nred fox\tVulpes vulpes\r\nc++ \t C plus\r\nredder no\r\n")
    assert load_split(str(folder), "").class_names == ["C plus", "one colour", "Vulpes vulpes"]


@pytest.mark.parametrize(
    "line",
    [
        "Here are 20 templates:",
        "a {} and a {}.",
        "## Size {}",
        "1. a photo of a {}.",
        "2) a photo of a {}.",
        "- a photo of a {}.",
        "* a photo of a {}.",
        '"a photo of a {}."',
        "“a photo of a {}.”",
        "`a photo of a {}.`",
    ],
)
def test_a_line_that_is_no_template_as_it_stands_is_named(tmp_path, line):
    file = tmp_path / "groups.txt"
    file.write_text(f"a photo of a {{}}.\n\n{line}\n", encoding="utf-8")
    with pytest.raises(BadInput, match="groups.txt, line 3: .* needs one {}"):
        read_groups(file)


# ----------------------------------------------------------------------- a dataset is where it lies


@pytest.fixture
def two(tmp_path):
    """Two folders of one name."""
    return [make(tmp_path / "a/images", "cat", "dog"), make(tmp_path / "b/images", "cat", "fox")]


@pytest.fixture
def train_on(run_train, random_clip_file, no_pictures):
    def run(folder, out, *more):
        flags = f"--method zeroshot --shots 1 --clip {random_clip_file} --dataset"
        return run_train(flags, folder, "--out", out, *more)

    return run


def test_a_run_keeps_one_evaluation_of_a_name(two, train_on, tmp_path):
    run = tmp_path / "run"
    train_on(make(tmp_path / "other", "cow", "hen"), run)
    first = eval.evaluate(run, str(two[1]))
    with pytest.raises(
        BadInput, match=f"already holds results for another dataset named images: rename {two[0]}"
    ):
        eval.evaluate(run, str(two[0]))
    assert json.loads((run / "eval_images_all.json").read_text()) == first
    assert eval.evaluate(run, str(two[1])) == first


def test_a_clash_in_out_is_refused(two, random_clip_file, no_pictures, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = f"--method zeroshot --shots 1 --clip {random_clip_file} --dataset".split()
    train.run(*train.configure([*words, "a/images"]))
    with pytest.raises(BadInput, match="holds a run with other images, .* another --out"):
        train.run(*train.configure([*words, "b/images"]))


def test_a_folder_that_has_moved_is_still_the_runs_own(two, train_on, tmp_path):
    (tmp_path / "groups.txt").write_text("a painting of a {}.\n\nmany {}.\n")
    run = tmp_path / "out/run"
    result = train_on(two[0], run, "--groups", tmp_path / "groups.txt", "--method", "ensemble")
    with pytest.raises(
        BadInput, match=f"already holds results for another dataset named images: rename {two[1]}"
    ):
        eval.evaluate(run, str(two[1]))  # which has other classes
    (tmp_path / "there").mkdir()
    moved = two[0].rename(tmp_path / "there/images")
    again = eval.evaluate(run, str(moved))
    for key in ("accuracy", "ensemble_accuracy", "per_class_accuracy"):
        assert again[key] == result[key]  # with the run's own templates
    assert str(moved) not in results.runs_table(find_runs(tmp_path / "out"))


def test_a_folder_with_the_name_of_a_known_dataset_is_not_that_dataset(
    small, run_train, eurosat, tmp_path
):
    run_train(f"{small} --method zeroshot --shots 1")
    split = load_split("eurosat", eurosat)
    make(tmp_path / "eurosat", *split.class_names, n=3)
    with pytest.raises(
        BadInput, match="already holds results for another dataset named eurosat: rename"
    ):
        eval.evaluate(tmp_path / "run", str(tmp_path / "eurosat"))


def test_a_relative_data_folder_is_the_one_where_training_stood(
    run_train, own_eurosat, random_clip_file, no_pictures, tmp_path, monkeypatch
):
    monkeypatch.chdir(own_eurosat.parent)
    flags = f"--dataset eurosat --method zeroshot --shots 1 --clip {random_clip_file} --data"
    result = run_train(flags, own_eurosat.name)
    monkeypatch.chdir("/")
    assert eval.evaluate(tmp_path / "run")["accuracy"] == result["accuracy"]


def test_the_fields_datasets_keep_their_keys_when_others_are_read_anew(tmp_path):
    (tmp_path / "0.jpg").write_bytes(b"pixels")
    split = Split("pets", tmp_path, "coop", [], [], [], [])
    name = r"0.jpg\|%s\|6\|[0-9a-f]{32}%s"
    for source, pattern in (("coop", name % (True, "")), ("seeded", name % (False, r"\|\d+\|2"))):
        found = _content_names(replace(split, source=source), ["0.jpg"])["0.jpg"]
        assert re.fullmatch(pattern, found)


def test_the_cache_tells_folders_of_one_name_apart_and_finds_one_that_has_moved(
    tmp_path, random_clip, monkeypatch, capsys
):
    """Scans with a white margin: equal in path, size and beginning."""
    monkeypatch.setattr(features, "CACHE", tmp_path / "cache")
    found = []
    for root, colour in (("a", "red"), ("b", "blue")):
        folder = tmp_path / root / "images"
        folder.mkdir(parents=True)
        scan = Image.new("RGB", (300, 300), colour)
        scan.paste("white", (0, 0, 300, 100))  # 90,000 bytes
        scan.save(folder / "0.ppm")
        items = [Item("0.ppm", 0)]
        split = Split(str(folder), folder, "seeded", ["scan"], [], [], items)
        found.append(image_features(random_clip, "x", split, items))
        assert " 1 to encode" in capsys.readouterr().out
    assert not torch.allclose(*found, atol=1e-3)
    folder = folder.rename(tmp_path / "images")
    moved = Split(str(folder), folder, "seeded", ["scan"], [], [], items)
    assert image_features(random_clip, "x", moved, items).equal(found[1])
    assert " 0 to encode" in capsys.readouterr().out
