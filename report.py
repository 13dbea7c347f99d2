"""Tables and pictures over many runs: mean and population standard deviation over seeds."""

import json
from collections import Counter, defaultdict
from itertools import cycle

import numpy as np

from data import dataset_name
from plots import heat_map, plt
from runs import NOT_PART_OF_A_RUN, find_runs
from train import METHODS, changed_flags, method_label, preset

BASELINES = "zeroshot", "ensemble"
LINES = [(m, line) for line in ("-", "--", ":") for m in "osv^Dx"]  # told apart without colour


def harmonic_mean(base, new):
    return 2 * base * new / (base + new) if base + new else 0.0


def accuracies(runs):
    """{(dataset, classes, clip, shots, method, flags): {column: {seed: accuracy}}}, in percent.

    Runs that differ in the seed alone share a row, and so does CLIP as it is (0 shots). Columns:
    `accuracy`, on the run's own task; `new`, a base run evaluated on the new classes; and any other
    dataset that the runs were evaluated on.
    """
    rows = defaultdict(lambda: defaultdict(dict))
    for result, evaluations in runs:
        config = result["config"]
        flags = preset(config) | config  # runs made before there was a flag have its default
        but_seed = {k: flags[k] for k in sorted(flags) if k not in (*NOT_PART_OF_A_RUN, "seed")}
        task = dataset_name(config["dataset"]), config["classes"], config["clip"]
        # The ensemble is the same however its templates are grouped.
        templates = "published" if config["groups"] == "auto" else config["groups"]
        for key, *row in [
            ("zero_shot_accuracy", 0, "zero-shot", ""),
            ("ensemble_accuracy", 0, "ensemble", templates),
            ("accuracy", config["shots"], method_label(config), json.dumps(but_seed)),
        ]:
            if flags["classifier"] in BASELINES and key == "accuracy":
                continue  # these are there already
            columns = rows[(*task, *row)]
            columns["accuracy"][config["seed"]] = result[key]
            for other in evaluations:
                parts = [other["dataset"], other["classes"]]
                same = [dataset_name(config["dataset"]), config["classes"]]
                column = " ".join(part for part, own in zip(parts, same) if part != own)
                if column:
                    columns[column][config["seed"]] = other[key]
    return rows


def mean_h(columns):
    """The harmonic mean of the mean base and the mean new accuracy of a base run; None without."""
    seeds = columns["accuracy"].keys() & columns.get("new", {}).keys()
    if not seeds:
        return None
    return harmonic_mean(*(np.mean([columns[c][s] for s in seeds]) for c in ("accuracy", "new")))


def table(folder):
    """All finished runs below a folder, in Markdown."""
    rows = accuracies(find_runs(folder))

    def cell(values):
        values = list(values.values())
        spread = f" ± {np.std(values):.1f}" if len(values) > 1 and np.ptp(values) else ""
        return f"{np.mean(values):.1f}{spread}" if values else ""

    targets = sorted({c for row in rows.values() for c in row} - {"accuracy", "new"})
    columns = ["dataset", "classes", "CLIP", "method", "shots", "seeds", "accuracy", "new", "H"]
    lines = [[*columns, *targets]]
    for (dataset, classes, clip, shots, method, _), row in sorted(rows.items()):
        h = mean_h(row) if classes == "base" else None
        seeds = len(row["accuracy"]) if shots else ""
        cells = [cell(row["accuracy"]), cell(row["new"]), f"{h:.1f}" if h is not None else ""]
        cells += [cell(row[t]) for t in targets]
        lines.append([dataset, classes, clip, method, shots or "", seeds, *cells])
    used = [i for i in range(len(lines[0])) if any(line[i] != "" for line in lines[1:])]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join("| " + " | ".join(str(line[i]) for i in used) + " |" for line in lines)


def pictures(folder):
    """Draws `few_shot.png`, `router.png`, `usage.png` and `ablation.png` into the folder from the
    runs below it, as far as there are any for them; names start with the dataset's if there are
    several. Returns the files' names."""
    runs = find_runs(folder)
    drawn = []
    names = sorted({dataset_name(result["config"]["dataset"]) for result, _ in runs})
    for name in names:
        own = [run for run in runs if dataset_name(run[0]["config"]["dataset"]) == name]
        # Pictures compare like with like: the CLIP and the templates that most runs have.
        kinds = [(r["config"]["clip"], r["config"]["groups"]) for r, _ in own]
        (clip, groups), _ = Counter(kinds).most_common(1)[0]
        own = [run for run, kind in zip(own, kinds) if kind in ((clip, groups), (clip, "auto"))]
        mixtures = [r for r, _ in own if method_label(r["config"]) == "mocoop"]
        mixtures = [r for r in mixtures if r["classes"] == "all"]
        most = max((r["shots"] for r in mixtures), default=0)
        mixtures = [r for r in mixtures if r["shots"] == most]
        for file, draw, what in [
            ("few_shot.png", few_shot_picture, own),
            ("router.png", router_picture, mixtures),
            ("usage.png", usage_picture, mixtures),
            ("ablation.png", ablation_picture, own),
        ]:
            file = file if len(names) == 1 else f"{name}_{file}"
            figure = draw(what)
            if figure is not None:
                figure.savefig(folder / file, dpi=120)
                plt.close(figure)
                drawn.append(file)
    return drawn


