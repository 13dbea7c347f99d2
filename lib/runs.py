"""A run's folder: its name, its files, and how an interrupted run continues.

    config.json      until the run is finished: the settings and the content it belongs to
    resume.pt        while training: everything needed to continue
    checkpoint.pt    the trained model
    result.json      its results and settings
    router.png, eval_*.json, eval_*.png, samples_*.png, why.json    made from these two

A folder belongs to one configuration; another one is refused at once. Two processes with the same
one do the same work twice and leave the same files. A repeated run leaves the files of the earlier
one alone until all of its own are on disk.
"""

import contextlib
import hashlib
import json
import os
import re
from pathlib import Path

import torch

from lib.errors import BadInput, say, warn
from lib.files import (
    create_json,
    optional,
    read_json,
    read_torch_file,
    replacing,
    save_json,
    save_torch,
    torch_bytes,
    writable_folder,
)

ANOTHER_OUT = " and continue with --resume, or choose another --out"
STALE = (  # files of an earlier run, removed once the new one is on disk
    *("checkpoint.pt", "router.png", "eval_*.json", "eval_*.png", "samples_*.png", "why.json"),
)
MACHINE = {"data", "device", "text_encoder", "chunk", "out"}  # settings that change no result
BY_CONTENT = {"dataset", "clip", "groups"}  # if they are paths, what is there counts: it may move

# fmt: off
# What the files hold: {name: kind}, as in `lib.files.fits`.
CLAIM = {"config": dict, "made_of": optional(str)}
STATE = {
    "config": dict, "made_of": str, "epoch": 2**31, "seconds": 1e9, "usage": [[1.0]],
    "model": dict, "optimiser": dict, "order_rng": torch.Tensor, "torch_rng": torch.Tensor,
    "cuda_rng": optional(torch.Tensor),
}
CHECKPOINT = {
    "config": dict, "groups": [[str]], "class_names": [str], "prompt_names": optional([str]),
    "clip_fingerprint": str, "model": dict,
}
RESULT = {  # what tables and pictures need; also of eval_*.json
    "dataset": str, "classes": str, "shots": 2**31, "seed": 2**31, "method": str, "label": str,
    "changed_flags": dict, "clip": str, "n_prompts": 2**31, "prompt_usage": dict, "config": dict,
    "accuracy": 100.0, "zero_shot_accuracy": 100.0, "ensemble_accuracy": 100.0,
    "router": {"rows": [str], "share": [[1.0]]}, "groups": optional([[str]]),
}
# fmt: on


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


@contextlib.contextmanager
def open_run(folder, config, resume, defaults):
    """Claims a run's folder by writing `config.json`. If the block leaves no state to continue
    from, finished or stopped, the claim is removed.

    Yields (the saved state to continue from, the result of a run that is finished): both None for
    a fresh start. defaults: for settings that are newer than the run in the folder. Raises BadInput
    if the folder holds another configuration's run or other files.
    """
    with writable_folder(folder, "choose another --out"):
        state = earlier = None
        files = {file.name for file in folder.iterdir() if file.suffix != ".tmp"}
        if files and not files & {"config.json", "resume.pt", "result.json"}:
            first = min(files)
            raise BadInput(
                f"{folder} is not empty and holds no run ({first}): choose another --out"
            )
        if "resume.pt" in files:
            what = "state to resume from (remove it)"
            state = read_torch_file(folder / "resume.pt", what, STATE)
            check_same_run(folder, state, config, defaults)
        elif "result.json" in files:
            earlier = read_result(folder / "result.json")
            check_same_run(folder, earlier, config, defaults)
        claimed = _claim(folder, config, defaults)

        if resume and earlier and "checkpoint.pt" in files:
            say(f"the run in {folder} is finished: nothing to resume")
        elif resume and state:
            print(f"resuming after epoch {state['epoch']}")
        elif resume:
            print("nothing to resume: a fresh start")
        elif state:
            say(f"{folder} holds this run, stopped halfway: starting over without --resume")
        elif earlier:
            say(f"{folder} holds this run and its evaluations already: they will be replaced")
        finished = earlier if resume and "checkpoint.pt" in files else None
        try:
            yield state if resume else None, finished
        finally:
            if claimed and not (folder / "resume.pt").exists():
                (folder / "config.json").unlink(missing_ok=True)


def _claim(folder, config, defaults):
    """Writes `config.json`, unless the folder has one. Returns whether it did."""
    claim = folder / "config.json"
    if create_json({"config": config}, claim):
        return True
    check_same_run(folder, read_json(claim, "run's claim", CLAIM), config, defaults)
    return False


