"""Tables over runs, from their `result.json`: mean and population deviation over seeds."""

import json
from collections import defaultdict
from typing import NamedTuple

import numpy as np

from lib.metrics import harmonic_mean, mean_std

BASELINES = "zeroshot", "ensemble"  # every run brings their accuracies along


class Line(NamedTuple):
    """What runs in one row of a table have in common."""

    dataset: str
    classes: str
    clip: str
    shots: int  # 0 for CLIP as it is
    label: str  # the method and its changed flags, as in a run's folder
    method: str
    changed_flags: str  # JSON


def accuracies(runs):
    """{Line: {column: {seed: accuracy}}}, in percent. runs: from `lib.runs.find_runs`.

    Runs that differ in the seed alone share a row, and so does CLIP as it is. Columns: `accuracy`,
    on the run's own task; `new`, a base run evaluated on the new classes; and any other dataset
    that the runs were evaluated on.
    """
    rows = defaultdict(lambda: defaultdict(dict))
    for result, evaluations in runs:
        config, changed = result["config"], result["changed_flags"]
        task = result["dataset"], result["classes"], result["clip"]
        # The ensemble depends on the templates alone, however they are grouped.
        templates = {k: v for k, v in changed.items() if k == "groups" and v != "auto"}
        own = Line(*task, config["shots"], result["label"], result["method"], json.dumps(changed))
        as_it_is = [
            ("zero_shot_accuracy", Line(*task, 0, "zero-shot", "zero-shot", "{}")),
            ("ensemble_accuracy", Line(*task, 0, "ensemble", "ensemble", json.dumps(templates))),
        ]
        for key, row in as_it_is + [("accuracy", own)] * (result["method"] not in BASELINES):
            columns = rows[row]
            columns["accuracy"][config["seed"]] = result[key]
            for other in evaluations:
                target = {"dataset": other["dataset"], "classes": other["classes"]}
                column = " ".join(v for k, v in target.items() if v != result[k])
                if column:
                    columns[column][config["seed"]] = other[key]
    return rows


def mean_h(columns):
    """H of the mean base and the mean new accuracy of base runs, over the seeds that have both, and
    the standard deviation of each seed's own H. None without such seeds."""
    seeds = columns["accuracy"].keys() & columns.get("new", {}).keys()
    if not seeds:
        return None
    pairs = [(columns["accuracy"][s], columns["new"][s]) for s in seeds]
    return harmonic_mean(*np.mean(pairs, axis=0)), np.std([harmonic_mean(*p) for p in pairs])


def runs_table(runs):
    """All runs in Markdown. runs: from `lib.runs.find_runs`."""
    rows = accuracies(runs)

    def cell(values):
        if not values:
            return ""
        mean, std = mean_std(values.values())
        return f"{mean:.1f} ± {std:.1f}" if len(values) > 1 and std else f"{mean:.1f}"

    targets = sorted({c for row in rows.values() for c in row} - {"accuracy", "new"})
    columns = ["dataset", "classes", "CLIP", "method", "shots", "seeds", "accuracy", "new", "H"]
    lines = [[*columns, *targets]]
    for row, values in sorted(
        rows.items(), key=lambda pair: (*pair[0][:3], pair[0].shots, pair[0])
    ):
        h = mean_h(values) if row.classes == "base" else None
        what = [row.dataset, row.classes, row.clip, row.label, row.shots or ""]
        cells = [cell(values["accuracy"]), cell(values["new"]), f"{h[0]:.1f}" if h else ""]
        cells += [cell(values[target]) for target in targets]
        lines.append([*what, len(values["accuracy"]) if row.shots else "", *cells])
    used = [i for i in range(len(lines[0])) if any(line[i] != "" for line in lines[1:])]
    return markdown([[line[i] for i in used] for line in lines])


def markdown(lines):
    """Rows of cells, the heading first, as a table in Markdown."""
    lines = [lines[0], ["---"] * len(lines[0]), *lines[1:]]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
