"""A run's folder and result, how it resumes after a stop, and how bad input is reported.

A run's folder holds `checkpoint.pt`, `result.json` and `router.png`; while it runs, `resume.pt`
with all that is needed to continue. Every file is written under its own temporary name and renamed
when it is complete, so that no reader ever sees a partial file.
"""

import argparse
import contextlib
import difflib
import errno
import hashlib
import io
import json
import os
import re
import sys
import tempfile
import uuid
from pathlib import Path
from zipfile import ZipFile

import torch

# ----------------------------------------------------------------------------------- bad input


class BadInput(ValueError):
    """The user's input cannot be used. The message is one line: the problem, and what to do."""


def exit_on_bad_input(main, *kinds):
    """Runs a command line. Bad input prints one line and exits with status 2, without a traceback.

    kinds: exceptions that count as bad input, besides BadInput and those of the operating system
    (no permission, a full disk, a name that is too long).
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed, but progress bars write there
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        if hasattr(getattr(sys, name), "reconfigure"):  # a terminal may not show all names
            getattr(sys, name).reconfigure(errors="backslashreplace")
    os.environ.pop("MPLBACKEND", None)  # from a notebook: matplotlib fails if it is missing
    try:
        with doing("computing", "try another --device"):
            main()
    except BrokenPipeError:  # the reader of the output has gone, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (BadInput, OSError, *kinds) as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)


@contextlib.contextmanager
def doing(what, way_out):
    """Running out of memory in this block, or in a function decorated with it, is bad input."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        raise BadInput(f"out of memory while {what}: {way_out}") from error


def out_of_memory(error):
    """Whether an exception means that the memory of a GPU or the computer has run out. torch has an
    exception class for one case; the others only show in the message."""
    words = "out of memory|not enough memory|allocate memory|bad_alloc|ALLOC_FAILED"
    return isinstance(error, MemoryError) or re.search(words, str(error)) is not None


def finite(x, what):
    """Returns the tensor x. Raises BadInput unless it is finite and not all zeros."""
    if not (x.isfinite().all() and x.any()):
        raise BadInput(f"{what} should be finite and not 0: are the weights damaged?")
    return x


def nearest(word, words):
    """A hint for a mistyped word: " (did you mean 'x'?)" or nothing."""
    words = {known.lower(): known for known in words}
    close = difflib.get_close_matches(word.lower(), words, n=1)
    return f" (did you mean {words[close[0]]!r}?)" if close else ""


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows all defaults but None; for these, the help text says what happens."""

    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """A parser that raises BadInput for mistakes in a command line."""

    def __init__(self, description, **options):
        """description: a docstring; its first line is shown. None if Python drops docstrings."""
        first_line = (description or "").split("\n")[0]
        super().__init__(
            description=first_line, formatter_class=HelpFormatter, allow_abbrev=False, **options
        )

    def error(self, message):
        raise BadInput(f"{message} (--help lists the settings)")


def at_least(kind, least):
    """An argparse type: an int or float that is not below `least`."""

    def parse(text):
        value = kind(text)
        if not least <= value < 2**31:  # NaN fails, too
            raise argparse.ArgumentTypeError(f"must be at least {least}, not {text}")
        return value

    parse.__name__ = kind.__name__  # argparse shows it if `kind` rejects the text
    return parse


# --------------------------------------------------------------------------------------- files


@contextlib.contextmanager
def writable_folder(folder, way_out=""):
    """Makes sure that a folder exists and can be written in. If it was made for this block and is
    still empty at the end, it is removed. Raises BadInput if it cannot be written in."""
    absent = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder, suffix=".tmp"):  # permissions alone do not show it
            pass
    except OSError as error:
        raise BadInput(f"cannot write in {folder}: {way_out or error.strerror}") from error
    try:
        yield
    finally:
        for path in absent:
            with contextlib.suppress(OSError):
                path.rmdir()


@contextlib.contextmanager
def replacing(path, way_out=""):
    """Yields a temporary path beside `path`, renamed to `path` if the block succeeds. Readers find
    the old file or the new one. If the block raises, nothing is left behind.

    Raises BadInput for a full disk. way_out: what to do besides making room there.
    """
    path = Path(path)
    scratch = path.with_name(f"{path.stem}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield scratch
        scratch.replace(path)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        message = f"cannot write {path}: {error.strerror}: make room there{way_out}"
        raise BadInput(message) from error
    finally:
        with contextlib.suppress(OSError):
            scratch.unlink(missing_ok=True)


ANOTHER_OUT = " and continue with --resume, or choose another --out"


def save_torch(content, path):
    """Saves a state in a run's folder."""
    with replacing(path, ANOTHER_OUT) as scratch:
        scratch.write_bytes(torch_bytes(content))


