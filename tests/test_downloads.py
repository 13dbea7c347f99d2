"""Every download, rehearsed: a stand-in for the internet on the loopback address.

A proxy with a certificate authority of its own answers as each real host does: Google Drive's page
for files too large to scan, redirects to other hosts, connections cut halfway. The code is the real
one of torchvision, gdown and torch.hub in a process of its own; only checksums are those of the
archives made here, which have the real inner trees, junk included, and as many tiny images as the
real ones.
"""

import hashlib
import io
import json
import os
import shutil
import signal
import ssl
import subprocess
import sys
import tarfile
import time
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import parse_qs, urlsplit

import clip
import pytest
import torch
from PIL import Image

from lib.catalogue import DATASETS
from lib.clip_model import load_clip

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not shutil.which("openssl"), reason="makes its certificates with openssl"),
]
ROOT = Path(__file__).parents[1]
FETCHED = [name for name, row in DATASETS.items() if row.archive]
DRIVE, CONTENT = "drive.google.com", "drive.usercontent.google.com"
HOSTS = [DRIVE, CONTENT, "cdn.example.org", "openaipublic.azureedge.net"]
HOSTS += [urlsplit(DATASETS[name].archive[0]).netloc for name in FETCHED]


# ------------------------------------------------------------------------- the internet's stand-in


class Web(ThreadingHTTPServer):
    """A proxy that is all hosts at once. files: {(host, path): bytes} and {Drive id: bytes}."""

    def __init__(self, folder):
        super().__init__(("127.0.0.1", 0), Answer)
        self.handle_error = lambda *args: None  # a client that hung up
        self.files, self.cut, self.served, self.slow = {}, set(), [], 0.0
        self.tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.tls.load_cert_chain(*make_certificates(folder))


class Answer(BaseHTTPRequestHandler):
    host = None

    def log_message(self, *args):
        pass

    def do_CONNECT(self):
        self.wfile.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
        self.host = self.path.split(":")[0]
        self.connection = self.server.tls.wrap_socket(self.connection, server_side=True)
        self.rfile, self.wfile = self.connection.makefile("rb"), self.connection.makefile("wb")
        self.handle_one_request()

    def do_GET(self):
        url = urlsplit(self.path)
        host, query, web = self.host or url.netloc, parse_qs(url.query), self.server
        drive_id = query.get("id", [url.path.split("/")[-1]])[0]
        if host == DRIVE and drive_id in web.files:
            if len(web.files[drive_id]) < 100_000:
                return self.answer(303, {"Location": f"https://{CONTENT}/download?id={drive_id}"})
            return self.answer(200, {"Content-Type": "text/html"}, too_large_page(drive_id))
        if host == CONTENT and drive_id in web.files:
            if len(web.files[drive_id]) > 100_000 and query.get("confirm") != ["t"]:
                return self.answer(200, {"Content-Type": "text/html"}, too_large_page(drive_id))
            name = {"Content-Disposition": 'attachment; filename="file"'}
            return self.answer(200, name, web.files[drive_id], drive_id)
        if (
            host == "huggingface.co" or host == "data.caltech.edu"
        ):  # these keep their files elsewhere
            return self.answer(302, {"Location": f"https://cdn.example.org/{host}{url.path}"})
        if host == "cdn.example.org":
            _, host, path = url.path.split("/", 2)
            url = url._replace(path=f"/{path}")
        content = web.files.get((host, url.path))
        if content is None:
            return self.answer(404, {}, b"<html>not here</html>")
        return self.answer(200, {}, content, (host, url.path))

    def answer(self, status, headers, body=b"", key=None):
        self.send_response(status)
        headers = {"Content-Type": "application/octet-stream", **headers}
        for name, value in {"Content-Length": len(body), "Connection": "close", **headers}.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.close_connection = True
        if key is not None and "HEAD" not in str(self.headers.get("Method")):
            self.server.served.append(key)
            time.sleep(self.server.slow)
            if key in self.server.cut:
                body = body[: len(body) // 2]
        self.wfile.write(body)
        self.wfile.flush()


def too_large_page(drive_id):
    return f"""<html><body><p>Google Drive can't scan this file for viruses.</p>
    <form id="download-form" action="https://{CONTENT}/download" method="get">
    <input type="hidden" name="id" value="{drive_id}"><input type="hidden" name="confirm" value="t">
    <input type="hidden" name="export" value="download"></form></body></html>""".replace(
        "\n", ""
    ).encode()


def make_certificates(folder):
    """A throw-away authority, ca.pem, and one certificate for all hosts: (certificate, key)."""

    def openssl(*args):
        subprocess.run(["openssl", *args], cwd=folder, check=True, capture_output=True)

    new_key = ["-newkey", "rsa:2048", "-nodes", "-keyout"]
    usage = ["-addext", "keyUsage=critical,keyCertSign"]
    openssl("req", "-x509", *new_key, "ca.key", "-out", "ca.pem", "-subj", "/CN=none", *usage)
    openssl("req", *new_key, "leaf.key", "-out", "leaf.csr", "-subj", "/CN=all")
    names = ",".join(f"DNS:{host}" for host in HOSTS)
    (folder / "names").write_text(f"subjectAltName={names}\nauthorityKeyIdentifier=keyid\n")
    signed = ["-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-extfile", "names"]
    openssl("x509", "-req", "-in", "leaf.csr", *signed, "-out", "leaf.pem")
    return folder / "leaf.pem", folder / "leaf.key"


@pytest.fixture
def web(tmp_path):
    with Web(tmp_path) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def start(web, tmp_path):
    """Starts Python code in a process whose internet is `web`."""
    proxy = f"http://127.0.0.1:{web.server_address[1]}"
    environment = {**os.environ, "HOME": str(tmp_path), "OMP_NUM_THREADS": "1", "no_proxy": ""}
    environment |= dict.fromkeys(("http_proxy", "https_proxy"), proxy)
    environment |= dict.fromkeys(("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE"), str(tmp_path / "ca.pem"))

    def run(code, *args):
        command = [sys.executable, "-c", code, *map(str, args)]
        pipe = subprocess.PIPE
        return subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, text=True
        )

    return run


