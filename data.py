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
from lib.catalogue import DATASETS
from lib.errors import BadInput, nearest, say
from lib.photos import open_photo
from lib.readers import PARTS
from prompts import check_apart


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
    """A dataset's name in a run's configuration: for your own folder, its full path."""
    known = dataset in DATASETS or not os.path.isdir(dataset)
    return dataset if known else str(Path(dataset).resolve())


def dataset_name(dataset):
    """The short name of a dataset: for your own folder, the last component of its path."""
    return dataset if dataset in DATASETS else Path(dataset).resolve().name


# ---------------------------------------------------------------------- samples, base and new


def few_shot(split, shots, seed):
    """CoOp's few-shot sample: per class `shots` training images and min(shots, 4) val images.

    The images are exactly CoOp's: seed once, then call `random.sample` for each label in order of
    first appearance, first for train, then for val from the same stream. The sample depends on the
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
        say(f"using all images of {len(short)} classes with fewer than {shots} ({short[0]} ...)")
    return replace(split, train=train, val=val)


def few_shot_split(config):
    """(the complete split, the few-shot part that a run trains on), from a run's configuration.

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
        folder, source = None, "shapes"
        names, lists = world.class_names(dataset), world.lists(dataset)
    elif dataset in DATASETS:
        folder, source = Path(root) / DATASETS[dataset].folder, "coop"
        names, lists = readers.read_known(dataset, folder)
    elif os.path.isdir(dataset):
        folder = Path(dataset)
        source, classes, names, lists = readers.read_own(folder)
    else:
        raise BadInput(
            f"unknown dataset {dataset!r}{nearest(dataset, DATASETS)}: neither a folder nor one of"
            f" {', '.join(DATASETS)}"
        )
    if folder:
        readers.check_classes(dataset, folder, names, lists, may_lack_train=source == "coop")
    if source in ("folder", "seeded"):
        check_apart(names, folders=classes)
    items = {part: [Item(*entry) for entry in lists[part]] for part in PARTS}
    samples = "coop" if source == "coop" and readers.are_the_fields(dataset, lists) else "own"
    return Split(dataset, folder, source, names, **items, samples=samples)
