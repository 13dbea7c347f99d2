"""Datasets: splits, few-shot samples, transforms, and image features encoded once.

A dataset is a row of DATASETS and a folder in the layout of CoOp's DATASETS.md, so the field's
own data folder works as it is:

    data/eurosat/2750/AnnualCrop/AnnualCrop_1.jpg
    data/eurosat/split_zhou_EuroSAT.json

What is absent is fetched into that same layout. The embedded world (`shapes`, see shapes.py) is a
dataset like the others, only that its images are drawn instead of read.

From top to bottom: the table, loading a split, fetching, few-shot samples, base and new classes,
transforms, the feature cache.
"""

import contextlib
import hashlib
import json
import os
import random
import tempfile
import zipfile
from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import gdown
import numpy as np
import PIL
import torch
import torchvision
import torchvision.transforms as T
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.datasets.utils import (
    download_file_from_google_drive,
    download_url,
    extract_archive,
)
from tqdm import tqdm

import shapes
from backbone import MEAN, STD, BadInput, nearest

# ---------------------------------------------------------------------------------- the table
# folder: below the root. images: below the folder. split: the field's fixed split file, its
# Google Drive id, its number of train, val and test images. archive: torchvision's URL and MD5.
# class_names: readable names of the image folders, for the case that the split cannot be had.

DATASETS = {
    "eurosat": {
        "folder": "eurosat",
        "images": "2750",
        "split": "split_zhou_EuroSAT.json",
        "drive_id": "1Ip7yaCWFi0eaOFUGga0lUdVi_DDQth1o",
        "counts": (13500, 5400, 8100),
        "archive": (
            "https://huggingface.co/datasets/torchgeo/eurosat/resolve/"
            "c877bcd43f099cd0196738f714544e355477f3fd/EuroSAT.zip",
            "c8fa014336c82ac7804f0398fcb19387",
        ),
        "class_names": {
            "AnnualCrop": "Annual Crop Land",
            "Forest": "Forest",
            "HerbaceousVegetation": "Herbaceous Vegetation Land",
            "Highway": "Highway or Road",
            "Industrial": "Industrial Buildings",
            "Pasture": "Pasture Land",
            "PermanentCrop": "Permanent Crop Land",
            "Residential": "Residential Buildings",
            "River": "River",
            "SeaLake": "Sea or Lake",
        },
    },
}


class Item(NamedTuple):
    """One image: its path below the dataset's folder and its label."""

    path: str
    label: int


@dataclass(frozen=True)
class Split:
    """A dataset, or a part of one: three lists of items, labels counting from 0."""

    dataset: str
    folder: Path | None  # None: the images are drawn
    source: str  # `coop`, `seeded` or `shapes`: where the split comes from
    class_names: list[str]  # by label
    train: list[Item]
    val: list[Item]
    test: list[Item]


# -------------------------------------------------------------------------------- the splits


def load_split(dataset, root):
    """The complete train, val and test lists of a dataset below `root`, fetched if absent.

    Raises BadInput for an unknown dataset, files that are missing and cannot be fetched, a split
    file that is not one, and a split that names images that are not there.
    """
    if dataset in shapes.DATASETS:
        lists = {
            name: [Item(path, label) for path, label in items]
            for name, items in shapes.split(dataset).items()
        }
        return Split(dataset, None, "shapes", shapes.DOWNSTREAM, **lists)
    if dataset not in DATASETS:
        known = [*shapes.DATASETS, *DATASETS]
        raise BadInput(
            f"unknown dataset {dataset!r}{nearest(dataset, known)}; there are {', '.join(known)}"
        )
    row = DATASETS[dataset]
    folder = Path(root) / row["folder"]
    if not (folder / row["images"]).is_dir():
        _fetch_images(row, folder)
    if not (folder / row["split"]).is_file():
        try:
            _fetch_split(row, folder)
        except BadInput as error:
            print(f"{error}\n  until then a seeded 50/20/30 split stands in: the numbers are")
            print("  NOT comparable with the field's")
            return _check(_seeded_split(dataset, row, folder))
    return _check(_read_split(dataset, row, folder))


def _read_split(dataset, row, folder):
    """A `split_zhou_*.json`: {"train" | "val" | "test": [[path, label, class name], ...]}."""
    file = folder / row["split"]
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        lists = {
            name: [Item(f"{row['images']}/{path}", int(label)) for path, label, _ in content[name]]
            for name in ("train", "val", "test")
        }
        names = {int(label): str(name) for part in lists for _, label, name in content[part]}
    except (ValueError, KeyError, TypeError) as error:
        raise BadInput(
            f"{file} is not a split file (train, val and test lists of [path, label, class name]);"
            " delete it to have it fetched again"
        ) from error
    if sorted(names) != list(range(len(names))):
        raise BadInput(f"{file}: the labels must run from 0 without gaps, found {sorted(names)}")
    class_names = [names[label].replace("_", " ") for label in range(len(names))]
    return Split(dataset, folder, "coop", class_names, **lists)


