"""Federated learning of a mixture of prompts: pFedMoAP (arXiv 2410.10114, ICLR 2025).

    python -m forks.pfedmoap                         # 5 clients of the built-in world, a minute
    python -m forks.pfedmoap --dataset eurosat --clients 5 --experts 5
    python -m forks.pfedmoap --choice random         # experts drawn at random

Clients hold images of different classes and may not show them to each other. Each learns one
prompt, as in CoOp, and sends only its vectors, a few kilobytes. A client downloads the prompts of
others as fixed *experts*, and learns an attention that mixes their text features with its own:

    own prompt (learned)    -> t (C, D) -> f . t ------------------------------------+-> logits
    experts' prompts (fixed) -> t (E - 1, C, D) -> attention (learned) -> m -> f . m -+   (B, C)

Beside it, the same prompts are trained without experts: `local`, where every client stays alone,
and `averaged`, where all of them use the mean of their prompts (PromptFL).

The authors' code (ljaiverson/pFedMoAP) has one optimiser and schedule for all clients, and later
clients of a round see the prompts that earlier ones have just sent. Here a client has an optimiser
and a schedule of its own in each round, and sees the prompts of the round before.

Dimensions: B images, C classes of all clients, E experts, the client's own prompt first, D
features, d of them read by the attention, H heads, P numbers of a prompt.
"""

import lib.start  # noqa: F401  # isort: skip, before PyTorch

import random

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from forks import main
from lib.errors import BadInput, finite
from lib.features import training_features
from lib.results import accuracy, markdown
from prompts import SoftPrompts
from train import learning_rate, shuffled, text_encoder_of

# fmt: off
OWN = {
    "clients": (10, 2, "number of clients, to which the classes are dealt out"),
    "rounds": (10, 1, "number of times that prompts are exchanged"),
    "epochs": (5, 1, "number of passes over a client's images in each round"),
    "experts": (10, 2, "number of prompts that a client mixes, its own included"),
    "choice": ("nearest", ("nearest", "random"), "whose prompts are a client's experts"),
    "width": (128, 1, "number of a feature's components that the attention reads"),
    "heads": (8, 1, "number of heads of the attention"),
    "scaling": (10.0, 0, "factor of the attention's scores"),
    "own_weight": (0.5, 0, "weight of the logits from the client's own prompt alone"),
    "init": ("random", None, "initial words: random vectors, or a template"),
    "batch_size": (16, 1, "number of images per step"),
    "lr": (0.002, 1e-9, "learning rate of the prompts"),
    "attention_lr": (0.01, 1e-9, "learning rate of the attention"),
    "views": (8, 1, "number of random crops per training image"),
}
# fmt: on
WORLD = {"clients": 5, "experts": 3, "width": 32, "heads": 4}  # with 20 classes and 128 features
KINDS = "local", "averaged", "pfedmoap"
DEALT = 2023  # the authors' seed for the order of the classes, whatever --seed is

# ----------------------------------------------------------------------------------- the mixture


