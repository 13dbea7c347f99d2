"""All layouts of the table, folders of one's own, and what is fetched."""

import gzip
import json
import os
import shutil
import tarfile
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import HERE, draw_image
from PIL import Image

import eval
from data import few_shot, full_dataset, load_split, select_classes
from lib import fetch
from lib.catalogue import DATASETS, Row, template_groups
from lib.clip_model import load_clip
from lib.errors import BadInput
from lib.images import image_features
from lib.metrics import accuracy
from prompts import template_features

VARIANTS = ["imagenetv2", "imagenet_sketch", "imagenet_a", "imagenet_r"]
SYNSETS = ["n01440764", "n01443537", "n01484850", "n01491361", "n01494475"]
NAMES = ["tench", "goldfish", "great white shark", "tiger shark", "hammerhead shark"]
VARIANT_ROOTS = {
    "imagenetv2": "imagenetv2/imagenetv2-matched-frequency-format-val",
    "imagenet_sketch": "imagenet-sketch/images",
    "imagenet_a": "imagenet-adversarial/imagenet-a",
    "imagenet_r": "imagenet-rendition/imagenet-r",
}
# The layout of CoOp's DATASETS.md, written down apart from the code's table.
LAYOUTS = {
    "caltech101": ("caltech-101/101_ObjectCategories", "caltech-101/split_zhou_Caltech101.json"),
    "oxford_pets": ("oxford_pets/images", "oxford_pets/split_zhou_OxfordPets.json"),
    "stanford_cars": ("stanford_cars", "stanford_cars/split_zhou_StanfordCars.json"),
    "oxford_flowers": ("oxford_flowers/jpg", "oxford_flowers/split_zhou_OxfordFlowers.json"),
    "food101": ("food-101/images", "food-101/split_zhou_Food101.json"),
    "sun397": ("sun397/SUN397", "sun397/split_zhou_SUN397.json"),
    "dtd": ("dtd/images", "dtd/split_zhou_DescribableTextures.json"),
    "eurosat": ("eurosat/2750", "eurosat/split_zhou_EuroSAT.json"),
    "ucf101": ("ucf101/UCF-101-midframes", "ucf101/split_zhou_UCF101.json"),
}


def make_layout(root, dataset):
    """A small tree of the dataset, 5 classes: 3 train, 2 val, 2 test images each (ImageNet: 3
    train, 2 val), the variants 2 test images."""
    if dataset in LAYOUTS:
        images, split_file = LAYOUTS[dataset]
        split = {"train": [], "val": [], "test": []}
        for label in range(5):
            for part, n in (("train", 3), ("val", 2), ("test", 2)):
                for i in range(n):
                    path = f"Class_{label}/{part}_{i}.jpg"
                    draw_image(root / images / path, path)
                    split[part].append([path, label, f"Some_class {label}"])
        (root / split_file).write_text(json.dumps(split))
    elif dataset == "fgvc_aircraft":
        variants = ["707-320", "A300B4", "Boeing 717", "C-130", "Tu-154"]
        folder, number = root / "fgvc_aircraft", 0
        folder.mkdir(parents=True)
        (folder / "variants.txt").write_text("\n".join(variants) + "\n")
        for part, n in (("train", 3), ("val", 2), ("test", 2)):
            lines = []
            for name in variants * n:
                draw_image(folder / f"images/{number:07d}.jpg", number)
                lines.append(f"{number:07d} {name}\n")
                number += 1
            (folder / f"images_variant_{part}.txt").write_text("".join(lines))
    else:
        (root / "imagenet").mkdir(parents=True, exist_ok=True)
        lines = [f"{synset} {name}" for synset, name in zip(SYNSETS, NAMES)]
        (root / "imagenet/classnames.txt").write_text("\n".join(lines))
        if dataset == "imagenet":
            for synset in SYNSETS:
                for path in [f"train/{synset}/{synset}_{i}.JPEG" for i in range(3)] + [
                    f"val/{synset}/ILSVRC2012_val_{i}.JPEG" for i in range(2)
                ]:
                    draw_image(root / "imagenet/images" / path, path)
        else:
            folders = range(5) if dataset == "imagenetv2" else SYNSETS
            for folder in folders:
                for i in range(2):
                    path = root / VARIANT_ROOTS[dataset] / f"{folder}/{i}.jpg"
                    draw_image(path, f"{folder}{i}")
            (root / VARIANT_ROOTS[dataset] / "README.txt").write_text("not a class")


