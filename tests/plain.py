"""The method and its neighbours once more, on a page of plain PyTorch, to compare whole runs with.

Nothing of the project is used: clip's own encoders read one whole sentence per row, every prompt
with every class in every step; optimiser, schedule and losses are written out. Settings are those
of the papers. Dimensions: as everywhere.
"""

import copy
import math

import clip
import torch
import torch.nn as nn
import torch.nn.functional as F

EUROSAT = [
    ["a centered satellite photo of {}."],
    ["a photo of a {}."],
    ["a photo of the large {}.", "a photo of a large {}."],
    ["a photo of the small {}.", "a photo of a small {}."],
    [
        *("a low resolution photo of the {}.", "a low resolution photo of a {}."),
        *("a pixelated photo of the {}.", "a pixelated photo of a {}."),
    ],
    ["a good photo of the {}.", "a good photo of a {}."],
]
SUN397 = [["a photo of a {}."], ["a photo of many {}."], EUROSAT[4], EUROSAT[5]]
MOCOOP = {
    "groups": EUROSAT, "router": "trained", "top_k": 2, "gate": 1.0, "text": 5.0, "scale": 1.0,
    "target": "label", "per_template": False, "bias": False, "stop": False, "conditional": False,
    "side": None,
    "epochs": 50, "warm_up": 5, "batch": 32, "lr": 0.032, "clip": 1.0, "views": 8, "init": None,
}  # fmt: skip
ONE_GROUP = [[template for group in EUROSAT for template in group]]
ONE = {
    "groups": ONE_GROUP, "init": "a photo of a {}.", "stop": True, "router": "uniform", "gate": 0.0,
}  # fmt: skip
COOP = MOCOOP | ONE | {"text": 0.0, "epochs": 100, "warm_up": 1, "lr": 0.002, "clip": 0.0}
COCOOP = COOP | {"conditional": True, "epochs": 10, "batch": 1}
LASP = MOCOOP | ONE | {"text": 10.0, "scale": 100.0, "per_template": True, "bias": True}


def tokenize(model, texts):
    return clip.tokenize(texts, context_length=len(model.positional_embedding))


def shortened(model, length=32):
    """A copy that reads fewer tokens; attention is causal, so what stood behind changed nothing."""
    model = copy.deepcopy(model)
    model.positional_embedding.data = model.positional_embedding[:length]
    for block in model.transformer.resblocks:
        block.attn_mask = block.attn_mask[:length, :length]
    return model


def unit(x):
    return x / x.norm(dim=-1, keepdim=True)


def few_shot(items, shots, rng):
    """CoOp's rule: (path, label) of `shots` images per class, in order of first appearance."""
    labels = list(dict.fromkeys(label for _, label in items))
    by_label = [[item for item in items if item[1] == label] for label in labels]
    return [item for own in by_label for item in rng.sample(own, min(shots, len(own)))]


def hard_features(model, template, names):
    """(C, D)"""
    return unit(model.encode_text(tokenize(model, [template.replace("{}", n) for n in names])))


def prototypes(hard, groups):
    """(G, C, D), of {template: (C, D)}"""
    return unit(torch.stack([torch.stack([hard[t] for t in group]).mean(0) for group in groups]))


