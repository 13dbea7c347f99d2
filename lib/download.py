"""Downloads a file, resuming where it stopped, or an archive, which is then unpacked.

A file or folder with its final name is complete: it is written under another name and renamed last.
"""

import contextlib
import hashlib
import os
import queue
import shutil
import ssl
import threading
import time
import zipfile
import zlib
from http.client import HTTPException
from urllib.error import URLError
from urllib.request import Request, urlopen

from tqdm import tqdm

from lib.errors import BadInput
from lib.files import writable_folder

try:
    import fcntl
except ImportError:  # Windows has no locks that are released when a process ends
    fcntl = None

STALL = 20  # seconds without a new byte after which a download is given up
BAR = {"unit": "B", "unit_scale": True, "leave": False, "disable": None}  # None: only on a terminal
NETWORK = (URLError, HTTPException, ConnectionError, TimeoutError, ssl.SSLError)
DAMAGED = (zipfile.BadZipFile, zlib.error, EOFError, ValueError)


def download(url, path, way_out, sha256=None, copies=1):
    """Downloads a file to `path`, continuing from what an earlier attempt left in `path`.part.

    way_out: what to do if this fails. copies: how many times the file must fit on the disk, 2 for
    an archive that will be unpacked. Raises BadInput.
    """
    part = path.with_name(f"{path.name}.part")
    have, size = part.stat().st_size if part.exists() else 0, None
    most, grown = 0, time.monotonic()  # most bytes so far, and the time they last increased
    print(f"downloading {url}")
    with tqdm(desc=path.name, **BAR) as bar:
        while size is None or have < size:
            try:
                with _open(url, have, STALL - (time.monotonic() - grown)) as reply:
                    have = have if reply.status == 206 else 0  # 200: the server ignores ranges
                    size = have + int(reply.headers["Content-Length"] or 0)
                    needed, free = copies * size - have, shutil.disk_usage(path.parent).free
                    if needed > free:
                        raise BadInput(
                            f"no room for {path}: {free / 1e9:.2f} GB are free, make it"
                            f" {needed / 1e9:.2f} GB"
                        )
                    bar.total, bar.n = size, have
                    with open(part, "ab") as file:
                        file.truncate(have)
                        while chunk := reply.read1(2**20):
                            file.write(chunk)
                            bar.update(len(chunk))
                            have += len(chunk)
                            if have > most:
                                most, grown = have, time.monotonic()
                if have < size:
                    raise ConnectionError("the connection was closed")
            except NETWORK as error:
                if have and getattr(error, "code", None) == 416:  # there are no more bytes
                    if error.headers["Content-Range"] == f"bytes */{have}":
                        break
                    have = 0  # the part is longer than the file
                    continue
                # Before the first byte, an unknown host or a refusal is not retried.
                refused = isinstance(error, URLError) and not most
                if refused or time.monotonic() - grown >= STALL:
                    reason = str(error).strip("<>")
                    raise BadInput(f"cannot download {url} ({reason}): {way_out}") from error
                time.sleep(STALL / 20)
            except OSError as error:
                raise BadInput(f"cannot write {part}: {error.strerror}") from error
    if sha256 and file_sha256(part) != sha256:
        part.unlink()
        raise BadInput(f"{url} arrived damaged (wrong SHA-256) and was removed: {way_out}")
    part.replace(path)


def _open(url, start, seconds):
    """Requests a file from byte `start` on and returns the reply, within `seconds`. (The timeout of
    `urlopen` is not enough: it applies to each of a host's addresses, of which the hub has a dozen,
    and not to the name lookup.)"""
    headers = {"Range": f"bytes={start}-"} if start else {}
    seconds = max(seconds, STALL / 20)
    replies = queue.Queue()

    def ask():
        try:
            replies.put(urlopen(Request(url, headers=headers), timeout=seconds))
        except Exception as error:  # of any kind: it is raised where the reply is awaited
            replies.put(error if isinstance(error, NETWORK) else URLError(error))

    threading.Thread(target=ask, daemon=True).start()
    try:
        reply = replies.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError("no answer") from None
    if isinstance(reply, Exception):
        raise reply
    return reply


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
    print(f"no images in {folder}: fetching them, or waiting for the process that does")
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
                download(url, archive, way_out, sha256, copies=2)
            print(f"unpacking {archive}")
            try:
                _unpack(archive, files)
            except DAMAGED as error:
                fetched.unlink(missing_ok=True)
                way_out = "removed, try again" if archive == fetched else "remove it"
                raise BadInput(f"{archive} is damaged ({error}): {way_out}") from error
            # Archives differ in the name of the dataset's folder, and in the folders around it.
            places = [files / folder.name, files, *files.glob("*"), *files.glob("*/*")]
            best = max(places, key=lambda place: sum((place / name).exists() for name in contents))
            if not (best / contents[0]).is_dir():
                raise BadInput(f"{archive} has no folder {contents[0]}: unpack it as {folder}")
            # The user's lists win. `aside` holds them if a process was killed between the renames.
            for file in (*aside.glob("*"), *folder.glob("*")):
                shutil.copy2(file, best)
            if folder.is_dir():
                folder.rename(aside)
            best.rename(folder)
            shutil.rmtree(work)
        except (OSError, RuntimeError) as error:  # RuntimeError: unknown compression
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


def _unpack(archive, files):
    """Unpacks a zip file, which also verifies its checksums. Raises one of DAMAGED."""
    with zipfile.ZipFile(archive) as content:
        size = sum(entry.file_size for entry in content.infolist())
        with tqdm(desc="unpacking", total=size, **BAR) as bar:
            for entry in content.infolist():
                content.extract(entry, files)
                bar.update(entry.file_size)


@contextlib.contextmanager
def alone(path):
    """Waits until no other process is in this block. The lock at `path` ends with its process."""
    if fcntl is None:
        yield
        return
    while True:
        file = open(path, "w")  # noqa: SIM115
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
