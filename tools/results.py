"""The compact results of many runs, and the tables and pictures that are made of them.

docs/results.jsonl holds one run per line: what a table or a picture reads of its `result.json`, of
its evaluations and of its `why.json`. README.md and docs/RESULTS.md have a place for each of their
tables, between `<!-- name -->` and `<!-- end -->`, which `tools.reproduce` fills.
"""

import json
import re
from collections import defaultdict
from pathlib import Path

import numpy as np

from lib.errors import BadInput
from lib.metrics import harmonic_mean, mean_std
from lib.tables import accuracies, markdown
from lib.world import TASKS

RESULTS = Path("docs", "results.jsonl")
NAMES = {
    "zero-shot": "zero-shot, one template",
    "ensemble": "ensemble of all templates",
    "linear": "linear probe",
    "coop": "CoOp",
    "cocoop": "CoCoOp",
    "lasp": "LASP",
    "mocoop": "MoCoOp",
}
SHIFTED = "shapes_v2", "shapes_sketch", "shapes_a", "shapes_r"
SEEDS = 1, 2, 3  # that every task has

# ------------------------------------------------------------------------------- compact results


def compact(result, evaluations, why=None):
    """A run as a line of the file: [result, evaluations, why]."""
    keep = (
        *("dataset", "classes", "clip", "method", "label", "changed_flags", "shots", "seed"),
        *("accuracy", "val_accuracy", "zero_shot_accuracy", "ensemble_accuracy", "n_prompts"),
        "train_seconds",
    )
    short = {key: result[key] for key in keep}
    short["config"] = {
        key: result["config"][key]
        for key in ("dataset", "classes", "shots", "seed", "clip", "groups")
    }
    if result["n_prompts"] > 1 and not result["changed_flags"] and result["shots"] in (4, 16):
        short |= {key: result[key] for key in ("router", "prompt_usage", "prompt_usage_by_epoch")}
    keep = "dataset", "classes", "accuracy", "zero_shot_accuracy", "ensemble_accuracy"
    return [short, [{key: e[key] for key in keep} for e in evaluations], why]


def save_results(lines, file):
    text = [json.dumps(line, separators=(",", ":")) for line in lines]
    file.write_text("\n".join(text) + "\n", encoding="utf-8")


def load_results(file=RESULTS):
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


# ---------------------------------------------------------------------------------------- tables


class Numbers:
    """{seed: accuracy} of any kind of run."""

    def __init__(self, lines):
        self.rows = {
            (row.dataset, row.classes, row.label, row.shots): columns
            for row, columns in accuracies([line[:2] for line in lines]).items()
        }

    def __call__(self, dataset, classes, label, shots=16, column="accuracy"):
        shots = 0 if label in ("zero-shot", "ensemble") else shots
        return dict(self.rows.get((dataset, classes, label, shots), {}).get(column, {}))

    def measures(self, dataset, label):
        """{"all" | "base" | "new" | "H": {seed: percent}} at 16 shots."""
        base, new = (self(dataset, "base", label, column=c) for c in ("accuracy", "new"))
        h = {seed: harmonic_mean(base[seed], new[seed]) for seed in base.keys() & new.keys()}
        return {"all": self(dataset, "all", label), "base": base, "new": new, "H": h}


def cell(values, signed=False):
    """Mean ± standard deviation of {key: percent}, or nothing."""
    if not values:
        return "–"
    mean, std = mean_std(values.values())
    spread = f" ± {std:.1f}" if len(values) > 1 and std > 1e-9 else ""
    return f"{mean:+.1f}{spread}" if signed else f"{mean:.1f}{spread}"


def over_tasks(numbers, label):
    """{measure: {seed: mean over the tasks}} of the seeds that every task has."""
    per_task = [numbers.measures(task, label) for task in TASKS]
    return {
        measure: {
            seed: np.mean([m[measure][seed] for m in per_task])
            for seed in SEEDS
            if all(seed in m[measure] for m in per_task)
        }
        for measure in ("all", "base", "new", "H")
    }


def few_shot_table(numbers):
    shots = 1, 2, 4, 8, 16
    rows = [[NAMES[m], *(cell(numbers("shapes", "all", m, n)) for n in shots)] for m in NAMES]
    return markdown([["shots", *shots], *rows])


def methods_table(numbers):
    """The mean over the four tasks."""
    rows = [[NAMES[m], *map(cell, over_tasks(numbers, m).values())] for m in NAMES]
    return markdown([["four tasks, 16 shots", "all", "base", "new", "H"], *rows])


