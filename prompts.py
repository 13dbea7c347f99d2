"""Prompt learning: sentences whose words have become vectors, and the sentences they start from.

A *template* is a sentence with a slot for the class name: "a photo of a {}.". Templates that say
the same thing about an image form a *group*. The published groups of EuroSAT, one per line:

    a centered satellite photo of {}.
    a photo of a {}.
    a photo of the large {}. | a photo of a large {}.
    a photo of the small {}. | a photo of a small {}.
    a low resolution photo of the {}. | a low resolution photo of a {}. |
        a pixelated photo of the {}. | a pixelated photo of a {}.
    a good photo of the {}. | a good photo of a {}.

A *hard prompt* is a template as written: fixed text that CLIP reads. Each group provides

- one *hard prototype* per class: the mean feature of its templates with that class name, and
- one *soft prompt*: its first template, in which every word except the class name is replaced by
  a trainable vector.

`TextEncoder` is the one place where words are replaced.
Dimensions: G groups = soft prompts, T templates, C classes, N sentences, L tokens in a sentence,
V context vectors, W width of the text encoder, D width of the joint embedding, B images.
"""

import functools
import re
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

SOS, EOT = 49406, 49407  # CLIP's start and end of text
VOCABULARY = 49408  # the size of CLIP's vocabulary

# ---------------------------------------------------------------------------- the text encoder


class TextEncoder:
    """CLIP's frozen text encoder, reading sentences in which some words are vectors.

    A sentence is a list of ids, SOS first and EOT last. An id below VOCABULARY is a CLIP token;
    VOCABULARY + i stands for row i of the vectors that are passed to the call:

        a photo of a cat      SOS  v0 v1 v2 v3  cat  EOT       v0 ... v3: context vectors

    This is the straightforward implementation. lib/fast_text.py has the same interface and gives
    the same numbers, but computes what sentences have in common only once.
    """

    def __init__(self, clip_model, sentences):
        """sentences: [prompt][class] -> ids."""
        self.clip_model = clip_model
        self.shape = len(sentences), len(sentences[0])  # (G, C)
        device = clip_model.logit_scale.device
        flat = [ids for prompt in sentences for ids in prompt]
        length = max(len(ids) for ids in flat)
        # Attention is causal, so what follows EOT has no effect. Its embedding must still not be
        # NaN, as unknown words are in the bundled CLIP: the padding is EOT, which every CLIP knows.
        padded = [[*ids, *[EOT] * (length - len(ids))] for ids in flat]
        ids = torch.tensor(padded, device=device)  # (N, L)
        self.vector_positions = torch.nonzero(ids >= VOCABULARY, as_tuple=True)
        self.vector_rows = ids[self.vector_positions] - VOCABULARY  # the vector at each position
        self.tokens = ids.masked_fill(ids >= VOCABULARY, EOT)
        self.eot_positions = torch.tensor([len(ids) - 1 for ids in flat], device=device)  # (N,)

    def __call__(self, vectors=None):
        """Features of all sentences, not normalised: (G, C, D).

        vectors: None, (V, W), or (B, V, W) for B sets of vectors; the result is then (B, G, C, D).
        """
        if vectors is not None and vectors.dim() == 3:
            return torch.stack([self(one_set) for one_set in vectors])
        clip_model, length = self.clip_model, self.tokens.shape[1]

        # Prompt learning in two lines: look up all words, then replace some by vectors. Gradients
        # reach the vectors through this assignment.
        x = clip_model.token_embedding(self.tokens).float()  # (N, L, W)
        if vectors is not None:
            x[self.vector_positions] = vectors[self.vector_rows]

        # From here on this is plain CLIP: positions, transformer, and the feature at EOT, the only
        # token that has read the whole sentence.
        x = x + clip_model.positional_embedding[:length]
        x = x.transpose(0, 1)  # (L, N, W), as clip's attention expects it
        causal = torch.full((length, length), -torch.inf, device=x.device).triu(1)
        for block in clip_model.transformer.resblocks:
            y = block.ln_1(x)
            x = x + block.attn(y, y, y, need_weights=False, attn_mask=causal)[0]
            x = x + block.mlp(block.ln_2(x))
        x = x[self.eot_positions, torch.arange(x.shape[1], device=x.device)]  # (N, W)
        x = clip_model.ln_final(x) @ clip_model.text_projection  # (N, D)
        return x.view(*self.shape, -1)


# -------------------------------------------------------------------------------- hard prompts