@pytest.mark.parametrize("dataset", [*LAYOUTS, "fgvc_aircraft", "imagenet", *VARIANTS])
def test_every_layout_loads_and_runs(dataset, tmp_path, run_train, random_clip_file, monkeypatch):
    root = tmp_path / "data"
    make_layout(root, dataset)
    if DATASETS[dataset].counts:  # as if the field's split were this short
        row = replace(DATASETS[dataset], counts=(15, 10, 10))
        monkeypatch.setitem(DATASETS, dataset, row)
    split = load_split(dataset, root)
    assert split.source == "coop" and len(split.class_names) == 5
    n_train = 0 if dataset in VARIANTS else 15
    assert (len(split.train), len(split.test)) == (n_train, 10)
    assert len(split.val) == (0 if dataset.startswith("imagenet") else 10)
    for label in range(5):
        assert sum(item.label == label for item in split.test) == 2
    assert all((split.folder / item.path).is_file() for item in split.train + split.test)
    base, new = select_classes(split, "base"), select_classes(split, "new")
    assert base.class_names + new.class_names == split.class_names
    assert (len(base.test), len(new.test)) == (6, 4)

    trained_on = "imagenet" if dataset in VARIANTS else dataset
    make_layout(root, "imagenet")
    flags = f"--dataset {trained_on} --shots 1 --epochs 1 --views 1 --data {root}"
    result = run_train(flags, "--clip", random_clip_file)
    assert (result["n_train"], result["n_test"]) == (5, 10)
    assert (result["val_accuracy"] is None) == (trained_on == "imagenet")  # it has no val images
    assert result["few_shot_samples"] == ("own" if trained_on == "imagenet" else "coop")
    if dataset in VARIANTS:
        elsewhere = eval.evaluate(tmp_path / "run", dataset=dataset)
        assert elsewhere["dataset"] == dataset and elsewhere["n_test"] == 10
        assert elsewhere["few_shot_samples"] == "own"  # ImageNet's, on which it was trained
        with pytest.raises(BadInput, match=f"{dataset} has no training images"):
            run_train(f"--dataset {dataset} --data {root} --out", tmp_path / "no")


@pytest.mark.parametrize("dataset", LAYOUTS)
def test_class_names_are_read_from_the_split_without_underscores(dataset, tmp_path):
    make_layout(tmp_path, dataset)
    assert load_split(dataset, tmp_path).class_names == [f"Some class {i}" for i in range(5)]


def test_aircraft_names_come_from_variants_txt_in_its_order(tmp_path):
    make_layout(tmp_path, "fgvc_aircraft")
    split = load_split("fgvc_aircraft", tmp_path)
    assert split.class_names == ["707-320", "A300B4", "Boeing 717", "C-130", "Tu-154"]
    assert split.train[2] == ("images/0000002.jpg", 2)
    (tmp_path / "fgvc_aircraft/images_variant_val.txt").write_text("0000001 Concorde\n")
    with pytest.raises(BadInput, match="'0000001 Concorde' names no variant"):
        load_split("fgvc_aircraft", tmp_path)


def test_imagenet_labels_are_sorted_synsets_with_names_from_classnames_txt(tmp_path):
    make_layout(tmp_path, "imagenet")
    split = load_split("imagenet", tmp_path)
    assert split.class_names == NAMES
    assert split.train[3] == ("images/train/n01443537/n01443537_0.JPEG", 1)
    assert [item.path for item in split.test] == sorted(item.path for item in split.test)


def test_imagenetv2_folders_are_numbers_not_strings(tmp_path):
    make_layout(tmp_path, "imagenetv2")
    names = [f"n{i:08d} name {i}" for i in range(12)]
    (tmp_path / "imagenet/classnames.txt").write_text("\n".join(names))
    for number in range(12):
        path = tmp_path / VARIANT_ROOTS["imagenetv2"] / f"{number}/0.jpg"
        draw_image(path, number)
    split = load_split("imagenetv2", tmp_path)
    assert split.class_names == [f"name {i}" for i in range(12)]  # 2 before 10
    assert [i.label for i in split.test if "/10/" in i.path] == [10]


