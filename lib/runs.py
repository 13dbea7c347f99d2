"""A run from outside: its folder, its result, going on after a stop, and what bad input gets.

A run's folder holds `checkpoint.pt`, `result.json` and `router.png`; while it runs, `resume.pt`
with all that is needed to continue. Every file is written under a temporary name of its own and
renamed when it is whole, so that nobody ever meets half of one.
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
    """Something the user gave cannot be used. The message is one line: what, and the way out."""


def exit_on_bad_input(main, *kinds):
    """Runs a command line: bad input ends it with one line and exit status 2, without a traceback.

    kinds: exceptions that mean bad input, beside BadInput and those of the operating system (no
    permission, a full disk, a name too long).
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed, and progress bars do write there
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        if hasattr(getattr(sys, name), "reconfigure"):  # a terminal cannot show all file names
            getattr(sys, name).reconfigure(errors="backslashreplace")
    os.environ.pop("MPLBACKEND", None)  # a notebook's: matplotlib stumbles if it is not installed
    try:
        with doing("computing", "try another --device"):
            main()
    except BrokenPipeError:  # whoever read the output has gone, as `| head` does
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
    """Memory that runs out in this block, or in a function decorated with it, is bad input."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        raise BadInput(f"out of memory while {what}: {way_out}") from error


def out_of_memory(error):
    """Whether an exception says that memory has run out, a GPU's or the computer's: torch has a
    kind for one case, and words for the others."""
    words = "out of memory|not enough memory|allocate memory|bad_alloc|ALLOC_FAILED"
    return isinstance(error, MemoryError) or re.search(words, str(error)) is not None


def finite(x, what):
    """The tensor x. Raises BadInput unless it is finite and more than zeros."""
    if not (x.isfinite().all() and x.any()):
        raise BadInput(f"{what} should be finite and not 0: are the weights damaged?")
    return x


def nearest(word, words):
    """A hint for a mistyped word: " (did you mean 'x'?)" or nothing."""
    words = {known.lower(): known for known in words}
    close = difflib.get_close_matches(word.lower(), words, n=1)
    return f" (did you mean {words[close[0]]!r}?)" if close else ""


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the defaults that are numbers or words; the help says what happens without others."""

    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """A command line whose mistakes are bad input like any other."""

    def __init__(self, description, **options):
        """description: a docstring, whose first line is shown; None where Python drops them."""
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
        if not least <= value < 2**31:  # not a number fails, too
            raise argparse.ArgumentTypeError(f"must be at least {least}, not {text}")
        return value

    parse.__name__ = kind.__name__  # argparse names it when `kind` refuses the text
    return parse


# --------------------------------------------------------------------------------------- files


@contextlib.contextmanager
def writable_folder(folder, way_out=""):
    """A folder that exists and can be written in. If it was made for this block and is still empty
    at its end, it is removed. Raises BadInput if that cannot be."""
    absent = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder, suffix=".tmp"):  # permissions alone do not tell
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
    """A temporary path beside `path` to write to, renamed to it when the block ends well. Readers
    find the old file or the new one. If the block raises, nothing is left behind.

    Raises BadInput for a full disk. way_out: other than making room there.
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
    """What `torch.save` writes; of a full disk it would only say that a file ends too early."""
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
                if archive.testzip() is None:  # torch does not look at the checksums
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
    """The full path of a file, so that it is found from any folder; other values, and words that
    mean something else, as they are."""
    is_file = value and value not in but and Path(value).is_file()
    return str(Path(value).resolve()) if is_file else value


# ------------------------------------------------------------------------------ a run's folder


def changed_settings(config, defaults):
    """{setting: value} of the settings that differ from their defaults, sorted."""
    return {k: config[k] for k, v in sorted(defaults.items()) if config.get(k, v) != v}


def run_label(method, changed):
    """A method's name with every setting that was changed: `mocoop-top_k1`."""

    def slug(value):  # of a file, which has its full path, its name
        path = Path(str(value))
        return re.sub(r"[^\w.]+", "-", path.stem if path.is_absolute() else str(value))

    return "-".join([method, *(k if v is True else f"{k}{slug(v)}" for k, v in changed.items())])


