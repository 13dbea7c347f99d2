"""The fast text encoder: the plain one's numbers, with less work, in less memory, in parts."""

import random

import pytest
import torch
from conftest import unit
from test_prompts import largest_difference

from lib import parallel
from lib.fast_text import FastTextEncoder, pack
from prompts import EOT, SOS, VOCABULARY, TextEncoder


def random_sentences(seed):
    """[prompt][class] -> ids. Many begin alike, some are the same; words and vectors stand
    anywhere."""
    rng, ids = random.Random(seed), [320, 1125, *range(VOCABULARY, VOCABULARY + 4)]
    starts = [rng.choices(ids, k=rng.randint(0, 8)) for _ in range(4)]
    return [
        [[SOS, VOCABULARY, *start, *rng.choices(ids, k=n % 4), EOT] for n in range(9)]
        for start in starts
    ]


SENTENCES = random_sentences(0)


def vectors_of(*sets):
    """Four context vectors, or several sets of four."""
    return (0.1 * unit(*sets, 4, 64)).requires_grad_()


def numbers(encoder, *sets):
    """An encoder's features, and the vectors' gradients for a fixed weighting of the features."""
    vectors = vectors_of(*sets)
    features = encoder(vectors)
    weighted = features * unit(*features.shape, seed=1)
    return features, *torch.autograd.grad(weighted.sum(), vectors)


def check(found, expected):
    """Both encoders round fp32 products in another order, which moves gradients by some 1e-5."""
    for ours, plain, tolerance in zip(found, expected, (1e-5, 1e-4)):
        assert ours.shape == plain.shape and largest_difference(ours, plain) < tolerance


@pytest.mark.parametrize("sets", [[], [3]])
@pytest.mark.parametrize("chunk", [None, 1, 7])
@pytest.mark.parametrize("seed", range(2))
def test_random_sentences_have_the_plain_encoders_features_and_gradients(
    random_clip, seed, chunk, sets
):
    sentences = random_sentences(seed)
    fast = FastTextEncoder(random_clip, sentences, chunk)
    check(numbers(fast, *sets), numbers(TextEncoder(random_clip, sentences), *sets))


# --------------------------------------------------------------------------------- less work


def test_what_sentences_have_in_common_is_computed_once():
    """Each letter stands for a token."""
    sentences = b"Sabc.", b"Sabd.", b"Sabce.", b"Sabd."
    (piece,) = pack([dict(enumerate(sentences))])
    assert len(piece.token) == len(b"Sabc.") + len(b"e.") + len(b"d.")


def test_attention_works_on_short_rows():
    (piece,) = pack([{i: [0, 5, 6, 10 + i, 1] for i in range(200)}])
    assert len(piece.token) == 3 + 200 * 2
    assert piece.rows.shape[1] < 100 and piece.rows.numel() < 1.5 * len(piece.token)


def test_half_precision_is_used_exactly_where_gradients_are_recorded(random_clip, monkeypatch):
    encoder = FastTextEncoder(random_clip, SENTENCES)
    exact = numbers(encoder)
    monkeypatch.setattr(parallel, "mixed_dtype", lambda device: torch.bfloat16)
    for rounded, expected in zip(numbers(encoder), exact):
        assert rounded.dtype == torch.float32
        assert 1e-4 < largest_difference(rounded, expected) < 0.05  # bf16 has 8 bits
    assert largest_difference(encoder(vectors_of().detach()), exact[0]) < 1e-5


# ----------------------------------------------------------------------------------- in parts


def test_the_parts_of_all_processes_add_up(random_clip, monkeypatch):
    """Each process encodes classes of its own. Of 12, three have none and take part, too."""
    monkeypatch.setattr(parallel, "world", lambda: 12)
    monkeypatch.setattr(parallel, "sum_over_processes", lambda x: x)
    monkeypatch.setattr(parallel, "sum_gradients", lambda x: x)
    parts = []
    for rank in range(12):
        monkeypatch.setattr(parallel, "rank", lambda rank=rank: rank)
        parts.append(numbers(FastTextEncoder(random_clip, SENTENCES)))
    check(map(sum, zip(*parts)), numbers(TextEncoder(random_clip, SENTENCES)))


def saved_bytes(encoder):
    """What autograd keeps for the backward pass."""
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.append(t.nbytes) or t, lambda t: t
    ):
        encoder(vectors_of())
    return sum(kept)


def test_in_chunks_nothing_inside_the_encoder_is_kept(random_clip):
    whole, chunks = (FastTextEncoder(random_clip, SENTENCES, chunk) for chunk in (None, 9))
    assert all(len(piece.sentence) <= 9 for piece in chunks.batches)
    features = chunks(vectors_of()).nbytes
    assert saved_bytes(whole) > 20 * features
    assert saved_bytes(chunks) < 8 * features
