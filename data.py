"""Datasets: their splits, the sampling of few-shot images, and base and new classes.

A dataset is one of three things:

- a row of lib/catalogue.py and a folder in the layout of CoOp's DATASETS.md, so the data folder
  that the field's repositories share works unchanged. A missing dataset is downloaded, except
  ImageNet:

      data/eurosat/2750/AnnualCrop/AnnualCrop_1.jpg
      data/eurosat/split_zhou_EuroSAT.json

- your own folder, `<class>/*` or `{train,val,test}/<class>/*`; its classes are named after their
  folders, or by a file `classnames.txt` with lines of "folder name";
- the built-in world (`shapes`, lib/world.py), whose images are drawn instead of read.

Each becomes a `Split`: three lists of images with labels.
"""

import os
import random
from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch

from lib import readers, world
from lib.catalogue import DATASETS, archive_url
from lib.download import fetch_dataset
from lib.photos import files_below, open_photo
from lib.readers import PARTS, class_folders, image_files, readable
from lib.runs import BadInput, nearest
from prompts import check_apart

# Where to find what is not downloaded.
DATASETS_MD = "CoOp's DATASETS.md (https://github.com/KaiyangZhou/CoOp/blob/main/DATASETS.md)"
CLASS_NAMES = "https://drive.google.com/file/d/1-61f_ol79pViBFDG_IDlUQSwoLcn2XXF"  # from there
IMAGENET = (
    "images/train/<synset>/*.JPEG and images/val/<synset>/*.JPEG from https://image-net.org, and"
    f" classnames.txt from {CLASS_NAMES}"
)


class Item(NamedTuple):
    """One image: its path below the dataset's folder and its label."""

    path: str
    label: int


@dataclass(frozen=True)
class Split:
    """A dataset, or a part of one: three lists of items, labels counting from 0."""

    dataset: str  # a name of the catalogue, or the full path of your own folder
    folder: Path | None  # None: the images are drawn
    source: str  # `coop`, `folder`, `seeded` or `shapes`: where the lists come from
    class_names: list[str]  # by label
    train: list[Item]
    val: list[Item]
    test: list[Item]
    samples: str = "own"  # `coop` if few-shot samples drawn from it are CoOp's, image for image

    @property
    def name(self):
        return dataset_name(self.dataset)

    def labels(self, items):
        """The labels of items as a tensor (N,)."""
        return torch.tensor([item.label for item in items])

    def open(self, path):
        """The RGB image at `path`, a PIL image. Raises BadInput if it cannot be read."""
        if self.folder is None:
            return world.draw_path(self.dataset, path)
        return open_photo(self.folder / path, as_coop=self.source == "coop")

    @property
    def kinds(self):
        """How router pictures group the test images: by style in the built-in world, else by class.
        Returns (the index of each image's group, the groups' names)."""
        if self.folder is None:
            names = list(world.DATASETS[self.dataset])
            return [names.index(world.style_of(item.path)) for item in self.test], names
        return [item.label for item in self.test], self.class_names


def full_dataset(dataset):
    """A dataset as a run's configuration names it: your own folder by its full path."""
    known = dataset in DATASETS or not os.path.isdir(dataset)
    return dataset if known else str(Path(dataset).resolve())


def dataset_name(dataset):
    """The short name of a dataset: for your own folder, the last component of its path."""
    return dataset if dataset in DATASETS else Path(dataset).resolve().name


# ---------------------------------------------------------------------- samples, base and new


def few_shot(split, shots, seed):
    """CoOp's few-shot sample: per class `shots` training images and min(shots, 4) val images.

    The images are exactly CoOp's: seed once, then call `random.sample` for each label in order of
    first appearance; first for train, then for val from the same stream. The sample depends on the
    lengths of the lists, so it is drawn from the complete lists and reduced to base or new later.

    Returns the split with shorter `train` and `val`. A class with fewer images contributes all.
    """
    rng = random.Random(seed)

    def sample(items, n):
        by_label = defaultdict(list)
        for item in items:
            by_label[item.label].append(item)
        drawn = [rng.sample(own, n) if len(own) >= n else own for own in by_label.values()]
        return [item for same_label in drawn for item in same_label]

    train, val = sample(split.train, shots), sample(split.val, min(shots, 4))
    counts = Counter(item.label for item in train)
    short = [split.class_names[label] for label, n in counts.items() if n < shots]
    if short:
        print(f"using all images of {len(short)} classes with fewer than {shots} ({short[0]} ...)")
    return replace(split, train=train, val=val)


