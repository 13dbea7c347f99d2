"""Imported first by every program, before PyTorch: its threads, and how it starts and ends.

Waiting threads of OpenMP spin: on a busy machine they hold the cores that the others need, and a
run takes ten times as long. GOMP_SPINCOUNT bounds that (docs/SPEED.md has the times). A container
may grant less time than the machine has cores. A variable of OpenMP or MKL that is set is obeyed,
and then nothing is changed here.
"""

import atexit
import gc
import os
import signal
import sys
from pathlib import Path

SPINS = "1500"
SIGNALS = signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)
importing = True  # until `exit_on_bad_input` runs the program


def granted_cores(file="/sys/fs/cgroup/cpu.max"):
    """How many cores a container's quota grants this process; None without a quota."""
    try:
        quota, period = Path(file).read_text().split()
        return max(1, int(quota) // int(period))
    except (OSError, ValueError):  # "max" is no number
        return None


def n_threads():
    """How many threads this process may use: its share of this machine's cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cores = min(cores, granted_cores() or cores)
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def stop(number, frame):
    """Ends the program as Ctrl-C does: what is being written is removed on the way."""
    for other in SIGNALS:
        signal.signal(other, signal.SIG_IGN)  # a terminal that closes sends several
    if importing:  # nothing to remove
        print("stopped", file=sys.stderr)
        os._exit(128 + number)
    raise KeyboardInterrupt(number)


if "torch" not in sys.modules and not any(
    name.startswith(("OMP_", "GOMP_", "MKL_")) for name in os.environ
):
    os.environ["GOMP_SPINCOUNT"] = SPINS
    if granted_cores():
        os.environ["OMP_NUM_THREADS"] = str(n_threads())

program = Path(getattr(sys.modules["__main__"], "__file__", None) or "")
if program.stem in ("train", "eval") or program.parent.name in ("tools", "forks"):
    for number in SIGNALS:  # one that is ignored, as by nohup, stays so
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(number, stop)
    # Imports leave 400,000 objects. Looking for garbage among them takes a second at the start and
    # most of another at the end.
    gc.set_threshold(100_000)
    atexit.register(gc.freeze)
