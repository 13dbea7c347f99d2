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
import torch.nn.functional as F
from clip.model import CLIP
from PIL import Image

import eval
import train
from lib import features, pictures, runs, world

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session", autouse=True)
def outside_world(cache):
    """No test reads or writes the user's feature cache, or reaches the network."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(features, "CACHE", cache)
        patch.setenv("XDG_CACHE_HOME", str(cache))  # of other processes
        for proxy in ("http_proxy", "https_proxy"):
            patch.setenv(proxy, "http://127.0.0.1:9")  # nobody listens there
        patch.setenv("no_proxy", "127.0.0.1")
        yield


@pytest.fixture
def no_pictures(monkeypatch):
    """Pictures of runs are empty files: to draw them takes longer than a short run."""

    def router_picture(result, path):
        if result["n_prompts"]:
            path.touch()

    monkeypatch.setattr(pictures, "router_picture", router_picture)
    monkeypatch.setattr(pictures, "samples_picture", lambda images, titles, path: path.touch())


@pytest.fixture
def small_world(monkeypatch):
    """The built-in world with a fifth of its test images: 24 per class."""
    monkeypatch.setitem(world.PER_CLASS, "test", 24)


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


@pytest.fixture(scope="session")
def small(eurosat, random_clip_file):
    """Flags of the smallest task there is: EuroSAT's shortened split and the random CLIP."""
    return f"--dataset eurosat --data {eurosat} --clip {random_clip_file}"


@contextlib.contextmanager
def stopped_after(epoch):
    """A training inside is stopped right after it has saved the state of an epoch."""
    save = runs.save_torch

    def save_and_stop(content, *where):
        save(content, *where)
        if content["epoch"] == epoch:
            raise KeyboardInterrupt

    with (
        mock.patch.object(runs, "save_torch", save_and_stop),
        pytest.raises((KeyboardInterrupt, SystemExit)),  # the second from a command line
    ):
        yield


def unit(*shape, seed=0):
    """Random unit vectors."""
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def config_of(*words):
    """The configuration of a command line of train.py."""
    return train.configure(list(map(str, words)))[0]


def train_run(flags, *more):
    """Runs train.py in this process: `train_run("--shots 4 --out", path)` -> result.json."""
    config, resume = train.configure([*flags.split(), *map(str, more)])
    train.run(config, resume)
    return json.loads((Path(config["out"]) / "result.json").read_text())


@pytest.fixture
def run_train(tmp_path):
    """`train_run` into the folder `run` of the test's own, unless --out is given."""

    def run(flags="", *more):
        out = [] if "--out" in (*flags.split(), *more) else ["--out", tmp_path / "run"]
        return train_run(flags, *more, *out)

    return run


@pytest.fixture(scope="session")
def finished_run(small, tmp_path_factory):
    """The folder of a finished run on the smallest task."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    train_run(f"{small} --shots 1 --epochs 2 --out", folder)
    return folder


@pytest.fixture
def own_run(finished_run, tmp_path):
    """A copy of it that a test may change."""
    return shutil.copytree(finished_run, tmp_path / "run")


def checkpoint(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def same_parameters(a, b, tolerance=0.0):
    """Whether the runs in two folders learned the same: bit for bit, or up to a tolerance, relative
    to the largest value of each parameter."""
    a, b = (checkpoint(folder)["model"] for folder in (a, b))
    return a.keys() == b.keys() and all(
        ((a[key] - b[key]).abs() <= tolerance * b[key].abs().max()).all()
        for key in a
        if a[key].numel()
    )


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
