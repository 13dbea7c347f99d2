"""Numbers, tables and pictures, from a model's predictions and from the `result.json` of runs."""

import contextlib
import sys
import warnings
from collections import Counter, defaultdict
from itertools import cycle
from typing import NamedTuple

import numpy as np

from lib.catalogue import row_of
from lib.runs import BadInput, replacing, run_label

UNTRAINED = "zeroshot", "ensemble"  # every run also reports their accuracies
MOST_ROWS = 40  # of a heat map
LINES = [(m, line) for line in ("-", "--", ":") for m in "osv^Dx"]  # distinct without colour
GREY_LINES = {"zero-shot": ":", "ensemble": "--"}

# ------------------------------------------------------------------------------------- numbers


def accuracy(predictions, labels):
    """Top-1 accuracy in percent of predicted labels (N,)."""
    return round(100 * (predictions.cpu() == labels).float().mean().item(), 2)


def per_class_accuracy(predictions, labels, class_names):
    """{class name: top-1 accuracy in percent, None without images}."""
    found = {}
    for label, name in enumerate(class_names):
        own = labels == label
        key = name if name not in found else f"{name} ({label})"  # ImageNet has a few names twice
        found[key] = accuracy(predictions[own], labels[own]) if own.any() else None
    return found


def confusion(predictions, labels, class_names):
    """{class name: {predicted class name: number of images}}, without zeros. Classes
    are keyed by name, as in `result.json`, so two classes of one name share a row."""
    counts = {name: {} for name in class_names}
    for label, answer in zip(labels.tolist(), predictions.tolist()):
        row, column = counts[class_names[label]], class_names[answer]
        row[column] = row.get(column, 0) + 1
    return counts


def macro_f1(predictions, labels, n_classes):
    """The mean over classes of F1 = 2 TP / (2 TP + FP + FN), in percent. Predicting a class too
    often lowers it, which accuracy per class does not show."""
    right = labels[predictions == labels].bincount(minlength=n_classes)
    all_of = labels.bincount(minlength=n_classes) + predictions.bincount(minlength=n_classes)
    return round(100 * (2 * right / all_of.clamp(min=1)).mean().item(), 2)


def prompt_usage(weights, templates):
    """{template: its prompt's share of the router's weight}, from weights (N, G); sums to 1."""
    return {t: round(share, 4) for t, share in zip(templates, weights.mean(dim=0).tolist())}


def usage_by_kind(weights, kinds, names):
    """The mean weight of every prompt for each kind of image, as stored in `result.json`.

    weights: (N, G). kinds: the kind of each image, an index into names.
    Returns {"rows": names, "share": G numbers that sum to 1, per row}.
    """
    weights, kinds = weights.numpy(), np.array(kinds)
    share = [weights[kinds == row].mean(axis=0) for row in range(len(names))]
    return {"rows": list(names), "share": [row.round(4).tolist() for row in share]}


def harmonic_mean(base, new):
    """H, the harmonic mean of base and new accuracy."""
    return 2 * base * new / (base + new) if base + new else 0.0


def mean_std(values):
    """Mean and population standard deviation, as CoOp reports them."""
    values = np.fromiter(values, float)
    return values.mean(), values.std()


# ------------------------------------------------------------------------------------- one run


def announce(config, split, model):
    """Prints what is about to be run."""
    own = split.source == "coop" and split.samples == "own"
    prompts = f" with {len(model.templates)} prompts, {model.top_k} per image" if model else ""
    print(
        f"{split.name}: {len(split.class_names)} {config['classes']} classes, {config['shots']}"
        f" shots, seed {config['seed']}{' (samples of our own)' if own else ''};"
        f" CLIP {config['clip']}; {config['method']}{prompts}"
    )
    if model:
        print("prompts: " + " | ".join(model.templates))
    if config["groups"] == "dataset" and not row_of(split.dataset).templates:
        print(f"{split.name} has no templates: SUN397's four groups are used (see --groups)")


