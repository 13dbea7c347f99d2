"""Images on their way to features: preprocessing, views, threads, and the frozen image encoder.

Decoding and preprocessing happen in threads, one batch ahead of the encoder: Pillow and torch let
go of the interpreter while they work. CLIP's image encoder is frozen, so the feature of an image
never changes: test images are encoded once, training images once per *view* (an augmented crop),
and lib/cache.py keeps them for every later run with another seed, method or number of shots.
"""

import functools
import hashlib
import math
import os
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version

import numpy as np
import PIL
import torch
import torch.nn.functional as F
from tqdm import tqdm

from lib import cache, processes
from lib.clip_model import MEAN, STD
from lib.errors import BadInput
from lib.image_encoder import encode_images
from lib.readers import upright_rgb

ENCODING = 2  # part of every cache key: raise it with any change to the numbers below
BATCH = {"cpu": 32, "cuda": 256}  # images in one pass of the encoder
SHARD = 4096  # rows; what is encoded is safe on disk at least this often

# ------------------------------------------------------------------------------- preprocessing


def preprocess(image, size):
    """CLIP's own: the short side to `size` pixels, centre crop. PIL -> uint8 (3, size, size)."""
    import torchvision.transforms.functional as TF  # here: --help need not wait a second for it

    image = TF.resize(image, size, TF.InterpolationMode.BICUBIC)
    return TF.pil_to_tensor(TF.center_crop(image, [size, size]))


def preprocess_view(image, size, seed):
    """CoOp's for training: a random resized crop (8 to 100% of the area), flipped half the time.

    seed: an int; the same arguments give the same view. The draws are those of torchvision's
    `RandomResizedCrop` and `RandomHorizontalFlip`, from a generator of the view's own instead of
    the one that all threads share. PIL -> uint8 (3, size, size).
    """
    import torchvision.transforms.functional as TF

    rng = torch.Generator().manual_seed(seed)
    bicubic = TF.InterpolationMode.BICUBIC
    image = TF.resized_crop(image, *_crop(*image.size, rng), [size, size], bicubic)
    return TF.pil_to_tensor(TF.hflip(image) if torch.rand(1, generator=rng) < 0.5 else image)


def as_clip_reads(images, device):
    """A list of uint8 (3, H, W) as one normalised batch (B, 3, H, W). Not in the threads: torch's
    own arithmetic would start as many threads again in each of them."""
    batch = torch.stack(images).to(device).float() / 255
    mean, std = (torch.tensor(x, device=device).view(3, 1, 1) for x in (MEAN, STD))
    return (batch - mean) / std


def _crop(width, height, rng, ratios=(3 / 4, 4 / 3)):
    """A random part of an image of that size: (top, left, height, width) in pixels."""
    low, high = torch.log(torch.tensor(ratios))
    for _ in range(10):
        area = width * height * torch.empty(1).uniform_(0.08, 1.0, generator=rng).item()
        ratio = torch.exp(torch.empty(1).uniform_(low, high, generator=rng)).item()
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            top = torch.randint(height - h + 1, (1,), generator=rng).item()
            left = torch.randint(width - w + 1, (1,), generator=rng).item()
            return top, left, h, w
    # A very long image: the largest part in its middle that has one of the ratios.
    w = min(width, round(height * ratios[1]))
    h = min(height, round(width / ratios[0]))
    return (height - h) // 2, (width - w) // 2, h, w


def load_image(split, path, view, size):
    """An image of a split, preprocessed: uint8 (3, size, size).

    view: None for the test transform, else the number of the view, which is seeded by path and
    number alone: every run meets the same.
    """
    image = split.open(path)
    if view is None:
        return preprocess(image, size)
    seed = hashlib.sha256(os.fsencode(f"{path}|{view}")).digest()
    return preprocess_view(image, size, int.from_bytes(seed[:8], "little"))


@functools.cache
def _threads():
    """One pool for the whole run."""
    return ThreadPoolExecutor(processes.n_threads())


