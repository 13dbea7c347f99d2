"""Datasets: where they lie, how they are split, and which few-shot images are drawn.

A dataset is a row of DATASETS and a folder in the layout of CoOp's DATASETS.md, so the field's
own data folder works as it is:

    data/eurosat/2750/AnnualCrop/AnnualCrop_1.jpg
    data/eurosat/split_zhou_EuroSAT.json

What is absent is fetched into that same layout, where it can be. A folder of one's own,
`<class>/*` or `{train,val,test}/<class>/*`, is a dataset as it is, and so is the embedded world
(`shapes`, see shapes.py), only that its images are drawn instead of read.

From top to bottom: the table, loading a split, fetching, few-shot samples, base and new classes.
"""

import contextlib
import json
import os
import random
import tarfile
import tempfile
import zipfile
import zlib
from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import gdown
from PIL import Image, ImageOps
from torchvision.datasets.utils import (
    download_file_from_google_drive,
    download_url,
    extract_archive,
)

import shapes
from backbone import BadInput, nearest

# ---------------------------------------------------------------------------------- the table


@dataclass(frozen=True)
class Row:
    """What is known of a dataset. Paths are below `folder`, which is below the root."""

    folder: str
    images: str
    split: str = ""  # the field's fixed split file; "" where folders or official lists serve
    drive_id: str = ""  # of the split file (of classnames.txt for ImageNet) on Google Drive
    counts: tuple = ()  # train, val and test images in the split
    archive: tuple = ()  # URL and MD5, torchvision's where it has one
    origin: str = ""  # where to get it by hand, if it cannot be fetched
    # Where each class has an image folder: readable names that differ from the folder's, None for
    # a folder that is no class. A seeded split can then stand in for one that cannot be had.
    folder_names: dict | None = None


OXFORD = "https://www.robots.ox.ac.uk/~vgg/data"
EUROSAT_NAMES = {
    "AnnualCrop": "Annual Crop Land",
    "HerbaceousVegetation": "Herbaceous Vegetation Land",
    "Highway": "Highway or Road",
    "Industrial": "Industrial Buildings",
    "Pasture": "Pasture Land",
    "PermanentCrop": "Permanent Crop Land",
    "Residential": "Residential Buildings",
    "SeaLake": "Sea or Lake",
}
CALTECH_NAMES = {
    "BACKGROUND_Google": None,
    "Faces_easy": None,
    "Faces": "face",
    "Leopards": "leopard",
    "Motorbikes": "motorbike",
    "airplanes": "airplane",
}

