"""Train a mixture of prompts for CLIP (MoCoOp, arXiv 2409.12011).

    python train.py                                  # the embedded world: no network, a minute
    python train.py --dataset eurosat --shots 4      # fetches CLIP ViT-B/16 and EuroSAT if absent
    python train.py --dataset eurosat --shots 16 --classes base    # then: eval.py RUN --classes new
    python train.py --resume ...                     # go on with the run that the flags name

Each run gets a folder, out/<dataset>/<method>_<shots>shot_<classes>_seed<seed>/, with
`checkpoint.pt` (what was learned), `result.json` (what came out) and `router.png` (which prompt
fires for what). The same flags give the same numbers, bit for bit on a CPU.

Beside the published text this leaves out, by default, two things that the authors' code also
trains: a bias on the text features (--text-bias) and the image encoder's LayerNorms.
"""

import argparse
import hashlib
import json
import math
import os
import re
import sys
import time
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

import parallel
import plots
from backbone import BadInput, exit_on_bad_input, load_clip
from data import (
    DATASETS,
    class_range,
    dataset_name,
    few_shot,
    full_dataset,
    load_split,
    select_classes,
)
from encoder import CHUNK
from features import image_features
from losses import gate_loss, image_loss, text_loss
from prompts import (
    SoftPrompts,
    hard_prototypes,
    read_groups,
    template_features,
    template_groups,
    zero_shot_template,
)
from router import Router, gate_target, mixed_logits
from runs import discard, open_run, publish, save_torch

# A method is a row of defaults; flags on the command line win. The numbers are the authors'.
METHODS = {
    "mocoop": {
        "groups": "published",
        "top_k": 2,  # or all, if there are fewer
        "gate_weight": 1.0,
        "text_weight": 5.0,
        "text_scale": 1.0,
        "text_bias": False,
        "epochs": 50,
        "batch_size": 32,
        "lr": 0.032,  # for a batch of 32; in proportion for others
        "views": 8,
    },
}
CLIP = {"shapes": "bundled"}  # by dataset
DEFAULT_CLIP = "ViT-B/16"


class MoCoOp(nn.Module):
    """The mixture: soft prompts, a router over them, and maybe a bias on the text features.

    Holds only what is learned; the frozen CLIP is passed in where it is needed.
    """

    def __init__(self, clip_model, groups, top_k, text_bias=False):
        super().__init__()
        width = clip_model.text_projection.shape[1]
        self.prompts = SoftPrompts(clip_model, [group[0] for group in groups])
        self.router = Router(width, len(groups), top_k)
        self.text_bias = nn.Parameter(torch.zeros(1, width)) if text_bias else None
        self.logit_scale = clip_model.logit_scale.exp().item()  # CLIP's, frozen

    def text_features(self, clip_model, only=None, chunk=CHUNK):
        """(G, C, D) of the classes that `prompts.set_classes` was given last."""
        return self.prompts.text_features(clip_model, self.text_bias, only, chunk)


# ---------------------------------------------------------------------------------- the flags


class Parser(argparse.ArgumentParser):
    def error(self, message):  # one line, without the usage in front
        parallel.complain(f"{self.prog}: {message} (--help lists the flags)")
        self.exit(2)


def number(kind, least, most=2**31):
    """An argparse type: an int or float between two bounds."""

    def parse(text):
        value = kind(text)
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"must be from {least} to {most}, not {text}")
        return value

    parse.__name__ = kind.__name__  # argparse names it when `kind` refuses the text
    return parse