def end(process):
    """(exit status, standard output, last line of standard error)"""
    out, error = process.communicate(timeout=300)
    return process.returncode, out, (error.strip().splitlines() or [""])[-1]


# ------------------------------------------------------------------- archives with the real trees

buffer = io.BytesIO()
Image.new("RGB", (8, 8), "red").save(buffer, "JPEG")
JPEG = buffer.getvalue()


def tarred(files):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz", compresslevel=1) as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return out.getvalue()


def zipped(files):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return out.getvalue()


def make_split(dataset):
    """A split with the real one's counts, over the dataset's real kind of paths."""
    counts, row = DATASETS[dataset].counts, DATASETS[dataset]
    classes = {"oxford_pets": 37, "oxford_flowers": 102, "sun397": 397}.get(dataset, 50)
    named = row.folder_names or {}
    named = [name for name, shown in named.items() if shown]
    split, number = {}, 0
    for part, n in zip(("train", "val", "test"), counts):
        split[part] = []
        for i in range(n):
            label, number = i % classes, number + 1
            folder = named[label] if label < len(named) else f"Class_{label}"
            path = {
                "oxford_pets": f"Breed_{label}_{number}.jpg",
                "oxford_flowers": f"image_{number:05d}.jpg",
                "sun397": f"a/{folder}/sun_{number}.jpg",
            }.get(dataset, f"{folder}/{number}.jpg")
            split[part].append([path, label, f"class {label}"])
    return split