DATASETS = {
    "caltech101": Row(
        "caltech-101",
        "101_ObjectCategories",
        split="split_zhou_Caltech101.json",
        drive_id="1hyarUivQE36mY6jSomru6Fjd-JzwcCzN",
        counts=(4128, 1649, 2465),
        archive=(
            "https://data.caltech.edu/records/mzrjq-6wc02/files/caltech-101.zip",
            "3138e1922a9193bfa496528edbbc45d0",
        ),
        folder_names=CALTECH_NAMES,
    ),
    "oxford_pets": Row(
        "oxford_pets",
        "images",
        split="split_zhou_OxfordPets.json",
        drive_id="1501r8Ber4nNKvmlFVQZ8SeUHTcdTTEqs",
        counts=(2944, 736, 3669),
        archive=(f"{OXFORD}/pets/data/images.tar.gz", "5c4f3ee8e5d25df40f4fd59a7f44e54c"),
    ),
    "stanford_cars": Row(
        "stanford_cars",
        "",
        split="split_zhou_StanfordCars.json",
        drive_id="1ObCFbaAgVu0I-k_Au-gIUcefirdAuizT",
        counts=(6509, 1635, 8041),
        origin="cars_train/*.jpg and cars_test/*.jpg, whose first home"
        " (ai.stanford.edu/~jkrause/cars) is closed: see CoOp's DATASETS.md",
    ),
    "oxford_flowers": Row(
        "oxford_flowers",
        "jpg",
        split="split_zhou_OxfordFlowers.json",
        drive_id="1Pp0sRXzZFZq15zVOzKjKBu4A9i01nozT",
        counts=(4093, 1633, 2463),
        archive=(f"{OXFORD}/flowers/102/102flowers.tgz", "52808999861908f626f3c1f4e79d11fa"),
    ),
    "food101": Row(
        "food-101",
        "images",
        split="split_zhou_Food101.json",
        drive_id="1QK0tGi096I0Ba6kggatX1ee6dJFIcEJl",
        counts=(50500, 20200, 30300),
        archive=(
            "http://data.vision.ee.ethz.ch/cvl/food-101.tar.gz",
            "85eeb15f3717b99a5da872d97d918f87",
        ),
        folder_names={},
    ),
    "fgvc_aircraft": Row(
        "fgvc_aircraft",
        "images",
        counts=(3334, 3333, 3333),
        archive=(f"{OXFORD}/fgvc-aircraft/archives/fgvc-aircraft-2013b.tar.gz", None),
    ),
    "sun397": Row(
        "sun397",
        "SUN397",
        split="split_zhou_SUN397.json",
        drive_id="1y2RD81BYuiyvebdN-JymPfyWYcd8_MUq",
        counts=(15880, 3970, 19850),
        archive=(
            "http://vision.princeton.edu/projects/2010/SUN/SUN397.tar.gz",
            "8ca2778205c41d23104230ba66911c7a",
        ),
    ),
    "dtd": Row(
        "dtd",
        "images",
        split="split_zhou_DescribableTextures.json",
        drive_id="1u3_QfB467jqHgNXC00UIzbLZRQCg2S7x",
        counts=(2820, 1128, 1692),
        archive=(f"{OXFORD}/dtd/download/dtd-r1.0.1.tar.gz", "fff73e5086ae6bdbea199a49dfb8a4c1"),
        folder_names={},
    ),
    "eurosat": Row(
        "eurosat",
        "2750",
        split="split_zhou_EuroSAT.json",
        drive_id="1Ip7yaCWFi0eaOFUGga0lUdVi_DDQth1o",
        counts=(13500, 5400, 8100),
        archive=(
            "https://huggingface.co/datasets/torchgeo/eurosat/resolve/"
            "c877bcd43f099cd0196738f714544e355477f3fd/EuroSAT.zip",
            "c8fa014336c82ac7804f0398fcb19387",
        ),
        folder_names=EUROSAT_NAMES,
    ),
    "ucf101": Row(
        "ucf101",
        "UCF-101-midframes",
        split="split_zhou_UCF101.json",
        drive_id="1I0S0q91hJfsV9Gf4xDIjgDq4AqBNJb1y",
        counts=(7639, 1898, 3783),
        archive=("https://drive.google.com/uc?id=10Jqome3vtUA2keJkNanAiFpgbyC9Hc2O", None),
        folder_names={},
    ),
    "imagenet": Row(
        "imagenet",
        "images",
        drive_id="1-61f_ol79pViBFDG_IDlUQSwoLcn2XXF",
        origin="train/<synset>/*.JPEG and val/<synset>/*.JPEG from https://image-net.org",
    ),
    "imagenetv2": Row(
        "imagenetv2",
        "imagenetv2-matched-frequency-format-val",
        origin="{0 ... 999}/*.jpeg from https://github.com/modestyachts/ImageNetV2",
    ),
    "imagenet_sketch": Row(
        "imagenet-sketch",
        "images",
        origin="<synset>/*.JPEG from https://github.com/HaohanWang/ImageNet-Sketch",
    ),
    "imagenet_a": Row(
        "imagenet-adversarial",
        "imagenet-a",
        origin="<synset>/*.jpg from https://github.com/hendrycks/natural-adv-examples",
    ),
    "imagenet_r": Row(
        "imagenet-rendition",
        "imagenet-r",
        origin="<synset>/*.jpg from https://github.com/hendrycks/imagenet-r",
    ),
}
PARTS = ("train", "val", "test")
# All that Pillow can open, but for films and scientific containers that it only recognises.
IMAGE_SUFFIXES = {
    suffix
    for suffix, kind in Image.registered_extensions().items()
    if kind in Image.OPEN and kind not in ("MPEG", "HDF5", "BUFR", "GRIB", "FITS")
}


