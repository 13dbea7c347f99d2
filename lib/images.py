"""Image features: transforms, and a cache so that each image is encoded once in its life.

CLIP's image encoder is frozen, so the feature of an image never changes. Test images are encoded
once, training images once per *view* (an augmented crop), and all of it is kept on disk, for every
later run with another seed, method or number of shots.

The cache is a folder of shards, files with some keys and their feature rows. A shard is written
whole under a temporary name and then never changes, so runs can share the cache at the same time;
at worst both encode an image.
"""

import contextlib
import hashlib
import os
from pathlib import Path

import numpy as np
import PIL
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
import torchvision.transforms as T
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from lib import processes
from lib.clip_model import MEAN, STD
from lib.errors import BadInput
from lib.files import replacing

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "mocoop"
BATCH = {"cpu": 32, "cuda": 256}  # images in one pass of the encoder
SHARD = 4096  # rows; what is encoded is safe on disk at least this often
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


class _Preprocessed(Dataset):
    """(path, view) pairs as tensors. View v of an image is random, but seeded by its path and v
    alone, so that every seed and method meets the same views."""

    def __init__(self, split, transform, wanted):
        self.split, self.transform, self.wanted = split, transform, wanted

    def __len__(self):
        return len(self.wanted)

    def __getitem__(self, i):
        path, view = self.wanted[i]
        seed = hashlib.sha256(os.fsencode(f"{path}|{view}")).digest()
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(int.from_bytes(seed[:8], "little"))
                return self.transform(self.split.open(path))
        except BadInput as error:  # returned, as a worker process would garble a raised one
            return error


def _collate(images):
    """One tensor per batch, or the first image's error."""
    return next((i for i in images if isinstance(i, BadInput)), None) or torch.stack(images)


def image_features(clip_model, fingerprint, split, items, n_views=None, what="images", cached=True):
    """CLIP's features of images, L2-normalised, each encoded once and then taken from the cache.

    clip_model, fingerprint: from `load_clip`. split: opens, identifies and names the images; items:
    from its lists. n_views: None for the test transform, else how many augmented views per image.
    what: to call them in the line that says how many came from the cache.
    cached: False for an encoder that has been trained since it was given its fingerprint.
    Returns (N, D), or (N, views, D), on the model's device.
    Raises BadInput for an image that cannot be read.
    """
    device, size = clip_model.logit_scale.device, clip_model.visual.input_resolution
    if not items:
        return torch.zeros(0, clip_model.text_projection.shape[1], device=device)
    transform = train_transform(size) if n_views else test_transform(size)
    views = range(n_views or 1)

    # Everything that a feature depends on. The folder's name has the weights and the way from file
    # to tensor, a row's key the image and the view.
    how = [fingerprint, transform, device.type, PIL.__version__, torchvision.__version__]
    how = "|".join(map(str, how))
    folder = CACHE / split.name / hashlib.sha256(how.encode()).hexdigest()[:16]
    keys, wanted = [], {}
    for item in items:
        identity = split.identity(item.path)
        for view in views:
            keys.append(hashlib.blake2b(os.fsencode(f"{identity}|{view}"), digest_size=16).digest())
            wanted[keys[-1]] = (item.path, view)
    # The first process keeps the cache; all encode.
    rows = {}
    if cached and processes.rank() == 0:
        rows = _load_rows(folder, set(wanted), clip_model.text_projection.shape[1])
    todo = processes.from_first([key for key in wanted if key not in rows])
    print(
        f"{what}: {len(items):,}"
        + (f" x {len(views)} views" if len(views) > 1 else "")
        + f", {len(wanted) - len(todo):,} features from the cache, {len(todo):,} to encode"
    )
    bar = tqdm(total=len(todo), desc="encoding", leave=False, disable=processes.rank() > 0 or None)
    for start in range(0, len(todo), SHARD):
        shard = todo[start : start + SHARD]
        own = shard[processes.rank() :: processes.world()]
        try:
            encoded = _encode(
                clip_model, _Preprocessed(split, transform, [wanted[k] for k in own]), bar
            )
        except BadInput as error:  # sent to all processes, so that all end with it
            encoded = error
        parts = processes.gather(encoded)
        for part in parts:
            if isinstance(part, BadInput):
                raise part
        shard_rows = [None] * len(shard)
        for r, part in enumerate(parts):
            shard_rows[r :: len(parts)] = part
        rows.update(zip(shard, shard_rows))
        if cached and processes.rank() == 0:
            _save_rows(folder, shard, shard_rows)
    bar.close()
    features = None
    if processes.rank() == 0:
        features = torch.from_numpy(np.stack([rows[key] for key in keys]))
    features = processes.from_first(features).to(device)
    return features if n_views is None else features.view(len(items), len(views), -1)


