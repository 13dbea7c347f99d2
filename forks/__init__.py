"""Methods that no row of `train.METHODS` describes, each in one file on top of the six.

    python -m forks.pfedmoap         # clients that exchange prompts but no images
    python -m forks.dpl              # deep prompts of searched lengths in both encoders

Here is what they share: a command line with settings of their own, and a run from its folder to its
files. A fork runs in one process and cannot be resumed. `eval.py --table` reads its results.
"""

import time
from pathlib import Path

from lib import parallel, results, runs
from lib.catalogue import row_of
from lib.errors import BadInput, exit_on_bad_input
from lib.features import content_of
from lib.settings import defaults_of, given_settings
from prompts import PromptError
from train import SETTINGS, default_config, load_task, zero_shot_and_ensemble

SHARED = {"task": ("dataset", "shots", "seed", "clip"), "machine": ("data", "device", "out")}


def configure(method, own, world, description, arguments=None):
    """(config, defaults of the fork's settings), from a command line. config: CoOp's, as in
    `train.default_config`, with the fork's settings on top.

    own: the fork's table, as in `train.SETTINGS`. world: its defaults that differ in the built-in
    world. description: the fork's docstring. arguments: a list of words, or None for the program's
    own. Raises BadInput.
    """
    table = {section: {k: SETTINGS[section][k] for k in names} for section, names in SHARED.items()}

    def published(given):
        drawn = row_of(given.get("dataset", "shapes")).layout == "world"
        return defaults_of(own) | (world if drawn else {})

    given = given_settings(table | {method: own}, description, arguments, published)
    config = default_config(method="coop", **{k: v for k, v in given.items() if k not in own})
    defaults, out = published(given), given.get("out")
    config |= defaults | {k: v for k, v in given.items() if k in own} | {"method": method}
    changed = runs.changed_settings(config, defaults)
    config["out"] = str(runs.run_folder(config | {"out": out}, changed))
    return config, defaults


def run(config, defaults, learn):
    """A run, from its configuration to `checkpoint.pt` and `result.json`. Returns its result.

    learn: a function of a `train.Task`. It returns a dictionary for `result.json`, which has at
    least `accuracy` in percent, and the module that has learned. `train_seconds` is its time.
    """
    if parallel.processes() > 1:
        raise BadInput("a fork runs in one process: start it without torchrun")
    folder, changed = Path(config["out"]), runs.changed_settings(config, defaults)
    with runs.open_run(folder, config, False, defaults):
        task = load_task(config, parallel.choose_device(config["device"]))
        parts = [task.groups, task.fingerprint, task.names, content_of(task.split)]
        made_of = runs.check_content(folder, parts)
        results.announce(config, task.split, None)
        features, inputs = task.features("test"), (task.split.dataset, task.names)
        untrained = zero_shot_and_ensemble(task.clip_model, *inputs, task.hard.features, config)
        before = [results.accuracy_on(m, task.split, "test", features) for m in untrained.values()]
        print("before training: zero-shot {:.2f} %, ensemble {:.2f} %".format(*before))

        began = time.time()
        measured, learned = learn(task)
        about = {"groups": task.groups, "clip_fingerprint": task.fingerprint, "config": config}
        about |= {"class_names": task.names, "made_of": made_of}
        result = results.about(config, changed, task.split, "all") | {
            "n_prompts": 0,
            "prompt_usage": {},
            "router": {"rows": [], "share": []},
            "n_train": len(task.split.train),
            "few_shot_samples": task.split.samples,
            **dict(zip(("zero_shot_accuracy", "ensemble_accuracy"), before)),
            "train_seconds": round(time.time() - began, 2),
        }
        result |= measured | about
        runs.publish(
            folder, about | {"model": learned.state_dict()}, result, defaults, lambda path: None
        )
    return result


def main(method, own, world, description, learn):
    """The program of a fork. Arguments: as in `configure` and `run`."""
    exit_on_bad_input(lambda: run(*configure(method, own, world, description), learn), PromptError)
