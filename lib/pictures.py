"""Pictures made from the `result.json` of runs and from test images."""

import contextlib
import warnings
from collections import defaultdict

import numpy as np

from lib.errors import BadInput, one_line, say, warn
from lib.files import replacing
from lib.results import accuracies, mean_std

MOST_ROWS = 40  # of a heat map
LINES = [(m, line) for line in ("-", "--", ":") for m in "osv^Dx"]  # distinct without colour
GREY_LINES = {"zero-shot": ":", "ensemble": "--"}


@contextlib.contextmanager
def matplotlib_defaults():
    """Uses matplotlib's default settings, ignoring any `matplotlibrc`. Every error in the block
    becomes BadInput."""
    try:
        import matplotlib  # here, so that training does not wait for it

        with matplotlib.rc_context():
            matplotlib.rcdefaults()
            matplotlib.rcParams["text.parse_math"] = False  # a class name may contain a dollar
            yield
    except BadInput:
        raise
    except Exception as error:  # of any kind: a failed picture must not lose a result
        raise BadInput(f"cannot draw: {one_line(error)}") from error


@contextlib.contextmanager
def optional(what):
    """In this block, or in a function decorated with it, bad input only prints a line."""
    try:
        yield
    except BadInput as error:
        warn(f"{what} is missing: {error}")


def new_figure(width, height, down=1, across=1):
    """A figure, sized in inches, and its axes (down, across). Without pyplot, it needs neither a
    display nor a choice of backend."""
    from matplotlib.figure import Figure

    warnings.filterwarnings("ignore", "Glyph")  # the font lacks some scripts
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(down, across, squeeze=False)


def save_figure(figure, path):
    with replacing(path) as scratch:
        figure.savefig(scratch, dpi=120, format="png")


@optional("the router's picture")
@matplotlib_defaults()
def router_picture(result, path):
    """Draws the router's table of a `result.json` as a heat map, if the method has prompts."""
    if result["n_prompts"]:
        title = f"{result['dataset']}, {result['classes']} classes"
        save_figure(router_figure([result], title), path)


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
    save_figure(figure, path)


@matplotlib_defaults()
def draw_pictures(runs, folder):
    """Draws `few_shot.png` and `router.png` into the folder, from the runs on all classes that kept
    their method's settings. File names start with the dataset if there are several; a router's ends
    with the method if it is not mocoop.

    runs: from `lib.runs.find_runs`. Raises BadInput if there is nothing to draw.
    """
    figures = {}
    datasets = sorted({result["dataset"] for result, _ in runs})
    for dataset in datasets:
        plain = [
            run
            for run in runs
            if run[0]["dataset"] == dataset
            and run[0]["classes"] == "all"
            and not run[0]["changed_flags"]
        ]
        prefix = "" if len(datasets) == 1 else f"{dataset}_"
        figures[f"{prefix}few_shot.png"] = few_shot_figure(plain)
        for method in sorted({r["method"] for r, _ in plain if r["n_prompts"] > 1}):
            suffix = "" if method == "mocoop" else f"_{method}"
            results = [r for r, _ in plain if r["method"] == method]
            most = max(r["shots"] for r in results)
            results = [r for r in results if r["shots"] == most]
            n, seed = len(results), results[0]["seed"]
            seeds = f"mean of {n} seeds" if n > 1 else f"seed {seed}"
            title = f"{dataset}, {method}, {most} shots, {seeds}"
            figures[f"{prefix}router{suffix}.png"] = router_figure(results, title)
    drawn = {name: figure for name, figure in figures.items() if figure is not None}
    if not drawn:
        raise BadInput(
            f"nothing to draw below {folder}: it takes runs on all classes that kept their method's"
            " settings, with several numbers of shots (curves) or several prompts (maps)"
        )
    for name, figure in drawn.items():
        save_figure(figure, folder / name.replace("/", "_"))  # a result may be a stranger's
    say(f"saved in {folder}: {', '.join(drawn)}")


def few_shot_figure(runs):
    """Accuracy against shots, one line per method, one standard deviation shaded. None if no method
    has several numbers of shots."""
    lines = defaultdict(dict)  # method -> shots -> accuracies
    for row, columns in accuracies(runs).items():
        lines[row.label][row.shots] = list(columns["accuracy"].values())
    if not any(len(line) > 1 for line in lines.values()):
        return None
    figure, [[axes]] = new_figure(7, 4.6)
    for (method, line), (marker, style) in zip(sorted(lines.items()), LINES):
        if 0 in line:  # CLIP as it is needs no shots
            axes.axhline(
                np.mean(line[0]), color="grey", ls=GREY_LINES.get(method, "-."), lw=1, label=method
            )
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
