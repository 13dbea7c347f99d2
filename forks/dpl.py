"""Differentiable prompt learning: DPL (arXiv 2501.00457, IJCAI 2025).

    python -m forks.dpl                                  # the built-in world, some minutes
    python -m forks.dpl --dataset eurosat --shots 4
    python -m forks.dpl --search-epochs 20 --longest 4   # a shorter search

Deep prompts: every block of *both* encoders gets context vectors of its own, beside the words of a
sentence and beside the patches of an image. How many is not chosen by hand, but found by search.

    queries               the block's tokens, as usual
    keys and values       the tokens and the block's n context vectors

The vectors have neither a position nor a query, so a block's output keeps its length, and they do
not travel to the next block.

*Search*: every block has candidates of length 0 to M. Its attention is the sum of the candidates'
attentions, weighted with softmax(alpha). Steps alternate: alpha learns on validation images, the
vectors on training images. *Training*: every block takes the length of its largest alpha, and only
its vectors, drawn anew, are trained.

The authors' search (Zhenhan-Huang/Differentiable-Prompt-Learn) takes the same 16 validation images
in every step; here 16 are drawn at random. It also saves the image encoder's alpha as `_txt` and
the text encoder's as `_img`, so training from these names swaps the lengths; here nothing is
swapped. Its ensemble averages 60 of CLIP's templates; here they are the catalogue's for ImageNet.
As there, the mean sentence ends where the last template does: here, "a photo of a {}."

Dimensions: C classes, N sentences or images, L tokens, n context vectors of a block, M the largest
n, K candidates, V vectors of all candidates, W width of an encoder, H heads, D features.
"""

import lib.start  # noqa: F401  # isort: skip, before PyTorch

import copy
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from forks import main
from lib import results
from lib.catalogue import IMAGENET, all_templates
from lib.errors import BadInput
from lib.features import LiveImages, pixel_batches
from prompts import hard_sentences
from train import MoCoOp, fit

# fmt: off
OWN = {
    "longest": (6, 1, "largest number of context vectors in a block"),
    "search_epochs": (80, 1, "number of passes over the training images in the search"),
    "epochs": (40, 1, "number of passes afterwards, with the lengths found"),
    "batch_size": (4, 1, "number of images per step"),
    "lr": (0.0035, 1e-9, "learning rate of the context vectors"),
    "alpha_lr": (0.0035, 1e-9, "learning rate of alpha"),
    "sentences": ("ensemble", ("ensemble", "default"), "after the search: the mean embeddings of "
        "ImageNet's templates, or 'a photo of a {}.', as in the search"),
}
# fmt: on
# The bundled CLIP does not know all words of the ensemble; ten epochs take two minutes.
WORLD = {"sentences": "default", "search_epochs": 10}
DEFAULT = ["a photo of a {}."]

# ------------------------------------------------------------------------------------- the model


class DeepAttention(nn.Module):
    """Replaces a block's attention, adding context vectors to its keys and values."""

    def __init__(self, block, lengths, draw):
        """block: a `clip.model.ResidualAttentionBlock`. lengths: one for each of the K candidates.
        draw: `torch.rand` or the like, makes the vectors."""
        super().__init__()
        self.vectors = nn.Parameter(draw(sum(lengths), 1, block.attn.embed_dim))  # (V, 1, W)
        # Not a parameter: the vectors' optimiser leaves it alone.
        self.alpha = (0.001 * torch.randn(len(lengths))).requires_grad_()
        # (V, K): 1 where a vector belongs to a candidate.
        self.member = torch.eye(len(lengths)).repeat_interleave(torch.tensor(lengths), 0)
        self.frozen = block.attn, block.ln_1  # in a tuple: no submodules
        block.attn = self
        # The backward pass computes the block again, so only one block's activations are in memory.
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)

    def forward(self, x, *_, attn_mask=None, **how):
        """As CLIP calls `nn.MultiheadAttention`: x (L, N, W), normalised -> (L, N, W), None."""
        attention, norm = self.frozen
        length = len(x)
        vectors = norm(self.vectors).expand(-1, x.shape[1], -1)
        qkv = F.linear(torch.cat([x, vectors]), attention.in_proj_weight, attention.in_proj_bias)
        q, k, v = qkv.unflatten(-1, (3, attention.num_heads, -1)).unbind(2)  # (L + V, N, H, W / H)
        scores = torch.einsum("qnhw,knhw->nhqk", q[:length], k) / attention.head_dim**0.5
        if attn_mask is not None:  # a token does not attend to later ones, but to all vectors
            scores[..., :length] += attn_mask[:length, :length]
        # All candidates have the same values, so their weighted sum is that of their softmaxes:
        # one over all keys, divided by its sum over a candidate's keys. The sum may underflow.
        softmax = scores.softmax(dim=-1)
        reads = F.pad(self.member, (0, 0, length, 0), value=1.0)  # (L + V, K), tokens and vectors
        sums = (softmax @ reads).clamp(min=1e-18)  # (N, H, L, K)
        weights = softmax * ((self.alpha.softmax(dim=-1) / sums) @ reads.T)
        return attention.out_proj(torch.einsum("nhqk,knhw->qnhw", weights, v).flatten(2)), None


