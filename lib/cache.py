"""The cache of image features: each image is encoded once in its life.

A dataset has a folder in the cache, and in it one folder per CLIP and way of encoding, with
*shards*: files of keys and rows. A shard is written whole under a temporary name and then never
changes, so runs can share the cache at the same time; at worst both encode an image.

An image's key names its content: path below the dataset's folder, size, digest of the bytes. A copy
of a dataset and its cache on another disk, or for another user, so finds everything. Reading every
file for its digest would take long, so an index remembers digests by absolute path, size and time.
"""

import contextlib
import hashlib
import json
import os
import time
from pathlib import Path

import numpy as np

from lib.errors import BadInput
from lib.files import replacing

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "mocoop"
DAY = 24 * 3600


def hashed(text):
    """16 bytes that stand for a text."""
    return hashlib.blake2b(os.fsencode(text), digest_size=16).digest()


def content_names(split, paths, each):
    """{path: a string that names the image's content}; for drawn images, how they are drawn.

    each: like `map`, calls a function for many paths. Raises BadInput for an unreadable file.
    """
    if split.folder is None:
        return {path: split.identity(path) for path in paths}
    index_file = CACHE / split.name / "index.json"
    try:
        index = dict(json.loads(index_file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError):  # missing or damaged: all are read
        index = {}
    known = len(index)

    def name(path):
        file = os.path.abspath(split.folder / path)
        try:
            stat = os.stat(file)
            if not os.path.isfile(file):
                raise BadInput(f"{file} is no file")  # a pipe would wait for ever
            entry = f"{file}|{stat.st_size}|{stat.st_mtime_ns}"
            if entry not in index:
                index[entry] = hashlib.blake2b(Path(file).read_bytes(), digest_size=16).hexdigest()
        except OSError as error:
            raise BadInput(f"cannot read the image {file}: {error.strerror}") from error
        return f"{split.identity(path)}|{stat.st_size}|{index[entry]}"

    names = dict(zip(paths, each(name, paths)))
    if len(index) > known:
        with contextlib.suppress(OSError), replacing(index_file) as scratch:
            scratch.write_text(json.dumps(index), encoding="utf-8")
    return names


def load_rows(folder, keys, width):
    """The cached rows of `keys`, as far as there are any: {key: (width,) float32}."""
    rows = {}
    for shard in sorted(folder.glob("*.npz")) if os.access(folder, os.R_OK | os.X_OK) else []:
        try:
            with np.load(shard) as file:  # the zip format brings checksums
                shard_keys = [key.tobytes() for key in file["keys"]]
                if not keys.isdisjoint(shard_keys):
                    found = file["rows"]
                    if found.shape != (len(shard_keys), width) or not np.isfinite(found).all():
                        raise ValueError("not features of this CLIP")
                    rows.update((k, r) for k, r in zip(shard_keys, found) if k in keys)
        except OSError as error:
            print(f"a cache file is left out: {error}")
        except Exception:  # damaged bytes may raise anything, and are only a cache
            print(f"the cache file {shard} is damaged: encoding its images again")
            with contextlib.suppress(OSError):
                shard.unlink()
    return rows


def save_rows(folder, keys, rows):
    """One new shard. A cache that cannot be written costs time, not the run."""
    try:
        key_bytes = np.frombuffer(b"".join(keys), np.uint8).reshape(-1, 16)
        shard = folder / f"{hashed(repr(keys)).hex()}.npz"
        with replacing(shard) as scratch, open(scratch, "wb") as file:
            np.savez(file, keys=key_bytes, rows=np.stack(rows).astype(np.float32))
        for left_by_a_killed_run in folder.glob("*.tmp"):
            with contextlib.suppress(OSError):
                if time.time() - left_by_a_killed_run.stat().st_mtime > DAY:
                    left_by_a_killed_run.unlink()
    except OSError as error:
        print(f"features are not cached: {error}")