class Item(NamedTuple):
    """One image: its path below the dataset's folder and its label."""

    path: str
    label: int


@dataclass(frozen=True)
class Split:
    """A dataset, or a part of one: three lists of items, labels counting from 0."""

    dataset: str  # as given to --dataset
    folder: Path | None  # None: the images are drawn
    source: str  # `coop`, `folder`, `seeded` or `shapes`: where the lists come from
    class_names: list[str]  # by label
    train: list[Item]
    val: list[Item]
    test: list[Item]

    @property
    def name(self):
        return dataset_name(self.dataset)

    @property
    def complete(self):
        """Whether the lists are the field's own, image for image."""
        row = DATASETS.get(self.dataset)
        counts = len(self.train), len(self.val), len(self.test)
        return self.source == "coop" and (not row.counts or counts == row.counts)


def full_dataset(dataset):
    """A dataset as it goes into a run's configuration: a folder of one's own with its full path."""
    known = dataset in (*shapes.DATASETS, *DATASETS) or not os.path.isdir(dataset)
    return dataset if known else str(Path(dataset).resolve())


def dataset_name(dataset):
    """What a dataset goes by: a folder of one's own by the last component of its path."""
    return dataset if dataset in (*shapes.DATASETS, *DATASETS) else Path(dataset).resolve().name


# -------------------------------------------------------------------------------- the splits


def load_split(dataset, root):
    """The complete train, val and test lists of a dataset.

    dataset: a name of the table, below `root` and fetched if absent; one of the embedded world's;
    or the path of a folder of one's own.
    Raises BadInput for an unknown dataset, files that are missing and cannot be fetched, a split
    file that is not one, a split that names images that are not there, a class without images.
    """
    if dataset in shapes.DATASETS:
        lists = {
            part: [Item(*entry) for entry in items] for part, items in shapes.split(dataset).items()
        }
        return Split(dataset, None, "shapes", shapes.DOWNSTREAM, **lists)
    if dataset not in DATASETS:
        if os.path.isdir(dataset):
            return _check(_own_folder(dataset))
        known = [*shapes.DATASETS, *DATASETS]
        raise BadInput(
            f"unknown dataset {dataset!r}{nearest(dataset, known)}: neither a folder nor one of"
            f" {', '.join(known)}"
        )
    row = DATASETS[dataset]
    folder = Path(root) / row.folder
    if dataset.startswith("imagenet"):
        return _check(_imagenet(dataset, row, folder))
    if not (folder / row.images).is_dir():
        _fetch_images(row, folder)
    if dataset == "fgvc_aircraft":
        return _present(_check(_aircraft(dataset, row, folder)), row)
    if not (folder / row.split).is_file():
        try:
            _fetch_split(row, folder)
        except BadInput as error:
            if row.folder_names is None:
                raise
            print(f"{error}\n  until then a seeded 50/20/30 split stands in: the numbers are")
            print("  NOT comparable with the field's")
            return _check(_seeded_split(dataset, folder, row.images, row.folder_names))
    return _present(_check(_read_split(dataset, row, folder)), row)


def _read_split(dataset, row, folder):
    """A `split_zhou_*.json`: {"train" | "val" | "test": [[path, label, class name], ...]}."""
    file = folder / row.split
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        lists = {
            part: [
                Item((Path(row.images) / path).as_posix(), int(label))
                for path, label, _ in content[part]
            ]
            for part in PARTS
        }
        names = {int(label): str(name) for part in PARTS for _, label, name in content[part]}
    except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError) as error:
        raise BadInput(
            f"{file} is not a split file (train, val and test lists of [path, label, class name]);"
            " delete it to have it fetched again"
        ) from error
    if sorted(names) != list(range(len(names))):
        raise BadInput(f"{file}: the labels must run from 0 without gaps, found {sorted(names)}")
    class_names = [_readable(names[label]) for label in range(len(names))]
    return Split(dataset, folder, "coop", class_names, **lists)


