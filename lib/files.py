"""Files that are complete or absent: each is written under a temporary name, then renamed."""

import contextlib
import errno
import io
import json
import os
import tempfile
import uuid
from pathlib import Path
from zipfile import ZipFile

import torch

from lib.errors import BadInput, out_of_memory


@contextlib.contextmanager
def writable_folder(folder, way_out=""):
    """Makes sure that a folder exists and is writable. If it was created for this block and is
    still empty at the end, it is removed. Raises BadInput if it is not writable."""
    absent = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Checking permissions is not enough.
        with tempfile.TemporaryFile(dir=folder, suffix=".tmp"):
            pass
    except OSError as error:
        raise BadInput(f"cannot write in {folder}: {way_out or error.strerror}") from error
    try:
        yield
    finally:
        for path in absent:
            with contextlib.suppress(OSError):
                path.rmdir()


@contextlib.contextmanager
def replacing(path, way_out=""):
    """Yields a temporary path beside `path`, renamed to `path` if the block succeeds. Readers see
    the old file or the new one. If the block raises, nothing is left behind.

    Raises BadInput for a full disk. way_out: what to do besides making room there.
    """
    path = Path(path)
    scratch = path.with_name(f"{path.stem}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield scratch
        scratch.replace(path)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        message = f"cannot write {path}: {error.strerror}: make room there{way_out}"
        raise BadInput(message) from error
    finally:
        with contextlib.suppress(OSError):
            scratch.unlink(missing_ok=True)


def torch_bytes(content):
    """What `torch.save` writes. On a full disk, it would only report that a file ends too early."""
    torch.save(content, buffer := io.BytesIO())
    return buffer.getvalue()


def save_torch(content, path, way_out=""):
    with replacing(path, way_out) as scratch:
        scratch.write_bytes(torch_bytes(content))


def save_json(content, path):
    with replacing(path) as scratch:
        scratch.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def existing(path):
    """A path as a `Path`. Raises OSError unless it is a file: reading a pipe or a device may never
    end."""
    path = Path(path)
    if not path.is_file():
        raise OSError(f"{path} is not a file")
    return path


def create_json(content, path):
    """As `save_json`, but leaves a file that exists alone, also one that another process has just
    created. Returns whether the file is new."""
    scratch = path.with_name(f"{path.stem}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        save_json(content, scratch)
        os.link(scratch, path)
    except FileExistsError:
        return False
    except OSError:  # a disk without links
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)
    return True


def fits(value, kind):
    """Whether a value is of a kind: a type, the largest number, [kind of each item], {name: kind of
    its value}, or a function that tests it."""
    if isinstance(kind, dict):
        return isinstance(value, dict) and all(fits(value.get(k), of) for k, of in kind.items())
    if isinstance(kind, list):
        return isinstance(value, list) and all(fits(item, kind[0]) for item in value)
    if kind is dict and isinstance(value, dict):
        return all(isinstance(key, str) for key in value)
    if isinstance(kind, type):
        return isinstance(value, kind)
    if isinstance(kind, (int, float)):
        return type(value) in (int, type(kind)) and 0 <= value <= kind  # False for NaN and True
    return kind(value)


def optional(kind):
    """The kind of what files of older versions lack."""
    return lambda value: value is None or fits(value, kind)


def checked(content, kinds, path, what):
    """Returns the content of a file, which may be damaged or a stranger's. Raises BadInput unless
    it is a dictionary with values of these kinds, {name: kind}."""
    wrong = [name for name, kind in kinds.items() if not fits(content, {name: kind})]
    if wrong or not isinstance(content, dict):
        why = f": {wrong[0]}" if isinstance(content, dict) else ""
        raise BadInput(f"{path} is not a {what}, or damaged{why}")
    return content


def read_torch_file(path, what, kinds):
    """`torch.load` of a dictionary, weights only. Raises BadInput as `checked`."""
    content = None
    with open(existing(path), "rb") as file:  # one that cannot be opened raises its own OSError
        try:
            with ZipFile(file) as archive:
                if archive.testzip() is None:  # torch does not verify the checksums
                    content = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # damaged bytes may raise anything
            if out_of_memory(error):
                raise
    return checked(content, kinds, path, what)


def read_json(path, what, kinds):
    """A dictionary in a JSON file. Raises BadInput as `checked`."""
    try:
        content = json.loads(read_text(path))
    except (ValueError, RecursionError):  # ValueError: BadInput, too
        content = None
    return checked(content, kinds, path, what)


def read_text(file):
    """The content of a text file. Raises BadInput if it cannot be read."""
    try:
        return existing(file).read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise BadInput(f"cannot read {file}: {error}") from error


def read_lines(file):
    """The lines of a text file, stripped, without empty ones. Raises BadInput as `read_text`."""
    return [line.strip() for line in read_text(file).splitlines() if line.strip()]


def full_path(value, but=()):
    """The full path if `value` is a file, so that it is found from any folder. Other values, and
    the words in `but`, are returned unchanged."""
    is_file = value and value not in but and Path(value).is_file()
    return str(Path(value).resolve()) if is_file else value
