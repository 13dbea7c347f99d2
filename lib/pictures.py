"""Pictures of runs, from their `result.json`: which prompt fires for what, curves, bars."""

import json
import warnings
from collections import Counter, defaultdict
from itertools import cycle

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from lib.files import replacing
from lib.metrics import mean_std
from lib.tables import accuracies, mean_h

plt.rcParams["text.parse_math"] = False  # a class name may hold a dollar
warnings.filterwarnings("ignore", "Glyph")  # nor has the font every script
MOST_ROWS = 40  # of a heat map
LINES = [(m, line) for line in ("-", "--", ":") for m in "osv^Dx"]  # distinct without colour
GREY_LINES = {"zero-shot": ":", "ensemble": "--"}


def save_figure(figure, path, dpi=120):
    with replacing(path) as scratch:
        figure.savefig(scratch, dpi=dpi, format="png")
    plt.close(figure)


# -------------------------------------------------------------------------------------- one run


def router_picture(result, path):
    """The router's table of a `result.json` as a heat map.

    Of many classes it shows those whose prompts differ most from the average.
    """
    share, rows = np.array(result["router"]["share"]), result["router"]["rows"]
    unusual = np.abs(share - share.mean(axis=0)).sum(axis=1).argsort()[::-1]
    shown = sorted(unusual[:MOST_ROWS])
    which = "" if len(shown) == len(share) else f" (the {MOST_ROWS} most unusual)"
    title = f"{result['dataset']}, {result['classes']} classes{which}"
    columns = list(result["prompt_usage"])
    save_figure(heat_map(columns, [rows[row] for row in shown], share[shown], title), path)


def heat_map(columns, rows, share, title):
    """Shares of the router's weight, kinds of images x prompts, with their numbers."""
    columns, rows = ([name[:60] for name in names] for names in (columns, rows))
    figure, axes = plt.subplots(
        figsize=(max(7.0, 2.6 + 0.75 * len(columns)), 2.2 + 0.32 * len(rows)), layout="constrained"
    )
    axes.imshow(share, cmap="Greys", vmin=0, vmax=1, aspect="auto")
    axes.set_xticks(range(len(columns)), columns, rotation=35, ha="right")
    axes.set_yticks(range(len(rows)), rows)
    axes.set_xlabel("soft prompt, by its group's first template")
    axes.set_title(f"{title}:\nshare of the router's weight (%)", loc="left", fontsize=10)
    for y, row in enumerate(share):
        for x, value in enumerate(row):
            colour = "white" if value > 0.6 else "black"
            axes.text(x, y, f"{100 * value:.0f}", ha="center", va="center", color=colour)
    return figure


def samples_picture(images, titles, path):
    """A sheet of test images. titles: (text, whether the answer is right) for each PIL image."""
    across = 4
    down = -(-len(images) // across)
    figure, grid = plt.subplots(
        down, across, figsize=(3.2 * across, 3.1 * down), layout="constrained", squeeze=False
    )
    for axes in grid.flat:
        axes.axis("off")
    for axes, image, (title, right) in zip(grid.flat, images, titles):
        axes.imshow(image)
        axes.set_title(title, fontsize=8, loc="left", color="black" if right else "firebrick")
    save_figure(figure, path, dpi=110)


# ------------------------------------------------------------------------------------ many runs


def draw_pictures(runs, folder):
    """Draws `few_shot.png`, `router.png`, `usage.png` and `ablation.png` into the folder, as far as
    there are runs for them. Names start with the dataset's if there are several; those of router
    and usage end in the method's if it is not mocoop.

    runs: from `lib.runs.find_runs`. Returns the files' names.
    """
    figures = {}
    datasets = sorted({result["dataset"] for result, _ in runs})
    for dataset in datasets:
        own = [run for run in runs if run[0]["dataset"] == dataset]
        # Pictures compare like with like: the CLIP and the templates that most runs have.
        kinds = [(r["clip"], r["config"]["groups"]) for r, _ in own]
        (clip, groups), _ = Counter(kinds).most_common(1)[0]
        own = [run for run, kind in zip(own, kinds) if kind in ((clip, groups), (clip, "auto"))]
        prefix = "" if len(datasets) == 1 else f"{dataset}_"
        figures[f"{prefix}few_shot.png"] = few_shot_figure(own)
        plain = [r for r, _ in own if not r["changed_flags"] and r["classes"] == "all"]
        for method in sorted({r["method"] for r in plain if r["n_prompts"] > 1}):
            suffix = "" if method == "mocoop" else f"_{method}"
            results = [r for r in plain if r["method"] == method]
            most = max(r["shots"] for r in results)
            results = [r for r in results if r["shots"] == most]
            figures[f"{prefix}router{suffix}.png"] = mean_router_figure(results)
            figures[f"{prefix}usage{suffix}.png"] = usage_figure(results)
        figures[f"{prefix}ablation.png"] = ablation_figure(own)
    drawn = {name: figure for name, figure in figures.items() if figure is not None}
    for name, figure in drawn.items():
        save_figure(figure, folder / name)
    return list(drawn)


def few_shot_figure(runs):
    """Accuracy against shots, one line per method, one standard deviation shaded."""
    lines = defaultdict(dict)  # method -> shots -> accuracies
    for row, columns in accuracies(runs).items():
        if row.classes == "all" and (row.changed_flags == "{}" or not row.shots):
            lines[row.method][row.shots] = list(columns["accuracy"].values())
    if not any(len(line) > 1 for line in lines.values()):
        return None
    figure, axes = plt.subplots(figsize=(7, 4.6), layout="constrained")
    for (method, line), (marker, style) in zip(sorted(lines.items()), LINES):
        if 0 in line:  # CLIP as it is needs no shots
            axes.axhline(np.mean(line[0]), color="grey", ls=GREY_LINES[method], lw=1, label=method)
            continue
        shots = sorted(line)
        mean, std = np.transpose([mean_std(line[s]) for s in shots])
        (drawn,) = axes.plot(shots, mean, marker=marker, ls=style, label=method)
        axes.fill_between(shots, mean - std, mean + std, color=drawn.get_color(), alpha=0.2, lw=0)
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted({s for line in lines.values() for s in line if s}))
    axes.xaxis.set_major_formatter("{x:g}")
    seeds = max(len(values) for line in lines.values() for values in line.values())
    axes.set(xlabel="shots (training images per class)", ylabel="accuracy (%)")
    untrained = [np.mean(line[0]) for line in lines.values() if 0 in line]
    axes.set_ylim(bottom=max(axes.get_ylim()[0], min(untrained) - 10))  # a probe starts far below
    axes.set_title(
        f"{runs[0][0]['dataset']}, mean ± std, {seeds} seeds at most", loc="left", fontsize=10
    )
    axes.legend(frameon=False)
    return figure


