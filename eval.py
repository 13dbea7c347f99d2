"""Evaluate a run on anything; look into it; make tables and pictures of runs.

    python eval.py RUN                               # again on its own test images
    python eval.py RUN --classes new                 # a run of --classes base on the new classes
    python eval.py RUN --dataset shapes_sketch       # its prompts, another dataset's class names
    python eval.py RUN --words                       # the words nearest to what was learned
    python eval.py --table out                       # all finished runs: mean ± std over seeds
    python eval.py --plots out                       # the same as pictures

The first three write into the run's folder: `eval_<dataset>_<classes>.json`, the router's picture
beside it, and `samples_<...>.png`, test images with the prompts that they were given.
"""

import random
from pathlib import Path
from typing import NamedTuple

import torch
from clip import simple_tokenizer as tokenizer

from data import dataset_name, full_dataset, load_split, select_classes
from lib.catalogue import template_groups
from lib.clip_model import load_clip
from lib.errors import BadInput, exit_on_bad_input
from lib.files import read_torch_file
from lib.flags import Parser
from lib.images import image_features
from lib.pictures import draw_pictures, router_picture, samples_picture
from lib.probe import ClassVectors
from lib.processes import choose_device
from lib.runs import find_runs, read_result, save_json
from lib.tables import runs_table
from lib.templates import all_templates
from prompts import template_features, untrained_classifiers
from train import accuracy, examine, make_model

# ------------------------------------------------------------------------------ one run, anywhere


class Run(NamedTuple):
    """A trained run, ready to be used."""

    config: dict  # every flag
    groups: list  # of templates, one prompt each
    model: torch.nn.Module  # model.predict(class_names, image_features) -> labels, prompt weights
    clip_model: torch.nn.Module
    fingerprint: str  # of the CLIP's weights


def load_run(folder, clip=None, device=None):
    """The `Run` in a folder.

    clip: a name or file in place of the one the run names, as long as its weights are the same.
    Raises BadInput if the folder holds no finished run or its checkpoint is from another CLIP.
    """
    folder = Path(folder)
    for name in ("checkpoint.pt", "result.json"):
        if not (folder / name).is_file():
            raise BadInput(f"{folder} holds no finished run (no {name})")
    checkpoint = read_torch_file(folder / "checkpoint.pt", "checkpoint of a run")
    try:
        config, groups = checkpoint["config"], checkpoint["groups"]
        state, fingerprint = checkpoint["model"], checkpoint["clip_fingerprint"]
        for flag in ("clip", "classifier", "dataset", "classes", "data", "tune_visual_ln"):
            config[flag]
    except (KeyError, TypeError) as error:
        raise BadInput(f"{folder / 'checkpoint.pt'} lacks {error}") from error
    clip_model, found = load_clip(clip or config["clip"], choose_device(device))
    if found != fingerprint:
        raise BadInput(
            f"{folder} was trained with another CLIP than {clip or config['clip']}"
            f" (weights {fingerprint[:8]}..., not {found[:8]}...): name it with --clip"
        )
    try:
        if config["classifier"] == "prompts":
            model = make_model(clip_model, groups, config)
        else:
            model = ClassVectors(checkpoint["class_names"], torch.empty_like(state["weight"]))
        model.load_state_dict(state)
    except (KeyError, TypeError, AttributeError, IndexError, ValueError, RuntimeError) as error:
        raise BadInput(f"{folder / 'checkpoint.pt'} does not fit the run it names") from error
    device = clip_model.logit_scale.device
    return Run(config, groups, model.to(device).eval(), clip_model, fingerprint)


def evaluate(folder, dataset=None, classes=None, data=None, clip=None, device=None):
    """Tests the run in `folder`; what is None is as in the run. Writes the files and returns the
    dictionary of `eval_<dataset>_<classes>.json`, which has the keys of `result.json`."""
    config, groups, model, clip_model, fingerprint = load_run(folder, clip, device)
    its_result = read_result(folder / "result.json")
    dataset, classes = full_dataset(dataset or config["dataset"]), classes or config["classes"]
    if dataset != config["dataset"] and dataset_name(dataset) == dataset_name(config["dataset"]):
        raise BadInput(
            f"{dataset} has the name of the run's own dataset, {config['dataset']}: rename it"
        )
    split = select_classes(load_split(dataset, data or config["data"]), classes)
    what = f"test images of {dataset}, {classes} classes"

    # Zero-shot and ensemble: CLIP as it was, with the target's templates.
    untrained = clip_model
    if config["tune_visual_ln"]:
        untrained, _ = load_clip(clip or config["clip"], clip_model.logit_scale.device)
    plain = image_features(untrained, fingerprint, split, split.test, what=what)
    target_groups = groups if dataset == config["dataset"] else template_groups(dataset)
    hard_features = template_features(clip_model, all_templates(target_groups), split.class_names)
    probes = untrained_classifiers(clip_model, split.dataset, split.class_names, hard_features)
    zero_shot, ensemble = (accuracy(probe, split, split.test, plain) for probe in probes.values())

    features = plain
    if config["tune_visual_ln"]:
        features = image_features(
            clip_model, fingerprint, split, split.test, what=what, cached=False
        )
    model = probes.get(config["classifier"], model)  # zeroshot, ensemble: of the target's classes
    changed = its_result["changed_flags"]
    measured, predictions, weights = examine(model, config, changed, split, classes, features)
    result = its_result | measured
    result |= {"zero_shot_accuracy": zero_shot, "ensemble_accuracy": ensemble, "val_accuracy": None}
    name = f"{split.name}_{classes}"
    save_json(result, folder / f"eval_{name}.json")
    draw_samples(split, predictions, weights, model.templates, folder / f"samples_{name}.png")
    if model.templates:
        router_picture(result, folder / f"eval_{name}.png")
    print(
        f"{split.name}, {classes} classes, {len(split.test):,} images: {config['method']}"
        f" {result['accuracy']:.2f} %, zero-shot {zero_shot:.2f} %, ensemble {ensemble:.2f} %"
    )
    print(f"saved in {folder}: eval_{name}.json and pictures")
    return result