def few_shot_split(config):
    """(the complete split, the few-shot part of it that a run trains on), by the run's flags.

    Raises BadInput as `load_split` does, and for a dataset without training images.
    """
    full_split = load_split(config["dataset"], config["data"])
    if not full_split.train:
        where = f" in {full_split.folder}" if config["dataset"] == "imagenet" else ""
        raise BadInput(
            f"{config['dataset']} has no training images{where}: it can only be a target"
            " of eval.py RUN --dataset"
        )
    sample = few_shot(full_split, config["shots"], config["seed"])
    return full_split, select_classes(sample, config["classes"])


def class_slice(n, classes):
    """The labels of `all` n classes, the `base` half (the first ceil(n / 2)), or the `new` rest."""
    half = (n + 1) // 2
    return {"all": slice(0, n), "base": slice(0, half), "new": slice(half, n)}[classes]


def select_classes(split, classes):
    """The split with the images and names of `all`, `base` or `new` classes, labels from 0. Raises
    BadInput for a half with a single class, where any answer would be right."""
    chosen = class_slice(len(split.class_names), classes)
    labels = range(chosen.start, chosen.stop)

    def keep(items):
        return [Item(i.path, i.label - labels.start) for i in items if i.label in labels]

    names = split.class_names[chosen]
    if classes != "all" and len(names) < 2:
        raise BadInput(f"{split.name}: the {classes} half is a single class, {names[0]!r}")
    lists = {part: keep(getattr(split, part)) for part in PARTS}
    return replace(split, class_names=names, **lists)


# ------------------------------------------------------------------------------------- loading


def load_split(dataset, root):
    """The complete train, val and test lists of a dataset.

    dataset: a name of the catalogue, below `root` and downloaded if absent; or the path of your own
    folder.
    Raises BadInput for an unknown dataset, missing files that cannot be downloaded, an invalid
    split file, a split that lists missing images, and a class without images; PromptError for two
    class folders that CLIP cannot tell apart.
    """
    if dataset in world.DATASETS:
        return _split(dataset, None, "shapes", world.class_names(dataset), world.lists(dataset))
    if dataset in DATASETS:
        return _known_dataset(dataset, Path(root))
    if os.path.isdir(dataset):
        return _own_folder(dataset)
    raise BadInput(
        f"unknown dataset {dataset!r}{nearest(dataset, DATASETS)}: neither a folder nor one of"
        f" {', '.join(DATASETS)}"
    )


def _split(dataset, folder, source, class_names, lists):
    """A `Split` of the lists that a reader returns."""
    items = {part: [Item(*entry) for entry in lists[part]] for part in PARTS}
    return Split(dataset, folder, source, class_names, **items)


def _known_dataset(dataset, root):
    """A row of the catalogue: downloaded if absent, then read from its lists or class folders."""
    row = DATASETS[dataset]
    folder = root / row.folder
    if row.archive:
        if not ((folder / row.images).is_dir() or row.split or _lists(row, folder).is_file()):
            print(f"no {_lists(row, folder)}: if the archive has none, see {DATASETS_MD},")
            print(f"  which links to {CLASS_NAMES}")
        fetch_dataset(archive_url(row), folder, (row.images, row.split), row.sha256)
    lists = _lists(row, folder)
    for path in (folder / row.images, lists):
        if not path.exists():
            found = sorted(os.listdir(folder))[:5] if folder.is_dir() else []
            expected = IMAGENET if dataset == "imagenet" else f"the layout of {DATASETS_MD}"
            raise BadInput(
                f"no {path} ({folder} holds {', '.join(found) or 'nothing'}): expected {expected}"
            )
    if row.layout == "split":
        read = readers.read_split_file(lists, row.images)
    elif row.layout == "aircraft":
        read = readers.read_aircraft(folder, row.images)
    else:
        read = readers.read_imagenet(folder, row.images, row.layout, lists)
    split = _check(_split(dataset, folder, "coop", *read))
    _check_files(split)
    counts = tuple(len(getattr(split, part)) for part in PARTS)
    if not all(n in (None, found) for n, found in zip(row.counts, counts)):
        expected = tuple("any" if n is None else n for n in row.counts)
        print(f"{dataset} lists {counts} images, the field's split {expected}: the numbers are")
        print("  NOT comparable with the field's")
    elif row.layout in ("split", "aircraft"):  # ImageNet's depends on the disk's file order
        split = replace(split, samples="coop")
    return split


