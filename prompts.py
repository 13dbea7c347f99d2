"""Templates and groups, hard prototypes, soft prompts.

A *template* is a sentence with a place for the class name: "a photo of a {}.". Templates that say
the same thing about an image ("a low resolution photo of", "a pixelated photo of") form a *group*.
Each group gets

- one *hard prototype* a class: the mean text feature of its templates, computed once, and
- one *soft prompt*: its first template, whose words, all but the class name, become vectors that
  training may move.

Letters in shapes: G groups = soft prompts, T templates, C classes, L tokens, W width of the text
encoder, D width of the joint embedding.
"""

import math
import re
from itertools import chain
from pathlib import Path

import clip
import torch
import torch.nn as nn
import torch.nn.functional as F

from backbone import BadInput
from encoder import CHUNK, encode_sentences, pack  # how the encoder is fast: a file of its own

# ---------------------------------------------------------------------------------- templates
# The published groups (arXiv 2409.12011 and its code). The first template of a group starts its
# soft prompt.

PHOTO = ["a photo of a {}."]
MANY = ["a photo of many {}."]
LARGE = ["a photo of the large {}.", "a photo of a large {}."]
SMALL = ["a photo of the small {}.", "a photo of a small {}."]
GOOD = ["a good photo of the {}.", "a good photo of a {}."]
LOW_RESOLUTION = [
    "a low resolution photo of the {}.",
    "a low resolution photo of a {}.",
    "a pixelated photo of the {}.",
    "a pixelated photo of a {}.",
]
FLOWER = ["a photo of a {}, a type of flower."]
AIRCRAFT = ["a photo of a {}, a type of aircraft."]
ACTION = ["a photo of a person doing {}."]
SATELLITE = ["a centered satellite photo of {}."]
TEXTURE = ["{} texture."]
VIDEO_GAME = ["a {} in a video game."]
MY_PHOTO = ["itap of a {}.", "itap of the {}."]  # "I took a picture"
ART = ["art of the {}.", "a rendering of a {}.", "a rendering of the {}."]
ORIGAMI = ["a origami {}."]
HARD_TO_SEE = ["a photo of the hard to see {}."]
GENERAL = [PHOTO, MANY, LOW_RESOLUTION, GOOD]  # SUN397's, and those of a folder of one's own

IMAGENET_VARIANT = [
    *(FLOWER, ACTION, SATELLITE, AIRCRAFT, MY_PHOTO, LARGE, ART),
    *(["a photo of the small {}."], PHOTO, MANY),
    ["a low resolution photo of the {}.", "a pixelated photo of a {}."],
    *(GOOD, VIDEO_GAME, HARD_TO_SEE, ORIGAMI, TEXTURE),
]
IMAGENET = [
    *IMAGENET_VARIANT[:10],
    [
        *LOW_RESOLUTION,
        "a jpeg corrupted photo of the {}.",
        "a blurry photo of a {}.",
        "a bad photo of the {}.",
    ],
    ["a cropped photo of the {}.", "a cropped photo of a {}."],
    ["a bright photo of the {}."],
    GOOD,
    ["a close-up photo of the {}."],
    ["a photo of the clean {}."],
    *(VIDEO_GAME, HARD_TO_SEE, ORIGAMI, TEXTURE),
]

TEMPLATE_GROUPS = {
    "caltech101": [TEXTURE, *GENERAL],
    "dtd": [TEXTURE, *GENERAL],
    "eurosat": [SATELLITE, PHOTO, LARGE, SMALL, LOW_RESOLUTION, GOOD],
    "fgvc_aircraft": [AIRCRAFT, *GENERAL],
    "food101": [
        ["a photo of a  {}."],  # two spaces as published; the tokenizer reads one
        ["a photo of the delicious {}.", "a photo of the tasty {}.", "A dish of the {}."],
        *(LOW_RESOLUTION, GOOD),
    ],
    "imagenet": IMAGENET,
    "imagenet_a": IMAGENET_VARIANT,
    "imagenet_r": IMAGENET_VARIANT,
    "imagenet_sketch": IMAGENET_VARIANT,
    "imagenetv2": IMAGENET_VARIANT,
    "oxford_flowers": [FLOWER, *GENERAL],
    "oxford_pets": [SMALL[:1], LARGE, *GENERAL],
    "stanford_cars": [
        [
            "A photo of the high-performance {}.",
            "A photo of the modern {}.",
            "A photo of the fast {}.",
        ],
        *GENERAL,
    ],
    "sun397": GENERAL,
    "ucf101": [ACTION, VIDEO_GAME, *GENERAL],
    # The embedded world: one group a style, in the order of shapes.STYLES.
    "shapes": [
        ["a photo of a {}.", "a good photo of a {}.", "a good photo of the {}."],
        ["a photo of a large {}.", "a photo of the large {}."],
        ["a photo of a small {}.", "a photo of the small {}."],
        ["a photo of many {}."],
        ["a sketch of a {}.", "a sketch of the {}.", "a drawing of a {}.", "a drawing of the {}."],
        LOW_RESOLUTION,
        ["a blurry photo of a {}.", "a blurry photo of the {}."],
        ["a dark photo of a {}.", "a dark photo of the {}."],
    ],
}

