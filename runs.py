"""What a run leaves on disk, and how it goes on from there.

A run's folder holds `checkpoint.pt`, `result.json` and `router.png`; while it runs, `resume.pt`
with all that is needed to go on. Files are written under a temporary name and renamed when whole.
"""

import json
import os
import re
import sys
from pathlib import Path

import torch

import plots
from backbone import BadInput, read_torch_file

RUN_FILES = re.compile(
    r"(checkpoint|resume)\.pt|result\.json|router\.png|(eval|samples)_.+\.(json|png)|.+\.tmp"
)
STATE = {
    "config",
    "made_of",
    "epoch",
    "model",
    "optimiser",
    "scaler",
    "order_rng",
    "seconds",
    "shares",
}
NOT_PART_OF_A_RUN = ("chunk", "data", "device", "out")  # flags that do not change it


def open_run(folder, config, resume, defaults):
    """The state that a run in `folder` left behind to go on from, or None for a fresh start.

    defaults: of the method's flags, for runs made before there was a flag.

    Raises BadInput if the folder holds the run of another configuration or other files, or
    cannot be written; exits with status 0 if `resume` is asked of a run that is finished.
    """
    parent = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise BadInput(f"cannot write in {parent}: name another --out")
    files = [f.name for f in folder.iterdir()] if folder.exists() else []
    finished, stopped = "result.json" in files, "resume.pt" in files
    foreign = [name for name in files if not RUN_FILES.fullmatch(name)]
    if not (finished or stopped):
        foreign += [name for name in files if not name.endswith(".tmp")]
    if foreign:
        raise BadInput(f"{folder} holds {foreign[0]}, which is no run's: name another --out")
    state, there = None, config
    if stopped:
        try:
            state = read_torch_file(folder / "resume.pt", "state to resume from")
        except BadInput as error:
            raise BadInput(f"{error}: remove it") from error
        if not state.keys() >= STATE or not isinstance(state["config"], dict):
            raise BadInput(f"{folder / 'resume.pt'} is not a state to resume from: remove it")
        there = state["config"]
    elif finished:
        there = read_result(folder / "result.json")["config"]
    for flag in config:
        its_own = there.get(flag, defaults.get(flag))
        if flag not in NOT_PART_OF_A_RUN and its_own != config[flag]:
            raise BadInput(
                f"{folder} holds a run with {flag} {its_own} instead of {config[flag]}:"
                " remove it or name another --out"
            )
    if not resume:
        if stopped:
            print(f"{folder} holds this run, stopped halfway: starting over without --resume")
        elif finished:
            print(f"{folder} holds this run and its evaluations already: they will be replaced")
        return None
    if state is None and finished:
        print(f"the run in {folder} is finished: nothing to resume")
        sys.exit(0)
    print(f"resuming after epoch {state['epoch']}" if state else "nothing to resume: a fresh start")
    return state


def read_result(path):
    """A `result.json` as a dictionary. Raises BadInput if it is not one."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        numbers = [result[key] for key in ("accuracy", "zero_shot_accuracy", "ensemble_accuracy")]
        names = [result[key] for key in ("dataset", "classes", "n_prompts", "n_train")]
        flags = "dataset", "classes", "shots", "seed", "method", "clip", "groups"
        flags = [result["config"][key] for key in flags]
        parts = isinstance(result["router"], dict) and isinstance(result["prompt_usage"], dict)
        complete = None not in (*numbers, *names, *flags) and parts
    except (ValueError, KeyError, TypeError, RecursionError):
        complete = False
    if not complete:
        raise BadInput(f"{path} is not the result of a run, or damaged: move it away")
    return result


def save_torch(content, path):
    """`torch.save` under a temporary name, renamed when whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(f".{os.getpid()}.tmp")  # its own, should two runs meet here
    torch.save(content, scratch)
    scratch.replace(path)


def discard(folder):
    """Removes the state of a run that cannot go on, and its folder if nothing else is there."""
    (folder / "resume.pt").unlink(missing_ok=True)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def publish(folder, checkpoint, result):
    """Puts the files of a finished run in `folder`, in place of an earlier run's.

    All are written under temporary names first and then renamed, and `resume.pt` goes when
    everything is there: a run killed in between can still be resumed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(checkpoint, folder / "checkpoint.tmp")
    if result["n_prompts"]:
        plots.router_picture(result, folder / "router.tmp")
    (folder / "result.tmp").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for name in ("eval_*.json", "eval_*.png", "samples_*.png"):
        for stale in folder.glob(name):
            stale.unlink()  # of the checkpoint that stood here before
    if result["n_prompts"]:
        (folder / "router.tmp").replace(folder / "router.png")
    # A folder with a result is a run's, whatever else there is, so that one comes first.
    (folder / "result.tmp").replace(folder / "result.json")
    (folder / "checkpoint.tmp").replace(folder / "checkpoint.pt")
    for file in (folder / "resume.pt", *folder.glob("*.tmp")):
        file.unlink(missing_ok=True)


def find_runs(folder):
    """Every finished run below `folder`: (result.json, [its eval_*.json]) as dictionaries."""
    if not Path(folder).is_dir():
        raise BadInput(f"there is no folder {folder}")
    runs = []
    for file in sorted(Path(folder).rglob("result.json")):
        evaluations = [read_result(f) for f in sorted(file.parent.glob("eval_*.json"))]
        runs.append((read_result(file), evaluations))
    if not runs:
        raise BadInput(f"no finished run below {folder}")
    return runs