def _lists(row, folder):
    """The file that describes the images: the split file. For ImageNet and its variants it is
    classnames.txt, the variant's own if there is one, otherwise ImageNet's."""
    own = folder / (row.split or "classnames.txt")
    shared = folder.parent / DATASETS["imagenet"].folder / own.name
    return own if row.split or own.is_file() else shared


def _own_folder(dataset):
    """Reads `<class>/*`, or `{train,val,test}/<class>/*` where val may be absent."""
    folder = Path(dataset)
    parts = readers.part_folders(folder)
    if parts and not {"train", "test"} <= parts.keys():
        raise BadInput(
            f"{folder} has a folder {[*parts.values()][0]}/, and needs both train/ and test/ then"
        )
    classes = sorted({c for part in parts.values() or [""] for c in class_folders(folder / part)})
    file = folder / "classnames.txt"
    names = readers.read_class_names(file) if file.is_file() else dict(zip(classes, classes))
    names = [readable(name) for name in readers.names_of(classes, names, file)]

    def images(below):
        found = image_files(folder, below, classes)
        return [(path, label) for path, label in found if os.path.isfile(folder / path)]

    if parts:
        lists = {part: images(parts[part]) if part in parts else [] for part in PARTS}
    else:
        lists = _seeded_lists(images(""))
    split = _split(dataset, folder, "folder" if parts else "seeded", names, lists)
    _say_what_is_guessed(split)
    _check(split)
    check_apart(names, folders=classes)
    return split


def _seeded_lists(items):
    """A split of our own: 50% train, 20% val, 30% test of each class.

    The sorted paths of each class are shuffled with seed 0, not --seed: test images never change.
    """
    by_label, lists = defaultdict(list), {part: [] for part in PARTS}
    for path, label in items:
        by_label[label].append((path, label))
    for own in by_label.values():
        random.Random(0).shuffle(own)
        n_train = round(0.5 * len(own))
        n_val = min(round(0.2 * len(own)), len(own) - n_train - 1)  # one of three is for test
        lists["train"] += own[:n_train]
        lists["val"] += own[n_train : n_train + n_val]
        lists["test"] += own[n_train + n_val :]
    return lists


def _say_what_is_guessed(split):
    """Prints which files in your own folder are not used as images, and which images count towards
    a class although they are in a subfolder of its folder."""
    used = {item.path for part in PARTS for item in getattr(split, part)}
    depth = 2 if split.source == "folder" else 1
    left_out = [f for f in files_below(split.folder) if f not in used and f != "classnames.txt"]
    found = {
        "files are not images in a class folder and are left out": left_out,
        "images lie deeper in their class folder": sorted(p for p in used if p.count("/") > depth),
    }
    for what, paths in found.items():
        if paths:
            print(f"{split.folder}: {len(paths):,} {what}, the first is {paths[0]}")


def _check(split):
    """Returns the split. Raises BadInput unless every class has images in train and in test."""
    where = split.folder
    parts = [part for part in PARTS if getattr(split, part)]
    if not parts:
        what = "images" if split.class_names else "class folders"
        raise BadInput(f"no {what} in {where}: expected {where}/<class>/<image>")
    for name in (str(where), *split.class_names):
        if not name.strip() or name.encode(errors="ignore").decode() != name:
            raise BadInput(f"{where}: {name!r} is not valid Unicode: rename the folder")
    if len(split.class_names) == 1:
        raise BadInput(f"{where} has one class only, {split.class_names[0]!r}")
    test_only = parts == ["test"] and split.source == "coop"
    for part in ["test"] if test_only else ["train", "test"]:
        present = {item.label for item in getattr(split, part)}
        for label, name in enumerate(split.class_names):
            if label not in present:
                raise BadInput(
                    f"{split.dataset}: the class {name!r} has no image in {part}, where every"
                    " class needs one"
                )
    return split


def _check_files(split):
    """Raises BadInput if the split lists images that are missing."""
    items = [*split.train, *split.val, *split.test]
    missing = [i.path for i in items if not os.path.isfile(split.folder / i.path)]
    if missing:
        raise BadInput(
            f"{len(missing):,} of {len(items):,} images of {split.dataset} are missing,"
            f" the first is {split.folder / missing[0]}"
        )