def make_archive(dataset, split):
    """The archive as it is distributed: its tree, what lies beside the images, a Mac's junk."""
    images = {path: JPEG for part in split.values() for path, *_ in part}

    def below(folder):
        return {f"{folder}/{path}": content for path, content in images.items()}

    if dataset == "caltech101":
        inner = tarred(below("101_ObjectCategories"))
        return zipped(
            {
                "caltech-101/101_ObjectCategories.tar.gz": inner,
                "caltech-101/Annotations.tar": tarred({"Annotations/x.mat": b"x"}),
                "caltech-101/show_annotation.m": b"% matlab",
                "__MACOSX/caltech-101/._101_ObjectCategories.tar.gz": b"\0\5\26\7 a Mac's",
            }
        )
    if dataset == "eurosat":
        return zipped(below("2750"))
    if dataset == "ucf101":
        junk = {"__MACOSX/UCF-101-midframes/._Class_0": b"\0\5\26\7", "__MACOSX/._x": b"x"}
        return zipped(below("UCF-101-midframes") | junk)
    return tarred(
        {
            "oxford_pets": lambda: below("images") | {"images/Abyssinian_100.mat": b"x"},
            "oxford_flowers": lambda: below("jpg"),
            "food101": lambda: below("food-101/images") | {"food-101/meta/classes.txt": b"x"},
            "sun397": lambda: below("SUN397") | {"SUN397/ClassName.txt": b"x"},
            "dtd": lambda: below("dtd/images") | {"dtd/labels/x.txt": b"x", "dtd/imdb/x": b"x"},
            "fgvc_aircraft": lambda: aircraft_files(),
        }[dataset]()
    )


def aircraft_files():
    top, files, number = "fgvc-aircraft-2013b/data", {}, 0
    names = [f"variant {i}" for i in range(100)]
    files[f"{top}/variants.txt"] = "\n".join(names).encode()
    for part, n in zip(("train", "val", "test"), DATASETS["fgvc_aircraft"].counts):
        lines = []
        for i in range(n):
            number += 1
            files[f"{top}/images/{number:07d}.jpg"] = JPEG
            lines.append(f"{number:07d} {names[i % 100]}")
        files[f"{top}/images_variant_{part}.txt"] = "\n".join(lines).encode()
    return files | {"fgvc-aircraft-2013b/evaluation.m": b"% matlab"}


def put(web, dataset):
    """Puts a dataset's archive and split on the web: (checksum, where the archive is)."""
    row = DATASETS[dataset]
    split = make_split(dataset) if row.split else {}
    archive = make_archive(dataset, split)
    url = urlsplit(row.archive[0])
    key = url.path.split("/")[-1] if url.netloc == DRIVE else (url.netloc, url.path)
    web.files[key] = archive
    if row.split:
        web.files[row.drive_id] = json.dumps(split).encode()
    return hashlib.md5(archive).hexdigest(), key


LOAD = """
import sys
from dataclasses import replace
from data import load_split
from lib.catalogue import DATASETS
from lib.errors import exit_on_bad_input
name, root, md5 = sys.argv[1:]
url, own = DATASETS[name].archive
DATASETS[name] = replace(DATASETS[name], archive=(url, own and md5))
def load():
    split = load_split(name, root)
    counts = len(split.train), len(split.val), len(split.test)
    print("got", split.source, split.samples, *counts)
exit_on_bad_input(load)
"""
# What DATASETS.md of CoOp shows in each folder; more may lie beside it.
TREES = {
    "caltech101": {"101_ObjectCategories", "split_zhou_Caltech101.json"},
    "oxford_pets": {"images", "split_zhou_OxfordPets.json"},
    "oxford_flowers": {"jpg", "split_zhou_OxfordFlowers.json"},
    "food101": {"images", "meta", "split_zhou_Food101.json"},
    "fgvc_aircraft": {"images", "variants.txt", *(f"images_variant_{p}.txt" for p in ("train",))},
    "sun397": {"SUN397", "split_zhou_SUN397.json"},
    "dtd": {"images", "imdb", "labels", "split_zhou_DescribableTextures.json"},
    "eurosat": {"2750", "split_zhou_EuroSAT.json"},
    "ucf101": {"UCF-101-midframes", "split_zhou_UCF101.json"},
}


