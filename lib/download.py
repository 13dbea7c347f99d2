"""Downloads a file, resuming where it stopped, or an archive, which is then unpacked.

A file or folder with its final name is complete: it is written under another name and renamed last.
"""

import contextlib
import errno
import hashlib
import os
import shutil
import ssl
import threading
import time
import zipfile
from http.client import HTTPException
from urllib.error import HTTPError, URLError
from urllib.request import HTTPRedirectHandler, Request, build_opener

from tqdm import tqdm

from lib.errors import BadInput, one_line, say
from lib.files import writable_folder

try:
    import fcntl
except ImportError:  # Windows has no locks that are released when a process ends
    fcntl = None

STALL = 20  # a download is given up after so many seconds without a new byte
SLOWEST = 1000  # bytes per second; each of so many bytes buys a second of patience, up to STALL
BAR = {"unit": "B", "unit_scale": True, "leave": False, "disable": None}  # None: only on a terminal
NETWORK = (URLError, HTTPException, ConnectionError, TimeoutError, ssl.SSLError)
# Of the errors of the operating system, those that come from what is in an archive (impossible
# offsets or names; None: bad bytes in bz2). The others are the disk's.
ARCHIVE = (None, errno.EINVAL, errno.ENAMETOOLONG, errno.EEXIST, errno.ENOTDIR, errno.EISDIR)


def hub_url(path):
    """An address on the Hugging Face hub. The environment variable HF_ENDPOINT changes the host."""
    return f"{(os.environ.get('HF_ENDPOINT') or 'https://huggingface.co').rstrip('/')}/{path}"


def download(urls, path, way_out, sha256=None, copies=1):
    """Downloads a file to `path` from the first address that delivers it, continuing from what an
    earlier attempt, or another address, left in `path`.part.

    sha256: what the file must have, if known. way_out: what to do if all addresses fail. copies:
    how many times the file must fit on the disk, 2 for an archive that will be unpacked. Raises
    BadInput.
    """
    part = path.with_name(f"{path.name}.part")
    if part.is_symlink():  # what it leads to would be overwritten
        part.unlink()
    failures = []
    for url in urls:
        reason = None
        while reason is None:
            say(f"downloading {url}")
            resumed = part.exists()
            try:
                _receive(url, part, copies)
                if not sha256 or file_sha256(part) == sha256:
                    part.replace(path)
                    return
                part.unlink()
                # If its beginning was from elsewhere, this address may still have the right file.
                reason = None if resumed else "it arrived with a wrong SHA-256 and was removed"
            except (OSError, HTTPException) as error:
                reason = one_line(error)
        failures.append(f"{url} ({reason})")
    raise BadInput(f"cannot download {', '.join(failures)}: {way_out}")


def _receive(url, part, copies):
    """Appends to the file `part` what it lacks of the file at `url`. Reconnects while that brings
    new bytes. Raises OSError or HTTPException."""
    # The last byte is asked for again: of a complete file, no range would be left.
    have = max(part.stat().st_size - 1, 0) if part.exists() else 0
    size = have + 1  # at least; the server will tell
    most, deadline = 0, time.monotonic() + STALL  # most bytes so far
    with tqdm(desc=part.stem, **BAR) as bar:
        while have < size:
            try:
                with _open(url, have, deadline - time.monotonic()) as reply:
                    have = have if reply.status == 206 else 0  # 200: the server ignores ranges
                    if reply.length is None:  # absent, negative or not a number
                        raise URLError("it does not announce a length")
                    size = have + reply.length
                    span = reply.headers["Content-Range"]
                    if reply.status == 206 and span != f"bytes {have}-{size - 1}/{size}":
                        raise HTTPError(url, 416, f"another range: {span}", reply.headers, None)
                    _check_room(part, copies * size - have)
                    bar.total, bar.n = size, have
                    patience = deadline  # is also extended by bytes that arrive again
                    with open(part, "ab") as file:
                        file.truncate(have)
                        while chunk := reply.read1(2**20):
                            file.write(chunk)
                            bar.update(len(chunk))
                            have += len(chunk)
                            now = time.monotonic()
                            patience = min(patience + len(chunk) / SLOWEST, now + STALL)
                            if have > most:
                                most, deadline = have, patience
                            if now > patience:
                                break
                if have < size:
                    raise ConnectionError("the connection was closed or too slow")
            except NETWORK as error:
                if have and getattr(error, "code", None) == 416:  # the part is of another file
                    have = 0
                    continue
                # Before the first byte, an unknown host or a refusal is not retried.
                refused = isinstance(error, URLError) and not most
                if refused or time.monotonic() >= deadline:
                    raise
                time.sleep(STALL / 20)


def _check_room(path, needed):
    """Raises OSError if the disk that holds `path` has fewer free bytes than needed."""
    free = shutil.disk_usage(path.parent).free
    if needed > free:
        message = f"no room: {free / 1e9:.2f} GB are free, make it {needed / 1e9:.2f} GB"
        raise OSError(errno.ENOSPC, message)


