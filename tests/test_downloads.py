"""Every download, rehearsed against a small copy of the hub on the loopback address.

Nothing is replaced but the address (`HF_ENDPOINT`; for CLIP's weights the one in clip's own table)
and the SHA-256 of the three archives whose real one is known.
"""

import errno
import hashlib
import io
import json
import re
import resource
import socket
import threading
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from unittest.mock import ANY, Mock

import clip
import pytest
from test_datasets import make_layout

from data import load_split
from lib import clip_model, download
from lib.catalogue import DATASETS, HUB, REVISION, archive_url
from lib.clip_model import load_clip
from lib.errors import BadInput

SPLIT = "split_zhou_EuroSAT.json"


# ------------------------------------------------------------------------------------- the server


class Hub(ThreadingHTTPServer):
    """Redirects an archive's address to another path, as the hub does, and knows ranges.

    files: {name: content}. plan: how the next replies behave: ("cut", n) closes the connection
    after n bytes, ("trickle", n) sends the first n at 50 a second, ("headers", {name: value})
    answers with these, and ("no ranges", 0) ignores a range. redirect: where an archive is, if not
    here. requests: the first byte that each asked for, None for all.
    """

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answer)
        self.files, self.plan, self.redirect, self.sent, self.requests = {}, [], None, 0, []
        self.handle_error = lambda *args: None  # a client that hung up
        self.address = f"http://127.0.0.1:{self.server_address[1]}"