def tasks_table(numbers):
    rows = [
        [task, NAMES[m], *map(cell, _of_three_seeds(numbers.measures(task, m)).values())]
        for task in TASKS
        for m in NAMES
    ]
    return markdown([["task", "16 shots", "all", "base", "new", "H"], *rows])


def _of_three_seeds(measures):
    return {k: {s: v[s] for s in SEEDS if s in v} for k, v in measures.items()}


def shifted_table(numbers):
    rows = [
        [NAMES[m], *(cell(numbers("shapes", "all", m, 16, target)) for target in SHIFTED)]
        for m in NAMES
    ]
    return markdown([["16 shots", *SHIFTED], *rows])


def differences(one, other):
    """{seed: one - other} of the seeds that both have."""
    return {seed: one[seed] - other[seed] for seed in one.keys() & other.keys()}


def paired_table(numbers):
    """MoCoOp less every other method, run by run: runs of one task and seed share their images."""
    rows = []
    for method in NAMES:
        if method == "mocoop":
            continue
        found = defaultdict(dict)
        for task in TASKS:
            ours, theirs = (numbers.measures(task, m) for m in ("mocoop", method))
            for measure in ours:
                for seed, value in differences(ours[measure], theirs[measure]).items():
                    if seed in SEEDS:
                        found[measure][task, seed] = value
        wins = [
            f"{sum(v > 0 for v in found[m].values())} of {len(found[m])}" if found[m] else "–"
            for m in ("all", "H")
        ]
        cells = [cell(found[m], signed=True) for m in ("all", "base", "new", "H")]
        rows.append([NAMES[method], *cells, *wins])
    heading = ["MoCoOp less", "all", "base", "new", "H", "better: all", "better: H"]
    return markdown([heading, *rows])


def ablation_table(numbers, lines):
    """Each changed flag less the published setting, seed by seed, sorted by the effect on all."""
    changed = {line[0]["label"]: line[0]["changed_flags"] for line in lines}
    plain = numbers.measures("shapes", "mocoop")
    targets = "shapes_sketch", "shapes_r"
    rows = []
    for dataset, classes, label, shots in numbers.rows:
        if (dataset, classes, shots) != ("shapes", "all", 16) or not label.startswith("mocoop-"):
            continue
        if changed[label].keys() & {"lr", "image_side"}:
            continue
        own = numbers.measures("shapes", label)
        effects = {m: differences(own[m], plain[m]) for m in own}
        for target in targets:
            columns = (numbers("shapes", "all", name, 16, target) for name in (label, "mocoop"))
            effects[target] = differences(*columns)
        rows.append((np.mean(list(effects["all"].values())), label, effects))
    table = [["less the published setting", "all", "base", "new", "H", *targets]]
    for _, label, effects in sorted(rows, key=lambda row: row[0]):
        cells = [cell(effect, signed=True) for effect in effects.values()]
        table.append([f"`{_flags(changed[label])}`", *cells])
    return markdown(table)


def _flags(changed):
    """Changed flags as on a command line."""
    words = []
    for flag, value in changed.items():
        name = flag.replace("_", "-")
        on_off = {True: [f"--{name}"], False: [f"--no-{name}"]}
        words += (
            on_off[value]
            if isinstance(value, bool)
            else [f"--{name}", f"{value:g}" if isinstance(value, float) else f"{value}"]
        )
    return " ".join(words)


def rates_table(lines):
    """Accuracy on validation images, which is what to choose a rate by, and on test images."""
    found = defaultdict(list)
    for result, _, _ in lines:
        changed = result["changed_flags"]
        right = result["dataset"] == "shapes" and result["classes"] == "all"
        if right and result["shots"] == 16 and result["n_prompts"] and not changed.keys() - {"lr"}:
            key = result["method"], changed.get("lr", "published")
            found[key].append((result["val_accuracy"], result["accuracy"]))
    rows = [
        [method, lr, len(n), *("{:.1f} ± {:.1f}".format(*mean_std(c)) for c in zip(*n))]
        for (method, lr), n in sorted(found.items(), key=str)
    ]
    return markdown([["method", "lr", "seeds", "val", "test"], *rows])


