"""Evaluate, inspect and compare runs.

    python eval.py RUN                               # again, on its own test images
    python eval.py RUN --classes new                 # a run of --classes base on the new classes
    python eval.py RUN --dataset shapes_sketch       # its prompts with another dataset's classes
    python eval.py RUN --images photo.jpg album/     # what they show, and which prompts were used
    python eval.py RUN --words                       # the words nearest to the learned vectors
    python eval.py --table out                       # all finished runs: mean ± std over seeds
    python eval.py --plots out                       # the same as pictures

The first three write into the run's folder: `eval_<dataset>_<classes>.json`, the router's picture
beside it, and `samples_<...>.png`, test images with the prompts used for them.
"""

import itertools
import os
import random
import sys
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from data import dataset_name, full_dataset, load_split, select_classes
from lib import report
from lib.baselines import ClassVectors
from lib.catalogue import all_templates, row_of, template_groups
from lib.clip_model import MEAN, STD, load_clip
from lib.features import album_pixels, attach, image_features, photo_features
from lib.parallel import choose_device
from lib.photos import check_output, find_photos, write_csv
from lib.runs import (
    BadInput,
    Parser,
    exit_on_bad_input,
    find_runs,
    read_lines,
    read_result,
    read_torch_file,
    replacing,
    save_json,
)
from prompts import PromptError, check_apart, known_tokens, template_features, words_of
from train import (
    BASELINES,
    PROBES,
    learns_images,
    make_model,
    make_parser,
    preset,
    text_encoder_of,
    zero_shot_and_ensemble,
)

# ------------------------------------------------------------------------------ one run, anywhere


class Run(NamedTuple):
    """A trained run, ready to use: see "Your own photos" in the README."""

    config: dict  # every setting
    groups: list  # lists of templates, one prompt each
    class_names: list  # those with images in training
    model: torch.nn.Module  # model.logits(image_features, class_names) -> logits, prompt weights
    clip_model: torch.nn.Module
    fingerprint: str  # of the CLIP's weights

    def classify(self, images, class_names=None):
        """Classifies PIL images: (class names, probabilities (N, C), prompt weights (N, G)).

        images: a list or a generator, or their features from `photo_features`. class_names: your
        own, see `read_names`; None for the classes of the training. Probabilities are the softmax
        of the method's logits; the weights are in the order of `model.templates`.
        Raises BadInput if the method cannot answer with these classes.
        """
        names = self.class_names if class_names is None else read_names(class_names)
        features = images if torch.is_tensor(images) else self.photo_features(images)
        return names, *self.classifier(names)(features)

    @torch.no_grad()
    def classifier(self, names):
        """Returns `classify` as a function of features (N, D) that encodes the names once."""
        model, method = self.model, self.config["method"]
        if method in ("zeroshot", "ensemble"):  # CLIP as it is, with these names
            model = self.untrained(self.config["dataset"], self.groups, names)[method]
        known = {}
        if model.templates and not model.per_image:
            known["text_features"] = model.text_features(names)

        def answer(features):
            logits, weights = model.logits(features, names, **known)
            return logits.softmax(dim=-1).cpu(), weights.cpu()

        return answer

    def untrained(self, dataset, groups, class_names):
        """`zero_shot_and_ensemble` with a dataset's own template, these groups and names."""
        templates, text_encoder = all_templates(groups), text_encoder_of(self.config)
        features = template_features(self.clip_model, templates, class_names, text_encoder)
        return zero_shot_and_ensemble(self.clip_model, dataset, class_names, features, self.config)

    def photo_features(self, images):
        """Features (N, D) of PIL images, as the method expects them."""
        return photo_features(self.clip_model, images, raw=self.takes_raw)

    @property
    def takes_raw(self):
        """Whether the method expects features that are not normalised: the linear probe does."""
        return self.config["method"] == "linear"


