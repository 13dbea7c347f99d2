"""A run's folder: its name, its files, and how an interrupted run continues.

    resume.pt        while training: everything needed to continue
    checkpoint.pt    the trained model
    result.json      its results and settings
    router.png, eval_*.json, eval_*.png, samples_*.png, why.json    made from these two

A folder belongs to one configuration; another one is refused. A repeated run leaves the files of
the earlier one alone until all of its own are on disk.
"""

import hashlib
import json
import os
import re
import sys
from pathlib import Path

import torch

from lib.errors import BadInput
from lib.files import read_torch_file, replacing, save_torch, torch_bytes

ANOTHER_OUT = " and continue with --resume, or choose another --out"
STALE = (  # files of an earlier run, removed once the new one is on disk
    *("checkpoint.pt", "router.png", "eval_*.json", "eval_*.png", "samples_*.png", "why.json"),
)


def changed_settings(config, defaults):
    """{setting: value} of the settings that differ from their defaults, sorted."""
    return {k: config[k] for k, v in sorted(defaults.items()) if config.get(k, v) != v}


def run_label(method, changed):
    """A method's name with every changed setting: `mocoop-top_k1`."""

    def slug(value):  # a file has its full path: only its name is used
        path = Path(str(value))
        return re.sub(r"[^\w.]+", "-", path.stem if path.is_absolute() else str(value))

    return "-".join([method, *(k if v is True else f"{k}{slug(v)}" for k, v in changed.items())])


def run_folder(config, changed):
    """The folder of a run: --out, or one named after its settings. Raises BadInput for a name that
    is too long, and for a folder inside the dataset itself."""
    dataset = Path(config["dataset"])  # absolute for your own folder
    task = "{shots}shot_{classes}_seed{seed}".format(**config)
    name = f"{run_label(config['method'], changed)}_{task}"
    folder = Path(config["out"] or Path("out", dataset.name, name))
    if not config["out"] and len(os.fsencode(name)) > 200:
        raise BadInput(f"{name[:40]}... is too long for a folder's name: choose one with --out")
    if dataset.is_absolute() and folder.resolve().is_relative_to(dataset):
        raise BadInput(f"{folder} lies in the dataset itself: choose another --out")
    return folder


# ----------------------------------------------------------------------------- starting, resuming


def open_run(folder, config, resume, defaults, ignored):
    """The saved state to continue the run in `folder` from, or None for a fresh start.

    defaults: for settings that are newer than the run in the folder. ignored: settings that may
    differ. Raises BadInput if the folder holds another configuration's run or other files; exits
    with status 0 if `resume` is given for a run that is finished.
    """
    files = [f.name for f in folder.iterdir() if f.suffix != ".tmp"] if folder.exists() else []
    state = None
    if "resume.pt" in files:
        state = _read_state(folder / "resume.pt")
        check_same_run(folder, state["config"], config, defaults, ignored)
    elif "result.json" in files:
        earlier = read_result(folder / "result.json")
        check_same_run(folder, earlier["config"], config, defaults, ignored)
    elif files:
        raise BadInput(f"{folder} is not empty and holds no run ({files[0]}): choose another --out")
    if resume and not state and {"checkpoint.pt", "result.json"} <= {*files}:
        print(f"the run in {folder} is finished: nothing to resume")
        sys.exit(0)
    if resume:
        what = f"resuming after epoch {state['epoch']}" if state else "nothing to resume"
        print(what if state else f"{what}: a fresh start")
        return state
    if state:
        print(f"{folder} holds this run, stopped halfway: starting over without --resume")
    elif files:
        print(f"{folder} holds this run and its evaluations already: they will be replaced")
    return None


def check_same_run(folder, its_config, config, defaults, ignored):
    """Raises BadInput if a folder's run has another configuration. See `open_run`."""
    for name in sorted(config.keys() - ignored):
        its_value = its_config.get(name, defaults.get(name))
        if its_value != config[name]:
            raise BadInput(
                f"{folder} holds a run with {name} {its_value} instead of {config[name]}:"
                " remove it or choose another --out"
            )


def check_made_of(folder, state, parts):
    """A hash of a run's inputs beyond its settings. Raises BadInput if `state`, of the run to
    continue, has another hash. parts: anything that JSON can encode."""
    made_of = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    if state and state["made_of"] != made_of:
        raise BadInput(
            f"{folder} was stopped while training with other images, templates or CLIP weights:"
            " remove it or choose another --out"
        )
    return made_of


STATE = {  # the keys of a resume.pt
    *("config", "made_of", "epoch", "seconds", "usage", "model", "optimiser", "order_rng"),
    *("torch_rng", "cuda_rng"),
}


