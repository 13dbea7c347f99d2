"""Train a mixture of prompts for CLIP (MoCoOp, arXiv 2409.12011).

    python train.py                                  # the built-in world: no network, 13 seconds
    python train.py --dataset eurosat --shots 4      # downloads CLIP ViT-B/16 and EuroSAT if absent
    python train.py --dataset eurosat --shots 16 --classes base    # then: eval.py RUN --classes new
    python train.py --resume ...                     # go on with the run that the flags name

Each run gets a folder, out/<dataset>/<method>_<shots>shot_<classes>_seed<seed>/, with
`checkpoint.pt` (what was learned), `result.json` (what came out) and `router.png` (which prompt
fires for what). The same flags give the same numbers, bit for bit on a CPU.

    python train.py --method coop                    # a neighbour: see METHODS
    python train.py --router uniform                 # MoCoOp without one of its parts
    torchrun --nproc_per_node 4 train.py ...         # the work of encoding, split

From top to bottom: the flags, the methods as rows of flags, the mixture, the loop, a whole run. To
understand the method, start at `MoCoOp`.
Letters in shapes: B images of a batch, N images, C classes, G prompts, T templates, D features.
"""

import math
from functools import partial

import torch
import torch.nn as nn

import router
from data import class_slice, few_shot_split, full_dataset
from lib import flags, metrics, processes, runs
from lib.catalogue import DATASETS, row_of
from lib.clip_model import load_clip
from lib.errors import BadInput, exit_on_bad_input
from lib.files import full_path
from lib.flags import number
from lib.grouping import group_templates
from lib.image_encoder import SIDES, attach, learnable_part
from lib.images import image_features, training_features
from lib.probe import fit_probe
from lib.progress import NotFinite, Progress
from lib.runs import claimed, save_torch
from lib.templates import all_templates, check_auto, check_init, named_groups
from losses import gate_loss, image_loss, text_loss
from prompts import SoftPrompts, hard_prototypes, template_features, untrained_classifiers
from router import Router, gate_target, mixed_logits

# ---------------------------------------------------------------------------------- the flags
# {section: {flag: (default, what it may be, help)}}, with MoCoOp's published numbers.

FLAGS = {
    "task": {
        "dataset": ("shapes", str, f"one of {', '.join(DATASETS)}; or a folder of yours"),
        "shots": (16, number(int, 1), "training images per class"),
        "classes": ("all", ("all", "base", "new"), "all, the first half, or the rest"),
        "seed": (1, number(int, 0), "of few-shot samples, initial weights, order of images"),
        "method": ("mocoop", str, "sets the flags of the method"),
    },
    "CLIP and templates": {
        "clip": (None, str, "OpenAI name, file, or bundled (default: ViT-B/16; shapes: bundled)"),
        "groups": ("dataset", str, "of templates: the dataset's own, auto (clustered), or a file"),
    },
    "method: prompts": {
        "n_groups": (0, number(int, 0), "of --groups auto; 0: the best silhouette"),
        "one_group": (False, bool, "all templates in one group, so one prompt"),
        "init": ("template", str, "prompts start as their template, random, or as the one given"),
        "full_stop": (False, bool, "prompts end with one, which is not learned, as CoOp's"),
        "conditional": (False, bool, "shift the context for each image, as CoCoOp"),
        "text_bias": (False, bool, "learn a bias on all text features, as LASP"),
        "image_side": ("frozen", SIDES, "what is learned in the image encoder; without a cache"),
    },
    "method: router": {
        "router": ("trained", router.KINDS, "how prompts get their weights"),
        "top_k": (2, number(int, 1), "prompts per image; at most all"),
    },
    "method: losses": {
        "gate_weight": (1.0, number(float, 0), "of the gate loss"),
        "text_weight": (5.0, number(float, 0), "of the text loss"),
        "text_scale": (1.0, number(float, 0), "of similarities in the text loss"),
        "text_target": ("prototypes", ("prototypes", "templates"), "of the text loss"),
    },
    "method: training": {
        "epochs": (50, number(int, 1), "passes over the training images"),
        "warm_up": (5, number(int, 0), "epochs at 1e-5; never more than an eighth of all"),
        "batch_size": (32, number(int, 1), "images per step"),
        "lr": (0.032, number(float, 1e-9), "if not given, it grows with --batch-size"),
        "max_grad_norm": (1.0, number(float, 0), "gradients are clipped to it; 0: they are not"),
        "views": (8, number(int, 1), "stored random crops per training image"),
    },
    "machine": {
        "data": ("data", str, "the root of all datasets"),
        "device": (None, str, "cpu, cuda, cuda:1, ... (default: cuda if there is one)"),
        "chunk": (None, number(int, 1), "sentences at a time (default: what memory allows)"),
        "out": (None, str, "the run's folder (default: out/<dataset>/<run>)"),
        "resume": (False, bool, "go on where this run was stopped"),
    },
}
NOT_PART_OF_A_RUN = FLAGS["machine"].keys()  # how it is computed: others may go on with it

