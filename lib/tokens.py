"""CLIP's tokenizer, and which words and lengths a CLIP can read."""

import functools
import re

from lib.errors import BadInput

SOS, EOT = 49406, 49407  # CLIP's start and end of text


@functools.cache
def _tokenizer():
    from clip.simple_tokenizer import SimpleTokenizer  # here, as all that brings torchvision along

    return SimpleTokenizer()


@functools.cache
def token_ids(text):
    """CLIP's tokens of a piece of text, without SOS and EOT. Tokens, not words: `close-up` is 3."""
    return tuple(_tokenizer().encode(text))


def fill_in(template, names):
    """The tokens of a template with each name in the place of its {}: a list of tuples.

    Names and the template's halves are read once each where that gives the same tokens: "{}." with
    "star", but not with "U.S." or "crane (bird)", whose last sign joins the full stop.
    """
    before, after = template.split("{}")
    return [
        token_ids(before) + token_ids(name) + token_ids(after)
        if _apart(before, name) and _apart(name, after)
        else token_ids(before + name + after)
        for name in names
    ]


def _apart(left, right):
    """Whether CLIP's tokenizer reads two texts, one after the other, as it reads each alone.

    It looks for runs of letters, single digits, runs of signs, and 's, 't, ... by themselves. It
    repairs what is not ASCII, decodes HTML (&...;) and knows <|...|>: such texts stay whole.
    """
    text = left + right
    if not text.isascii() or not text.isprintable() or "&" in text or "<" in text:
        return False
    runs_on = r"[a-z]{2} | '[a-z] | [^a-z0-9\s]{2}"
    return not re.fullmatch(runs_on, left[-1:] + right[:1], re.IGNORECASE | re.VERBOSE)


def words_of(ids):
    """The words, or pieces of words, that tokens stand for."""
    return [_tokenizer().decoder[i].replace("</w>", "") for i in ids]


def known_tokens(clip_model):
    """The tokens that have an embedding, a set. All of them but in the bundled CLIP."""
    known = ~clip_model.token_embedding.weight.isnan().any(dim=1)
    return set(known.nonzero().flatten().tolist())


def check_words(known, ids, text):
    """Raises BadInput, naming the word, if a token of `text` has no embedding."""
    if not known.issuperset(ids):
        words = re.findall(r"[\w'-]+|\S", text)
        unknown = next((w for w in words if not known.issuperset(token_ids(w))), text)
        raise BadInput(f"this CLIP has never seen the word {unknown!r} (in {text!r})")


def check_length(clip_model, length, text):
    """Raises BadInput if a sentence of so many tokens is longer than the CLIP reads."""
    if length > clip_model.context_length:
        raise BadInput(
            f"{text!r} is {length} tokens long, and this CLIP reads {clip_model.context_length}:"
            " shorten the class name or the template"
        )
