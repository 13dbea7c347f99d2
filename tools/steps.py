"""The ways to take one training step, from the straightforward to ours, on a model of any size.

CLIP is a ViT-B/16 of random weights, except for `shapes`: speed does not depend on them. The class
names of `ucf101` and `imagenet` are made up, as long as UCF101's real ones.
"""

import functools
import random
from functools import partial
from unittest import mock

import clip
import torch
import torch.nn.functional as F
from clip.model import CLIP

from lib import flags, processes, text_encoder, world
from lib.catalogue import template_groups
from lib.clip_model import load_clip
from lib.image_encoder import encode_images
from lib.packing import Piece
from lib.transformer import Block
from losses import gate_loss, image_loss, text_loss
from router import gate_target
from train import FLAGS, MoCoOp

BATCH = 32
EUROSAT = """Annual Crop Land,Forest,Herbaceous Vegetation Land,Highway or Road,
    Industrial Buildings,Pasture Land,Permanent Crop Land,Residential Buildings,River,Sea or Lake"""
NAME_LENGTHS = [1] * 18 + [2] * 58 + [3] * 23 + [4, 5]  # tokens; UCF101's 101 names
VITS = {  # width, layers, size of a patch, images at a time
    "ViT-B/32": (768, 12, 32, 32),
    "ViT-B/16": (768, 12, 16, 32),
    "ViT-L/14": (1024, 24, 14, 8),
}


def class_names(size, n_classes):
    if size == "shapes":
        return world.SHAPES_CLASSES
    if size == "eurosat":
        return [name.strip() for name in EUROSAT.split(",")]
    rng = random.Random(0)
    vocabulary = clip.simple_tokenizer.SimpleTokenizer().encoder
    words = [w[:-4] for w in vocabulary if w.endswith("</w>") and w[:-4].isalpha() and w.isascii()]
    return [" ".join(rng.choices(words, k=rng.choice(NAME_LENGTHS))) for _ in range(n_classes)]


def one_sentence_a_row(sentences, length):
    """Sentences, each in a row of its own: indices into the table of frozen and learned vectors
    (N, length), EOT (N,)."""
    n = sentences.shape[0] * sentences.shape[1]
    index, eot = torch.zeros(n, length, dtype=torch.long), torch.zeros(n, dtype=torch.long)
    for piece in sentences.batches:
        row_length = piece.rows.shape[1]
        for sentence, end in zip(piece.sentence.tolist(), piece.ends.tolist()):
            row, i = divmod(piece.first[end].item(), row_length)
            tokens = piece.token[piece.rows[row, piece.sees[row, 0, i] == 0]]
            index[sentence, : len(tokens)], eot[sentence] = tokens.cpu(), len(tokens) - 1
    return index.to(sentences.frozen.device), eot.to(sentences.frozen.device)


def clips_own(clip_model, embeddings, eot):
    """clip's own encoder, attention module and all, on as many positions as it is given."""
    length = embeddings.shape[1]
    for block in clip_model.transformer.resblocks:
        block.attn_mask = torch.full((length, length), -torch.inf, device=eot.device).triu(1)
    x = embeddings + clip_model.positional_embedding[:length]
    x = clip_model.transformer(x.permute(1, 0, 2)).permute(1, 0, 2)
    return clip_model.ln_final(x)[torch.arange(len(x)), eot] @ clip_model.text_projection