def evaluate_model(model, config, changed, split, classes, features):
    """Evaluates a model on the test images of a split: (the part for `result.json`, class logits
    (N, C), prompt weights (N, G)). changed: the settings other than default. features: (N, D)."""
    logits, weights = model.logits(features, split.class_names)
    predictions, weights = logits.argmax(dim=-1).cpu(), weights.cpu()
    labels = split.labels(split.test)
    result = {
        "dataset": split.name,
        "classes": classes,
        "shots": config["shots"],
        "seed": config["seed"],
        "method": config["method"],
        "label": run_label(config["method"], changed),
        "changed_flags": changed,
        "clip": config["clip"],
        "n_prompts": len(model.templates),
        "top_k": model.top_k,
        "n_classes": len(split.class_names),
        "n_test": len(split.test),
        "split": split.source,
        "accuracy": accuracy(predictions, labels),
        "macro_f1": macro_f1(predictions, labels, len(split.class_names)),
        "per_class_accuracy": per_class_accuracy(predictions, labels, split.class_names),
        "confusion": confusion(predictions, labels, split.class_names),
        "prompt_usage": prompt_usage(weights, model.templates),
        "router": usage_by_kind(weights, *split.kinds),
    }
    return result, logits.cpu(), weights


def accuracy_on(model, split, items, features):
    """Top-1 accuracy in percent of a model on items of a split; None if empty. features: (N, D)."""
    if not items:
        return None
    logits, _ = model.logits(features, split.class_names)
    return accuracy(logits.argmax(dim=-1), split.labels(items))


# -------------------------------------------------------------------------------------- tables


class Line(NamedTuple):
    """What the runs in one row of a table have in common."""

    dataset: str
    classes: str
    clip: str
    shots: int  # 0 for CLIP as it is
    label: str  # the method and its changed settings, as in a run's folder


def accuracies(runs):
    """{Line: {column: {seed: accuracy}}}, in percent. runs: from `lib.runs.find_runs`.

    Runs that differ only in the seed share a row; CLIP as it is has a row per task. Columns:
    `accuracy`, on the run's own task; `new`, a base run evaluated on the new classes; and any other
    dataset that the runs were evaluated on.
    """
    rows = defaultdict(lambda: defaultdict(dict))
    for result, evaluations in runs:
        config, changed = result["config"], result["changed_flags"]
        task = config["dataset"], result["classes"], result["clip"]  # a folder by its full path
        # The ensemble depends only on the templates, not on how they are grouped.
        templates = {k: v for k, v in changed.items() if k == "groups" and v != "auto"}
        lines = {
            "zero_shot_accuracy": Line(*task, 0, "zero-shot"),
            "ensemble_accuracy": Line(*task, 0, run_label("ensemble", templates)),
        }
        if result["method"] not in UNTRAINED:
            lines["accuracy"] = Line(*task, config["shots"], result["label"])
        for key, line in lines.items():
            columns = rows[line]
            columns["accuracy"][config["seed"]] = result[key]
            for other in evaluations:
                target = other | {"dataset": other.get("target", other["dataset"])}
                differs = [target[k] for k in ("dataset", "classes") if other[k] != result[k]]
                if differs:
                    columns[" ".join(differs)][config["seed"]] = other[key]
    return rows


def mean_h(columns):
    """H of the mean base and the mean new accuracy of base runs, over the seeds that have both, and
    the standard deviation of H over these seeds. None without such seeds."""
    seeds = columns["accuracy"].keys() & columns.get("new", {}).keys()
    if not seeds:
        return None
    pairs = [(columns["accuracy"][s], columns["new"][s]) for s in seeds]
    return harmonic_mean(*np.mean(pairs, axis=0)), np.std([harmonic_mean(*p) for p in pairs])


def cell(values, sign=""):
    """Mean ± standard deviation of {key: percent}, or a dash. sign: "+" also shows plus signs."""
    if not values:
        return "–"
    mean, std = mean_std(values.values())
    spread = f" ± {std:.1f}" if len(values) > 1 and std > 1e-9 else ""
    return f"{mean:{sign}.1f}{spread}"


