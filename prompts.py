"""Templates in groups, what they give CLIP as they are, and the soft prompts that start from them.

A *template* is a sentence with a place for the class name: "a photo of a {}.". Templates that say
the same thing about an image form a *group*. The groups of EuroSAT as published, one per line:

    a centered satellite photo of {}.
    a photo of a {}.
    a photo of the large {}. | a photo of a large {}.
    a photo of the small {}. | a photo of a small {}.
    a low resolution photo of the {}. | a low resolution photo of a {}. |
        a pixelated photo of the {}. | a pixelated photo of a {}.
    a good photo of the {}. | a good photo of a {}.

Those of all datasets are in lib/catalogue.py. The templates of a group are *hard prompts*: fixed
text that CLIP reads as it is. Each group gives

- one *hard prototype* per class: the mean feature of its templates with that class name, and
- one *soft prompt*: its first template, whose words, all but the class name, become vectors that
  training may move.

Letters in shapes: G groups = soft prompts, T templates, C classes, V context vectors, W width of
the text encoder, D width of the joint embedding.
"""

from itertools import count

import torch
import torch.nn as nn
import torch.nn.functional as F

from lib.catalogue import row_of
from lib.probe import ClassVectors
from lib.templates import check_template
from lib.text_encoder import LEARNED, Sentences
from lib.tokens import EOT, SOS, check_length, check_words, fill_in, known_tokens, token_ids

# -------------------------------------------------------------------------------- hard prompts


@torch.no_grad()
def template_features(clip_model, templates, class_names, chunk=None):
    """CLIP's text features of every template with every class name: (T, C, D), normalised.

    Each sentence ends in exactly one full stop, whether the template brings it or not.
    chunk: how many are encoded at a time, see `Sentences`.
    Raises BadInput for a template without {}, a sentence too long, a word without an embedding.
    """
    known = known_tokens(clip_model)
    sentences = []  # [template][class]: tokens
    for template in templates:
        template = check_template(template).strip().rstrip(".") + "."
        sentences.append([])
        for name, ids in zip(class_names, fill_in(template, class_names)):
            sentence, tokens = template.replace("{}", name), [SOS, *ids, EOT]
            check_length(clip_model, len(tokens), sentence)
            check_words(known, tokens, sentence)
            sentences[-1].append(tokens)
    return F.normalize(Sentences(clip_model, sentences, chunk).encode(clip_model), dim=-1)


def hard_prototypes(features, groups):
    """p[g, c]: the mean of each group's template features, normalised again.

    features: (T, C, D) from `template_features` of all templates of `groups`, in order.
    groups: lists of templates. Returns (G, C, D).
    """
    split = features.split([len(group) for group in groups])
    return F.normalize(torch.stack([f.mean(dim=0) for f in split]), dim=-1)


def untrained_classifiers(clip_model, dataset, class_names, features):
    """CLIP as it is, the baselines that learn nothing: {"zeroshot": ..., "ensemble": ...}.

    zeroshot: the one template that CoOp uses for the dataset. ensemble, the stronger one: all
    templates' features (T, C, D) averaged and normalised. Both hold one vector per class.
    """
    one = template_features(clip_model, [row_of(dataset).zero_shot], class_names)[0]
    mean = F.normalize(features.mean(dim=0), dim=-1)
    scale = clip_model.logit_scale.exp().item()
    vectors = {"zeroshot": one, "ensemble": mean}
    return {name: ClassVectors(class_names, v, scale=scale) for name, v in vectors.items()}


# -------------------------------------------------------------------------------- soft prompts


class SoftPrompts(nn.Module):
    """One learnable prompt per template: its words become vectors, the class name stays itself.

        "a photo of a {}, a type of flower."
         v v     v  v name v v   v    v          v: a context vector, shared by all classes

    SOS, the name's tokens and EOT stay frozen. The full stop is dropped, as in the published code
    (hard prompts keep theirs), or stays, frozen, as in CoOp's. The parameters know nothing of the
    classes: `set_classes` takes any names, also of classes that training never saw.
    """

    def __init__(self, clip_model, templates, init="template", full_stop=False):
        """clip_model: a `clip.model.CLIP`. templates: one string per prompt, each with one {}.
        init: what the context starts from: each prompt's own `template`, `random` (16 vectors
        before the name, as in CoOp), or a template for all of them. full_stop: whether prompts end
        with one.

        Raises BadInput for a template without {} or with a word that has no embedding.
        """
        super().__init__()
        self.templates, self.full_stop = list(templates), full_stop
        self.sentences = None  # of `set_classes`: every prompt with every class name
        known, embeddings = known_tokens(clip_model), clip_model.token_embedding.weight
        self.context_before, self.context_after = nn.ParameterList(), nn.ParameterList()
        for template in self.templates:
            if init == "random":
                before = 0.02 * torch.randn(16, embeddings.shape[1])
                after = before[:0]
            else:
                start = template if init == "template" else init
                halves = check_template(start).strip().rstrip(".").split("{}")
                for half in halves:
                    check_words(known, token_ids(half), half)
                before, after = (embeddings[list(token_ids(half))].float() for half in halves)
            # (tokens, W) each; there are often none behind the name.
            self.context_before.append(nn.Parameter(before.detach().clone()))
            self.context_after.append(nn.Parameter(after.detach().clone()))

    def set_classes(self, clip_model, class_names, chunk=None):
        """Puts every class name into every prompt. chunk: see `Sentences`.

        Raises BadInput for a name that makes a prompt too long or has no embedding.
        """
        known = known_tokens(clip_model)
        names = fill_in("{}", class_names)
        for name, tokens in zip(class_names, names):
            check_words(known, tokens, name)
        # A full stop is read with what stands before it: the two of "U.S.." are one token.
        stop = token_ids(".") if self.full_stop else ()
        stopped = fill_in("{}.", class_names) if self.full_stop else names
        # A sentence is a list of ids: tokens of CLIP, and LEARNED + i for row i of `context()`.
        prompts, ids = [], count(LEARNED)
        for template, *contexts in zip(self.templates, self.context_before, self.context_after):
            before, after = ([next(ids) for _ in vectors] for vectors in contexts)
            if after:
                prompts.append([[SOS, *before, *name, *after, *stop, EOT] for name in names])
            else:
                prompts.append([[SOS, *before, *name, EOT] for name in stopped])
            for name, sentence in zip(class_names, prompts[-1]):
                check_length(clip_model, len(sentence), f"the prompt {template!r} with {name!r}")
        self.sentences = Sentences(clip_model, prompts, chunk)

    def context(self):
        """All context vectors, prompt by prompt: (V, W)."""
        halves = zip(self.context_before, self.context_after)
        return torch.cat([half for pair in halves for half in pair])

    def text_features(self, clip_model, bias=None, shift=None, only=None, dtype=torch.float32):
        """t[g, c]: the frozen text encoder on soft prompt g with class c. (G, C, D), normalised.

        bias: None or (1, D), one vector added to all features before normalising (LASP's
        correction). shift: None or (B, W), added to all context vectors, one for each image as in
        CoCoOp; the result is then (B, G, C, D). only: None, or a list of the prompts to encode;
        what stands in the place of the others is meaningless. dtype: of the encoder's products.
        """
        context = self.context() if shift is None else self.context() + shift[:, None]
        features = self.sentences.encode(clip_model, context, only, dtype)
        return F.normalize(features if bias is None else features + bias, dim=-1)