@pytest.mark.parametrize("dataset", FETCHED)
def test_a_dataset_arrives_whatever_happens_on_the_way(dataset, web, start, tmp_path):
    """Damaged, then cut halfway, then killed, then fetched by two processes at once."""
    md5, key = put(web, dataset)
    whole, data, row = web.files[key], tmp_path / "data", DATASETS[dataset]
    folder = data / row.folder

    middle = len(whole) // 2
    web.files[key] = (
        whole[:middle]
        + bytes(b ^ 255 for b in whole[middle : middle + 64])
        + (whole[middle + 64 :])
    )
    status, _, error = end(start(LOAD, dataset, data, md5))
    assert status == 2 and f"no images at {folder / row.images}, and downloading" in error
    assert not data.exists()

    web.files[key] = whole
    web.cut.add(key)
    status, _, error = end(start(LOAD, dataset, data, md5))
    assert status == 2 and "and downloading" in error and not data.exists()

    web.cut.clear()
    web.slow = 3.0
    process = start(LOAD, dataset, data, md5)
    served = len(web.served)
    while len(web.served) == served:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert list(folder.glob(".fetching-*"))  # it could not tidy up

    web.served.clear()
    both = [start(LOAD, dataset, data, md5) for _ in range(2)]
    counts = " ".join(map(str, row.counts))
    for process in both:
        status, out, error = end(process)
        assert status == 0 and f"got coop coop {counts}" in out, error
    assert web.served.count(key) == 1
    found = {path.name for path in folder.iterdir()}
    assert found >= TREES[dataset]
    assert not any(name.startswith((".fetching", "__MACOSX", "._")) for name in found)


@pytest.mark.parametrize("dataset", ["eurosat", "ucf101"])
def test_what_is_no_longer_there_is_said_in_one_line(dataset, web, start, tmp_path):
    status, out, error = end(start(LOAD, dataset, tmp_path / "data", "0" * 32))
    assert status == 2 and "by hand" in error and "Traceback" not in error
    assert not (tmp_path / "data").exists()


def test_imagenets_class_names_arrive_from_google_drive(web, start, tmp_path):
    lines = [f"n{i:08d} name {i}" for i in range(1000)]
    row = DATASETS["imagenet"]
    for part in ("train", "val"):
        for line in lines[:2]:
            file = tmp_path / f"data/imagenet/images/{part}/{line.split()[0]}/x.JPEG"
            file.parent.mkdir(parents=True)
            file.write_bytes(JPEG)
    code = LOAD.replace("url, own = DATASETS[name].archive\n", "").replace(
        "DATASETS[name] = replace(DATASETS[name], archive=(url, own and md5))\n", ""
    )
    status, _, error = end(start(code, "imagenet", tmp_path / "data", ""))
    assert status == 2 and "no file" in error and "classnames.txt" in error
    web.files[row.drive_id] = "\n".join(lines).encode()
    status, out, error = end(start(code, "imagenet", tmp_path / "data", ""))
    assert status == 0 and "got coop own 2 0 2" in out, error


FETCH_CLIP = """
import clip, sys
from lib.clip_model import load_clip
from lib.errors import exit_on_bad_input
clip.clip._MODELS["ViT-B/16"] = sys.argv[1]
exit_on_bad_input(lambda: print("got", load_clip("ViT-B/16", "cpu")[1]))
"""


def test_clips_weights_arrive(web, start, tmp_path, random_clip_file):
    content = random_clip_file.read_bytes()
    path = f"/clip/models/{hashlib.sha256(content).hexdigest()}/ViT-B-16.pt"
    assert urlsplit(clip.clip._MODELS["ViT-B/16"]).netloc == "openaipublic.azureedge.net"
    url = f"https://openaipublic.azureedge.net{path}"
    key, cached = ("openaipublic.azureedge.net", path), tmp_path / ".cache/clip"
    status, _, error = end(start(FETCH_CLIP, url))
    assert status == 2 and "cannot download CLIP ViT-B/16" in error  # 404
    for damaged in (content[:1000] + b"x" + content[1001:], content):
        web.files[key] = damaged
        web.cut = {key} if damaged is content else set()
        status, _, error = end(start(FETCH_CLIP, url))
        assert status == 2 and "cannot download CLIP ViT-B/16" in error
        assert not list(cached.glob("*"))
    web.cut = set()
    both = [start(FETCH_CLIP, url) for _ in range(2)]
    fingerprint = load_clip(random_clip_file, torch.device("cpu"))[1]
    for process in both:
        status, out, error = end(process)
        assert status == 0 and f"got {fingerprint}" in out, error
    assert [file.name for file in cached.iterdir()] == ["ViT-B-16.pt"]
