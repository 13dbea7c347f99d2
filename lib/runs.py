"""What a run leaves on disk, and how it goes on from there.

A run's folder holds `checkpoint.pt`, `result.json` and `router.png`; while it runs, `resume.pt`
with all that is needed to go on. Files are written under a temporary name and renamed when whole.
"""

import contextlib
import hashlib
import json
import os
import sys
from pathlib import Path

import torch

from lib import flags, processes
from lib.errors import BadInput
from lib.files import fcntl, made, read_torch_file, replacing

STATE = {  # what a resume.pt holds at least
    *("config", "made_of", "epoch", "seconds", "usage", "model", "optimiser", "scaler", "order"),
    *("torch_rng", "cuda_rng"),
}


@contextlib.contextmanager
def claimed(folder):
    """Makes a run's folder and keeps other processes from training into it meanwhile. It goes again
    if it is still empty in the end. Raises BadInput if it cannot be made or is taken."""
    if processes.rank() > 0:  # the first process of torchrun claims it for all
        yield
        return
    with made(folder, "name another --out"):
        handle = os.open(folder, os.O_RDONLY) if fcntl else None
        try:
            if fcntl:
                with contextlib.suppress(OSError):  # some network disks have no locks
                    _lock(handle, folder)
            yield
        finally:
            if fcntl:
                os.close(handle)  # the lock ends here, or with the process


def _lock(handle, folder):
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise BadInput(f"another process trains into {folder}: name another --out") from error


def run_folder(config, label):
    """The folder of a run: --out, or one named after what the run is. Raises BadInput for a name
    that is too long, and for a folder inside the dataset itself."""
    dataset = Path(config["dataset"])  # absolute for a folder of one's own
    name = f"{label}_{config['shots']}shot_{config['classes']}_seed{config['seed']}"
    folder = Path(config["out"] or Path("out", dataset.name, name))
    if not config["out"] and len(os.fsencode(name)) > 200:
        raise BadInput(f"{name[:40]}... is too long for a folder's name: name one with --out")
    if dataset.is_absolute() and folder.resolve().is_relative_to(dataset):
        raise BadInput(f"{folder} lies in the dataset itself: name another --out")
    return folder


def open_run(folder, config, resume, defaults, ignored):
    """The state that a run in `folder` left behind to go on from, or None for a fresh start.

    config: the flags of this run. defaults: of flags that a run in the folder may be too old to
    know. ignored: flags that may differ.
    Raises BadInput if the folder holds the run of another configuration or other files; exits with
    status 0 if `resume` is asked of a run that is finished.
    """
    files = [f.name for f in folder.iterdir()] if folder.exists() else []
    begun, stopped = "result.json" in files, "resume.pt" in files
    finished = begun and "checkpoint.pt" in files and "checkpoint.tmp" not in files
    foreign = [name for name in files if not name.endswith(".tmp")]
    if foreign and not (begun or stopped):  # beside a run's files, others are left as they are
        raise BadInput(f"{folder} holds {foreign[0]}, which is no run's: name another --out")
    state, its_config = None, config
    if stopped:
        state = _read_state(folder / "resume.pt")
        its_config = state["config"]
    elif begun:
        its_config = read_result(folder / "result.json")["config"]
    for flag in sorted(config.keys() - ignored):
        its_value = its_config.get(flag, defaults.get(flag))
        if its_value != config[flag]:
            raise BadInput(
                f"{folder} holds a run with {flag} {its_value} instead of {config[flag]}:"
                " remove it or name another --out"
            )
    if not resume:
        if stopped:
            print(f"{folder} holds this run, stopped halfway: starting over without --resume")
        elif begun:
            print(f"{folder} holds this run and its evaluations already: they will be replaced")
        return None
    if finished and not stopped:
        print(f"the run in {folder} is finished: nothing to resume")
        sys.exit(0)
    print(f"resuming after epoch {state['epoch']}" if state else "nothing to resume: a fresh start")
    return state


def check_made_of(folder, state, parts):
    """A hash of what a run is made of beyond its flags. Raises BadInput if the run to go on with,
    whose state it is, was made of something else. parts: anything that JSON takes."""
    made_of = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    if state and state["made_of"] != made_of:
        raise BadInput(
            f"{folder} was stopped while training with other images, templates or CLIP weights:"
            " remove it or name another --out"
        )
    return made_of