def _one_ahead(load, batches, drawn=False):
    """Yields (a batch, what `load(*item)` gives for its items, a list), while threads load the next
    batch. drawn: images are not loaded but drawn, by Python alone, which threads only delay."""
    if drawn:
        yield from ((batch, [load(*item) for item in batch]) for batch in batches)
        return
    ahead = []
    try:
        for batch in [*batches, None]:
            if batch is not None:
                ahead.append((batch, [_threads().submit(load, *item) for item in batch]))
            if len(ahead) == 2 or batch is None and ahead:
                loaded, futures = ahead.pop(0)
                yield loaded, [future.result() for future in futures]
    finally:  # if nobody wants the rest
        for _, futures in ahead:
            for future in futures:
                future.cancel()


# ------------------------------------------------------------------------------------ features


def image_features(
    clip_model, fingerprint, split, items, n_views=None, what="images", cached=True, raw=False
):
    """CLIP's features of images, L2-normalised, each encoded once and then taken from the cache.

    clip_model, fingerprint: from `load_clip`. split: opens, identifies and names the images; items:
    from its lists. n_views: None for the test transform, else how many augmented views per image.
    what: to call them in the line that says how many came from the cache.
    cached: False for an encoder that has been trained since it was given its fingerprint.
    raw: features as long as CLIP makes them, as a linear probe takes them; not normalised.
    Returns (N, D), or (N, views, D), on the model's device.
    Raises BadInput for an image that cannot be read, and for features that are not finite.
    """
    device, width = clip_model.logit_scale.device, clip_model.text_projection.shape[1]
    if not items:
        return torch.zeros(0, width, device=device)
    # Everything that a feature depends on. The folder's name has the weights and the way of
    # encoding, a row's key the image and the view.
    how = [ENCODING, fingerprint, device.type, PIL.__version__, version("torchvision")]
    folder = cache.CACHE / split.name / cache.hashed("|".join(map(str, how))).hex()
    views = range(n_views) if n_views else [None]
    paths = list({item.path: None for item in items})  # each once
    names = processes.first(lambda: cache.content_names(split, paths, _threads().map))
    keys = [cache.hashed(f"{names[item.path]}|{view}") for item in items for view in views]
    wanted = dict(zip(keys, [(split, item.path, view) for item in items for view in views]))

    # The first process keeps the cache; all encode.
    rows = {}
    if cached and processes.rank() == 0:
        rows = cache.load_rows(folder, set(wanted), width + 1)
    todo = processes.from_first([key for key in wanted if key not in rows])
    print(
        f"{what}: {len(items):,}"
        + (f" x {len(views)} views" if len(views) > 1 else "")
        + f", {len(wanted) - len(todo):,} features from the cache, {len(todo):,} to encode"
    )
    quiet = processes.rank() > 0 or None
    with tqdm(total=len(todo), unit=" images", leave=False, disable=quiet) as bar:
        for start in range(0, len(todo), SHARD):
            shard = todo[start : start + SHARD]
            own = [wanted[key] for key in shard[processes.rank() :: processes.world()]]
            parts = processes.gather(functools.partial(_encode, clip_model, own, bar))
            shard_rows = [None] * len(shard)
            for r, part in enumerate(parts):
                shard_rows[r :: len(parts)] = part
            rows.update(zip(shard, shard_rows))
            if cached and processes.rank() == 0:
                cache.save_rows(folder, shard, shard_rows)
    features = None
    if processes.rank() == 0:
        stored = torch.from_numpy(np.stack([rows[key] for key in keys]))
        features = stored[:, :width] * stored[:, width:] if raw else stored[:, :width].contiguous()
    features = processes.from_first(features).to(device)
    return features if n_views is None else features.view(len(items), n_views, width)


