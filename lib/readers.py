"""Reads the datasets' layouts on disk into plain lists.

Every reader returns (class names by label, {"train" | "val" | "test": [(path, label), ...]}) with
paths below the dataset's folder and labels counting from 0.
"""

import json
import os
from pathlib import Path

from lib.photos import files_below, is_image
from lib.runs import BadInput, read_lines

PARTS = ("train", "val", "test")
OTHER_NAMES = {"training": "train", "valid": "val", "validation": "val", "testing": "test"}


def read_split_file(file, images):
    """The field's `split_zhou_*.json`: train, val and test lists of [path, label, class name].

    images: the folder that contains the file's paths. Raises BadInput if it is not a split file.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        lists = {
            part: [
                ((Path(images) / path).as_posix(), int(label)) for path, label, _ in content[part]
            ]
            for part in PARTS
        }
        names = {int(label): str(name) for part in PARTS for _, label, name in content[part]}
    except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError) as error:
        raise BadInput(
            f"{file} is not a split file (train, val and test lists of [path, label, class name])"
        ) from error
    if sorted(names) != list(range(len(names))):
        raise BadInput(f"{file}: the labels must run from 0 without gaps, found {sorted(names)}")
    return [readable(names[label]) for label in range(len(names))], lists


def read_aircraft(folder, images):
    """FGVC Aircraft's official lists: variants.txt has the class names in the order of labels."""
    class_names = read_lines(folder / "variants.txt")
    labels = {name: label for label, name in enumerate(class_names)}
    lists = {}
    for part in PARTS:
        file = folder / f"images_variant_{part}.txt"
        pairs = [line.split(" ", 1) for line in read_lines(file)]  # image number, variant
        unknown = [pair for pair in pairs if pair[-1] not in labels]
        if unknown:
            raise BadInput(f"{file}: {' '.join(unknown[0])!r} names no variant of variants.txt")
        lists[part] = [(f"{images}/{number}.jpg", labels[name]) for number, name in pairs]
    return class_names, lists


def read_imagenet(folder, images, layout, class_names_file):
    """ImageNet and its variants: one folder per class.

    layout: `imagenet`, with train/<synset> and val/<synset> below `images`, where val is the test
    set; `synsets`, only a test set; or `numbers`, only a test set, where folder i belongs to line i
    of class_names_file. That file has lines of "synset name".
    Raises BadInput for a class folder without a name.
    """
    names = read_class_names(class_names_file)
    test = f"{images}/val" if layout == "imagenet" else images
    classes = class_folders(folder / test)
    if layout == "numbers":
        names = {str(number): name for number, name in enumerate(names.values())}
        classes.sort(key=int if all(map(str.isdecimal, classes)) else None)
    if not classes and layout == "imagenet":
        raise BadInput(
            f"no class folders in {folder / test}: its images come in one flat folder and belong in"
            " val/<synset>/*.JPEG; the script valprep.sh of soumith/imagenetloader.torch moves them"
        )
    class_names = names_of(classes, names, class_names_file)
    lists = {"train": [], "val": [], "test": image_files(folder, test, classes)}
    if layout == "imagenet":
        # CoOp lists the files of a class in disk order. These are sorted, so the samples differ.
        lists["train"] = image_files(folder, f"{images}/train", classes)
    return class_names, lists


def read_class_names(file):
    """{folder: class name} from a file with lines of "folder name"."""
    return dict(" ".join(line.split()).partition(" ")[::2] for line in read_lines(file))


def names_of(classes, names, file):
    """The names of class folders. names: {folder: name}, from `file`. Raises BadInput for a folder
    without a name."""
    for folder in classes:
        if not names.get(folder):
            raise BadInput(f"{file} has no name for the folder {folder}: a line is folder and name")
    return [names[folder] for folder in classes]


def part_folders(folder):
    """{"train" | "val" | "test": the name of its folder} in your own folder. Empty if there are
    none, or if all of them are classes: folders that hold images and no folders."""
    found = {}
    for name in class_folders(folder):
        part = OTHER_NAMES.get(name.lower(), name.lower())
        if part in found:
            raise BadInput(f"{folder} has two folders for {part}: {found[part]}/ and {name}/")
        if part in PARTS:
            found[part] = name

    def is_class(name):
        return not class_folders(folder / name) and any(map(is_image, files_below(folder / name)))

    return {} if all(map(is_class, found.values())) else found


def class_folders(folder):
    """The names of the folders in `folder`, sorted, without those that start with . or _"""
    if not folder.is_dir():
        return []
    return sorted(f.name for f in os.scandir(folder) if f.is_dir() and f.name[0] not in "._")


def image_files(folder, below, classes):
    """The image files at any depth of each class folder in `folder / below`, in sorted order,
    labelled by the position of their class in the list."""
    return [
        (f"{below}/{name}/{file}".lstrip("/"), label)
        for label, name in enumerate(classes)
        if (folder / below / name).is_dir()
        for file in files_below(folder / below / name)
        if is_image(file)
    ]


def readable(name):
    """A class name as words: underscores become spaces."""
    return " ".join(name.replace("_", " ").split())
