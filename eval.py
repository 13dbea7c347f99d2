"""Evaluate a run on anything, and make tables of runs.

    python eval.py RUN                               # again on its own test images
    python eval.py RUN --classes new                 # a run of --classes base on the new classes
    python eval.py RUN --dataset shapes_sketch       # its prompts, another dataset's class names
    python eval.py --table out                       # all finished runs: mean ± std over seeds

The first three write into the run's folder: `eval_<dataset>_<classes>.json`, the router's picture
beside it, and `samples_<...>.png`, test images with the prompts that they were given.
"""

import json
import random
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch

import plots
from backbone import BadInput, exit_on_bad_input, load_clip, read_torch_file
from data import dataset_name, full_dataset, load_split, open_image, select_classes
from features import image_features
from model import MoCoOp, Probe, clip_as_it_is, measure
from prompts import template_features, template_groups
from runs import ELSEWHERE, find_runs, read_result
from train import Parser, choose_device, describe, method_label

# ----------------------------------------------------------------------------- one run, anywhere


def load_run(folder, clip=None, device=None):
    """A trained run: (config, groups, model, frozen CLIP, the CLIP's fingerprint).

    clip: a name or file in place of the one the run names, as long as its weights are the same.
    Raises BadInput if the folder holds no finished run or its checkpoint is from another CLIP.
    """
    if not (folder / "checkpoint.pt").is_file():
        raise BadInput(f"{folder} holds no finished run (no checkpoint.pt)")
    checkpoint = read_torch_file(folder / "checkpoint.pt", "checkpoint of a run")
    try:
        config, groups = checkpoint["config"], checkpoint["groups"]
        state, fingerprint = checkpoint["model"], checkpoint["clip_fingerprint"]
    except KeyError as error:
        raise BadInput(f"{folder / 'checkpoint.pt'} lacks {error}") from error
    clip_model, found = load_clip(clip or config["clip"], choose_device(device))
    if found != fingerprint:
        raise BadInput(
            f"{folder} was trained with another CLIP than {clip or config['clip']}"
            f" (weights {fingerprint[:8]}..., not {found[:8]}...): name it with --clip"
        )
    try:
        if config["classifier"] == "prompts":
            model = MoCoOp(clip_model, groups, config)
        else:
            model = Probe(checkpoint["class_names"], torch.empty_like(state["weight"]))
        model.load_state_dict(state)
    except (KeyError, TypeError, AttributeError, IndexError, RuntimeError) as error:
        raise BadInput(f"{folder / 'checkpoint.pt'} does not fit the run it names") from error
    return config, groups, model.to(clip_model.logit_scale.device), clip_model, fingerprint


def evaluate(folder, dataset=None, classes=None, data=None, clip=None, device=None):
    """Tests the run in `folder`; what is None is as in the run. Writes the files and returns the
    dictionary of `eval_<dataset>_<classes>.json`, which has the keys of `result.json`."""
    config, groups, model, clip_model, fingerprint = load_run(folder, clip, device)
    trained = read_result(folder / "result.json")
    dataset, classes = full_dataset(dataset or config["dataset"]), classes or config["classes"]
    if dataset != config["dataset"] and dataset_name(dataset) == dataset_name(config["dataset"]):
        raise BadInput(
            f"{dataset} has the name of the run's own dataset, {config['dataset']}: rename it"
        )
    split = select_classes(load_split(dataset, data or config["data"]), classes)
    what = f"test images of {dataset}, {classes} classes"
    untrained = clip_model
    if config["tune_visual_ln"]:  # the baselines are those of CLIP as it was
        untrained = load_clip(clip or config["clip"], clip_model.logit_scale.device)[0]
    plain = image_features(untrained, fingerprint, split, split.test, what=what)
    target_groups = groups if dataset == config["dataset"] else template_groups(dataset)
    templates = [template for group in target_groups for template in group]
    hard = template_features(clip_model, templates, split.class_names)
    probes = clip_as_it_is(clip_model, split.dataset, split.class_names, hard)
    zero_shot, ensemble = (
        measure(clip_model, probes[name], split, split.test, plain)[0]["accuracy"]
        for name in ("zeroshot", "ensemble")
    )
    features = plain
    if config["tune_visual_ln"]:
        features = image_features(
            clip_model, fingerprint, split, split.test, what=what, cached=False
        )
    model = probes.get(config["classifier"], model)  # these two know any classes
    measured, weights, predictions = measure(clip_model, model, split, split.test, features)
    result = {
        **trained,
        **describe(config, split, model, classes),
        "zero_shot_accuracy": zero_shot,
        "ensemble_accuracy": ensemble,
        "val_accuracy": None,
        **measured,
        "router": plots.router_table(split, weights),
    }
    name = f"{split.name}_{classes}"
    scratch = folder / f"eval_{name}.tmp"
    scratch.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    scratch.replace(folder / f"eval_{name}.json")
    some = random.Random(0).sample(range(len(split.test)), min(16, len(split.test)))
    images = [(split.test[i], open_image(split, split.test[i].path)) for i in some]
    columns = list(measured["prompt_usage"])
    sheet = folder / f"samples_{name}.png"
    plots.samples_picture(split, images, weights[some], predictions[some], columns, sheet)
    if columns:
        plots.router_picture(result, folder / f"eval_{name}.png")
    print(
        f"{split.name}, {classes} classes, {len(split.test):,} images: {config['method']}"
        f" {result['accuracy']:.2f} %, zero-shot {zero_shot:.2f} %, ensemble {ensemble:.2f} %"
    )
    print(f"saved in {folder}: eval_{name}.json and pictures")
    return result


