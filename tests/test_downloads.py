"""Every download, rehearsed against a small copy of the hub on the loopback address.

Nothing is replaced but the address (`HF_ENDPOINT`; for CLIP's weights the one in clip's own table)
and the SHA-256 of the three archives whose real one is known.
"""

import hashlib
import io
import json
import os
import re
import signal
import socket
import struct
import threading
import time
import zipfile
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import clip
import pytest
from PIL import Image
from test_datasets import make_layout

from data import load_split
from lib import clip_model, download
from lib.catalogue import DATASETS, HUB, REVISION
from lib.clip_model import load_clip
from lib.runs import BadInput

FETCHED = [name for name, row in DATASETS.items() if row.archive]
SPLIT = "split_zhou_EuroSAT.json"


# ------------------------------------------------------------------------------------- the server


class Hub(ThreadingHTTPServer):
    """Redirects an archive's address to another path, as the hub does, and knows ranges.

    files: {name: content}. plan: how the next replies behave: ("cut", n) closes the connection
    after n bytes, ("reset", n) resets it, ("hold", n) sends nothing more for a while, and
    ("no ranges", 0) ignores a range. requests: the first byte that each asked for, None for all.
    """

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answer)
        self.files, self.plan, self.sent, self.requests = {}, [], 0, []
        self.handle_error = lambda *args: None  # a client that hung up
        self.address = f"http://127.0.0.1:{self.server_address[1]}"


