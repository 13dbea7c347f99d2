"""torchrun: the same numbers as one process, one voice, and an end when a process fails."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lib import parallel
from lib.runs import BadInput

ROOT = Path(__file__).parents[1]


@pytest.fixture
def torchrun(cache):
    """Runs train.py in two processes with one thread each: exit status, output, errors."""

    def run(*flags):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node=2", str(ROOT / "train.py"), *map(str, flags)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(cache)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
        return done.returncode, done.stdout, done.stderr

    return run


def learned(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)["model"]


@pytest.mark.parametrize(
    "flags",
    [
        "--shots 2 --text-bias --image-side layer-norms --batch-size 5",
        "--shots 1 --text-weight 0 --top-k 1 --batch-size 1 --chunk 7 --views 2",
    ],
)
def test_two_processes_learn_what_one_learns(torchrun, run_train, small, tmp_path, flags):
    flags = f"{small} --epochs 4 {flags}".split()
    status, out, error = torchrun(*flags, "--out", tmp_path / "two")
    assert status == 0, error
    assert out.count("after training") == out.count(" 4/4  lr ") == 1
    one = run_train(" ".join(flags), "--out", tmp_path / "one")
    a, b = learned(tmp_path / "one"), learned(tmp_path / "two")
    for name in a:
        if a[name].numel():
            assert (a[name] - b[name]).abs().max() <= 1e-5 * a[name].abs().max()
    two = json.loads((tmp_path / "two/result.json").read_text())
    assert two["prompt_usage"] == pytest.approx(one["prompt_usage"], abs=2e-4)
    assert two["accuracy"] == pytest.approx(one["accuracy"], abs=3.4)  # 1 of 30 images, if near


def test_an_image_that_one_process_cannot_read_ends_all(torchrun, own_eurosat, random_clip_file):
    split = json.loads((own_eurosat / "eurosat/split_zhou_EuroSAT.json").read_text())
    path = split["test"][1][0]  # the second process's, while the first waits for its features
    (own_eurosat / "eurosat/2750" / path).write_bytes(b"half an image")
    flags = "--dataset", "eurosat", "--data", own_eurosat, "--clip", random_clip_file
    status, _, error = torchrun(*flags, "--shots", 1, "--out", own_eurosat.parent / "run")
    assert status != 0
    assert error.count("cannot read the image") == 1 and path in error


def test_each_process_has_a_gpu_of_its_own(monkeypatch):
    """Of its machine, where machines are several. Told without a GPU."""
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch, "zeros", lambda n, device: None)
    for name, value in {"RANK": 5, "LOCAL_RANK": 1, "WORLD_SIZE": 8}.items():
        monkeypatch.setenv(name, str(value))
    assert parallel.choose_device("cuda") == torch.device("cuda:1")
    assert chosen == [torch.device("cuda:1")]
    with pytest.raises(BadInput, match="each process a GPU of its own: --device cuda, no number"):
        parallel.choose_device("cuda:0")


def test_no_more_threads_than_this_process_may_use(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(12)), raising=False)
    for processes, threads in ((1, 12), (4, 3), (100, 1)):  # of torchrun on this machine
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
        assert parallel.n_threads() == threads


def test_products_are_bf16_on_a_gpu_that_has_it(monkeypatch):
    for bf16, expected in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda has=bf16, **_: has)
        assert parallel.mixed_dtype(torch.device("cuda")) is expected
        assert parallel.mixed_dtype(torch.device("cpu")) is torch.float32
