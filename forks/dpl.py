"""Differentiable prompt learning: DPL (arXiv 2501.00457, IJCAI 2025).

    python -m forks.dpl                                  # the built-in world, some minutes
    python -m forks.dpl --dataset eurosat --shots 4
    python -m forks.dpl --search-epochs 20 --longest 4   # a shorter search

Deep prompts: every block of *both* encoders gets context vectors of its own, beside the words of a
sentence and beside the patches of an image. How many is not chosen by hand, but found by search.

    queries               the block's tokens, as ever
    keys and values       the tokens and the block's n context vectors

The vectors have neither a position nor a query, so a block's output keeps its length, and they do
not travel to the next block.

*Search*: every block has candidates of length 0 to M. Its attention is the sum of the candidates'
attentions, weighted with softmax(alpha). Steps alternate: alpha learns on validation images, the
vectors on training images. *Training*: every block takes the length of its largest alpha, with new
vectors, and these are trained alone.

The authors' search (Zhenhan-Huang/Differentiable-Prompt-Learn) takes the same 16 validation images
in every step; here they are drawn. It also stores the images' alpha under the name of the
sentences' and the other way round, so that its training uses the lengths exchanged. Here it does
not. Its ensemble has 60 of CLIP's templates; here they are the catalogue's for ImageNet.

Dimensions: B images, C classes, N sentences or images, L tokens, n context vectors, W width of an
encoder, D features, M the largest length.
"""

import lib.start  # noqa: F401  # isort: skip, before PyTorch

from itertools import zip_longest

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

from forks import main
from lib import parallel, results
from lib.baselines import ClassVectors
from lib.catalogue import IMAGENET, all_templates
from lib.errors import BadInput, finite
from lib.fast_clip import blocks_of, image_tokens
from lib.features import LiveImages, pixel_batches
from prompts import hard_sentences
from train import Outputs, fit, learning_rate, shuffled

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
WORLD = {"sentences": "default", "search_epochs": 10}
DEFAULT = ["a photo of a {}."]
VAL_BATCH = 16

# ------------------------------------------------------------------------------------- the model


class Contexts(nn.Module):
    """The context vectors of every block of an encoder, and alpha, which weighs its candidates."""

    def __init__(self, transformer, lengths, draw):
        """transformer: a `clip.model.Transformer`. lengths: [block][candidate]. draw: `torch.rand`
        or the like, makes the vectors."""
        super().__init__()
        self.transformer, self.lengths = (transformer,), torch.tensor(lengths)  # (blocks, K)
        sizes = [(len(of), max(of), transformer.width) for of in lengths]
        self.vectors = nn.ParameterList([nn.Parameter(draw(*size)) for size in sizes])  # (K, M, W)
        self.alpha = nn.Parameter(0.001 * torch.randn(self.lengths.shape))

    def forward(self, x, mask):
        """The encoder's blocks on tokens x (N, L, W) -> (N, L, W). mask: (L, L) of 0 and -inf. The
        backward pass computes each block again, so that memory is that of a single one."""
        weights, dtype = self.alpha.softmax(dim=-1), parallel.mixed_dtype(x.device)
        blocks = zip(blocks_of(*self.transformer, dtype), self.vectors, self.lengths, weights)
        for block, vectors, lengths, weight in blocks:
            # Of the M vectors of candidate n, every token sees the first n.
            places = torch.arange(vectors.shape[1])
            seen = torch.where(places < lengths[:, None, None], 0.0, -torch.inf).to(x.device)
            see = [part.expand(len(vectors), len(mask), -1) for part in (mask, seen)]
            see = torch.cat(see, dim=-1).to(dtype)  # (K, L, L + M)
            x = checkpoint(_block, block, x, vectors, weight, see, use_reentrant=False)
        return x


def _block(block, x, vectors, weight, see):
    """A block whose attention is the weighted sum of its candidates': x (N, L, W) -> (N, L, W).

    block: `lib.fast_clip.Block`. vectors: (K, M, W). weight: (K,). see: (K, L, L + M), 0 or -inf.
    """
    n, n_candidates = len(x), len(vectors)
    q, *tokens = block.queries_keys_values(x).repeat(n_candidates, 1, 1).chunk(3, dim=-1)
    _, *more = block.queries_keys_values(vectors).repeat_interleave(n, 0).chunk(3, dim=-1)
    keys_values = (torch.cat(pair, dim=1) for pair in zip(tokens, more))  # (K N, L + M, W)
    attended = block.attend(q, *keys_values, see.repeat_interleave(n, 0)[:, None])
    attended = attended.unflatten(0, (n_candidates, n))
    return block.after_attention(x, torch.einsum("k,knlw->nlw", weight.to(q.dtype), attended))


