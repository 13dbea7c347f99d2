"""Every number and picture on the built-in world (docs/RESULTS.md).

    python -m tools.reproduce            # about 100 minutes on two cores; may be stopped
    python -m tools.reproduce --tables   # tables and pictures from docs/results.jsonl, in seconds
    python -m tools.reproduce --again    # a tenth of the runs once more: are they the same?

Runs go to out/. Settings are the published ones. Hyper-parameters were chosen on validation images
of `shapes`; no method was run on the other three tasks before all was settled.
"""

import contextlib
import io
import json
import multiprocessing
import os
import random
import shutil
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import torch

import eval
import train
from lib.errors import BadInput, exit_on_bad_input
from lib.flags import Parser, make_parser
from lib.pictures import draw_pictures
from lib.world import TASKS
from tools import results
from tools.why import why

SEEDS = 1, 2, 3, 4, 5  # of `shapes`; the other tasks have the first three
SHOTS = 1, 2, 4, 8, 16
LEARNED = "linear", "coop", "cocoop", "lasp", "mocoop"
ABLATIONS = (
    *("--gate-weight 0", "--text-weight 0", "--router uniform", "--router frozen"),
    *("--top-k 1", "--top-k 4", "--top-k 8", "--init random", "--one-group", "--groups auto"),
    *("--text-bias", "--text-scale 100", "--text-target templates", "--max-grad-norm 0"),
    *("--text-weight 25", "--epochs 25", "--epochs 100", "--full-stop"),
)
RATES = 0.3, 3  # times the method's own


def jobs():
    """The flags of every run."""
    for seed in SEEDS:
        for method in LEARNED:
            for shots in SHOTS:
                yield f"--method {method} --shots {shots} --seed {seed}"
            yield f"--method {method} --seed {seed} --classes base"
        yield f"--method mocoop --shots 4 --seed {seed} --classes base"
        for flags in ABLATIONS:
            yield f"{flags} --seed {seed}"
            yield f"{flags} --seed {seed} --classes base"
        for method in LEARNED[1:]:
            default = train.FLAGS["method: training"]["lr"][0]
            for rate in RATES:
                lr = train.METHODS[method].get("lr", default) * rate
                yield f"--method {method} --lr {lr:.3g} --seed {seed}"
    for seed in results.SEEDS:
        for task in TASKS:
            for classes in ("all", "base"):
                own = f"--dataset {task} --classes {classes} --seed {seed}"
                if task != "shapes":
                    yield from (f"--method {method} {own}" for method in LEARNED)
                for method in ("mocoop", "coop"):
                    for side in ("layer-norms", "prompts"):
                        yield f"--method {method} --image-side {side} {own}"


def evaluations(config):
    """What to evaluate a run on: base runs on the new classes, others of `shapes` with 16 shots on
    the shifted sets."""
    if config["classes"] == "base" and config["classifier"] != "linear":  # it cannot know others
        return [{"classes": "new"}]
    if config["dataset"] == "shapes" and config["classes"] == "all" and config["shots"] == 16:
        return [{"dataset": dataset} for dataset in results.SHIFTED]
    return []


def is_to_be_taken_apart(config, folder):
    published = folder.name.startswith(("mocoop_16shot_", "coop_16shot_"))
    return published and (config["classes"] == "base" or config["dataset"] == "shapes")


def run_job(flags, again=False):
    """One run and its evaluations, as far as they are not there yet: a line of results.jsonl.
    again: from the start, in another folder."""
    torch.set_num_threads(1)
    with contextlib.redirect_stdout(io.StringIO()):
        parser = make_parser(__doc__, train.FLAGS, train.METHODS)
        config, groups, folder, _ = train.resolve(parser.parse_args(flags.split()))
        if again:
            folder = Path("out", "again", folder.relative_to("out"))
            shutil.rmtree(folder, ignore_errors=True)
        if not (folder / "result.json").exists():
            train.train(config, groups, folder, resume=(folder / "resume.pt").exists())
        for target in evaluations(config):
            name = f"{target.get('dataset', config['dataset'])}_{target.get('classes', 'all')}"
            if not (folder / f"eval_{name}.json").exists():
                eval.evaluate(folder, **target)
        if is_to_be_taken_apart(config, folder) and not (folder / "why.json").exists():
            why(folder, results.SHIFTED if config["classes"] == "all" else ())
    read = [json.loads(file.read_text()) for file in sorted(folder.glob("eval_*.json"))]
    parts = folder / "why.json"
    return results.compact(
        json.loads((folder / "result.json").read_text()),
        read,
        json.loads(parts.read_text()) if parts.exists() else None,
    )


def run_all(todo, again=False):
    """{flags: line}, in the order of `todo`. Prints how many are done, and the time that is left if
    the rest takes as long as what was done."""
    n_processes = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2
    start, lines = time.time(), {}
    mixed = random.Random(0).sample(todo, len(todo))  # slow runs come anywhere
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(n_processes, mp_context=spawn) as pool:
        futures = {pool.submit(run_job, flags, again): flags for flags in mixed}
        try:
            for n, future in enumerate(as_completed(futures), 1):
                flags = futures[future]
                lines[flags] = future.result()
                minutes = (time.time() - start) / 60
                print(
                    f"{n:3d}/{len(todo)}  {minutes:4.0f} min, {minutes / n * (len(todo) - n):4.0f}"
                    f" left  {lines[flags][0]['accuracy']:6.2f} %  {flags}",
                    flush=True,
                )
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return {flags: lines[flags] for flags in todo}


def without_times(line):
    result, others, parts = line
    return [{k: v for k, v in result.items() if k != "train_seconds"}, others, parts]


def run_again(todo):
    """A tenth of the runs once more. Raises BadInput unless they give the same."""
    tenth = random.Random(1).sample(todo, len(todo) // 10)
    first = run_all(tenth)
    second = run_all(tenth, again=True)
    for flags in tenth:
        if without_times(first[flags]) != without_times(second[flags]):
            raise BadInput(f"train.py {flags} gave something else than before")
    print(f"{len(tenth)} of {len(todo)} runs, taken again, gave the same to the last digit")


def write_tables(lines):
    """Fills README.md and docs/RESULTS.md, and draws assets/few_shot.png, router.png, usage.png,
    ablation.png."""
    for page, tables in results.pages(lines).items():
        text = results.filled(page.read_text(encoding="utf-8"), tables)
        page.write_text(text, encoding="utf-8")
    shapes = [line[:2] for line in lines if line[0]["dataset"] == "shapes"]
    shapes = [run for run in shapes if "image_side" not in run[0]["changed_flags"]]
    drawn = draw_pictures(shapes, Path("assets"))
    print(f"saved: README.md, docs/RESULTS.md, assets/{', assets/'.join(drawn)}")


def run_command_line():
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--tables", action="store_true", help="only tables and pictures, no runs")
    parser.add_argument("--again", action="store_true", help="a tenth of the runs once more")
    args = parser.parse_args()
    todo = list(jobs())
    if args.again:
        run_again(todo)
        return
    if not args.tables:
        start = time.time()
        lines = list(run_all(todo).values())
        print(f"{len(lines)} runs in {(time.time() - start) / 60:.0f} minutes")
        results.save_results(lines, results.RESULTS)
    write_tables(results.load_results())


if __name__ == "__main__":
    exit_on_bad_input(run_command_line)
