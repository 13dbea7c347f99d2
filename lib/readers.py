"""Reads the datasets' layouts on disk into plain lists.

Every reader returns (class names by label, {"train" | "val" | "test": [(path, label), ...]}) with
paths below the dataset's folder and labels counting from 0.
"""

import json
import os
import random
import re
from collections import defaultdict
from pathlib import Path

from lib.catalogue import DATASETS, archive_url
from lib.download import fetch_dataset
from lib.errors import BadInput, say
from lib.files import read_lines, read_text
from lib.photos import SYSTEM, files_below, is_image

PARTS = ("train", "val", "test")
PART = re.compile("(train|val|test)(ing|idation|id)?", re.IGNORECASE)  # a folder's name for one
LAYOUTS = "<class>/<image>, or train/<class>/<image> and test/<class>/<image>"
# Where to find what is not downloaded.
DATASETS_MD = "CoOp's DATASETS.md (https://github.com/KaiyangZhou/CoOp/blob/main/DATASETS.md)"
CLASS_NAMES = "https://drive.google.com/file/d/1-61f_ol79pViBFDG_IDlUQSwoLcn2XXF"  # from there
IMAGENET = (
    "images/train/<synset>/*.JPEG and images/val/<synset>/*.JPEG from https://image-net.org, and"
    f" classnames.txt from {CLASS_NAMES}"
)


# ------------------------------------------------------------------------ the field's datasets


def read_known(dataset, folder):
    """A row of the catalogue: downloaded if absent, then read from its lists or class folders."""
    row = DATASETS[dataset]
    if row.archive:
        fetch_dataset(archive_url(row), folder, (row.images, row.split), row.sha256)
    file = _lists(row, folder)
    for path in (folder / row.images, file):
        if not path.exists():
            found = sorted(os.listdir(folder))[:5] if folder.is_dir() else []
            expected = IMAGENET if dataset == "imagenet" else f"the layout of {DATASETS_MD}"
            raise BadInput(
                f"no {path} ({folder} holds {', '.join(found) or 'nothing'}): expected {expected}"
            )
    if row.layout == "split":
        names, lists = read_split_file(file, row.images)
    elif row.layout == "aircraft":
        names, lists = read_aircraft(folder, row.images)
    else:
        names, lists = read_imagenet(folder, row.images, row.layout, file)
    paths = [path for part in PARTS for path, _ in lists[part]]
    known = set()
    for path in paths:
        if path in known or path[0] == "/" or ".." in path.split("/"):
            raise BadInput(f"{file} lists {path} twice, or it lies outside of the dataset")
        known.add(path)
    missing = [path for path in paths if not os.path.isfile(folder / path)]
    if missing:
        raise BadInput(
            f"{len(missing):,} of {len(paths):,} images of {dataset} are missing,"
            f" the first is {folder / missing[0]}"
        )
    return names, lists


def are_the_fields(dataset, lists):
    """Whether few-shot samples of these lists are CoOp's, image for image. Prints a warning if
    their sizes are not those of the field's split."""
    row, counts = DATASETS[dataset], tuple(len(lists[part]) for part in PARTS)
    if not all(n in (None, found) for n, found in zip(row.counts, counts)):
        expected = tuple("any" if n is None else n for n in row.counts)
        say(f"{dataset} lists {counts} images, the field's split {expected}: the numbers are")
        print("  NOT comparable with the field's")
        return False
    return row.layout in ("split", "aircraft")  # ImageNet's depends on the disk's file order


def _lists(row, folder):
    """The file that describes the images: the split file. For ImageNet and its variants it is
    classnames.txt, the variant's own if there is one, otherwise ImageNet's."""
    own = folder / (row.split or "classnames.txt")
    shared = folder.parent / DATASETS["imagenet"].folder / own.name
    return own if row.split or own.is_file() else shared


