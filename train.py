"""Train a mixture of prompts for CLIP (MoCoOp, arXiv 2409.12011).

    python train.py                                  # the built-in world, no network needed
    python train.py --dataset eurosat --shots 4      # downloads CLIP ViT-B/16 and EuroSAT if absent
    python train.py --dataset eurosat --shots 16 --classes base    # then: eval.py RUN --classes new
    python train.py --resume ...                     # continue the run with these settings

Each run gets a folder, out/<dataset>/<method>_<shots>shot_<classes>_seed<seed>/, with
`checkpoint.pt` (the trained model), `result.json` (the results) and `router.png` (which prompt is
used for which images). The same settings give the same numbers, bit for bit on the same CPU.

    python train.py --method coop                    # another method: see METHODS
    python train.py --router uniform                 # MoCoOp without its router
    torchrun --nproc_per_node 4 train.py ...         # split the encoding over 4 processes

    image        -> image encoder (frozen) -> image_features -> router: gate_logits -> weights
    soft prompts -> text encoder (frozen)  -> text_features  (G, C, D), with trained vectors
    hard prompts -> text encoder (frozen)  -> prototypes     (G, C, D), fixed
    logits = scale * image_features . (text_features averaged with the weights)
    image loss: logits against labels
    gate loss: gate_logits against the K prototypes of the image's class closest to the image
    text loss: text_features against prototypes, for all class names, base and new

From top to bottom: the settings, the methods as rows of settings, the mixture, the loop, a whole
run. To understand the method, start at `MoCoOp`.
Letters in shapes: B images in a batch, N images, C classes, G prompts, T templates, D features.
"""

import argparse
import math
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from data import class_slice, few_shot_split, full_dataset
from lib import parallel, report, runs
from lib.baselines import ClassVectors, fit_probe, group_templates
from lib.catalogue import DATASETS, all_templates, named_groups, row_of
from lib.clip_model import load_clip
from lib.fast_text import FastTextEncoder
from lib.features import SIDES, attach, image_features, learnable_part, training_features
from lib.runs import BadInput, Parser, at_least, exit_on_bad_input
from losses import TEXT_LOSSES, gate_loss, image_loss
from prompts import PromptError, SoftPrompts, TextEncoder, hard_text, template_features
from router import GATE_TARGETS, ROUTERS, mixed_logits

# ---------------------------------------------------------------------------------- the settings