class _WebOnly(HTTPRedirectHandler):
    """Opens http and https only, also if a server redirects to files or to ftp."""

    def default_open(self, request):
        if request.type not in ("http", "https"):
            raise URLError(f"not on the web: {request.full_url}")

    def redirect_request(self, request, reply, *where):
        reply.close()  # urllib would read its body into memory, which may never end
        return super().redirect_request(request, reply, *where)


def _open(url, start, seconds):
    """Requests a file from byte `start` on and returns the reply, within `seconds`. (The timeout of
    urllib is not enough: it applies to each of a host's addresses, of which the hub has a dozen,
    and not to the name lookup.)"""
    headers = {"Range": f"bytes={start}-"} if start else {}
    seconds = max(seconds, STALL / 20)
    outcome = []

    def ask():
        try:
            request = Request(url, headers=headers)
            outcome.append(build_opener(_WebOnly).open(request, timeout=seconds))
        except Exception as error:  # of any kind: it is raised where the reply is awaited
            outcome.append(error if isinstance(error, NETWORK) else URLError(error))

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    if not outcome:
        raise TimeoutError("no answer")
    if isinstance(outcome[0], Exception):
        raise outcome[0]
    return outcome[0]


def file_sha256(path):
    """The SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def fetch_dataset(url, folder, contents, sha256=None):
    """Makes a dataset's folder from the zip file at `url`, unless it already holds more than lists.

    A zip file that the user has put beside the folder is used instead, and kept. Lists already in
    the folder replace the archive's. contents: what to look for in the archive, the image folder
    first. Raises BadInput.
    """
    if _holds_images(folder):
        return
    say(f"no images in {folder}: fetching them, or waiting for the process that does")
    root, archive = folder.parent, folder.with_name(url.rpartition("/")[2])
    work = root / f"{folder.name}.fetching"  # holds unfinished files
    fetched, files, aside = work / archive.name, work / "files", work / "aside"
    with writable_folder(root, "name another --data"), alone(root / f"{folder.name}.lock"):
        if _holds_images(folder):
            return
        try:
            work.mkdir(exist_ok=True)
            shutil.rmtree(files, ignore_errors=True)  # left by a killed process
            if not archive.is_file():
                archive = fetched
            if not archive.is_file():
                way_out = f"try again, put {archive.name} into {root} or name another --data"
                download([url], archive, way_out, sha256, copies=2)
            say(f"unpacking {archive}")
            try:
                best = _unpack(archive, files, folder.name, contents)
            except Exception as error:  # damaged bytes may raise anything
                if isinstance(error, OSError) and error.errno not in ARCHIVE:
                    raise
                way_out = f"remove it, or unpack it as {folder}"
                if archive == fetched:
                    archive.unlink()
                    way_out = "removed, try again"
                message = f"{archive} cannot be used ({one_line(error)}): {way_out}"
                raise BadInput(message) from error
            # The user's lists win. `aside` holds them if a process was killed between the renames.
            for file in (*aside.glob("*"), *folder.glob("*")):
                shutil.copy2(file, best)
            if folder.is_dir():
                folder.rename(aside)
            best.rename(folder)
            shutil.rmtree(work)
        except OSError as error:
            raise BadInput(f"cannot unpack {archive} as {folder}: {error}") from error
        finally:
            shutil.rmtree(files, ignore_errors=True)
            with contextlib.suppress(OSError):
                work.rmdir()


def _holds_images(folder):
    """Whether a dataset's folder holds anything but lists: split files and class names."""
    lists = (".json", ".txt", ".DS_Store")
    return folder.is_dir() and any(
        path.is_dir() or not path.name.endswith(lists) for path in folder.iterdir()
    )


def _unpack(archive, files, folder_name, contents):
    """Unpacks a zip file, which also verifies its checksums. Returns the dataset's folder in it.
    Raises OSError for a disk without room, and anything for an archive that cannot be used."""
    with zipfile.ZipFile(archive) as content:
        size = sum(entry.file_size for entry in content.infolist())
        _check_room(archive, size)
        with tqdm(desc="unpacking", total=size, **BAR) as bar:
            for entry in content.infolist():
                content.extract(entry, files)
                bar.update(entry.file_size)
    # Archives differ in the name of the dataset's folder, and in the folders around it.
    places = [files / folder_name, files, *files.glob("*"), *files.glob("*/*")]
    best = max(places, key=lambda place: sum((place / name).exists() for name in contents))
    if not ((best / contents[0]).is_dir() and _holds_images(best)):
        raise ValueError(f"no {contents[0] or 'images'} in it")
    return best


@contextlib.contextmanager
def alone(path):
    """Waits until no other process is in this block. The lock at `path` ends with its process."""
    if fcntl is None:
        yield
        return
    while True:
        file = open(path, "a")  # noqa: SIM115, "a": it may be a link
        with contextlib.suppress(OSError):  # some network disks have no locks
            fcntl.flock(file, fcntl.LOCK_EX)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.stat(path), os.fstat(file.fileno())):
                break
        file.close()  # its holder has removed the file since
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        file.close()
