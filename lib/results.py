"""Numbers and tables, from a model's predictions and from the `result.json` of runs."""

import os
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lib.catalogue import row_of
from lib.errors import BadInput, say, shown, warn
from lib.runs import BY_CONTENT, MACHINE, run_label

UNTRAINED = "zeroshot", "ensemble"  # every run also reports their accuracies

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
    are keyed by name, as in `result.json`, so two classes with the same name share a row."""
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
    """Prints what the run is about to do."""
    own = split.source == "coop" and split.samples == "own"
    prompts = f" with {len(model.templates)} prompts, {model.top_k} per image" if model else ""
    say(
        f"{split.name}: {len(split.class_names)} {config['classes']} classes, {config['shots']}"
        f" shots, seed {config['seed']}{' (samples of our own)' if own else ''};"
        f" CLIP {config['clip']}; {config['method']}{prompts}"
    )
    if model:
        say("prompts: " + " | ".join(model.templates))
    if config["groups"] == "dataset" and not row_of(split.dataset).templates:
        say(f"{split.name} has no templates: SUN397's four groups are used (see --groups)")


def print_epoch(epoch, model, lr, history, used):
    """Prints an epoch's line: each loss as weight x mean value. Returns each prompt's share.

    history: the losses of every step. used: (G,), the sum of the router's weights.
    Raises BadInput if a parameter is no longer finite.
    """
    if not all(p.isfinite().all() for p in model.parameters()):
        raise BadInput(f"training has diverged in epoch {epoch + 1}: try a smaller --lr")
    total, terms = 0.0, []
    for name, (weight, _) in history[0].items():
        value = sum(losses[name][1] for losses in history).item() / len(history)
        total += weight * value
        terms.append(f"{name} {weight:g} x {value:.3f}")
    share = (used / used.sum()).tolist()
    print(
        f"epoch {epoch + 1:3d}/{model.config['epochs']}  lr {lr:.5f}  loss {total:.3f} ="
        f" {' + '.join(terms)}  prompts {' '.join(f'{100 * s:2.0f}' for s in share)} %",
        flush=True,
    )
    return [round(s, 4) for s in share]


def about(config, changed, split, classes):
    """What was trained and tested, for `result.json`. changed: settings not at their default."""
    return {
        "dataset": split.name,
        "classes": classes,
        "shots": config["shots"],
        "seed": config["seed"],
        "method": config["method"],
        "label": run_label(config["method"], changed),
        "changed_flags": changed,
        "clip": config["clip"],
        "n_classes": len(split.class_names),
        "n_test": len(split.test),
        "class_names": split.class_names,
        "split": split.source,
    }


def evaluate_model(model, split, features):
    """Evaluates a model on the test images of a split: (numbers for `result.json`, class logits (N,
    C), prompt weights (N, G)). features: (N, D)."""
    logits, weights = model.logits(features, split.class_names)
    predictions, weights = logits.argmax(dim=-1).cpu(), weights.cpu()
    labels = split.labels(split.test)
    result = {
        "n_prompts": len(model.templates),
        "top_k": model.top_k,
        "accuracy": accuracy(predictions, labels),
        "macro_f1": macro_f1(predictions, labels, len(split.class_names)),
        "per_class_accuracy": per_class_accuracy(predictions, labels, split.class_names),
        "confusion": confusion(predictions, labels, split.class_names),
        "prompt_usage": prompt_usage(weights, model.templates),
        "router": usage_by_kind(weights, *split.kinds),
    }
    return result, logits.cpu(), weights


def accuracy_on(model, split, part, features):
    """Top-1 accuracy in percent of a model on `train`, `val` or `test` of a split; None if that is
    empty. features: (N, D)."""
    items = getattr(split, part)
    if not items:
        return None
    logits, _ = model.logits(features, split.class_names)
    return accuracy(logits.argmax(dim=-1), split.labels(items))


# -------------------------------------------------------------------------------------- tables


class Line(NamedTuple):
    """What a row of a table shows of its runs."""

    dataset: str
    classes: str
    clip: str
    shots: int  # 0 for CLIP as it is
    label: str  # the method and its changed settings, as in a run's folder


class Names:
    """Keeps apart what differs under one name: the second such thing is called `mocoop (2)`."""

    def __init__(self):
        self.measured = defaultdict(list)

    def number(self, name, what):
        """ "" for the first thing of a name, " (2)" for the second. what: a dictionary of all that
        things of one name share; empty for older results, which lack it."""
        same_name = self.measured[name]
        if what not in same_name:
            same_name.append(what)
            first = same_name[0]
            differing = [k for k in {**first, **what} if first.get(k) != what.get(k)]
            if differing:
                warn(f"kept apart: results of {name} that differ in {', '.join(differing)}")
        n = same_name.index(what) + 1
        return f" ({n})" if n > 1 else ""


def what_was_measured(result):
    """All that runs in one row share: their settings, where those are no paths, and what they were
    trained and tested on."""
    ignored = MACHINE | BY_CONTENT | {"seed"}
    settings = {k: v for k, v in result["config"].items() if k not in ignored}
    content = "class_names", "n_test", "groups", "clip_fingerprint"
    return settings | {k: result.get(k) for k in content}


def accuracies(runs):
    """{Line: {column: {seed: accuracy}}}, in percent. runs: from `lib.runs.find_runs`.

    Runs share a row if they differ only in the seed; CLIP as it is has a row per task. Columns:
    `accuracy`, on the run's own task; `new`, a base run evaluated on the new classes; and any other
    dataset that the runs were evaluated on. If a run appears twice for a seed, the first counts,
    and a line on standard error names the other.
    """
    rows, names = defaultdict(lambda: defaultdict(dict)), Names()

    def line(*columns, what):
        row = Line(*columns)
        return row._replace(label=row.label + names.number(" ".join(map(str, row)), what))

    for result, evaluations in runs:
        changed, what, seed = result["changed_flags"], what_was_measured(result), result["seed"]
        clip = Path(result["clip"]).name if os.path.isabs(result["clip"]) else result["clip"]
        task = result["dataset"], result["classes"], clip
        tested = {k: what[k] for k in ("class_names", "n_test", "clip_fingerprint")}
        # The ensemble depends only on the templates, not on how they are grouped.
        templates = {k: v for k, v in changed.items() if k == "groups" and v != "auto"}
        read = {"templates": sorted(sum(what["groups"] or [], []))}
        lines = {
            "zero_shot_accuracy": line(*task, 0, "zero-shot", what=tested),
            "ensemble_accuracy": line(
                *task, 0, run_label("ensemble", templates), what=tested | read
            ),
        }
        if result["method"] not in UNTRAINED:
            lines["accuracy"] = line(*task, result["shots"], result["label"], what=what)
        for key, row in lines.items():
            columns = rows[row]
            if key == "accuracy" and seed in columns[key]:
                warn(f"left out: {result.get('folder')}: seed {seed} of {row.label} appears twice")
                continue
            columns["accuracy"][seed] = result[key]
            for other in evaluations:
                differs = [other[k] for k in ("dataset", "classes") if other[k] != result[k]]
                if differs:
                    column = " ".join(differs)
                    if column == other["dataset"] in ("accuracy", "new"):  # of another column
                        column += " images"
                    tested = {k: other.get(k) for k in ("class_names", "n_test")}
                    columns[column + names.number(column, tested)][seed] = other[key]
    return rows


def mean_h(columns):
    """H of the mean base and the mean new accuracy of base runs, over the seeds that have both, if
    there are any."""
    seeds = columns["accuracy"].keys() & columns.get("new", {}).keys()
    pairs = [(columns["accuracy"][seed], columns["new"][seed]) for seed in seeds]
    return harmonic_mean(*np.mean(pairs, axis=0)) if pairs else None


def cell(values, sign="", n_seeds=0):
    """Mean ± standard deviation of {key: percent}, or a dash. sign: "+" also shows plus signs.
    n_seeds: of the row; a mean over fewer shows its number."""
    if not values:
        return "–"
    mean, std = mean_std(values.values())
    spread = f" ± {std:.1f}" if len(values) > 1 and std > 1e-9 else ""
    return f"{mean:{sign}.1f}{spread}{fewer(len(values), n_seeds)}"


def fewer(n, n_seeds):
    return f" ({n} of {n_seeds} seeds)" if n < n_seeds else ""


def runs_table(runs):
    """All runs as a Markdown table. runs: from `lib.runs.find_runs`."""
    rows = accuracies(runs)
    targets = sorted({c for row in rows.values() for c in row} - {"accuracy", "new"})
    columns = ["dataset", "classes", "CLIP", "method", "shots", "seeds", "accuracy", "new", "H"]
    lines = [[*columns, *targets]]
    for row in sorted(rows, key=lambda row: (*row[:3], row.shots, row)):
        values = rows[row]
        n = len(values["accuracy"])
        h = mean_h(values) if row.classes == "base" else None
        line = [row.dataset, row.classes, row.clip, row.label, row.shots or "–"]
        line += [n if row.shots else "–", cell(values["accuracy"]), cell(values["new"], n_seeds=n)]
        line.append(f"{h:.1f}{fewer(len(values['new']), n)}" if h else "–")
        lines.append(line + [cell(values[target], n_seeds=n) for target in targets])
    used = [i for i in range(len(lines[0])) if any(line[i] != "–" for line in lines[1:])]
    return markdown([[line[i] for i in used] for line in lines])


def markdown(lines):
    """Rows of cells, the heading first, as a Markdown table."""
    lines = [lines[0], ["---"] * len(lines[0]), *lines[1:]]
    cells = [[shown(cell).replace("|", "\\|") for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)