# fmt: off
def make_parser(**options):
    """The command line. Defaults are MoCoOp's published values; `preset` has the other methods'."""
    parser = Parser(__doc__, **options)
    positive, weight, switch = at_least(int, 1), at_least(float, 0), argparse.BooleanOptionalAction

    add = parser.add_argument_group("task").add_argument
    add("--dataset", default="shapes", help=f"{', '.join(DATASETS)}; or a folder of images")
    add("--shots", default=16, type=positive, help="number of training images per class")
    add("--classes", default="all", choices=CLASSES, help="all, the first half, or the second half")
    add("--seed", default=1, type=at_least(int, 0), help="random seed for few-shot sampling, "
        "initialisation and shuffling")
    add("--method", default="mocoop", choices=METHODS, help="training method; it sets the "
        "defaults of the settings below")

    add = parser.add_argument_group("CLIP and templates").add_argument
    add("--clip", help="an OpenAI name such as ViT-B/16, a file of weights, or bundled")
    add("--groups", default="dataset", help="groups of templates: the dataset's, auto (found by "
        "clustering), or a file with a template per line and a blank line between groups")

    add = parser.add_argument_group("method: prompts").add_argument
    add("--n-groups", default=0, type=at_least(int, 0), help="number of groups for --groups auto; "
        "0 takes the number with the best silhouette")
    add("--one-group", default=False, action=switch, help="put all templates in one group")
    add("--init", default="template", help="what prompts start from: template (each group's first "
        "one), random, or a template for all")
    add("--full-stop", default=False, action=switch, help="end prompts with a frozen full stop")
    add("--conditional", default=False, action=switch, help="shift the context for each image by a "
        "small network, as CoCoOp does")
    add("--text-bias", default=False, action=switch, help="learn a bias on all text features, as "
        "LASP does")
    add("--image-side", default="frozen", choices=SIDES, help="what is trained in the image "
        "encoder; images are then encoded in every step")

    add = parser.add_argument_group("method: router").add_argument
    add("--router", default="trained", choices=ROUTERS, help="how prompts get their weights")
    add("--top-k", default=2, type=positive, help="number of prompts used per image")

    add = parser.add_argument_group("method: losses").add_argument
    add("--gate-weight", default=1.0, type=weight, help="weight of the gate loss")
    add("--gate-target", default="label", choices=GATE_TARGETS, help="what the gate is taught: the "
        "prompts most like an image of its class (label), or of any class (mean)")
    add("--text-weight", default=5.0, type=weight, help="weight of the text loss")
    add("--text-scale", default=1.0, type=weight, help="scale of similarities in the text loss")
    add("--text-target", default="prototypes", choices=TEXT_LOSSES, help="what the text loss "
        "compares a prompt with: its group's prototype, or each template of the group")
    add("--text-names", default="all", choices=("all", "seen"), help="whose names the text loss "
        "reads: those of all classes, or only of classes with training images")

    add = parser.add_argument_group("method: training").add_argument
    add("--epochs", default=50, type=positive, help="number of passes over the training images")
    add("--warm-up", default=5, type=at_least(int, 0), help="number of epochs at a learning rate "
        "of 1e-5; at most an eighth of all")
    add("--batch-size", default=32, type=positive, help="number of images per step")
    add("--lr", default=0.032, type=at_least(float, 1e-9), help="learning rate; unless given, it "
        "is proportional to the batch size")
    add("--max-grad-norm", default=1.0, type=weight, help="maximum gradient norm (0 disables "
        "clipping)")
    add("--views", default=8, type=positive, help="number of random crops per training image")

    add = parser.add_argument_group("machine").add_argument
    add("--data", default="data", help="the folder that holds all datasets")
    add("--device", help="cpu, cuda or cuda:1 (by default a GPU if there is one)")
    add("--text-encoder", default="fast", choices=("fast", "plain"),
        help="both give the same numbers")
    add("--chunk", type=positive, help="number of sentences that the fast text encoder reads at "
        "a time")
    add("--out", help="the run's folder (by default out/<dataset>/<run>)")
    add("--resume", action="store_true", help="continue this run where it was interrupted")
    return parser


# fmt: on
CLASSES = "all", "base", "new"
TASK = {"dataset", "shots", "classes", "seed", "method", "clip", "groups"}
MACHINE = {"data", "device", "text_encoder", "chunk", "out", "resume"}  # how a run is computed
PROBES = "linear", "linear_zeroshot"
BASELINES = "zeroshot", "ensemble", *PROBES  # no prompts, so no "method: ..." settings

# A method lists what it changes in the defaults above. The numbers come from its paper.
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
METHODS = {
    "mocoop": {},
    "coop": COOP,  # Zhou et al., IJCV 2022
    "cocoop": COOP | {"conditional": True, "epochs": 10, "batch_size": 1},  # Zhou et al., CVPR 2022
    "lasp": ONE_PROMPT | LASP,  # Bulat and Tzimiropoulos, CVPR 2023
} | {baseline: {} for baseline in BASELINES}
PUBLISHED = {  # {setting of a method: MoCoOp's value}
    name: value
    for name, value in vars(make_parser().parse_args([])).items()
    if name not in TASK | MACHINE
}


def preset(method, dataset, shots, batch_size=None):
    """{setting: default} for a method on a task; None for settings that a baseline lacks."""
    own = {"clip": row_of(dataset).clip, "groups": "dataset"}
    if method in BASELINES:
        return dict.fromkeys(PUBLISHED) | own
    row = PUBLISHED | METHODS[method] | own
    # The rate is for the method's own batch size. It is scaled in proportion to a given one.
    row["lr"] *= (batch_size or row["batch_size"]) / row["batch_size"]
    if isinstance(row["epochs"], dict):
        shots = 1 if dataset == "imagenet" else shots
        row["epochs"] = row["epochs"][max(n for n in row["epochs"] if n <= shots)]
    return row