def pool(features, width):
    """Every (D / d)-th component of features (..., D), not normalised again: (..., d)."""
    return features[..., :: features.shape[-1] // width]


class Client(nn.Module):
    """A client's prompt, and its attention from an image to the text features of experts."""

    def __init__(self, clip_model, class_names, config):
        super().__init__()
        how = config["init"], True, text_encoder_of(config)  # True: it ends with a full stop
        self.prompts = SoftPrompts(clip_model, ["a photo of a {}."], class_names, *how)
        layers = [nn.Linear(config["width"], config["width"]) for _ in range(4)]
        self.attention = nn.ModuleList(layers)  # query, key, value, output
        self.scale, self.config = clip_model.logit_scale.exp().item(), config

    def forward(self, f, experts=None):
        """f (B, D) -> class logits (B, C). experts: pooled text features of other prompts, (E - 1,
        C, d); without any, this is CoOp."""
        (own,) = self.prompts.text_features()  # (C, D)
        logits = self.scale * f @ own.T
        if experts is None:
            return logits
        c, (query, key, value, output) = self.config, self.attention
        f, own = pool(f, c["width"]), pool(own, c["width"])
        texts = torch.cat([own[None], experts])  # (E, C, d)
        layers = (query, f), (key, texts), (value, texts)
        q, k, v = (layer(x).unflatten(-1, (c["heads"], -1)) for layer, x in layers)
        scores = c["scaling"] * torch.einsum("bhw,echw->bche", q, k)
        mixed = torch.einsum("bche,echw->bchw", scores.softmax(dim=-1), v)
        m = output(mixed.flatten(2))  # (B, C, d)
        return c["own_weight"] * logits + self.scale * torch.einsum("bd,bcd->bc", f, m)


def choose_experts(client, prompts, n, choice, rng):
    """The n clients whose prompts a client mixes with its own: the nearest by Euclidean distance,
    or random ones. prompts: the last one of each client, (clients, P)."""
    distance = (prompts - prompts[client]).norm(dim=1)
    if choice == "random":
        distance = torch.rand(len(prompts), generator=rng)
    distance[client] = torch.inf
    return distance.argsort()[:n]


# ---------------------------------------------------------------------------------- the training


def deal(labels, n_classes, n_clients):
    """The images of each client, as indices: the shuffled classes are cut into equal shares.
    labels: (N,)."""
    order = list(range(n_classes))
    random.Random(DEALT).shuffle(order)
    client_of = torch.tensor(order).argsort() * n_clients // n_classes  # (C,)
    return [(client_of[labels.cpu()] == i).nonzero().flatten() for i in range(n_clients)]


def train_client(model, experts, images, labels, own, rng):
    """A client's part of a round: trains its prompt and, if it has experts, its attention.

    images: the training images of all clients, `lib.features.CachedImages`. labels: theirs, (N,).
    own: the indices of this client's. rng: draws the order of its images and their crops.
    """
    groups = [{"params": part.parameters()} for part in (model.prompts, model.attention)]
    config = model.config
    how = {"lr": config["attention_lr"], "momentum": 0.9, "weight_decay": 5e-4}
    optimiser = torch.optim.SGD(groups, **how)
    for epoch in range(config["epochs"]):
        # The prompt's rate: an epoch of warm-up, then the cosine. The attention's is constant.
        rate = learning_rate(config["lr"], epoch, config["epochs"], 1)
        optimiser.param_groups[0]["lr"] = rate
        batches = [own[batch] for batch in shuffled(len(own), config["batch_size"], rng)]
        views = torch.randint(images.n_views, (len(labels),), generator=rng)
        for batch, f in zip(batches, images.batches(batches, views, epoch)):
            loss = F.cross_entropy(model(f, experts), labels[batch.to(labels.device)])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()


def federate(kind, model, images, labels, test):
    """All rounds of one kind. Returns the accuracy in percent of each client on its own classes,
    and what each has learned, (clients, P + parameters of the attention).

    model: a fresh `Client`. images, labels: as in `train_client`. test: features and labels of each
    client's test images.
    """
    c, n, n_classes = model.config, model.config["clients"], len(model.prompts.class_names)
    own, rng = deal(labels, n_classes, n), torch.Generator().manual_seed(c["seed"])
    share = torch.tensor([len(indices) / len(labels) for indices in own], device=labels.device)
    state = parameters_to_vector(model.parameters()).detach().repeat(n, 1)
    prompt = slice(sum(p.numel() for p in model.prompts.parameters()))  # the part that is sent

    def load(vector):
        vector_to_parameters(vector.clone(), model.parameters())
        return model

    for number in range(1, c["rounds"] + 1):
        begin, experts = state.clone(), n * [None]
        if kind == "pfedmoap":
            begin[:, prompt] = share @ state[:, prompt]  # the server's average
        if kind == "pfedmoap" and number > 1:  # nothing is sent before the first round
            with torch.no_grad():
                texts = torch.stack([load(v).prompts.text_features()[0] for v in state])
            how = state[:, prompt], c["experts"] - 1, c["choice"], rng
            experts = [pool(texts[choose_experts(i, *how)], c["width"]) for i in range(n)]
        for i in range(n):
            train_client(load(begin[i]), experts[i], images, labels, own[i], rng)
            state[i] = finite(parameters_to_vector(model.parameters()).detach(), "the parameters")
        if kind == "averaged":
            state[:, prompt] = share @ state[:, prompt]
        with torch.no_grad():
            answers = [load(v)(f, e).argmax(-1) for v, (f, _), e in zip(state, test, experts)]
        percents = [accuracy(answer, y.cpu()) for answer, (_, y) in zip(answers, test)]
        print(f"{kind:8}  round {number:3d}/{c['rounds']}  {mean(percents):.2f} %", flush=True)
    return percents, state


def mean(percents):
    return round(sum(percents) / len(percents), 2)


def learn(task):
    """Trains all kinds on the same images, and prints the accuracy of each client. Returns what
    `forks.run` expects."""
    c, f, labels = task.config, task.features("test"), task.labels("test")
    n, width, n_classes = c["clients"], c["width"], len(task.names)
    if not c["experts"] <= n <= n_classes:
        raise BadInput(f"--clients {n} must lie between --experts and the {n_classes} classes")
    if f.shape[1] % width or width % c["heads"]:
        raise BadInput(f"--width {width} must divide {f.shape[1]}, and --heads must divide it")
    test = [(f[i], labels[i]) for i in deal(labels, n_classes, n)]
    clip = task.clip_model, task.fingerprint
    images = training_features(*clip, task.split, c["views"], live=False)
    percents, learned = {}, {}
    for kind in KINDS:
        torch.manual_seed(c["seed"])
        model = Client(task.clip_model, task.names, c).to(f.device)
        percents[kind], learned[kind] = federate(kind, model, images, task.labels("train"), test)
    clients = [[i, *of] for i, of in enumerate(zip(*percents.values()))]
    means = [mean(of) for of in percents.values()]
    print(markdown([["client", *percents], *clients, ["mean", *means]]))
    classes = f"all, by {n} clients"  # so that tables keep it apart from other runs on all classes
    return {"classes": classes, "accuracy": means[-1], "clients": percents}, learned


if __name__ == "__main__":
    main("pfedmoap", OWN, WORLD, __doc__, learn)
