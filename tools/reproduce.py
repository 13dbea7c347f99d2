"""Every number and picture of docs/RESULTS.md, and runs on real datasets.

    python -m tools.reproduce            # runs that docs/results.jsonl lacks; all take 2 to 3 hours
    python -m tools.reproduce --tables   # tables and pictures from docs/results.jsonl, in seconds
    python -m tools.reproduce --again    # repeat a tenth of the runs: do they agree?
    python -m tools.reproduce --tasks eurosat dtd --data DATA    # base-to-new on real datasets

Runs go to out/, and those finished there are not repeated. Hyper-parameters were chosen on
validation images of `shapes`; no method was run on the other three tasks before all were fixed.

docs/results.jsonl has one run per line: what tables and pictures need from its `result.json`, its
evaluations and its `why.json`. In README.md and docs/RESULTS.md, each table is written between
`<!-- name -->` and `<!-- end -->`. Add further runs to `jobs`, further tables to `TABLES`.
"""

import lib.start  # noqa: F401  # isort: skip, before PyTorch

import contextlib
import io
import json
import multiprocessing
import random
import re
import shutil
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import eval
import train
from lib.errors import BadInput, exit_on_bad_input
from lib.pictures import draw_pictures
from lib.results import accuracies, cell, harmonic_mean, markdown, mean_std, runs_table
from lib.runs import find_runs
from lib.settings import Parser, as_words
from lib.start import n_threads
from lib.world import DATASETS, TASKS, class_names
from prompts import PromptError
from tools.why import why

RESULTS = Path("docs", "results.jsonl")
PAGES = Path("README.md"), Path("docs", "RESULTS.md")
NAMES = {
    "zero-shot": "zero-shot, one template",
    "ensemble": "ensemble of all templates",
    "linear": "linear probe",
    "linear_zeroshot": "linear probe from zero-shot",
    "coop": "CoOp",
    "cocoop": "CoCoOp",
    "lasp": "LASP",
    "mocoop": "MoCoOp",
}
LEARNED = list(NAMES)[2:]
PROMPT_METHODS = [method for method in LEARNED if method not in train.PROBES]
SHOTS = 1, 2, 4, 8, 16
SEEDS = 1, 2, 3  # of every task
SHAPES_SEEDS = 1, 2, 3, 4, 5
APART = {"image_side", "text_names", "gate_target"}  # settings with a table of their own
SHIFTED = "shapes_v2", "shapes_sketch", "shapes_a", "shapes_r"

N_TEST = {dataset: 120 * len(class_names(dataset)) for dataset in DATASETS}

# LASP's schedule for each dataset, from the run logs of its authors' code (1adrianb/lasp). There is
# none for ImageNet.
LONG = "--text-weight 10"  # 50 epochs, as by default
SHORT = "--epochs 25 --warm-up 3 --text-weight 5"
SCHEDULES = {
    "caltech101": LONG,
    "oxford_pets": SHORT,
    "stanford_cars": SHORT,
    "oxford_flowers": SHORT,
    "food101": "--epochs 10 --warm-up 1 --batch-size 1 --lr 0.002 --text-weight 5",
    "fgvc_aircraft": SHORT,
    "sun397": SHORT,
    "dtd": LONG,
    "eurosat": "--epochs 300 --warm-up 7 --text-weight 5",
    "ucf101": LONG,
}

# ---------------------------------------------------------------------------------------- the runs

ABLATIONS = (
    *("--gate-weight 0", "--text-weight 0", "--router uniform", "--router frozen"),
    *("--top-k 1", "--top-k 4", "--top-k 8", "--init random", "--one-group", "--groups auto"),
    *("--text-bias", "--text-scale 100", "--text-target templates", "--max-grad-norm 0"),
    *("--text-weight 25", "--epochs 25", "--epochs 100", "--full-stop"),
)