class DeepPrompts(MoCoOp):
    """CoOp whose context vectors are in the blocks of both encoders, not in the sentences."""

    def __init__(self, task, sentences, found=None):
        """Changes the blocks of the task's CLIP. sentences: [template][class] -> ids; embeddings of
        several templates are averaged. found: {block: length}, or None for the search."""
        clip_model = task.clip_model
        # The prompts of its own remain unused.
        super().__init__(clip_model, [DEFAULT], task.names, task.config)
        self.attentions = nn.ModuleDict()
        sides = ("text", clip_model, torch.rand), ("image", clip_model.visual, torch.randn)
        with clip_model.logit_scale.device:
            for side, encoder, draw in sides:
                for i, block in enumerate(encoder.transformer.resblocks, 1):
                    name = f"{side} {i}"
                    lengths = range(task.config["longest"] + 1)
                    if found:
                        lengths, draw = [found[name]], lambda *size: 0.02 * torch.randn(size)
                    self.attentions[name] = DeepAttention(block, lengths, draw)
            # Padded with 0, as by clip, where a template is shorter than others: the mean reads it.
            # Without one, it must only be a number, and the bundled CLIP has no embedding for it.
            ids = nn.utils.rnn.pad_sequence(
                [torch.tensor(ids) for of_template in sentences for ids in of_template]
            )
        words = clip_model.token_embedding(ids).nan_to_num().unflatten(1, (len(sentences), -1))
        self.ends = [len(ids) - 1 for ids in sentences[-1]]  # where EOT is, in the last template
        # The mean over templates, and positions: (L, C, W).
        self.words = words.mean(dim=1) + clip_model.positional_embedding[: len(ids), None]

    def text_features(self, *_, **how):
        """(1, C, D), always of its own classes."""
        (clip_model,) = self.prompts.frozen
        x = clip_model.transformer(self.words)[self.ends, range(len(self.ends))]
        return F.normalize(clip_model.ln_final(x) @ clip_model.text_projection, dim=-1)[None]


# ---------------------------------------------------------------------------------- the training


class SearchImages(LiveImages):
    """Training images. Before each step on them, alpha takes one on 16 validation images."""

    def __init__(self, model, task):
        super().__init__(task.clip_model, task.split)
        self.model = model
        self.labels = task.labels("val")
        alpha = [attention.alpha for attention in model.attentions.values()]
        self.adam = torch.optim.Adam(alpha, task.config["alpha_lr"], betas=(0.5, 0.999))

    def batches(self, batches, views, epoch):
        drawn = [torch.randperm(len(self.labels))[:16] for _ in batches]
        pixels_of = partial(pixel_batches, self.clip_model, self.split)
        for indices, val_pixels, pixels in zip(
            drawn, pixels_of("val", drawn), pixels_of("train", batches, epoch)
        ):
            logits = self.model(self.encode(val_pixels)).logits
            self.adam.zero_grad()
            F.cross_entropy(logits, self.labels[indices]).backward()
            self.adam.step()
            yield self.encode(pixels)


def learn(task):
    """Finds the lengths, trains with them and tests. Returns what `forks.run` expects."""
    c = task.config
    split = task.split
    clip_model = task.clip_model
    labels = task.labels("train")
    if not (split.val and hasattr(clip_model.visual, "transformer")):
        raise BadInput("DPL needs val images for its search, and a CLIP with a ViT")
    templates = [*all_templates(IMAGENET), *DEFAULT] if c["sentences"] == "ensemble" else DEFAULT
    sentences = hard_sentences(clip_model, templates, task.names)

    torch.manual_seed(c["seed"])
    searched = copy.deepcopy(task)
    searched.config["epochs"] = c["search_epochs"]
    model = DeepPrompts(searched, hard_sentences(clip_model, DEFAULT, task.names))
    fit(model, SearchImages(model, searched), labels, None)
    found = {block: a.alpha.argmax().item() for block, a in model.attentions.items()}
    print(results.markdown([["block", "context vectors"], *found.items()]))

    model = DeepPrompts(task, sentences, found)
    fit(model, LiveImages(clip_model, split), labels, None)
    f = task.features("test", cached=False)
    return results.evaluate_model(model, split, f)[0] | {"lengths": found}, model


if __name__ == "__main__":
    main("dpl", OWN, WORLD, __doc__, learn)
