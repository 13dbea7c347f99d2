"""All layouts of the table, and folders of one's own."""

import gzip
import json
import os
import shutil
from dataclasses import replace

import pytest
from conftest import HERE, draw_image
from PIL import Image

import eval
from data import few_shot, full_dataset, load_split, select_classes
from lib.catalogue import DATASETS, Row, template_groups
from lib.clip_model import load_clip
from lib.features import image_features
from lib.report import accuracy
from lib.runs import BadInput
from prompts import PromptError, template_features

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
    (tmp_path / row.folder / images[0]).mkdir(parents=True)
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
        with pytest.raises(PromptError, match=f"the classes '{name}' and 'red_cat' apart"):
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
    with pytest.raises(BadInput, match="chooses its strength on val images, and there are none"):
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
    assert "mine has no templates: SUN397's four groups are used" in said
    assert "comparable" not in said


def test_a_row_without_an_archive_says_what_is_missing(own_row, tmp_path):
    with pytest.raises(BadInput, match=r"no .*mine/pictures \(.*mine holds nothing\): expected"):
        load_split("mine", tmp_path)
    make_own(tmp_path)
    (tmp_path / "mine/split_zhou_Mine.json").unlink()
    with pytest.raises(BadInput, match=r"no .*split_zhou_Mine.json \(.*mine holds pictures\)"):
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
    said = f"{folder}: 10 files are not images in a class folder and are left out, the first is"
    assert capsys.readouterr().out == f"{said} _old/0.jpg\n"


@pytest.mark.parametrize(
    "n, parts", [(2, (1, 0, 1)), (3, (2, 0, 1)), (4, (2, 1, 1)), (5, (2, 1, 2))]
)
def test_small_classes_keep_an_image_for_the_test(tmp_path, n, parts):
    split = load_split(str(make_folder(tmp_path / "photos", ["cat", "dog"], n)), "")
    counts = len(split.train), len(split.val), len(split.test)
    assert counts == tuple(2 * part for part in parts)
