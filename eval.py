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

import lib.start  # noqa: F401  # isort: skip, before PyTorch

import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from data import dataset_name, full_dataset, load_split, select_classes
from lib import answers, pictures, results
from lib.baselines import ClassVectors
from lib.catalogue import all_templates, row_of, template_groups
from lib.clip_model import load_clip
from lib.errors import BadInput, exit_on_bad_input, say
from lib.features import attach, image_features, photo_features
from lib.files import read_lines, read_torch_file, save_json
from lib.parallel import choose_device
from lib.runs import CHECKPOINT, find_runs, read_result
from lib.settings import Parser, as_words, given_settings
from prompts import PromptError, check_apart, known_tokens, template_features, words_of
from train import (
    BASELINES,
    CLASSES,
    METHODS,
    PROBES,
    SETTINGS,
    complete,
    learns_images,
    make_model,
    text_encoder_of,
    zero_shot_and_ensemble,
)

# ------------------------------------------------------------------------------------- one run


@dataclass
class Run:
    """A trained run, ready to use: see "Your own photos" in the README."""

    config: dict  # every setting
    groups: list  # lists of templates, one prompt each
    class_names: list  # of the classes with training images
    model: torch.nn.Module  # model.logits(image_features, class_names) -> logits, prompt weights
    clip_model: torch.nn.Module
    fingerprint: str  # of the CLIP's weights

    def classify(self, images, class_names=None):
        """Classifies images: (class names, probabilities (N, C), prompt weights (N, G)).

        images: one or several PIL images, paths or arrays (H, W, 3) of uint8; or features (N, D)
        from `photo_features`. class_names: your own, see `read_names`; None for the classes it was
        trained on. Probabilities are the softmax of the logits; weights are in the order of
        `model.templates`. Raises TypeError for anything else, and BadInput for images that cannot
        be read, for other features, and if the method cannot classify into these classes.
        """
        names = self.class_names if class_names is None else read_names(class_names)
        return names, *self.classifier(names)(self.photo_features(images))

    @torch.no_grad()
    def classifier(self, names):
        """`classify` as a function of features (N, D) that encodes the names only once."""
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
        """Features (N, D) of images, see `classify`, as the method expects them."""
        return photo_features(self.clip_model, images, raw=self.takes_raw)

    @property
    def takes_raw(self):
        """Whether the method expects features that are not normalised: the linear probe does."""
        return self.config["method"] == "linear"