def test_a_variant_reads_its_own_classnames_first_and_keeps_its_own_classes(tmp_path):
    make_layout(tmp_path, "imagenet_a")
    shutil.rmtree(tmp_path / VARIANT_ROOTS["imagenet_a"] / SYNSETS[1])
    assert load_split("imagenet_a", tmp_path).class_names == [NAMES[0], *NAMES[2:]]
    lines = [f"{synset} my {name}" for synset, name in zip(SYNSETS, NAMES)]
    (tmp_path / "imagenet-adversarial/classnames.txt").write_text("\n".join(lines))
    assert load_split("imagenet_a", tmp_path).class_names[0] == "my tench"
    (tmp_path / "imagenet-adversarial/classnames.txt").write_text("n0 nothing")
    with pytest.raises(BadInput, match="has no name for the folder .*n01440764"):
        load_split("imagenet_a", tmp_path)


@pytest.mark.parametrize("dataset", ["imagenet", *VARIANTS, "stanford_cars"])
def test_what_cannot_be_fetched_is_explained_with_the_tree_expected(dataset, tmp_path):
    with pytest.raises(BadInput) as error:
        load_split(dataset, tmp_path)
    said = str(error.value)
    row = DATASETS[dataset]
    assert f"no images at {tmp_path / row.folder / row.images}, and {dataset} cannot be" in said
    assert said.endswith(f": put there {row.origin}") and "\n" not in said
    assert ("CoOp" if dataset == "stanford_cars" else "/*") in row.origin
    assert not list(tmp_path.iterdir())


# CoOp's own numbers of images and its template, dataset by dataset, from its paper and its code.
COOP = {
    "caltech101": ((4128, 1649, 2465), "a photo of a {}."),
    "oxford_pets": ((2944, 736, 3669), "a photo of a {}, a type of pet."),
    "stanford_cars": ((6509, 1635, 8041), "a photo of a {}."),
    "oxford_flowers": ((4093, 1633, 2463), "a photo of a {}, a type of flower."),
    "food101": ((50500, 20200, 30300), "a photo of {}, a type of food."),
    "fgvc_aircraft": ((3334, 3333, 3333), "a photo of a {}, a type of aircraft."),
    "sun397": ((15880, 3970, 19850), "a photo of a {}."),
    "dtd": ((2820, 1128, 1692), "{} texture."),
    "eurosat": ((13500, 5400, 8100), "a centered satellite photo of {}."),
    "ucf101": ((7639, 1898, 3783), "a photo of a person doing {}."),
    "imagenet": ((None, 0, 50000), "a photo of a {}."),
    "imagenetv2": ((0, 0, 10000), "a photo of a {}."),
    "imagenet_sketch": ((0, 0, 50889), "a photo of a {}."),
    "imagenet_a": ((0, 0, 7500), "a photo of a {}."),
    "imagenet_r": ((0, 0, 30000), "a photo of a {}."),
}


def test_the_catalogue_has_coops_numbers_and_templates():
    real = {name: row for name, row in DATASETS.items() if row.layout != "world"}
    assert {name: (row.counts, row.zero_shot) for name, row in real.items()} == COOP
    for field in ("folder", "drive_id", "archive", "split"):
        values = [getattr(row, field) for row in real.values() if getattr(row, field)]
        assert len(set(values)) == len(values), field  # no dataset has another's


# ----------------------------------------------------------------------------- the field's files
# `field_splits.json.gz` holds what decides on samples in seven of the field's split files: class
# names, the labels of all images in their order, and the positions of CoOp's samples for seed 1.

FIELD_SPLITS = json.loads(gzip.decompress((HERE / "field_splits.json.gz").read_bytes()))
N_CLASSES = {
    "caltech101": 100,
    "dtd": 47,
    "eurosat": 10,
    "oxford_flowers": 102,
    "oxford_pets": 37,
    "stanford_cars": 196,
    "ucf101": 101,
}


@pytest.mark.parametrize("dataset", N_CLASSES)
def test_real_splits_have_their_counts_and_give_the_fields_samples(dataset, tmp_path, monkeypatch):
    real, row = FIELD_SPLITS[dataset], DATASETS[dataset]
    images = [f"{row.images}/".lstrip("/") + part for part in ("train", "val", "test")]
    content = {
        part: [[f"{part}/{i}.jpg", label, real["names"][label]] for i, label in enumerate(labels)]
        for part, labels in real["labels"].items()
    }
    (tmp_path / row.folder / row.images).mkdir(parents=True)
    (tmp_path / row.folder / row.split).write_text(json.dumps(content))
    monkeypatch.setattr(os.path, "isfile", lambda path: True)  # tens of thousands of images
    split = load_split(dataset, tmp_path)
    assert split.samples == split.source == "coop"  # its counts are the catalogue's
    assert len(split.class_names) == N_CLASSES[dataset]
    assert not any("_" in name for name in split.class_names)
    for shots, expected in real["samples"].items():
        drawn = few_shot(split, int(shots), 1)
        for part, folder in zip(("train", "val"), images):
            assert [i.path for i in getattr(drawn, part)] == [
                f"{folder}/{position}.jpg" for position in expected[part]
            ]