def few_shot_picture(runs):
    """Accuracy against shots, a line a method, one standard deviation shaded."""
    lines = defaultdict(dict)  # method -> shots -> accuracies
    for (_, classes, _, shots, method, _), row in accuracies(runs).items():
        if classes == "all" and (method in METHODS or not shots):
            lines[method][shots] = list(row["accuracy"].values())
    if not any(len(line) > 1 for line in lines.values()):
        return None
    figure, axes = plt.subplots(figsize=(7, 4.6), layout="constrained")
    for (method, line), (marker, style) in zip(sorted(lines.items()), LINES):
        if 0 in line:  # CLIP as it is needs no shots
            axes.axhline(np.mean(line[0]), color="grey", ls=style, lw=1, label=method)
            continue
        shots = sorted(line)
        mean = np.array([np.mean(line[s]) for s in shots])
        std = np.array([np.std(line[s]) for s in shots])
        (drawn,) = axes.plot(shots, mean, marker=marker, ls=style, label=method)
        axes.fill_between(shots, mean - std, mean + std, color=drawn.get_color(), alpha=0.2, lw=0)
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted({s for line in lines.values() for s in line if s}))
    axes.xaxis.set_major_formatter("{x:g}")
    seeds = max(len(values) for line in lines.values() for values in line.values())
    axes.set(xlabel="shots (training images a class)", ylabel="accuracy (%)")
    untrained = [np.mean(line[0]) for line in lines.values() if 0 in line]
    axes.set_ylim(bottom=max(axes.get_ylim()[0], min(untrained) - 10))  # the probe starts far below
    axes.set_title(f"{runs[0][0]['dataset']}, mean ± std of {seeds} seeds", loc="left", fontsize=10)
    axes.legend(frameon=False)
    return figure


def router_picture(results):
    """Which prompt fires for which kind of image, the mean over seeds."""
    if not results:
        return None
    share = np.mean([r["router"]["share"] for r in results], axis=0)
    first = results[0]
    title = f"{first['dataset']}, {first['shots']} shots, {_seeds(results)}"
    return heat_map(list(first["prompt_usage"]), first["router"]["rows"], share, title)


def _seeds(results):
    return f"mean of {len(results)} seeds" if len(results) > 1 else f"seed {results[0]['seed']}"


def usage_picture(results):
    """The share of each prompt in training, epoch by epoch, the mean over seeds."""
    if not results:
        return None
    share = [r["prompt_usage_by_epoch"] for r in results if "prompt_usage_by_epoch" in r]
    if not share:
        return None
    share = np.mean(share, axis=0)  # (epochs, G)
    figure, axes = plt.subplots(figsize=(7.5, 4.6), layout="constrained")
    epochs = range(1, len(share) + 1)
    every = max(1, len(share) // 10)
    prompts = results[0]["prompt_usage"]
    for template, line, (marker, style) in zip(prompts, 100 * share.T, cycle(LINES)):
        axes.plot(epochs, line, marker=marker, ls=style, markevery=every, label=template)
    axes.set(xlabel="epoch", ylabel="share of the router's weight (%)", ylim=(0, None))
    axes.set_title(f"{results[0]['dataset']}, {_seeds(results)}", loc="left", fontsize=10)
    axes.legend(frameon=False, fontsize=8, bbox_to_anchor=(1, 1), loc="upper left")
    return figure


def ablation_picture(runs):
    """MoCoOp and MoCoOp with other flags, at the most shots there are: accuracy on all classes, and
    H from base to new where it was measured."""
    rows = defaultdict(dict)  # flags -> panel -> (mean, std)
    table_rows = accuracies(runs)
    most = max((key[3] for key in table_rows if key[4] == "mocoop"), default=0)
    for (_, classes, _, shots, method, flags), row in table_rows.items():
        if shots != most or method.split("-")[0] != "mocoop":
            continue
        changed = changed_flags(json.loads(flags))
        if "lr" in changed:
            continue
        flags = ", ".join(k if v is True else f"{k} {v}" for k, v in changed.items())
        values = list(row["accuracy"].values())
        if classes == "all":
            rows[flags]["accuracy, all classes (%)"] = np.mean(values), np.std(values)
        elif classes == "base" and mean_h(row) is not None:
            seeds = row["accuracy"].keys() & row["new"].keys()
            each = [harmonic_mean(row["accuracy"][s], row["new"][s]) for s in seeds]
            rows[flags]["H, base to new (%)"] = mean_h(row), np.std(each)
    if len(rows) < 2 or "" not in rows:
        return None
    panels = sorted({panel for row in rows.values() for panel in row})
    height = 1.4 + 0.3 * len(rows)
    figure, grid = plt.subplots(
        1, len(panels), figsize=(1.8 + 3.6 * len(panels), height), sharey=True, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    flags = sorted(rows, key=lambda f: (f != "", f), reverse=True)
    labels = [f.replace("_", " ") or "MoCoOp" for f in flags]
    for axes, panel in zip(grid[0], panels):
        means, stds = np.array([rows[f].get(panel, (np.nan, 0)) for f in flags]).T
        colours = ["0.35" if f == "" else "0.75" for f in flags]
        axes.barh(labels, means, xerr=stds, color=colours, edgecolor="black", lw=0.5, capsize=2)
        axes.axvline(means[flags.index("")], color="black", lw=0.8, ls=":")
        low, high = np.nanmin(means - stds), np.nanmax(means + stds)
        axes.set(xlabel=panel, xlim=(low - 0.3 * (high - low), high + 0.1 * (high - low)))
    figure.suptitle(f"{runs[0][0]['dataset']}, {most} shots: bars do not start at 0", fontsize=10)
    return figure
