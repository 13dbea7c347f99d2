"""Federated learning of a mixture of prompts: pFedMoAP (arXiv 2410.10114, ICLR 2025).

    python -m forks.pfedmoap                         # 5 clients of the built-in world, a minute
    python -m forks.pfedmoap --dataset eurosat --clients 5 --experts 5
    python -m forks.pfedmoap --choice random         # experts drawn at random

Clients hold images of different classes and may not show them to each other. Each learns one
prompt, as in CoOp, and sends only its vectors, tens of kilobytes. A client downloads the prompts of
others as fixed *experts*, and learns an attention that mixes their text features with its own:

    own prompt (learned)     -> t (C, D) -> f . t -----------------------------------+-> logits
    experts' prompts (fixed) -> t (E - 1, C, D) -> attention (learned) -> m -> f . m -+   (B, C)

For comparison, the same prompts are also trained without experts: `local`, where every client stays
alone, and `averaged`, where all of them use the mean of their prompts (PromptFL).

The authors' code (ljaiverson/pFedMoAP) has one optimiser and schedule for all clients, and later
clients of a round see the prompts that earlier ones have just sent. Here a client has an optimiser
and a schedule of its own in each round, and sees the prompts of the round before. All clients take
part in every round.

Dimensions: B images, C classes of all clients, E experts, the client's own prompt first, D
features, d of them read by the attention, H heads, P numbers of a prompt.
"""

import lib.start  # noqa: F401  # isort: skip, before PyTorch

import random
from statistics import mean

import torch
import torch.nn as nn
import torch.nn.functional as F

from forks import main
from lib.errors import BadInput
from lib.features import training_features
from lib.results import accuracy, markdown
from train import MoCoOp, learning_rate, shuffled