@torch.no_grad()
def template_features(clip_model, templates, class_names, text_encoder=TextEncoder):
    """CLIP's text features of every template with every class name: (T, C, D), normalised.

    Each sentence ends in exactly one full stop, whether or not the template has one.
    Raises PromptError for a template without {}, a sentence that is too long, a word without an
    embedding, and features that are not finite.
    """
    sentences = hard_sentences(clip_model, templates, class_names)
    features = F.normalize(text_encoder(clip_model, sentences)(), dim=-1)
    if not (features.norm(dim=-1) > 0.5).all():  # they are 1, unless a feature is 0 or NaN
        raise PromptError("CLIP's text features are not finite numbers: are its weights damaged?")
    return features


def hard_sentences(clip_model, templates, class_names):
    """The ids of every template with every class name, for a text encoder: [template][class]."""
    known = known_tokens(clip_model)

    def read(template, name):
        words = check_template(template).strip().rstrip(".")
        sentence = words.replace("{}", name) + "."
        ids = [SOS, *token_ids(sentence), EOT]
        check_length(clip_model, ids, sentence)
        check_words(known, ids, sentence)
        return ids

    return [[read(template, name) for name in class_names] for template in templates]


def hard_prototypes(features, groups):
    """p[g, c]: the mean of each group's template features, normalised again.

    features: (T, C, D) from `template_features` of all templates of `groups`, in order.
    groups: lists of templates. Returns (G, C, D).
    """
    split = features.split([len(group) for group in groups])
    return F.normalize(torch.stack([f.mean(dim=0) for f in split]), dim=-1)


class HardText(NamedTuple):
    """CLIP's features of the hard prompts, with the class names used in training."""

    features: torch.Tensor  # (T, C, D), of every template
    prototypes: torch.Tensor  # (G, C, D), of every group
    prompt_of: torch.Tensor  # (T,), the group of each template


def hard_text(features, groups):
    """features: (T, C, D) from `template_features` of all templates of `groups`, in order."""
    prompt_of = [g for g, group in enumerate(groups) for _ in group]
    prompt_of = torch.tensor(prompt_of, device=features.device)
    return HardText(features, hard_prototypes(features, groups), prompt_of)


# -------------------------------------------------------------------------------- soft prompts


class SoftPrompts(nn.Module):
    """One learnable prompt per template: its words become vectors, the class name stays text.

        "a photo of a {}, a type of flower."
         v v     v  v name v v   v    v          v: a context vector, shared by all classes

    SOS, the name's tokens and EOT stay frozen. The full stop is dropped, as in the published code
    (hard prompts keep theirs), or kept frozen, as in CoOp. Since no vector belongs to a class, the
    prompts can be read with any names, including those of classes not seen in training.
    """

    def __init__(
        self,
        clip_model,
        templates,
        class_names,
        init="template",
        full_stop=False,
        text_encoder=TextEncoder,
    ):
        """clip_model: a `clip.model.CLIP`. templates: one string per prompt, each with one {}.
        class_names: the C names that `text_features` uses by default.
        init: what the context starts from: each prompt's own `template`, `random` (16 vectors
        before the name, as in CoOp), or a template for all of them. full_stop: whether prompts end
        with one.

        Raises PromptError for a template without {}, a word without an embedding, and a name that
        makes a prompt too long.
        """
        super().__init__()
        self.frozen = (clip_model,)  # in a tuple, so that CLIP does not become a submodule
        self.templates, self.full_stop, self.text_encoder = list(templates), full_stop, text_encoder
        known, embeddings = known_tokens(clip_model), clip_model.token_embedding.weight
        self.context_before, self.context_after = nn.ParameterList(), nn.ParameterList()
        for template in self.templates:
            if init == "random":
                before = 0.02 * torch.randn(16, embeddings.shape[1])  # CoOp's numbers
                after = before[:0]
            else:
                start = template if init == "template" else init
                halves = check_template(start).strip().rstrip(".").split("{}")
                for half in halves:
                    check_words(known, token_ids(half), half)
                before, after = (embeddings[token_ids(half)].float() for half in halves)
            # (tokens, W) each; often there are none after the name.
            self.context_before.append(nn.Parameter(before.detach().clone()))
            self.context_after.append(nn.Parameter(after.detach().clone()))
        self.class_names, self.cached_names = list(class_names), None
        self.encoder_of(self.class_names)  # raises now if a name cannot be read

    def encoder_of(self, class_names):
        """A text encoder that reads every prompt with each of these names. The last one is cached,
        since every step needs it.

        Raises PromptError for a name that makes a prompt too long or has no embedding.
        """
        if class_names == self.cached_names:
            return self.encoder
        (clip_model,) = self.frozen
        known = known_tokens(clip_model)
        sentences, n_vectors = [], 0
        for template, before, after in zip(self.templates, self.context_before, self.context_after):
            first = VOCABULARY + n_vectors
            middle, last = first + len(before), first + len(before) + len(after)
            n_vectors += len(before) + len(after)
            sentences.append([])
            for name in class_names:
                # A full stop is tokenised together with the name before it: two of them, as in
                # "U.S..", are a single token.
                name_ids = token_ids(name + "." if self.full_stop and not len(after) else name)
                stop = token_ids(".") if self.full_stop and len(after) else []
                check_words(known, name_ids, name)
                ids = [SOS, *range(first, middle), *name_ids, *range(middle, last), *stop, EOT]
                check_length(clip_model, ids, f"the prompt {template!r} with {name!r}")
                sentences[-1].append(ids)
        self.encoder = self.text_encoder(clip_model, sentences)
        self.cached_names = list(class_names)
        return self.encoder

    def context(self):
        """All context vectors, prompt by prompt, those before the name first: (V, W)."""
        halves = zip(self.context_before, self.context_after)
        return torch.cat([half for pair in halves for half in pair])

    def text_features(self, class_names=None, bias=None, shift=None):
        """t[g, c]: the frozen text encoder on soft prompt g with class c. (G, C, D), normalised.

        class_names: to use instead of the prompts' own. bias: None or (1, D), one vector added to
        all features before normalising (LASP's correction). shift: None or (B, W), added to all
        context vectors, one for each image as in CoCoOp; the result is then (B, G, C, D).
        """
        encoder = self.encoder_of(self.class_names if class_names is None else list(class_names))
        context = self.context() if shift is None else self.context() + shift[:, None]
        features = encoder(context)
        return F.normalize(features if bias is None else features + bias, dim=-1)