def torch_bytes(content):
    """What `torch.save` writes. On a full disk, it would only report that a file ends too early."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def save_json(content, path):
    with replacing(path) as scratch:
        scratch.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def read_torch_file(path, what):
    """`torch.load` of a dictionary, weights only, with one clear error: `path is not a {what}`."""
    content = None
    with open(path, "rb") as file:  # one that cannot be opened raises its own OSError
        try:
            with ZipFile(file) as archive:
                if archive.testzip() is None:  # torch does not verify the checksums
                    content = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # damaged bytes may raise anything
            if out_of_memory(error):
                raise
    if not isinstance(content, dict):
        raise BadInput(f"{path} is not a {what}, or damaged")
    return content


def read_text(file):
    """The content of a text file. Raises BadInput if it cannot be read."""
    try:
        return Path(file).read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise BadInput(f"cannot read {file}: {error}") from error


def read_lines(file):
    """The lines of a text file, stripped, without empty ones. Raises BadInput as `read_text`."""
    return [line.strip() for line in read_text(file).splitlines() if line.strip()]


def full_path(value, but=()):
    """The full path if `value` is a file, so that it is found from any folder. Other values, and
    the words in `but`, are returned unchanged."""
    is_file = value and value not in but and Path(value).is_file()
    return str(Path(value).resolve()) if is_file else value


# ------------------------------------------------------------------------------ a run's folder


def changed_settings(config, defaults):
    """{setting: value} of the settings that differ from their defaults, sorted."""
    return {k: config[k] for k, v in sorted(defaults.items()) if config.get(k, v) != v}


def run_label(method, changed):
    """A method's name with every changed setting: `mocoop-top_k1`."""

    def slug(value):  # a file has its full path: only its name is used
        path = Path(str(value))
        return re.sub(r"[^\w.]+", "-", path.stem if path.is_absolute() else str(value))

    return "-".join([method, *(k if v is True else f"{k}{slug(v)}" for k, v in changed.items())])


def run_folder(config, label):
    """The folder of a run: --out, or one named after its settings. Raises BadInput for a name that
    is too long, and for a folder inside the dataset itself."""
    dataset = Path(config["dataset"])  # absolute for your own folder
    name = f"{label}_{config['shots']}shot_{config['classes']}_seed{config['seed']}"
    folder = Path(config["out"] or Path("out", dataset.name, name))
    if not config["out"] and len(os.fsencode(name)) > 200:
        raise BadInput(f"{name[:40]}... is too long for a folder's name: choose one with --out")
    if dataset.is_absolute() and folder.resolve().is_relative_to(dataset):
        raise BadInput(f"{folder} lies in the dataset itself: choose another --out")
    return folder


