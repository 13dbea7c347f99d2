"""All layouts of the table, and folders of one's own."""

import gzip
import json
import os
import shutil
from dataclasses import replace

import pytest
from conftest import HERE, draw_image, train_run

import eval
from data import few_shot, full_dataset, load_split
from lib.catalogue import DATASETS, Row, row_of, template_groups
from lib.errors import BadInput

VARIANTS = ["imagenetv2", "imagenet_sketch", "imagenet_a", "imagenet_r"]
SYNSETS = ["n01440764", "n01443537", "n01484850", "n01491361", "n01494475"]
AIRCRAFT = ["707-320", "A300B4", "Boeing 717", "C-130", "Tu-154"]
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
        folder, number = root / "fgvc_aircraft", 0
        folder.mkdir(parents=True)
        (folder / "variants.txt").write_text("\n".join(AIRCRAFT))
        for part, n in (("train", 3), ("val", 2), ("test", 2)):
            lines = []
            for name in AIRCRAFT * n:
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
def test_every_layout_loads(dataset, tmp_path, monkeypatch, capsys):
    make_layout(tmp_path, dataset)
    n_train = 0 if dataset in VARIANTS else 15
    n_val = 0 if dataset.startswith("imagenet") else 10
    counts = None if dataset == "imagenet" else n_train, n_val, 10
    # As if the field's split were this short.
    monkeypatch.setitem(DATASETS, dataset, replace(DATASETS[dataset], counts=counts))
    split = load_split(dataset, tmp_path)
    assert capsys.readouterr().out == ""
    assert split.source == "coop"
    assert split.samples == ("own" if dataset.startswith("imagenet") else "coop")
    assert (len(split.train), len(split.val), len(split.test)) == (n_train, n_val, 10)
    for label in range(5):
        assert sum(item.label == label for item in split.test) == 2
    assert all((split.folder / item.path).is_file() for item in split.train + split.test)
    if dataset in LAYOUTS:
        assert split.class_names == [f"Some class {i}" for i in range(5)]
    elif dataset == "fgvc_aircraft":
        assert split.class_names == AIRCRAFT  # in the order of variants.txt
        assert split.train[2] == ("images/0000002.jpg", 2)
    else:
        assert split.class_names == NAMES


def test_a_run_on_imagenet_is_tested_on_a_variant_which_nobody_can_train_on(
    tmp_path, run_train, random_clip_file, no_pictures
):
    make_layout(tmp_path, "imagenet")
    make_layout(tmp_path, "imagenet_sketch")
    flags = f"--method ensemble --shots 1 --data {tmp_path} --clip {random_clip_file} --dataset"
    result = run_train(flags, "imagenet")
    assert (result["n_train"], result["n_test"], result["val_accuracy"]) == (5, 10, None)
    assert result["few_shot_samples"] == "own"  # CoOp's depend on a disk's order
    elsewhere = eval.evaluate(tmp_path / "run", dataset="imagenet_sketch")
    assert (elsewhere["dataset"], elsewhere["n_test"]) == ("imagenet_sketch", 10)
    with pytest.raises(BadInput, match="imagenet_sketch has no training images"):
        run_train(flags, "imagenet_sketch", "--out", tmp_path / "no")


@pytest.mark.parametrize(
    "at, value",
    [(1, 0.0), (1, True), (2, "another name"), (2, " "), (2, 5), (0, 5)]
    + [(0, path) for path in ("../1.jpg", "/etc/hostname", "Class_1//test_0.jpg")],
)
def test_the_first_wrong_entry_of_a_split_file_is_named(at, value, tmp_path):
    make_layout(tmp_path, "dtd")
    file = tmp_path / LAYOUTS["dtd"][1]
    split = json.loads(file.read_text())
    entry = split["val" if value == "another name" else "train"][0]
    entry[at] = value
    file.write_text(json.dumps(split))
    with pytest.raises(BadInput) as error:
        load_split("dtd", tmp_path)
    shown = value.replace("//", "/") if at == 0 and value != 5 else str(entry)
    assert str(error.value).startswith(str(file)) and shown in str(error.value)


def test_an_aircraft_that_is_no_variant_is_refused(tmp_path):
    make_layout(tmp_path, "fgvc_aircraft")
    for line, said in (
        ("0000001 Concorde", "'0000001 Concorde' names no variant"),
        ("0000001 A300B4", "lists images/0000001.jpg twice, or it lies outside of the dataset"),
        ("../../1 A300B4", "lists images/../../1.jpg twice, or it lies outside"),
    ):
        (tmp_path / "fgvc_aircraft/images_variant_val.txt").write_text(line)
        with pytest.raises(BadInput, match=said):
            load_split("fgvc_aircraft", tmp_path)


def test_imagenets_val_folder_is_the_test_set_and_its_size_is_compared(tmp_path, capsys):
    make_layout(tmp_path, "imagenet")
    split = load_split("imagenet", tmp_path)
    assert split.train[3] == ("images/train/n01443537/n01443537_0.JPEG", 1)
    assert split.test[2] == ("images/val/n01443537/ILSVRC2012_val_0.JPEG", 1)
    said = capsys.readouterr().out
    assert "imagenet lists (15, 0, 10) images, the field's split ('any', 0, 50000)" in said


def test_imagenetv2_folders_are_numbers_not_strings(tmp_path):
    make_layout(tmp_path, "imagenetv2")
    names = [f"n{i:08d} name {i}" for i in range(12)]
    (tmp_path / "imagenet/classnames.txt").write_text("\n".join(names))
    for number in range(5, 12):
        draw_image(tmp_path / VARIANT_ROOTS["imagenetv2"] / f"{number}/0.jpg", number)
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
    for field in ("folder", "archive", "sha256", "split"):
        values = [getattr(row, field) for row in real.values() if getattr(row, field)]
        assert len(set(values)) == len(values), field  # no dataset has another's