class Answer(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        folder, _, name = self.path.rpartition("/")
        if folder == f"/{HUB}/resolve/{REVISION}":
            # Its body never comes: nobody needs it.
            self.reply(302, Location=self.server.redirect or f"/cdn/{name}", Content_Length=9)
        elif name in self.server.files:
            self.send_file(self.server.files[name])
        else:
            self.reply(404)

    def reply(self, status, **headers):
        self.send_response(status)
        for key, value in {"Content_Length": 0, **headers}.items():
            if value is not None:
                self.send_header(key.replace("_", "-"), str(value))
        self.end_headers()

    def send_file(self, content):
        hub = self.server
        what, n = hub.plan.pop(0) if hub.plan else ("whole", 0)
        start = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(start[1]) if start and what != "no ranges" else None
        hub.requests.append(start)
        if start is not None and start >= len(content):
            return self.reply(416, Content_Range=f"bytes */{len(content)}")
        body = content[start or 0 :]
        headers = {"Content_Length": len(body)}
        if start:
            headers["Content_Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self.reply(206 if start else 200, **(headers | n if what == "headers" else headers))
        if what == "cut":
            body = body[:n]
        if what == "trickle":
            for i in range(n):
                self.wfile.write(body[i : i + 1])
                time.sleep(0.02)
            body = body[n:]
        self.wfile.write(body)
        hub.sent += len(body)


@pytest.fixture
def hub(monkeypatch):
    with Hub() as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        monkeypatch.setenv("HF_ENDPOINT", server.address)
        monkeypatch.setattr(download, "STALL", 1.0)
        yield server
        server.shutdown()


# ------------------------------------------------------------------------------------ the archives


def zipped(files, compression=zipfile.ZIP_DEFLATED):
    """A zip file of {name: content}."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return out.getvalue()


def tree(root):
    """{path below root: content} of everything in a folder."""
    files = [path for path in sorted(root.rglob("*")) if path.is_file()]
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in files}


def put(hub, monkeypatch, dataset, files):
    """Puts an archive, or one of these files, on the hub, and its SHA-256 into the catalogue."""
    archive, row = files if isinstance(files, bytes) else zipped(files), DATASETS[dataset]
    hub.files[row.archive] = archive
    sha256 = row.sha256 and hashlib.sha256(archive).hexdigest()
    monkeypatch.setitem(DATASETS, dataset, replace(row, sha256=sha256))
    return archive


@pytest.fixture
def eurosat_files(tmp_path):
    make_layout(tmp_path / "whole", "eurosat")
    return tree(tmp_path / "whole")


@pytest.fixture
def eurosat_archive(hub, monkeypatch, eurosat_files):
    """EuroSAT on the hub, 35 images."""
    return put(hub, monkeypatch, "eurosat", eurosat_files)


def check_eurosat(root, files):
    """The dataset is there, nothing else is."""
    assert len(load_split("eurosat", root).test) == 10
    assert tree(root) == files
    assert [path.name for path in root.iterdir()] == ["eurosat"]


def twice(action):
    """The results of an action done twice at the same time."""
    with ThreadPoolExecutor(2) as pool:
        return [job.result() for job in [pool.submit(action) for _ in range(2)]]


# ------------------------------------------------------------------------------------- one dataset


@pytest.mark.parametrize("dataset", ["stanford_cars", "fgvc_aircraft", "imagenetv2"])
def test_a_dataset_arrives_as_datasets_md_shows_it(dataset, hub, monkeypatch, tmp_path):
    """Images in the dataset's folder itself, lists in text files, a variant of ImageNet."""
    make_layout(tmp_path / "whole", dataset)
    names = tmp_path / "whole/imagenet/classnames.txt"
    if names.is_file():  # a variant's archive may bring its own
        names.rename(tmp_path / "whole" / DATASETS[dataset].folder / "classnames.txt")
        names.parent.rmdir()
    put(hub, monkeypatch, dataset, tree(tmp_path / "whole"))
    fetched, whole = (load_split(dataset, tmp_path / root) for root in ("new", "whole"))
    assert fetched.class_names == whole.class_names
    assert [fetched.train, fetched.val, fetched.test] == [whole.train, whole.val, whole.test]
    assert tree(tmp_path / "new") == tree(tmp_path / "whole")


def test_an_address_is_the_hubs_at_one_revision(monkeypatch):
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    assert archive_url(DATASETS["food101"]) == (
        "https://huggingface.co/zhengli97/prompt_learning_dataset/resolve/"
        "ceb3112337fb6e1bf71534e355ca5569b63f19a6/food101.zip"
    )


def test_a_lost_connection_is_taken_up_where_it_was(hub, eurosat_archive, eurosat_files, tmp_path):
    hub.plan = [("cut", 10_000), ("cut", 5_000)]
    check_eurosat(tmp_path / "data", eurosat_files)
    assert hub.requests == [None, 10_000, 15_000]
    assert hub.sent == len(eurosat_archive)


def test_a_server_that_ignores_the_range_is_read_from_the_start(
    hub, eurosat_archive, eurosat_files, tmp_path
):
    hub.plan = [("cut", 10_000), ("no ranges", 0)]
    check_eurosat(tmp_path / "data", eurosat_files)
    assert hub.sent == 10_000 + len(eurosat_archive)


def test_a_connection_that_is_cut_for_good_ends_and_the_next_run_continues(
    hub, eurosat_archive, eurosat_files, tmp_path
):
    hub.plan = [("cut", 10_000)] + [("cut", 0)] * 100
    start = time.monotonic()
    with pytest.raises(BadInput, match="cannot download .*eurosat.zip .*closed.*try again"):
        load_split("eurosat", tmp_path / "data")
    assert 0.5 < time.monotonic() - start < 3
    assert [len(content) for content in tree(tmp_path / "data").values()] == [10_000]
    hub.plan = []
    check_eurosat(tmp_path / "data", eurosat_files)
    assert hub.sent == len(eurosat_archive) + 1  # it asks for the last byte again


@pytest.mark.parametrize(
    "slowest, plan", [(1000, [("trickle", 75)]), (1000, 100 * [("cut", 1)]), (5, [("trickle", 75)])]
)
def test_a_line_slower_than_a_kilobyte_a_second_is_given_up(
    slowest, plan, hub, monkeypatch, eurosat_archive, eurosat_files, tmp_path
):
    """Whether a connection holds or each brings one more byte. A longer one that is fast enough is
    kept."""
    monkeypatch.setattr(download, "SLOWEST", slowest)
    hub.plan = plan
    if slowest == 1000:
        with pytest.raises(BadInput, match="eurosat.zip .the connection was closed or too slow"):
            load_split("eurosat", tmp_path / "data")
    else:
        check_eurosat(tmp_path / "data", eurosat_files)


@pytest.mark.parametrize("length", [None, -5, "many", 10**15])
def test_a_length_that_is_none_or_does_not_fit_is_refused(length, hub, eurosat_archive, tmp_path):
    hub.plan = [("headers", {"Content_Length": length})]
    assert re.search(
        "does not announce a length|no room: .* GB are free", refused(tmp_path / "data")
    )


@pytest.mark.parametrize("span", [None, "bytes 9000-{last}/{size}", "bytes 10000-{last}/{last}"])
def test_another_range_than_asked_for_is_not_used(
    span, hub, eurosat_archive, eurosat_files, tmp_path
):
    size = len(eurosat_archive)
    span = {"Content_Range": span and span.format(last=size - 1, size=size)}
    hub.plan = [("cut", 10_000), ("headers", span)]
    check_eurosat(tmp_path / "data", eurosat_files)
    assert hub.requests == [None, 10_000, None]


@pytest.mark.parametrize("more", [b"", b"x"])
def test_a_part_left_behind_is_taken_if_complete_and_thrown_away_if_longer(
    more, hub, eurosat_archive, eurosat_files, tmp_path
):
    work = tmp_path / "data/eurosat.fetching"
    (work / "files/eurosat/2750/half").mkdir(parents=True)  # of a process killed while unpacking
    (work / "files/eurosat/2750/half/1.jpg").touch()
    (work / "eurosat.zip.part").write_bytes(eurosat_archive + more)
    check_eurosat(tmp_path / "data", eurosat_files)
    assert hub.sent == (len(eurosat_archive) if more else 1)


@pytest.mark.parametrize("known", [True, False])
def test_a_flipped_bit_is_found_with_and_without_a_known_sha256(
    known, hub, monkeypatch, eurosat_archive, eurosat_files, tmp_path
):
    if not known:
        monkeypatch.setitem(DATASETS, "eurosat", replace(DATASETS["eurosat"], sha256=""))
    damaged = bytearray(eurosat_archive)
    damaged[len(damaged) // 2] ^= 4
    hub.files["eurosat.zip"] = bytes(damaged)
    said = "wrong SHA-256 and was removed.: try" if known else "cannot be used .*: removed, try"
    with pytest.raises(BadInput, match=said):
        load_split("eurosat", tmp_path / "data")
    assert not (tmp_path / "data").exists()
    hub.files["eurosat.zip"] = eurosat_archive
    check_eurosat(tmp_path / "data", eurosat_files)


def test_of_two_that_fetch_one_does_and_the_other_finds_it(
    hub, eurosat_archive, eurosat_files, tmp_path
):
    hub.plan = [("cut", 10_000)]  # so that it takes a moment
    first, second = twice(lambda: load_split("eurosat", tmp_path / "data"))
    assert first == second
    check_eurosat(tmp_path / "data", eurosat_files)
    assert hub.sent == len(eurosat_archive)


# ----------------------------------------------------------------------------- what cannot be done


def refused(root, dataset="eurosat"):
    """The one line that a fetch ends with, which leaves nothing behind."""
    with pytest.raises(BadInput) as error:
        load_split(dataset, root)
    assert "\n" not in str(error.value)
    assert not root.exists()
    return str(error.value)


def test_without_an_archive_or_a_network_it_ends_at_once(hub, monkeypatch, tmp_path):
    said = refused(tmp_path / "data")
    assert "eurosat.zip (HTTP Error 404: Not Found): try again, put eurosat.zip into" in said
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    assert "Connection refused" in refused(tmp_path / "data")
    monkeypatch.setenv("HF_ENDPOINT", "hub.example.org")
    assert "unknown url type" in refused(tmp_path / "data")
    monkeypatch.setenv("HF_ENDPOINT", f"file://{tmp_path}")
    assert "not on the web" in refused(tmp_path / "data")


def test_a_redirect_leads_to_the_web_or_nowhere(hub, tmp_path):
    hub.redirect = "ftp://127.0.0.1:9/eurosat.zip"
    assert f"not on the web: {hub.redirect}" in refused(tmp_path / "data")


def test_a_name_server_that_swallows_packets_is_given_up(hub, monkeypatch, tmp_path):
    over, start = threading.Event(), time.monotonic()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args: over.wait(20))
    assert "no answer" in refused(tmp_path / "data")
    assert 0.5 < time.monotonic() - start < 10
    over.set()


def test_a_disk_without_room_for_archive_and_content_is_said_first(
    hub, monkeypatch, eurosat_archive, tmp_path
):
    usage = Mock(free=2 * len(eurosat_archive) - 1)
    monkeypatch.setattr(download.shutil, "disk_usage", lambda folder: usage)
    assert "eurosat.zip ([Errno 28] no room: 0.00 GB are free" in refused(tmp_path / "data")


@pytest.mark.parametrize("room", [10_000, 1_000_000])
def test_a_disk_that_fills_up_is_said(room, hub, monkeypatch, eurosat_archive, tmp_path):
    """Tried with the limit that a process can have on a file's size: of the archive, or of one that
    is unpacked."""
    archive = eurosat_archive
    if room > len(archive):
        archive = put(hub, monkeypatch, "eurosat", {"eurosat/2750/big.jpg": bytes(2 * room)})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        with pytest.raises(
            BadInput, match="cannot (download|unpack) .*eurosat.zip.*File too large"
        ):
            load_split("eurosat", tmp_path / "data")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    (left,) = tree(tmp_path / "data").values()  # is used when there is room
    assert left == archive[:room]


# ------------------------------------------------------------- what is there, and what comes along


def test_an_archive_that_the_user_has_put_there_is_used_and_stays(
    eurosat_files, monkeypatch, tmp_path
):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    (tmp_path / "data").mkdir()
    (tmp_path / "data/eurosat.zip").write_bytes(zipped(eurosat_files))
    assert len(load_split("eurosat", tmp_path / "data").test) == 10
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == ["eurosat", "eurosat.zip"]
    assert tree(tmp_path / "data/eurosat").keys() == {f"{name[8:]}" for name in eurosat_files}


@pytest.mark.parametrize("above", ["", "some/", "somewhere/deeper/"])
def test_the_folder_is_found_a_level_higher_or_deeper(
    above, hub, monkeypatch, eurosat_files, tmp_path
):
    """Beside what a Mac leaves in archives, which looks like it."""
    files = {name.replace("eurosat/", above): content for name, content in eurosat_files.items()}
    junk = {f"__MACOSX/{name.replace('/', '/._')}": b"a Mac's" for name in files}
    put(hub, monkeypatch, "eurosat", junk | files)
    assert len(load_split("eurosat", tmp_path / "data").test) == 10
    found = tree(tmp_path / "data")
    assert {name: found[name] for name in eurosat_files} == eurosat_files


def test_an_archive_without_its_split_is_said_and_nothing_is_fetched_twice(
    hub, monkeypatch, eurosat_files, tmp_path
):
    split = eurosat_files.pop(f"eurosat/{SPLIT}")
    archive = put(hub, monkeypatch, "eurosat", eurosat_files)
    for _ in range(2):
        with pytest.raises(BadInput, match=rf"no .*{SPLIT} .*holds 2750\).*CoOp's DATASETS.md"):
            load_split("eurosat", tmp_path / "data")
    assert hub.sent == len(archive)
    (tmp_path / "data/eurosat" / SPLIT).write_bytes(split)
    assert len(load_split("eurosat", tmp_path / "data").test) == 10


@pytest.mark.parametrize("where", ["eurosat", "eurosat.fetching/aside"])
def test_the_users_split_stays_when_the_images_come(
    where, eurosat_archive, eurosat_files, tmp_path
):
    """Also if a process was killed when the old folder had gone and the new one had not come."""
    mine = json.loads(eurosat_files[f"eurosat/{SPLIT}"])
    mine["test"] = mine["test"][::-1]
    (tmp_path / "data" / where).mkdir(parents=True)
    (tmp_path / "data" / where / SPLIT).write_text(json.dumps(mine))
    split = load_split("eurosat", tmp_path / "data")
    assert [item.path for item in split.test] == [f"2750/{path}" for path, _, _ in mine["test"]]
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["eurosat"]


def test_imagenet_is_brought_along(hub, tmp_path):
    assert "https://image-net.org" in refused(tmp_path / "data", "imagenet")
    assert hub.requests == []


# ----------------------------------------------------------------------------- unusable archives


IMAGE = "eurosat/2750/1.jpg"
ARCHIVE = zipped({IMAGE: b"x"})
DIRECTORY = ARCHIVE.index(b"PK\1\2")


def changed(at, value):
    """The archive with another byte in its directory."""
    return ARCHIVE[: DIRECTORY + at] + bytes([value]) + ARCHIVE[DIRECTORY + at + 1 :]


@pytest.mark.parametrize(
    "reason, archive",
    [
        ("not a zip file", b"<html>"),
        ("encrypted", changed(8, 1)),
        ("Invalid argument", changed(81, 99)),  # where the directory begins
        ("data stream", zipped({IMAGE: b"x"}, zipfile.ZIP_BZIP2).replace(b"BZh", b"...")),
        ("too long", zipped({IMAGE + 300 * "g": b"x"})),
        ("Is a directory", zipped({IMAGE: b"x", "eurosat/2750": b"x"})),
        ("no 2750 in it", zipped({f"eurosat/{SPLIT}": b""})),
    ],
)
def test_an_unusable_archive_is_removed_if_it_was_fetched_and_stays_if_it_is_the_users(
    reason, archive, hub, monkeypatch, tmp_path
):
    put(hub, monkeypatch, "eurosat", archive)
    assert re.search(f"cannot be used .*{reason}.*: removed, try", refused(tmp_path / "data"))
    (tmp_path / "data").mkdir()
    (tmp_path / "data/eurosat.zip").write_bytes(archive)
    with pytest.raises(BadInput, match=f"cannot be used .*{reason}.*: remove it"):
        load_split("eurosat", tmp_path / "data")
    assert tree(tmp_path / "data") == {"eurosat.zip": archive}


def test_lists_without_images_are_no_dataset_even_where_images_have_no_folder(
    hub, monkeypatch, tmp_path
):
    put(hub, monkeypatch, "stanford_cars", {"stanford_cars/split_zhou_StanfordCars.json": b""})
    assert "no images in it" in refused(tmp_path / "data", "stanford_cars")


@pytest.mark.parametrize(
    "owner, name, value",
    [
        (zipfile.ZipFile, "extract", Mock(side_effect=PermissionError(errno.EACCES, "no"))),
        (zipfile.ZipFile, "extract", Mock(side_effect=KeyboardInterrupt)),
        (download.shutil, "disk_usage", lambda folder: Mock(free=10**6 - 1)),
    ],
)
def test_a_fetched_archive_stays_if_something_else_prevents_its_use(
    owner, name, value, hub, monkeypatch, tmp_path
):
    """No permission, a stop, no room for what is in it."""
    archive = put(hub, monkeypatch, "eurosat", {IMAGE: bytes(10**6)})
    monkeypatch.setattr(owner, name, value)
    with pytest.raises((BadInput, KeyboardInterrupt)):
        load_split("eurosat", tmp_path / "data")
    assert tree(tmp_path / "data") == {"eurosat.fetching/eurosat.zip": archive}


def test_no_entry_of_an_archive_is_written_outside(hub, monkeypatch, eurosat_files, tmp_path):
    outside = {"../../up.jpg": b"x", f"{tmp_path}/full.jpg": b"x"}
    put(hub, monkeypatch, "eurosat", outside | eurosat_files)
    check_eurosat(tmp_path / "data", eurosat_files)
    assert not (tmp_path / "full.jpg").exists()


# ---------------------------------------------------------------------------------- CLIP's weights


WEIGHTS = clip_model.TINY_CLIP.read_bytes()
DIGEST = hashlib.sha256(WEIGHTS).hexdigest()


def test_three_addresses_are_tried_for_clips_weights(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_ENDPOINT", "https://mirror.example/")
    monkeypatch.setattr(clip_model, "CLIP_CACHE", tmp_path)
    monkeypatch.setattr(clip_model, "download", fetch := Mock())
    path = clip_model._fetch("ViT-B/16")
    sha256 = "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f"
    urls = (
        f"https://openaipublic.azureedge.net/clip/models/{sha256}/ViT-B-16.pt",
        "https://mirror.example/jinaai/clip-models/resolve/main/ViT-B-16.pt",
        "https://clip-as-service.s3.us-east-2.amazonaws.com/models/torch/ViT-B-16.pt",
    )
    fetch.assert_called_once_with(urls, path, ANY, sha256)


@pytest.mark.parametrize(
    "part, requests",
    [
        (WEIGHTS[:1000], [999]),
        # A part of another file is noticed at the end, and the same address asked for all of it.
        (bytes(1000), [999, None]),
    ],
)
def test_a_part_is_continued_by_the_first_address_that_answers(part, requests, hub, tmp_path):
    (tmp_path / "clip.pt.part").write_bytes(part)
    hub.files |= {"first": WEIGHTS, "second": b"not asked for"}
    urls = [f"{hub.address}/{name}" for name in ("gone", "first", "second")]
    download.download(urls, tmp_path / "clip.pt", "way out", DIGEST)
    assert tree(tmp_path) == {"clip.pt": WEIGHTS}
    assert hub.requests == requests


def test_clips_weights_arrive_once_for_two_runs_over_a_bad_line(hub, monkeypatch, tmp_path):
    monkeypatch.setitem(clip.clip._MODELS, "ViT-B/16", f"{hub.address}/clip/{DIGEST}/ViT-B-16.pt")
    monkeypatch.setattr(clip_model, "CLIP_CACHE", tmp_path / "cache")
    monkeypatch.setattr(clip_model, "BUCKET", "http://127.0.0.1:9")  # nobody listens there
    hub.files["ViT-B-16.pt"] = WEIGHTS[:-1] + b"x"
    reasons = (
        f"{hub.address}/clip/.*wrong SHA-256.*, {hub.address}/jinaai/.*wrong SHA-256.*,"
        " http://127.0.0.1:9/.*refused.*: put that file at .*ViT-B-16.pt or name another"
    )
    with pytest.raises(BadInput, match=reasons):
        load_clip("ViT-B/16", "cpu")
    assert not (tmp_path / "cache").exists()
    hub.files["ViT-B-16.pt"], hub.sent, hub.plan = WEIGHTS, 0, [("cut", 100_000)]
    assert twice(lambda: clip_model._fetch("ViT-B/16")) == 2 * [tmp_path / "cache/ViT-B-16.pt"]
    assert load_clip("ViT-B/16", "cpu")[1] == load_clip("bundled", "cpu")[1]
    assert [file.name for file in (tmp_path / "cache").iterdir()] == ["ViT-B-16.pt"]
    assert hub.sent == len(WEIGHTS)
    (tmp_path / "cache/ViT-B-16.pt").write_bytes(b"half a download")
    assert clip_model._fetch("ViT-B/16").read_bytes() == WEIGHTS
