"""Train a mixture of prompts for CLIP (MoCoOp, arXiv 2409.12011).

    python train.py                                  # the built-in world, no network needed
    python train.py --dataset eurosat --shots 4      # downloads CLIP ViT-B/16 and EuroSAT if absent
    python train.py --method coop                    # another method, a row of METHODS
    python train.py --router uniform                 # an ablation: MoCoOp without its router
    python train.py --resume ...                     # continue the run with these settings
    torchrun --nproc_per_node 4 train.py ...         # split the encoding over 4 processes

Each run gets a folder, out/<dataset>/<method>_<shots>shot_<classes>_seed<seed>/, with
`checkpoint.pt` (the trained model), `result.json` (the results) and `router.png` (which prompt is
used for which images); during training, `resume.pt`. The same settings give the same numbers, bit
for bit on the same CPU.

From top to bottom: the settings, the model, its losses, the loop, a whole run.
Dimensions: B images in a batch, N images, C classes, G prompts, T templates, D features.
"""

import lib.start  # noqa: F401  # isort: skip, before PyTorch

import math
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from data import Split, class_slice, few_shot_split, full_dataset
from lib import parallel, pictures, results, runs
from lib.baselines import ClassVectors, fit_probe, group_templates
from lib.catalogue import DATASETS, all_templates, named_groups, row_of
from lib.clip_model import load_clip
from lib.errors import BadInput, exit_on_bad_input, finite
from lib.fast_text import FastTextEncoder
from lib.features import attach, content_of, image_features, learnable_part, training_features
from lib.files import full_path
from lib.settings import as_words, dashed, defaults_of, given_settings
from losses import TEXT_LOSSES, gate_loss, image_loss
from prompts import HardText, PromptError, SoftPrompts, TextEncoder, hard_text, template_features
from router import GATE_TARGETS, ROUTERS, mixed_logits

# ---------------------------------------------------------------------------------- the settings

CLASSES = "all", "base", "new"

# fmt: off
SETTINGS = {  # {section: {name: (default, minimum or choices, help)}}
    "task": {
        "dataset": ("shapes", None, f"{', '.join(DATASETS)}; or a folder of images"),
        "shots": (16, 1, "number of training images per class"),
        "classes": ("all", CLASSES, "all classes, the first half (base) or the second half (new)"),
        "seed": (1, 0, "random seed for few-shot sampling, initialisation and shuffling"),
        "method": ("mocoop", lambda: METHODS, "training method; it sets the defaults below"),
        "clip": (None, None, "an OpenAI name such as ViT-B/16, a file of weights, or bundled"),
        "groups": ("dataset", None, "groups of templates: the dataset's, auto (found by clustering)"
            ", or a file with one template per line and a blank line between groups"),
    },
    "method": {  # the defaults are MoCoOp's published values
        "n_groups": (0, 0, "number of groups for --groups auto (0: chosen by the best silhouette)"),
        "one_group": (False, None, "put all templates in one group"),
        "init": ("template", None, "initial words: template (the first of each group), random "
            "vectors, or one template for all prompts"),
        "full_stop": (False, None, "end prompts with a frozen full stop"),
        "conditional": (False, None, "shift the context for each image, as CoCoOp does"),
        "text_bias": (False, None, "learn a bias on all text features, as LASP does"),
        "image_side": ("frozen", ("frozen", "layer-norms", "prompts"), "what is trained in the "
            "image encoder; images are then encoded in every step"),
        "router": ("trained", ROUTERS, "how prompts get their weights"),
        "top_k": (2, 1, "number of prompts used per image"),
        "gate_weight": (1.0, 0, "weight of the gate loss"),
        "gate_target": ("label", GATE_TARGETS, "which prompts the gate loss favours: those closest "
            "to the image for its own class (label), or averaged over classes (mean)"),
        "text_weight": (5.0, 0, "weight of the text loss"),
        "text_scale": (1.0, 0, "scale of the similarities in the text loss"),
        "text_target": ("prototypes", TEXT_LOSSES, "what the text loss compares a prompt with: its "
            "group's prototype, or each template of the group"),
        "text_names": ("all", ("all", "seen"), "class names that the text loss reads: all, or "
            "only those of classes with training images"),
        "epochs": (50, 1, "number of passes over the training images"),
        "warm_up": (5, 0, "number of epochs at a learning rate of 1e-5; at most an eighth of all"),
        "batch_size": (32, 1, "number of images per step"),
        "lr": (0.032, 1e-9, "learning rate; by default proportional to the batch size"),
        "max_grad_norm": (1.0, 0, "maximum gradient norm (0 disables clipping)"),
        "views": (8, 1, "number of random crops per training image"),
    },
    "machine": {  # where a run is computed; no effect on its results
        "data": ("data", None, "the folder that holds all datasets"),
        "device": (None, None, "cpu, cuda or cuda:1; by default a GPU if there is one"),
        "text_encoder": ("fast", ("fast", "plain"), "both give the same numbers"),
        "chunk": (None, 1, "number of sentences encoded at a time by the fast text encoder"),
        "out": (None, None, "the run's folder; by default out/<dataset>/<run>"),
        "resume": (False, None, "continue this run where it was interrupted"),
    },
}
# fmt: on