def load_run(folder, clip=None, device=None):
    """The `Run` in a folder.

    clip: a name or file to use instead of the run's own, if its weights are the same.
    Raises BadInput if the folder holds no finished run or its checkpoint is from another CLIP.
    """
    folder = Path(folder)
    for name in ("checkpoint.pt", "result.json"):
        if not (folder / name).is_file():
            raise BadInput(f"{folder} holds no finished run (no {name})")
    file = folder / "checkpoint.pt"
    checkpoint = read_torch_file(file, "checkpoint of a run")
    if not checkpoint.keys() >= {"config", "groups", "class_names", "clip_fingerprint", "model"}:
        raise BadInput(f"{file} is not the checkpoint of a run")
    stored, groups, state = (checkpoint[key] for key in ("config", "groups", "model"))
    class_names, fingerprint = checkpoint["class_names"], checkpoint["clip_fingerprint"]
    defaults = preset(stored["method"], stored["dataset"], stored["shots"])
    # Settings that were added after the run was made get their defaults.
    config = vars(make_parser().parse_args([])) | defaults | stored
    clip_model, found = load_clip(clip or config["clip"], choose_device(device))
    if found != fingerprint:
        raise BadInput(
            f"{folder} was trained with another CLIP than {clip or config['clip']}"
            f" (weights {fingerprint[:8]}..., not {found[:8]}...): name it with --clip"
        )
    if config["method"] in BASELINES:
        model = ClassVectors(class_names, torch.empty_like(state["weight"]))
    else:
        prompt_names = checkpoint.get("prompt_names", class_names)
        model = make_model(clip_model, groups, prompt_names, config)
        attach(clip_model, model.image_side)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise BadInput(f"{file} does not fit the run it names") from error
    model = model.to(clip_model.logit_scale.device).eval()
    return Run(config, groups, class_names, model, clip_model, fingerprint)


def evaluate(folder, dataset=None, classes=None, data=None, csv_file=None, clip=None, device=None):
    """Tests the run in `folder`; arguments of None are as in the run. Writes the files, returns the
    dictionary of `eval_<dataset>_<classes>.json`, which has the keys of `result.json`. csv_file:
    where to write the answer for every test image."""
    if csv_file:
        check_output(csv_file, folder)
    folder, run = Path(folder), load_run(folder, clip, device)
    config, groups, class_names, model, clip_model, fingerprint = run
    its_result = read_result(folder / "result.json")
    dataset, classes = full_dataset(dataset or config["dataset"]), classes or config["classes"]
    full_split = load_split(dataset, data or config["data"])
    split = replace(select_classes(full_split, classes), train=[], val=[])
    name = f"{split.name}_{classes}"
    file = folder / f"eval_{name}.json"
    own_dataset = split.name == dataset_name(config["dataset"])
    if own_dataset:  # a folder may have moved: its name and classes identify it
        own_names = select_classes(full_split, config["classes"]).class_names
        same = own_names == class_names and row_of(dataset) == row_of(config["dataset"])
        same = same and (dataset == config["dataset"] or not os.path.exists(config["dataset"]))
    else:
        same = not file.exists() or read_result(file).get("target", dataset) == dataset
    if not same:
        raise BadInput(f"{folder} holds numbers of another {split.name}: rename {dataset}")
    if config["method"] in PROBES:
        model.check_classes(split.class_names)  # before any image is encoded
    what = f"test images of {dataset}, {classes} classes"

    # Zero-shot and ensemble: the original CLIP, with the target's templates.
    untrained_clip = clip_model
    learned = learns_images(config)
    if learned:
        untrained_clip, _ = load_clip(clip or config["clip"], clip_model.logit_scale.device)
    frozen_features = image_features(untrained_clip, fingerprint, split, split.test, what=what)
    target_groups = groups if own_dataset else template_groups(dataset)
    untrained = run.untrained(dataset, target_groups, split.class_names)
    zero_shot, ensemble = (
        report.accuracy_on(m, split, split.test, frozen_features) for m in untrained.values()
    )

    features = frozen_features
    if learned or run.takes_raw:
        options = {"cached": not learned, "raw": run.takes_raw}
        features = image_features(clip_model, fingerprint, split, split.test, what=what, **options)
    model = untrained.get(config["method"], model)  # zeroshot, ensemble: for the target's classes
    changed = its_result["changed_flags"]
    measured, logits, weights = report.evaluate_model(
        model, config, changed, split, classes, features
    )
    result = its_result | measured
    result |= {"zero_shot_accuracy": zero_shot, "ensemble_accuracy": ensemble, "val_accuracy": None}
    result["target"] = config["dataset"] if own_dataset else dataset  # a folder by its full path
    print(
        f"{split.name}, {classes} classes, {len(split.test):,} images: {config['method']}"
        f" {result['accuracy']:.2f} %, zero-shot {zero_shot:.2f} %, ensemble {ensemble:.2f} %"
    )
    if csv_file:
        truths = [split.class_names[item.label] for item in split.test]
        answers = map(best_answers, logits.softmax(dim=-1), itertools.repeat(split.class_names))
        rows = zip([item.path for item in split.test], truths, answers, weights.tolist())
        write_csv(csv_file, list(rows), model.templates)
    save_json(result, file)
    print(f"saved in {folder}: eval_{name}.json")
    predictions = logits.argmax(dim=-1)
    draw_samples(split, predictions, weights, model.templates, folder / f"samples_{name}.png")
    if model.templates:
        report.router_picture(result, folder / f"eval_{name}.png")
    return result


