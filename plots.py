"""Pictures of a run: which prompt fires for what, and test images with their prompts."""

import warnings

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

import shapes

plt.rcParams["text.parse_math"] = False  # a class name may hold a dollar
warnings.filterwarnings("ignore", "Glyph")  # nor has the font every script
MOST_ROWS = 40  # of a heat map


def router_table(split, weights):
    """The mean weight of every prompt over each kind of test image.

    A row is a style in the embedded world and a class anywhere else. weights: (N, G) of
    `split.test`. Returns {"rows": names, "share": [[G numbers summing to 1] a row]}, as it goes
    to `result.json`.
    """
    if split.folder is None:
        rows = list(shapes.DATASETS[split.dataset])
        kinds = np.array([rows.index(shapes.style_of(item.path)) for item in split.test])
    else:
        rows = split.class_names
        kinds = np.array([item.label for item in split.test])
    share = [
        weights.numpy()[kinds == row].mean(axis=0).round(4).tolist() for row in range(len(rows))
    ]
    return {"rows": rows, "share": share}


def router_picture(result, path):
    """The table of `router_table` as a heat map, from a `result.json`.

    Of many classes it shows those whose prompts differ most from the average.
    """
    share, rows = np.array(result["router"]["share"]), result["router"]["rows"]
    unusual = np.abs(share - share.mean(axis=0)).sum(axis=1).argsort()[::-1]
    shown = sorted(unusual[:MOST_ROWS])
    which = "" if len(shown) == len(share) else f" (the {MOST_ROWS} most unusual)"
    title = f"{result['dataset']}, {result['classes']} classes{which}"
    columns = list(result["prompt_usage"])
    figure = heat_map(columns, [rows[row] for row in shown], share[shown], title)
    figure.savefig(path, dpi=120, format="png")
    plt.close(figure)


def heat_map(columns, rows, share, title):
    """Shares of the router's weight, kinds of images x prompts, with their numbers."""
    figure, axes = plt.subplots(
        figsize=(max(7.0, 2.6 + 0.75 * len(columns)), 2.2 + 0.32 * len(rows)), layout="constrained"
    )
    axes.imshow(share, cmap="Greys", vmin=0, vmax=1, aspect="auto")
    axes.set_xticks(range(len(columns)), columns, rotation=35, ha="right")
    axes.set_yticks(range(len(rows)), rows)
    axes.set_xlabel("soft prompt, by the template it started from")
    axes.set_title(f"{title}:\nshare of the router's weight (%)", loc="left", fontsize=10)
    for y, row in enumerate(share):
        for x, value in enumerate(row):
            colour = "white" if value > 0.6 else "black"
            axes.text(x, y, f"{100 * value:.0f}", ha="center", va="center", color=colour)
    return figure


def samples_picture(split, images, weights, answers, columns, path):
    """A sheet of test images, each with its answer and its prompts and weights.

    images: (item, PIL image) pairs. weights: their (N, G). answers: their predicted labels.
    columns: the prompts' templates.
    """
    across = 4
    down = -(-len(images) // across)
    figure, grid = plt.subplots(
        down, across, figsize=(3.2 * across, 3.1 * down), layout="constrained", squeeze=False
    )
    for axes in grid.flat:
        axes.axis("off")
    for axes, (item, image), row, answer in zip(grid.flat, images, weights, answers):
        axes.imshow(image)
        truth, told = split.class_names[item.label], split.class_names[answer]
        verdict = truth if truth == told else f"{truth},\ntaken for {told}"
        colour = "black" if truth == told else "firebrick"
        chosen = [g for g in row.argsort(descending=True).tolist() if row[g] > 0]
        lines = [f"{100 * row[g]:.0f}% {columns[g]}" for g in chosen]
        axes.set_title("\n".join([verdict, *lines]), fontsize=8, loc="left", color=colour)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def cost_picture(rows, chunk, path):
    """Seconds a step against the number of sentences, with the straight line through the first.

    rows: dictionaries of prompts, classes, seconds. chunk: from here on sentences are encoded
    twice, to save memory.
    """
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    sentences = np.array([row["prompts"] * row["classes"] for row in rows])
    times = np.array([row["seconds"] for row in rows])
    one = np.array([row["prompts"] == 1 for row in rows])
    axes.plot(sentences[one], times[one], "ko", label="1 prompt, 10 to 1,000 classes")
    axes.plot(sentences[~one], times[~one], "k^", mfc="white", label="2 to 20 prompts, 100 classes")
    small = sentences <= chunk
    slope = times[small].sum() / sentences[small].sum()
    ends = np.array([sentences.min(), sentences.max()])
    axes.plot(ends, slope * ends, "k-", lw=1, label=f"{1000 * slope:.1f} ms a sentence")
    axes.plot(ends, 1.5 * slope * ends, "k:", lw=1, label="1.5 x that: each is encoded twice")
    axes.axvline(chunk, color="grey", lw=1, ls="--")
    axes.text(chunk, times.min(), f"in pieces above {chunk:,} ", color="grey", ha="right")
    axes.set(xscale="log", yscale="log", xlabel="sentences: prompts x classes", ylabel="step (s)")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)