def _aircraft(dataset, row, folder):
    """FGVC Aircraft's official lists: variants.txt has the class names in the labels' order."""
    class_names = _lines(folder / "variants.txt")
    labels = {name: label for label, name in enumerate(class_names)}
    lists = {}
    for part in PARTS:
        file = folder / f"images_variant_{part}.txt"
        pairs = [line.split(" ", 1) for line in _lines(file)]  # image number, variant
        unknown = [pair for pair in pairs if pair[-1] not in labels]
        if unknown:
            raise BadInput(f"{file}: {' '.join(unknown[0])!r} names no variant of variants.txt")
        lists[part] = [Item(f"{row.images}/{number}.jpg", labels[name]) for number, name in pairs]
    return Split(dataset, folder, "coop", class_names, **lists)


def _imagenet(dataset, row, folder):
    """ImageNet and its test-only variants: a folder a class, named by synset (by line number in
    ImageNetV2), with names from classnames.txt, the variant's own or ImageNet's."""
    images = folder / row.images
    if not images.is_dir():
        raise BadInput(
            f"no images at {images}, and {dataset} cannot be fetched: put there {row.origin}"
        )
    file = folder / "classnames.txt"
    if not file.is_file():
        file = folder.parent / DATASETS["imagenet"].folder / "classnames.txt"
        if not file.is_file():
            _fetch_classnames(file)
    pairs = [line.split(" ", 1) for line in _lines(file)]  # synset, name
    if dataset == "imagenetv2":
        pairs = [(str(number), pair[-1]) for number, pair in enumerate(pairs)]
    names = {pair[0]: pair[-1] for pair in pairs}
    test = f"{row.images}/val" if dataset == "imagenet" else row.images
    classes = _class_folders(folder / test)
    classes.sort(key=int if dataset == "imagenetv2" and all(map(str.isdecimal, classes)) else None)
    unknown = [name for name in classes if name not in names]
    if unknown:
        raise BadInput(f"{file} has no name for the folder {folder / test / unknown[0]}")
    lists = {"train": [], "val": [], "test": _listed(folder, test, classes)}
    if dataset == "imagenet":
        # CoOp takes the file names of a class in the disk's order; sorted, the samples are ours.
        lists["train"] = _listed(folder, f"{row.images}/train", classes)
    return Split(dataset, folder, "coop", [names[name] for name in classes], **lists)


def _own_folder(dataset):
    """`<class>/*`, or `{train,val,test}/<class>/*` where val may be absent."""
    folder = Path(dataset)
    given = [part for part in PARTS if (folder / part).is_dir()]
    if not given:
        return _seeded_split(dataset, folder, "", {})
    if "train" not in given or "test" not in given:
        raise BadInput(f"{folder} has a folder {given[0]}/, and needs both train/ and test/ then")
    classes = sorted({*_class_folders(folder / "train"), *_class_folders(folder / "test")})
    lists = {part: _listed(folder, part, classes) for part in PARTS}
    return Split(dataset, folder, "folder", [_readable(name) for name in classes], **lists)


def _seeded_split(dataset, folder, images, folder_names):
    """A split of our own from one folder a class: 50% train, 20% val, 30% test of each.

    Seed 0 for each class, whatever --seed is, on sorted paths: the test images never change.
    folder_names: as in the table.
    """
    lists = {part: [] for part in PARTS}
    names = {name: folder_names.get(name, name) for name in _class_folders(folder / images)}
    classes = [name for name, readable in names.items() if readable is not None]
    for label, name in enumerate(classes):
        items = [item._replace(label=label) for item in _listed(folder, images, [name])]
        random.Random(0).shuffle(items)
        n_train, n_val = round(0.5 * len(items)), round(0.2 * len(items))
        lists["train"] += items[:n_train]
        lists["val"] += items[n_train : n_train + n_val]
        lists["test"] += items[n_train + n_val :]
    readable = [_readable(names[name]) for name in classes]
    return Split(dataset, folder, "seeded", readable, **lists)


