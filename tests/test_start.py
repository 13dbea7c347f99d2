"""Before PyTorch is imported: threads, and what a signal does to a program."""

import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from lib import start

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    "content, cores", [("max 100000", None), ("250000 100000", 2), ("50000 100000", 1), ("", None)]
)
def test_a_containers_quota_is_whole_cores(content, cores, tmp_path):
    (tmp_path / "cpu.max").write_text(content)
    assert start.granted_cores(tmp_path / "cpu.max") == cores
    assert start.granted_cores(tmp_path / "nothing") is None


def test_no_more_threads_than_this_process_may_use(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(12)), raising=False)
    for granted, processes, threads in ((None, 1, 12), (None, 4, 3), (8, 4, 2), (None, 100, 1)):
        monkeypatch.setattr(start, "granted_cores", lambda granted=granted: granted)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))  # of torchrun on this machine
        assert start.n_threads() == threads


@pytest.fixture
def started_as(monkeypatch):
    """What `lib.start` does as the first import of a program: its variables, signals with a handler
    of its own."""

    def run(program, variables, loaded=()):
        handled = []
        with monkeypatch.context() as patch:
            for name in os.environ:
                if name.startswith(("OMP_", "GOMP_", "MKL_")):
                    patch.delenv(name)
            for name, value in variables.items():
                patch.setenv(name, value)
            patch.setattr(sys, "modules", dict.fromkeys(loaded, sys) | {"__main__": program})
            patch.setattr(signal, "signal", lambda number, action: handled.append(number))
            ours = runpy.run_path(str(ROOT / "lib/start.py"))
            found = {k: v for k, v in os.environ.items() if k.startswith(("OMP_", "GOMP_"))}
        return ours, found, handled

    return run


@pytest.mark.parametrize(
    "variables, loaded, chosen",
    [
        ({}, (), True),
        ({"OMP_NUM_THREADS": "1"}, (), False),  # as torchrun does
        ({"GOMP_CPU_AFFINITY": "0"}, (), False),
        ({"MKL_NUM_THREADS": "1"}, (), False),
        ({}, ["torch"], False),  # too late
    ],
)
def test_how_threads_wait_is_chosen_unless_somebody_has(variables, loaded, chosen, started_as):
    ours, found, _ = started_as(SimpleNamespace(), variables, loaded)
    spins = {"GOMP_SPINCOUNT": ours["SPINS"]} if chosen else {}
    assert found == spins | {k: v for k, v in variables.items() if k[:3] != "MKL"}


@pytest.mark.parametrize(
    "program, handles",
    [
        (str(ROOT / "train.py"), True),
        (str(ROOT / "tools/why.py"), True),
        ("/home/me/my_loop.py", False),
        (None, False),  # a notebook
    ],
)
def test_signals_are_handled_by_programs_alone(program, handles, started_as, monkeypatch):
    monkeypatch.setattr(signal, "getsignal", lambda number: signal.SIG_DFL)
    *_, handled = started_as(SimpleNamespace(__file__=program), {})
    assert handled == (list(start.SIGNALS) if handles else [])


def test_a_signal_that_is_ignored_stays_ignored(started_as, monkeypatch):
    """As nohup does with SIGHUP."""
    ignored = {signal.SIGHUP: signal.SIG_IGN}
    monkeypatch.setattr(signal, "getsignal", lambda number: ignored.get(number, signal.SIG_DFL))
    *_, handled = started_as(SimpleNamespace(__file__="train.py"), {})
    assert handled == [signal.SIGINT, signal.SIGTERM]


@pytest.mark.parametrize("name, phase", [("SIGTERM", "imports"), ("SIGHUP", "training")])
def test_a_signal_ends_a_program_with_one_line(name, phase, small, tmp_path):
    command = [sys.executable, ROOT / "train.py", *small.split(), "--shots", "1"]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command += ["--epochs", "9999", "--out", tmp_path / "run"]
    process = subprocess.Popen(command, cwd=tmp_path, **streams)
    if phase == "imports":
        while not Path(f"/proc/{process.pid}/maps").read_text().count("libtorch"):
            time.sleep(0.01)
    else:
        for line in process.stdout:
            if line.startswith("epoch   2/"):
                break
    number = getattr(signal, name)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (128 + number, "stopped\n")
    left = sorted(file.name for file in (tmp_path / "run").glob("*"))
    assert left == ([] if phase == "imports" else ["config.json", "resume.pt"])