def image_layer_norms(clip_model):
    """The LayerNorms of the image encoder's blocks, unfrozen. Raises BadInput for a ResNet."""
    if not hasattr(clip_model.visual, "transformer"):
        raise BadInput("--tune-visual-ln needs a CLIP with a ViT: this one has none")
    blocks = clip_model.visual.transformer.resblocks
    norms = [norm for block in blocks for norm in (block.ln_1, block.ln_2)]
    return nn.ModuleList(norms).requires_grad_(True)


def training_features(clip_model, fingerprint, split, n_views, live):
    """The features of a split's training images, as a training loop reads them: called with the
    indices of a batch (B,), a view for each (B,), and the epoch, it returns (B, D).

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

    def __call__(self, images, views, epoch):
        return self.features[images, views]


class LiveFeatures:
    """Features encoded in every step, of images cropped anew in every epoch."""

    n_views = 1

    def __init__(self, clip_model, split, cropped):
        print("training the image encoder's LayerNorms: images are encoded in every step")
        size = clip_model.visual.input_resolution
        transform = train_transform(size) if cropped else test_transform(size)
        self.clip_model, self.split, self.transform = clip_model, split, transform

    def __call__(self, images, views, epoch):
        wanted = [(self.split.train[i].path, epoch) for i in images]
        crops = _Preprocessed(self.split, self.transform, wanted)
        batch = _collate([crops[i] for i in range(len(crops))])
        if isinstance(batch, BadInput):
            raise batch
        device = self.clip_model.logit_scale.device
        with processes.mixed_precision(device):
            features = self.clip_model.encode_image(batch.to(device))
        return F.normalize(features.float(), dim=-1)


@torch.no_grad()
def _encode(clip_model, images, bar):
    """Normalised features of preprocessed images, one (D,) array each.

    Every batch is filled up with zeros to one size: matrix products of one shape give an image the
    same bits whatever its neighbours, so a run does not depend on what was in the cache before it.
    """
    device = clip_model.logit_scale.device
    n_workers = 0 if device.type == "cpu" else min(8, os.cpu_count() // processes.world())
    loader = DataLoader(images, BATCH[device.type], num_workers=n_workers, collate_fn=_collate)
    rows = []
    for batch in loader:
        if isinstance(batch, BadInput):
            raise batch
        padded = batch.new_zeros(BATCH[device.type], *batch.shape[1:], device=device)
        padded[: len(batch)] = batch.to(device)
        with torch.autocast("cuda", torch.float16, enabled=device.type == "cuda"):
            features = clip_model.encode_image(padded)[: len(batch)].float()
        rows.extend(F.normalize(features, dim=-1).cpu().numpy())
        bar.update(len(batch) * processes.world())  # the others have done as much
    return rows


def _load_rows(folder, keys, width):
    """The cached rows of `keys`, as far as there are any: {key: (D,) float32}."""
    rows = {}
    for shard in sorted(folder.glob("*.npz")) if os.access(folder, os.R_OK | os.X_OK) else []:
        try:
            with np.load(shard) as file:  # the zip format brings checksums
                shard_keys = [key.tobytes() for key in file["keys"]]
                if not keys.isdisjoint(shard_keys):
                    shard_rows = file["rows"]
                    if shard_rows.shape != (len(shard_keys), width) or np.isnan(shard_rows).any():
                        raise ValueError("not features of this CLIP")
                    rows.update((k, r) for k, r in zip(shard_keys, shard_rows) if k in keys)
        except OSError as error:
            print(f"a cache file is left out: {error}")
        except Exception:  # damaged bytes may raise anything, and are only a cache
            print(f"the cache file {shard} is damaged: encoding its images again")
            with contextlib.suppress(OSError):
                shard.unlink()
    return rows


def _save_rows(folder, keys, rows):
    """One new shard. A cache that cannot be written costs time, not the run."""
    shard = folder / f"{hashlib.blake2b(b''.join(keys), digest_size=8).hexdigest()}.npz"
    try:
        with replacing(shard) as scratch, open(scratch, "wb") as file:
            np.savez(
                file,
                keys=np.frombuffer(b"".join(keys), np.uint8).reshape(-1, 16),
                rows=np.stack(rows).astype(np.float32),
            )
    except OSError as error:
        print(f"features are not cached: {error}")