def mean_router_figure(results):
    """Which prompt fires for which kind of image, the mean over seeds."""
    share = np.mean([r["router"]["share"] for r in results], axis=0)
    first = results[0]
    title = f"{first['dataset']}, {first['method']}, {first['shots']} shots, {_seeds(results)}"
    return heat_map(list(first["prompt_usage"]), first["router"]["rows"], share, title)


def _seeds(results):
    return f"mean of {len(results)} seeds" if len(results) > 1 else f"seed {results[0]['seed']}"


def usage_figure(results):
    """The share of each prompt in training, epoch by epoch, the mean over seeds."""
    share = np.mean([r["prompt_usage_by_epoch"] for r in results], axis=0)  # (epochs, G)
    figure, axes = plt.subplots(figsize=(7.5, 4.6), layout="constrained")
    epochs = range(1, len(share) + 1)
    every = max(1, len(share) // 10)
    prompts = results[0]["prompt_usage"]
    for template, line, (marker, style) in zip(prompts, 100 * share.T, cycle(LINES)):
        axes.plot(epochs, line, marker=marker, ls=style, markevery=every, label=template)
    axes.set(xlabel="epoch", ylabel="share of the router's weight (%)", ylim=(0, None))
    axes.set_title(
        f"{results[0]['dataset']}, {results[0]['method']}, {_seeds(results)}",
        loc="left",
        fontsize=10,
    )
    axes.legend(frameon=False, fontsize=8, bbox_to_anchor=(1, 1), loc="upper left")
    return figure


def ablation_figure(runs):
    """MoCoOp, MoCoOp with other flags, and other mixtures as they are, at the most shots there are:
    accuracy on all classes, and H from base to new where it was measured."""
    mixtures = [run for run in runs if run[0]["method"] == "mocoop" or run[0]["n_prompts"] > 1]
    most = max((r["shots"] for r, _ in mixtures if r["method"] == "mocoop"), default=0)
    rows = defaultdict(dict)  # name -> panel -> (mean, std)
    for row, columns in accuracies(mixtures).items():
        changed = json.loads(row.changed_flags)
        if row.shots != most or "lr" in changed or (row.method != "mocoop" and changed):
            continue
        flags = [k if v is True else f"{k} {v}" for k, v in changed.items()]
        name = ", ".join(flags) if row.method == "mocoop" else row.method
        if row.classes == "all":
            values = columns["accuracy"].values()
            rows[name]["accuracy, all classes (%)"] = mean_std(values)
        elif row.classes == "base" and mean_h(columns):
            rows[name]["H, base to new (%)"] = mean_h(columns)
    if len(rows) < 2 or "" not in rows or not most:
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
        width = max(high - low, 1)  # all may be equal
        axes.set(xlabel=panel, xlim=(low - 0.3 * width, high + 0.1 * width))
    figure.suptitle(f"{runs[0][0]['dataset']}, {most} shots: bars do not start at 0", fontsize=10)
    return figure