class Answer(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        folder, _, name = self.path.rpartition("/")
        if folder == f"/{HUB}/resolve/{REVISION}":
            self.reply(302, Location=f"/cdn/{name}")
        elif name in self.server.files:
            self.send_file(self.server.files[name])
        else:
            self.reply(404)

    def reply(self, status, **headers):
        self.send_response(status)
        for key, value in {"Content_Length": 0, **headers}.items():
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
        ranges = {"Content_Range": f"bytes {start}-{len(content) - 1}/{len(content)}"}
        self.reply(206 if start else 200, Content_Length=len(body), **(ranges if start else {}))
        if what in ("cut", "reset", "hold"):
            body = body[:n]
        self.wfile.write(body)
        self.wfile.flush()
        hub.sent += len(body)
        if what == "hold":
            time.sleep(5)
        if what == "reset":
            time.sleep(0.2)  # a reset discards what the other side has not read yet
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()


@pytest.fixture
def hub(monkeypatch):
    with Hub() as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        monkeypatch.setenv("HF_ENDPOINT", server.address)
        monkeypatch.setattr(download, "STALL", 1.0)
        yield server
        server.shutdown()


# ------------------------------------------------------------------------------------ the archives


def zipped(files):
    """A zip file of {name: content}."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return out.getvalue()


def tree(root):
    """{path below root: content} of everything in a folder."""
    files = [path for path in sorted(root.rglob("*")) if path.is_file()]
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in files}


def put(hub, monkeypatch, dataset, files):
    """Puts an archive of files on the hub, and the number of its images into the catalogue."""
    archive, row = zipped(files), DATASETS[dataset]
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


# ------------------------------------------------------------------------------------- one dataset


@pytest.mark.parametrize("dataset", FETCHED)
def test_every_dataset_arrives_as_datasets_md_shows_it(dataset, hub, monkeypatch, tmp_path):
    make_layout(tmp_path / "whole", dataset)
    names = tmp_path / "whole/imagenet/classnames.txt"
    if names.is_file():  # a variant's archive may bring its own
        names.rename(tmp_path / "whole" / DATASETS[dataset].folder / "classnames.txt")
        names.parent.rmdir()
    put(hub, monkeypatch, dataset, tree(tmp_path / "whole"))
    fetched, whole = (load_split(dataset, tmp_path / root) for root in ("new", "whole"))
    assert fetched.class_names == whole.class_names and fetched.source == "coop"
    assert [fetched.train, fetched.val, fetched.test] == [whole.train, whole.val, whole.test]
    assert tree(tmp_path / "new") == tree(tmp_path / "whole")
    assert len(FETCHED) == 14


def test_an_address_is_the_hubs_at_one_revision(monkeypatch):
    from lib.catalogue import archive_url

    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    assert archive_url(DATASETS["food101"]) == (
        "https://huggingface.co/zhengli97/prompt_learning_dataset/resolve/"
        "ceb3112337fb6e1bf71534e355ca5569b63f19a6/food101.zip"
    )


@pytest.mark.parametrize("how", ["cut", "reset"])
def test_a_lost_connection_is_taken_up_where_it_was(
    how, hub, eurosat_archive, eurosat_files, tmp_path
):
    hub.plan = [(how, 10_000), (how, 5_000)]
    check_eurosat(tmp_path / "data", eurosat_files)
    first, second, third = hub.requests
    if how == "cut":
        assert (first, second, third) == (None, 10_000, 15_000)
        assert hub.sent == len(eurosat_archive)
    else:  # a reset may take along what was sent just before
        assert first is None and 0 < second < third <= 15_000


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
    assert hub.sent == len(eurosat_archive)


def test_what_is_complete_but_not_yet_renamed_is_not_fetched_again(
    hub, eurosat_archive, eurosat_files, tmp_path
):
    part = tmp_path / "data/eurosat.fetching/eurosat.zip.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(eurosat_archive)
    check_eurosat(tmp_path / "data", eurosat_files)
    assert hub.sent == 0


def test_a_part_that_is_longer_than_the_file_is_thrown_away(
    hub, eurosat_archive, eurosat_files, tmp_path
):
    part = tmp_path / "data/eurosat.fetching/eurosat.zip.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(eurosat_archive + b"x")
    check_eurosat(tmp_path / "data", eurosat_files)
    assert hub.sent == len(eurosat_archive)


@pytest.mark.parametrize("known", [True, False])
def test_a_flipped_bit_is_found_with_and_without_a_known_sha256(
    known, hub, monkeypatch, eurosat_archive, eurosat_files, tmp_path
):
    if not known:
        monkeypatch.setitem(DATASETS, "eurosat", replace(DATASETS["eurosat"], sha256=""))
    damaged = bytearray(eurosat_archive)
    damaged[len(damaged) // 2] ^= 4
    hub.files["eurosat.zip"] = bytes(damaged)
    said = (
        r"arrived damaged .* removed: try again" if known else "is damaged .*: removed, try again"
    )
    with pytest.raises(BadInput, match=said):
        load_split("eurosat", tmp_path / "data")
    assert not (tmp_path / "data").exists()
    hub.files["eurosat.zip"] = eurosat_archive
    check_eurosat(tmp_path / "data", eurosat_files)


# ------------------------------------------------------------------------------- several processes

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")


def start(action):
    """Runs `action` in a process of its own: its number."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            action()
            status = 0
        finally:
            os._exit(status)
    return pid


def wait_for(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@needs_fork
def test_a_process_killed_while_downloading_leaves_what_it_has(
    hub, eurosat_archive, eurosat_files, tmp_path
):
    hub.plan = [("hold", 10_000)]
    pid = start(lambda: load_split("eurosat", tmp_path / "data"))
    part = tmp_path / "data/eurosat.fetching/eurosat.zip.part"
    wait_for(lambda: part.is_file() and part.stat().st_size >= 8192)  # a buffer full
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    have = part.stat().st_size
    check_eurosat(tmp_path / "data", eurosat_files)
    assert hub.requests == [None, have]
    assert hub.sent == 10_000 + len(eurosat_archive) - have


@needs_fork
def test_a_process_killed_while_unpacking_leaves_the_archive(
    hub, monkeypatch, eurosat_archive, eurosat_files, tmp_path
):
    def unpack_half(archive, files):
        (files / "eurosat/2750").mkdir(parents=True)
        os.kill(os.getpid(), signal.SIGKILL)

    with monkeypatch.context() as patch:
        patch.setattr(download, "_unpack", unpack_half)
        pid = start(lambda: load_split("eurosat", tmp_path / "data"))
        os.waitpid(pid, 0)
    assert not (tmp_path / "data/eurosat").exists()
    assert (tmp_path / "data/eurosat.fetching/files/eurosat").is_dir()
    check_eurosat(tmp_path / "data", eurosat_files)
    assert hub.sent == len(eurosat_archive)  # once


@needs_fork
def test_of_two_processes_one_fetches_and_the_other_finds_it(
    hub, eurosat_archive, eurosat_files, tmp_path
):
    hub.plan = [("cut", 10_000)]  # so that it takes a moment
    pids = [start(lambda: load_split("eurosat", tmp_path / "data")) for _ in range(2)]
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0, 0]
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


def test_an_archive_that_is_not_there_is_said_at_once(hub, tmp_path):
    said = refused(tmp_path / "data")
    assert "eurosat.zip (HTTP Error 404: Not Found): try again, put eurosat.zip into" in said


def test_without_a_network_it_ends_at_once(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    assert "Connection refused" in refused(tmp_path / "data")
    monkeypatch.setenv("HF_ENDPOINT", "hub.example.org")
    assert "unknown url type" in refused(tmp_path / "data")


def swallow(monkeypatch, tmp_path):
    """How long a host that takes connections and never answers is waited for."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        start = time.monotonic()
        assert "eurosat.zip (" in refused(tmp_path / "data")
        return time.monotonic() - start


def test_a_host_that_swallows_packets_is_given_up(hub, monkeypatch, tmp_path):
    assert 0.5 < swallow(monkeypatch, tmp_path) < 3


@pytest.mark.slow
def test_a_host_that_swallows_packets_is_given_up_within_half_a_minute(monkeypatch, tmp_path):
    assert swallow(monkeypatch, tmp_path) < 30


def test_a_name_server_that_swallows_packets_is_given_up(hub, monkeypatch, tmp_path):
    over = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args: over.wait(20))
    assert "no answer" in refused(tmp_path / "data")
    over.set()


def test_a_disk_without_room_for_archive_and_content_is_said_first(
    hub, monkeypatch, eurosat_archive, tmp_path
):
    usage = type("Usage", (), {"free": 2 * len(eurosat_archive) - 1})
    monkeypatch.setattr(download.shutil, "disk_usage", lambda folder: usage)
    assert re.search("no room for .*eurosat.zip: 0.00 GB are free", refused(tmp_path / "data"))


@needs_fork
@pytest.mark.parametrize("room", [10_000, 1_000_000])
def test_a_disk_that_fills_up_is_said(room, hub, monkeypatch, eurosat_files, tmp_path):
    """Tried with the limit that a process can have on a file's size: of the archive, or of one that
    is unpacked."""
    import resource

    archive = zipped(eurosat_files)
    if room > len(archive):
        big = io.BytesIO()
        with zipfile.ZipFile(big, "w", zipfile.ZIP_DEFLATED) as file:
            file.writestr("eurosat/2750/big.jpg", bytes(2 * room))
        archive = big.getvalue()
    hub.files["eurosat.zip"] = archive
    monkeypatch.setitem(DATASETS, "eurosat", replace(DATASETS["eurosat"], sha256=""))

    def load():
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
        with pytest.raises(BadInput, match="cannot (write|unpack) .*eurosat.zip.*File too large"):
            load_split("eurosat", tmp_path / "data")

    assert os.waitpid(start(load), 0)[1] == 0
    (left,) = tree(tmp_path / "data").items()  # is used when there is room
    assert left[1] == archive[:room]


def test_a_root_that_cannot_be_written_is_said(hub, eurosat_archive, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match="cannot write in .*file: name another --data"):
        load_split("eurosat", tmp_path / "file")
    assert hub.sent == 0


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


def test_a_users_own_archive_that_is_damaged_is_named_and_stays(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/eurosat.zip").write_bytes(b"half of one")
    with pytest.raises(BadInput, match="eurosat.zip is damaged .*: remove it"):
        load_split("eurosat", tmp_path / "data")
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["eurosat.zip"]


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


def test_an_archive_without_the_images_is_said_and_kept(hub, monkeypatch, tmp_path):
    put(
        hub,
        monkeypatch,
        "eurosat",
        {"eurosat/EuroSAT_RGB/Forest/1.jpg": b"", f"eurosat/{SPLIT}": b""},
    )
    with pytest.raises(BadInput, match="eurosat.zip has no folder 2750: unpack it as .*eurosat"):
        load_split("eurosat", tmp_path / "data")
    assert list(tree(tmp_path / "data")) == ["eurosat.fetching/eurosat.zip"]


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


@pytest.mark.parametrize("dataset, found", [("eurosat", "EuroSAT_RGB"), ("dtd", "dtd/images")])
def test_images_that_lie_elsewhere_are_said_instead_of_fetched_twice(dataset, found, hub, tmp_path):
    (tmp_path / "data" / dataset / found).mkdir(parents=True)
    row, name = DATASETS[dataset], found.split("/")[0]
    said = rf"no .*{dataset}/{row.images} \(.*{dataset} holds {name}\): expected .*DATASETS.md"
    with pytest.raises(BadInput, match=said):
        load_split(dataset, tmp_path / "data")
    assert hub.requests == []


def test_imagenet_is_brought_along(hub, tmp_path):
    said = refused(tmp_path / "data", "imagenet")
    assert "no " in said and "imagenet/images" in said and "https://image-net.org" in said
    assert "images/train/<synset>/*.JPEG" in said and "classnames.txt" in said
    assert hub.requests == []


def test_a_variant_without_class_names_says_where_they_are_before_it_is_fetched(
    hub, monkeypatch, tmp_path, capsys
):
    make_layout(tmp_path / "whole", "imagenet_r")
    names = tmp_path / "whole/imagenet/classnames.txt"
    files = {name: c for name, c in tree(tmp_path / "whole").items() if "classnames" not in name}
    put(hub, monkeypatch, "imagenet_r", files)
    with pytest.raises(BadInput, match="no .*imagenet/classnames.txt .*DATASETS.md"):
        load_split("imagenet_r", tmp_path / "data")
    said = capsys.readouterr().out
    assert said.index("1-61f_ol79pViBFDG_IDlUQSwoLcn2XXF") < said.index("downloading")
    (tmp_path / "data/imagenet").mkdir()
    names.rename(tmp_path / "data/imagenet/classnames.txt")
    assert len(load_split("imagenet_r", tmp_path / "data").test) == 10
    assert "1-61f" not in capsys.readouterr().out and len(hub.requests) == 1


# ---------------------------------------------------------------------------------- CLIP's weights


@needs_fork
def test_clips_weights_arrive_once_for_two_processes_over_a_bad_line(
    hub, monkeypatch, tmp_path, random_clip_file, capsys
):
    content = random_clip_file.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    monkeypatch.setitem(clip.clip._MODELS, "ViT-B/16", f"{hub.address}/clip/{digest}/ViT-B-16.pt")
    monkeypatch.setattr(clip_model, "CLIP_CACHE", tmp_path / "cache")
    with pytest.raises(BadInput, match="404.*: put that file at .*ViT-B-16.pt or name another"):
        load_clip("ViT-B/16", "cpu")
    assert not (tmp_path / "cache").exists()
    hub.files["ViT-B-16.pt"] = content[:-1] + b"x"
    with pytest.raises(BadInput, match="arrived damaged"):
        load_clip("ViT-B/16", "cpu")
    assert not (tmp_path / "cache").exists()
    hub.files["ViT-B-16.pt"], hub.sent, hub.plan = content, 0, [("cut", 100_000)]
    pids = [start(lambda: clip_model._fetch("ViT-B/16")) for _ in range(2)]
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0, 0]
    assert load_clip("ViT-B/16", "cpu")[1] == load_clip(random_clip_file, "cpu")[1]
    assert [file.name for file in (tmp_path / "cache").iterdir()] == ["ViT-B-16.pt"]
    assert hub.sent == len(content)


# -------------------------------------------------------------------------------- the real numbers


@pytest.mark.slow
def test_27000_images_arrive(hub, tmp_path, monkeypatch):
    """As many as EuroSAT has, in folders as it has them."""
    image = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(image, "JPEG")
    files, split = {}, {"train": [], "val": [], "test": []}
    for part, n in (("train", 1350), ("val", 540), ("test", 810)):
        for label in range(10):
            for i in range(n):
                path = f"Class{label}/{part}_{i}.jpg"
                files[f"eurosat/2750/{path}"] = image.getvalue()
                split[part].append([path, label, f"class {label}"])
    files[f"eurosat/{SPLIT}"] = json.dumps(split)
    archive = put(hub, monkeypatch, "eurosat", files)
    hub.plan = [("cut", len(archive) // 3)]
    split = load_split("eurosat", tmp_path / "data")
    assert (len(split.train), len(split.val), len(split.test)) == (13500, 5400, 8100)
    assert split.samples == "coop" and hub.sent == len(archive)