def test_a_shortened_split_is_said_to_be_one(tmp_path, run_train, random_clip_file, capsys):
    make_layout(tmp_path, "dtd")
    flags = f"--dataset dtd --shots 1 --epochs 1 --views 1 --data {tmp_path} --clip"
    result = run_train(flags, random_clip_file)
    assert result["split"] == "coop" and result["few_shot_samples"] == "own"
    said = capsys.readouterr().out
    assert "lists (15, 10, 10) images, the field's split (2820, 1128, 1692)" in said
    assert "1 shots, seed 1 (samples of our own); CLIP" in said
    assert "NOT comparable" in said


# -------------------------------------------------------------------------- a folder of one's own


def make_folder(root, classes, n=10, below=""):
    for name in classes:
        for i in range(n):
            draw_image(root / below / name / f"{i}.jpg", f"{below}{name}{i}")
    return root


def test_a_folder_a_class_is_split_50_20_30_whatever_the_seed(
    tmp_path, run_train, random_clip_file
):
    folder = make_folder(tmp_path / "my photos", ["café_noir", "thé vert", "eau"])
    split = load_split(str(folder), "unused")
    assert split.class_names == ["café noir", "eau", "thé vert"] and split.source == "seeded"
    for part, n in (("train", 5), ("val", 2), ("test", 3)):
        labels = [item.label for item in getattr(split, part)]
        assert labels == sorted(labels) and all(labels.count(c) == n for c in range(3))
    assert split == load_split(str(folder), "unused")
    flags = "--shots 4 --epochs 1 --seed 7 --clip"
    result = run_train(flags, random_clip_file, "--dataset", folder)
    assert (
        result["dataset"] == "my photos"
        and result["config"]["dataset"] == str(folder)
        and result["split"] == "seeded"
    )
    assert result["n_prompts"] == 4  # SUN397's general groups
    assert (result["n_train"], result["n_test"]) == (12, 9)


def test_a_class_more_leaves_the_others_images_where_they_were(tmp_path):
    folder = make_folder(tmp_path / "photos", ["cat", "dog"])
    before = load_split(str(folder), "")
    make_folder(folder, ["bird"])
    after = load_split(str(folder), "")
    assert {i.path for i in before.test} == {i.path for i in after.test if "bird" not in i.path}


def test_given_train_and_test_folders_are_kept(tmp_path):
    for part, n in (("train", 4), ("val", 2), ("test", 3)):
        make_folder(tmp_path / "photos", ["cat", "red_dog"], n, part)
    split = load_split(str(tmp_path / "photos"), "")
    assert split.class_names == ["cat", "red dog"]
    assert (len(split.train), len(split.val), len(split.test)) == (8, 4, 6)
    assert split.source == "folder" and split.test[0] == ("test/cat/0.jpg", 0)
    shutil.rmtree(tmp_path / "photos/val")
    assert load_split(str(tmp_path / "photos"), "").val == []


def test_every_kind_of_image_becomes_rgb(tmp_path):
    folder = make_folder(tmp_path / "photos", ["cat", "dog"])
    base = Image.open(folder / "cat/0.jpg")
    base.convert("L").save(folder / "cat/grey.png")
    base.convert("P").save(folder / "cat/palette.gif")
    base.convert("RGBA").save(folder / "cat/alpha.webp")
    base.convert("CMYK").save(folder / "cat/print.tif")
    base.convert("1").save(folder / "cat/bits.bmp")
    (folder / "cat/notes.txt").write_text("not an image")
    (folder / "cat/.DS_Store").write_text("nor this")
    split = load_split(str(folder), "")
    items = [i for i in split.train + split.val + split.test if i.label == 0]
    assert len(items) == 15
    assert {split.open(item.path).mode for item in items} == {"RGB"}