def load_run(folder, clip=None, device=None):
    """The `Run` in a folder.

    clip: a name or file to use instead of the run's own, if its weights are the same.
    Raises BadInput if the folder holds no finished run, or the run was trained with another CLIP.
    """
    folder = Path(folder)
    for name in ("checkpoint.pt", "result.json"):
        if not (folder / name).is_file():
            raise BadInput(f"{folder} holds no finished run (no {name})")
    file = folder / "checkpoint.pt"
    stored = read_torch_file(file, "checkpoint of a run", CHECKPOINT)
    if (method := str(stored["config"].get("method"))) not in METHODS:
        raise BadInput(f"{folder} is a run of {method}, which eval.py cannot load")
    names, groups, fingerprint = (stored[k] for k in ("class_names", "groups", "clip_fingerprint"))
    # Settings that were added after the run was made get their defaults.
    words = as_words(stored["config"] | {"help": None})
    config, _ = complete(given_settings(SETTINGS, None, words))
    for name, path in (("CLIP", clip or config["clip"]), ("dataset", config["dataset"])):
        if os.path.isabs(path):
            say(f"the {name} of {folder} is {path}")
    clip_model, found = load_clip(clip or config["clip"], choose_device(device))
    if found != fingerprint:
        raise BadInput(
            f"{folder} was trained with another CLIP than {clip or config['clip']}"
            f" (weights {fingerprint[:8]}..., not {found[:8]}...): name it with --clip"
        )
    try:
        if config["method"] in BASELINES:
            model = ClassVectors(names, torch.empty_like(stored["model"]["weight"]))
        else:
            model = make_model(clip_model, groups, stored.get("prompt_names") or names, config)
            attach(clip_model, model.image_side)
        model.load_state_dict(stored["model"])
    except (RuntimeError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise BadInput(f"{file} does not fit the run it names") from error
    model = model.to(clip_model.logit_scale.device).eval()
    return Run(config, groups, names, model, clip_model, fingerprint)


def read_names(names):
    """Your own class names as a list: from a list, a file with one per line, or a comma-separated
    text. Raises BadInput for fewer than two, PromptError for two that CLIP cannot tell apart."""
    if isinstance(names, str):
        names = read_lines(names) if os.path.isfile(names) else names.split(",")
    names = [name.strip() for name in names if name.strip()]
    if len(names) < 2:
        raise BadInput(f"at least two class names, separated by commas or in a file, not {names}")
    check_apart(names)
    return names


# ------------------------------------------------------------------------------- its test images


def evaluate(folder, dataset=None, classes=None, data=None, csv_file=None, clip=None, device=None):
    """Tests the run in `folder`; arguments that are None come from the run. Writes the files and
    returns the content of `eval_<dataset>_<classes>.json`, which has the keys of `result.json`.
    csv_file: where to write the answer for every test image."""
    if csv_file:
        answers.check_output(csv_file, folder)
    run = load_run(folder, clip, device)
    dataset = full_dataset(dataset or run.config["dataset"])
    classes = classes or run.config["classes"]
    full_split = load_split(dataset, data or run.config["data"])
    split = replace(select_classes(full_split, classes), train=[], val=[])
    own = split.name == dataset_name(run.config["dataset"])
    file = Path(folder, f"eval_{split.name}_{classes}.json")
    check_same_target(run, full_split, file, own)

    its_result = read_result(file.with_name("result.json"))
    measured, logits, weights = measure(run, split, classes, own, its_result["changed_flags"], clip)
    result = its_result | measured | {"val_accuracy": None}
    result["target"] = run.config["dataset"] if own else dataset  # a folder by its full path
    say(
        f"{split.name}, {classes} classes, {len(split.test):,} images: {run.config['method']}"
        f" {result['accuracy']:.2f} %, zero-shot {result['zero_shot_accuracy']:.2f} %,"
        f" ensemble {result['ensemble_accuracy']:.2f} %"
    )
    templates = run.model.templates
    if csv_file:
        answers.write_test_csv(csv_file, split, logits, weights, templates)
    save_json(result, file)
    say(f"saved in {folder}: {file.name}")
    samples = file.with_name(f"samples_{split.name}_{classes}.png")
    answers.draw_samples(split, logits.argmax(dim=-1), weights, templates, samples)
    pictures.router_picture(result, file.with_suffix(".png"))
    return result


def measure(run, split, classes, own, changed, clip=None):
    """Evaluates a run and CLIP as it is on a split's test images: (numbers for `result.json`,
    class logits (N, C), prompt weights (N, G)).

    own: whether the dataset is the run's own; CLIP then gets the run's templates. changed: the
    run's settings that differ from the defaults. clip: as in `load_run`.
    """
    config, model = run.config, run.model
    if config["method"] in PROBES:
        model.check_classes(split.class_names)  # before any image is encoded
    what = f"test images of {split.dataset}, {classes} classes"

    # CLIP as it is: its own image encoder, with the target's templates.
    untrained_clip = run.clip_model
    if learns_images(config):
        untrained_clip, _ = load_clip(clip or config["clip"], run.clip_model.logit_scale.device)
    features = image_features(untrained_clip, run.fingerprint, split, split.test, what=what)
    groups = run.groups if own else template_groups(split.dataset)
    untrained = run.untrained(split.dataset, groups, split.class_names)
    accuracies = [results.accuracy_on(m, split, "test", features) for m in untrained.values()]

    # The run itself. Its features may differ from CLIP's.
    model = untrained.get(config["method"], model)  # zeroshot, ensemble: for the target's classes
    if learns_images(config) or run.takes_raw:
        how = {"cached": not learns_images(config), "raw": run.takes_raw}
        features = image_features(
            run.clip_model, run.fingerprint, split, split.test, what=what, **how
        )
    measured, *answer = results.evaluate_model(model, split, features)
    measured |= results.about(config, changed, split, classes)
    measured["zero_shot_accuracy"], measured["ensemble_accuracy"] = accuracies
    return measured, *answer


def check_same_target(run, full_split, file, own):
    """A run keeps one evaluation per dataset name. Raises BadInput if `file` is another dataset's.

    own: whether the name is the run's own. Its folder may have moved; its classes identify it.
    """
    config, dataset = run.config, full_split.dataset
    if own:
        names = select_classes(full_split, config["classes"]).class_names
        same = names == run.class_names and row_of(dataset) == row_of(config["dataset"])
        same = same and (dataset == config["dataset"] or not os.path.exists(config["dataset"]))
    else:
        same = not file.exists() or read_result(file).get("target", dataset) == dataset
    if not same:
        raise BadInput(
            f"{file.parent} already holds results for another dataset named {full_split.name}:"
            f" rename {dataset}"
        )


# -------------------------------------------------------------------------- what it has learned


@torch.no_grad()
def nearest_words(run, n_nearest=3):
    """For each learned context vector, the nearest words of CLIP's vocabulary with their Euclidean
    distances. Returns {template: [(word, distance) x n_nearest, per vector]}.

    CoOp inspects its prompts this way. Beware: a vector can work well far away from any word.
    Raises BadInput for a run without prompts.
    """
    if not run.model.templates:
        raise BadInput(f"a run of {run.config['method']} has no prompts")
    embeddings = run.clip_model.token_embedding.weight
    known = torch.tensor(sorted(known_tokens(run.clip_model)), device=embeddings.device)
    found, prompts = {}, run.model.prompts
    for template, *halves in zip(prompts.templates, prompts.context_before, prompts.context_after):
        distances = torch.cdist(torch.cat(halves), embeddings[known].float())
        nearest = distances.topk(min(n_nearest, len(known)), largest=False)
        found[template] = [
            list(zip(words_of(known[indices].tolist()), values))
            for indices, values in zip(nearest.indices, nearest.values.tolist())
        ]
    return found


def print_words(run):
    for template, vectors in nearest_words(run).items():
        print(template)
        for i, vector in enumerate(vectors, 1):
            print(f"  v{i}  " + "  ".join(f"{word} {distance:.3f}" for word, distance in vector))


# ------------------------------------------------------------------------------ the command line


ALLOWED = {  # {action: the other arguments it uses}; the first action given counts
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
    add("--classes", choices=CLASSES, help="test on these classes (by default the run's)")
    add("--data", help="the folder that holds all datasets (by default the run's)")
    add("--clip", help="path of the run's CLIP, if it has moved")
    add("--device", help="cpu, cuda or cuda:1 (by default a GPU if there is one)")
    add("--images", nargs="+", metavar="PATH", help="classify photos, folders or patterns")
    add("--names", help="class names for --images, separated by commas, or a file of them")
    add("--csv", type=Path, metavar="FILE", help="write the answer for every image as a table")
    add("--words", action="store_true", help="print the words nearest to the learned vectors")
    add("--export", type=Path, metavar="FILE", help="write an .npz file for classifying with NumPy")
    add("--table", type=Path, metavar="DIR", help="print all runs below DIR as Markdown")
    add("--plots", type=Path, metavar="DIR", help="draw all runs below DIR, into DIR")
    args = parser.parse_args()
    if [args.run, args.table, args.plots].count(None) != 2:
        parser.error("name a RUN, or --table DIR, or --plots DIR")
    action = next((name for name in ALLOWED if getattr(args, name)), "run")
    for name, value in vars(args).items():
        if value and name not in (action, *ALLOWED[action]):
            parser.error(f"--{name} has no effect here")
    which = args.clip, args.device
    if args.table:
        print(results.runs_table(find_runs(args.table)))
    elif args.plots:
        pictures.draw_pictures(find_runs(args.plots), args.plots)
    elif args.words:
        print_words(load_run(args.run, *which))
    elif args.export:
        answers.check_output(args.export, args.run)
        answers.export(load_run(args.run, *which), args.export)
    elif args.images:
        files, names = answers.find_photos(args.images), args.names and read_names(args.names)
        if args.csv:
            answers.check_output(args.csv, args.run)
        run = load_run(args.run, *which)
        sys.exit(1 if answers.classify_files(run, files, names, args.csv) else 0)
    else:
        evaluate(args.run, args.dataset, args.classes, args.data, args.csv, *which)


def main():
    exit_on_bad_input(run_command_line, PromptError)


if __name__ == "__main__":
    main()
