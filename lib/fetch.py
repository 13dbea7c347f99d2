"""Downloads: archives of images, and single files from Google Drive.

Whatever is fetched arrives under a temporary name, is checked, and is renamed last: what stands in
its place is whole.
"""

import contextlib
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

FAILURES = (
    *(OSError, RuntimeError, EOFError, zipfile.BadZipFile, tarfile.TarError, zlib.error),
    gdown.exceptions.DownloadError,
)


def fetch_images(url, md5, target):
    """Downloads an archive; its folder named like `target` becomes `target`, and what lies beside
    that folder in the archive comes along.

    md5: a checksum or None. Raises BadInput if anything goes wrong, and leaves nothing then.
    """
    folder = target.parent
    print(f"{target} is not there: downloading {url}")
    try:
        with _scratch(folder) as scratch:
            archive, files = scratch / ("archive" + _suffix(url)), scratch / "files"
            download_url(url, scratch, archive.name, md5)
            extract_archive(archive, files)
            for inner in files.rglob("*.tar.gz"):  # Caltech 101 comes as archives in an archive
                extract_archive(inner, inner.parent)
            found = [p for p in files.rglob(target.name) if p.is_dir()]
            if not found:
                raise RuntimeError(f"the archive holds no folder {target.name}")
            images = min(found, key=lambda path: len(path.parts))
            for beside in images.parent.iterdir():
                if beside != images and not (folder / beside.name).exists():
                    beside.rename(folder / beside.name)
            images.rename(target)
    except FAILURES as error:
        raise BadInput(
            f"no images at {target}, and downloading {url} failed ({_first_line(error)}): unpack"
            f" that archive in {folder} by hand, or point --data at the folder that holds"
            f" {folder.name}/"
        ) from error


def fetch_file(drive_id, target, check):
    """Downloads one file from Google Drive.

    check: called with the path of the download; raises BadInput if the file is not what it should
    be. Raises BadInput if anything goes wrong, and leaves nothing then.
    """
    print(f"{target} is not there: downloading it from Google Drive")
    try:
        with _scratch(target.parent) as scratch:
            download_file_from_google_drive(drive_id, scratch, target.name)
            check(scratch / target.name)
            (scratch / target.name).rename(target)
    except (BadInput, *FAILURES) as error:
        raise BadInput(
            f"no file {target}, and downloading it failed ({_first_line(error)}):"
            f" put https://drive.google.com/file/d/{drive_id} there by hand"
        ) from error


@contextlib.contextmanager
def _scratch(folder):
    """A temporary folder in `folder`; if the block raises, folders made for it go as well."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".fetching-") as scratch:
            yield Path(scratch)
    except BaseException:
        for empty in made:
            with contextlib.suppress(OSError):
                empty.rmdir()
        raise


def _suffix(url):
    """The kind of an archive, by its address; Google Drive's one archive is a zip file."""
    return next((end for end in (".tar.gz", ".tgz", ".zip") if url.endswith(end)), ".zip")


def _first_line(error):
    return str(error).split("\n")[0]