def test_a_photo_is_turned_as_its_camera_was_held(tmp_path):
    folder = make_folder(tmp_path / "photos", ["cat", "dog"])
    photo = Image.new("RGB", (40, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees to see it upright
    photo.save(folder / "cat/turned.jpg", exif=exif)
    split = load_split(str(folder), "")
    assert split.open("cat/turned.jpg").size == (20, 40)


@pytest.mark.parametrize(
    "classes, n, said",
    [
        ([], 0, "no class folders in"),
        (["cat"], 10, "has one class only, 'cat'"),
        (["cat", "dog"], 1, "the class 'cat' has no image in train"),
    ],
)
def test_folders_that_cannot_be_learned_from_are_refused(tmp_path, classes, n, said):
    (tmp_path / "photos").mkdir()
    with pytest.raises(BadInput, match=said):
        load_split(str(make_folder(tmp_path / "photos", classes, n)), "")


def test_two_folders_with_one_class_name_are_refused(tmp_path):
    for name in ("red cat", "Red_Cat"):  # CLIP reads lower case
        folder = make_folder(tmp_path / name / "photos", ["red_cat", name])
        with pytest.raises(BadInput, match="two classes in .* have one name, 'red cat'"):
            load_split(str(folder), "")


def test_a_folder_never_takes_a_datasets_place(tmp_path, monkeypatch, run_train, random_clip_file):
    make_folder(tmp_path / "eurosat", ["cat", "dog", "fox", "owl"], 30)
    monkeypatch.chdir(tmp_path)
    assert full_dataset("eurosat") == "eurosat"
    assert full_dataset("./eurosat") == str(tmp_path / "eurosat")
    flags = f"--method zeroshot --dataset ./eurosat --shots 1 --clip {random_clip_file}"
    result = run_train(flags)
    split = load_split(str(tmp_path / "eurosat"), "")
    clip_model, fingerprint = load_clip(random_clip_file, "cpu")
    f = image_features(clip_model, fingerprint, split, split.test)
    accuracies = []
    for template in ("a photo of a {}.", "a centered satellite photo of {}."):
        (texts,) = template_features(clip_model, [template], split.class_names)
        accuracies.append(accuracy((f @ texts.T).argmax(-1), split.labels(split.test)))
    assert result["accuracy"] == accuracies[0] != accuracies[1]


def test_a_linear_probe_needs_validation_images(tmp_path, run_train, random_clip_file):
    for part in ("train", "test"):
        make_folder(tmp_path / "photos", ["cat", "dog"], 3, part)
    with pytest.raises(BadInput, match="chooses its strength on val images: there are none"):
        run_train("--method linear --clip", random_clip_file, "--dataset", tmp_path / "photos")


def test_a_folder_whose_name_looks_like_the_world_gets_the_general_templates():
    assert template_groups("photos/shapes_of_leaves") == template_groups("sun397")


def test_empty_classes_and_missing_parts_are_named(tmp_path):
    folder = make_folder(tmp_path / "photos", ["cat", "dog"])
    (folder / "empty").mkdir()
    with pytest.raises(BadInput, match="the class 'empty' has no image in train"):
        load_split(str(folder), "")
    (tmp_path / "bare/cat").mkdir(parents=True)
    (tmp_path / "bare/dog").mkdir()
    with pytest.raises(BadInput, match="no images in"):
        load_split(str(tmp_path / "bare"), "")
    for part in ("train", "test"):
        make_folder(tmp_path / "whole", ["cat", "dog"], 2, part)
    make_folder(tmp_path / "whole", ["cat", "fox"], 2, "val")
    with pytest.raises(BadInput, match="the class 'fox' has no image in train"):
        load_split(str(tmp_path / "whole"), "")
    make_folder(tmp_path / "half", ["cat", "dog"], 2, "train")
    with pytest.raises(BadInput, match="needs both train/ and test/"):
        load_split(str(tmp_path / "half"), "")


# ---------------------------------------------------------------------------------- fetching


def serve(monkeypatch, dataset, archive, drive=None):
    """Puts `archive` and `drive`, a function, in place of the network."""

    def download(url, folder, name, md5):
        assert url == DATASETS[dataset].archive[0]
        shutil.copy(archive, Path(folder, name))

    def refuse(*args):
        raise OSError("no network")

    monkeypatch.setattr(fetch, "download_url", download)
    monkeypatch.setattr(fetch, "download_file_from_google_drive", drive or refuse)


def pack(archive, root):
    """Everything below `root` as a .tar.gz or .zip file."""
    if archive.suffix == ".zip":
        with zipfile.ZipFile(archive, "w") as file:
            for path in root.rglob("*"):
                file.write(path, path.relative_to(root))
    else:
        with tarfile.open(archive, "w:gz") as file:
            for path in root.iterdir():
                file.add(path, path.name)
    return archive


def drive_copying(split_file):
    return lambda drive_id, folder, name: shutil.copy(split_file, Path(folder, name))


def test_caltech_comes_as_an_archive_in_an_archive(tmp_path, monkeypatch):
    make_layout(tmp_path / "whole", "caltech101")
    (tmp_path / "zip/caltech-101").mkdir(parents=True)
    inner = tmp_path / "inner"
    images = tmp_path / "whole/caltech-101/101_ObjectCategories"
    shutil.copytree(images, inner / "101_ObjectCategories")
    pack(tmp_path / "zip/caltech-101/101_ObjectCategories.tar.gz", inner)
    junk = tmp_path / "zip/__MACOSX/caltech-101/._101_ObjectCategories.tar.gz"
    junk.parent.mkdir(parents=True)
    junk.write_bytes(b"what a Mac leaves in archives")
    archive = pack(tmp_path / "caltech-101.zip", tmp_path / "zip")
    split_file = tmp_path / "whole/caltech-101/split_zhou_Caltech101.json"
    serve(monkeypatch, "caltech101", archive, drive_copying(split_file))
    counted = replace(DATASETS["caltech101"], counts=(15, 10, 10))
    monkeypatch.setitem(DATASETS, "caltech101", counted)
    left = tmp_path / "new/caltech-101/.fetching-of-a-killed-process/archive.zip"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"half of it")
    fetched = load_split("caltech101", tmp_path / "new")
    assert fetched.train == load_split("caltech101", tmp_path / "whole").train
    assert not [f for f in (tmp_path / "new/caltech-101").iterdir() if f.name[0] in "._"]


def test_ucf101s_address_is_one_that_torchvision_takes_for_google_drive():
    from torchvision.datasets.utils import _get_google_drive_file_id

    address = DATASETS["ucf101"].archive[0]
    assert _get_google_drive_file_id(address) == "10Jqome3vtUA2keJkNanAiFpgbyC9Hc2O"


@pytest.mark.parametrize("suffix", [".tar.gz", ".zip"])
def test_without_a_checksum_an_archive_is_read_to_its_end(suffix, tmp_path):
    """Damage to the middle of a tar file looks like its end."""
    make_folder(tmp_path / "tar/images", ["cat", "dog"], 20)
    archive = pack(tmp_path / f"archive{suffix}", tmp_path / "tar")
    fetch._check_to_its_end(archive)
    content = bytearray(archive.read_bytes())
    content[len(content) // 2] ^= 255
    archive.write_bytes(content)
    with pytest.raises(fetch.FAILURES):
        fetch._check_to_its_end(archive)


def test_processes_fetch_one_after_the_other_and_only_once(tmp_path, monkeypatch):
    make_layout(tmp_path / "whole", "dtd")
    shutil.copytree(tmp_path / "whole/dtd", tmp_path / "tar/dtd")
    archive, downloads = pack(tmp_path / "dtd.tar.gz", tmp_path / "tar"), []

    def download(url, folder, name, md5):
        downloads.append(folder)
        time.sleep(0.3)
        shutil.copy(archive, Path(folder, name))

    monkeypatch.setattr(fetch, "download_url", download)
    target = tmp_path / "new/dtd/images"
    with ThreadPoolExecutor(4) as pool:  # each call opens the lock anew, as processes do
        jobs = [
            pool.submit(fetch.fetch_images, "https://x/d.tar.gz", None, target) for _ in range(4)
        ]
        assert [job.result() for job in jobs] == [None] * 4
    assert len(downloads) == 1 and target.is_dir()
    assert not list(target.parent.glob(".fetching*"))


def test_without_caltechs_split_its_folders_are_the_classes_but_for_two(tmp_path, monkeypatch):
    images = tmp_path / "caltech-101/101_ObjectCategories"
    make_folder(images, ["BACKGROUND_Google", "Faces", "Faces_easy", "accordion", "airplanes"])
    serve(monkeypatch, "caltech101", None)
    split = load_split("caltech101", tmp_path)
    assert split.source == "seeded" and split.class_names == ["face", "accordion", "airplane"]


def test_without_a_split_and_class_folders_there_is_no_stand_in(tmp_path, monkeypatch):
    make_layout(tmp_path, "oxford_pets")
    (tmp_path / "oxford_pets/split_zhou_OxfordPets.json").unlink()
    serve(monkeypatch, "oxford_pets", None)
    with pytest.raises(BadInput, match="no file .*split_zhou_OxfordPets.json, and downloading it"):
        load_split("oxford_pets", tmp_path)


def test_what_lies_beside_the_images_comes_along(tmp_path, monkeypatch):
    make_layout(tmp_path / "whole", "fgvc_aircraft")
    shutil.copytree(tmp_path / "whole/fgvc_aircraft", tmp_path / "tar/fgvc-aircraft-2013b/data")
    archive = pack(tmp_path / "fgvc-aircraft-2013b.tar.gz", tmp_path / "tar")
    serve(monkeypatch, "fgvc_aircraft", archive)
    fetched = load_split("fgvc_aircraft", tmp_path / "new")
    assert fetched.train == load_split("fgvc_aircraft", tmp_path / "whole").train
    found = sorted(p.name for p in (tmp_path / "new/fgvc_aircraft").iterdir())
    assert found[0] == "images" and found[-1] == "variants.txt" and len(found) == 5


@pytest.mark.parametrize("damage", ["cut", "middle"])
def test_a_damaged_archive_is_never_half_used(tmp_path, monkeypatch, damage):
    """Without a checksum: damage to the middle of a tar file looks like its end."""
    make_layout(tmp_path / "whole", "dtd")
    shutil.copytree(tmp_path / "whole/dtd", tmp_path / "tar/dtd")
    archive = pack(tmp_path / "dtd-r1.0.1.tar.gz", tmp_path / "tar")
    content = bytearray(archive.read_bytes())
    if damage == "cut":
        del content[-2000:]
    else:
        with tarfile.open(archive) as file:
            header = file.getmembers()[-1].offset  # as if the archive ended here
        plain = bytearray(gzip.decompress(content))
        plain[header : header + 512] = bytes(512)
        checksums = content[-8:]  # of what it was
        content = bytearray(gzip.compress(plain))
        content[-8:] = checksums
    archive.write_bytes(content)
    url, _ = DATASETS["dtd"].archive
    monkeypatch.setitem(DATASETS, "dtd", replace(DATASETS["dtd"], archive=(url, None)))
    serve(monkeypatch, "dtd", archive)
    with pytest.raises(BadInput, match="no images at .*dtd.images, and downloading .* failed"):
        load_split("dtd", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_an_archive_without_the_images_is_refused(tmp_path, monkeypatch):
    (tmp_path / "tar/other").mkdir(parents=True)
    archive = pack(tmp_path / "dtd-r1.0.1.tar.gz", tmp_path / "tar")
    serve(monkeypatch, "dtd", archive)
    with pytest.raises(BadInput, match="the archive holds no folder images"):
        load_split("dtd", tmp_path / "new")


def test_a_variant_alone_has_imagenets_class_names_fetched(tmp_path, monkeypatch):
    make_layout(tmp_path, "imagenet_r")
    names = tmp_path / "imagenet/classnames.txt"
    others = [f"n9{i:07d} thing {i}" for i in range(995)]
    thousand = tmp_path / "thousand.txt"
    thousand.write_text("\n".join([*names.read_text().splitlines(), *others]))
    shutil.rmtree(tmp_path / "imagenet")
    serve(monkeypatch, "imagenet_r", None)
    with pytest.raises(BadInput, match="no file .*imagenet.classnames.txt"):
        load_split("imagenet_r", tmp_path)
    assert not (tmp_path / "imagenet").exists()
    serve(monkeypatch, "imagenet_r", None, drive_copying(thousand))
    assert load_split("imagenet_r", tmp_path).class_names == NAMES


def test_imagenets_class_names_are_fetched_and_counted(tmp_path, monkeypatch):
    make_layout(tmp_path, "imagenet")
    names = tmp_path / "imagenet/classnames.txt"
    thousand = tmp_path / "thousand.txt"
    others = [f"n9{i:07d} thing {i}" for i in range(995)]
    thousand.write_text("\n".join([*names.read_text().splitlines(), *others]))
    names.rename(tmp_path / "five.txt")
    monkeypatch.setattr(
        fetch, "download_file_from_google_drive", drive_copying(tmp_path / "five.txt")
    )
    with pytest.raises(BadInput, match="it has 5 lines instead of 1000"):
        load_split("imagenet", tmp_path)
    monkeypatch.setattr(fetch, "download_file_from_google_drive", drive_copying(thousand))
    assert load_split("imagenet", tmp_path).class_names == NAMES
    assert names.read_text() == thousand.read_text()


# ------------------------------------------------------------------------- a row of one's own


@pytest.fixture
def own_row(monkeypatch):
    """A row with nothing but where its files are."""
    row = Row("mine", "pictures", split="split_zhou_Mine.json")
    monkeypatch.setitem(DATASETS, "mine", row)


def make_own(root):
    split = {"train": [], "val": [], "test": []}
    for label in range(4):
        for part, n in (("train", 3), ("val", 1), ("test", 2)):
            for i in range(n):
                path = f"{label}/{part}{i}.jpg"
                draw_image(root / "mine/pictures" / path, path)
                split[part].append([path, label, f"thing_{label}"])
    (root / "mine/split_zhou_Mine.json").write_text(json.dumps(split))


def test_a_row_of_nothing_but_paths_trains_and_says_which_templates_serve(
    own_row, tmp_path, run_train, random_clip_file, capsys
):
    make_own(tmp_path)
    flags = f"--dataset mine --shots 2 --epochs 1 --views 1 --data {tmp_path} --clip"
    result = run_train(flags, random_clip_file)
    assert (result["n_train"], result["n_test"], result["n_prompts"]) == (8, 8, 4)
    assert list(result["prompt_usage"]) == [group[0] for group in template_groups("sun397")]
    assert result["few_shot_samples"] == "coop"  # by CoOp's rule, on a complete split
    said = capsys.readouterr().out
    assert "mine has no templates: SUN397's four groups serve" in said
    assert "comparable" not in said


def test_a_row_without_an_origin_says_so(own_row, tmp_path):
    with pytest.raises(BadInput, match="its row in lib/catalogue.py names no origin"):
        load_split("mine", tmp_path)
    make_own(tmp_path)
    (tmp_path / "mine/split_zhou_Mine.json").unlink()
    with pytest.raises(BadInput, match="no split file .*Mine.json, and none to download"):
        load_split("mine", tmp_path)


# --------------------------------------------------------------------------- wrong data is noticed


def test_imagenet_with_a_few_of_its_classes_says_that_it_is_not_the_fields(tmp_path, capsys):
    make_layout(tmp_path, "imagenet")
    load_split("imagenet", tmp_path)
    said = capsys.readouterr().out
    assert "imagenet lists (15, 0, 10) images, the field's split ('any', 0, 50000)" in said
    assert "NOT comparable" in said


@pytest.mark.parametrize("dataset", VARIANTS)
def test_a_variant_half_unpacked_says_so(dataset, tmp_path, capsys):
    make_layout(tmp_path, dataset)
    load_split(dataset, tmp_path)
    assert f"the field's split (0, 0, {DATASETS[dataset].counts[2]})" in capsys.readouterr().out


def test_a_whole_test_set_says_nothing(tmp_path, capsys, monkeypatch):
    make_layout(tmp_path, "imagenet")
    monkeypatch.setitem(DATASETS, "imagenet", replace(DATASETS["imagenet"], counts=(None, 0, 10)))
    assert load_split("imagenet", tmp_path).samples == "own"  # CoOp's depend on a disk's order
    assert capsys.readouterr().out == ""


def test_a_flat_val_folder_gets_the_hint_that_helps(tmp_path):
    make_layout(tmp_path, "imagenet")
    val = tmp_path / "imagenet/images/val"
    for file in val.rglob("*.JPEG"):
        file.rename(val / file.name)
    for synset in SYNSETS:
        (val / synset).rmdir()
    with pytest.raises(
        BadInput, match=r"flat folder and belong in val/<synset>/\*.JPEG; .*valprep"
    ):
        load_split("imagenet", tmp_path)


def test_class_folders_that_are_left_out_are_named(tmp_path, capsys):
    folder = make_folder(tmp_path / "photos", ["cat", "dog", "_old", ".hidden"])
    assert load_split(str(folder), "").class_names == ["cat", "dog"]
    assert "_old left out" in capsys.readouterr().out


@pytest.mark.parametrize(
    "n, parts", [(2, (1, 0, 1)), (3, (2, 0, 1)), (4, (2, 1, 1)), (5, (2, 1, 2))]
)
def test_small_classes_keep_an_image_for_the_test(tmp_path, n, parts):
    split = load_split(str(make_folder(tmp_path / "photos", ["cat", "dog"], n)), "")
    counts = len(split.train), len(split.val), len(split.test)
    assert counts == tuple(2 * part for part in parts)