# What `zero-shot` means: one template a dataset, CoOp's.
ZERO_SHOT_TEMPLATES = {
    "oxford_pets": "a photo of a {}, a type of pet.",
    "oxford_flowers": "a photo of a {}, a type of flower.",
    "fgvc_aircraft": "a photo of a {}, a type of aircraft.",
    "dtd": "{} texture.",
    "eurosat": "a centered satellite photo of {}.",
    "food101": "a photo of {}, a type of food.",
    "ucf101": "a photo of a person doing {}.",
}


for shifted in ("shapes_v2", "shapes_sketch", "shapes_a", "shapes_r"):
    TEMPLATE_GROUPS[shifted] = TEMPLATE_GROUPS["shapes"]


def template_groups(dataset):
    """The groups of a dataset; the general ones for a folder of one's own."""
    return TEMPLATE_GROUPS.get(dataset, GENERAL)


def read_groups(file):
    """Template groups of one's own: one template a line, a blank line between groups.

    Raises BadInput if the file cannot be read, is empty, or has a template without {}.
    """
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise BadInput(f"cannot read the template groups in {file}: {error}") from error
    groups = [[]]
    for line in map(str.strip, lines):
        if line:
            groups[-1].append(check_template(line))
        else:
            groups.append([])
    groups = [group for group in groups if group]
    if not groups:
        raise BadInput(f"{file} holds no template")
    firsts = [group[0] for group in groups]
    for template in firsts:  # a prompt goes by the template it started from
        if firsts.count(template) > 1:
            raise BadInput(f"{file}: two groups start with {template!r}")
    return groups


def check_template(template):
    """The template; raises BadInput unless it has one place for the class name."""
    if template.count("{}") != 1:
        raise BadInput(f"the template {template!r} needs one {{}} where the class name goes")
    return template


def zero_shot_template(dataset):
    return ZERO_SHOT_TEMPLATES.get(dataset, "a photo of a {}.")


# ----------------------------------------------------------------------------- hard templates

SOS, EOT = 49406, 49407  # CLIP's start and end of text


def token_ids(text):
    """CLIP's tokens of a piece of text, without SOS and EOT. Tokens, not words: `close-up` is 3."""
    row = clip.tokenize(text, context_length=512, truncate=True)[0]
    return row[1 : row.argmax()].tolist()


def _check_length(model, length, text):
    if length > model.context_length:
        raise BadInput(
            f"{text!r} is {length} tokens long, and this CLIP reads {model.context_length}:"
            " shorten the class name or the template"
        )


def _check_words(known, ids, text):
    """Raises BadInput, naming the word, if a token of `text` has no embedding."""
    if not known[ids].all():
        words = re.findall(r"[\w'-]+|\S", text)
        unknown = next((w for w in words if not known[token_ids(w)].all()), text)
        raise BadInput(f"this CLIP has never seen the word {unknown!r} (in {text!r})")


def _known_tokens(model):
    """Which tokens have an embedding: (vocabulary,) bool. All of them, but for the bundled CLIP."""
    return ~model.token_embedding.weight.isnan().any(dim=1)


@torch.no_grad()
def template_features(model, templates, class_names, chunk=CHUNK):
    """Every template with every class name, as CLIP reads it: (T, C, D), normalised.

    Each sentence ends in exactly one full stop, whether the template brings it or not.
    chunk: how many are encoded at a time.
    Raises BadInput for a template without {}, a sentence too long, a word without an embedding.
    """
    known = _known_tokens(model)
    sentences = []  # [template][class]: tokens
    for template in templates:
        sentence = check_template(template).strip().rstrip(".") + "."
        sentences.append([])
        for name in class_names:
            text = sentence.replace("{}", name)
            tokens = [SOS, *token_ids(text), EOT]
            _check_length(model, len(tokens), text)
            _check_words(known, tokens, text)
            sentences[-1].append(tokens)
    table = model.token_embedding.weight
    rows = pack(sentences, table.shape[1], table.device)
    features = encode_sentences(model, table, rows, len(templates) * len(class_names), chunk)
    return F.normalize(features, dim=-1).view(len(templates), len(class_names), -1)


def hard_prototypes(features, groups):
    """p[g, c]: the mean of each group's template features, normalised again.

    features: (T, C, D) from `template_features` of all templates of `groups`, in order.
    groups: lists of templates. Returns (G, C, D).
    """
    split = features.split([len(group) for group in groups])
    return F.normalize(torch.stack([f.mean(dim=0) for f in split]), dim=-1)


# ------------------------------------------------------------------------------- soft prompts