# A method is a row of changes to the defaults above. The numbers come from its paper.
ONE_PROMPT = {
    "one_group": True,
    "init": "a photo of a {}.",
    "full_stop": True,
    "router": "uniform",
    "gate_weight": 0.0,
}
COOP = ONE_PROMPT | {
    "text_weight": 0.0,
    "epochs": {1: 50, 2: 100, 8: 200},  # from this number of shots; ImageNet: 50
    "warm_up": 1,
    "lr": 0.002,
    "max_grad_norm": 0.0,
}
LASP = {"text_target": "templates", "text_weight": 10.0, "text_scale": 100.0, "text_bias": True}
PROBES = "linear", "linear_zeroshot"
BASELINES = "zeroshot", "ensemble", *PROBES  # no prompts, so no method settings
METHODS = {
    "mocoop": {},
    "coop": COOP,  # Zhou et al., IJCV 2022
    "cocoop": COOP | {"conditional": True, "epochs": 10, "batch_size": 1},  # Zhou et al., CVPR 2022
    "lasp": ONE_PROMPT | LASP,  # Bulat and Tzimiropoulos, CVPR 2023
} | dict.fromkeys(BASELINES, {})


# ------------------------------------------------------------------------------------- the model


class Outputs(NamedTuple):
    """The mixture's outputs for a batch of images."""

    gate_logits: torch.Tensor  # (B, G)
    weights: torch.Tensor  # (B, G)
    text_features: torch.Tensor  # (G, C, D) for all classes that the prompts know, or (B, G, C, D)
    logits: torch.Tensor  # (B, C) for the classes with training images