def make_parser():
    row = METHODS["mocoop"]
    parser = Parser(description=__doc__.split("\n")[0])

    add = parser.add_argument_group("what to train on").add_argument
    names = ", ".join(DATASETS)
    add("--dataset", default="shapes", help=f"shapes (default), a folder of yours, or {names}")
    add("--data", default="data", help="the root of all datasets (default: data)")
    add("--shots", type=number(int, 1), default=16, help="images a class (default: 16)")
    add("--classes", choices=("all", "base", "new"), default="all", help="default: all")
    add("--seed", type=number(int, 0), default=1, help="samples, start, order (default: 1)")

    add = parser.add_argument_group("the method").add_argument
    add("--method", choices=METHODS, default="mocoop", help="sets the rest (default: mocoop)")
    add("--clip", help="OpenAI name, file, or bundled (default: ViT-B/16; bundled for shapes)")
    add("--groups", help="file of templates, one a line, blank line a group (default: published)")
    add("--top-k", type=number(int, 1), help=f"prompts an image (default: {row['top_k']})")
    add("--gate-weight", type=number(float, 0), help=f"default: {row['gate_weight']:g}")
    add("--text-weight", type=number(float, 0), help=f"default: {row['text_weight']:g}")
    add("--text-scale", type=number(float, 0), help="in the text loss (default: 1; LASP's: 100)")
    add("--text-bias", action=argparse.BooleanOptionalAction, help="learn one (default: no)")

    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=number(int, 1), help=f"default: {row['epochs']}")
    add("--batch-size", type=number(int, 1), help=f"default: {row['batch_size']}")
    add("--lr", type=number(float, 1e-9), help=f"default: {row['lr']} x batch size / 32")
    add("--views", type=number(int, 1), help=f"random crops an image (default: {row['views']})")

    add = parser.add_argument_group("where").add_argument
    add("--device", help="cpu, cuda, cuda:1, ... (default: cuda if there is one)")
    add(
        "--chunk",
        type=number(int, 1),
        default=CHUNK,
        help=f"prompts x classes encoded at a time (default: {CHUNK})",
    )
    add("--out", help="the run's folder (default: out/<dataset>/<run>)")
    add("--resume", action="store_true", help="go on where this run was stopped")
    return parser


def choose_device(name):
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        if device == torch.device("cuda"):  # one each for the processes of torchrun
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise BadInput(f"no device {name!r}: {str(error).splitlines()[0]}") from error
    if device.type not in ("cpu", "cuda"):
        raise BadInput(f"no device {name!r}: cpu and cuda are what this runs on")
    return device


def resolve(args):
    """Flags and preset together: (config, groups, run folder, resume?).

    config: every flag with its final value, a dictionary as it goes to `result.json`.
    """
    config = vars(args).copy()
    resume = config.pop("resume")
    config["dataset"] = full_dataset(config["dataset"])
    published = (config["groups"] or METHODS[config["method"]]["groups"]) == "published"
    groups = template_groups(config["dataset"]) if published else read_groups(config["groups"])
    if config["top_k"] and config["top_k"] > len(groups):
        raise BadInput(f"--top-k {config['top_k']} is above the number of prompts, {len(groups)}")
    defaults = preset(config, len(groups))
    config |= {flag: value for flag, value in defaults.items() if config[flag] is None}
    if config["out"] is None:
        label = method_label(config, len(groups))
        run = f"{label}_{config['shots']}shot_{config['classes']}_seed{config['seed']}"
        config["out"] = str(Path("out", dataset_name(config["dataset"]), run))
    folder = Path(config["out"])
    if Path(config["dataset"]).is_absolute() and folder.resolve().is_relative_to(config["dataset"]):
        raise BadInput(f"{folder} lies in the dataset itself: name another --out")
    return config, groups, folder, resume


def preset(config, n_prompts):
    """What the method's flags are if nobody sets them."""
    row = METHODS[config["method"]]
    return row | {
        "clip": CLIP.get(config["dataset"], DEFAULT_CLIP),
        "top_k": min(row["top_k"], n_prompts),
        "lr": row["lr"] * (config["batch_size"] or row["batch_size"]) / 32,
    }


def method_label(config, n_prompts):
    """The method with every flag that differs from its preset: `mocoop-top_k1`."""
    changed = {k: config[k] for k, v in preset(config, n_prompts).items() if config.get(k, v) != v}
    parts = [f"{k}{_slug(v)}" if v is not True else k for k, v in sorted(changed.items())]
    return "-".join([config["method"], *parts])


