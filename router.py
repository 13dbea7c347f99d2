"""The router: which prompts an image gets, with which weights, and what it is taught.

For every image the router scores all G prompts from the image feature (one linear layer), keeps
the K best and turns their scores into weights. The class text features of those K prompts,
averaged with the weights, classify the image.

What is a good choice? The hard prompts know: the group whose hard prototype of the image's *own*
class is most like the image describes it best. `gate_target` turns that into the soft target
of the gate loss (hard-prompt-guided gating). No label of the image's style is needed.

Letters in shapes: B images, C classes, G prompts, K prompts used per image, D feature width.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

KINDS = "trained", "frozen", "uniform"


class Router(nn.Module):
    """Linear gate D -> G, top K of it, softmax over those K (arXiv 2409.12011).

    kind: `trained`; for ablations also `frozen`, which keeps its random start, and `uniform`, which
    has no gate and gives every image the plain average of all prompts.
    Raises ValueError for any other kind.
    """

    def __init__(self, width, n_prompts, top_k, kind="trained"):
        super().__init__()
        if kind not in KINDS:
            raise ValueError(f"no router of the kind {kind!r}: {', '.join(KINDS)}")
        self.kind, self.n_prompts = kind, n_prompts
        self.top_k = n_prompts if kind == "uniform" else top_k
        self.gate = None
        if kind != "uniform":
            self.gate = nn.Linear(width, n_prompts).requires_grad_(kind != "frozen")

    def forward(self, image_features):
        """(B, D) -> gate_logits (B, G), weights (B, G).

        An image's weights sum to 1 and are zero for all but its K prompts. Softmax runs over the
        K chosen logits alone: what the others scored must not shrink the chosen ones' weights.
        """
        if self.gate is None:
            gate_logits = image_features.new_zeros(len(image_features), self.n_prompts)
            return gate_logits, gate_logits + 1 / self.n_prompts
        gate_logits = self.gate(image_features)
        top = gate_logits.topk(self.top_k, dim=-1)
        weights = torch.zeros_like(gate_logits).scatter(-1, top.indices, top.values.softmax(-1))
        return gate_logits, weights


def mixed_logits(image_features, text_features, weights, logit_scale):
    """Class logits of each image under its own mixture of prompts.

    The method averages text features, t[b, c] = sum_g w[b, g] t[g, c], and takes
    logits[b, c] = scale * f[b] . t[b, c] *without* normalising t[b, c] again: prompts that
    disagree about a class give a shorter vector and so a lower logit. As nothing non-linear comes
    between, that is the weighted average of the per-prompt logits, which needs (B, G, C) numbers
    instead of (B, C, D).

    image_features (B, D) and text_features (G, C, D) normalised, weights (B, G), logit_scale the
    factor itself (CLIP's 100), not its logarithm. Returns (B, C).
    """
    similarities = torch.einsum("...d,...gcd->...gc", image_features, text_features)  # (B, G, C)
    return logit_scale * torch.einsum("bg,bgc->bc", weights, similarities)


def gate_target(image_features, prototypes, labels, top_k):
    """What the gate should say: softmax of the image's similarities to its class's prototypes.

    s[b, g] = f[b] . p[g, y_b]; the K largest get +10 before the softmax, as in the published
    code. Cosine similarities of one image differ by a few hundredths, so a plain softmax would be
    all but uniform; 10 puts practically all of the target on the K best and keeps, among them,
    a target near 1/K each.

    image_features (B, D) and prototypes (G, C, D) normalised, labels (B,). Returns (B, G), rows
    summing to 1.
    """
    own_class = prototypes[:, labels]  # (G, B, D): each image's own class, no other
    similarities = torch.einsum("bd,gbd->bg", image_features, own_class)
    best = similarities.topk(top_k, dim=-1).indices  # (B, K)
    boost = torch.zeros_like(similarities).scatter(-1, best, 10.0)
    return F.softmax(similarities + boost, dim=-1)
