"""The ways to take one training step, from the straightforward to ours, on a model of any size.

CLIP is a ViT-B/16 of random weights, except for `shapes`: speed does not depend on them. The class
names of `ucf101` and `imagenet` are made up, as long as UCF101's real ones.
"""

import random
from functools import partial

import clip
import torch
import torch.nn.functional as F
from clip.model import CLIP

from lib import processes, world
from lib.catalogue import template_groups
from lib.clip_model import load_clip
from lib.encoder import CHUNK, encode_text
from losses import gate_loss, image_loss, text_loss
from router import gate_target
from train import FLAGS, MoCoOp, flags

BATCH = 32
EUROSAT = """Annual Crop Land,Forest,Herbaceous Vegetation Land,Highway or Road,
    Industrial Buildings,Pasture Land,Permanent Crop Land,Residential Buildings,River,Sea or Lake"""
NAME_LENGTHS = [1] * 18 + [2] * 58 + [3] * 23 + [4, 5]  # tokens; UCF101's 101 names


def class_names(size, n_classes):
    if size == "shapes":
        return world.DOWNSTREAM
    if size == "eurosat":
        return [name.strip() for name in EUROSAT.split(",")]
    rng = random.Random(0)
    vocabulary = clip.simple_tokenizer.SimpleTokenizer().encoder
    words = [w[:-4] for w in vocabulary if w.endswith("</w>") and w[:-4].isalpha() and w.isascii()]
    return [" ".join(rng.choices(words, k=rng.choice(NAME_LENGTHS))) for _ in range(n_classes)]


def one_sentence_a_row(prompts, length):
    """The sentences of soft prompts, each in a row of its own: indices into the table of
    frozen and learned vectors (N, length), EOT (N,)."""
    sentences = prompts.sentences
    rows, n = sentences.rows, sentences.shape[0] * sentences.shape[1]
    index, eot = torch.zeros(n, length, dtype=torch.long), torch.zeros(n, dtype=torch.long)
    for token, position, sentence in zip(
        rows.token.cpu(), rows.position.cpu(), rows.sentence.cpu()
    ):
        common = sentence == -1
        for s in sentence[sentence >= 0].unique():
            own = sentence == s
            index[s, position[common]], index[s, position[own]] = token[common], token[own]
            eot[s] = position[own].max()
    return index.to(rows.token.device), eot.to(rows.token.device)


def clips_own(clip_model, embeddings, eot):
    """clip's own encoder, attention module and all, on as many positions as it is given."""
    length = embeddings.shape[1]
    for block in clip_model.transformer.resblocks:
        block.attn_mask = torch.full((length, length), -torch.inf, device=eot.device).triu(1)
    x = embeddings + clip_model.positional_embedding[:length]
    x = clip_model.transformer(x.permute(1, 0, 2)).permute(1, 0, 2)
    return clip_model.ln_final(x)[torch.arange(len(x)), eot] @ clip_model.text_projection


class Setting:
    """A model, prompts and a batch of one size, to take steps on."""

    def __init__(self, size, device, groups=None, n_classes=101):
        """size: `shapes`, `eurosat`, `ucf101` or `imagenet`. groups: of templates; None for the
        dataset's own. n_classes: how many names to make up."""
        torch.manual_seed(0)
        if size == "shapes":
            self.clip_model = load_clip("bundled", device)[0]
        else:
            self.clip_model = CLIP(512, 224, 12, 768, 16, 77, 49408, 512, 8, 12).float()
            self.clip_model = self.clip_model.requires_grad_(False).eval().to(device)
        self.device, self.config = device, {"chunk": CHUNK} | flags.method_defaults(FLAGS)
        groups = template_groups(size) if groups is None else groups
        names = class_names(size, n_classes)
        self.model = MoCoOp(self.clip_model, groups, self.config).to(device)
        self.model.prompts.set_classes(self.clip_model, names)
        length = self.clip_model.context_length
        self.index, self.eot = one_sentence_a_row(self.model.prompts, length)
        self.optimiser = torch.optim.SGD(self.model.parameters(), lr=1e-3, momentum=0.9)
        width, pixels = (
            self.clip_model.text_projection.shape[1],
            self.clip_model.visual.input_resolution,
        )
        self.images = torch.randn(BATCH, 3, pixels, pixels, device=device)
        self.image_features = F.normalize(torch.randn(BATCH, width, device=device), dim=-1)
        self.labels = torch.randint(len(names), (BATCH,), device=device)
        shape = len(groups), len(names), width
        self.prototypes = F.normalize(torch.randn(shape, device=device), dim=-1)

    def one_a_row(self, encode, length):
        """Text features the plain way, by an encoder of one sentence per row: (G, C, D)."""
        sentences = self.model.prompts.sentences
        table = torch.cat([sentences.frozen, self.model.prompts.context()])
        with processes.mixed_precision(self.device):
            embeddings = F.embedding(self.index[:, :length], table)
            features = encode(self.clip_model, embeddings, self.eot).float()
        return F.normalize(features, dim=-1).view(*sentences.shape, -1)

    def step(self, text=None, live=False, losses=("gate", "text")):
        """One step of training. text: gives the text features in place of the model's own way.
        live: encodes the images, too."""
        f = self.image_features
        if live:
            with processes.mixed_precision(self.device):
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

    def ways(self):
        """{name: (step, tokens that the text encoder computes)}, each with one more idea."""
        to_eot = int(self.eot.max()) + 1
        n, rows = len(self.eot), self.model.prompts.sentences.rows.token

        def plain(encode, length, **options):
            return partial(
                self.step, partial(self.one_a_row, encode, length), **options
            ), n * length

        return {
            "straightforward": plain(clips_own, self.clip_model.context_length, live=True),
            "images encoded once": plain(clips_own, self.clip_model.context_length),
            "stop at EOT": plain(clips_own, to_eot),
            "attention in one kernel": plain(encode_text, to_eot),
            "shared beginnings": (self.step, rows.numel()),
        }
