"""CLIP's tokenizer, and which words and lengths a CLIP can read."""

import re

from lib.errors import BadInput

SOS, EOT = 49406, 49407  # CLIP's start and end of text


def token_ids(text):
    """CLIP's tokens of a piece of text, without SOS and EOT. Tokens, not words: `close-up` is 3."""
    import clip  # here, as are all imports of torchvision: --help need not wait a second for it

    row = clip.tokenize(text, context_length=512, truncate=True)[0]
    return row[1 : row.argmax()].tolist()


def words_of(ids):
    """The words, or pieces of words, that tokens stand for."""
    from clip.simple_tokenizer import SimpleTokenizer

    decoder = SimpleTokenizer().decoder
    return [decoder[i].replace("</w>", "") for i in ids]


def known_tokens(clip_model):
    """Which tokens have an embedding: (vocabulary,) bool. All but in the bundled CLIP."""
    return ~clip_model.token_embedding.weight.isnan().any(dim=1)


def check_words(known, ids, text):
    """Raises BadInput, naming the word, if a token of `text` has no embedding."""
    if not known[ids].all():
        words = re.findall(r"[\w'-]+|\S", text)
        unknown = next((w for w in words if not known[token_ids(w)].all()), text)
        raise BadInput(f"this CLIP has never seen the word {unknown!r} (in {text!r})")


def check_length(clip_model, length, text):
    """Raises BadInput if a sentence of so many tokens is longer than the CLIP reads."""
    if length > clip_model.context_length:
        raise BadInput(
            f"{text!r} is {length} tokens long, and this CLIP reads {clip_model.context_length}:"
            " shorten the class name or the template"
        )
