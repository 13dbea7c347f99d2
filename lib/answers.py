"""A run's answers, for people and other programs: photos, tables, sheets of samples, exports.

A *run* is an `eval.Run`; its answer for an image is a class and the prompts that were used.
"""

import csv
import glob
import os
import random
from pathlib import Path

import numpy as np
import torch

from lib import pictures
from lib.clip_model import MEAN, STD
from lib.errors import BadInput, say, warn
from lib.files import replacing
from lib.photos import files_below, is_image


def best_answers(probabilities, class_names):
    """The three best classes of an image with their probabilities. probabilities: (C,)."""
    best = probabilities.topk(min(3, len(class_names)))
    return [(class_names[i], p) for i, p in zip(best.indices, best.values.tolist())]


def used_prompts(weights, templates):
    """The prompts used for an image, as text, largest weight first. weights: (G,)."""
    order = weights.argsort(descending=True).tolist()
    return [f"{100 * weights[g]:.0f}% {templates[g]}" for g in order if weights[g] > 0]


# --------------------------------------------------------------------------------- your own photos


def find_photos(paths):
    """The files that match paths, folders (all images below them) and patterns, each once. Reports
    other files in the folders on standard error. Raises BadInput for a path without an image."""
    found, left_out = [], []
    for path in paths:
        files = []
        for named in [path] if os.path.exists(path) else sorted(glob.glob(path, recursive=True)):
            if not os.path.isdir(named):
                files.append(Path(named))
                continue
            for file in files_below(named):
                (files if is_image(file) else left_out).append(Path(named, file))
        if not files:
            raise BadInput(f"{path} names no image")
        found += files
    if left_out:
        n, first = len(left_out), left_out[0]
        warn(f"left out {n} files that are not images, the first is {first}")
    return list(dict.fromkeys(found))


def check_output(file, run_folder):
    """Raises BadInput for an output file in the run's folder or in a folder that cannot be written,
    and for one that would replace anything but an earlier output."""
    if file.resolve().is_relative_to(Path(run_folder).resolve()):
        raise BadInput(f"{file} would lie in the run's own folder: name another place")
    if file.is_dir() or not os.access(file.absolute().parent, os.W_OK):
        raise BadInput(f"cannot write {file}")
    if os.path.lexists(file) and not (
        file.suffix in (".csv", ".npz") and file.is_file() and not file.is_symlink()
    ):
        raise BadInput(f"{file} exists and is not an earlier output: name another file")


def write_csv(file, rows, templates):
    """Writes one line per image: its path, its class if known, its best classes with their
    probabilities, and the weight of every prompt.

    rows: (path, class or "", [(class name, probability), ...], weights) of each image.
    """
    heads = [f"{what} {i + 1}" for i in range(len(rows[0][2])) for what in ("class", "probability")]
    known = ["true class"] if rows[0][1] else []
    with (
        replacing(file) as scratch,
        open(scratch, "w", newline="", encoding="utf-8", errors="surrogateescape") as out,
    ):
        table = csv.writer(out)
        table.writerow(["image", *known, *heads, *templates])
        for path, truth, answers, weights in rows:
            cells = [cell for name, x in answers for cell in (name, f"{x:.6f}")]
            table.writerow([path, *[truth] * len(known), *cells, *(f"{w:.6f}" for w in weights)])


def classify_files(run, files, names=None, csv_file=None):
    """Prints for each photo the three best classes with their probabilities, and its prompts.

    names: your own class names. csv_file: where to write the same as a table. Prints unreadable
    photos to standard error and returns their number. Raises BadInput if none can be read.
    """
    class_names, rows = names or run.class_names, []
    classify = run.classifier(class_names)
    try:
        for photo in files:
            try:
                features = run.photo_features(photo)
            except BadInput as error:
                warn(error)
                continue
            probabilities, weights = classify(features)
            answers = best_answers(probabilities[0], class_names)
            prompts = used_prompts(weights[0], run.model.templates)
            said = ", ".join(f"{name} {100 * x:.1f}%" for name, x in answers)
            which = f"  [{' | '.join(prompts)}]" if prompts else ""
            say(f"{photo}: {said}{which}")
            rows.append((photo, "", answers, weights[0].tolist()))
    finally:  # also if it was interrupted
        if csv_file and rows:
            write_csv(csv_file, rows, run.model.templates)
    if not rows:
        raise BadInput(f"none of {len(files)} images could be read")
    return len(files) - len(rows)


# -------------------------------------------------------------------------------- test images


def write_test_csv(file, split, logits, weights, templates):
    """The answer for every test image as a table. logits (N, C) and weights (N, G)."""
    names, rows = split.class_names, []
    for item, p, w in zip(split.test, logits.softmax(dim=-1), weights.tolist()):
        rows.append((item.path, names[item.label], best_answers(p, names), w))
    write_csv(file, rows, templates)


@pictures.optional("the sheet of samples")
@pictures.matplotlib_defaults()
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
    pictures.samples_picture([split.open(split.test[i].path) for i in some], titles, path)


# --------------------------------------------------------------------------------- other programs


def export(run, file):
    """Writes everything needed for classification to an .npz file, for use without PyTorch: ten
    lines of NumPy in the README classify an image feature with it.

    Raises BadInput for a run without prompts, and for a run whose answers the file could not
    reproduce: one that shifts the prompts for each image or has changed the image encoder.
    """
    model = run.model
    if not model.templates or model.per_image or model.image_side is not None:
        raise BadInput(
            "this run cannot be exported: only prompts that all images share, for CLIP's own image"
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
            clip=run.config["clip"],
            pixel_mean=MEAN,
            pixel_std=STD,
        )
    say(f"saved: {file}")