class DeepPrompts(nn.Module):
    """CLIP with context vectors in the blocks of both encoders."""

    def __init__(self, clip_model, class_names, templates, lengths, draws, config):
        """templates: one, or several whose embeddings are averaged. lengths, draws: see `Contexts`,
        for sentences and for images."""
        super().__init__()
        transformers = clip_model.transformer, clip_model.visual.transformer
        self.text, self.image = map(Contexts, transformers, lengths, draws)
        self.frozen, self.config = (clip_model,), config  # in a tuple: no submodule
        self.scale, n = clip_model.logit_scale.exp(), len(class_names)
        sentences = hard_sentences(clip_model, templates, class_names)
        ids = [torch.tensor(ids) for of_template in sentences for ids in of_template]
        self.ends = torch.tensor([len(row) - 1 for row in ids[-n:]])  # of the last template
        # Padded with 0, as by clip. Only in a mean does the padding matter, and the bundled CLIP
        # has no embedding for it.
        tokens = pad_sequence(ids, batch_first=True).to(self.scale.device)
        words = clip_model.token_embedding(tokens).float().nan_to_num(0.0)
        words = words.unflatten(0, (-1, n)).mean(dim=0)  # (C, L, W)
        self.words = words + clip_model.positional_embedding[: words.shape[1]]

    def text_features(self):
        """(C, D), normalised."""
        (clip_model,), (n, length, _) = self.frozen, self.words.shape
        causal = torch.full((length, length), -torch.inf, device=self.words.device).triu(1)
        x = self.text(self.words, causal)[torch.arange(n), self.ends]
        return F.normalize(clip_model.ln_final(x) @ clip_model.text_projection)

    def image_features(self, pixels):
        """(B, 3, H, W) -> (B, D), normalised."""
        visual = self.frozen[0].visual
        x = image_tokens(visual, pixels)
        x = self.image(x, x.new_zeros(x.shape[1], x.shape[1]))[:, 0]
        return F.normalize(visual.ln_post(x) @ visual.proj)

    def forward(self, pixels, seen=slice(None)):
        """The `Outputs` of a mixture of one prompt, for `train.fit`."""
        f, t = self.image_features(pixels), self.text_features()
        weights = f.new_ones(len(f), 1)
        return Outputs(weights, weights, t[None], self.scale * f @ t.T)

    def parameter_groups(self):
        """The vectors without alpha, in the optimiser's format."""
        vectors = [*self.text.vectors.parameters(), *self.image.vectors.parameters()]
        return [{"params": vectors, "factor": 1.0}]


class Pixels(LiveImages):
    """Images as they are: `DeepPrompts` encodes them."""

    def encode(self, pixels):
        return pixels


# ---------------------------------------------------------------------------------- the training


def search(model, task, images):
    """Trains alpha on validation images and the vectors on training images, in turn. Returns the
    lengths found for the blocks: [of the sentences' encoder, of the images']."""
    c, labels, val_labels = model.config, task.labels("train"), task.labels("val")
    alpha, rng = (model.text.alpha, model.image.alpha), torch.Generator().manual_seed(c["seed"])
    adam = torch.optim.Adam(alpha, lr=c["alpha_lr"], betas=(0.5, 0.999))
    sgd = torch.optim.SGD(model.parameter_groups(), lr=1.0, momentum=0.9, weight_decay=5e-4)
    for epoch in range(c["search_epochs"]):
        rate = learning_rate(c["lr"], epoch, c["search_epochs"], 1)
        sgd.param_groups[0]["lr"] = rate
        batches = shuffled(len(labels), c["batch_size"], rng)
        drawn = [shuffled(len(val_labels), VAL_BATCH, rng)[0] for _ in batches]
        val_images = pixel_batches(task.clip_model, task.split, "val", drawn)
        steps = zip(batches, images.batches(batches, None, epoch), drawn, val_images)
        losses = torch.zeros(2)  # on val images, on training images
        for batch, x, val_batch, val_x in steps:
            pairs = (adam, val_x, val_labels[val_batch]), (sgd, x, labels[batch])
            for i, (optimiser, pixels, y) in enumerate(pairs):
                loss = F.cross_entropy(model(pixels).logits, y)
                model.zero_grad()
                loss.backward()
                optimiser.step()
                losses[i] += loss.item() / len(batches)
        val_loss, loss = losses
        where = f"search  epoch {epoch + 1:3d}/{c['search_epochs']}  lr {rate:.5f}"
        print(f"{where}  loss {loss:.3f}, on val images {val_loss:.3f}", flush=True)
    return [finite(part, "alpha").argmax(dim=-1).tolist() for part in alpha]


def learn(task):
    """Finds the lengths, trains with them and tests. Returns what `forks.run` expects."""
    c, clip_model, split = task.config, task.clip_model, task.split
    if not (split.val and hasattr(clip_model.visual, "transformer")):
        raise BadInput("DPL needs val images for its search, and a CLIP with a ViT")
    torch.manual_seed(c["seed"])
    device, images = clip_model.logit_scale.device, Pixels(clip_model, split)
    sides = clip_model.transformer, clip_model.visual.transformer
    every = [len(side.resblocks) * [[*range(c["longest"] + 1)]] for side in sides]
    draws = torch.rand, torch.randn  # of sentences, of images
    model = DeepPrompts(clip_model, task.names, DEFAULT, every, draws, c).to(device)
    lengths = search(model, task, images)
    blocks = [[i, *of] for i, of in enumerate(zip_longest(*lengths, fillvalue="–"), 1)]
    print(results.markdown([["block", "sentences", "images"], *blocks]))

    templates = all_templates(IMAGENET) if c["sentences"] == "ensemble" else DEFAULT
    found, draws = [[[n] for n in of] for of in lengths], 2 * [lambda *n: 0.02 * torch.randn(n)]
    model = DeepPrompts(clip_model, task.names, templates, found, draws, c).to(device)
    fit(model, images, task.labels("train"), None)
    with torch.no_grad():
        batches = torch.arange(len(split.test)).split(32)
        test = pixel_batches(clip_model, split, "test", batches)
        f, t = torch.cat([*map(model.image_features, test)]), model.text_features()
    classifier = ClassVectors(task.names, t, scale=model.scale.item())
    measured, *_ = results.evaluate_model(classifier, c, {}, split, "all", f)
    return measured | {"lengths": lengths}, model.state_dict()


if __name__ == "__main__":
    main("dpl", OWN, WORLD, __doc__, learn)
