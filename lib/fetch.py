"""Downloads: archives of images, and single files from Google Drive.

Whatever is fetched arrives in a scratch folder, is checked, and is renamed last: what stands in its
place is whole. One process at a time fetches into a folder; others wait, and find what it fetched.
"""

import contextlib
import gzip
import http.client
import os
import shutil
import tarfile
import tempfile
import zipfile
import zlib
from pathlib import Path

import gdown
from torchvision.datasets.utils import (
    download_file_from_google_drive,
    download_url,
    extract_archive,
)

from lib.errors import BadInput
from lib.files import fcntl, made

FAILURES = (
    *(OSError, RuntimeError, EOFError, zipfile.BadZipFile, tarfile.TarError, zlib.error),
    *(gdown.exceptions.DownloadError, http.client.HTTPException),
)
SCRATCH = ".fetching-"


def fetch_images(url, md5, target):
    """Downloads an archive; its folder named like `target` becomes `target`, and what lies beside
    that folder in the archive comes along.

    md5: a checksum or None. Raises BadInput if anything goes wrong, and leaves nothing then.
    """
    folder = target.parent
    try:
        with _scratch(folder) as scratch:
            if target.exists():
                return
            print(f"{target} is not there: downloading {url}")
            # By its address; that of Google Drive has none, and the archive there is a zip file.
            suffix = next((end for end in (".tar.gz", ".tgz") if url.endswith(end)), ".zip")
            archive, files = scratch / f"archive{suffix}", scratch / "files"
            download_url(url, scratch, archive.name, md5)
            if md5 is None:
                _check_to_its_end(archive)
            extract_archive(archive, files)
            for inner in _without_junk(files.rglob("*.tar.gz")):  # Caltech 101: archives in one
                extract_archive(inner, inner.parent)
            found = [p for p in _without_junk(files.rglob(target.name)) if p.is_dir()]
            if not found:
                raise RuntimeError(f"the archive holds no folder {target.name}")
            images = min(found, key=lambda path: len(path.parts))
            for beside in _without_junk(images.parent.iterdir()):
                if beside != images and not (folder / beside.name).exists():
                    beside.rename(folder / beside.name)
            images.rename(target)
    except FAILURES as error:
        raise BadInput(
            f"no images at {target}, and downloading {url} failed ({_first_line(error)}): try"
            f" again, unpack that archive in {folder} by hand, or point --data at the folder that"
            f" holds {folder.name}/"
        ) from error


def fetch_file(drive_id, target, check):
    """Downloads one file from Google Drive.

    check: called with the path of the download; raises BadInput if the file is not what it should
    be. Raises BadInput if anything goes wrong, and leaves nothing then.
    """
    try:
        with _scratch(target.parent) as scratch:
            if target.exists():
                return
            print(f"{target} is not there: downloading it from Google Drive")
            download_file_from_google_drive(drive_id, scratch, target.name)
            check(scratch / target.name)
            (scratch / target.name).rename(target)
    except (BadInput, *FAILURES) as error:
        raise BadInput(
            f"no file {target}, and downloading it failed ({_first_line(error)}): try again, or"
            f" put https://drive.google.com/file/d/{drive_id} there by hand"
        ) from error


@contextlib.contextmanager
def _scratch(folder):
    """A temporary folder in `folder`, for this process alone; what killed ones left is removed."""
    with made(folder), _lock(folder / f"{SCRATCH}lock"):
        for stale in folder.glob(f"{SCRATCH}*/") if fcntl else ():  # without locks, maybe in use
            shutil.rmtree(stale, ignore_errors=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=SCRATCH) as scratch:
            yield Path(scratch)


@contextlib.contextmanager
def _lock(path):
    """Waits until no other process is in this block. The lock ends with the process."""
    while fcntl:
        file = open(path, "w")  # noqa: SIM115
        fcntl.flock(file, fcntl.LOCK_EX)
        with contextlib.suppress(FileNotFoundError):
            if os.stat(path).st_ino == os.fstat(file.fileno()).st_ino:
                break
        file.close()  # whoever held it has removed it since
    try:
        yield
    finally:
        if fcntl:
            path.unlink(missing_ok=True)
            file.close()


def _check_to_its_end(archive):
    """Raises one of FAILURES unless the archive's own checksums hold. (Extraction alone would not
    notice: damage that looks like the end of a tar file is taken for it.)"""
    if archive.suffix == ".zip":
        with zipfile.ZipFile(archive) as file:
            damaged = file.testzip()
        if damaged:
            raise zipfile.BadZipFile(f"{damaged} is damaged")
    else:
        with gzip.open(archive) as file:
            while file.read(2**20):
                pass


def _without_junk(paths):
    """The paths that are no leftovers of a Mac: __MACOSX/... and ._name."""
    return [p for p in paths if "__MACOSX" not in p.parts and not p.name.startswith("._")]


def _first_line(error):
    return str(error).split("\n")[0]