def images_table(numbers, lines):
    """What is learned in the image encoder, for MoCoOp and CoOp, on the four tasks."""
    seconds = defaultdict(list)
    for result, _, _ in lines:
        if result["classes"] == "all" and result["shots"] == 16:
            seconds[result["dataset"], result["label"]].append(result["train_seconds"])
    rows = []
    for method in ("mocoop", "coop"):
        for side in ("", "-image_sidelayer-norms", "-image_sideprompts"):
            label = f"{method}{side}"
            means = over_tasks(numbers, label)
            singly = [_of_three_seeds(numbers.measures(task, label))["all"] for task in TASKS]
            took = [np.mean(seconds[task, label]) for task in TASKS if seconds[task, label]]
            learned = side.removeprefix("-image_side") or "nothing"
            cells = [cell(means[m]) for m in ("all", "base", "new", "H")]
            took = f"{np.mean(took):.0f}" if took else "–"
            rows.append([NAMES[method], learned, *cells, *map(cell, singly), took])
    heading = ["method", "learned in the image encoder", "all", "base", "new", "H", *TASKS, "s"]
    return markdown([heading, *rows])


def _parts(lines, columns):
    """{way of routing, text features: {column: mean}} of runs that were taken apart; columns:
    (task, images) each."""
    found = defaultdict(lambda: defaultdict(list))
    for result, _, parts in sorted(lines, key=lambda line: line[0]["method"] != "mocoop"):
        for images in (parts or {}).keys() & {images for _, images in columns}:
            for way, value in parts[images]["accuracy"].items():
                routing, texts = way.split(", ")
                if result["method"] == "coop":  # one prompt, so no routing
                    if routing != "router":
                        continue
                    way = f"CoOp: {texts}"
                found[way][result["dataset"], images].append(value)
    return {
        way: {column: np.mean(values[column]) if values[column] else np.nan for column in columns}
        for way, values in found.items()
    }


def why_table(lines):
    """Accuracy with parts of the trained mixture exchanged, on base and on new classes, by task."""
    lines = [line for line in lines if line[0]["seed"] in SEEDS]
    columns = [(task, classes) for classes in ("base", "new") for task in TASKS]
    rows = []
    for way, means in _parts(lines, columns).items():
        halves = [[means[task, classes] for task in TASKS] for classes in ("base", "new")]
        cells = (*np.mean(halves, axis=1), *means.values())
        rows.append([way, *(f"{mean:.1f}" for mean in cells)])
    heading = ["routing, text features", "base", "new", *(" ".join(column) for column in columns)]
    return markdown([heading, *rows])


def why_shifted_table(lines):
    """The same for training on all classes of `shapes`, on its test images and the shifted sets."""
    columns = [("shapes", images) for images in ("all", *SHIFTED)]
    means = _parts(lines, columns)
    rows = [[way, *(f"{mean:.1f}" for mean in row.values())] for way, row in means.items()]
    return markdown([["routing, text features", "shapes", *SHIFTED], *rows])


def gate_table(lines):
    """What the gate does, and how far apart the classes are, by what is looked at."""
    found = defaultdict(lambda: defaultdict(list))
    for result, _, parts in lines:
        for name, part in (parts if parts and result["method"] == "mocoop" else {}).items():
            what = name if name in SHIFTED else f"{result['dataset']}, {name}"
            for key, value in (part["gate"] | part["classes"]).items():
                found[what][key].append(value)
    keys = list(next(iter(found.values()))) if found else []
    rows = [[what, *(f"{np.mean(v[k]):.3f}" for k in keys)] for what, v in sorted(found.items())]
    return markdown([["images of", *keys], *rows])


def tables(lines):
    """{name: Markdown} of all that docs/RESULTS.md shows."""
    numbers = Numbers(lines)
    return {
        "few-shot": few_shot_table(numbers),
        "methods": methods_table(numbers),
        "paired": paired_table(numbers),
        "tasks": tasks_table(numbers),
        "shifted": shifted_table(numbers),
        "ablations": ablation_table(numbers, lines),
        "rates": rates_table(lines),
        "images": images_table(numbers, lines),
        "why": why_table(lines),
        "why-shifted": why_shifted_table(lines),
        "gate": gate_table(lines),
    }


def pages(lines):
    """{a Markdown file: {name: its table}}"""
    every = tables(lines)
    short = {"methods": every["methods"]}
    return {Path("README.md"): short, Path("docs", "RESULTS.md"): every}


def filled(page, tables):
    """A Markdown page with each table in its place. Raises BadInput for a page without one."""
    for name, table in tables.items():
        place = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        if not place.search(page):
            raise BadInput(f"the page has no place for the table {name!r}: <!-- {name} -->")
        page = place.sub(lambda found, table=table: f"{found[1]}{table}\n{found[2]}", page)
    return page
