"""torchrun: the same numbers as one process, one voice, and a share of the machine for each."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import same_parameters

from lib import parallel
from lib.errors import BadInput

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    "flags",
    [
        "--shots 1 --top-k 1 --text-bias --batch-size 4 --chunk 7 --views 2",
        pytest.param("--shots 2 --image-side layer-norms --batch-size 5", marks=pytest.mark.slow),
    ],
)
def test_two_processes_learn_what_one_learns(run_train, small, cache, tmp_path, no_pictures, flags):
    flags = f"{small} --epochs 3 {flags}".split()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node=2", ROOT / "train.py", *flags, "--out", tmp_path / "two"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(cache)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("after training") == done.stdout.count(" 3/3  lr ") == 1
    one = run_train(" ".join(flags), "--out", tmp_path / "one")
    assert same_parameters(tmp_path / "one", tmp_path / "two", tolerance=1e-5)
    two = json.loads((tmp_path / "two/result.json").read_text())
    assert two["accuracy"] == pytest.approx(one["accuracy"], abs=3.4)  # 1 of 30 images, if near


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


def test_products_are_bf16_on_a_gpu_that_has_it(monkeypatch):
    for bf16, expected in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda has=bf16, **_: has)
        assert parallel.mixed_dtype(torch.device("cuda")) is expected
        assert parallel.mixed_dtype(torch.device("cpu")) is torch.float32