# A method is what it changes in the flags above. The numbers are each paper's own.
ONE_PROMPT = {
    "one_group": True,
    "init": "a photo of a {}.",
    "full_stop": True,
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
LASP = {"text_target": "templates", "text_weight": 10.0, "text_scale": 100.0, "text_bias": True}
METHODS = {
    "mocoop": {},
    "coop": COOP,  # Zhou et al., IJCV 2022
    "cocoop": COOP | {"conditional": True, "epochs": 10, "batch_size": 1},  # Zhou et al., CVPR 2022
    "lasp": ONE_PROMPT | LASP,  # Bulat and Tzimiropoulos, CVPR 2023
    # No prompts to learn, so the flags of "method: ..." mean nothing to these.
    "zeroshot": {"classifier": "zeroshot"},
    "ensemble": {"classifier": "ensemble"},
    "linear": {"classifier": "linear"},
}


def learns_images(config):
    """Whether something in the image encoder is learned, so that features cannot be stored."""
    return config["image_side"] not in (None, "frozen")


# Flags without effect beside others, an error if given: {flag: (when, what it would need)}.
UNREAD = {
    "n_groups": (lambda c: c["groups"] != "auto", "--groups auto"),
    "top_k": (lambda c: c["router"] == "uniform", "a router that chooses"),
    "gate_weight": (lambda c: c["router"] in ("frozen", "uniform"), "a router that is trained"),
    "text_scale": (lambda c: c["text_weight"] == 0, "a --text-weight"),
    "text_target": (lambda c: c["text_weight"] == 0, "a --text-weight"),
    "views": (
        lambda c: learns_images(c) or row_of(c["dataset"]).layout == "world",
        "stored crops: --image-side crops in every epoch, drawn images are not cropped",
    ),
}


def preset(config):
    """The method's default for every flag it has: {flag: value}.

    `classifier` is no flag: `prompts`, unless the method's row says otherwise.
    """
    row = METHODS[config["method"]]
    own = {"classifier": "prompts", "clip": row_of(config["dataset"]).clip, "groups": "dataset"}
    if "classifier" in row:
        return own | row
    row = own | flags.method_defaults(FLAGS) | row
    # The default rate is for the default batch; for others it changes in proportion.
    row["lr"] *= (config["batch_size"] or row["batch_size"]) / row["batch_size"]
    if isinstance(row["epochs"], dict):
        shots = 1 if config["dataset"] == "imagenet" else config["shots"]
        row["epochs"] = row["epochs"][max(n for n in row["epochs"] if n <= shots)]
    return row


def resolve(args):
    """Flags and preset together: (config, groups, run folder, resume?).

    config: every flag with its final value, as it goes to `result.json`; None where the method has
    no such flag. groups: lists of templates, not yet regrouped by `--groups auto`.
    Raises BadInput for flags that do not fit together.
    """
    config = vars(args).copy()
    resume = config.pop("resume")
    config["dataset"] = full_dataset(config["dataset"])
    config["clip"] = full_path(config["clip"], but=["bundled"])
    config["groups"] = full_path(config["groups"], but=["dataset", "auto"])
    defaults = preset(config)
    config = flags.complete(config, defaults, FLAGS, UNREAD)
    check_init(config["init"])
    if config["groups"] == "auto":
        check_auto(config, args.one_group)
    groups = named_groups(config["groups"], config["dataset"], config["one_group"])
    if config["groups"] != "auto":
        check_top_k(args.top_k, groups)
    label = flags.label(config["method"], flags.changed(config, defaults))
    folder = runs.run_folder(config, label)
    return config | {"out": str(folder)}, groups, folder, resume


def check_top_k(top_k, groups):
    if top_k and top_k > len(groups):
        raise BadInput(f"--top-k {top_k} is above the number of prompts, {len(groups)}")


# --------------------------------------------------------------------------------- the mixture


class MoCoOp(nn.Module):
    """Soft prompts, a router over them, and the frozen CLIP that reads them.

    With one prompt and the image loss alone, this is CoOp.
    """

    images_at_once = 1024  # in `logits`

    def __init__(self, clip_model, groups, config):
        """groups: lists of templates, one soft prompt each. config: the flags of FLAGS."""
        super().__init__()
        # Attached, not registered: CLIP is in no state_dict and not among the parameters, and
        # train() does not reach it.
        self.__dict__["clip_model"] = clip_model
        width = clip_model.text_projection.shape[1]
        templates = [group[0] for group in groups]
        if len(groups) == 1 and "{}" in config["init"]:
            templates = [config["init"]]  # a single prompt is named by what it started from
        top_k = min(config["top_k"], len(groups))
        self.prompts = SoftPrompts(clip_model, templates, config["init"], config["full_stop"])
        self.router = Router(width, len(groups), top_k, config["router"])
        self.templates, self.top_k = templates, self.router.top_k
        self.text_bias = nn.Parameter(torch.zeros(1, width)) if config["text_bias"] else None
        self.image_side = learnable_part(clip_model, config["image_side"])
        self.logit_scale = clip_model.logit_scale.exp().item()  # CLIP's, frozen
        self.chunk = config["chunk"]

    def set_classes(self, class_names):
        self.prompts.set_classes(self.clip_model, class_names, self.chunk)

    def forward(self, image_features, classes=slice(None), text_features=None, only=None):
        """image_features (B, D) -> gate logits (B, G), weights (B, G), text features (G, C, D) of
        all classes, logits (B, C') of `classes`, a slice of them.

        text_features: to use instead of computing them. only: None, or "selected" to encode none
        but the prompts that an image of the batch selected.
        """
        gate_logits, weights = self.router(image_features)
        if text_features is None:
            if only == "selected":
                only = weights.any(dim=0).nonzero().flatten().tolist()
            text_features = self.text_features(image_features, only)
        own = text_features[..., classes, :]
        logits = mixed_logits(image_features, own, weights, self.logit_scale)
        return gate_logits, weights, text_features, logits

    def text_features(self, image_features=None, only=None, shift=None):
        """t[g, c] of the classes that `set_classes` was given last: (G, C, D).

        image_features: only for `ConditionalMoCoOp`. only, shift: see `SoftPrompts`.
        """
        device = self.clip_model.logit_scale.device
        dtype = processes.mixed_dtype(device) if self.training else torch.float32
        return self.prompts.text_features(self.clip_model, self.text_bias, shift, only, dtype)

    @torch.no_grad()
    def logits(self, class_names, image_features):
        """Yields class logits (N, C) and prompt weights (N, G) of some images (N, D) at a time."""
        self.eval()
        self.set_classes(class_names)
        text_features = self.text_features()  # once for all images
        n_at_once = max(1, 2**20 // (len(self.templates) * len(class_names)))  # bounds (B, G, C)
        for f in image_features.split(min(self.images_at_once, n_at_once)):
            _, weights, _, logits = self(f, text_features=text_features)
            yield logits, weights

    def predict(self, class_names, image_features):
        """Predicted labels (N,) and prompt weights (N, G) of images (N, D), for any classes."""
        return metrics.predictions(self.logits(class_names, image_features))

    def parameter_groups(self):
        """What is trained, as an optimiser takes it; `factor`: times the learning rate, which is a
        tenth for LayerNorms, as published."""
        slow = isinstance(self.image_side, nn.ModuleList)  # of LayerNorms
        parts = {1.0: [], 0.1: []}
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                parts[0.1 if slow and name.startswith("image_side.") else 1.0].append(parameter)
        return [{"params": params, "factor": f} for f, params in parts.items() if params]


class ConditionalMoCoOp(MoCoOp):
    """The mixture with CoCoOp's network on top: for each image it shifts all context vectors.

    Text features are then (B, G, C, D), one set per image.
    """

    images_at_once = 64

    def __init__(self, clip_model, groups, config):
        super().__init__(clip_model, groups, config)
        text_width, width = clip_model.text_projection.shape
        self.shift = nn.Sequential(
            nn.Linear(width, width // 16), nn.ReLU(), nn.Linear(width // 16, text_width)
        )

    def text_features(self, image_features=None, only=None):
        if image_features is None:
            return None  # none that all images share: `forward` computes them for each
        return super().text_features(only=only, shift=self.shift(image_features))


def make_model(clip_model, groups, config):
    kind = ConditionalMoCoOp if config["conditional"] else MoCoOp
    return kind(clip_model, groups, config).to(clip_model.logit_scale.device)


# ------------------------------------------------------------------------------------ training


def learning_rate(epoch, epochs, lr, warm_up):
    """The rate of an epoch, counted from 0: a constant warm-up, then a cosine.

    As in the field's scheduler the cosine starts after the warm-up but is stretched over all
    epochs, so it is cut off before it reaches zero.
    """
    warm_up = min(warm_up, round(epochs / 8))
    if epoch < warm_up:
        return 1e-5
    return lr * 0.5 * (1 + math.cos(math.pi * (epoch - warm_up) / epochs))


def fit(model, config, groups, hard_features, seen, load_features, labels, save, state=None):
    """Trains `model` in place. Returns the seconds it took, over all resumed parts, and the share
    of each prompt in every epoch.

    hard_features: (T, C, D), of all templates of `groups` with the model's classes. seen: the slice
    of these classes that has images; the image and gate loss see no other. load_features: see
    `training_features`. labels: (N,), counted within the seen classes. save: called after each
    epoch with what is needed to go on; state: one of these, to go on from there.
    """
    prototypes = hard_prototypes(hard_features, groups)  # (G, C, D)
    # The text loss compares each soft prompt with its prototype or, as LASP, with each template of
    # its group: soft prompt prompt_of[i] with text_targets[i].
    text_targets, prompt_of = prototypes, None
    if config["text_target"] == "templates":
        text_targets = hard_features
        owners = [g for g, group in enumerate(groups) for _ in group]
        prompt_of = torch.tensor(owners, device=labels.device)
    guided = config["gate_weight"] and any(p.requires_grad for p in model.router.parameters())
    # Without the text loss nobody reads the prompts that no image of the batch selected. To ask a
    # GPU which those are would make it wait.
    on_cpu = labels.device.type == "cpu"
    only = "selected" if on_cpu and not config["text_weight"] else None

    torch.manual_seed(config["seed"])  # for whatever draws in training
    order_rng = torch.Generator().manual_seed(config["seed"])
    optimiser = torch.optim.SGD(
        model.parameter_groups(),
        lr=config["lr"],
        momentum=0.9,
        weight_decay=5e-4,
        fused=labels.is_cuda,
    )
    # bf16 has the range of fp32, fp16 has not.
    needs_scaling = processes.mixed_dtype(labels.device) is torch.float16
    scaler = torch.amp.GradScaler(enabled=needs_scaling)
    n = len(labels)
    n_batches = max(1, n // config["batch_size"])  # the last, incomplete one is dropped
    parts = {"model": model, "optimiser": optimiser, "scaler": scaler, "order": order_rng}
    progress = Progress(parts, config["epochs"], n_batches, save, state)
    model.train()
    for epoch in progress.epochs():
        rate = partial(learning_rate, epoch, config["epochs"], warm_up=config["warm_up"])
        for part in optimiser.param_groups:
            part["lr"] = rate(config["lr"] * part["factor"])
        order = torch.randperm(n, generator=order_rng)
        views = torch.randint(load_features.n_views, (n,), generator=order_rng)
        batches = order.split(config["batch_size"])[:n_batches]
        own_labels = labels[order.to(labels.device)].split(config["batch_size"])
        for f, y in zip(load_features(batches, views, epoch), own_labels):  # (B, D), (B,)
            gate_logits, weights, text_features, logits = model(f, seen, only=only)

            losses = {"image": (1.0, image_loss(logits, y))}  # name: (weight, value)
            if guided:
                target = gate_target(f.detach(), prototypes[:, seen], y, model.router.top_k)
                losses["gate"] = config["gate_weight"], gate_loss(gate_logits, target)
            if config["text_weight"]:
                soft = text_features
                if prompt_of is not None:
                    soft = soft.index_select(-3, prompt_of)
                value = text_loss(soft, text_targets, config["text_scale"])
                losses["text"] = config["text_weight"], value
            total = sum(weight * value for weight, value in losses.values())

            optimiser.zero_grad()
            scaler.scale(total).backward()
            scaler.unscale_(optimiser)
            if config["max_grad_norm"]:
                nn.utils.clip_grad_norm_(model.parameters(), config["max_grad_norm"])
            scaler.step(optimiser)
            scaler.update()
            progress.step(losses, weights)
        progress.end_epoch(rate(config["lr"]))
    return progress.seconds, progress.usage


# ---------------------------------------------------------------------------------- a whole run


def train(config, groups, folder, resume):
    """One run, from flags to files, alone in its folder."""
    device = processes.choose_device(config["device"])
    processes.join(device)
    with claimed(folder):
        train_here(config, groups, folder, resume, device)
    processes.leave()


def train_here(config, groups, folder, resume, device):
    """The run itself: data, CLIP, baselines, training, results."""
    state = runs.open_run(folder, config, resume, preset(config), NOT_PART_OF_A_RUN)
    whole, split = few_shot_split(config)
    if config["classifier"] == "linear" and not split.val:
        raise BadInput("--method linear chooses its strength on val images: there are none")
    clip_model, fingerprint = processes.first(lambda: load_clip(config["clip"], device))

    names, seen = split.class_names, slice(None)  # seen: which of the names have images
    if config["text_weight"]:  # the text loss holds on to every class name
        names = whole.class_names
        seen = class_slice(len(names), config["classes"])
    if config["groups"] == "auto":
        templates = all_templates(groups)
        features = template_features(clip_model, templates, names, config["chunk"])
        groups = group_templates(templates, features, config["n_groups"])
        if config["top_k"] != preset(config)["top_k"]:  # the default is lowered where it must be
            check_top_k(config["top_k"], groups)
    hard_features = template_features(clip_model, all_templates(groups), names, config["chunk"])
    torch.manual_seed(config["seed"])
    model = None
    if config["classifier"] == "prompts":
        model = make_model(clip_model, groups, config)
        model.set_classes(names)
    made_of = runs.check_made_of(folder, state, [groups, fingerprint, names, split.train])
    runs.announce(config, split, model, bool(row_of(split.dataset).templates))

    encode = partial(image_features, clip_model, fingerprint, split)
    test, val = encode(split.test, what="test images"), encode(split.val, what="val images")
    own_features = hard_features[:, seen]
    probes = untrained_classifiers(clip_model, split.dataset, split.class_names, own_features)
    zero_shot, ensemble = (accuracy_on(probe, split, split.test, test) for probe in probes.values())
    print(f"before training: zero-shot {zero_shot:.2f} %, ensemble {ensemble:.2f} %")

    def save(snapshot):
        save_torch({"config": config, "made_of": made_of, **snapshot}, folder / "resume.pt")

    seconds, usage = 0.0, []
    labels = [split.labels(items).to(device) for items in (split.train, split.val)]
    if config["classifier"] == "prompts":
        views, live = split.views(config["views"]), learns_images(config)
        attach(clip_model, model.image_side)  # not before: baselines are CLIP's as it was
        features = training_features(clip_model, fingerprint, split, views, live)
        try:
            seconds, usage = fit(
                model, config, groups, hard_features, seen, features, labels[0], save, state
            )
        except NotFinite:  # what it has saved would diverge again
            if processes.rank() == 0:
                runs.discard(folder)
            raise
        if live:  # the encoder is another one now
            test = encode(split.test, what="test images", cached=False)
            val = encode(split.val, what="val images", cached=False)
    elif config["classifier"] == "linear":
        encode = partial(encode, raw=True)
        stored = encode(split.train, what="training images")
        test, val = encode(split.test, what="test images"), encode(split.val, what="val images")
        model, seconds = fit_probe(split.class_names, stored, val, *labels)
    else:
        model = probes[config["classifier"]]

    changed = flags.changed(config, preset(config))
    measured, *_ = examine(model, config, changed, split, config["classes"], test)
    result = measured | {
        "n_train": len(split.train),
        "few_shot_samples": split.samples,
        "zero_shot_accuracy": zero_shot,
        "ensemble_accuracy": ensemble,
        "val_accuracy": accuracy_on(model, split, split.val, val),
        "prompt_usage_by_epoch": usage,
        "train_seconds": round(seconds, 2),
        "config": config,
    }
    learned = {"groups": groups, "clip_fingerprint": fingerprint, "model": model.state_dict()}
    checkpoint = {"config": config, "class_names": split.class_names, **learned}
    if processes.rank() == 0:
        runs.publish(folder, checkpoint, result)


def examine(model, config, changed_flags, split, classes, features):
    """A model on the test images of a split: (what `result.json` says of it, predicted labels (N,),
    prompt weights (N, G)). features: (N, D)."""
    predictions, weights = (x.cpu() for x in model.predict(split.class_names, features))
    labels = split.labels(split.test)
    numbers = {
        "accuracy": metrics.accuracy(predictions, labels),
        "per_class_accuracy": metrics.per_class_accuracy(predictions, labels, split.class_names),
        "prompt_usage": metrics.prompt_usage(weights, model.templates),
        "router": metrics.usage_by_kind(weights, *split.kinds),
    }
    described = runs.describe(config, changed_flags, model, split, classes)
    return described | numbers, predictions, weights


def accuracy_on(model, split, items, features):
    """Top-1 accuracy in percent of a model on items of a split; None for none. features: (N, D)."""
    if not items:
        return None
    predictions, _ = model.predict(split.class_names, features)
    return metrics.accuracy(predictions, split.labels(items))


def main():
    parser = flags.make_parser(__doc__.split("\n")[0], FLAGS, METHODS)
    exit_on_bad_input(lambda: train(*resolve(parser.parse_args())))


if __name__ == "__main__":
    main()