def _slug(value):
    """A flag's value as part of a folder name."""
    text = Path(value).stem if isinstance(value, str) and Path(value).is_file() else str(value)
    return re.sub(r"[^\w.]+", "-", text)


# ---------------------------------------------------------------------------------- measuring


def percent(right):
    return round(100 * right.float().mean().item(), 2)


@torch.no_grad()
def baselines(clip_model, split, hard_features, image_features):
    """(zero-shot, ensemble) accuracy in percent: CLIP as it is, on the split's test images.

    zero-shot: the dataset's one template. ensemble: all hard templates, features averaged.
    hard_features: (T, C, D) of all templates. image_features: (N, D) of `split.test`.
    """
    labels = torch.tensor([item.label for item in split.test], device=image_features.device)
    one = template_features(clip_model, [zero_shot_template(split.dataset)], split.class_names)[0]
    accuracies = []
    for text_features in (one, F.normalize(hard_features.mean(dim=0), dim=-1)):  # (C, D)
        accuracies.append(percent((image_features @ text_features.T).argmax(dim=-1) == labels))
    return accuracies


@torch.no_grad()
def measure(clip_model, model, split, items, features):
    """The mixture on images: ({accuracy, per_class_accuracy, prompt_usage}, weights (N, G),
    predicted labels (N,)).

    items: from the split's lists, with features (N, D). The model's prompts take the split's
    class names, whatever they had before.
    """
    model.prompts.set_classes(clip_model, split.class_names)
    text_features = model.text_features(clip_model)
    _, weights = model.router(features)
    predictions = []
    for f, w in zip(features.split(1024), weights.split(1024)):  # bounds (B, G, C)
        predictions.append(mixed_logits(f, text_features, w, model.logit_scale).argmax(dim=-1))
    predictions, weights = torch.cat(predictions).cpu(), weights.cpu()
    labels = torch.tensor([item.label for item in items])
    per_class = {}
    for label, name in enumerate(split.class_names):
        own = labels == label
        key = name if name not in per_class else f"{name} ({label})"  # ImageNet repeats a few
        per_class[key] = percent(predictions[own] == label) if own.any() else None
    usage = dict(zip(model.prompts.templates, weights.mean(dim=0).tolist()))
    measured = {
        "accuracy": percent(predictions == labels),
        "per_class_accuracy": per_class,
        "prompt_usage": {template: round(share, 4) for template, share in usage.items()},
    }
    return measured, weights, predictions


def describe(config, split, model, classes):
    """The part of `result.json` that says what was run and on what."""
    return {
        "dataset": split.name,
        "classes": classes,
        "shots": config["shots"],
        "seed": config["seed"],
        "method": config["method"],
        "clip": config["clip"],
        "n_prompts": len(model.prompts.templates),
        "top_k": config["top_k"],
        "n_classes": len(split.class_names),
        "n_test": len(split.test),
        "split": split.source,
    }


# ----------------------------------------------------------------------------------- training


class NotFinite(ArithmeticError):
    """Training has diverged."""


def learning_rate(epoch, epochs, lr):
    """The rate of an epoch, counted from 0: a constant warm-up, then a cosine.

    As in the field's scheduler the cosine starts after the warm-up but is stretched over all
    epochs, so it is cut off before it reaches zero.
    """
    warm_up = min(5, round(epochs / 8))
    if epoch < warm_up:
        return 1e-5
    return lr * 0.5 * (1 + math.cos(math.pi * (epoch - warm_up) / epochs))