class Plain(nn.Module):
    """What is learned. `contexts[g]` stands for the words of prompt g in front of the name,
    `afters[g]` for those behind it."""

    def __init__(self, clip_model, s, seed):
        super().__init__()
        self.s, self.clip = s, [clip_model]
        torch.manual_seed(seed)
        self.contexts, self.afters = nn.ParameterList(), nn.ParameterList()
        width, dim = clip_model.text_projection.shape
        for group in s["groups"]:
            start = group[0] if s["init"] in (None, "random") else s["init"]
            for side, half in zip((self.contexts, self.afters), start.rstrip(".").split("{}")):
                tokens = clip.tokenize(half)[0]
                words = clip_model.token_embedding(tokens)[1 : tokens.argmax()].clone()
                if s["init"] == "random":
                    words = 0.02 * torch.randn(16, width) if side is self.contexts else words[:0]
                side.append(nn.Parameter(words))
        n = len(s["groups"])
        self.gate = None if s["router"] == "uniform" else nn.Linear(dim, n)
        self.bias = nn.Parameter(torch.zeros(1, dim)) if s["bias"] else None
        self.tokens = nn.Parameter(0.02 * torch.randn(4, width)) if s["side"] == "prompts" else None
        if s["conditional"]:
            self.down, self.up = nn.Linear(dim, dim // 16), nn.Linear(dim // 16, width)

    def image_features(self, pixels):
        """(B, 3, H, W) -> (B, D)"""
        visual = self.clip[0].visual
        if self.tokens is None:
            return unit(visual(pixels))
        x = visual.conv1(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([visual.class_embedding.expand(len(x), 1, -1), x], dim=1)
        x = x + visual.positional_embedding
        x = visual.ln_pre(torch.cat([x, self.tokens.expand(len(x), -1, -1)], dim=1))
        x = visual.transformer(x.transpose(0, 1)).transpose(0, 1)
        return unit(visual.ln_post(x[:, 0]) @ visual.proj)

    def text_features(self, names, shift=0.0):
        """(G, C, D)"""
        model, found = self.clip[0], []
        stop = "." if self.s["stop"] else ""
        full_stop = model.token_embedding(clip.tokenize(".")[0, 1:2]).detach()
        for context, after in zip(self.contexts, self.afters):
            # A full stop is read with what stands before it, the name or the words behind it.
            tokens = tokenize(model, [name + stop * (not len(after)) for name in names])
            end = tokens.argmax(-1)
            rows = model.token_embedding(tokens).detach()
            sentences = []
            for row, n in zip(rows, end):  # SOS context name after EOT
                parts = [row[:1], context + shift, row[1:n], after + shift]
                parts += [full_stop[: len(stop) * (len(after) > 0)], row[n:]]
                sentences.append(torch.cat(parts)[: tokens.shape[1]])
            x = torch.stack(sentences) + model.positional_embedding
            x = model.ln_final(model.transformer(x.transpose(0, 1)).transpose(0, 1))
            last = end + len(context) + len(after) + len(stop) * (len(after) > 0)
            x = x[torch.arange(len(names)), last] @ model.text_projection
            found.append(unit(x if self.bias is None else x + self.bias))
        return torch.stack(found)

    def shift(self, f):
        return self.up(torch.relu(self.down(f))) if self.s["conditional"] else 0.0

    def weights(self, f):
        """Of one image (D,): gate logits (G,), weights (G,)"""
        n = len(self.contexts)
        if self.gate is None:
            return None, torch.full((n,), 1 / n)
        scores = self.gate(f)
        best = scores.argsort(descending=True)[: min(self.s["top_k"], n)]
        return scores, torch.zeros(n).index_add(0, best, scores[best].softmax(0))

    def forward(self, f, names):
        """(B, D) -> gate logits, weights (B, G), text features of each image, logits (B, C)"""
        shared = None if self.s["conditional"] else self.text_features(names)
        scale, outputs = self.clip[0].logit_scale.exp(), []
        for image in f:
            texts = self.text_features(names, self.shift(image)) if shared is None else shared
            scores, w = self.weights(image)
            mixed = sum(w[g] * texts[g] for g in range(len(texts)))
            outputs.append((scores, w, texts, scale * mixed @ image))
        scores, w, texts, logits = zip(*outputs)
        scores = None if scores[0] is None else torch.stack(scores)
        return scores, torch.stack(w), texts[:1] if shared is not None else texts, logits


def learning_rate(s, epoch, factor):
    warm_up = min(s["warm_up"], round(s["epochs"] / 8))
    if epoch < warm_up:
        return 1e-5
    return s["lr"] * factor * (1 + math.cos(math.pi * (epoch - warm_up) / s["epochs"])) / 2


def loss_of(model, s, f, labels, names, seen, hard):
    """(total, {name: value}) of a batch; `labels` count within the seen classes."""
    scores, w, texts, logits = model(f, names)
    losses = {"image": F.cross_entropy(torch.stack(logits)[:, seen], labels)}
    total, soft = losses["image"], prototypes(hard, s["groups"])
    if s["gate"] and s["router"] == "trained":
        own = [soft[:, seen][:, y] if s["target"] == "label" else soft[:, seen].mean(1)
               for y in labels]  # fmt: skip
        similar = torch.stack([p @ x.detach() for p, x in zip(own, f)])
        best = similar.argsort(dim=-1, descending=True)[:, : min(s["top_k"], len(soft))]
        target = torch.stack([row.index_add(0, b, torch.full((len(b),), 10.0)) for row, b in
                              zip(similar, best)]).softmax(-1)  # fmt: skip
        losses["gate"] = -(target * scores.log_softmax(-1)).sum(-1).mean()
        total = total + s["gate"] * losses["gate"]
    if s["text"]:
        terms = []
        for own in texts:  # one set for all images, or one each
            for g, group in enumerate(s["groups"]):
                against = [hard[t] for t in group] if s["per_template"] else [soft[g]]
                terms += [
                    F.cross_entropy(s["scale"] * own[g] @ p.T, torch.arange(len(p)))
                    for p in against
                ]
        losses["text"] = torch.stack(terms).mean()
        total = total + s["text"] * losses["text"]
    return total, losses, w


def train(clip_model, s, seed, names, seen, load, labels):
    """Trains: (model, [per epoch: (losses, share of each prompt)]). load: (indices of images, the
    view of each, epoch) -> features (B, D) or pixels (B, 3, H, W)."""
    model = Plain(clip_model, s, seed)
    learned = [(p, 1.0) for p in model.parameters()]
    if s["router"] == "frozen":
        gate = [id(p) for p in model.gate.parameters()]
        learned = [(p, factor) for p, factor in learned if id(p) not in gate]
    if s["side"] == "layer-norms":
        for block in clip_model.visual.transformer.resblocks:
            for norm in (block.ln_1, block.ln_2):
                learned += [(p.requires_grad_(), 0.1) for p in (norm.weight, norm.bias)]
    hard = {t: hard_features(clip_model, t, names) for group in s["groups"] for t in group}
    rng = torch.Generator().manual_seed(seed)
    speed, n, told = [torch.zeros_like(p) for p, _ in learned], len(labels), []
    for epoch in range(s["epochs"]):
        order = torch.randperm(n, generator=rng)
        views = torch.randint(s["views"], (n,), generator=rng)
        epochs_losses, used = [], []
        for start in range(0, max(n - n % s["batch"], 1), s["batch"]):
            batch = order[start : start + s["batch"]]
            f = load(batch, views[batch], epoch)
            f = model.image_features(f) if f.dim() == 4 else f
            total, losses, w = loss_of(model, s, f, labels[batch], names, seen, hard)
            gradients = torch.autograd.grad(total, [p for p, _ in learned], allow_unused=True)
            gradients = [torch.zeros_like(p) if g is None else g
                         for g, (p, _) in zip(gradients, learned)]  # fmt: skip
            norm = math.sqrt(sum(g.square().sum().item() for g in gradients))
            shrink = min(1.0, s["clip"] / norm) if s["clip"] else 1.0
            for v, g, (p, factor) in zip(speed, gradients, learned):
                v.mul_(0.9).add_(shrink * g + 5e-4 * p.detach())
                p.data -= learning_rate(s, epoch, factor) * v
            epochs_losses.append({name: value.item() for name, value in losses.items()})
            used.append(w.detach())
        means = {k: sum(x[k] for x in epochs_losses) / len(epochs_losses) for k in epochs_losses[0]}
        told.append((means, torch.cat(used).mean(0)))
    return model, told