def _seeded_split(dataset, row, folder):
    """A split of our own from one folder a class: 50% train, 20% val, 30% test of each.

    Always seed 0, whatever --seed is, on sorted paths: every run has the same test images.
    """
    rng, lists, class_names = random.Random(0), {"train": [], "val": [], "test": []}, []
    images = folder / row["images"]
    for label, directory in enumerate(sorted(d for d in images.iterdir() if d.is_dir())):
        class_names.append(row["class_names"].get(directory.name, directory.name))
        paths = sorted(p.relative_to(folder).as_posix() for p in directory.iterdir())
        rng.shuffle(paths)
        first, second = round(0.5 * len(paths)), round(0.5 * len(paths)) + round(0.2 * len(paths))
        parts = {"train": paths[:first], "val": paths[first:second], "test": paths[second:]}
        for name, part in parts.items():
            lists[name] += [Item(path, label) for path in part]
    return Split(dataset, folder, "seeded", class_names, **lists)


def _check(split):
    """The split; raises BadInput if an image is absent or a class has none in train or test."""
    for part in ("train", "test"):
        present = {item.label for item in getattr(split, part)}
        for label, name in enumerate(split.class_names):
            if label not in present:
                raise BadInput(f"{split.dataset}: the class {name!r} has no image in {part}")
    everything = [*split.train, *split.val, *split.test]
    missing = [i.path for i in everything if not os.path.isfile(split.folder / i.path)]
    if missing:
        raise BadInput(
            f"{len(missing):,} of {len(everything):,} images of {split.dataset} are missing,"
            f" the first is {split.folder / missing[0]}"
        )
    return split


# ---------------------------------------------------------------------------------- fetching
# Whatever is fetched arrives under a temporary name, is checked, and is renamed last: what
# stands in the layout is whole.


def _fetch_images(row, folder):
    (url, md5), target = row["archive"], folder / row["images"]
    print(f"{target} is not there: fetching {url}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".fetching-") as scratch:
            download_url(url, scratch, Path(url).name, md5)
            extract_archive(f"{scratch}/{Path(url).name}", f"{scratch}/files")
            Path(scratch, "files", row["images"]).rename(target)
    except (OSError, RuntimeError, zipfile.BadZipFile) as error:
        for empty in (folder, folder.parent):
            with contextlib.suppress(OSError):
                empty.rmdir()  # refuses where there is anything
        raise BadInput(
            f"no images at {target}, and fetching {url} failed ({error}): unpack that archive in"
            f" {folder} by hand, or point --data at the folder that holds {row['folder']}/"
        ) from error


def _fetch_split(row, folder):
    target = folder / row["split"]
    print(f"{target} is not there: fetching it from Google Drive")
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix=".fetching-") as scratch:
            download_file_from_google_drive(row["drive_id"], scratch, row["split"])
            split = _read_split("", row | {"split": f"{Path(scratch).name}/{row['split']}"}, folder)
            counts = len(split.train), len(split.val), len(split.test)
            if counts != row["counts"]:
                raise BadInput(f"it lists {counts} images instead of {row['counts']}")
            Path(scratch, row["split"]).rename(target)
    except (BadInput, OSError, RuntimeError, gdown.exceptions.DownloadError) as error:
        raise BadInput(
            f"no split at {target}, and fetching it failed ({str(error).splitlines()[0]}):"
            f" put https://drive.google.com/file/d/{row['drive_id']} there by hand"
        ) from error


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


def select_classes(split, classes):
    """`all` classes, the `base` half (the first ceil(n / 2) labels) or the `new` rest.

    Returns the split with the images and names of those classes, relabelled from 0.
    """
    n = len(split.class_names)
    half = (n + 1) // 2
    labels = {"all": range(n), "base": range(half), "new": range(half, n)}[classes]

    def keep(items):
        return [Item(i.path, i.label - labels.start) for i in items if i.label in labels]

    names = [split.class_names[label] for label in labels]
    lists = {part: keep(getattr(split, part)) for part in ("train", "val", "test")}
    return replace(split, class_names=names, **lists)


# -------------------------------------------------------------------------------- transforms

BICUBIC = T.InterpolationMode.BICUBIC


def test_transform(size):
    """CLIP's: the short side to `size` pixels, centre crop, normalised."""
    return T.Compose(
        [T.Resize(size, BICUBIC), T.CenterCrop(size), T.ToTensor(), T.Normalize(MEAN, STD)]
    )


def train_transform(size):
    """CoOp's: random resized crop and horizontal flip."""
    crop = T.RandomResizedCrop(size, scale=(0.08, 1.0), interpolation=BICUBIC)
    return T.Compose([crop, T.RandomHorizontalFlip(), T.ToTensor(), T.Normalize(MEAN, STD)])


def open_image(split, path):
    """The RGB image at `path` of the dataset. Raises BadInput if it cannot be read."""
    if split.folder is None:
        return shapes.draw_path(split.dataset, path)
    try:
        with Image.open(split.folder / path) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise BadInput(f"cannot read the image {split.folder / path}: {error}") from error