def draw_samples(split, predictions, weights, templates, path):
    """A sheet of 16 test images, each with its answer and its prompts and weights.

    predictions (N,) and weights (N, G) of all test images.
    """
    some = random.Random(0).sample(range(len(split.test)), min(16, len(split.test)))
    titles = []
    for i in some:
        truth, answer = split.class_names[split.test[i].label], split.class_names[predictions[i]]
        verdict = truth if truth == answer else f"{truth},\ntaken for {answer}"
        chosen = [g for g in weights[i].argsort(descending=True).tolist() if weights[i, g] > 0]
        lines = [f"{100 * weights[i, g]:.0f}% {templates[g]}" for g in chosen]
        titles.append(("\n".join([verdict, *lines]), truth == answer))
    samples_picture([split.open(split.test[i].path) for i in some], titles, path)


def nearest_words(folder, clip=None, device=None, n_nearest=3):
    """What the learned context vectors say: for each, the nearest words of CLIP's vocabulary with
    their Euclidean distances. Returns {template: [(word, distance) x n_nearest, per vector]}.

    CoOp's look inside. Beware: a vector can do its work far away from any word.
    Raises BadInput for a run without prompts.
    """
    config, _, model, clip_model, _ = load_run(folder, clip, device)
    if config["classifier"] != "prompts":
        raise BadInput(f"{folder} is a run of {config['method']}: it has no prompts")
    embeddings = clip_model.token_embedding.weight  # rows of unknown words are NaN
    known = (~embeddings.isnan().any(dim=1)).nonzero().flatten()
    decoder = tokenizer.SimpleTokenizer().decoder
    found, prompts = {}, model.prompts
    for template, *contexts in zip(
        prompts.templates, prompts.context_before, prompts.context_after
    ):
        distances = torch.cdist(torch.cat(contexts).detach(), embeddings[known].float())
        nearest = distances.topk(min(n_nearest, len(known)), largest=False)
        found[template] = []
        for indices, values in zip(nearest.indices, nearest.values.tolist()):
            words = [decoder[token].replace("</w>", "") for token in known[indices].tolist()]
            found[template].append([(w, round(d, 3)) for w, d in zip(words, values)])
    return found


# ------------------------------------------------------------------------------ the command line


def print_words(folder, clip, device):
    for template, vectors in nearest_words(folder, clip, device).items():
        print(template)
        for i, vector in enumerate(vectors, 1):
            print(f"  v{i}  " + "  ".join(f"{word} {distance:.3f}" for word, distance in vector))


def print_pictures(folder):
    drawn = draw_pictures(find_runs(folder), folder)
    if not drawn:
        raise BadInput(
            f"nothing to draw below {folder}: curves need a method's own settings at several"
            " numbers of shots, maps and bars a plain run of mocoop"
        )
    print(f"saved in {folder}: {', '.join(drawn)}")


def run_command_line():
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("run", nargs="?", type=Path, metavar="RUN", help="the folder of a run")
    parser.add_argument("--dataset", help="another dataset's test images and class names")
    parser.add_argument("--classes", choices=("all", "base", "new"), help="default: the run's")
    parser.add_argument("--data", help="the root of all datasets (default: the run's)")
    parser.add_argument("--clip", help="where the run's CLIP lies, if not where it was")
    parser.add_argument("--device", help="cpu, cuda, ... (default: cuda if there is one)")
    parser.add_argument("--words", action="store_true", help="the words nearest to the prompts")
    parser.add_argument("--table", type=Path, metavar="DIR", help="all runs below DIR, in Markdown")
    parser.add_argument("--plots", type=Path, metavar="DIR", help="the same as pictures, into DIR")
    args = parser.parse_args()
    if [args.run, args.table, args.plots].count(None) != 2:
        parser.error("name a RUN, or --table DIR, or --plots DIR")
    unread = ("dataset", "classes", "data") if args.words else ()
    if args.run is None:
        unread = "dataset", "classes", "data", "clip", "device", "words"
    for flag in unread:
        if getattr(args, flag):
            parser.error(f"--{flag} means nothing here")
    if args.table:
        print(runs_table(find_runs(args.table)))
    elif args.plots:
        print_pictures(args.plots)
    elif args.words:
        print_words(args.run, args.clip, args.device)
    else:
        evaluate(args.run, args.dataset, args.classes, args.data, args.clip, args.device)


def main():
    exit_on_bad_input(run_command_line)


if __name__ == "__main__":
    main()
