"""Pictures of a run: which prompt fires for what, and test images with their prompts."""

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

import shapes

GREYS = "Greys"  # legible in black and white


def router_table(split, weights):
    """The mean weight of every prompt over each kind of test image.

    A row is a style in the embedded world and a class anywhere else. weights: (N, G) of
    `split.test`. Returns {"rows": names, "share": [[G numbers summing to 1] a row]}, as it goes
    to `result.json`.
    """
    if split.folder is None:
        kinds = [shapes.style_of(item.path) for item in split.test]
        rows = shapes.DATASETS[split.dataset]
    else:
        kinds = [split.class_names[item.label] for item in split.test]
        rows = split.class_names
    share = [
        weights[torch.tensor([kind == row for kind in kinds])].mean(dim=0).tolist() for row in rows
    ]
    return {"rows": list(rows), "share": [[round(s, 4) for s in row] for row in share]}


def router_picture(result, path):
    """The table of `router_table` as a heat map, from a `result.json`."""
    table, columns = result["router"], list(result["prompt_usage"])
    rows, share = table["rows"], table["share"]
    figure, axes = plt.subplots(
        figsize=(2.6 + 0.75 * len(columns), 2.0 + 0.32 * len(rows)), layout="constrained"
    )
    axes.imshow(share, cmap=GREYS, vmin=0, vmax=1, aspect="auto")
    axes.set_xticks(range(len(columns)), columns, rotation=35, ha="right")
    axes.set_yticks(range(len(rows)), rows)
    axes.set_xlabel("soft prompt, by the template it started from")
    axes.set_title(
        f"{result['dataset']}, {result['classes']} classes: share of the router's weight (%)",
        loc="left",
        fontsize=10,
    )
    for y, row in enumerate(share):
        for x, value in enumerate(row):
            colour = "white" if value > 0.5 else "black"
            axes.text(x, y, f"{100 * value:.0f}", ha="center", va="center", color=colour)
    figure.savefig(path, dpi=120, format="png")
    plt.close(figure)


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
        verdict = truth if truth == told else f"{truth}, taken for {told}"
        chosen = [g for g in row.argsort(descending=True).tolist() if row[g] > 0]
        lines = [f"{100 * row[g]:.0f}% {columns[g]}" for g in chosen]
        axes.set_title("\n".join([verdict, *lines]), fontsize=8, loc="left")
    figure.savefig(path, dpi=110)
    plt.close(figure)