# fmt: off
OWN = {
    "clients": (10, 2, "number of clients; each gets an equal share of the classes"),
    "rounds": (10, 1, "number of rounds; experts arrive from the second one on"),
    "epochs": (5, 1, "number of passes over a client's images in each round"),
    "experts": (10, 2, "number of prompts that a client mixes, its own included"),
    "choice": ("nearest", ("nearest", "random"), "how a client's experts are chosen"),
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

# ------------------------------------------------------------------------------------- a client


class Client(MoCoOp):
    """A client: its images, its prompt as in CoOp, and an attention that mixes in experts."""

    experts = None  # text features of other clients' prompts, (E - 1, C, D)
    images_at_once = 64  # in `logits`; the mixture has d numbers for each image and class

    def __init__(self, task, images, classes):
        """images: (features (N, views, D), labels (N,)) of all clients' training images, and
        (features (N, D), labels (N,)) of their test images. classes: its own."""
        c = task.config
        torch.manual_seed(c["seed"])  # all clients start alike
        super().__init__(task.clip_model, [["a photo of a {}."]], task.names, c)
        # Query, key, value and output.
        self.attention = nn.ModuleList(nn.Linear(c["width"], c["width"]) for _ in range(4))
        parts = ([x[torch.isin(y, classes.to(y))] for x in (f, y)] for f, y in images)
        (self.f, self.labels), (self.test_f, self.test_labels) = parts
        self.to(self.f.device)

    def forward(self, f, **how):
        """As `MoCoOp.forward`, with the mixture's logits (B, C)."""
        outputs = super().forward(f, **how)
        if self.experts is None:
            return outputs
        c = self.config
        texts = torch.cat([outputs.text_features, self.experts])  # (E, C, D)
        step = f.shape[1] // c["width"]  # between the components that are read
        texts = texts[..., ::step]  # (E, C, d), not normalised again
        pooled = f[:, ::step]  # (B, d)
        query, key, value, output = self.attention
        qkv = query(pooled), key(texts), value(texts)
        q, k, v = (x.unflatten(-1, (c["heads"], -1)) for x in qkv)
        scores = c["scaling"] * torch.einsum("bhw,echw->bche", q, k)
        mixed = torch.einsum("bche,echw->bchw", scores.softmax(dim=-1), v)
        m = output(mixed.flatten(2))  # (B, C, d)
        of_experts = self.logit_scale * torch.einsum("bd,bcd->bc", pooled, m)
        return outputs._replace(logits=c["own_weight"] * outputs.logits + of_experts)

    def learn(self):
        """A round's training, of the prompt and, with experts, of the attention."""
        c = self.config
        f = self.f
        parts = [{"params": part.parameters()} for part in (self.prompts, self.attention)]
        optimiser = torch.optim.SGD(parts, lr=c["attention_lr"], momentum=0.9, weight_decay=5e-4)
        for epoch in range(c["epochs"]):
            # An epoch of warm-up (none with fewer than 5), then the cosine. The attention's rate
            # is constant.
            optimiser.param_groups[0]["lr"] = learning_rate(c["lr"], epoch, c["epochs"], 1)
            for batch in shuffled(len(f), c["batch_size"], None):
                view = torch.randint(f.shape[1], batch.shape)
                loss = F.cross_entropy(self(f[batch, view]).logits, self.labels[batch])
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()


# ------------------------------------------------------------------------------- the federation


def deal(n_classes, n_clients):
    """The classes of each client: they are shuffled and cut into equal shares, with the authors'
    seed whatever --seed is."""
    order = list(range(n_classes))
    random.Random(2023).shuffle(order)
    return torch.tensor(order).tensor_split(n_clients)


def choose_experts(prompts, c):
    """The clients whose prompts each client mixes with its own, (clients, E - 1): the nearest by
    Euclidean distance, or random ones. prompts: the last one of each client, (clients, P)."""
    distances = torch.cdist(prompts, prompts)
    if c["choice"] == "random":
        distances = torch.rand(distances.shape)
    return distances.fill_diagonal_(torch.inf).argsort(dim=1)[:, : c["experts"] - 1]


@torch.no_grad()
def share_average(clients):
    """Gives every client the mean prompt, weighted by numbers of training images."""
    sizes = [len(client.f) for client in clients]
    for copies in zip(*(client.prompts.parameters() for client in clients)):
        average = sum(n * p for n, p in zip(sizes, copies)) / sum(sizes)
        for p in copies:
            p.copy_(average)


def federate(kind, clients):
    """Trains new clients for all rounds, in one of the three ways. Returns the accuracy of each on
    its own classes."""
    c = clients[0].config
    for round_number in range(c["rounds"]):
        if kind == "pfedmoap" and round_number:  # nothing is sent before the first round
            with torch.no_grad():
                prompts = torch.stack([client.prompts.context() for client in clients])
                texts = torch.cat([client.text_features() for client in clients])
            for client, chosen in zip(clients, choose_experts(prompts.flatten(1), c)):
                client.experts = texts[chosen]
            share_average(clients)  # only now: the experts are the prompts as they were sent
        for client in clients:
            client.learn()
        if kind == "averaged":
            share_average(clients)
        percents = []
        for client in clients:
            logits, _ = client.logits(client.test_f)
            percents.append(accuracy(logits.argmax(dim=-1), client.test_labels.cpu()))
        round_of = f"round {round_number + 1:3d}/{c['rounds']}"
        print(f"{kind:8}  {round_of}  {mean(percents):.2f} %", flush=True)
    return percents


def learn(task):
    """Trains all kinds on the same images, and prints the accuracy of each client. Returns what
    `forks.run` expects."""
    c = task.config
    n_classes = len(task.names)
    f = task.features("test")
    n, width = c["clients"], c["width"]
    if not c["experts"] <= n <= n_classes:
        raise BadInput(f"--clients {n} must lie between --experts and the {n_classes} classes")
    if f.shape[1] % width or width % c["heads"]:
        raise BadInput(f"--width {width} must divide {f.shape[1]}, and --heads must divide it")
    train = training_features(
        task.clip_model, task.fingerprint, task.split, c["views"], live=False
    ).features
    images = (train, task.labels("train")), (f, task.labels("test"))
    percents = {}
    for kind in KINDS:
        clients = [Client(task, images, classes) for classes in deal(n_classes, n)]
        percents[kind] = federate(kind, clients)
    rows = [[kind, *of_kind, round(mean(of_kind), 2)] for kind, of_kind in percents.items()]
    print(markdown([["client", *range(n), "mean"], *rows]))
    classes = f"all, by {n} clients"  # so that tables keep it apart from other runs on all classes
    measured = {"classes": classes, "accuracy": rows[-1][-1], "clients": percents}
    return measured, nn.ModuleList(clients)


if __name__ == "__main__":
    main("pfedmoap", OWN, WORLD, __doc__, learn)
