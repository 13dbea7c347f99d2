"""Why the mixture does what it does on classes and styles that it has not seen.

    python -m tools.why RUN      # a finished run of mocoop or coop

Replaces parts of a trained mixture: its prompts with hand-written prototypes, its router with
equal weights or the gate's own target. Writes `why.json` into the run's folder. `tools.reproduce`
does so for its runs and makes tables of the results.
"""

import lib.start  # noqa: F401  # isort: skip, before PyTorch

from pathlib import Path

import torch

from data import load_split, select_classes
from eval import load_run
from lib.catalogue import all_templates
from lib.errors import BadInput, exit_on_bad_input
from lib.features import image_features
from lib.files import save_json
from lib.results import accuracy
from lib.settings import Parser
from prompts import hard_prototypes, template_features
from router import GATE_TARGETS, mixed_logits
from train import BASELINES, learns_images, text_encoder_of


@torch.no_grad()
def take_apart(run, split):
    """Evaluates a run with parts replaced on the test images of a split:
    {"accuracy": {parts: percent}, "gate": {...}, "classes": {...}}."""
    model, names, labels = run.model, split.class_names, split.labels(split.test)
    cached = not learns_images(run.config)
    f = image_features(
        run.clip_model, run.fingerprint, split, split.test, what="test images", cached=cached
    )
    templates = all_templates(run.groups)
    hard = template_features(run.clip_model, templates, names, text_encoder_of(run.config))
    prototypes = hard_prototypes(hard, run.groups)  # (G, C, D)
    soft = model.text_features(names)  # (G, C, D)
    gate_logits, weights = model.router(f)
    gate_target = GATE_TARGETS["label"]

    routings = {
        "router": weights,
        "equal weights": torch.full_like(weights, 1 / weights.shape[1]),
        "target": gate_target(f, prototypes, labels, model.top_k),  # it uses the labels
    }
    texts = {"prompts": soft, "prototypes": prototypes, "half and half": (soft + prototypes) / 2}
    found = {}
    for routing, w in routings.items():
        for text, t in texts.items():
            logits = mixed_logits(f, t, w, model.logit_scale)
            found[f"{routing}, {text}"] = accuracy(logits.argmax(dim=-1), labels)
    gate = torch.distributions.Categorical(logits=gate_logits)
    return {
        "accuracy": found,
        "gate": {  # at most 1 and log(G) nats
            "best prompt's share": gate.probs.amax(dim=-1).mean().item(),
            "entropy": gate.entropy().mean().item(),
        },
        "classes": {
            "cosine of two classes, prompts": _between_classes(soft),
            "cosine of two classes, prototypes": _between_classes(prototypes),
            "cosine of prompt and prototype": (soft * prototypes).sum(dim=-1).mean().item(),
        },
    }


def _between_classes(text_features):
    """The mean cosine between two different classes of the same prompt. (G, C, D)."""
    cosines = text_features @ text_features.transpose(-1, -2)  # (G, C, C)
    n = cosines.shape[-1]
    return ((cosines.sum() - n * len(cosines)) / (len(cosines) * n * (n - 1))).item()


def why(folder, datasets=()):
    """Writes a run's `why.json`: for its own classes, for a base run also the new ones, and for all
    classes of further datasets. Returns its content."""
    run = load_run(folder)
    config = run.config
    if config["method"] in BASELINES or config["conditional"]:
        raise BadInput(f"{folder} is a run of {config['method']}: it has no mixture to take apart")
    own = ("base", "new") if config["classes"] == "base" else (config["classes"],)
    tasks = {classes: (config["dataset"], classes) for classes in own}
    tasks |= {dataset: (dataset, "all") for dataset in datasets}
    found = {}
    for name, (dataset, classes) in tasks.items():
        split = select_classes(load_split(dataset, config["data"]), classes)
        found[name] = take_apart(run, split)
    save_json(found, Path(folder) / "why.json")
    return found


def run_command_line():
    parser = Parser(__doc__)
    parser.add_argument("run", help="the folder of a finished run")
    for name, part in why(parser.parse_args().run).items():
        print(name)
        for numbers in part.values():
            for key, value in numbers.items():
                print(f"  {key:40} {value:.2f}")


if __name__ == "__main__":
    exit_on_bad_input(run_command_line)