def _class_folders(folder):
    """The names of the folders below `folder`, sorted; hidden ones are not classes."""
    if not folder.is_dir():
        return []
    return sorted(f.name for f in os.scandir(folder) if f.is_dir() and f.name[0] not in "._")


def _listed(folder, below, classes):
    """The image files of each class folder in `folder / below`, in sorted order."""
    return [
        Item(f"{below}/{name}/{file}".lstrip("/"), label)
        for label, name in enumerate(classes)
        if (folder / below / name).is_dir()
        for file in sorted(os.listdir(folder / below / name))
        if Path(file).suffix.lower() in IMAGE_SUFFIXES and not file.startswith(".")
    ]


def _readable(name):
    return " ".join(name.replace("_", " ").split())


def _lines(file):
    """The lines of a text file, without empty ones."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise BadInput(f"cannot read {file}: {error}") from error
    return [line.strip() for line in lines if line.strip()]


def _check(split):
    """The split; raises BadInput unless it has classes, with images in train and test each."""
    where = split.folder
    if not split.class_names:
        raise BadInput(f"no class folders in {where}: expected {where}/<class>/<image>")
    parts = [part for part in PARTS if getattr(split, part)]
    if not parts:
        raise BadInput(f"no images in {where}: expected {where}/<class>/<image>")
    twice = [name for name, n in Counter(split.class_names).items() if n > 1]
    if twice and split.source != "coop":  # ImageNet has a few names twice
        raise BadInput(f"two classes in {where} have one name, {twice[0]!r}")
    if len(split.class_names) == 1:
        raise BadInput(
            f"{where} has one class only, {split.class_names[0]!r}: nothing to tell apart"
        )
    test_only = parts == ["test"] and split.source == "coop"
    for part in ["test"] if test_only else ["train", "test"]:
        present = {item.label for item in getattr(split, part)}
        for label, name in enumerate(split.class_names):
            if label not in present:
                raise BadInput(f"{split.dataset}: the class {name!r} has no image in {part}")
    return split


def _present(split, row):
    """The split; raises BadInput if it names images that are not there."""
    everything = [*split.train, *split.val, *split.test]
    missing = [i.path for i in everything if not os.path.isfile(split.folder / i.path)]
    if missing:
        raise BadInput(
            f"{len(missing):,} of {len(everything):,} images of {split.dataset} are missing,"
            f" the first is {split.folder / missing[0]}"
        )
    if not split.complete:
        counts = len(split.train), len(split.val), len(split.test)
        print(f"{split.dataset} lists {counts} images, the field's split {row.counts}: the numbers")
        print("  are NOT comparable with the field's")
    return split


# ---------------------------------------------------------------------------------- fetching
# Whatever is fetched arrives under a temporary name, is checked, and is renamed last: what
# stands in the layout is whole.

FAILURES = (OSError, RuntimeError, EOFError, zipfile.BadZipFile, tarfile.TarError, zlib.error)


def _fetch_images(row, folder):
    """Fetches the archive; its image folder, and what lies beside that, go to `folder`."""
    target = folder / row.images
    if not row.archive:
        raise BadInput(f"no images at {target}, and they cannot be fetched: put there {row.origin}")
    url, md5 = row.archive
    print(f"{target} is not there: fetching {url}")
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".fetching-") as scratch:
            archive, files = Path(scratch, "archive" + _suffix(url)), Path(scratch, "files")
            download_url(url, scratch, archive.name, md5)
            extract_archive(archive, files)
            for inner in files.rglob("*.tar.gz"):  # Caltech 101 comes as archives in an archive
                extract_archive(inner, inner.parent)
            found = [p for p in files.rglob(row.images) if p.is_dir()]
            if not found:
                raise RuntimeError(f"the archive holds no folder {row.images}")
            images = min(found, key=lambda path: len(path.parts))
            for beside in images.parent.iterdir():
                if beside != images and not (folder / beside.name).exists():
                    beside.rename(folder / beside.name)
            images.rename(target)
    except (*FAILURES, gdown.exceptions.DownloadError) as error:
        for empty in made:
            with contextlib.suppress(OSError):
                empty.rmdir()
        raise BadInput(
            f"no images at {target}, and fetching {url} failed ({_first_line(error)}): unpack that"
            f" archive in {folder} by hand, or point --data at the folder that holds {row.folder}/"
        ) from error


def _fetch_file(drive_id, target, check):
    """Fetches one file from Google Drive. check: raises BadInput if the file at a path is not
    what it should be."""
    print(f"{target} is not there: fetching it from Google Drive")
    made = [path for path in target.parents if not path.exists()]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetching-") as scratch:
            download_file_from_google_drive(drive_id, scratch, target.name)
            check(Path(scratch, target.name))
            Path(scratch, target.name).rename(target)
    except (BadInput, *FAILURES, gdown.exceptions.DownloadError) as error:
        for empty in made:
            with contextlib.suppress(OSError):
                empty.rmdir()
        raise BadInput(
            f"no file {target}, and fetching it failed ({_first_line(error)}):"
            f" put https://drive.google.com/file/d/{drive_id} there by hand"
        ) from error


def _fetch_split(row, folder):
    def check(file):
        split = _read_split("", replace(row, split=file.relative_to(folder)), folder)
        counts = len(split.train), len(split.val), len(split.test)
        if counts != row.counts:
            raise BadInput(f"it lists {counts} images instead of {row.counts}")

    _fetch_file(row.drive_id, folder / row.split, check)


def _fetch_classnames(target):
    def check(file):
        if len(_lines(file)) != 1000:
            raise BadInput(f"it has {len(_lines(file))} lines instead of 1000")

    _fetch_file(DATASETS["imagenet"].drive_id, target, check)


def _suffix(url):
    """What an archive is, by its address; Google Drive's one archive is a zip file."""
    return next((end for end in (".tar.gz", ".tgz", ".zip") if url.endswith(end)), ".zip")