# ----------------------------------------------------------------------------- the field's files
# `field_splits.json.gz` holds what decides on samples in seven of the field's split files: class
# names, the labels of all images in their order, and the positions of CoOp's samples for seed 1.

FIELD_SPLITS = json.loads(gzip.decompress((HERE / "field_splits.json.gz").read_bytes()))
SMALL = {"caltech101": 100, "dtd": 47, "oxford_flowers": 102, "oxford_pets": 37}  # classes
LARGE = {"eurosat": 10, "stanford_cars": 196, "ucf101": 101}


@pytest.mark.parametrize(
    "dataset, n_classes",
    [
        *SMALL.items(),
        *(pytest.param(*entry, marks=pytest.mark.slow) for entry in LARGE.items()),
    ],
)
def test_real_splits_have_their_counts_and_give_the_fields_samples(
    dataset, n_classes, tmp_path, monkeypatch
):
    real, row = FIELD_SPLITS[dataset], DATASETS[dataset]
    images = [f"{row.images}/".lstrip("/") + part for part in ("train", "val", "test")]
    content = {
        part: [[f"{part}/{i}.jpg", label, real["names"][label]] for i, label in enumerate(labels)]
        for part, labels in real["labels"].items()
    }
    (tmp_path / row.folder / images[0]).mkdir(parents=True)
    (tmp_path / row.folder / row.split).write_text(json.dumps(content))
    monkeypatch.setattr(os.path, "isfile", lambda path: True)  # thousands of images
    split = load_split(dataset, tmp_path)
    assert split.samples == "coop"  # its counts are the catalogue's
    assert len(split.class_names) == n_classes
    for shots, expected in real["samples"].items():
        drawn = few_shot(split, int(shots), 1)
        for part, folder in zip(("train", "val"), images):
            assert [i.path for i in getattr(drawn, part)] == [
                f"{folder}/{position}.jpg" for position in expected[part]
            ]


# -------------------------------------------------------------------------- a folder of one's own


def make_folder(root, classes, n=10, below=""):
    for name in classes:
        for i in range(n):
            draw_image(root / below / name / f"{i}.jpg", f"{below}{name}{i}")
    return root


def test_given_train_and_test_folders_are_kept_and_val_may_be_absent(tmp_path):
    for part, n in (("train", 4), ("test", 3)):
        make_folder(tmp_path, ["cat", "red_dog"], n, part)
    split = load_split(str(tmp_path), "")
    assert split.class_names == ["cat", "red dog"] and split.source == "folder"
    assert (len(split.train), len(split.val), len(split.test)) == (8, 0, 6)
    assert split.test[0] == ("test/cat/0.jpg", 0)
    with pytest.raises(BadInput, match="chooses its strength on val images, and there are none"):
        train_run(f"--method linear --dataset {tmp_path} --out", tmp_path.with_name("run"))


def test_a_folder_never_takes_a_datasets_place_and_gets_the_general_templates(
    tmp_path, monkeypatch
):
    make_folder(tmp_path / "eurosat", ["cat", "dog"])
    monkeypatch.chdir(tmp_path)
    assert full_dataset("eurosat") == "eurosat"
    assert full_dataset("./eurosat") == str(tmp_path / "eurosat")
    assert load_split("./eurosat", "").class_names == ["cat", "dog"]
    assert row_of(str(tmp_path / "eurosat")).zero_shot == "a photo of a {}."
    assert template_groups(str(tmp_path / "eurosat")) == template_groups("sun397")


@pytest.mark.parametrize(
    "folders, said",
    [
        ({"": []}, "no class folders in"),
        ({"": ["cat"]}, "has one class only, 'cat'"),
        ({"train": ["cat", "dog"]}, "needs both train/ and test/"),
        ({"train": ["cat", "dog"], "test": ["cat"]}, "the class 'dog' has no image in test"),
        ({"train": ["cat"], "test": ["cat", "fox"]}, "the class 'fox' has no image in train"),
    ],
)
def test_folders_that_cannot_be_learned_from_are_refused(folders, said, tmp_path):
    for below, classes in folders.items():
        make_folder(tmp_path, classes, 3, below)
    with pytest.raises(BadInput, match=said):
        load_split(str(tmp_path), "")


def test_class_folders_without_images_are_refused(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
    with pytest.raises(BadInput, match="no images in"):
        load_split(str(tmp_path), "")
    make_folder(tmp_path, ["cat"])
    with pytest.raises(BadInput, match="the class 'dog' has no image in train"):
        load_split(str(tmp_path), "")


# ------------------------------------------------------------------------- a row of one's own


def test_a_row_of_nothing_but_paths_trains_and_says_which_templates_serve(
    tmp_path, run_train, random_clip_file, no_pictures, monkeypatch, capsys
):
    make_layout(tmp_path, "dtd")
    row = Row("dtd", "images", split="split_zhou_DescribableTextures.json")
    monkeypatch.setitem(DATASETS, "mine", row)
    flags = f"--dataset mine --shots 2 --epochs 1 --views 1 --data {tmp_path} --clip"
    result = run_train(flags, random_clip_file)
    assert (result["n_train"], result["n_test"], result["n_prompts"]) == (10, 10, 4)
    assert list(result["prompt_usage"]) == [group[0] for group in template_groups("sun397")]
    assert result["few_shot_samples"] == "coop"  # by CoOp's rule, on a complete split
    said = capsys.readouterr().out
    assert "mine has no templates: SUN397's four groups are used" in said
    assert "comparable" not in said
