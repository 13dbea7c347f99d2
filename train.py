"""Train a mixture of prompts for CLIP (MoCoOp, arXiv 2409.12011).

    python train.py                                  # the embedded world: no network, a minute
    python train.py --dataset eurosat --shots 4      # fetches CLIP ViT-B/16 and EuroSAT if absent
    python train.py --dataset eurosat --shots 16 --classes base    # then: eval.py RUN --classes new
    python train.py --resume ...                     # go on with the run that the flags name

Each run gets a folder, out/<dataset>/<method>_<shots>shot_<classes>_seed<seed>/, with
`checkpoint.pt` (what was learned), `result.json` (what came out) and `router.png` (which prompt
fires for what). The same flags give the same numbers, bit for bit on a CPU.

    python train.py --method coop                    # a neighbour: see METHODS
    python train.py --router uniform                 # MoCoOp without one of its parts
    torchrun --nproc_per_node 4 train.py ...         # the work of encoding shared out

The authors' code also trains two things that their text does not mention; here they are off by
default: a bias on the text features (--text-bias) and the image encoder's LayerNorms
(--tune-visual-ln).
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
from features import image_features, load_images
from grouping import group_templates
from losses import gate_loss, image_loss, text_loss
from model import MoCoOp, Probe, clip_as_it_is, measure
from probe import linear_probe
from prompts import check_template, hard_prototypes, read_groups, template_features, template_groups
from router import gate_target, mixed_logits
from runs import discard, open_run, publish, save_torch

# A method is a row of defaults; flags on the command line win. The numbers are the published ones.
MOCOOP = {
    "classifier": "prompts",  # or, in the last rows, a vector a class
    # the prompts
    "groups": "published",  # of templates; or auto, or a file
    "n_groups": 0,  # of --groups auto; 0: as many as set them apart best
    "one_group": False,  # all templates in one group: one prompt
    "init": "template",  # each prompt from its own; or random, or a template for all of them
    "conditional": False,  # CoCoOp's network shifts the context for each image
    # the router
    "router": "trained",
    "top_k": 2,  # or all, if there are fewer
    # the losses
    "gate_weight": 1.0,
    "text_weight": 5.0,
    "text_scale": 1.0,
    "text_target": "prototypes",  # of the groups; or templates, one by one
    # what else is learned
    "text_bias": False,
    "tune_visual_ln": False,
    # optimisation
    "epochs": 50,
    "warm_up": 5,  # epochs at 1e-5; never more than an eighth of all
    "batch_size": 32,
    "lr": 0.032,  # for a batch of that size; in proportion for others
    "max_grad_norm": 1.0,  # 0: gradients are not clipped
    "views": 8,
}
ONE_PROMPT = MOCOOP | {
    "one_group": True,
    "init": "a photo of a {}.",
    "router": "uniform",
    "gate_weight": 0.0,
}
COOP = ONE_PROMPT | {
    "text_weight": 0.0,
    "epochs": {1: 50, 2: 100, 8: 200},  # from so many shots on; ImageNet: 50
    "warm_up": 1,
    "lr": 0.002,
    "max_grad_norm": 0.0,
}
METHODS = {
    "mocoop": MOCOOP,
    "coop": COOP,  # Zhou et al., IJCV 2022
    "cocoop": COOP | {"conditional": True, "epochs": 10, "batch_size": 1},  # CVPR 2022
    "lasp": ONE_PROMPT  # Bulat and Tzimiropoulos, CVPR 2023
    | {"text_target": "templates", "text_weight": 10.0, "text_scale": 100.0, "text_bias": True},
    # No prompts to learn, so no other flag means anything to these.
    "zeroshot": {"classifier": "zeroshot", "groups": "published"},
    "ensemble": {"classifier": "ensemble", "groups": "published"},
    "linear": {"classifier": "linear", "groups": "published"},
}
CLIP = {"shapes": "bundled"}  # by dataset
DEFAULT_CLIP = "ViT-B/16"


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
    parser = Parser(description=__doc__.split("\n")[0])

    add = parser.add_argument_group("what to train on").add_argument
    names = ", ".join(DATASETS)
    add("--dataset", default="shapes", help=f"shapes (default), a folder of yours, or {names}")
    add("--data", default="data", help="the root of all datasets (default: data)")
    add("--shots", type=number(int, 1), default=16, help="images a class (default: 16)")
    add("--classes", choices=("all", "base", "new"), default="all", help="default: all")
    add("--seed", type=number(int, 0), default=1, help="samples, start, order (default: 1)")

    switch = argparse.BooleanOptionalAction
    add = parser.add_argument_group("the method (defaults: mocoop's)").add_argument
    add("--method", choices=METHODS, default="mocoop", help="sets all of these (default: mocoop)")
    add("--clip", help="OpenAI name, file, or bundled (default: ViT-B/16; bundled for shapes)")
    add("--groups", help="published (default), auto, or a file: a template a line, blank between")
    add("--n-groups", type=number(int, 0), help="of --groups auto (default: the best silhouette)")
    add("--one-group", action=switch, help="all templates in one group: one prompt")
    add("--init", help="prompts start as their template (default), random, or as the one given")
    add("--conditional", action=switch, help="shift the context for each image, as CoCoOp")
    add("--router", choices=("trained", "frozen", "uniform"), help="default: trained")
    add("--top-k", type=number(int, 1), help=f"prompts an image (default: {MOCOOP['top_k']})")
    add("--gate-weight", type=number(float, 0), help=f"default: {MOCOOP['gate_weight']:g}")
    add("--text-weight", type=number(float, 0), help=f"default: {MOCOOP['text_weight']:g}")
    add("--text-scale", type=number(float, 0), help="in the text loss (default: 1; LASP's: 100)")
    add("--text-target", choices=("prototypes", "templates"), help="default: prototypes")
    add("--text-bias", action=switch, help="learn a bias on all text features")
    add("--tune-visual-ln", action=switch, help="learn the image encoder's LayerNorms: no cache")

    add = parser.add_argument_group("training (defaults: mocoop's)").add_argument
    add("--epochs", type=number(int, 1), help=f"default: {MOCOOP['epochs']}")
    add("--warm-up", type=number(int, 0), help=f"epochs (default: {MOCOOP['warm_up']})")
    add("--batch-size", type=number(int, 1), help=f"default: {MOCOOP['batch_size']}")
    add("--lr", type=number(float, 1e-9), help=f"default: {MOCOOP['lr']} x batch size / 32")
    add("--max-grad-norm", type=number(float, 0), help="0: no clipping (default: 1)")
    add("--views", type=number(int, 1), help=f"random crops an image (default: {MOCOOP['views']})")

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
        elif device.type == "cuda" and int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise BadInput("torchrun gives each process a GPU of its own: --device cuda, no number")
        if device.type == "cuda":
            torch.cuda.set_device(device)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise BadInput(f"no device {name!r}: {str(error).splitlines()[0]}") from error
    if device.type not in ("cpu", "cuda"):
        raise BadInput(f"no device {name!r}: cpu and cuda are what this runs on")
    return device


def resolve(args):
    """Flags and preset together: (config, groups, run folder, resume?).

    config: every flag with its final value, a dictionary as it goes to `result.json`; None where
    the method has no such flag. groups: lists of templates, not yet regrouped by `--groups auto`.
    """
    config = vars(args).copy()
    resume = config.pop("resume")
    config["dataset"] = full_dataset(config["dataset"])
    defaults = preset(config)
    for flag in MOCOOP.keys() - METHODS[config["method"]].keys():
        if config[flag] is not None:
            flag = flag.replace("_", "-")
            raise BadInput(f"--method {config['method']} has no --{flag}: leave it out")
        config[flag] = None
    config |= {flag: value for flag, value in defaults.items() if config.get(flag) is None}
    if config["init"] not in ("template", "random", None):
        try:
            check_template(config["init"])
        except BadInput as error:
            raise BadInput(f"--init: {error}; or template, or random") from error
    auto = config["groups"] == "auto"
    if config["n_groups"] and not auto:
        raise BadInput("--n-groups goes with --groups auto")
    if auto and config["classifier"] != "prompts":
        raise BadInput(f"--method {config['method']} has no prompts, so no use for --groups auto")
    if auto and config["one_group"]:
        whose = "--one-group" if args.one_group else f"--method {config['method']}"
        raise BadInput(f"--groups auto makes several groups, and {whose} has one")
    named = config["groups"] in ("published", "auto")
    groups = template_groups(config["dataset"]) if named else read_groups(config["groups"])
    for flag, needed in unused_flags(config).items():
        if getattr(args, flag) is not None:
            raise BadInput(f"--{flag.replace('_', '-')} means nothing without {needed}")
    if config["one_group"]:
        groups = [[template for group in groups for template in group]]
    if not auto:
        check_top_k(args.top_k, groups)
    if config["out"] is None:
        label = method_label(config)
        run = f"{label}_{config['shots']}shot_{config['classes']}_seed{config['seed']}"
        if len(os.fsencode(run)) > 200:
            raise BadInput(f"{run[:40]}... is too long for a folder's name: name one with --out")
        config["out"] = str(Path("out", dataset_name(config["dataset"]), run))
    folder = Path(config["out"])
    if Path(config["dataset"]).is_absolute() and folder.resolve().is_relative_to(config["dataset"]):
        raise BadInput(f"{folder} lies in the dataset itself: name another --out")
    return config, groups, folder, resume


def unused_flags(config):
    """The flags that nothing reads beside the others: {flag: what it would need}."""
    unused = {}
    if config["router"] == "uniform":
        unused["top_k"] = "a router that chooses"
    if config["router"] in ("frozen", "uniform"):
        unused["gate_weight"] = "--router trained"
    if config["text_weight"] == 0:
        unused |= dict.fromkeys(("text_scale", "text_target"), "a --text-weight")
    if config["tune_visual_ln"]:
        unused["views"] = "cached features: --tune-visual-ln crops anew in every epoch"
    return unused


def check_top_k(top_k, groups):
    if top_k and top_k > len(groups):
        raise BadInput(f"--top-k {top_k} is above the number of prompts, {len(groups)}")


def preset(config):
    """What the method's flags are if nobody sets them. Raises BadInput for an unknown method."""
    if config["method"] not in METHODS:
        raise BadInput(f"a run of the method {config['method']!r}, which train.METHODS lacks")
    row = METHODS[config["method"]] | {"clip": CLIP.get(config["dataset"], DEFAULT_CLIP)}
    if "epochs" in row:
        row["lr"] *= (config["batch_size"] or row["batch_size"]) / row["batch_size"]
        if isinstance(row["epochs"], dict):
            shots = 1 if config["dataset"] == "imagenet" else config["shots"]
            row["epochs"] = row["epochs"][max(n for n in row["epochs"] if n <= shots)]
    return row