def learns_images(config):
    """Whether part of the image encoder is trained. Its features cannot be cached then."""
    return config["image_side"] not in (None, "frozen")


# Settings that can have no effect; giving one is then an error: (setting, when, why).
NO_EFFECT = (
    *((name, lambda c: c["method"] in BASELINES, "without prompts") for name in PUBLISHED),
    ("groups", lambda c: c["groups"] == "auto" and c["one_group"] is not False, "without groups"),
    ("n_groups", lambda c: c["groups"] != "auto", "without --groups auto"),
    ("top_k", lambda c: c["router"] == "uniform", "with --router uniform"),
    *(
        (name, lambda c: not ROUTERS[c["router"]].guided, "without --router trained")
        for name in ("gate_weight", "gate_target")
    ),
    ("gate_target", lambda c: c["gate_weight"] == 0, "with --gate-weight 0"),
    *(
        (name, lambda c: c["text_weight"] == 0, "with --text-weight 0")
        for name in ("text_scale", "text_target", "text_names")
    ),
    ("text_names", lambda c: c["classes"] == "all", "with --classes all, where all are seen"),
    ("chunk", lambda c: c["text_encoder"] == "plain", "with --text-encoder plain"),
    ("views", learns_images, "with --image-side, which crops anew in every epoch"),
    ("views", lambda c: row_of(c["dataset"]).layout == "world", "on drawn images, never cropped"),
)


def configure(arguments=None):
    """Parses a command line into a run's configuration: (config, whether to resume).

    arguments: a list of words, or None for the program's own. config: {setting: value}, as in
    `result.json`; the value is None where the method has no such setting.
    Raises BadInput for settings that are unknown or have no effect.
    """
    # The first pass finds the settings that were given, and the method that sets the defaults.
    first = make_parser(add_help=False)
    task, _ = first.parse_known_args(arguments)
    nothing = argparse.Namespace(**dict.fromkeys(vars(task)))
    given = vars(first.parse_known_args(arguments, nothing)[0])
    dataset = full_dataset(task.dataset)
    defaults = preset(task.method, dataset, task.shots, given["batch_size"])

    parser = make_parser()
    parser.set_defaults(**defaults)
    config = vars(parser.parse_args(arguments))
    resume = config.pop("resume")
    config["dataset"], config["data"] = dataset, str(Path(config["data"]).resolve())
    config["clip"] = runs.full_path(config["clip"], but=["bundled"])
    config["groups"] = runs.full_path(config["groups"], but=["dataset", "auto"])
    for name, without_effect, why in NO_EFFECT:
        if given[name] is not None and without_effect(config):
            raise BadInput(f"{dashed(name)} has no effect {why}: leave it out")
    label = runs.run_label(config["method"], runs.changed_settings(config, defaults))
    config["out"] = str(runs.run_folder(config, label))
    return config, resume


def dashed(name):
    return f"--{name.replace('_', '-')}"


def default_config(**changes):
    """The configuration that the command line would give: `default_config(shots=4)` is that of
    `python train.py --shots 4`. Raises BadInput as `configure` does."""
    words = []
    for name, value in changes.items():
        if value is None:
            continue
        if isinstance(value, bool):
            words.append(dashed(name) if value else dashed(f"no_{name}"))
        else:
            words += [dashed(name), str(value)]
    return configure(words)[0]


# --------------------------------------------------------------------------------- the mixture


def text_encoder_of(config):
    """The text encoder of a run: `prompts.TextEncoder`, or its fast equivalent."""
    if config["text_encoder"] == "plain":
        return TextEncoder
    return partial(FastTextEncoder, chunk=config["chunk"])


class Outputs(NamedTuple):
    """The mixture's outputs for a batch of images."""

    gate_logits: torch.Tensor  # (B, G)
    weights: torch.Tensor  # (B, G)
    text_features: torch.Tensor  # (G, C, D) for all classes that the prompts know
    logits: torch.Tensor  # (B, C)


