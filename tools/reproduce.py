"""Every table and picture of the numbers on the built-in world (docs/RESULTS.md).

    python -m tools.reproduce        # within an hour on two cores; finished runs are skipped

Runs go to out/shapes, with what `eval.py --table` and `--plots` make of them. Settings are the
published ones. The last runs try other learning rates, as many for each method, to be compared by
their accuracy on validation images.
"""

import contextlib
import io
import json
import multiprocessing
import os
import time
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import numpy as np
import torch

import eval
import train
from lib.flags import make_parser
from lib.metrics import mean_std
from lib.pictures import draw_pictures
from lib.runs import find_runs
from lib.tables import markdown, runs_table

SEEDS = 1, 2, 3, 4, 5
SHOTS = 1, 2, 4, 8, 16
LEARNED = "linear", "coop", "cocoop", "lasp", "mocoop"
SHIFTED = "shapes_v2", "shapes_sketch", "shapes_a", "shapes_r"
ABLATIONS = (
    *("--gate-weight 0", "--text-weight 0", "--router uniform", "--router frozen"),
    *("--top-k 1", "--top-k 4", "--top-k 8", "--init random", "--one-group", "--groups auto"),
    *("--text-bias", "--text-scale 100", "--text-target templates", "--max-grad-norm 0"),
    *("--text-weight 25", "--epochs 25", "--epochs 100"),
)
RATES = 0.3, 3  # times the method's own


def jobs():
    """(flags, [what to evaluate the run on afterwards])."""
    new = [{"classes": "new"}]
    shifted = [{"dataset": dataset} for dataset in SHIFTED]
    for seed in SEEDS:
        for method in LEARNED:
            for shots in SHOTS:
                targets = shifted if shots == 16 else []
                yield f"--method {method} --shots {shots} --seed {seed}", targets
        for method in LEARNED:
            targets = new if method != "linear" else []  # it cannot know new classes
            yield f"--method {method} --seed {seed} --classes base", targets
        yield f"--method mocoop --shots 4 --seed {seed} --classes base", new
    for flags in ABLATIONS:
        for seed in SEEDS:
            yield f"{flags} --seed {seed}", shifted
            yield f"{flags} --seed {seed} --classes base", new
    for method in LEARNED[1:]:
        for rate in RATES:
            for seed in SEEDS:
                default = train.FLAGS["method: training"]["lr"][0]
                lr = train.METHODS[method].get("lr", default) * rate
                yield f"--method {method} --lr {lr:.3g} --seed {seed}", []


def run_job(flags, targets):
    """One run and its evaluations, if they are not there yet; returns what to print."""
    torch.set_num_threads(1)
    start = time.time()
    with contextlib.redirect_stdout(io.StringIO()):
        parser = make_parser(__doc__, train.FLAGS, train.METHODS)
        config, groups, folder, _ = train.resolve(parser.parse_args(flags.split()))
        if not (folder / "result.json").exists():
            train.train(config, groups, folder, resume=(folder / "resume.pt").exists())
        for target in targets:
            name = f"{target.get('dataset', 'shapes')}_{target.get('classes', 'all')}"
            if not (folder / f"eval_{name}.json").exists():
                eval.evaluate(folder, **target)
    result = json.loads((folder / "result.json").read_text())
    return f"{result['accuracy']:6.2f} %  {time.time() - start:4.0f} s  {flags}"


def by_validation(runs):
    """All prompt methods and settings at 4 and 16 shots, in Markdown: the mean accuracy on
    validation images, which is what to choose by, and on test images; and how much of a style's
    weight goes to its own prompt, where there is one per style."""
    found = defaultdict(list)
    for result, evaluations in runs:
        if not result["n_prompts"] or result["shots"] not in (4, 16):
            continue
        new = [e["accuracy"] for e in evaluations if e["classes"] == "new"]
        share = np.array(result["router"]["share"])
        own = [100 * np.trace(share) / len(share)] if share.shape[0] == share.shape[1] else []
        key = result["classes"], result["shots"], result["label"]
        found[key].append((result["val_accuracy"], result["accuracy"], new, own))
    heading = "classes", "shots", "method", "seeds", "val", "test", "new", "own prompt's share"
    lines = [heading]
    for key, numbers in sorted(found.items()):
        columns = [np.hstack(column) for column in zip(*numbers)]
        cells = ["{:.1f} ± {:.1f}".format(*mean_std(c)) if len(c) else "" for c in columns]
        lines.append([*key, len(numbers), *cells])
    return markdown(lines)


def main():
    n_jobs = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2
    todo = list(jobs())
    run_job(*todo[0])  # encodes what all share
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(n_jobs, mp_context=spawn) as pool:
        done = [pool.submit(run_job, *job) for job in todo]
        for i, job in enumerate(as_completed(done), 1):
            print(f"{i:3d}/{len(todo)}  {job.result()}", flush=True)
    folder = Path("out", "shapes")
    runs = find_runs(folder)
    tables = f"{runs_table(runs)}\n\n{by_validation(runs)}\n"
    (folder / "tables.md").write_text(tables, encoding="utf-8")
    print(f"saved in {folder}: tables.md, {', '.join(draw_pictures(runs, folder))}")


if __name__ == "__main__":
    main()