def jobs():
    """The command line of every run, for train.py."""
    for seed in SHAPES_SEEDS:
        for method in LEARNED:
            for shots in SHOTS:
                yield f"--method {method} --shots {shots} --seed {seed}"
            yield f"--method {method} --seed {seed} --classes base"
        yield f"--method mocoop --shots 4 --seed {seed} --classes base"
        for setting in ABLATIONS:
            yield f"{setting} --seed {seed}"
            yield f"{setting} --seed {seed} --classes base"
        for method in PROMPT_METHODS:
            for factor in (0.3, 3):
                lr = factor * train.preset(method, "shapes", shots=16)["lr"]
                yield f"--method {method} --lr {lr:.3g} --seed {seed}"
    for seed in SEEDS:
        for task in TASKS:
            for classes in ("all", "base"):
                own = f"--dataset {task} --classes {classes} --seed {seed}"
                if task != "shapes":
                    yield from (f"--method {method} {own}" for method in LEARNED)
                for method in ("mocoop", "coop"):
                    for side in ("layer-norms", "prompts"):
                        yield f"--method {method} --image-side {side} {own}"
                yield f"--gate-target mean {own}"
            for method in ("mocoop", "lasp"):
                base = f"--dataset {task} --classes base --seed {seed}"
                yield f"--method {method} --text-names seen {base}"


def evaluations(result):
    """What to evaluate a run on: base runs on the new classes, those on all of `shapes` with 16
    shots on the shifted sets."""
    if result["classes"] == "base":
        if result["method"] in train.PROBES:  # probes know no other classes
            return []
        return [{"classes": "new"}]
    if result["dataset"] == "shapes" and result["classes"] == "all" and result["shots"] == 16:
        return [{"dataset": dataset} for dataset in SHIFTED]
    return []


def has_swaps(result):
    published = result["method"] in ("mocoop", "coop") and not result["changed_flags"]
    wanted = result["classes"] == "base" or result["dataset"] == "shapes"
    return published and wanted and result["shots"] == 16


def run_job(words, again=False):
    """Makes a run and its evaluations, unless they exist. Returns its line of results.jsonl.
    again: make it from scratch, in another folder."""
    torch.set_num_threads(1)
    silence = io.StringIO()
    with contextlib.redirect_stdout(silence), contextlib.redirect_stderr(silence):
        config, _ = train.configure(words.split())
        folder = Path(config["out"])
        if again:
            folder = Path("out", "again", folder.relative_to("out"))
            config["out"] = str(folder)
            shutil.rmtree(folder, ignore_errors=True)
        if not (folder / "result.json").exists():
            train.run(config, resume=(folder / "resume.pt").exists())
        result = json.loads((folder / "result.json").read_text())
        targets = evaluations(result)
        if len(list(folder.glob("eval_*.json"))) < len(targets):
            for target in targets:
                eval.evaluate(folder, **target)
        if has_swaps(result) and not (folder / "why.json").exists():
            why(folder, SHIFTED if result["classes"] == "all" else ())
    return compact(folder)


def compact(folder):
    """A run as a line of the file: [result, its evaluations, its why.json or None]."""

    def read(name):
        return [json.loads(file.read_text()) for file in sorted(folder.glob(name))]

    ((result,), others, apart) = map(read, ("result.json", "eval_*.json", "why.json"))
    task = "dataset", "classes", "clip", "shots", "seed"
    told_apart_by = *task, "method", "label", "changed_flags"
    untrained = "zero_shot_accuracy", "ensemble_accuracy"
    measured = "accuracy", "val_accuracy", *untrained, "n_prompts"
    short = pick(result, *told_apart_by, *measured)
    short["config"] = pick(result["config"], *task, "groups")
    if result["n_prompts"] > 1 and not result["changed_flags"] and result["shots"] in (4, 16):
        short |= pick(result, "router", "prompt_usage")
    others = [pick(other, "dataset", "classes", "accuracy", *untrained) for other in others]
    return [short, others, apart[0] if apart else None]


def pick(dictionary, *keys):
    return {key: dictionary[key] for key in keys}


def run_all(todo, again=False):
    """Makes all runs. Returns their lines, in order."""
    n_processes = 1 if torch.cuda.is_available() else n_threads()
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(n_processes, mp_context=spawn) as pool:
        return list(tqdm(pool.map(partial(run_job, again=again), todo), total=len(todo)))


def key_of(result):
    """What identifies a run's result: its folder below out/."""
    task = f"{result['shots']}shot_{result['classes']}_seed{result['seed']}"
    return f"{result['dataset']}/{result['label']}_{task}"


def key_of_job(words):
    return str(Path(train.configure(words.split())[0]["out"]).relative_to("out"))


def run_missing(todo, known):
    """Makes the runs that are missing. Returns all lines, in order. known: the existing lines."""
    known = {key_of(line[0]): line for line in known}
    missing = [words for words in todo if key_of_job(words) not in known]
    known |= {key_of(line[0]): line for line in run_all(missing)}
    return [known[key_of_job(words)] for words in todo]