class MoCoOp(nn.Module):
    """Soft prompts, a router over them, and the frozen CLIP that reads them.

    With one prompt and only the image loss, this is CoOp.
    """

    per_image = False  # whether each image has its own text features
    images_at_once = 1024  # batch size in `logits`

    def __init__(self, clip_model, groups, class_names, config):
        """clip_model: from `load_clip`. groups: lists of templates, one soft prompt each.
        class_names: read with the prompts in training. config: from `default_config`.

        Raises PromptError for templates or names that this CLIP cannot read.
        """
        super().__init__()
        width = clip_model.text_projection.shape[1]
        templates = [group[0] for group in groups]
        if len(groups) == 1 and "{}" in config["init"]:
            templates = [config["init"]]  # a single prompt is named after its start
        self.prompts = SoftPrompts(
            clip_model,
            templates,
            class_names,
            config["init"],
            config["full_stop"],
            text_encoder_of(config),
        )
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
        classes the prompts know or any others. text_features: of these classes, if known."""
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
        return runs.finite(logits, "the logits"), weights

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
    """The mixture with CoCoOp's network on top: for each image it shifts all context vectors.

    Text features are then (B, G, C, D), one set per image.
    """

    per_image = True
    images_at_once = 64

    def __init__(self, clip_model, groups, class_names, config):
        super().__init__(clip_model, groups, class_names, config)
        text_width, width = clip_model.text_projection.shape
        self.shift = nn.Sequential(
            nn.Linear(width, width // 16), nn.ReLU(), nn.Linear(width // 16, text_width)
        )

    def text_features(self, class_names=None, image_features=None):
        if image_features is None:
            raise ValueError("with --conditional text features need image_features")
        return self.prompts.text_features(class_names, self.text_bias, self.shift(image_features))


def make_model(clip_model, groups, class_names, config):
    """The mixture that a configuration describes, on CLIP's device."""
    kind = ConditionalMoCoOp if config["conditional"] else MoCoOp
    return kind(clip_model, groups, class_names, config).to(clip_model.logit_scale.device)


# ------------------------------------------------------------------------------------ training