# ------------------------------------------------------------------ tokens, and what CLIP can read


class PromptError(ValueError):
    """A template or class name that this CLIP cannot read. The message is one line."""


@functools.cache
def _tokenizer():
    from clip.simple_tokenizer import SimpleTokenizer  # here, because the import takes two seconds

    return SimpleTokenizer()


def token_ids(text):
    """CLIP's tokens of a text, without SOS and EOT. Tokens, not words: `close-up` has three."""
    return _tokenizer().encode(text)


def words_of(ids):
    """The words, or pieces of words, that tokens stand for; `decoder` is clip's own table."""
    return [_tokenizer().decoder[i].replace("</w>", "") for i in ids]


def known_tokens(clip_model):
    """The set of tokens that have an embedding: all of them, except in the bundled CLIP, whose
    table holds NaN for the words it was not trained on."""
    known = ~clip_model.token_embedding.weight.isnan().any(dim=1)
    return set(known.nonzero().flatten().tolist())


def check_words(known, ids, text):
    """Raises PromptError, naming the word, if a token of `text` is not known."""
    if not known.issuperset(ids):
        words = re.findall(r"[\w'-]+|\S", text)
        unknown = next((w for w in words if not known.issuperset(token_ids(w))), text)
        raise PromptError(f"this CLIP has never seen the word {unknown!r} (in {text!r})")


def check_apart(names, folders=None):
    """Raises PromptError if two class names have the same CLIP tokens, regardless of capitals,
    spaces, accents or HTML entities. folders: how the message refers to the classes."""
    seen = {}
    for name, called in zip(names, folders or names):
        ids = tuple(token_ids(name))
        if ids in seen:
            raise PromptError(f"CLIP cannot tell the classes {seen[ids]!r} and {called!r} apart")
        seen[ids] = called


def check_length(clip_model, ids, text):
    """Raises PromptError if a sentence has more tokens than this CLIP reads."""
    if len(ids) > clip_model.context_length:
        raise PromptError(
            f"{text!r} is {len(ids)} tokens long, and this CLIP reads {clip_model.context_length}:"
            " shorten the class name or the template"
        )


def check_template(template):
    """Returns the template; raises PromptError unless it has exactly one {} for the class name."""
    if template.count("{}") != 1:
        raise PromptError(f"the template {template!r} needs one {{}} where the class name goes")
    return template