class SoftPrompts(nn.Module):
    """One learnable prompt a template: its words become vectors, the class name stays itself.

        "a photo of a {}, a type of flower."
         v v     v  v name v v   v    v          v: a context vector, shared by all classes

    SOS, the name's tokens and EOT stay frozen. The full stop is dropped, as in the published code
    (the hard templates keep theirs). The parameters know
    nothing of the classes: `set_classes` lays the prompts out for any names, also for classes
    that training never saw.
    """

    def __init__(self, model, templates, init="template"):
        """model: a `clip.model.CLIP`. templates: one string a prompt, each with one {}.
        init: what the context starts from: each prompt's own `template`, `random` (16 vectors
        before the name, as in CoOp), or a template for all of them.

        Raises BadInput for a template without {} or with a word that has no embedding.
        """
        super().__init__()
        self.templates = list(templates)
        self.starts = self.templates if init == "template" else [init] * len(self.templates)
        # Made by `set_classes` on the device of its CLIP (so after any `.to`):
        self.frozen = None  # (R, W): embeddings of SOS, EOT and the names' tokens
        self.rows = None  # encoder.Rows: all prompts with all names, as indices into the table
        self.shape = None  # (G, C)
        known = _known_tokens(model)
        self.context_before, self.context_after = nn.ParameterList(), nn.ParameterList()
        for start in self.starts:
            if init == "random":
                vectors = 0.02 * torch.randn(16, model.token_embedding.weight.shape[1])
                self.context_before.append(nn.Parameter(vectors))
                self.context_after.append(nn.Parameter(vectors[:0].clone()))
                continue
            before, after = check_template(start).strip().rstrip(".").split("{}")
            for text, contexts in ((before, self.context_before), (after, self.context_after)):
                ids = torch.tensor(token_ids(text), dtype=torch.long)
                _check_words(known, ids, text)
                vectors = model.token_embedding.weight[ids].detach().float().clone()
                contexts.append(nn.Parameter(vectors))  # (number of tokens, W), maybe none

    def set_classes(self, model, class_names):
        """Lays out every prompt with every class name.

        All vectors that occur stand in one table: first the frozen ones, then each prompt's
        context. A sentence is then a list of indices into that table, and laying out G x C of them
        is one look-up, differentiable in the context.

        Raises BadInput for a name that makes a prompt too long or has no embedding.
        """
        known = _known_tokens(model)
        names = [token_ids(name) for name in class_names]
        for text, name in zip(class_names, names):
            _check_words(known, name, text)
        frozen = [SOS, EOT, *sorted({token for name in names for token in name})]
        index = {token: i for i, token in enumerate(frozen)}
        sentences, after = [], len(frozen)  # [prompt][class]: indices
        for start, context_before, context_after in zip(
            self.starts, self.context_before, self.context_after
        ):
            before, middle = after, after + len(context_before)
            after = middle + len(context_after)
            sentences.append([])
            for text, name in zip(class_names, names):
                name = [index[token] for token in name]
                sentence = [
                    index[SOS],
                    *range(before, middle),
                    *name,
                    *range(middle, after),
                    index[EOT],
                ]
                _check_length(model, len(sentence), f"the prompt {start!r} with {text!r}")
                sentences[-1].append(sentence)
        self.shape = len(self.templates), len(class_names)
        weight = model.token_embedding.weight
        self.frozen = weight[frozen].float()
        self.rows = pack(sentences, weight.shape[1], weight.device)

    def context(self):
        """All context vectors, prompt by prompt, as they follow `frozen` in the table: (V, W)."""
        return torch.cat([*chain(*zip(self.context_before, self.context_after))])

    def text_features(self, model, bias=None, shift=None, only=None, chunk=CHUNK):
        """t[g, c]: the frozen text encoder on soft prompt g with class c. (G, C, D), normalised.

        bias: None or (1, D), one vector added to all features before normalising (LASP's
        correction). shift: None or (B, W), added to all context vectors, one for each image as in
        CoCoOp; the result is then (B, G, C, D). only: None or (G,) bool, the prompts that somebody
        will read; the others are not computed, and what stands in their place is meaningless.
        chunk: see `encoder.encode_sentences`.
        """
        context = self.context()
        rows = self.rows if only is None else self.rows[only[self.rows.prompt]]
        n_sentences, shape = math.prod(self.shape), self.shape
        if shift is None:
            table = torch.cat([self.frozen, context])
        else:  # a table for each image, one after the other
            frozen = self.frozen.expand(len(shift), -1, -1)
            table = torch.cat([frozen, context + shift[:, None]], dim=1).flatten(0, 1)
            rows = rows.repeat(len(shift), len(table) // len(shift), n_sentences)
            n_sentences, shape = len(shift) * n_sentences, (len(shift), *shape)
        features = encode_sentences(model, table, rows, n_sentences, chunk)
        if bias is not None:
            features = features + bias
        return F.normalize(features, dim=-1).view(*shape, -1)