def open_run(folder, config, resume, defaults, ignored):
    """The saved state to continue the run in `folder` from, or None for a fresh start.

    config: the settings of this run. defaults: for settings that are newer than the run in the
    folder. ignored: settings that may differ.
    Raises BadInput if the folder holds the run of another configuration or other files; exits with
    status 0 if `resume` is given for a run that is finished.
    """
    files = [f.name for f in folder.iterdir()] if folder.exists() else []
    begun, stopped = "result.json" in files, "resume.pt" in files
    foreign = [name for name in files if not name.endswith(".tmp")]
    if foreign and not (begun or stopped):  # next to a run, other files are left alone
        raise BadInput(
            f"{folder} is not empty and holds no run ({foreign[0]}): choose another --out"
        )
    state, its_config = None, config
    if stopped:
        state = _read_state(folder / "resume.pt")
        its_config = state["config"]
    elif begun:
        its_config = read_result(folder / "result.json")["config"]
    check_same_run(folder, its_config, config, defaults, ignored)
    if not resume:
        if stopped:
            print(f"{folder} holds this run, stopped halfway: starting over without --resume")
        elif begun:
            print(f"{folder} holds this run and its evaluations already: they will be replaced")
        return None
    if begun and not stopped and "checkpoint.pt" in files:
        print(f"the run in {folder} is finished: nothing to resume")
        sys.exit(0)
    print(f"resuming after epoch {state['epoch']}" if state else "nothing to resume: a fresh start")
    return state


def check_same_run(folder, its_config, config, defaults, ignored):
    """Raises BadInput if a folder's run has another configuration. See `open_run`."""
    for name in sorted(config.keys() - ignored):
        its_value = its_config.get(name, defaults.get(name))
        if its_value != config[name]:
            raise BadInput(
                f"{folder} holds a run with {name} {its_value} instead of {config[name]}:"
                " remove it or choose another --out"
            )


STATE = {  # what a resume.pt holds
    *("config", "made_of", "epoch", "seconds", "usage", "model", "optimiser", "order_rng"),
    *("torch_rng", "cuda_rng"),
}


def save_state(folder, config, made_of, state):
    """Saves `resume.pt` in a run's folder: all that its training needs to continue."""
    save_torch({"config": config, "made_of": made_of, **state}, folder / "resume.pt")


def _read_state(file):
    """A `resume.pt` as a dictionary. Raises BadInput if it is not one."""
    try:
        state = read_torch_file(file, "state to resume from")
    except BadInput as error:
        raise BadInput(f"{error}: remove it") from error
    if not state.keys() >= STATE or not isinstance(state["config"], dict):
        raise BadInput(f"{file} is not a state to resume from: remove it")
    return state


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


# -------------------------------------------------------------------------------- a run's result


def publish(folder, checkpoint, result, defaults, ignored):
    """Writes the files of a finished run to `folder`, in place of an earlier run's, and prints the
    result.

    Nothing of an earlier run is removed before all of this one is on disk. `resume.pt` is removed
    last, so a run killed in between can still be resumed. defaults, ignored: as in `open_run`. Its
    check is repeated, because another process may have finished in this folder meanwhile.
    """
    if (folder / "result.json").is_file():
        its_config = read_result(folder / "result.json")["config"]
        check_same_run(folder, its_config, result["config"], defaults, ignored)
    with replacing(folder / "checkpoint.pt", ANOTHER_OUT) as new_checkpoint:
        new_checkpoint.write_bytes(torch_bytes(checkpoint))
        with replacing(folder / "result.json", ANOTHER_OUT) as new_result:  # renamed first
            new_result.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
            for name in (
                "checkpoint.pt",
                "router.png",
                "eval_*.json",
                "eval_*.png",
                "samples_*.png",
                "why.json",
            ):
                for stale in folder.glob(name):  # from an earlier run
                    if not stale.is_dir():
                        stale.unlink(missing_ok=True)
    (folder / "resume.pt").unlink(missing_ok=True)
    print(
        f"after training:  {result['method']} {result['accuracy']:.2f} % on"
        f" {result['n_test']:,} test images, {result['train_seconds']:.1f} s of training"
    )


RESULT = {  # what tables and pictures need from a result.json
    *("dataset", "classes", "shots", "seed", "method", "label", "changed_flags", "clip"),
    *("accuracy", "zero_shot_accuracy", "ensemble_accuracy", "n_prompts", "prompt_usage"),
    *("prompt_usage_by_epoch", "router", "config"),
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
    files of these names are left out, and named on standard error."""

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
