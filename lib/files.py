"""Reading and writing files so that nobody ever meets half of one."""

import contextlib
import tempfile
import uuid
from pathlib import Path
from zipfile import ZipFile

import torch

from lib.errors import BadInput

try:
    import fcntl
except ImportError:  # Windows has no locks that end with their process
    fcntl = None


@contextlib.contextmanager
def made(folder, way_out=""):
    """A folder that is there and can be written in; those made for it go again if they are still
    empty when the block ends. Raises BadInput if that cannot be."""
    absent = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder, suffix=".tmp"):  # permissions alone do not tell
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
def replacing(path):
    """A temporary path beside `path` to write to, renamed to it when the block ends well. Readers
    find the old file or the new one. If the block raises, nothing is left behind."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f"{path.stem}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        yield scratch
        scratch.replace(path)
    finally:
        with contextlib.suppress(OSError):
            scratch.unlink(missing_ok=True)


def read_torch_file(path, what):
    """`torch.load` of a dictionary, weights only, with one clear error: `path is not a {what}`."""
    content = None
    # A file that cannot be opened raises its own OSError; on damaged bytes anything may be raised.
    with open(path, "rb") as file, contextlib.suppress(Exception), ZipFile(file) as archive:
        if archive.testzip() is None:  # torch does not look at the checksums
            content = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(content, dict):
        raise BadInput(f"{path} is not a {what}, or damaged")
    return content


def full_path(value, but=()):
    """The full path of a file, to be found again from any folder; other values, and words that mean
    something else, as they are."""
    is_file = value and value not in but and Path(value).is_file()
    return str(Path(value).resolve()) if is_file else value


def read_text(file):
    """The content of a text file. Raises BadInput if it cannot be read."""
    try:
        return Path(file).read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise BadInput(f"cannot read {file}: {error}") from error


def read_lines(file):
    """The lines of a text file, stripped, without empty ones. Raises BadInput as `read_text`."""
    return [line.strip() for line in read_text(file).splitlines() if line.strip()]