# ---------------------------------------------------------------------------- tables over runs


def harmonic_mean(base, new):
    return 2 * base * new / (base + new) if base + new else 0.0


def table(folder):
    """Markdown: a row for runs that differ in the seed alone, and for CLIP as it is.

    Accuracies in percent, mean ± population standard deviation over seeds. `new` is a base run
    evaluated on the new classes, H the harmonic mean of the mean base and mean new accuracy.
    Other datasets that runs were evaluated on get a column each.
    """
    table_rows = defaultdict(lambda: defaultdict(dict))  # row -> column -> seed -> accuracy
    for result, evaluations in find_runs(folder):
        config = result["config"]
        but_seed = {k: v for k, v in config.items() if k not in (*ELSEWHERE, "seed")}
        task = dataset_name(config["dataset"]), config["classes"], config["clip"]
        for key, *row in [
            ("zero_shot_accuracy", 0, "zero-shot", ""),
            ("ensemble_accuracy", 0, "ensemble", config["groups"]),
            (
                "accuracy",
                config["shots"],
                method_label(config),
                json.dumps(but_seed),
            ),
        ]:
            columns = table_rows[(*task, *row)]
            columns["accuracy"][config["seed"]] = result[key]
            for other in evaluations:
                parts = [other["dataset"], other["classes"]]
                same = [dataset_name(config["dataset"]), config["classes"]]
                column = " ".join(part for part, own in zip(parts, same) if part != own)
                if column:
                    columns[column][config["seed"]] = other[key]

    def cell(values):
        values = list(values.values())
        spread = f" ± {np.std(values):.1f}" if len(values) > 1 and np.ptp(values) else ""
        return f"{np.mean(values):.1f}{spread}" if values else ""

    targets = sorted({c for row in table_rows.values() for c in row} - {"accuracy", "new"})
    columns = ["dataset", "classes", "CLIP", "method", "shots", "seeds", "accuracy", "new", "H"]
    lines = [[*columns, *targets]]
    for (dataset, classes, clip, shots, method, _), row in sorted(table_rows.items()):
        h = ""
        if classes == "base" and row["new"]:
            means = [np.mean(list(row[c].values())) for c in ("accuracy", "new")]
            h = f"{harmonic_mean(*means):.1f}"
        seeds = len(row["accuracy"]) if shots else ""
        cells = [cell(row["accuracy"]), cell(row["new"]), h, *(cell(row[t]) for t in targets)]
        lines.append([dataset, classes, clip, method, shots or "", seeds, *cells])
    used = [i for i in range(len(lines[0])) if any(line[i] != "" for line in lines[1:])]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join("| " + " | ".join(str(line[i]) for i in used) + " |" for line in lines)


def run():
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("run", nargs="?", type=Path, metavar="RUN", help="the folder of a run")
    parser.add_argument("--dataset", help="another dataset's test images and class names")
    parser.add_argument("--classes", choices=("all", "base", "new"), help="default: the run's")
    parser.add_argument("--data", help="the root of all datasets (default: the run's)")
    parser.add_argument("--clip", help="where the run's CLIP lies, if not where it was")
    parser.add_argument("--device", help="cpu, cuda, ... (default: cuda if there is one)")
    parser.add_argument("--table", type=Path, metavar="DIR", help="all runs below DIR, in Markdown")
    args = parser.parse_args()
    if (args.run is None) == (args.table is None):
        parser.error("name a RUN, or --table DIR")
    if args.table:
        print(table(args.table))
    else:
        evaluate(args.run, args.dataset, args.classes, args.data, args.clip, args.device)


def main():
    exit_on_bad_input(run)


if __name__ == "__main__":
    main()
