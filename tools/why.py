"""Why the mixture does what it does on classes and styles that it has not seen.

    python -m tools.why RUN      # a finished run of mocoop or coop

Takes a trained mixture apart and puts other parts in their place: hand-written prototypes for its
prompts, equal weights or the gate's own target for its router. Writes `why.json` into the run's
folder; `tools.reproduce` does it for its runs and makes tables of it.
"""

from pathlib import Path

import torch

from data import load_split, select_classes
from eval import load_run
from lib.errors import BadInput, exit_on_bad_input
from lib.flags import Parser
from lib.images import image_features
from lib.metrics import accuracy
from lib.runs import save_json
from lib.templates import all_templates
from prompts import hard_prototypes, template_features
from router import gate_target, mixed_logits
from train import learns_images


@torch.no_grad()
def take_apart(run, split):
    """Numbers of a run on the test images of a split: {"accuracy": {parts: percent}, "gate": {...},
    "classes": {...}}."""
    clip_model, model = run.clip_model, run.model
    cached = not learns_images(run.config)
    f = image_features(
        clip_model, run.fingerprint, split, split.test, what="test images", cached=cached
    )
    labels = split.labels(split.test)
    hard = template_features(clip_model, all_templates(run.groups), split.class_names)
    prototypes = hard_prototypes(hard, run.groups)  # (G, C, D)
    model.set_classes(split.class_names)
    soft = model.text_features()  # (G, C, D)
    gate_logits, weights = model.router(f)

    routings = {
        "router": weights,
        "equal weights": torch.full_like(weights, 1 / weights.shape[1]),
        "target": gate_target(f, prototypes, labels, model.top_k),  # it knows the labels
    }
    texts = {"prompts": soft, "prototypes": prototypes, "half and half": (soft + prototypes) / 2}
    found = {}
    for routing, w in routings.items():
        for text, t in texts.items():
            logits = mixed_logits(f, t, w, model.logit_scale)
            found[f"{routing}, {text}"] = accuracy(logits.argmax(dim=-1), labels)
    return {
        "accuracy": found,
        "gate": {  # of 1 and log(G) nats at most
            "best prompt's share": gate_logits.softmax(dim=-1).amax(dim=-1).mean().item(),
            "entropy": torch.distributions.Categorical(logits=gate_logits).entropy().mean().item(),
        },
        "classes": {
            "cosine of two classes, prompts": _between_classes(soft),
            "cosine of two classes, prototypes": _between_classes(prototypes),
            "cosine of prompt and prototype": (soft * prototypes).sum(dim=-1).mean().item(),
        },
    }


def _between_classes(text_features):
    """The mean cosine of two different classes of one prompt. (G, C, D)."""
    cosines = text_features @ text_features.transpose(-1, -2)  # (G, C, C)
    n = cosines.shape[-1]
    return ((cosines.sum() - n * len(cosines)) / (len(cosines) * n * (n - 1))).item()


def why(folder, datasets=()):
    """`why.json` of a run: on its own classes, on the new ones if these are the base, and on all
    classes of further datasets. Returns its dictionary."""
    run = load_run(folder)
    config = run.config
    if config["classifier"] != "prompts" or config["conditional"]:
        raise BadInput(
            f"{folder} is a run of {config['method']}: there is no mixture to take apart"
        )
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
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("run", help="the folder of a finished run")
    for name, part in why(parser.parse_args().run).items():
        print(name)
        for numbers in part.values():
            for key, value in numbers.items():
                print(f"  {key:40} {value:.2f}")


if __name__ == "__main__":
    exit_on_bad_input(run_command_line)