def fit(clip_model, model, config, features, labels, prototypes, trained, save, state):
    """Trains `model` in place; returns the seconds it took, over all resumed parts.

    features: (N, views, D) of the training images, labels: (N,) counting the trained classes.
    prototypes: (G, C, D) of all classes that the model's prompts are laid out for.
    trained: the slice of those classes that has images; the image and gate loss see no other.
    save: called after each epoch with all that is needed to go on from there; state: one of these
    to go on from, or None.
    """
    optimiser = torch.optim.SGD(
        model.parameters(), lr=config["lr"], momentum=0.9, weight_decay=5e-4
    )
    mixed = torch.float16  # mixed precision on a GPU; bf16 needs no loss scaling
    if features.is_cuda and torch.cuda.is_bf16_supported(including_emulation=False):
        mixed = torch.bfloat16
    scaler = torch.amp.GradScaler(enabled=features.is_cuda and mixed is torch.float16)
    order_rng = torch.Generator().manual_seed(config["seed"])
    first_epoch, seconds, n = 0, 0.0, len(labels)
    if state:
        model.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
        if scaler.is_enabled() and state["scaler"]:
            scaler.load_state_dict(state["scaler"])
        order_rng.set_state(state["order_rng"])
        first_epoch, seconds = state["epoch"], state["seconds"]
    n_batches = max(1, n // config["batch_size"])  # the last, incomplete one is dropped
    start = time.time()
    bar = tqdm(
        total=config["epochs"] * n_batches,
        leave=False,
        disable=parallel.rank() > 0 or None,
        unit="step",
    )
    bar.update(first_epoch * n_batches)
    for epoch in range(first_epoch, config["epochs"]):
        lr = learning_rate(epoch, config["epochs"], config["lr"])
        for group in optimiser.param_groups:
            group["lr"] = lr
        order = torch.randperm(n, generator=order_rng)
        views = torch.randint(features.shape[1], (n,), generator=order_rng)
        sums, usage = 0, 0  # of the four losses (4,) and of the router's weights (G,)
        for batch in order.split(config["batch_size"])[:n_batches]:
            f, y = features[batch, views[batch]], labels[batch]  # (B, D), (B,)
            gate_logits, weights = model.router(f)
            # Without the text loss nobody reads the prompts that no image of the batch selected.
            only = None if config["text_weight"] else weights.any(dim=0)
            with torch.autocast("cuda", mixed, enabled=features.is_cuda):
                text_features = model.text_features(clip_model, only, config["chunk"])
            logits = mixed_logits(f, text_features[:, trained], weights, model.logit_scale)
            target = gate_target(f, prototypes[:, trained], y, config["top_k"])
            image, gate = image_loss(logits, y), gate_loss(gate_logits, target)
            text = torch.zeros_like(image)
            if config["text_weight"]:
                text = text_loss(text_features, prototypes, config["text_scale"])
            total = image + config["gate_weight"] * gate + config["text_weight"] * text

            optimiser.zero_grad()
            scaler.scale(total).backward()
            scaler.unscale_(optimiser)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimiser)
            scaler.update()
            sums += torch.stack([total, image, gate, text]).detach()
            usage += weights.detach().sum(dim=0)
            bar.update()
        losses = dict(zip(("loss", "image", "gate", "text"), (sums / n_batches).tolist()))
        if not all(p.isfinite().all() for p in model.parameters()):
            raise NotFinite(f"training has diverged in epoch {epoch + 1}")
        shares = " ".join(f"{100 * share:2.0f}" for share in (usage / usage.sum()).tolist())
        told = "  ".join(f"{name} {value:.3f}" for name, value in losses.items())
        bar.write(
            f"epoch {epoch + 1:3d}/{config['epochs']}  lr {lr:.5f}  {told}  prompts {shares} %",
            file=sys.stdout,
        )
        snapshot = {
            "epoch": epoch + 1,
            "model": model.state_dict(),
            "optimiser": optimiser.state_dict(),
            "scaler": scaler.state_dict(),
            "order_rng": order_rng.get_state(),
            "seconds": seconds + time.time() - start,
        }
        save(snapshot)
    bar.close()
    return seconds + time.time() - start


