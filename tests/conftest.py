"""Things that several tests need: tiny CLIPs, a EuroSAT folder with drawn images, one command."""

import contextlib
import gzip
import json
import random
import shutil
import sys
from pathlib import Path
from unittest import mock

import clip
import pytest
import torch
from clip.model import CLIP
from PIL import Image

import eval
import train
from lib import cache as feature_cache
from lib import flags

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def outside_world(cache, monkeypatch):
    """No test reads or writes the user's feature cache, or reaches the network."""
    monkeypatch.setattr(feature_cache, "CACHE", cache)
    for proxy in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(proxy, "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture(scope="session")
def random_clip(eurosat):
    """A CLIP of random weights with CLIP's whole vocabulary: 2 layers, 64 wide, 32-pixel images.

    To such a CLIP all images look alike, and all sentences. What they have in common is taken away:
    then it sees differences, and its answers are of all kinds.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = CLIP(64, 32, 2, 64, 8, 77, 49408, 64, 1, 2).float()
    files = sorted(eurosat.rglob("*.jpg"))
    pixels = torch.stack([clip.clip._transform(32)(Image.open(file)) for file in files])
    words = clip.tokenize([f"a photo of a {file.parent.name}." for file in files[::5]])
    with torch.no_grad():
        image, text = model.encode_image(pixels).mean(0), model.encode_text(words).mean(0)
        model.visual.ln_post.bias -= torch.linalg.solve(model.visual.proj.T, image)
        model.ln_final.bias -= torch.linalg.solve(model.text_projection.T, text)
    return model.requires_grad_(False).eval()


@pytest.fixture(scope="session")
def random_clip_file(random_clip, tmp_path_factory):
    path = tmp_path_factory.mktemp("clip") / "random.pt"
    torch.save(random_clip.state_dict(), path)
    return path


def draw_image(path, seed):
    """A small JPEG of a few coloured boxes."""
    rng = random.Random(seed)
    image = Image.new("RGB", (64, 64))
    for _ in range(4):
        corner = rng.randrange(48), rng.randrange(48)
        image.paste(tuple(rng.choices(range(256), k=3)), (*corner, corner[0] + 16, corner[1] + 16))
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


@pytest.fixture(scope="session")
def eurosat(tmp_path_factory):
    """A data root with EuroSAT in the field's layout: real names, a shortened split (8 train, 5
    val and 3 test images a class), drawn images."""
    root = tmp_path_factory.mktemp("data")
    real = json.loads(gzip.decompress((HERE / "eurosat_train_val.json.gz").read_bytes()))
    split = {"train": [], "val": [], "test": []}
    for label in range(10):
        train_items = [entry for entry in real["train"] if entry[1] == label]
        split["train"] += train_items[:8]
        split["val"] += [entry for entry in real["val"] if entry[1] == label][:5]
        split["test"] += train_items[8:11]
    for part in split.values():
        random.Random(0).shuffle(part)
        for path, _, _ in part:
            draw_image(root / "eurosat/2750" / path, path)
    (root / "eurosat/split_zhou_EuroSAT.json").write_text(json.dumps(split))
    return root


@pytest.fixture
def own_eurosat(eurosat, tmp_path):
    """A copy that a test may damage."""
    shutil.copytree(eurosat, tmp_path / "data")
    return tmp_path / "data"


@pytest.fixture
def small(eurosat, random_clip_file):
    """Flags of the smallest task there is: EuroSAT's shortened split and the random CLIP."""
    return f"--dataset eurosat --data {eurosat} --clip {random_clip_file}"


@contextlib.contextmanager
def stopped_after(epoch):
    """A training inside is stopped right after it has saved the state of an epoch."""
    save = train.save_torch

    def save_and_stop(content, path):
        save(content, path)
        if content["epoch"] == epoch:
            raise KeyboardInterrupt

    with (
        mock.patch.object(train, "save_torch", save_and_stop),
        pytest.raises((KeyboardInterrupt, SystemExit)),  # the second from a command line
    ):
        yield


def parse(args):
    """The flags of a command line of train.py."""
    return flags.make_parser("", train.FLAGS, train.METHODS).parse_args(list(map(str, args)))


@pytest.fixture
def run_train(tmp_path):
    """Runs train.py in this process: `run_train("--shots 4 --out", path)` -> result.json."""

    def run(flags="", *more):
        args = [*flags.split(), *map(str, more)]
        if "--out" not in args:
            args += ["--out", str(tmp_path / "run")]
        config, groups, folder, resume = train.resolve(parse(args))
        train.train(config, groups, folder, resume)
        return json.loads((folder / "result.json").read_text())

    return run


@pytest.fixture
def run_eval(monkeypatch, capsys):
    """eval.py in this process: `run_eval(run, "--words")` -> exit status, lines of output, lines of
    errors."""

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["eval.py", *map(str, args)])
        capsys.readouterr()
        status = 0
        try:
            eval.main()
        except SystemExit as exit:
            status = exit.code
        said = capsys.readouterr()
        return status, said.out.splitlines(), said.err.splitlines()

    return run