def _first_line(error):
    return str(error).split("\n")[0]


# -------------------------------------------------------------------------- samples, subsets


def few_shot(split, shots, seed):
    """The field's few-shot sample: `shots` training images a class, and at most 4 val images.

    CoOp's rule to the last image: seed once, then for each label in order of first appearance
    `random.sample`; train first, then val from the same stream. The draw depends on the lists'
    lengths, so it is made on the complete lists; cut to base or new classes afterwards.

    Returns the split with shorter `train` and `val`. A class with fewer images gives all.
    """
    rng = random.Random(seed)

    def sample(items, n):
        by_label = defaultdict(list)
        for item in items:
            by_label[item.label].append(item)
        drawn = [rng.sample(own, n) if len(own) >= n else own for own in by_label.values()]
        return [item for own in drawn for item in own]

    train, val = sample(split.train, shots), sample(split.val, min(shots, 4))
    counts = Counter(item.label for item in train)
    short = [split.class_names[label] for label, n in counts.items() if n < shots]
    if short:
        print(f"{len(short)} classes have fewer than {shots} images and give all ({short[0]} ...)")
    return replace(split, train=train, val=val)


def class_range(n, classes):
    """The labels of `all` n classes, the `base` half (the first ceil(n / 2)), or the `new` rest."""
    half = (n + 1) // 2
    return {"all": range(n), "base": range(half), "new": range(half, n)}[classes]


def select_classes(split, classes):
    """The split with the images and names of `all`, `base` or `new` classes, labels from 0."""
    labels = class_range(len(split.class_names), classes)

    def keep(items):
        return [Item(i.path, i.label - labels.start) for i in items if i.label in labels]

    names = [split.class_names[label] for label in labels]
    lists = {part: keep(getattr(split, part)) for part in PARTS}
    return replace(split, class_names=names, **lists)


def open_image(split, path):
    """The RGB image at `path` of the dataset. Raises BadInput if it cannot be read."""
    if split.folder is None:
        return shapes.draw_path(split.dataset, path)
    try:
        with Image.open(split.folder / path) as image:
            if split.source != "coop":  # the field leaves photos as the camera held them
                image = ImageOps.exif_transpose(image)
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise BadInput(f"cannot read the image {split.folder / path}: {error}") from error