@report.for_show("the sheet of samples")
@report.matplotlib_defaults()
def draw_samples(split, predictions, weights, templates, path):
    """Draws a sheet of 16 test images, each with the answer, its prompts and their weights.

    predictions (N,) and weights (N, G): of all test images.
    """
    some = random.Random(0).sample(range(len(split.test)), min(16, len(split.test)))
    titles = []
    for i in some:
        truth, answer = split.class_names[split.test[i].label], split.class_names[predictions[i]]
        verdict = truth if truth == answer else f"{truth},\ntaken for {answer}"
        titles.append(("\n".join([verdict, *used_prompts(weights[i], templates)]), truth == answer))
    report.samples_picture([split.open(split.test[i].path) for i in some], titles, path)


def best_answers(probabilities, class_names):
    """The three best classes of an image with their probabilities. probabilities: (C,)."""
    best = probabilities.topk(min(3, len(class_names)))
    return [(class_names[i], p) for i, p in zip(best.indices, best.values.tolist())]


def used_prompts(weights, templates):
    """The prompts used for an image, as text, largest weight first. weights: (G,)."""
    order = weights.argsort(descending=True).tolist()
    return [f"{100 * weights[g]:.0f}% {templates[g]}" for g in order if weights[g] > 0]


def nearest_words(folder, clip=None, device=None, n_nearest=3):
    """For each learned context vector, the nearest words of CLIP's vocabulary with their Euclidean
    distances. Returns {template: [(word, distance) x n_nearest, per vector]}.

    CoOp inspects its prompts this way. Beware: a vector can work well far away from any word.
    Raises BadInput for a run without prompts.
    """
    run = load_run(folder, clip, device)
    if run.config["method"] in BASELINES:
        raise BadInput(f"{folder} is a run of {run.config['method']}: it has no prompts")
    embeddings = run.clip_model.token_embedding.weight
    known = torch.tensor(sorted(known_tokens(run.clip_model)), device=embeddings.device)
    found, prompts = {}, run.model.prompts
    for template, *contexts in zip(
        prompts.templates, prompts.context_before, prompts.context_after
    ):
        distances = torch.cdist(torch.cat(contexts).detach(), embeddings[known].float())
        nearest = distances.topk(min(n_nearest, len(known)), largest=False)
        found[template] = []
        for indices, values in zip(nearest.indices, nearest.values.tolist()):
            words = words_of(known[indices].tolist())
            found[template].append([(w, round(d, 3)) for w, d in zip(words, values)])
    return found


def export(folder, file, clip=None, device=None):
    """Writes all that classification needs to an .npz file, for use without PyTorch: the README
    has ten lines of NumPy that classify an image feature with it.

    Raises BadInput for a run without prompts, and for a run whose answers the file could not
    reproduce: one that shifts the prompts for each image or has changed the image encoder.
    """
    check_output(file, folder)
    run = load_run(folder, clip, device)
    config, model = run.config, run.model
    if config["method"] in BASELINES or config["conditional"] or learns_images(config):
        raise BadInput(
            f"{folder} cannot be exported: only prompts that all images share, for CLIP's own image"
            " encoder, can be used without this code"
        )
    text_features = model.text_features(run.class_names)
    shape = len(model.templates), text_features.shape[-1]
    gate_weight, gate_bias = torch.zeros(shape), torch.zeros(shape[0])  # equal weights
    if hasattr(model.router, "gate"):
        gate_weight, gate_bias = model.router.gate.weight, model.router.gate.bias
    arrays = {"text_features": text_features, "gate_weight": gate_weight, "gate_bias": gate_bias}
    with replacing(file) as scratch, open(scratch, "wb") as out:
        np.savez(
            out,
            **{name: array.detach().cpu().numpy() for name, array in arrays.items()},
            top_k=model.top_k,
            scale=model.logit_scale,
            class_names=run.class_names,
            templates=model.templates,
            clip=config["clip"],
            pixel_mean=MEAN,
            pixel_std=STD,
        )
    print(f"saved: {file}")


# ------------------------------------------------------------------------------- your own photos


def read_names(names):
    """Your own class names as a list: from a list, a file with one per line, or a comma-separated
    text. Raises BadInput for fewer than two, PromptError for two that CLIP cannot tell apart."""
    if isinstance(names, str):
        names = read_lines(names) if os.path.isfile(names) else names.split(",")
    names = [name.strip() for name in names if name.strip()]
    if len(names) < 2:
        raise BadInput(f"two class names at least, between commas or in a file, not {names}")
    check_apart(names)
    return names