class _Views(torch.utils.data.Dataset):
    """Preprocessed images; view v of an image is random, but seeded by its path and v alone, so
    that every seed and method meets the same views."""

    def __init__(self, split, transform, wanted):
        self.split, self.transform, self.wanted = split, transform, wanted

    def __len__(self):
        return len(self.wanted)

    def __getitem__(self, i):
        path, view = self.wanted[i]
        seed = hashlib.sha256(f"{path}|{view}".encode()).digest()
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(int.from_bytes(seed[:8], "little"))
                return self.transform(open_image(self.split, path))
        except BadInput as error:  # returned, as a worker process would garble a raised one
            return error


# --------------------------------------------------------------------------------- the cache
# CLIP is frozen, so an image is encoded once in its life. The cache is a folder of shards, files
# with some keys and their feature rows. A shard is written whole under a temporary name and then
# never changes, so runs can share the cache at the same time; at worst both encode an image.

CACHE = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "mocoop"
BATCH = 128  # images in one pass of the encoder
SHARD = 4096  # rows; what is encoded is safe on disk at least this often


def image_features(model, fingerprint, split, items, views=None, what="images"):
    """CLIP's features of images, L2-normalised, each encoded once and then taken from the cache.

    model, fingerprint: from `load_clip`. items: from the split's lists. views: None for the test
    transform, else the number of augmented views of each image (drawn images have one, as drawn).
    Returns (N, D), or (N, views, D), on the model's device. Prints what came from the cache.
    Raises BadInput for an image that cannot be read.
    """
    device, size = model.logit_scale.device, model.visual.input_resolution
    drawn = split.folder is None
    transform = train_transform(size) if views and not drawn else test_transform(size)
    views_made = 1 if drawn or not views else views
    wanted = [(item.path, view) for item in items for view in range(views_made)]

    # Everything that a feature depends on: the folder's name has the weights and the preprocessing,
    # a row's key has the image and the view.
    how = [fingerprint, str(transform), device.type, PIL.__version__, torchvision.__version__]
    folder = CACHE / split.dataset / hashlib.sha256("|".join(how).encode()).hexdigest()[:16]
    keys = [
        hashlib.blake2b(f"{_identity(split, path)}|{view}".encode(), digest_size=16).digest()
        for path, view in wanted
    ]
    rows = _load_rows(folder, set(keys))
    todo = {key: entry for key, entry in zip(keys, wanted) if key not in rows}
    print(
        f"{what}: {len(items):,}"
        + (f" x {views_made} views" if views_made > 1 else "")
        + f", {len(keys) - len(todo):,} features from the cache, {len(todo):,} to encode"
    )
    loader = DataLoader(
        _Views(split, transform, list(todo.values())),
        batch_size=BATCH,
        num_workers=0 if device.type == "cpu" else os.cpu_count(),
        collate_fn=list,
    )
    new, todo_keys = [], list(todo)
    for images in tqdm(loader, "encoding", leave=False, disable=None if todo else True):
        for image in images:
            if isinstance(image, BadInput):
                raise image
        with torch.no_grad(), torch.autocast("cuda", torch.float16, enabled=device.type == "cuda"):
            features = model.encode_image(torch.stack(images).to(device)).float()
        new.extend(torch.nn.functional.normalize(features, dim=-1).cpu().numpy())
        if len(new) >= SHARD or len(new) == len(todo_keys):
            rows.update(zip(todo_keys, new))
            _save_rows(folder, todo_keys[: len(new)], new)
            new, todo_keys = [], todo_keys[len(new) :]
    features = torch.from_numpy(np.stack([rows[key] for key in keys])).to(device)
    return features if views is None else features.view(len(items), views_made, -1)


def _identity(split, path):
    """What tells an image from its changed self: size and time of its file, or how it is drawn."""
    if split.folder is None:
        return f"{path}|{shapes.SOURCE_HASH}"
    stat = os.stat(split.folder / path)
    return f"{path}|{stat.st_size}|{stat.st_mtime_ns}"


def _load_rows(folder, keys):
    """The cached rows of `keys`, as far as there are any: {key: (D,) float32}."""
    rows = {}
    for shard in sorted(folder.glob("*.npz")):
        try:
            with np.load(shard) as file:  # the zip format brings checksums
                shard_keys = [key.tobytes() for key in file["keys"]]
                if not keys.isdisjoint(shard_keys):
                    rows.update((k, r) for k, r in zip(shard_keys, file["rows"]) if k in keys)
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            print(f"the cache file {shard} is damaged: encoding its images again")
            shard.unlink(missing_ok=True)
    return rows


def _save_rows(folder, keys, rows):
    """One new shard. A cache that cannot be written costs time, not the run."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, suffix=".tmp", delete=False) as file:
            np.savez(
                file,
                keys=np.frombuffer(b"".join(keys), np.uint8).reshape(-1, 16),
                rows=np.stack(rows).astype(np.float32),
            )
        os.replace(file.name, Path(file.name).with_suffix(".npz"))
    except OSError as error:
        print(f"features are not cached: {error}")
