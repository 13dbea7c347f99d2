"""The router: which prompts an image uses, their weights, and the target the router learns from.

For every image the router scores all G prompts from the image feature (one linear layer), keeps
the K best and turns their scores into weights. The class text features of those K prompts,
averaged with the weights, classify the image.

The hard prompts show which choice is good: an image is described best by the group whose hard
prototype for the image's *own* class is most similar to it. `gate_target` turns that into the soft
target of the gate loss (hard-prompt-guided gating). No label of the image's style is needed.

Dimensions: B images, C classes, G prompts, K prompts used per image, D feature width.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

# ------------------------------------------------------------------------------------- routers


class Router(nn.Module):
    """Linear gate D -> G, top K, softmax over those K (arXiv 2409.12011)."""

    guided = True  # trained by the gate loss

    def __init__(self, width, n_prompts, top_k):
        super().__init__()
        self.gate = nn.Linear(width, n_prompts)
        self.top_k = top_k

    def forward(self, image_features):
        """(B, D) -> gate_logits (B, G), weights (B, G).

        An image's weights sum to 1 and are zero for all but its K prompts. Softmax runs over the
        K chosen logits only, so that the other scores do not shrink the weights of the chosen.
        """
        gate_logits = self.gate(image_features)
        top = gate_logits.topk(self.top_k, dim=-1)
        weights = torch.zeros_like(gate_logits).scatter(-1, top.indices, top.values.softmax(-1))
        return gate_logits, weights


class FrozenRouter(Router):
    """For ablations: a gate that keeps its random initialisation."""

    guided = False

    def __init__(self, width, n_prompts, top_k):
        super().__init__(width, n_prompts, top_k)
        self.gate.requires_grad_(False)


class UniformRouter(nn.Module):
    """For ablations, and for methods with one prompt: a plain average of all prompts,
    regardless of `top_k`."""

    guided = False

    def __init__(self, width, n_prompts, top_k):
        super().__init__()
        self.top_k = n_prompts

    def forward(self, image_features):
        gate_logits = image_features.new_zeros(len(image_features), self.top_k)  # there is no gate
        return gate_logits, gate_logits + 1 / self.top_k


# A router has these constructor arguments, `guided`, `top_k` and `forward`, and nothing else.
ROUTERS = {"trained": Router, "frozen": FrozenRouter, "uniform": UniformRouter}

# ------------------------------------------------------------------------------- the mixture


def mixed_logits(image_features, text_features, weights, logit_scale):
    """Class logits of each image under its own mixture of prompts.

    The method averages text features, t[b, c] = sum_g w[b, g] t[g, c], and takes
    logits[b, c] = scale * f[b] . t[b, c] *without* normalising t[b, c] again: prompts that
    disagree about a class give a shorter vector and so a lower logit. Since everything is linear,
    this equals the weighted average of the per-prompt logits, which needs (B, G, C) numbers
    instead of (B, C, D).

    image_features (B, D) and text_features (G, C, D) normalised, or (B, G, C, D) if each image has
    its own; weights (B, G); logit_scale the factor itself (CLIP's 100), not its logarithm.
    Returns (B, C).
    """
    # The dots stand for B: text features without it are shared by all images.
    similarities = torch.einsum("...d,...gcd->...gc", image_features, text_features)  # (B, G, C)
    return logit_scale * torch.einsum("bg,bgc->bc", weights, similarities)


# ------------------------------------------------------------------------- the gate's target


def gate_target(image_features, prototypes, labels, top_k):
    """The gate's target: softmax of the image's similarities to its class's prototypes.

    s[b, g] = f[b] . p[g, y_b]; the K largest get +10 before the softmax, as in the published
    code. Cosine similarities of one image differ by a few hundredths, so a plain softmax would be
    almost uniform. The factor e^10 = 22,026 puts practically all of the target on the K best, and
    each of them gets a target near 1/K.

    image_features (B, D) and prototypes (G, C, D) normalised, labels (B,). Returns (B, G), rows
    summing to 1.
    """
    own_class = prototypes[:, labels]  # (G, B, D): only each image's own class
    return _boosted(torch.einsum("bd,gbd->bg", image_features, own_class), top_k)


def mean_gate_target(image_features, prototypes, labels, top_k):
    """The same without the label: s[b, g] is the mean similarity to all given prototypes of
    group g, as in the published code until September 2024."""
    return _boosted(image_features @ prototypes.mean(dim=1).T, top_k)


def _boosted(similarities, top_k):
    best = similarities.topk(top_k, dim=-1).indices  # (B, K)
    boost = torch.zeros_like(similarities).scatter(-1, best, 10.0)
    return F.softmax(similarities + boost, dim=-1)


GATE_TARGETS = {"label": gate_target, "mean": mean_gate_target}