def runs_table(runs):
    """All runs as a Markdown table. runs: from `lib.runs.find_runs`."""
    rows = accuracies(runs)
    targets = sorted({c for row in rows.values() for c in row} - {"accuracy", "new"})
    columns = ["dataset", "classes", "CLIP", "method", "shots", "seeds", "accuracy", "new", "H"]
    lines = [[*columns, *targets]]
    for row in sorted(rows, key=lambda row: (*row[:3], row.shots, row)):
        values = rows[row]
        h = mean_h(values) if row.classes == "base" else None
        seeds = len(values["accuracy"]) if row.shots else "–"
        line = [row.dataset, row.classes, row.clip, row.label, row.shots or "–", seeds]
        line += [cell(values["accuracy"]), cell(values["new"]), f"{h[0]:.1f}" if h else "–"]
        lines.append(line + [cell(values[target]) for target in targets])
    used = [i for i in range(len(lines[0])) if any(line[i] != "–" for line in lines[1:])]
    return markdown([[line[i] for i in used] for line in lines])


def markdown(lines):
    """Rows of cells, the heading first, as a Markdown table."""
    lines = [lines[0], ["---"] * len(lines[0]), *lines[1:]]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


# ------------------------------------------------------------------------------------ pictures


@contextlib.contextmanager
def matplotlib_defaults():
    """Uses matplotlib's default settings, ignoring any `matplotlibrc`. Raises BadInput for every
    error in the block."""
    try:
        import matplotlib  # here, so that training does not wait for it

        with matplotlib.rc_context():
            matplotlib.rcdefaults()
            matplotlib.rcParams["text.parse_math"] = False  # a class name may contain a dollar
            yield
    except Exception as error:  # of any kind: a picture must not lose a result
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise BadInput(f"cannot draw: {reason}") from error


@contextlib.contextmanager
def for_show(what):
    """In this block, or in a function decorated with it, bad input only prints a line."""
    try:
        yield
    except BadInput as error:
        print(f"{what} is missing: {error}", file=sys.stderr)


def new_figure(width, height, down=1, across=1, sharey=False):
    """A figure, sized in inches, and its axes (down, across). Without pyplot, it needs neither a
    display nor a choice of backend."""
    from matplotlib.figure import Figure

    warnings.filterwarnings("ignore", "Glyph")  # the font lacks some scripts
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(down, across, sharey=sharey, squeeze=False)


def save_figure(figure, path, dpi=120):
    with replacing(path) as scratch:
        figure.savefig(scratch, dpi=dpi, format="png")


@for_show("the router's picture")
@matplotlib_defaults()
def router_picture(result, path):
    """Draws the router's table of a `result.json` as a heat map."""
    save_figure(router_figure([result], f"{result['dataset']}, {result['classes']} classes"), path)


def router_figure(results, title):
    """A heat map, with numbers, of the shares of the router's weight, kinds of images x prompts,
    averaged over runs. With many classes, it shows those with the most unusual prompts."""
    share = np.mean([result["router"]["share"] for result in results], axis=0)
    rows = [name[:60] for name in results[0]["router"]["rows"]]
    columns = [name[:60] for name in results[0]["prompt_usage"]]
    if len(rows) > MOST_ROWS:
        unusual = np.abs(share - share.mean(axis=0)).sum(axis=1).argsort()[::-1]
        shown = sorted(unusual[:MOST_ROWS])
        share, rows = share[shown], [rows[row] for row in shown]
        title += f" (the {MOST_ROWS} most unusual)"
    figure, [[axes]] = new_figure(max(7.0, 2.6 + 0.75 * len(columns)), 2.2 + 0.32 * len(rows))
    axes.imshow(share, cmap="Greys", vmin=0, vmax=1, aspect="auto")
    axes.set_xticks(range(len(columns)), columns, rotation=35, ha="right")
    axes.set_yticks(range(len(rows)), rows)
    axes.set_xlabel("soft prompt, by its group's first template")
    axes.set_title(f"{title}:\nshare of the router's weight (%)", loc="left", fontsize=10)
    for (y, x), value in np.ndenumerate(share):
        colour = "white" if value > 0.6 else "black"
        axes.text(x, y, f"{100 * value:.0f}", ha="center", va="center", color=colour)
    return figure