class MoCoOp(nn.Module):
    """Soft prompts, a router over them, and the frozen CLIP that reads them.

        image        -> image encoder (frozen) -> image_features -> router -> weights (B, G)
        soft prompts -> text encoder (frozen)  -> text_features (G, C, D)
        logits = scale * image_features . (text_features averaged with the weights)

    With one prompt and only the image loss, this is CoOp.
    """

    per_image = False  # whether each image has its own text features
    images_at_once = 1024  # batch size in `logits`

    def __init__(self, clip_model, groups, class_names, config):
        """clip_model: from `load_clip`. groups: lists of templates, one soft prompt each.
        class_names: those used in training. config: from `default_config`.

        Raises PromptError for templates or names that this CLIP cannot read.
        """
        super().__init__()
        width = clip_model.text_projection.shape[1]
        templates = [group[0] for group in groups]
        if len(groups) == 1 and "{}" in config["init"]:
            templates = [config["init"]]  # only its name: `init` sets the vectors
        how = {name: config[name] for name in ("init", "full_stop")}
        how["text_encoder"] = text_encoder_of(config)
        self.prompts = SoftPrompts(clip_model, templates, class_names, **how)
        top_k = min(config["top_k"], len(groups))
        self.router = ROUTERS[config["router"]](width, len(groups), top_k)
        self.templates, self.top_k = templates, self.router.top_k
        self.text_bias = nn.Parameter(torch.zeros(1, width)) if config["text_bias"] else None
        self.image_side = learnable_part(clip_model, config["image_side"])
        self.logit_scale = clip_model.logit_scale.exp().item()  # CLIP's, frozen
        self.config = config

    def forward(self, image_features, seen=slice(None), text_features=None):
        """image_features (B, D) -> `Outputs`, for a training batch; `logits` is for evaluation.

        seen: the classes to compute logits for.
        text_features: used instead of encoding the prompts again, if given."""
        gate_logits, weights = self.router(image_features)
        if text_features is None:
            text_features = self.text_features(image_features=image_features)
        seen_features = text_features[..., seen, :]
        logits = mixed_logits(image_features, seen_features, weights, self.logit_scale)
        return Outputs(gate_logits, weights, text_features, logits)

    def text_features(self, class_names=None, image_features=None):
        """t[g, c] for the classes that the prompts know, or for `class_names`: (G, C, D).

        image_features: only used by `ConditionalMoCoOp`.
        """
        return self.prompts.text_features(class_names, self.text_bias)

    @torch.no_grad()
    def logits(self, image_features, class_names=None, text_features=None):
        """Class logits (N, C) and prompt weights (N, G) of images (N, D) in bounded memory, for the
        classes the prompts know or any others. text_features: of these classes, if computed."""
        n_classes = len(class_names or self.prompts.class_names)
        n_at_once = max(1, 2**20 // (len(self.templates) * n_classes))  # bounds (B, G, C)
        shared = text_features
        if shared is None and not self.per_image:
            shared = self.text_features(class_names)
        parts = []
        for f in image_features.split(min(self.images_at_once, n_at_once)):
            text_features = self.text_features(class_names, f) if self.per_image else shared
            _, weights, _, logits = self(f, text_features=text_features)
            parts.append((logits, weights))
        logits, weights = (torch.cat(part) for part in zip(*parts))
        return finite(logits, "the logits"), weights

    def parameter_groups(self):
        """The trained parameters in the optimiser's format. `factor` multiplies the learning rate:
        it is a tenth for LayerNorms, as published."""
        slow = isinstance(self.image_side, nn.ModuleList)  # a list of LayerNorms
        parts = {1.0: [], 0.1: []}
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                parts[0.1 if slow and name.startswith("image_side.") else 1.0].append(parameter)
        return [{"params": params, "factor": f} for f, params in parts.items() if params]


class ConditionalMoCoOp(MoCoOp):
    """The mixture with CoCoOp's network on top: for each image it shifts all context vectors. Text
    features are then (B, G, C, D), one set per image."""

    per_image = True
    images_at_once = 64

    def __init__(self, clip_model, groups, class_names, config):
        super().__init__(clip_model, groups, class_names, config)
        text_width, width = clip_model.text_projection.shape
        self.shift = nn.Sequential(
            nn.Linear(width, width // 16), nn.ReLU(), nn.Linear(width // 16, text_width)
        )

    def text_features(self, class_names=None, image_features=None):
        return self.prompts.text_features(class_names, self.text_bias, self.shift(image_features))


def make_model(clip_model, groups, class_names, config):
    """The mixture that a configuration describes, on CLIP's device."""
    kind = ConditionalMoCoOp if config["conditional"] else MoCoOp
    return kind(clip_model, groups, class_names, config).to(clip_model.logit_scale.device)


def learns_images(config):
    """Whether part of the image encoder is trained. Image features then cannot be cached."""
    return config["image_side"] not in (None, "frozen")


def text_encoder_of(config):
    """The text encoder of a run: `prompts.TextEncoder`, or its fast equivalent."""
    fast = partial(FastTextEncoder, chunk=config["chunk"])
    return fast if config["text_encoder"] == "fast" else TextEncoder


# ----------------------------------------------------------------------------------- the training


def compute_losses(model, image_features, labels, outputs, hard, seen=slice(None)):
    """The losses of a batch: {name: (weight, value)}.

        image: logits against labels
        gate:  gate_logits against the K prototypes of the image's class closest to the image
        text:  text_features against prototypes, for all names that the prompts know

    image_features: (B, D). labels: (B,), indices into the seen classes. outputs: the model's.
    hard: `HardText`. seen: the slice of the classes with training images. The image and gate
    losses use only these classes, the text loss all that the prompts know.
    """
    config = model.config
    losses = {"image": (1.0, image_loss(outputs.logits, labels))}
    if config["gate_weight"] and model.router.guided:
        prototypes = hard.prototypes[:, seen]
        # Detached, so that a trainable image encoder does not learn to match the target.
        f, target_of = image_features.detach(), GATE_TARGETS[config["gate_target"]]
        target = target_of(f, prototypes, labels, model.top_k)
        losses["gate"] = config["gate_weight"], gate_loss(outputs.gate_logits, target)
    if config["text_weight"]:
        text_loss = TEXT_LOSSES[config["text_target"]]
        value = text_loss(outputs.text_features, hard, config["text_scale"])
        losses["text"] = config["text_weight"], value
    return losses


def learning_rate(lr, epoch, epochs, warm_up):
    """The learning rate of an epoch, counted from 0: a constant warm-up, then a cosine. As in
    CoOp's scheduler, the cosine spans all epochs, so it is cut off before it reaches zero."""
    warm_up = min(warm_up, round(epochs / 8))
    if epoch < warm_up:
        return 1e-5
    return lr * 0.5 * (1 + math.cos(math.pi * (epoch - warm_up) / epochs))


def shuffled(n, batch_size, rng):
    """The indices of n images in random order, a tensor for each batch. An incomplete batch counts
    only if it is alone."""
    order = torch.randperm(n, generator=rng)
    return order.split(batch_size)[: max(1, n // batch_size)]


def fit(model, images, labels, hard, seen=slice(None), save=lambda state: None, state=None):
    """Trains `model` in place. Returns the seconds it took, including those before a resume, and
    the share of each prompt in every epoch.

    images: `lib.features.CachedImages`, which has n_views random crops of every image and yields
    the features (B, D) of each batch, or `LiveImages`. labels (N,), hard and seen: as in
    `compute_losses`. save: called after each epoch with the state needed to continue: parameters,
    optimiser, random states. state: the last one that was saved. Raises BadInput if training
    diverges.
    """
    config, batch_size = model.config, model.config["batch_size"]
    torch.manual_seed(config["seed"])  # your own router may draw numbers; `restore` resumes them
    order_rng = torch.Generator().manual_seed(config["seed"])
    optimiser = torch.optim.SGD(
        model.parameter_groups(),
        lr=config["lr"],
        momentum=0.9,
        weight_decay=5e-4,
        fused=labels.is_cuda,
    )
    learned = model, optimiser, order_rng
    done, seconds, usage = runs.restore(state, *learned)
    start = time.time() - seconds  # include the time before an interruption
    model.train()
    for epoch in range(done, config["epochs"]):
        schedule = epoch, config["epochs"], config["warm_up"]
        for part in optimiser.param_groups:
            part["lr"] = learning_rate(config["lr"] * part["factor"], *schedule)
        batches = shuffled(len(labels), batch_size, order_rng)
        views = torch.randint(images.n_views, (len(labels),), generator=order_rng)
        batch_labels = labels[torch.cat(batches).to(labels.device)].split(batch_size)
        history, used = [], 0
        steps = zip(images.batches(batches, views, epoch), batch_labels)
        for f, y in tqdm(steps, total=len(batches), leave=False, disable=None):  # (B, D), (B,)
            outputs = model(f, seen)
            losses = compute_losses(model, f, y, outputs, hard, seen)
            total = sum(weight * value for weight, value in losses.values())

            optimiser.zero_grad()
            total.backward()
            if config["max_grad_norm"]:
                nn.utils.clip_grad_norm_(model.parameters(), config["max_grad_norm"])
            optimiser.step()
            history.append({name: (w, value.detach()) for name, (w, value) in losses.items()})
            used = used + outputs.weights.detach().sum(dim=0)
        lr = learning_rate(config["lr"], *schedule)
        usage.append(results.print_epoch(epoch, model, lr, history, used))
        save(runs.snapshot(epoch + 1, time.time() - start, usage, *learned))
    model.eval()
    return time.time() - start, usage


# ----------------------------------------------------------------------------------- a whole run


@dataclass
class Task:
    """A run's inputs: images, the frozen CLIP, class names and templates."""

    config: dict
    split: Split  # the few-shot sample and its test images
    clip_model: nn.Module
    fingerprint: str  # of the CLIP's weights
    names: list  # the class names used in training
    seen: slice  # those of them with training images
    groups: list  # lists of templates
    hard: HardText  # their features with these names

    def features(self, part, **how):
        """Features (N, D) of the images in `train`, `val` or `test`; how: see `image_features`."""
        what = "training images" if part == "train" else f"{part} images"
        clip, items = (self.clip_model, self.fingerprint), getattr(self.split, part)
        return image_features(*clip, self.split, items, what=what, **how)

    def labels(self, part):
        """Their labels (N,), on CLIP's device."""
        return self.split.labels(getattr(self.split, part)).to(self.clip_model.logit_scale.device)


def run(config, resume=False):
    """One run, from its configuration to the files in its folder. Returns its result."""
    device = parallel.choose_device(config["device"])
    parallel.join(device)
    folder = Path(config["out"])
    defaults = preset(config["method"], config["dataset"], config["shots"], config["batch_size"])
    with runs.open_run(folder, config, resume, defaults) as (state, finished):
        result = finished or run_in(folder, config, defaults, state, device)
    parallel.leave()
    return result


def run_in(folder, config, defaults, state, device):
    """The run in its folder. Returns its result. state: to continue from, or None."""
    # The inputs and the model.
    task, method = load_task(config, device), config["method"]
    split = task.split
    parts = [task.groups, task.fingerprint, task.names, content_of(split)]
    made_of = runs.check_content(folder, parts)
    model = None if method in BASELINES else new_mixture(task, defaults)
    results.announce(config, split, model)

    # CLIP as it is.
    test, val = task.features("test"), task.features("val")
    templates = task.hard.features[:, task.seen]
    untrained = zero_shot_and_ensemble(
        task.clip_model, split.dataset, split.class_names, templates, config
    )
    zero_shot, ensemble = (results.accuracy_on(m, split, "test", test) for m in untrained.values())
    print(f"before training: zero-shot {zero_shot:.2f} %, ensemble {ensemble:.2f} %")

    # One of three ways to learn.
    seconds, usage = 0.0, []
    if model:
        save = partial(runs.save_state, folder, config, made_of)
        seconds, usage = train_prompts(model, task, save, state)
    elif method in PROBES:
        model, seconds = train_probe(task, untrained["zeroshot"])
    else:
        model = untrained[method]
    if learns_images(config) or method == "linear":  # its features differ from those above
        how = {"cached": not learns_images(config), "raw": method == "linear"}
        test, val = (task.features(part, **how) for part in ("test", "val"))

    # Its results.
    changed = runs.changed_settings(config, defaults)
    measured, *_ = results.evaluate_model(model, split, test)
    result = results.about(config, changed, split, config["classes"]) | measured
    result |= {
        "n_train": len(split.train),
        "few_shot_samples": split.samples,
        "zero_shot_accuracy": zero_shot,
        "ensemble_accuracy": ensemble,
        "val_accuracy": results.accuracy_on(model, split, "val", val),
        "prompt_usage_by_epoch": usage,
        "train_seconds": round(seconds, 2),
        "groups": task.groups,
        "clip_fingerprint": task.fingerprint,
        "made_of": made_of,
        "config": config,
    }
    checkpoint = {
        "config": config,
        "groups": task.groups,
        "class_names": split.class_names,
        "prompt_names": task.names,
        "clip_fingerprint": task.fingerprint,
        "model": model.state_dict(),
    }
    runs.publish(folder, checkpoint, result, defaults, partial(pictures.router_picture, result))
    return result


def load_task(config, device):
    """The `Task` of a configuration."""
    full_split, split = few_shot_split(config)
    if config["method"] in PROBES and not split.val:
        raise BadInput("a linear probe chooses its strength on val images, and there are none")
    clip_model, fingerprint = load_clip(config["clip"], device)
    # Only the text loss can use the names of classes without images.
    names, seen = split.class_names, slice(None)
    if config["text_weight"] and config["text_names"] == "all":
        names = full_split.class_names
        seen = class_slice(len(names), config["classes"])
    groups = named_groups(config)
    read = partial(template_features, clip_model, text_encoder=text_encoder_of(config))
    if config["groups"] == "auto":
        templates = all_templates(groups)
        groups = group_templates(templates, read(templates, names), config["n_groups"])
    hard = hard_text(read(all_templates(groups), names), groups)
    return Task(config, split, clip_model, fingerprint, names, seen, groups, hard)


def new_mixture(task, defaults):
    """The mixture to train. Raises BadInput if --top-k asks for more prompts than there are."""
    top_k, n = task.config["top_k"], len(task.groups)
    if top_k > max(n, defaults["top_k"]):  # a default that is too large is lowered
        raise BadInput(f"--top-k {top_k} is above the number of prompts, {n}")
    torch.manual_seed(task.config["seed"])
    return make_model(task.clip_model, task.groups, task.names, task.config)


def train_prompts(model, task, save, state):
    """Trains a mixture. Returns what `fit` does."""
    # The learnable part is attached only now, because the baselines use the original CLIP.
    attach(task.clip_model, model.image_side)
    live, views = learns_images(task.config), task.config["views"]
    images = training_features(task.clip_model, task.fingerprint, task.split, views, live)
    if not live:
        task.clip_model.visual = None  # all images are encoded: free its memory for training
    return fit(model, images, task.labels("train"), task.hard, task.seen, save, state)


def train_probe(task, zero_shot):
    """Fits a linear probe. Returns it and the seconds it took."""
    raw = task.config["method"] == "linear"  # CoOp's probe, on features that are not normalised
    start = None if raw else zero_shot.scale * zero_shot.weight
    train, val = task.features("train", raw=raw), task.features("val", raw=raw)
    names = task.split.class_names
    return fit_probe(names, train, val, task.labels("train"), task.labels("val"), start)


def zero_shot_and_ensemble(clip_model, dataset, class_names, features, config):
    """CLIP as it is, the baselines without training: {"zeroshot": ..., "ensemble": ...}.

    zeroshot: the one template that CoOp uses for the dataset. ensemble, the stronger baseline: the
    features (T, C, D) of all templates, averaged and normalised. Both have one vector per class.
    """
    template, text_encoder = row_of(dataset).zero_shot, text_encoder_of(config)
    one = template_features(clip_model, [template], class_names, text_encoder)[0]
    mean = F.normalize(features.mean(dim=0), dim=-1)
    vectors, scale = {"zeroshot": one, "ensemble": mean}, clip_model.logit_scale.exp().item()
    return {name: ClassVectors(class_names, v, scale=scale) for name, v in vectors.items()}


# --------------------------------------------------------- from a command line to a configuration


def preset(method, dataset, shots, batch_size=None):
    """{setting: default} for a method on a task; None for settings that a baseline lacks. Raises
    BadInput for an unknown method."""
    if method not in METHODS:
        raise BadInput(f"no method {method!r}: choose one of {', '.join(METHODS)}")
    published = defaults_of(SETTINGS["method"])
    own = {"clip": row_of(dataset).clip, "groups": "dataset"}
    if method in BASELINES:
        return dict.fromkeys(published) | own
    row = published | METHODS[method] | own
    # The rate is for the method's own batch size. For another one, it is scaled in proportion.
    row["lr"] *= (batch_size or row["batch_size"]) / row["batch_size"]
    if isinstance(row["epochs"], dict):
        shots = 1 if dataset == "imagenet" else shots
        row["epochs"] = row["epochs"][max(n for n in row["epochs"] if n <= shots)]
    return row


def complete(given):
    """(all settings, the method's defaults), from the settings that are given."""
    base = defaults_of(*SETTINGS.values())
    task = base | given
    dataset = full_dataset(task["dataset"])
    defaults = preset(task["method"], dataset, task["shots"], given.get("batch_size"))
    return base | defaults | given | {"dataset": dataset}, defaults


def configure(arguments=None):
    """Turns a command line into a run's configuration: (config, whether to resume).

    arguments: a list of words, or None for the program's own. config: {setting: value}, as in
    `result.json`; the value is None where the method has no such setting. `--help` prints the
    settings with the defaults of the chosen method, and exits.
    Raises BadInput for settings that are unknown or have no effect.
    """
    given = given_settings(SETTINGS, __doc__, arguments, lambda given: complete(given)[1])
    config, defaults = complete(given)
    resume = config.pop("resume")
    config["data"] = str(Path(config["data"]).resolve())
    config["clip"] = full_path(config["clip"], but=["bundled"])
    config["groups"] = full_path(config["groups"], but=["dataset", "auto"])
    for name, idle, why in no_effect(config):
        if idle and name in given:
            raise BadInput(f"{dashed(name)} has no effect {why}: leave it out")
    config["out"] = str(runs.run_folder(config, runs.changed_settings(config, defaults)))
    return config, resume


def default_config(**given):
    """The configuration from Python: `default_config(shots=4)` is `python train.py --shots 4`."""
    return configure(as_words(given))[0]


def no_effect(config):
    """(setting, whether it has no effect in this configuration, why), for every setting that may
    have none. Giving it then is a mistake, not an ablation."""
    c, no_text = config, config["text_weight"] == 0
    guided = c["router"] is not None and ROUTERS[c["router"]].guided
    rules = (
        (SETTINGS["method"], c["method"] in BASELINES, "without prompts"),
        (["groups"], c["groups"] == "auto" and c["one_group"] in (None, True), "without groups"),
        (["n_groups"], c["groups"] != "auto", "without --groups auto"),
        (["top_k"], c["router"] == "uniform", "with --router uniform"),
        (["gate_weight", "gate_target"], not guided, "without --router trained"),
        (["gate_target"], c["gate_weight"] == 0, "with --gate-weight 0"),
        (["text_scale", "text_target", "text_names"], no_text, "with --text-weight 0"),
        (["text_names"], c["classes"] == "all", "with --classes all, where all are seen"),
        (["chunk"], c["text_encoder"] == "plain", "with --text-encoder plain"),
        (["views"], learns_images(c), "with --image-side, which crops anew in every epoch"),
        (["views"], row_of(c["dataset"]).layout == "world", "on drawn images, never cropped"),
    )
    return [(name, idle, why) for names, idle, why in rules for name in names]


def main():
    exit_on_bad_input(lambda: run(*configure()), PromptError)


if __name__ == "__main__":
    main()