def classify_photos(folder, paths, names=None, csv_file=None, clip=None, device=None):
    """Prints for each photo the three best classes with their probabilities, and its prompts.

    names: your own class names, separated by commas, or a file with one per line. csv_file: where
    to write the same as a table. Unreadable photos are named on standard error.
    Returns the number of unreadable photos. Raises BadInput if none can be read.
    """
    files = find_photos(paths)
    if csv_file:
        check_output(csv_file, folder)
    names = None if names is None else read_names(names)
    run = load_run(folder, clip, device)
    class_names, rows = names or run.class_names, []
    classify = run.classifier(class_names)
    try:
        for photo, pixels in album_pixels(run.clip_model, files):
            probabilities, weights = classify(run.photo_features([pixels]))
            answers = best_answers(probabilities[0], class_names)
            prompts = used_prompts(weights[0], run.model.templates)
            said = ", ".join(f"{name} {100 * x:.1f}%" for name, x in answers)
            which = f"  [{' | '.join(prompts)}]" if prompts else ""
            print(f"{photo}: {said}{which}", flush=True)
            rows.append((photo, "", answers, weights[0].tolist()))
    finally:  # also if it was interrupted
        if csv_file and rows:
            write_csv(csv_file, rows, run.model.templates)
    if not rows:
        raise BadInput(f"none of {len(files)} images could be read")
    return len(files) - len(rows)


# ------------------------------------------------------------------------------ the command line


def print_words(folder, clip, device):
    for template, vectors in nearest_words(folder, clip, device).items():
        print(template)
        for i, vector in enumerate(vectors, 1):
            print(f"  v{i}  " + "  ".join(f"{word} {distance:.3f}" for word, distance in vector))


def print_pictures(folder):
    drawn = report.draw_pictures(find_runs(folder), folder)
    if not drawn:
        raise BadInput(
            f"nothing to draw below {folder}: curves need a method's own settings at several"
            " numbers of shots, maps and ablations a plain run of mocoop"
        )
    print(f"saved in {folder}: {', '.join(drawn)}")


READS = {  # {action: the other arguments it uses}; the first action given counts
    "table": (),
    "plots": (),
    "words": ("run", "clip", "device"),
    "export": ("run", "clip", "device"),
    "images": ("run", "clip", "device", "names", "csv"),
    "run": ("clip", "device", "dataset", "classes", "data", "csv"),
}


def run_command_line():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("run", nargs="?", type=Path, metavar="RUN", help="the folder of a run")
    add("--dataset", help="test on another dataset's images and class names")
    add(
        "--classes",
        choices=("all", "base", "new"),
        help="test on these classes (by default the run's)",
    )
    add("--data", help="the folder that holds all datasets (by default the run's)")
    add("--clip", help="path of the run's CLIP, if it has moved")
    add("--device", help="cpu, cuda or cuda:1 (by default a GPU if there is one)")
    add("--images", nargs="+", metavar="PATH", help="classify photos, folders of photos, patterns")
    add(
        "--names", help="class names for --images, separated by commas, or a file with one per line"
    )
    add("--csv", type=Path, metavar="FILE", help="write the answer for every image as a table")
    add("--words", action="store_true", help="print the words nearest to the learned vectors")
    add("--export", type=Path, metavar="FILE", help="write an .npz file to classify with in NumPy")
    add("--table", type=Path, metavar="DIR", help="print all runs below DIR as Markdown")
    add("--plots", type=Path, metavar="DIR", help="draw all runs below DIR, into DIR")
    args = parser.parse_args()
    if [args.run, args.table, args.plots].count(None) != 2:
        parser.error("name a RUN, or --table DIR, or --plots DIR")
    action = next((name for name in READS if getattr(args, name)), "run")
    for name, value in vars(args).items():
        if value and name not in (action, *READS[action]):
            parser.error(f"--{name} has no effect here")
    if args.table:
        print(report.runs_table(find_runs(args.table)))
    elif args.plots:
        print_pictures(args.plots)
    elif args.words:
        print_words(args.run, args.clip, args.device)
    elif args.export:
        export(args.run, args.export, args.clip, args.device)
    elif args.images:
        how = args.names, args.csv, args.clip, args.device
        sys.exit(1 if classify_photos(args.run, args.images, *how) else 0)
    else:
        what = args.dataset, args.classes, args.data, args.csv
        evaluate(args.run, *what, args.clip, args.device)


def main():
    exit_on_bad_input(run_command_line, PromptError)


if __name__ == "__main__":
    main()