def read_split_file(file, images):
    """The field's `split_zhou_*.json`: train, val and test lists of [path, label, class name].

    images: the folder that contains the file's paths. Raises BadInput if it is not a split file.
    """
    text, lists, names = read_text(file), {part: [] for part in PARTS}, {}
    entry = "the file itself"
    try:
        content = json.loads(text)
        for entry in [(part, entry) for part in PARTS for entry in content[part]]:
            part, (path, label, name) = entry
            has_one_name = names.setdefault(label, name) == name
            if not (has_one_name and name.strip() and type(label) is int):
                raise ValueError
            lists[part].append(((Path(images) / path).as_posix(), label))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BadInput(
            f"{file} is not a split file (train, val and test lists of [path, label, class name],"
            f" the labels whole numbers with one name each): the first error is in {entry}"
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
        unknown = [pair for pair in pairs if len(pair) < 2 or pair[1] not in labels]
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


def read_class_names(file, folders=()):
    """{folder: class name} from a file with lines of "folder name". folders: their names, if these
    may have spaces: a line belongs to the longest that it begins with."""
    longest_first = sorted(folders, key=len, reverse=True)
    known = "|".join(map(re.escape, longest_first)) or r"\S+"
    pairs = re.findall(rf"^\s*({known})(?!\S)[ \t]*(.*)", read_text(file), re.MULTILINE)
    names = {folder: " ".join(name.split()) for folder, name in pairs}
    if len(names) < len(pairs):
        raise BadInput(f"{file} names a folder twice")
    return names


def names_of(classes, names, file):
    """The names of class folders. names: {folder: name}, from `file`. Raises BadInput for a folder
    without a name."""
    for folder in classes:
        if not names.get(folder):
            raise BadInput(f"{file} has no name for the folder {folder}: a line is folder and name")
    return [names[folder] for folder in classes]


# ---------------------------------------------------------------------------- folders of your own


def read_own(folder):
    """Reads `<class>/*`, or `{train,val,test}/<class>/*` where val may be absent. Returns (`folder`
    or `seeded`, the class folders, class names, lists)."""
    parts = part_folders(folder)
    if parts and not {"train", "test"} <= parts.keys():
        raise BadInput(
            f"{folder} has a folder {[*parts.values()][0]}/, and needs both train/ and test/ then"
        )
    classes = sorted({c for part in parts.values() or [""] for c in class_folders(folder / part)})
    rest = [PART.sub("", name) for name in classes]  # seg_ of seg_train and of seg_test
    for name, other in zip(classes, rest):
        if part_folders(folder / name) or (other and rest.count(other) > 1):
            raise BadInput(f"{folder} holds {name}/, which is not a class: expected {LAYOUTS}")
    file = folder / "classnames.txt"
    names = dict(zip(classes, classes))
    if os.path.lexists(file):
        names = read_class_names(file, classes)
    names = [readable(name) for name in names_of(classes, names, file)]

    def images(below):
        found = image_files(folder, below, classes)
        return [(path, label) for path, label in found if os.path.isfile(folder / path)]

    if parts:
        lists = {part: images(parts[part]) if part in parts else [] for part in PARTS}
    else:
        lists = seeded_lists(images(""))
    _print_guesses(folder, lists, depth=2 if parts else 1)
    return "folder" if parts else "seeded", classes, names, lists


def seeded_lists(items):
    """A split of our own: 50% train, 20% val, 30% test of each class.

    The sorted paths of each class are shuffled with seed 0, not --seed: test images never change.
    """
    by_label, lists = defaultdict(list), {part: [] for part in PARTS}
    for path, label in items:
        by_label[label].append((path, label))
    for own in by_label.values():
        random.Random(0).shuffle(own)
        n_train = round(0.5 * len(own))
        # At least one image is left for test, even of three.
        n_val = min(round(0.2 * len(own)), len(own) - n_train - 1)
        lists["train"] += own[:n_train]
        lists["val"] += own[n_train : n_train + n_val]
        lists["test"] += own[n_train + n_val :]
    return lists


def _print_guesses(folder, lists, depth):
    """Prints which files in your own folder are not used as images, and which images count towards
    a class although they are in a subfolder of its folder."""
    used = {path for part in PARTS for path, _ in lists[part]}
    left_out = [f for f in files_below(folder) if f not in used and f != "classnames.txt"]
    deep = sorted(path for path in used if path.count("/") > depth)
    found = {
        "files are not images in a class folder and are left out": left_out,
        "images are in subfolders of their class folder": deep,
    }
    for what, paths in found.items():
        if paths:
            say(f"{folder}: {len(paths):,} {what}, the first is {paths[0]}")


def check_classes(dataset, folder, class_names, lists, may_lack_train):
    """Raises BadInput unless every class has images in train and in test."""
    parts = [part for part in PARTS if lists[part]]
    if not parts:
        what = "images" if class_names else "class folders"
        raise BadInput(f"no {what} in {folder}: expected {folder}/<class>/<image>")
    for name in (str(folder), *class_names):
        if not name.strip() or name.encode(errors="ignore").decode() != name:
            raise BadInput(f"{folder}: {name!r} is not valid Unicode: rename the folder")
    if len(class_names) == 1:
        raise BadInput(f"{folder} has one class only, {class_names[0]!r}: expected {LAYOUTS}")
    for part in ["test"] if may_lack_train and parts == ["test"] else ["train", "test"]:
        present = {label for _, label in lists[part]}
        for label, name in enumerate(class_names):
            if label not in present:
                raise BadInput(
                    f"{dataset}: the class {name!r} has no image in {part}, where every"
                    " class needs one"
                )


def part_folders(folder):
    """{"train" | "val" | "test": the name of its folder} in your own folder. Empty if there are
    none, or if all of them are classes among others: folders that hold images and no folders.
    Raises BadInput for parts of which some hold images and no class folders."""
    names, found = class_folders(folder), {}
    for name in filter(PART.fullmatch, names):
        part = PART.match(name)[1].lower()
        if part in found:
            raise BadInput(f"{folder} has two folders for {part}: {found[part]}/ and {name}/")
        found[part] = name

    flat = [
        name
        for name in found.values()
        if not class_folders(folder / name) and any(map(is_image, files_below(folder / name)))
    ]
    if flat and not len(flat) == len(found) < len(names):
        raise BadInput(f"{folder / flat[0]} holds images and no class folders: expected {LAYOUTS}")
    return {} if flat else found


def class_folders(folder):
    """The names of the folders in `folder`, sorted, without those of systems and those that start
    with . or _"""
    if not folder.is_dir():
        return []
    return sorted(
        f.name
        for f in os.scandir(folder)
        if f.is_dir() and f.name[0] not in "._" and f.name.lower() not in SYSTEM
    )


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