def samples_picture(images, titles, path):
    """A sheet of test images. titles: (text, whether the answer is right) for each PIL image."""
    across = 4
    down = -(-len(images) // across)
    figure, grid = new_figure(3.2 * across, 3.1 * down, down, across)
    for axes in grid.flat:
        axes.axis("off")
    for axes, image, (title, right) in zip(grid.flat, images, titles):
        axes.imshow(image)
        axes.set_title(title, fontsize=8, loc="left", color="black" if right else "firebrick")
    save_figure(figure, path, dpi=110)


@matplotlib_defaults()
def draw_pictures(runs, folder):
    """Draws `few_shot.png`, `router.png`, `usage.png` and `ablation.png` into the folder, if there
    are runs for them. File names start with the dataset if there are several; those of router and
    usage end in the method if it is not mocoop.

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
            n, seed = len(results), results[0]["seed"]
            seeds = f"mean of {n} seeds" if n > 1 else f"seed {seed}"
            title = f"{dataset}, {method}, {most} shots, {seeds}"
            figures[f"{prefix}router{suffix}.png"] = router_figure(results, title)
            title = f"{dataset}, {method}, {seeds}"
            figures[f"{prefix}usage{suffix}.png"] = usage_figure(results, title)
        figures[f"{prefix}ablation.png"] = ablation_figure(own)
    drawn = {name: figure for name, figure in figures.items() if figure is not None}
    for name, figure in drawn.items():
        save_figure(figure, folder / name)
    return list(drawn)


def few_shot_figure(runs):
    """Accuracy against shots, one line per method, one standard deviation shaded."""
    plain = [run for run in runs if run[0]["classes"] == "all" and not run[0]["changed_flags"]]
    lines = defaultdict(dict)  # method -> shots -> accuracies
    for row, columns in accuracies(plain).items():
        lines[row.label][row.shots] = list(columns["accuracy"].values())
    if not any(len(line) > 1 for line in lines.values()):
        return None
    figure, [[axes]] = new_figure(7, 4.6)
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


def usage_figure(results, title):
    """The share of each prompt in every epoch of training, averaged over seeds."""
    share = np.mean([r["prompt_usage_by_epoch"] for r in results], axis=0)  # (epochs, G)
    figure, [[axes]] = new_figure(7.5, 4.6)
    epochs = range(1, len(share) + 1)
    every = max(1, len(share) // 10)
    prompts = results[0]["prompt_usage"]
    for template, line, (marker, style) in zip(prompts, 100 * share.T, cycle(LINES)):
        axes.plot(epochs, line, marker=marker, ls=style, markevery=every, label=template)
    axes.set(xlabel="epoch", ylabel="share of the router's weight (%)", ylim=(0, None))
    axes.set_title(title, loc="left", fontsize=10)
    axes.legend(frameon=False, fontsize=8, bbox_to_anchor=(1, 1), loc="upper left")
    return figure


def ablation_figure(runs):
    """MoCoOp, MoCoOp with changed settings, and other mixtures by default, at the largest number of
    shots: accuracy on all classes, and H from base to new where it was measured."""
    ours = [
        run for run in runs if run[0]["method"] == "mocoop" and "lr" not in run[0]["changed_flags"]
    ]
    others = [run for run in runs if run[0]["n_prompts"] > 1 and not run[0]["changed_flags"]]
    most = max((result["shots"] for result, _ in ours), default=0)
    rows = defaultdict(dict)  # label -> panel -> (mean, std)
    for row, columns in accuracies([*ours, *others]).items():
        if row.shots == most and row.classes == "all":
            rows[row.label]["accuracy, all classes (%)"] = mean_std(columns["accuracy"].values())
        elif row.shots == most and row.classes == "base" and mean_h(columns):
            rows[row.label]["H, base to new (%)"] = mean_h(columns)
    if len(rows) < 2 or "mocoop" not in rows or not most:
        return None
    panels = sorted({panel for row in rows.values() for panel in row})
    width, height = 1.8 + 3.6 * len(panels), 1.4 + 0.3 * len(rows)
    figure, [grid] = new_figure(width, height, across=len(panels), sharey=True)
    labels = sorted(rows, key=lambda label: (label != "mocoop", label), reverse=True)
    for axes, panel in zip(grid, panels):
        means, stds = np.array([rows[label].get(panel, (np.nan, 0)) for label in labels]).T
        axes.errorbar(means, labels, xerr=stds, fmt="ko", capsize=2)
        axes.axvline(means[labels.index("mocoop")], color="grey", lw=0.8, ls=":")
        axes.set(xlabel=panel)
    figure.suptitle(f"{runs[0][0]['dataset']}, {most} shots, mean ± std", fontsize=10)
    return figure
