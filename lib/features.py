"""Image features: preprocessing, views, the frozen image encoder, and the cache on disk.

CLIP's image encoder is frozen, so an image's feature never changes. Each image is encoded once, a
training image once per *view* (an augmented crop), and the features are kept on disk for
later runs with any seed, method or number of shots. Threads load one batch ahead of the encoder:
Pillow and torch release the GIL while they work.

Each dataset has a folder in the cache, with one folder per CLIP and way of encoding. These contain
*shards*: files of keys and rows. A shard is written under a temporary name, then renamed, and
never changes afterwards, so several runs can share the cache. At worst, two encode the same image.
Files are never deleted: they may be another program's.

An image's key identifies its content: its path below the dataset's folder, its size and a digest of
its first bytes. So a dataset and its cache can be copied to another disk. Two of your own folders
may have the same name, and scans in them the same size and white margin, so there the modification
time is part of the key. A folder that was moved, or copied with its times, is still found.
"""

import contextlib
import functools
import hashlib
import itertools
import math
import os
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import numpy as np
import PIL
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

from lib import parallel, start, world
from lib.clip_model import MEAN, STD
from lib.errors import BadInput, say
from lib.fast_clip import encode_images
from lib.files import replacing
from lib.photos import open_photo

CACHE = Path(os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache"), "mocoop")
ENCODING = 2  # part of every cache key: raise it with any change to how features are computed
BATCH = {"cpu": 32, "cuda": 256}  # images in one pass of the encoder
SAVE_EVERY = 30  # seconds; checked after each batch, so features are saved once a minute at least
DIGESTED = 2**16  # bytes hashed at the beginning of an image file

# ------------------------------------------------------------------------------- preprocessing


def preprocess(image, size, rng=None):
    """PIL -> uint8 (3, size, size). CLIP's own: the short side to `size` pixels, centre crop.

    rng: a `torch.Generator` for CoOp's training augmentation instead: a random resized crop (8 to
    100% of the area), flipped half the time. It samples like torchvision's `RandomResizedCrop` and
    `RandomHorizontalFlip`, which only use the global generator, shared by all threads.
    """
    import torchvision.transforms.functional as TF  # here: --help need not wait a second for it

    bicubic = TF.InterpolationMode.BICUBIC
    short, long = sorted(image.size)
    if rng is None and long > 8 * short:
        # The same without the whole resized image: gigabytes if it is a single row of pixels.
        resized = size * long // short
        ends = [(round((resized - size) / 2) + x) * long / resized for x in (0, size)]
        left, right = ends if image.width == long else (0, short)
        top, bottom = ends if image.height == long else (0, short)
        image = image.resize((size, size), Image.BICUBIC, (left, top, right, bottom))
    elif rng is None:
        image = TF.center_crop(TF.resize(image, size, bicubic), [size, size])
    else:
        image = TF.resized_crop(image, *_crop(*image.size, rng), [size, size], bicubic)
        if torch.rand(1, generator=rng) < 0.5:
            image = TF.hflip(image)
    return TF.pil_to_tensor(image)


def _crop(width, height, rng, ratios=(3 / 4, 4 / 3)):
    """A random crop of an image of this size: (top, left, height, width) in pixels."""
    low, high = torch.log(torch.tensor(ratios))
    for _ in range(10):
        area = width * height * torch.empty(1).uniform_(0.08, 1.0, generator=rng).item()
        ratio = torch.exp(torch.empty(1).uniform_(low, high, generator=rng)).item()
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            top = torch.randint(height - h + 1, (1,), generator=rng).item()
            left = torch.randint(width - w + 1, (1,), generator=rng).item()
            return top, left, h, w
    # A very long image: the largest central crop that has one of the ratios.
    w = min(width, round(height * ratios[1]))
    h = min(height, round(width / ratios[0]))
    return (height - h) // 2, (width - w) // 2, h, w


def as_clip_reads(images, device):
    """A list of uint8 (3, H, W) as one normalised batch (B, 3, H, W). Not for the loading
    threads: torch's arithmetic would start as many threads again in each of them."""
    batch = torch.stack(images).to(device).float() / 255
    mean, std = (torch.tensor(x, device=device).view(3, 1, 1) for x in (MEAN, STD))
    return (batch - mean) / std


def load_image(split, path, view, size):
    """An image of a split, preprocessed: uint8 (3, size, size).

    view: None for the test transform, else the number of the view. Only the path and this number
    seed its crop, so that runs of all seeds and methods share it.
    """
    rng = None
    if view is not None:
        seed = hashlib.sha256(os.fsencode(f"{path}|{view}")).digest()[:8]
        rng = torch.Generator().manual_seed(int.from_bytes(seed, "little"))
    return preprocess(split.open(path), size, rng)


@functools.cache
def _threads():
    """One pool for the whole run."""
    return ThreadPoolExecutor(start.n_threads())


def _images_ahead(split, batches, size):
    """Yields a list of images, see `load_image`, for each batch of (path, view), while threads load
    the next batch. Raises BadInput for unreadable images."""
    load = functools.partial(load_image, split, size=size)
    if split.folder is None:  # drawn in pure Python: threads would only delay it
        yield from ([load(*image) for image in batch] for batch in batches)
        return
    loading = ([_threads().submit(load, *image) for image in batch] for batch in [*batches, []])
    with all_unreadable(split):
        for batch, _ in itertools.pairwise(loading):  # the next one has been submitted, too
            yield [future.result() for future in batch]


@contextlib.contextmanager
def all_unreadable(split):
    """If an image cannot be read, the error names all unreadable images of the split at once."""

    def complaint(path):
        try:
            split.open(path)
        except BadInput as error:
            return str(error)

    try:
        yield
    except BadInput as error:
        paths = dict.fromkeys(i.path for part in (split.train, split.val, split.test) for i in part)
        complaints = filter(None, _threads().map(complaint, paths))
        raise BadInput("\n".join(complaints) or str(error)) from error


# ----------------------------------------------------------------------------------- the cache


def _hashed(text):
    """A hash of a text, 16 bytes."""
    return hashlib.blake2b(os.fsencode(text), digest_size=16).digest()


def _content_names(split, paths, with_times=True):
    """{path: a string of everything that its pixels, drawn or read from a file, depend on}.

    Raises BadInput for an unreadable file.
    """
    if split.folder is None:
        return {path: f"{split.dataset}/{path}|{world.SOURCE_HASH}" for path in paths}
    is_coop = split.source == "coop"  # CoOp reads images in its own way, see `Split.open`

    def name(path):
        file = split.folder / path
        try:
            with open(file, "rb") as content:
                digest = hashlib.blake2b(content.read(DIGESTED), digest_size=16).hexdigest()
            stat = file.stat()
        except OSError as error:
            raise BadInput(f"cannot read the image {file}: {error.strerror}") from error
        content_name = f"{path}|{is_coop}|{stat.st_size}|{digest}"
        if is_coop or not with_times:
            return content_name
        return f"{content_name}|{stat.st_mtime_ns}|2"  # 2: raise it if `upright_rgb` changes

    with all_unreadable(split):
        return dict(zip(paths, _threads().map(name, paths)))


def content_of(split):
    """What the images are that a split learns from: [path, label, content], wherever they lie."""
    items = [*split.train, *split.val]
    names = _content_names(split, [item.path for item in items], with_times=False)
    return [[*item, names[item.path]] for item in items]


def _are_features(rows):
    """(N, D + 1) -> (N,): which rows are a unit vector and its former norm, see `_encode_batch`."""
    norm = rows[:, -1]
    is_unit = (rows[:, :-1].norm(dim=1) - 1).abs() < 1e-3
    return is_unit & (norm > 0) & (norm < torch.inf)  # False for NaN


def _load_rows(folder, keys, width):
    """The rows of those `keys` that are cached: {key: (width,) float32}.

    A file that is no shard of this CLIP's features, damaged or another program's, is left alone.
    """
    rows = {}
    shards = folder.glob("*.npz") if os.access(folder, os.R_OK | os.X_OK) else []
    for shard in sorted(filter(os.path.isfile, shards)):  # opening a named pipe would block
        try:
            with np.load(shard, allow_pickle=False) as file:  # the zip format has checksums
                shard_keys = file["keys"].view("V16").ravel().tolist()  # 16 bytes each
                if keys.isdisjoint(shard_keys):
                    continue
                found = file["rows"]
            if (
                found.dtype != np.float32
                or found.shape != (len(shard_keys), width)
                or not _are_features(torch.from_numpy(found)).all()
            ):
                # One bad row is enough: nothing vouches for the others then.
                raise ValueError("not features of this CLIP")
            rows.update((k, r) for k, r in zip(shard_keys, found) if k in keys)
        except Exception as error:  # damaged bytes may raise anything, a lack of memory included
            say(f"the cache file {shard} is left out: {error!r}")
    return rows


def _save_rows(folder, rows):
    """Writes one new shard. A cache that cannot be written costs time, but does not end the run."""
    try:
        keys = np.frombuffer(b"".join(rows), np.uint8).reshape(-1, 16)
        shard = folder / f"{_hashed(repr(list(rows))).hex()}.npz"
        with replacing(shard) as scratch, open(scratch, "wb") as file:
            np.savez(file, keys=keys, rows=np.stack(list(rows.values())))
    except (BadInput, OSError) as error:
        say(f"features are not cached: {error}")


# ------------------------------------------------------------------------------------ features


def image_features(
    clip_model, fingerprint, split, items, n_views=None, what="images", cached=True, raw=False
):
    """CLIP's features of images, L2-normalised, each encoded once and then read from the cache.

    clip_model, fingerprint: from `load_clip`. split: opens and names the images. items: from its
    lists. n_views: None for the test transform, else how many augmented views per image.
    what: what to call the images in the line that counts features from the cache.
    cached: False for an encoder that has been trained since its fingerprint was computed.
    raw: do not normalise the features; the linear probe expects CLIP's own length.
    Returns (N, D), or (N, views, D), on the model's device.
    Raises BadInput for an image that cannot be read, and for features that are not finite.
    """
    device, width = clip_model.logit_scale.device, clip_model.text_projection.shape[1]
    if not items:
        return torch.zeros(0, width, device=device)
    # The cache distinguishes everything a feature depends on: the folder's name stands for the
    # weights and the way of encoding, a row's key for the image and the view.
    how = [ENCODING, fingerprint, device.type, PIL.__version__, version("torchvision")]
    folder = CACHE / split.name / _hashed("|".join(map(str, how))).hex()
    views = range(n_views) if n_views else [None]
    names = _content_names(split, list(dict.fromkeys(item.path for item in items)))
    images = [(item.path, view) for item in items for view in views]
    keys = [_hashed(f"{names[path]}|{view}") for path, view in images]
    wanted = dict(zip(keys, images))

    # The first process reads and writes the cache; all of them encode.
    uses_cache = cached and parallel.rank() == 0
    rows = _load_rows(folder, wanted.keys(), width + 1) if uses_cache else {}
    rows = parallel.gather(rows)[0]
    todo = {key: image for key, image in wanted.items() if key not in rows}
    say(
        f"{what}: {len(items):,}"
        + (f" x {len(views)} views" if len(views) > 1 else "")
        + f", {len(wanted) - len(todo):,} features from the cache, {len(todo):,} to encode"
    )
    for shard in _encode(clip_model, split, todo):
        rows |= shard
        if uses_cache:
            _save_rows(folder, shard)
    stored = torch.from_numpy(np.stack([rows[key] for key in keys])).to(device)
    features, norms = stored.split([width, 1], dim=1)
    features = features * norms if raw else features.contiguous()
    return features if n_views is None else features.view(len(items), n_views, width)


def _encode(clip_model, split, todo):
    """Encodes images. Yields shards of their features, {key: a row of `_encode_batch`}.

    todo: {key: (path, view)}. Under torchrun, every process encodes a batch of its own in each step
    and gets the rows of all. So the first one, which saves them, decides alone when a shard ends.
    """
    rank, n_processes = parallel.rank(), parallel.world()
    keys, step = list(todo), BATCH[clip_model.logit_scale.device.type] * n_processes
    batches = [keys[i : i + step][rank::n_processes] for i in range(0, len(keys), step)]
    images = [[todo[key] for key in batch] for batch in batches]
    loaded = _images_ahead(split, images, clip_model.visual.input_resolution)
    shard, started = {}, time.monotonic()
    with tqdm(total=len(todo), unit=" images", leave=False, disable=rank > 0 or None) as bar:
        for batch, pixels in zip(batches, loaded):
            rows = _encode_batch(clip_model, pixels)
            good = _are_features(rows)
            if not good.all():
                path, _ = todo[batch[good.int().argmin()]]
                raise BadInput(
                    f"CLIP's features of {(split.folder or split.name)}/{path} are not finite"
                    " numbers: are these weights damaged?"
                )
            for part in parallel.gather(dict(zip(batch, rows.cpu().numpy()))):
                shard |= part
                bar.update(len(part))
            if time.monotonic() - started > SAVE_EVERY:
                yield shard
                shard, started = {}, time.monotonic()
    if shard:
        yield shard


@torch.no_grad()
def _encode_batch(clip_model, images):
    """A list of B images, uint8 (3, size, size) -> (B, D + 1): features as unit vectors, and their
    norms before scaling.

    Every batch is padded with black images to the same size: with equal shapes, an image's result
    does not depend on the others in its batch, so what was cached before a run changes its features
    by rounding at most.
    """
    device, size = clip_model.logit_scale.device, clip_model.visual.input_resolution
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    black = torch.zeros(3, size, size, dtype=torch.uint8)
    padding = [black] * (BATCH[device.type] - len(images))
    pixels = as_clip_reads(images + padding, device)
    features = encode_images(clip_model, pixels, dtype)[: len(images)]
    norms = features.norm(dim=-1, keepdim=True)
    return torch.cat([F.normalize(features, dim=-1), norms], dim=1)


@torch.no_grad()
def photo_features(clip_model, images, raw=False):
    """Features (N, D) of images that belong to no dataset, encoded one by one. images: one or
    several, see `open_photo`; features are returned as they are. raw: do not normalise. Raises
    BadInput for features of another kind."""
    if torch.is_tensor(images):
        rows = images.dtype == torch.float32 and images.dim() == 2
        if rows and (raw or ((images.norm(dim=1) - 1).abs() < 1e-3).all()):
            return images
        raise BadInput("features should be as photo_features returns them: float32 (N, D)")
    if isinstance(images, (str, np.ndarray)) or not hasattr(images, "__iter__"):
        images = [images]
    device, size = clip_model.logit_scale.device, clip_model.visual.input_resolution
    features = []
    for image in images:
        pixels = as_clip_reads([preprocess(open_photo(image), size)], device)
        features.append(encode_images(clip_model, pixels, torch.float32))
    if not features:
        raise BadInput("there is no image to look at")
    return torch.cat(features) if raw else F.normalize(torch.cat(features), dim=-1)


# ----------------------------------------------------------------------------- while training


def training_features(clip_model, fingerprint, split, n_views, live):
    """The training images of a split, for the training loop: `CachedImages`, or `LiveImages` if
    `live`, for an image encoder that is trained.

    n_views: stored crops per image. Drawn images are never cropped.
    """
    if live:
        print("the image encoder learns, too: images are encoded in every step")
        return LiveImages(clip_model, split)
    n_views = None if split.folder is None else n_views
    what = "training images"
    return CachedImages(image_features(clip_model, fingerprint, split, split.train, n_views, what))


class CachedImages:
    """Images encoded beforehand, all views of each."""

    def __init__(self, features):
        """features: (N, views, D), or (N, D) for images with one view."""
        self.features = features if features.dim() == 3 else features[:, None]
        self.n_views = self.features.shape[1]

    def batches(self, batches, views, epoch):
        """Yields the features (B, D) of each batch in turn. batches: indices of images, (B,) each.
        views: (N,), the view to use of each image."""
        # One transfer to the device per epoch, so that a GPU does not wait for batches.
        order, device = torch.cat(batches), self.features.device
        features = self.features[order.to(device), views[order].to(device)]
        yield from features.split([len(batch) for batch in batches])


class LiveImages:
    """Images encoded in every step, cropped anew in every epoch."""

    n_views = 1

    def __init__(self, clip_model, split):
        self.clip_model, self.split = clip_model, split
        self.dtype = parallel.mixed_dtype(clip_model.logit_scale.device)

    def batches(self, batches, views, epoch):
        """As `CachedImages.batches`. The epoch is the number of the view."""
        for pixels in pixel_batches(self.clip_model, self.split, "train", batches, epoch):
            yield self.encode(pixels)

    def encode(self, pixels):
        return F.normalize(encode_images(self.clip_model, pixels, self.dtype), dim=-1)


def pixel_batches(clip_model, split, part, batches, view=None):
    """Yields the images (B, 3, H, W) of each batch, as CLIP reads them. part: `train`, `val` or
    `test`. batches: indices of its images. view: the number of a random crop; None, and for drawn
    images, the test transform."""
    view = None if split.folder is None else view
    paths = [[(getattr(split, part)[i].path, view) for i in batch.tolist()] for batch in batches]
    for loaded in _images_ahead(split, paths, clip_model.visual.input_resolution):
        yield as_clip_reads(loaded, clip_model.logit_scale.device)


# ---------------------------------------------------------------- learning in the image encoder

N_PROMPTS = 4


def learnable_part(clip_model, side):
    """The part of the image encoder that `--image-side` trains, as a module; None for `frozen`. The
    encoder uses it only after `attach`.

    side: `layer-norms`, those of the blocks, as in MoCoOp's and LASP's published runs; or
    `prompts`: N_PROMPTS tokens added to an image's patches before the first block (shallow
    visual prompt tuning, arXiv 2203.12119). Raises BadInput for a ResNet, which has neither.
    """
    if side == "frozen":
        return None
    visual = clip_model.visual
    if not hasattr(visual, "transformer"):
        raise BadInput(f"--image-side {side} needs a CLIP with a ViT: this one has none")
    if side == "prompts":
        width = visual.class_embedding.shape[0]
        return nn.ParameterList([nn.Parameter(0.02 * torch.randn(N_PROMPTS, width))])
    norms = [norm for block in visual.transformer.resblocks for norm in (block.ln_1, block.ln_2)]
    return nn.ModuleList(norms).requires_grad_(True)


def attach(clip_model, part):
    """Makes the image encoder use a `learnable_part`. LayerNorms are part of it from the start."""
    if isinstance(part, nn.ParameterList):
        clip_model.visual.prompts = part[0]
