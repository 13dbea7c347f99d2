"""torchrun: the same numbers as one process, one voice, and an end when a process dies."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from lib import processes
from lib.errors import BadInput

ROOT = Path(__file__).parents[1]


@pytest.fixture
def torchrun(tmp_path, cache):
    """Starts train.py in n processes with one thread each."""

    def start(n, *flags):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc-per-node={n}", str(ROOT / "train.py"), *map(str, flags)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(cache)}
        pipe = subprocess.PIPE
        return subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True)

    return start


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
    process = torchrun(2, *flags, "--out", tmp_path / "two")
    out, error = process.communicate(timeout=200)
    assert process.returncode == 0, error
    assert out.count("after training") == out.count(" 4/4  lr ") == 1
    one = run_train(" ".join(flags), "--out", tmp_path / "one")
    a, b = learned(tmp_path / "one"), learned(tmp_path / "two")
    for name in a:
        if a[name].numel():
            assert (a[name] - b[name]).abs().max() <= 1e-5 * a[name].abs().max()
    two = json.loads((tmp_path / "two/result.json").read_text())
    assert two["prompt_usage"] == pytest.approx(one["prompt_usage"], abs=2e-4)
    assert two["accuracy"] == one["accuracy"]


def test_an_image_that_one_process_cannot_read_ends_all(torchrun, own_eurosat, random_clip_file):
    split = json.loads((own_eurosat / "eurosat/split_zhou_EuroSAT.json").read_text())
    path = split["test"][1][0]  # the second process's
    (own_eurosat / "eurosat/2750" / path).write_bytes(b"half an image")
    flags = "--dataset", "eurosat", "--data", own_eurosat, "--clip", random_clip_file
    process = torchrun(2, *flags, "--shots", 1, "--out", own_eurosat.parent / "run")
    _, error = process.communicate(timeout=100)
    assert process.returncode != 0
    assert error.count("cannot read the image") == 1 and path in error


def test_each_process_has_a_gpu_of_its_own(monkeypatch):
    """Of its machine, where machines are several. Told without a GPU."""
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch, "zeros", lambda n, device: None)
    for name, value in {"RANK": 5, "LOCAL_RANK": 1, "WORLD_SIZE": 8}.items():
        monkeypatch.setenv(name, str(value))
    assert processes.choose_device("cuda") == torch.device("cuda:1")
    assert chosen == [torch.device("cuda:1")]
    with pytest.raises(BadInput, match="each process a GPU of its own: --device cuda, no number"):
        processes.choose_device("cuda:0")


def test_the_others_wait_for_the_first_ones_download(monkeypatch):
    joined = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(
        torch.distributed, "init_process_group", lambda backend, timeout: joined.append(timeout)
    )
    processes.join(torch.device("cpu"))
    assert joined[0].total_seconds() >= 6 * 3600


def test_an_older_gpu_computes_in_fp16(monkeypatch):
    for bf16 in (True, False):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: bf16)  # noqa: B023
        expected = torch.bfloat16 if bf16 else torch.float16
        assert processes.mixed_dtype(torch.device("cuda")) is expected
        assert processes.mixed_dtype(torch.device("cpu")) is torch.float32


def test_bad_input_is_told_once_and_the_run_ends(torchrun, tmp_path):
    process = torchrun(2, "--dataset", "eurosat", "--data", tmp_path / "none")
    _, error = process.communicate(timeout=100)
    assert process.returncode != 0
    assert error.count("no images at") == 1


def test_a_process_that_dies_ends_the_run(torchrun, tmp_path):
    process = torchrun(2, "--epochs", 10**6, "--shots", 1, "--out", tmp_path / "run")
    for line in process.stdout:
        if line.startswith("epoch"):
            break
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    start = time.time()
    process.communicate(timeout=60)
    assert process.returncode != 0
    assert time.time() - start < 60