def train(config, groups, folder, resume):
    """One run, from flags to files."""
    device = choose_device(config["device"])
    parallel.start(device)
    state = open_run(folder, config, resume)
    complete = parallel.first(lambda: load_split(config["dataset"], config["data"]))
    if not complete.train:
        where = f" in {complete.folder}" if config["dataset"] == "imagenet" else ""
        raise BadInput(
            f"{config['dataset']} has no training images{where}: it can only be a target"
            " of eval.py RUN --dataset"
        )
    sample = few_shot(complete, config["shots"], config["seed"])
    split = select_classes(sample, config["classes"])
    clip_model, fingerprint = parallel.first(lambda: load_clip(config["clip"], device))
    torch.manual_seed(config["seed"])
    model = MoCoOp(clip_model, groups, config["top_k"], config["text_bias"]).to(device)

    names, trained = split.class_names, slice(None)  # trained: which of the names have images
    if config["text_weight"]:  # the text loss holds on to every class name
        names = complete.class_names
        with_images = class_range(len(names), config["classes"])
        trained = slice(with_images.start, with_images.stop)
    model.prompts.set_classes(clip_model, names)
    templates = [template for group in groups for template in group]
    hard = template_features(clip_model, templates, names)  # (T, C, D)
    prototypes = hard_prototypes(hard, groups)

    # What a stopped run must have been made of to go on with it, beyond its flags.
    made_of = json.dumps([groups, fingerprint, names, split.train])
    made_of = hashlib.sha256(made_of.encode()).hexdigest()
    if state and state.get("made_of") != made_of:
        raise BadInput(
            f"{folder} was stopped while training with other images, templates or CLIP weights:"
            " remove it or name another --out"
        )
    own_samples = not complete.complete or config["dataset"] == "imagenet"
    print(
        f"{split.name}: {len(split.class_names)} {config['classes']} classes,"
        f" {config['shots']} shots, seed {config['seed']}"
        + (" (samples of our own)" if own_samples and config["dataset"] in DATASETS else "")
        + f"; CLIP {config['clip']}; {len(groups)} prompts, {config['top_k']} an image"
    )

    def encode(items, what, views=None):
        return image_features(clip_model, fingerprint, split, items, views, what)

    test = encode(split.test, "test images")
    val = encode(split.val, "val images") if split.val else None
    features = encode(split.train, "training images", config["views"])
    labels = torch.tensor([item.label for item in split.train], device=device)
    clip_model.visual = None  # has seen all images; lets go of its memory
    zero_shot, ensemble = baselines(clip_model, split, hard[:, trained], test)
    print(f"before training: zero-shot {zero_shot:.2f} %, ensemble {ensemble:.2f} %")

    def save(snapshot):
        if parallel.rank() == 0:
            save_torch({"config": config, "made_of": made_of, **snapshot}, folder / "resume.pt")

    try:
        seconds = fit(clip_model, model, config, features, labels, prototypes, trained, save, state)
    except NotFinite as error:
        if parallel.rank() == 0:
            discard(folder)
        raise BadInput(f"{error}: try a smaller --lr") from error
    val_accuracy = None
    if split.val:
        val_accuracy = measure(clip_model, model, split, split.val, val)[0]["accuracy"]
    measured, weights, _ = measure(clip_model, model, split, split.test, test)
    result = {
        **describe(config, split, model, config["classes"]),
        "n_train": len(split.train),
        "few_shot_samples": "own" if own_samples else "coop",
        "zero_shot_accuracy": zero_shot,
        "ensemble_accuracy": ensemble,
        "val_accuracy": val_accuracy,
        **measured,
        "router": plots.router_table(split, weights),
        "train_seconds": round(seconds, 2),
        "config": config,
    }
    checkpoint = {
        "config": config,
        "groups": groups,
        "clip_fingerprint": fingerprint,
        "model": model.state_dict(),
    }
    if parallel.rank() == 0:
        publish(folder, checkpoint, result)
    print(
        f"after training:  {config['method']} {measured['accuracy']:.2f} %"
        f" on {len(split.test):,} test images, {seconds:.1f} s of training"
    )
    print(f"saved in {folder}: checkpoint.pt, result.json, router.png")
    parallel.stop()


def main():
    exit_on_bad_input(lambda: train(*resolve(make_parser().parse_args())))


if __name__ == "__main__":
    main()