def changed_flags(config):
    """{flag: value} of those that differ from the method's preset."""
    return {k: config[k] for k, v in sorted(preset(config).items()) if config.get(k, v) != v}


def method_label(config):
    """The method with every flag that differs from its preset: `mocoop-top_k1`."""
    parts = [f"{k}{_slug(v)}" if v is not True else k for k, v in changed_flags(config).items()]
    return "-".join([config["method"], *parts])


def _slug(value):
    """A flag's value as part of a folder name."""
    text = str(value)
    if len(text) < 200 and Path(text).is_file():
        text = Path(text).stem
    return re.sub(r"[^\w.]+", "-", text)


def describe(config, split, model, classes):
    """The part of `result.json` that says what was run and on what."""
    n_prompts = len(model.prompts.templates) if isinstance(model, MoCoOp) else 0
    return {
        "dataset": split.name,
        "classes": classes,
        "shots": config["shots"],
        "seed": config["seed"],
        "method": config["method"],
        "clip": config["clip"],
        "n_prompts": n_prompts,
        "top_k": model.router.top_k if n_prompts else 0,
        "n_classes": len(split.class_names),
        "n_test": len(split.test),
        "split": split.source,
    }


# ----------------------------------------------------------------------------------- training


class NotFinite(ArithmeticError):
    """Training has diverged."""