def check_same_run(folder, earlier, config, defaults):
    """Raises BadInput if a folder's run has another configuration. earlier: what it has saved."""
    for name in sorted(config.keys() - MACHINE):
        its_value = earlier["config"].get(name, defaults.get(name))
        moved = name in BY_CONTENT and any(
            os.path.isabs(str(value)) for value in (its_value, config[name])
        )
        if its_value != config[name] and not moved:
            raise BadInput(
                f"{folder} holds a run with {name} {its_value} instead of {config[name]}:"
                " remove it or choose another --out"
            )


def check_content(folder, parts):
    """A hash of what a run learns from, which `config.json` then holds. parts: anything that JSON
    can encode. Raises BadInput if the run that the folder holds was made of other parts."""
    made_of = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    claim, result = folder / "config.json", folder / "result.json"
    # Another process with the same settings may have just finished and removed the claim.
    claimed = read_json(claim, "run's claim", CLAIM) if claim.is_file() else {}
    saved = [claimed, read_result(result)] if result.is_file() else [claimed]
    if any(earlier.get("made_of", made_of) != made_of for earlier in saved):
        raise BadInput(
            f"{folder} holds a run with other images, templates or CLIP weights:"
            " remove it or choose another --out"
        )
    if claimed:
        save_json(claimed | {"made_of": made_of}, claim)
    return made_of


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
    """Puts a snapshot back. Returns (epochs done, seconds, usage so far), zero without one. Raises
    BadInput if it does not fit."""
    if state is None:
        return 0, 0.0, []
    try:
        model.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
        order_rng.set_state(state["order_rng"])
        torch.set_rng_state(state["torch_rng"])
        if state["cuda_rng"] is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state(state["cuda_rng"])
    except (RuntimeError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise BadInput("the state to resume from does not fit this run: remove it") from error
    return state["epoch"], state["seconds"], list(state["usage"])


def save_state(folder, config, made_of, state):
    save_torch({"config": config, "made_of": made_of, **state}, folder / "resume.pt", ANOTHER_OUT)


# --------------------------------------------------------------------------------- finished runs


def publish(folder, checkpoint, result, defaults, draw):
    """Writes the files of a finished run to `folder`, in place of an earlier run's, and its picture
    by `draw(path)`.

    Nothing of an earlier run is removed before all of this one is on disk. `resume.pt` is removed
    last, so a run killed in between can still be resumed. `open_run`'s check is repeated, because
    another process may have finished in this folder meanwhile.
    """
    if (folder / "result.json").is_file():
        earlier = read_result(folder / "result.json")
        check_same_run(folder, earlier, result["config"], defaults)
    with replacing(folder / "checkpoint.pt", ANOTHER_OUT) as new_checkpoint:
        new_checkpoint.write_bytes(torch_bytes(checkpoint))
        with replacing(folder / "result.json", ANOTHER_OUT) as new_result:  # renamed first
            new_result.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
            for stale in (file for name in STALE for file in folder.glob(name)):
                if not stale.is_dir():
                    stale.unlink(missing_ok=True)
    draw(folder / "router.png")
    for name in ("resume.pt", "config.json"):
        (folder / name).unlink(missing_ok=True)
    print(
        f"after training:  {result['method']} {result['accuracy']:.2f} % on"
        f" {result['n_test']:,} test images, {result['train_seconds']:.1f} s of training"
    )
    files = [folder / name for name in ("checkpoint.pt", "result.json", "router.png")]
    say(f"saved in {folder}: {', '.join(file.name for file in files if file.is_file())}")


def read_result(path):
    """A `result.json` as a dictionary. Raises BadInput if it is not one."""
    return read_json(path, "result of a run (move it away)", RESULT)


def find_runs(folder):
    """Every finished run below `folder`: (result.json, [its eval_*.json]) as dictionaries; the
    first also has its `folder`. Links are followed. Other files of these names are left out, and
    named on standard error. Raises BadInput if there is no run."""

    def read(files):
        for file in sorted(files):
            try:
                yield read_result(file)
            except BadInput as error:
                warn(f"left out: {error}")

    runs, seen = [], set()
    for place, folders, files in os.walk(folder, followlinks=True):
        folders.sort()
        if os.path.realpath(place) in seen:  # a link that leads back
            folders.clear()
        elif "result.json" in files:
            for result in read([Path(place, "result.json")]):
                others = list(read(Path(place).glob("eval_*.json")))
                runs.append((result | {"folder": place}, others))
        seen.add(os.path.realpath(place))
    if not runs:
        raise BadInput(f"no finished run below {folder}")
    return runs