def run_again(todo, known):
    """Repeats a tenth of the runs and prints how they differ from the known lines. Raises BadInput
    for a difference of more than three test images."""
    known = {key_of(line[0]): line for line in known}
    tenth = random.Random(1).sample(todo, len(todo) // 10)
    equal, most = 0, 0
    for line in run_all(tenth, again=True):
        before = known[key_of(line[0])]
        equal += (line[0]["accuracy"], line[1:]) == (before[0]["accuracy"], before[1:])
        for new, old in zip([line[0], *line[1]], [before[0], *before[1]]):
            n_test = N_TEST[new["dataset"]] // (1 if new["classes"] == "all" else 2)
            images = round(abs(new["accuracy"] - old["accuracy"]) / 100 * n_test)
            most = max(most, images)
    print(f"{len(tenth)} of {len(todo)} runs, repeated: {equal} equal to the last digit,")
    print(f"  all within {most} test images")
    if most > 3:
        raise BadInput("the runs differ from docs/results.jsonl: repeat all of them")


# --------------------------------------------------------------------------------- real datasets


def real_jobs(tasks, methods, schedule, data, clip):
    """Base-to-new with 16 shots, three seeds: command lines for train.py."""
    for task in tasks:
        for method in methods:
            own = SCHEDULES[task] if schedule == "lasp" and method in ("mocoop", "lasp") else ""
            for seed in SEEDS:
                run = f"--dataset {task} --classes base --seed {seed} --data {data} --clip {clip}"
                yield f"--method {method} {own} {run}"


# ------------------------------------------------------------------------------- their accuracies

MEASURES = "all", "base", "new", "H"


class Results:
    """The accuracies of all runs: `results(task, label, measure)` is {seed: percent}.

    measure: one of MEASURES, or a shifted test set.
    """

    def __init__(self, lines):
        self.lines, self.found = lines, defaultdict(lambda: defaultdict(dict))
        for row, columns in accuracies([line[:2] for line in lines]).items():
            for column, of in columns.items():
                measure = row.classes if column == "accuracy" else column
                self.found[row.dataset, row.label, row.shots][measure] |= of
        for of in self.found.values():
            both = of["base"].keys() & of["new"].keys()
            of["H"] = {seed: harmonic_mean(of["base"][seed], of["new"][seed]) for seed in both}

    def __call__(self, task, label, measure, shots=16, seeds=SHAPES_SEEDS):
        shots = 0 if label in ("zero-shot", "ensemble") else shots
        found = self.found[task, label, shots][measure]
        return {seed: found[seed] for seed in seeds if seed in found}

    def each(self, label, measure):
        """{(task, seed): percent} of the runs on all four tasks."""
        found = {task: self(task, label, measure, seeds=SEEDS) for task in TASKS}
        return {(task, seed): x for task, of in found.items() for seed, x in of.items()}

    def mean(self, label, measure):
        """{seed: the mean over the tasks}, for the seeds that every task has."""
        each = self.each(label, measure)
        rows = {seed: [each.get((task, seed), np.nan) for task in TASKS] for seed in SEEDS}
        return {seed: np.mean(row) for seed, row in rows.items() if not np.isnan(row).any()}

    def less(self, label, other, measure):
        """Run by run, `each` of one label minus that of another."""
        return differences(self.each(label, measure), self.each(other, measure))


def differences(one, other):
    """{key: one - other} for the keys that both have."""
    return {key: value - other[key] for key, value in one.items() if key in other}


# ------------------------------------------------------------------------------------- the tables
# Each is a function of `Results` that returns rows of cells, the heading first.


def grid(heading, rows, columns, value, sign=""):
    """rows: {its first cells: key}. value(key, column): the percents of a cell."""
    cells = [[*name, *(cell(value(key, c), sign) for c in columns)] for name, key in rows.items()]
    return [[*heading, *columns], *cells]


METHOD_ROWS = {(name,): label for label, name in NAMES.items()}


def few_shot_table(r):
    return grid(["shots"], METHOD_ROWS, SHOTS, lambda m, n: r("shapes", m, "all", n))


def methods_table(r):
    return grid(["four tasks, 16 shots"], METHOD_ROWS, MEASURES, r.mean)


def tasks_table(r):
    rows = {(task, name): (task, label) for task in TASKS for label, name in NAMES.items()}
    return grid(["task", "16 shots"], rows, MEASURES, lambda key, what: r(*key, what, seeds=SEEDS))


def shifted_table(r):
    return grid(["16 shots"], METHOD_ROWS, SHIFTED, lambda m, target: r("shapes", m, target))


def paired_table(r):
    """MoCoOp minus each other method, run by run: runs of the same task and seed share images."""
    rows = dict(list(METHOD_ROWS.items())[:-1])
    table = grid(["MoCoOp less"], rows, MEASURES, lambda m, what: r.less("mocoop", m, what), "+")
    for measure in ("all", "H"):
        table[0].append(f"better: {measure}")
        for row, label in zip(table[1:], rows.values()):
            found = r.less("mocoop", label, measure).values()
            row.append(f"{sum(x > 0 for x in found)} of {len(found)}" if found else "–")
    return table


def ablation_table(r):
    """The effect of each changed setting, seed by seed, sorted by the effect on all classes."""

    def effect(label, measure):
        return differences(r("shapes", label, measure), r("shapes", "mocoop", measure))

    changed = {
        run["label"]: run["changed_flags"]
        for run, *_ in r.lines
        if run["method"] == "mocoop" and run["dataset"] == "shapes"
    }
    rows = {
        (f"`{' '.join(as_words(settings))}`".replace(".0`", "`"),): label
        for label, settings in changed.items()
        if settings and not settings.keys() & {"lr", *APART}
    }
    rows = dict(sorted(rows.items(), key=lambda row: np.mean([*effect(row[1], "all").values()])))
    columns = *MEASURES, "shapes_sketch", "shapes_r"
    return grid(["less the published setting"], rows, columns, effect, "+")


def names_table(r):
    """The text loss with and without the names of new classes, beside CoOp, which reads no new
    names in training. The last column compares run by run."""
    seen = "{}-text_namesseen".format
    labels = "coop", seen("lasp"), "lasp", seen("mocoop"), "mocoop"
    rows = {
        (NAMES[label.split("-")[0]], "seen" if label in ("coop", *labels[1::2]) else "all"): label
        for label in labels
    }
    table = grid(["four tasks, 16 shots", "names"], rows, MEASURES[1:], r.mean)
    leads = ["", *(cell(r.less(label, "coop", "H"), "+") for label in labels[1:])]
    return [[*row, lead] for row, lead in zip(table, ["H less CoOp's", *leads])]


def target_table(r):
    """The gate's target from an image's own class, or from the mean over classes."""
    by_mean = "mocoop-gate_targetmean"
    table = grid(["gate's target"], {("label",): "mocoop", ("mean",): by_mean}, MEASURES, r.mean)
    less = (cell(r.less(by_mean, "mocoop", measure), "+") for measure in MEASURES)
    return [*table, ["mean less label", *less]]


def rates_table(r):
    """Accuracy on validation images, on which a rate should be chosen, and on test images."""
    found = defaultdict(list)
    for run, *_ in r.lines:
        changed = run["changed_flags"]
        right = run["dataset"] == "shapes" and run["classes"] == "all"
        if right and run["shots"] == 16 and run["n_prompts"] and not changed.keys() - {"lr"}:
            key = run["method"], changed.get("lr", "published")
            found[key].append((run["val_accuracy"], run["accuracy"]))
    rows = [
        [method, lr, len(n), *("{:.1f} ± {:.1f}".format(*mean_std(c)) for c in zip(*n))]
        for (method, lr), n in sorted(found.items(), key=str)
    ]
    return [["method", "lr", "seeds", "val", "test"], *rows]


def images_table(r):
    """MoCoOp and CoOp with and without a trained part in the image encoder, on the four tasks."""
    rows = {
        (NAMES[method], side or "nothing"): f"{method}-image_side{side}" if side else method
        for method in ("mocoop", "coop")
        for side in ("", "layer-norms", "prompts")
    }

    def value(label, column):
        return r(column, label, "all", seeds=SEEDS) if column in TASKS else r.mean(label, column)

    return grid(["method", "learned in the image encoder"], rows, (*MEASURES, *TASKS), value)


def parts_exchanged(lines, columns):
    """{"routing, text features": mean accuracy per column} of the runs that have a `why.json`.
    columns: a list of (task, images)."""
    found = defaultdict(lambda: defaultdict(list))
    for run, _, parts in sorted(lines, key=lambda line: line[0]["method"] != "mocoop"):
        for images, of in (parts or {}).items():
            for way, value in of["accuracy"].items():
                routing, texts = way.split(", ")
                if run["method"] == "coop":  # one prompt, so no routing
                    way = f"CoOp: {texts}"
                if run["method"] == "mocoop" or routing == "router":
                    found[way][run["dataset"], images].append(value)
    return {way: [np.mean(values[c]) for c in columns] for way, values in found.items()}


def why_table(r):
    """Accuracy with parts of the trained mixture replaced, on base and on new classes, by task."""
    columns = [(task, classes) for classes in ("base", "new") for task in TASKS]
    table = [["routing, text features", "base", "new", *map(" ".join, columns)]]
    lines = [line for line in r.lines if line[0]["seed"] in SEEDS]
    for way, means in parts_exchanged(lines, columns).items():
        halves = np.reshape(means, (2, len(TASKS))).mean(axis=1)
        table.append([way, *(f"{mean:.1f}" for mean in (*halves, *means))])
    return table


def why_shifted_table(r):
    """The same after training on all of `shapes`, on its test images and the shifted sets."""
    found = parts_exchanged(r.lines, [("shapes", images) for images in ("all", *SHIFTED)])
    rows = [[way, *(f"{mean:.1f}" for mean in means)] for way, means in found.items()]
    return [["routing, text features", "shapes", *SHIFTED], *rows]


def gate_table(r):
    """What the gate does, and how far apart the classes are, for each set of test images."""
    found = defaultdict(list)
    for run, _, parts in r.lines:
        for images, of in (parts if parts and run["method"] == "mocoop" else {}).items():
            what = images if images in SHIFTED else f"{run['dataset']}, {images}"
            found[what].append(of["gate"] | of["classes"])
    rows = [
        [what, *(f"{np.mean([of[key] for of in every]):.3f}" for key in every[0])]
        for what, every in sorted(found.items())
    ]
    return [["images of", *next(iter(found.values()))[0]], *rows]


TABLES = {
    "few-shot": few_shot_table,
    "methods": methods_table,
    "paired": paired_table,
    "tasks": tasks_table,
    "names": names_table,
    "target": target_table,
    "shifted": shifted_table,
    "ablations": ablation_table,
    "rates": rates_table,
    "images": images_table,
    "why": why_table,
    "why-shifted": why_shifted_table,
    "gate": gate_table,
}


def filled(page, results):
    """A Markdown page with each table in its place."""
    place = re.compile(r"(<!-- (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
    return place.sub(
        lambda found: f"{found[1]}{markdown(TABLES[found[2]](results))}\n{found[3]}", page
    )


def write_tables(lines):
    """Fills the pages and draws assets/few_shot.png and router.png."""
    for page in PAGES:
        text = filled(page.read_text(encoding="utf-8"), Results(lines))
        page.write_text(text, encoding="utf-8")
    print("saved: README.md, docs/RESULTS.md")
    draw_pictures([line[:2] for line in lines if line[0]["dataset"] == "shapes"], Path("assets"))


def read_results(file=RESULTS):
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def run_command_line():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--tables", action="store_true", help="only tables and pictures, no runs")
    add("--again", action="store_true", help="repeat a tenth of the runs")
    add("--tasks", nargs="+", choices=SCHEDULES, help="real datasets instead of the built-in world")
    add("--methods", nargs="+", choices=LEARNED, default=LEARNED, help="for the real datasets")
    add("--schedule", choices=("lasp",), help="LASP's schedule per dataset, for mocoop and lasp")
    add("--data", default="data", help="the folder that holds all datasets")
    add("--clip", default="ViT-B/16", help="the CLIP for the real datasets")
    args = parser.parse_args()
    if args.tasks:
        todo = real_jobs(args.tasks, args.methods, args.schedule, args.data, args.clip)
        run_all(list(todo))
        print(runs_table([run for task in args.tasks for run in find_runs(Path("out", task))]))
    elif args.again:
        run_again(list(jobs()), read_results())
    else:
        if not args.tables:
            lines = run_missing(list(jobs()), read_results())
            text = [json.dumps(line, separators=(",", ":")) for line in lines]
            RESULTS.write_text("\n".join(text) + "\n", encoding="utf-8")
        write_tables(read_results())


if __name__ == "__main__":
    exit_on_bad_input(run_command_line, PromptError)