def compute_losses(model, image_features, labels, outputs, hard, seen=slice(None)):
    """The losses of a batch: {name: (weight, value)}.

    image_features: (B, D). labels: (B,), indices into the seen classes. outputs: the model's.
    hard: `HardText`. seen: the slice of the classes with training images. The image and gate
    losses use only these classes; the text loss runs over all of them.
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
    """The learning rate of an epoch, counted from 0: a constant warm-up, then a cosine.

    As in the scheduler that the field uses, the cosine starts after the warm-up but spans all
    epochs, so it is cut off before it reaches zero.
    """
    warm_up = min(warm_up, round(epochs / 8))
    if epoch < warm_up:
        return 1e-5
    return lr * 0.5 * (1 + math.cos(math.pi * (epoch - warm_up) / epochs))


def fit(model, images, labels, hard, seen=slice(None), save=lambda state: None, state=None):
    """Trains `model` in place. Returns the seconds it took, including those before a resume, and
    the share of each prompt in every epoch.

    images: from `training_features`, or `lib.features.CachedImages` of features (N, D). labels
    (N,), hard and seen: as in `compute_losses`. save: called after each epoch with the state that
    is needed to continue. state: the last state passed to `save`, to continue from there.
    Raises BadInput if training diverges.
    """
    config = model.config
    torch.manual_seed(config["seed"])  # for variants whose modules draw random numbers
    order_rng = torch.Generator().manual_seed(config["seed"])
    optimiser = torch.optim.SGD(
        model.parameter_groups(),
        lr=config["lr"],
        momentum=0.9,
        weight_decay=5e-4,
        fused=labels.is_cuda,
    )
    done, seconds, usage = 0, 0.0, []
    if state is not None:
        done, seconds, usage = state["epoch"], state["seconds"], list(state["usage"])
        model.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
        order_rng.set_state(state["order_rng"])
        torch.set_rng_state(state["torch_rng"])
        if labels.is_cuda and state["cuda_rng"] is not None:
            torch.cuda.set_rng_state(state["cuda_rng"])
    n_batches = max(1, len(labels) // config["batch_size"])  # the last, incomplete one is dropped
    start = time.time() - seconds  # include the time before an interruption
    model.train()
    for epoch in range(done, config["epochs"]):
        schedule = epoch, config["epochs"], config["warm_up"]
        for part in optimiser.param_groups:
            part["lr"] = learning_rate(config["lr"] * part["factor"], *schedule)
        order = torch.randperm(len(labels), generator=order_rng)
        views = torch.randint(images.n_views, (len(labels),), generator=order_rng)
        batches = order.split(config["batch_size"])[:n_batches]
        batch_labels = labels[order.to(labels.device)].split(config["batch_size"])
        history, used = [], 0
        steps = zip(images.batches(batches, views, epoch), batch_labels)
        for f, y in tqdm(steps, total=n_batches, leave=False, disable=None):  # (B, D), (B,)
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
        usage.append(print_epoch(epoch, model, lr, history, used))
        save(
            {
                "epoch": epoch + 1,
                "seconds": time.time() - start,
                "usage": usage,
                "model": model.state_dict(),
                "optimiser": optimiser.state_dict(),
                "order_rng": order_rng.get_state(),
                "torch_rng": torch.get_rng_state(),
                "cuda_rng": torch.cuda.get_rng_state() if labels.is_cuda else None,
            }
        )
    model.eval()
    return time.time() - start, usage


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


# ---------------------------------------------------------------------------------- a whole run


def run(config, resume=False):
    """One run, from its configuration to the files in its folder. Returns its result."""
    device = parallel.choose_device(config["device"])
    parallel.join(device)
    folder = Path(config["out"])
    with runs.writable_folder(folder, "choose another --out"):
        result = run_in(folder, config, resume, device)
    parallel.leave()
    return result


def run_in(folder, config, resume, device):
    """The run itself: data, CLIP, baselines, training, results."""
    defaults = preset(config["method"], config["dataset"], config["shots"], config["batch_size"])
    has_prompts = config["method"] not in BASELINES
    state = runs.open_run(folder, config, resume, defaults, MACHINE)
    full_split, split = few_shot_split(config)
    if config["method"] in PROBES and not split.val:
        raise BadInput("a linear probe chooses its strength on val images, and there are none")
    clip_model, fingerprint = load_clip(config["clip"], device)
    training_names, seen = names_in_training(config, full_split, split)
    prompt_names = training_names  # prompts are read with these; saved with the model
    groups, hard = grouped_text(clip_model, training_names, prompt_names, config)
    if has_prompts and config["top_k"] > max(len(groups), defaults["top_k"]):
        # Only an explicit number is an error; a default that is too large is lowered.
        raise BadInput(f"--top-k {config['top_k']} is above the number of prompts, {len(groups)}")
    torch.manual_seed(config["seed"])
    model = make_model(clip_model, groups, prompt_names, config) if has_prompts else None
    made_of = runs.check_made_of(folder, state, [groups, fingerprint, prompt_names, split.train])
    report.announce(config, split, model)

    def features_of(part, **options):
        what = "training images" if part == "train" else f"{part} images"
        items = getattr(split, part)
        return image_features(clip_model, fingerprint, split, items, what=what, **options)

    test, val = features_of("test"), features_of("val")
    untrained = zero_shot_and_ensemble(
        clip_model, split.dataset, split.class_names, hard.features[:, seen], config
    )
    zero_shot, ensemble = (
        report.accuracy_on(m, split, split.test, test) for m in untrained.values()
    )
    print(f"before training: zero-shot {zero_shot:.2f} %, ensemble {ensemble:.2f} %")

    seconds, usage = 0.0, []
    if has_prompts:
        save = partial(runs.save_state, folder, config, made_of)
        task = clip_model, fingerprint, split, hard, seen
        seconds, usage = train_prompts(model, *task, save, state)
        if learns_images(config):  # the image encoder has changed
            test, val = features_of("test", cached=False), features_of("val", cached=False)
    elif config["method"] in PROBES:
        raw = config["method"] == "linear"  # CoOp's probe, on features that are not normalised
        start = None if raw else untrained["zeroshot"].scale * untrained["zeroshot"].weight
        own, test, val = (features_of(part, raw=raw) for part in ("train", "test", "val"))
        labels, val_labels = (split.labels(part).to(device) for part in (split.train, split.val))
        model, seconds = fit_probe(split.class_names, own, val, labels, val_labels, start)
    else:
        model = untrained[config["method"]]

    changed = runs.changed_settings(config, defaults)
    measured, *_ = report.evaluate_model(model, config, changed, split, config["classes"], test)
    result = measured | {
        "n_train": len(split.train),
        "few_shot_samples": split.samples,
        "zero_shot_accuracy": zero_shot,
        "ensemble_accuracy": ensemble,
        "val_accuracy": report.accuracy_on(model, split, split.val, val),
        "prompt_usage_by_epoch": usage,
        "train_seconds": round(seconds, 2),
        "config": config,
    }
    checkpoint = {
        "config": config,
        "groups": groups,
        "class_names": split.class_names,
        "prompt_names": prompt_names,
        "clip_fingerprint": fingerprint,
        "model": model.state_dict(),
    }
    runs.publish(folder, checkpoint, result, defaults, MACHINE)
    if model.templates:
        report.router_picture(result, folder / "router.png")
    files = [folder / name for name in ("checkpoint.pt", "result.json", "router.png")]
    print(f"saved in {folder}: {', '.join(file.name for file in files if file.is_file())}")
    return result


def names_in_training(config, full_split, split):
    """The class names used in training, and the slice of them with training images. The text loss
    runs over the names of all classes; without it, names without images would have no effect."""
    if not config["text_weight"] or config["text_names"] == "seen":
        return split.class_names, slice(None)
    names = full_split.class_names
    return names, class_slice(len(names), config["classes"])


@runs.doing("reading templates", "try a smaller --chunk")
def grouped_text(clip_model, training_names, prompt_names, config):
    """The run's groups of templates, and their `HardText` with the prompts' class names. For
    `--groups auto`, the groups are found with the class names used in training."""
    groups = named_groups(config)
    read = partial(template_features, clip_model, text_encoder=text_encoder_of(config))
    if config["groups"] == "auto":
        templates = all_templates(groups)
        features = read(templates, training_names)
        groups = group_templates(templates, features, config["n_groups"])
    return groups, hard_text(read(all_templates(groups), prompt_names), groups)


def train_prompts(model, clip_model, fingerprint, split, hard, seen, save, state):
    """Trains a mixture on the training images of a split. Returns what `fit` does."""
    # The learnable part is attached only now, because the baselines use the original CLIP.
    attach(clip_model, model.image_side)
    live = learns_images(model.config)
    images = training_features(clip_model, fingerprint, split, model.config["views"], live)
    if not live:
        clip_model.visual = None  # all images are encoded: free its memory for training
    labels = split.labels(split.train).to(clip_model.logit_scale.device)
    with runs.doing("training", "try a smaller --chunk or --batch-size"):
        return fit(model, images, labels, hard, seen, save, state)


def zero_shot_and_ensemble(clip_model, dataset, class_names, features, config):
    """CLIP as it is, the baselines without training: {"zeroshot": ..., "ensemble": ...}.

    zeroshot: the one template that CoOp uses for the dataset. ensemble, the stronger baseline: the
    features (T, C, D) of all templates, averaged and normalised. Both hold one vector per class.
    """
    template, text_encoder = row_of(dataset).zero_shot, text_encoder_of(config)
    one = template_features(clip_model, [template], class_names, text_encoder)[0]
    mean = F.normalize(features.mean(dim=0), dim=-1)
    vectors, scale = {"zeroshot": one, "ensemble": mean}, clip_model.logit_scale.exp().item()
    return {name: ClassVectors(class_names, v, scale=scale) for name, v in vectors.items()}


def main():
    exit_on_bad_input(lambda: run(*configure()), PromptError)


if __name__ == "__main__":
    main()