def encode_text(clip_model, embeddings, eot):
    """CLIP's text encoder on one sentence per row, from token embeddings to features.

    It is causal and its output is read at one position, EOT. So nothing after the last EOT of the
    batch can change the result, and those positions are not computed. Nothing in it is frozen.

    clip_model: a `clip.model.CLIP`. embeddings: (N, L, W), L at most the model's context length.
    eot: (N,) position of EOT in each row. Returns (N, D), not normalised.
    """
    length = int(eot.max()) + 1
    x = embeddings[:, :length] + clip_model.positional_embedding[:length]
    for block in clip_model.transformer.resblocks:
        attention = block.attn
        n_rows, length, width = x.shape
        qkv = F.linear(block.ln_1(x), attention.in_proj_weight, attention.in_proj_bias)
        q, k, v = qkv.view(n_rows, length, 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + attention.out_proj(mixed.transpose(1, 2).reshape(n_rows, length, width))
        x = x + block.mlp(block.ln_2(x))
    x = x[torch.arange(len(x), device=x.device), eot]  # (N, W)
    return clip_model.ln_final(x) @ clip_model.text_projection


def whole_rows(piece):
    """A piece that computes each place of its rows, also what stands in several, or nowhere."""
    every = torch.arange(piece.rows.numel(), device=piece.rows.device)
    return Piece(
        token=piece.token[piece.rows].flatten(),
        position=piece.position[piece.rows].flatten(),
        rows=every.view(piece.rows.shape),
        sees=piece.sees,
        first=every,
        ends=piece.first[piece.ends],
        sentence=piece.sentence,
    )


@functools.cache
def _blocks_before(transformer, dtype):
    """The blocks with QuickGELU as clip computes it."""
    blocks = [Block(block, dtype, factor=1.0) for block in transformer.resblocks]
    for block in blocks:
        block.activation = clip.model.QuickGELU()
    return blocks


def image_ways(width, layers, patch, n, device):
    """{name: a function that encodes n images of 224 pixels}, by a ViT of random weights."""
    torch.manual_seed(0)
    clip_model = CLIP(512, 224, layers, width, patch, 77, 10, 512, 8, 1).float()
    clip_model.requires_grad_(False).eval().to(device)
    images, dtype = torch.randn(n, 3, 224, 224, device=device), torch.float32
    if device.type == "cuda":
        dtype = torch.float16

    def every_place(block, x):  # in the last layer, too
        mixed = block.attend(*block.queries_keys_values(x).chunk(3, dim=-1))
        return block.after_attention(x, mixed)[:, 0]

    @torch.no_grad()
    def clips():
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            clip_model.encode_image(images)

    @torch.no_grad()
    def ours(last=Block.first_places):
        with mock.patch.object(Block, "first_places", last):
            encode_images(clip_model, images, dtype)

    return {
        "clip's own": clips,
        "blocks made ready": partial(ours, every_place),
        "class token alone in the last": ours,
    }


class Setting:
    """A model, prompts and a batch of one size, to take steps on."""

    def __init__(self, size, device, groups=None, n_classes=101, clip_model=None):
        """size: `shapes`, `eurosat`, `ucf101` or `imagenet`. groups: of templates; None for the
        dataset's own. n_classes: how many names to make up. clip_model: to use, None for a new
        one."""
        torch.manual_seed(0)
        if clip_model is not None:
            self.clip_model = clip_model
        elif size == "shapes":
            self.clip_model = load_clip("bundled", device)[0]
        else:
            self.clip_model = CLIP(512, 224, 12, 768, 16, 77, 49408, 512, 8, 12).float()
            self.clip_model = self.clip_model.requires_grad_(False).eval().to(device)
        self.dtype = processes.mixed_dtype(device)
        self.device, self.config = device, {"chunk": None} | flags.method_defaults(FLAGS)
        groups = template_groups(size) if groups is None else groups
        names = class_names(size, n_classes)
        self.model = MoCoOp(self.clip_model, groups, self.config).to(device)
        self.model.set_classes(names)
        length = self.clip_model.context_length
        self.index, self.eot = one_sentence_a_row(self.model.prompts.sentences, length)
        self.optimiser = torch.optim.SGD(
            self.model.parameters(), lr=1e-3, momentum=0.9, fused=device.type == "cuda"
        )
        width, pixels = (
            self.clip_model.text_projection.shape[1],
            self.clip_model.visual.input_resolution,
        )
        self.images = torch.randn(BATCH, 3, pixels, pixels, device=device)
        self.image_features = F.normalize(torch.randn(BATCH, width, device=device), dim=-1)
        self.labels = torch.randint(len(names), (BATCH,), device=device)
        shape = len(groups), len(names), width
        self.prototypes = F.normalize(torch.randn(shape, device=device), dim=-1)

    def autocast(self):
        enabled = self.dtype is not torch.float32
        return torch.autocast(self.device.type, self.dtype, enabled=enabled)

    def one_a_row(self, encode, length):
        """Text features the plain way, by an encoder of one sentence per row: (G, C, D)."""
        sentences = self.model.prompts.sentences
        table = torch.cat([sentences.frozen, self.model.prompts.context()])
        with self.autocast():
            embeddings = F.embedding(self.index[:, :length], table)
            features = encode(self.clip_model, embeddings, self.eot).float()
        return F.normalize(features, dim=-1).view(*sentences.shape, -1)

    def step(self, text=None, live=False, losses=("gate", "text")):
        """One step of training. text: gives the text features in place of the model's own way.
        live: encodes the images, too."""
        f = self.image_features
        if live:
            with self.autocast():
                f = F.normalize(self.clip_model.encode_image(self.images).float(), dim=-1)
        gate_logits, _, t, logits = self.model(f, text_features=text() if text else None)
        total = image_loss(logits, self.labels)
        if "gate" in losses:
            target = gate_target(f, self.prototypes, self.labels, self.model.top_k)
            total = total + gate_loss(gate_logits, target)
        if "text" in losses:
            total = total + self.config["text_weight"] * text_loss(t, self.prototypes)
        self.optimiser.zero_grad()
        total.backward()
        self.optimiser.step()

    def before(self, layout):
        """A step of ours with clip's own QuickGELU. layout: of a piece, how to lay it out."""
        sentences = self.model.prompts.sentences
        before = [layout(batch) for batch in sentences.batches]
        with (
            mock.patch.object(sentences, "batches", before),
            mock.patch.object(text_encoder, "blocks_of", _blocks_before),
        ):
            self.step()

    def places(self):
        """How many places the text encoder computes in a step."""
        return sum(len(batch.token) for batch in self.model.prompts.sentences.batches)

    def ways(self):
        """{name: (step, tokens that the text encoder computes)}, each with one more idea."""
        to_eot, whole = int(self.eot.max()) + 1, self.clip_model.context_length
        n, batches = len(self.eot), self.model.prompts.sentences.batches

        def plain(encode, length, **options):
            text = partial(self.one_a_row, encode, length)
            return partial(self.step, text, **options), n * length

        return {
            "straightforward": plain(clips_own, whole, live=True),
            "images encoded once": plain(clips_own, whole),
            "stop at EOT": plain(clips_own, to_eot),
            "attention in one kernel": plain(encode_text, to_eot),
            "shared beginnings": (
                partial(self.before, whole_rows),
                sum(batch.rows.numel() for batch in batches),
            ),
            "each place once": (partial(self.before, lambda piece: piece), self.places()),
            "QuickGELU as silu": (self.step, self.places()),
        }