def learning_rate(epoch, epochs, lr, warm_up):
    """The rate of an epoch, counted from 0: a constant warm-up, then a cosine.

    As in the field's scheduler the cosine starts after the warm-up but is stretched over all
    epochs, so it is cut off before it reaches zero.
    """
    warm_up = min(warm_up, round(epochs / 8))
    if epoch < warm_up:
        return 1e-5
    return lr * 0.5 * (1 + math.cos(math.pi * (epoch - warm_up) / epochs))


def fit(clip_model, model, config, groups, hard, trained, features, labels, save, state):
    """Trains `model` in place; returns the seconds it took, over all resumed parts, and the share
    of each prompt in every epoch.

    hard: (T, C, D), the features of all templates of `groups` with the classes that the model's
    prompts are laid out for. trained: the slice of those classes that has images; the image and
    gate loss see no other. features: (N, views, D) of the training images, or, if these are to
    be encoded anew in every step, a function of their indices and the epoch. labels: (N,) counting
    the trained classes.
    save: called after each epoch with all that is needed to go on from there; state: one of these
    to go on from, or None.
    """
    device, n = labels.device, len(labels)
    prototypes = hard_prototypes(hard, groups)  # (G, C, D)
    # The text loss compares soft prompt text_prompt[i] with text_target[i].
    text_target, text_prompt = prototypes, list(range(len(groups)))
    if config["text_target"] == "templates":
        text_target = hard
        text_prompt = [g for g, group in enumerate(groups) for _ in group]
    guided = config["router"] == "trained" and config["gate_weight"] > 0

    norms = [] if model.visual_ln is None else list(model.visual_ln.parameters())
    others = [p for p in model.parameters() if p.requires_grad and all(p is not q for q in norms)]
    parts = [{"params": others, "factor": 1.0}, {"params": norms, "factor": 0.1}]  # of lr
    optimiser = torch.optim.SGD(
        [part for part in parts if part["params"]], lr=config["lr"], momentum=0.9, weight_decay=5e-4
    )
    mixed = torch.float16  # mixed precision on a GPU; bf16 needs no loss scaling
    on_gpu = device.type == "cuda"
    if on_gpu and torch.cuda.is_bf16_supported(including_emulation=False):
        mixed = torch.bfloat16
    scaler = torch.amp.GradScaler(enabled=on_gpu and mixed is torch.float16)
    order_rng = torch.Generator().manual_seed(config["seed"])
    first_epoch, seconds, shares = 0, 0.0, []
    if state:
        model.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
        if scaler.is_enabled() and state["scaler"]:
            scaler.load_state_dict(state["scaler"])
        order_rng.set_state(state["order_rng"])
        first_epoch, seconds, shares = state["epoch"], state["seconds"], state["shares"]
    n_views = 1 if callable(features) else features.shape[1]
    n_batches = max(1, n // config["batch_size"])  # the last, incomplete one is dropped
    start = time.time()
    steps = config["epochs"] * n_batches
    quiet = parallel.rank() > 0 or None
    bar = tqdm(total=steps, initial=first_epoch * n_batches, leave=False, disable=quiet)
    for epoch in range(first_epoch, config["epochs"]):
        lr = learning_rate(epoch, config["epochs"], config["lr"], config["warm_up"])
        for part in optimiser.param_groups:
            part["lr"] = lr * part["factor"]
        order = torch.randperm(n, generator=order_rng)
        views = torch.randint(n_views, (n,), generator=order_rng)
        sums, usage = 0, 0  # of the four losses (4,) and of the router's weights (G,)
        for batch in order.split(config["batch_size"])[:n_batches]:
            y = labels[batch]  # (B,)
            with torch.autocast("cuda", mixed, enabled=on_gpu and callable(features)):
                f = features(batch, epoch) if callable(features) else features[batch, views[batch]]
            gate_logits, weights = model.router(f)
            # Without the text loss nobody reads the prompts that no image of the batch selected.
            only = None if config["text_weight"] else weights.any(dim=0)
            with torch.autocast("cuda", mixed, enabled=on_gpu):  # once, for both losses
                text_features = model.text_features(clip_model, f, only)
            logits = mixed_logits(f, text_features[..., trained, :], weights, model.logit_scale)
            image = image_loss(logits, y)
            gate = text = torch.zeros_like(image)
            if guided:
                target = gate_target(f, prototypes[:, trained], y, model.router.top_k)
                gate = gate_loss(gate_logits, target)
            if config["text_weight"]:
                soft = text_features[..., text_prompt, :, :]
                hard_ones = text_target.expand_as(soft)  # the same for each image
                text = text_loss(
                    soft.flatten(0, -3), hard_ones.flatten(0, -3), config["text_scale"]
                )
            total = image + config["gate_weight"] * gate + config["text_weight"] * text

            optimiser.zero_grad()
            scaler.scale(total).backward()
            scaler.unscale_(optimiser)
            if config["max_grad_norm"]:
                nn.utils.clip_grad_norm_(model.parameters(), config["max_grad_norm"])
            scaler.step(optimiser)
            scaler.update()
            sums += torch.stack([total, image, gate, text]).detach()
            usage += weights.detach().sum(dim=0)
            bar.update()
        losses = dict(zip(("loss", "image", "gate", "text"), (sums / n_batches).tolist()))
        if not all(p.isfinite().all() for p in model.parameters()):
            raise NotFinite(f"training has diverged in epoch {epoch + 1}")
        shares.append([round(share, 4) for share in (usage / usage.sum()).tolist()])
        told = "  ".join(f"{name} {value:.3f}" for name, value in losses.items())
        used = " ".join(f"{100 * share:2.0f}" for share in shares[-1])
        bar.write(
            f"epoch {epoch + 1:3d}/{config['epochs']}  lr {lr:.5f}  {told}  prompts {used} %",
            file=sys.stdout,
        )
        snapshot = {
            "epoch": epoch + 1,
            "model": model.state_dict(),
            "optimiser": optimiser.state_dict(),
            "scaler": scaler.state_dict(),
            "order_rng": order_rng.get_state(),
            "seconds": seconds + time.time() - start,
            "shares": shares,
        }
        save(snapshot)
    bar.close()
    return seconds + time.time() - start, shares


def train(config, groups, folder, resume):
    """One run, from flags to files."""
    device = choose_device(config["device"])
    parallel.start(device)
    state = open_run(folder, config, resume, preset(config))
    whole = parallel.first(lambda: load_split(config["dataset"], config["data"]))
    if not whole.train:
        where = f" in {whole.folder}" if config["dataset"] == "imagenet" else ""
        raise BadInput(
            f"{config['dataset']} has no training images{where}: it can only be a target"
            " of eval.py RUN --dataset"
        )
    sample = few_shot(whole, config["shots"], config["seed"])
    split = select_classes(sample, config["classes"])
    if config["classifier"] == "linear" and not split.val:
        raise BadInput("--method linear chooses its strength on val images: there are none")
    clip_model, fingerprint = parallel.first(lambda: load_clip(config["clip"], device))

    names, trained = split.class_names, slice(None)  # trained: which of the names have images
    if config["text_weight"]:  # the text loss holds on to every class name
        names = whole.class_names
        with_images = class_range(len(names), config["classes"])
        trained = slice(with_images.start, with_images.stop)
    templates = [template for group in groups for template in group]
    hard = template_features(clip_model, templates, names, config["chunk"])  # (T, C, D)
    if config["groups"] == "auto":
        if config["n_groups"] > len(templates):
            n = len(templates)
            raise BadInput(f"--n-groups {config['n_groups']} is above the number of templates, {n}")
        groups = group_templates(templates, hard, config["n_groups"])
        if config["top_k"] != MOCOOP["top_k"]:  # the default is at most a wish
            check_top_k(config["top_k"], groups)
        order = [templates.index(template) for group in groups for template in group]
        templates, hard = [templates[i] for i in order], hard[order]
        print("groups found: " + " | ".join(", ".join(group) for group in groups))
    torch.manual_seed(config["seed"])
    model = None
    if config["classifier"] == "prompts":
        model = MoCoOp(clip_model, groups, config).to(device)
        model.prompts.set_classes(clip_model, names)

    # What a stopped run must have been made of to go on with it, beyond its flags.
    made_of = json.dumps([groups, fingerprint, names, split.train])
    made_of = hashlib.sha256(made_of.encode()).hexdigest()
    if state and state.get("made_of") != made_of:
        raise BadInput(
            f"{folder} was stopped while training with other images, templates or CLIP weights:"
            " remove it or name another --out"
        )
    own_samples = not whole.complete or config["dataset"] == "imagenet"
    print(
        f"{split.name}: {len(split.class_names)} {config['classes']} classes,"
        f" {config['shots']} shots, seed {config['seed']}"
        + (" (samples of our own)" if own_samples and config["dataset"] in DATASETS else "")
        + f"; CLIP {config['clip']}; {config['method']}"
        + (f" with {len(groups)} prompts, {model.router.top_k} an image" if model else "")
    )

    def encode(items, what, views=None, cached=True):
        return image_features(clip_model, fingerprint, split, items, views, what, cached)

    def labels_of(items):
        return torch.tensor([item.label for item in items], device=device)

    live = bool(config["tune_visual_ln"])
    test = encode(split.test, "test images")
    val = encode(split.val, "val images") if split.val else None
    probes = clip_as_it_is(clip_model, split.dataset, split.class_names, hard[:, trained])
    baselines = {
        name: measure(clip_model, probe, split, split.test, test)[0]["accuracy"]
        for name, probe in probes.items()
    }
    print(
        f"before training: zero-shot {baselines['zeroshot']:.2f} %,"
        f" ensemble {baselines['ensemble']:.2f} %"
    )

    def save(snapshot):
        if parallel.rank() == 0:
            save_torch({"config": config, "made_of": made_of, **snapshot}, folder / "resume.pt")

    seconds, shares = 0.0, []
    if config["classifier"] == "prompts":
        if live:

            def features(batch, epoch):
                images = load_images(
                    clip_model, split, [(split.train[i].path, epoch) for i in batch]
                )
                return F.normalize(clip_model.encode_image(images).float(), dim=-1)

            print("training the image encoder's LayerNorms: images are encoded in every step")
        else:
            features = encode(split.train, "training images", config["views"])
            clip_model.visual = None  # has seen all images; lets go of its memory
        labels = labels_of(split.train)
        try:
            seconds, shares = fit(
                clip_model, model, config, groups, hard, trained, features, labels, save, state
            )
        except NotFinite as error:
            if parallel.rank() == 0:
                discard(folder)
            raise BadInput(f"{error}: try a smaller --lr") from error
        if live:
            test = encode(split.test, "test images", cached=False)
            val = encode(split.val, "val images", cached=False) if split.val else None
    elif config["classifier"] == "linear":
        features = encode(split.train, "training images")
        start = time.time()
        labels, val_labels = labels_of(split.train), labels_of(split.val)
        n_classes = len(split.class_names)
        weight, bias, strength = linear_probe(features, labels, val, val_labels, n_classes)
        model = Probe(split.class_names, weight, bias)
        seconds = time.time() - start
        print(f"L2 strength chosen on val images: C = {strength:.3g}")
    else:
        model = probes[config["classifier"]]

    val_accuracy = None
    if split.val:
        val_accuracy = measure(clip_model, model, split, split.val, val)[0]["accuracy"]
    measured, weights, _ = measure(clip_model, model, split, split.test, test)
    result = {
        **describe(config, split, model, config["classes"]),
        "n_train": len(split.train),
        "few_shot_samples": "own" if own_samples else "coop",
        "zero_shot_accuracy": baselines["zeroshot"],
        "ensemble_accuracy": baselines["ensemble"],
        "val_accuracy": val_accuracy,
        **measured,
        "router": plots.router_table(split, weights),
        "prompt_usage_by_epoch": shares,
        "train_seconds": round(seconds, 2),
        "config": config,
    }
    checkpoint = {
        "config": config,
        "groups": groups,
        "class_names": split.class_names,
        "clip_fingerprint": fingerprint,
        "model": model.state_dict(),
    }
    if parallel.rank() == 0:
        publish(folder, checkpoint, result)
    print(
        f"after training:  {config['method']} {measured['accuracy']:.2f} %"
        f" on {len(split.test):,} test images, {seconds:.1f} s of training"
    )
    picture = ", router.png" if result["n_prompts"] else ""
    print(f"saved in {folder}: checkpoint.pt, result.json{picture}")
    parallel.stop()


def main():
    exit_on_bad_input(lambda: train(*resolve(make_parser().parse_args())))


if __name__ == "__main__":
    main()