def snapshot(epoch, seconds, usage, model, optimiser, order_rng):
    """Everything training needs to continue after `epoch` epochs, bit for bit."""
    on_gpu = next(model.parameters()).is_cuda
    return {
        "epoch": epoch,
        "seconds": seconds,
        "usage": usage,
        "model": model.state_dict(),
        "optimiser": optimiser.state_dict(),
        "order_rng": order_rng.get_state(),
        "torch_rng": torch.get_rng_state(),
        "cuda_rng": torch.cuda.get_rng_state() if on_gpu else None,
    }


def restore(state, model, optimiser, order_rng):
    """Puts a snapshot back. Returns (epochs done, seconds, usage so far), zero without one."""
    if state is None:
        return 0, 0.0, []
    model.load_state_dict(state["model"])
    optimiser.load_state_dict(state["optimiser"])
    order_rng.set_state(state["order_rng"])
    torch.set_rng_state(state["torch_rng"])
    if state["cuda_rng"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda_rng"])
    return state["epoch"], state["seconds"], list(state["usage"])


def save_state(folder, config, made_of, state):
    save_torch({"config": config, "made_of": made_of, **state}, folder / "resume.pt", ANOTHER_OUT)


def _read_state(file):
    """A `resume.pt` as a dictionary. Raises BadInput if it is not one."""
    try:
        state = read_torch_file(file, "state to resume from")
    except BadInput as error:
        raise BadInput(f"{error}: remove it") from error
    if not state.keys() >= STATE or not isinstance(state["config"], dict):
        raise BadInput(f"{file} is not a state to resume from: remove it")
    return state


# --------------------------------------------------------------------------------- finished runs


def publish(folder, checkpoint, result, defaults, ignored):
    """Writes the files of a finished run to `folder`, in place of an earlier run's.

    Nothing of an earlier run is removed before all of this one is on disk. `resume.pt` is removed
    last, so a run killed in between can still be resumed. `open_run`'s check is repeated, because
    another process may have finished in this folder meanwhile.
    """
    if (folder / "result.json").is_file():
        earlier = read_result(folder / "result.json")
        check_same_run(folder, earlier["config"], result["config"], defaults, ignored)
    with replacing(folder / "checkpoint.pt", ANOTHER_OUT) as new_checkpoint:
        new_checkpoint.write_bytes(torch_bytes(checkpoint))
        with replacing(folder / "result.json", ANOTHER_OUT) as new_result:  # renamed first
            new_result.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
            for stale in (file for name in STALE for file in folder.glob(name)):
                if not stale.is_dir():
                    stale.unlink(missing_ok=True)
    (folder / "resume.pt").unlink(missing_ok=True)


def print_finished(folder, result):
    """Prints the outcome of a finished run, and which of its files exist."""
    print(
        f"after training:  {result['method']} {result['accuracy']:.2f} % on"
        f" {result['n_test']:,} test images, {result['train_seconds']:.1f} s of training"
    )
    files = [folder / name for name in ("checkpoint.pt", "result.json", "router.png")]
    print(f"saved in {folder}: {', '.join(file.name for file in files if file.is_file())}")


RESULT = {  # what tables and pictures need from a result.json
    *("dataset", "classes", "shots", "seed", "method", "label", "changed_flags", "clip"),
    *("accuracy", "zero_shot_accuracy", "ensemble_accuracy", "n_prompts", "prompt_usage"),
    *("router", "config"),
}
SETTINGS = {"dataset", "classes", "shots", "seed", "groups"}


def read_result(path):
    """A `result.json` as a dictionary. Raises BadInput if it is not one."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        complete = result.keys() >= RESULT and result["config"].keys() >= SETTINGS
    except (OSError, ValueError, AttributeError, RecursionError):
        complete = False
    if not complete:
        raise BadInput(f"{path} is not the result of a run, or damaged: move it away")
    return result


def find_runs(folder):
    """Every finished run below `folder`: (result.json, [its eval_*.json]) as dictionaries. Other
    files with these names are left out and reported on standard error."""

    def read(files):
        for file in sorted(files):
            try:
                yield read_result(file)
            except BadInput as error:
                print(f"left out: {error}", file=sys.stderr)

    if not Path(folder).is_dir():
        raise BadInput(f"there is no folder {folder}")
    runs = []
    for file in sorted(Path(folder).rglob("result.json")):
        for result in read([file]):
            runs.append((result, list(read(file.parent.glob("eval_*.json")))))
    if not runs:
        raise BadInput(f"no finished run below {folder}")
    return runs