@torch.no_grad()
def _encode(clip_model, wanted, bar):
    """Features of images, one array (D + 1,) each: the unit vector, and the norm that it had.

    wanted: (split, path, view) of each. Every batch is filled up with zeros to one size: matrix
    products of one shape give an image the same bits whatever its neighbours, so a run does not
    depend on what was in the cache before it.
    """
    device = clip_model.logit_scale.device
    size, n = clip_model.visual.input_resolution, BATCH[device.type]
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    batches = [wanted[i : i + n] for i in range(0, len(wanted), n)]
    rows = []
    drawn = bool(wanted) and wanted[0][0].folder is None
    for batch, loaded in _one_ahead(lambda *item: load_image(*item, size), batches, drawn):
        images = as_clip_reads(loaded, device)
        padded = images.new_zeros(n, *images.shape[1:])
        padded[: len(images)] = images
        features = encode_images(clip_model, padded, dtype)[: len(images)]
        finite = features.isfinite().all(dim=1)
        if not finite.all():
            split, path, _ = batch[finite.int().argmin()]
            raise BadInput(
                f"CLIP's features of {(split.folder or split.name)}/{path} are not finite numbers:"
                " are these weights damaged?"
            )
        norm = features.norm(dim=-1, keepdim=True)
        rows.extend(torch.cat([F.normalize(features, dim=-1), norm], dim=1).cpu().numpy())
        bar.update(len(images) * processes.world())  # the others have done as much
    return rows


def photo_features(clip_model, images, raw=False):
    """Features (N, D) of PIL images that belong to no dataset. raw: not normalised."""
    device, size = clip_model.logit_scale.device, clip_model.visual.input_resolution
    batches = [[(upright_rgb(image), size)] for image in images]
    if not batches:
        raise BadInput("there is no image to look at")
    with torch.no_grad():
        features = [
            encode_images(clip_model, as_clip_reads(loaded, device), torch.float32)
            for _, loaded in _one_ahead(preprocess, batches)
        ]
    return torch.cat(features) if raw else F.normalize(torch.cat(features), dim=-1)


# ----------------------------------------------------------------------------- while training


def training_features(clip_model, fingerprint, split, n_views, live):
    """The features of a split's training images, as a training loop reads them: called with the
    batches of an epoch, each the indices of its images (B,), a view for each image of the split
    (N,), and the epoch, it yields the features (B, D) of one batch after the other.

    n_views: as in `image_features`. live: encoded anew in every step, because the encoder learns;
    else encoded now, once, and the image encoder lets go of its memory.
    """
    if live:
        return LiveFeatures(clip_model, split, n_views is not None)
    stored = image_features(clip_model, fingerprint, split, split.train, n_views, "training images")
    clip_model.visual = None
    return StoredFeatures(stored)


class StoredFeatures:
    """Features that were encoded beforehand, all views of each image."""

    def __init__(self, features):
        """features: (N, views, D), or (N, D) for images with one view."""
        self.features = features if features.dim() == 3 else features[:, None]
        self.n_views = self.features.shape[1]

    def __call__(self, batches, views, epoch):
        # One trip to the device in each epoch: a GPU waits for none of its batches.
        order, device = torch.cat(batches), self.features.device
        features = self.features[order.to(device), views[order].to(device)]
        yield from features.split([len(batch) for batch in batches])


class LiveFeatures:
    """Features encoded in every step, of images cropped anew in every epoch."""

    n_views = 1

    def __init__(self, clip_model, split, cropped):
        print("the image encoder learns, too: images are encoded in every step")
        self.clip_model, self.split, self.cropped = clip_model, split, cropped

    def __call__(self, batches, views, epoch):
        size, device = self.clip_model.visual.input_resolution, self.clip_model.logit_scale.device
        view = epoch if self.cropped else None
        rank, world = processes.rank(), processes.world()
        # Each process loads its share of every batch; all encode the whole batch.
        paths = [item.path for item in self.split.train]
        own = [[(paths[i],) for i in batch[rank::world].tolist()] for batch in batches]
        load = functools.partial(load_image, self.split, view=view, size=size)
        loading = _one_ahead(load, own)
        for batch in batches:
            images = [None] * len(batch)
            for r, part in enumerate(processes.gather(lambda: next(loading)[1])):
                images[r::world] = part
            pixels, dtype = as_clip_reads(images, device), processes.mixed_dtype(device)
            yield F.normalize(encode_images(self.clip_model, pixels, dtype), dim=-1)