def _read_state(file):
    """A `resume.pt` as a dictionary. Raises BadInput if it is not one."""
    try:
        state = read_torch_file(file, "state to resume from")
    except BadInput as error:
        raise BadInput(f"{error}: remove it") from error
    if not state.keys() >= STATE or not isinstance(state["config"], dict):
        raise BadInput(f"{file} is not a state to resume from: remove it")
    return state


def read_result(path):
    """A `result.json` as a dictionary. Raises BadInput if it is not one."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        numbers = [result[key] for key in ("accuracy", "zero_shot_accuracy", "ensemble_accuracy")]
        names = [result[key] for key in ("dataset", "classes", "n_prompts", "n_train", "method")]
        flags = [result["config"][key] for key in ("dataset", "classes", "shots", "seed", "clip")]
        parts = isinstance(result["router"], dict) and isinstance(result["prompt_usage"], dict)
        complete = None not in (*numbers, *names, *flags) and parts
    except (ValueError, KeyError, TypeError, RecursionError):
        complete = False
    if not complete:
        raise BadInput(f"{path} is not the result of a run, or damaged: move it away")
    if not {"label", "changed_flags"} <= result.keys():
        raise BadInput(f"{path} is from an older version: remove its folder and run again")
    return result


def announce(config, split, model, has_templates):
    """Prints what is about to be run."""
    own = split.source == "coop" and split.samples == "own"
    prompts = f" with {len(model.templates)} prompts, {model.top_k} per image" if model else ""
    print(
        f"{split.name}: {len(split.class_names)} {config['classes']} classes, {config['shots']}"
        f" shots, seed {config['seed']}{' (samples of our own)' if own else ''};"
        f" CLIP {config['clip']}; {config['method']}{prompts}"
    )
    if model:
        print("prompts: " + " | ".join(model.templates))
    if config["groups"] == "dataset" and not has_templates:
        print(f"{split.name} has no templates: SUN397's four groups serve (see --groups)")


def describe(config, changed_flags, model, split, classes):
    """The part of `result.json` that says what was run and on what."""
    return {
        "dataset": split.name,
        "classes": classes,
        "shots": config["shots"],
        "seed": config["seed"],
        "method": config["method"],
        "label": flags.label(config["method"], changed_flags),
        "changed_flags": changed_flags,
        "clip": config["clip"],
        "n_prompts": len(model.templates),
        "top_k": model.top_k,
        "n_classes": len(split.class_names),
        "n_test": len(split.test),
        "split": split.source,
    }


def save_torch(content, path):
    """`torch.save` under a temporary name, renamed when whole."""
    with replacing(path) as scratch:
        torch.save(content, scratch)


def save_json(content, path):
    with replacing(path) as scratch:
        scratch.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def discard(folder):
    """Removes the state of a run that cannot go on, and its folder if nothing else is there."""
    (folder / "resume.pt").unlink(missing_ok=True)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def publish(folder, checkpoint, result):
    """Puts the files of a finished run in `folder`, in place of an earlier run's, and says so.

    All are written under temporary names first and then renamed, and `resume.pt` goes when
    everything is there: a run killed in between can still be resumed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(checkpoint, folder / "checkpoint.tmp")
    if result["n_prompts"]:
        from lib.pictures import router_picture  # here: --help need not wait for matplotlib

        router_picture(result, folder / "router.tmp")
    (folder / "result.tmp").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for name in ("eval_*.json", "eval_*.png", "samples_*.png", "why.json"):
        for stale in folder.glob(name):
            stale.unlink()  # of the checkpoint that stood here before
    if result["n_prompts"]:
        (folder / "router.tmp").replace(folder / "router.png")
    # A folder with a result is a run's, whatever else there is, so that one comes first.
    (folder / "result.tmp").replace(folder / "result.json")
    (folder / "checkpoint.tmp").replace(folder / "checkpoint.pt")
    for file in (folder / "resume.pt", *folder.glob("*.tmp")):
        file.unlink(missing_ok=True)
    print(
        f"after training:  {result['method']} {result['accuracy']:.2f} % on"
        f" {result['n_test']:,} test images, {result['train_seconds']:.1f} s of training"
    )
    files = ["checkpoint.pt", "result.json"] + ["router.png"] * bool(result["n_prompts"])
    print(f"saved in {folder}: {', '.join(files)}")


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