def run_folder(config, label):
    """The folder of a run: --out, or one named after what the run is. Raises BadInput for a name
    that is too long, and for a folder inside the dataset itself."""
    dataset = Path(config["dataset"])  # absolute for a folder of one's own
    name = f"{label}_{config['shots']}shot_{config['classes']}_seed{config['seed']}"
    folder = Path(config["out"] or Path("out", dataset.name, name))
    if not config["out"] and len(os.fsencode(name)) > 200:
        raise BadInput(f"{name[:40]}... is too long for a folder's name: choose one with --out")
    if dataset.is_absolute() and folder.resolve().is_relative_to(dataset):
        raise BadInput(f"{folder} lies in the dataset itself: choose another --out")
    return folder


def open_run(folder, config, resume, defaults, ignored):
    """The state that a run in `folder` left behind to continue from, or None for a fresh start.

    config: the settings of this run. defaults: of settings that a run in the folder may be too old
    to know. ignored: settings that may differ.
    Raises BadInput if the folder holds the run of another configuration or other files; exits with
    status 0 if `resume` is asked of a run that is finished.
    """
    files = [f.name for f in folder.iterdir()] if folder.exists() else []
    begun, stopped = "result.json" in files, "resume.pt" in files
    foreign = [name for name in files if not name.endswith(".tmp")]
    if foreign and not (begun or stopped):  # beside a run's files, others are left as they are
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
    """Saves in a run's folder what its training needs to continue."""
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
    """A hash of what a run is made of beyond its settings. Raises BadInput if the run to continue,
    whose state it is, was made of something else. parts: anything that JSON takes."""
    made_of = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    if state and state["made_of"] != made_of:
        raise BadInput(
            f"{folder} was stopped while training with other images, templates or CLIP weights:"
            " remove it or choose another --out"
        )
    return made_of


# -------------------------------------------------------------------------------- a run's result


def publish(folder, checkpoint, result, defaults, ignored):
    """Puts the files of a finished run in `folder`, in place of an earlier run's, and says what
    came out.

    Nothing of an earlier run goes before everything of this one is on disk. `resume.pt` goes last:
    a run killed in between can still be resumed. defaults, ignored: as in `open_run`, whose check
    is repeated, as another process may have finished in this folder meanwhile.
    """
    if (folder / "result.json").is_file():
        its_config = read_result(folder / "result.json")["config"]
        check_same_run(folder, its_config, result["config"], defaults, ignored)
    with replacing(folder / "checkpoint.pt", ANOTHER_OUT) as new_checkpoint:
        new_checkpoint.write_bytes(torch_bytes(checkpoint))
        with replacing(folder / "result.json", ANOTHER_OUT) as new_result:  # renamed before it
            new_result.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
            for name in (
                "checkpoint.pt",
                "router.png",
                "eval_*.json",
                "eval_*.png",
                "samples_*.png",
                "why.json",
            ):
                for stale in folder.glob(name):  # of the run that stood here before
                    if not stale.is_dir():
                        stale.unlink(missing_ok=True)
    (folder / "resume.pt").unlink(missing_ok=True)
    print(
        f"after training:  {result['method']} {result['accuracy']:.2f} % on"
        f" {result['n_test']:,} test images, {result['train_seconds']:.1f} s of training"
    )


RESULT = {  # what tables and pictures need of a result.json
    *("dataset", "classes", "method", "label", "changed_flags", "clip", "n_prompts", "n_train"),
    *("accuracy", "zero_shot_accuracy", "ensemble_accuracy", "prompt_usage", "router", "config"),
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
    """Every finished run below `folder`: (result.json, [its eval_*.json]) as dictionaries. Files of
    these names that are something else are left out, and named on standard error."""

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
