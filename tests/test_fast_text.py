"""The fast text encoder: the plain one's numbers, with less work, in less memory, in parts."""

import random

import pytest
import torch
import torch.nn.functional as F
from test_prompts import EVERY_TEMPLATE, NAMES, gradients, largest_difference

from lib import parallel
from lib.fast_text import FastTextEncoder, pack
from prompts import EOT, SOS, VOCABULARY, SoftPrompts, TextEncoder


def vectors_of(sentences, *sets):
    """Context vectors, (V, W) or a set of them, as many as the sentences ask for."""
    largest = max(i for prompt in sentences for ids in prompt for i in ids)
    rng = torch.Generator().manual_seed(0)
    n_vectors = max(0, largest + 1 - VOCABULARY)
    return (0.02 * torch.randn(*sets, n_vectors, 64, generator=rng)).requires_grad_()


def check(clip_model, sentences, chunk, *sets):
    """The fast encoder has the features and gradients of the plain one."""
    vectors = vectors_of(sentences, *sets)
    fast = FastTextEncoder(clip_model, sentences, chunk)(vectors)
    plain = TextEncoder(clip_model, sentences)(vectors)
    assert fast.shape == plain.shape == (*sets, len(sentences), len(sentences[0]), 64)
    assert largest_difference(fast, plain) < 1e-5
    assert largest_difference(gradients(fast, vectors), gradients(plain, vectors)) < 1e-4


def sentences_of(clip_model, templates, names):
    """[prompt][class] -> ids"""
    return SoftPrompts(clip_model, templates, names, text_encoder=lambda _, ids: ids).encoder


@pytest.mark.parametrize("chunk, sets", [(None, []), (100, [2])])
def test_the_templates_of_all_datasets_are_read_alike(random_clip, chunk, sets):
    check(random_clip, sentences_of(random_clip, EVERY_TEMPLATE, NAMES), chunk, *sets)


def random_sentences(rng):
    """Many begin alike, some are the same; words and vectors stand anywhere."""
    ids, n_classes = [320, 1125, 2368, *range(VOCABULARY, VOCABULARY + 3)], rng.randint(1, 12)
    sentences = []
    for _ in range(rng.randint(1, 5)):
        start = [SOS, VOCABULARY, *rng.choices(ids, k=rng.randint(0, 8))]
        ends = [rng.choices(ids[2:5], k=rng.randint(0, 6)) for _ in range(n_classes)]
        sentences.append([[*start, *end, EOT] for end in ends])
    return sentences


@pytest.mark.parametrize("seed", range(8))
def test_random_sentences_are_read_alike(random_clip, seed):
    rng = random.Random(seed)
    check(random_clip, random_sentences(rng), rng.choice([None, 1, 7]), *rng.choice([[], [3]]))


# --------------------------------------------------------------------------------- less work


def test_what_sentences_have_in_common_is_computed_once():
    sentences = [0, 5, 6, 7, 1], [0, 5, 6, 8, 1], [0, 5, 6, 7, 9, 1], [0, 5, 6, 8, 1]
    (piece,) = pack([dict(enumerate(sentences))])
    assert len(piece.token) == len([0, 5, 6, 7, 1, 9, 1, 8, 1])


def test_attention_works_on_short_rows():
    (piece,) = pack([{i: [0, 5, 6, 10 + i, 1] for i in range(200)}])
    assert len(piece.token) == 3 + 200 * 2
    assert piece.rows.shape[1] < 100 and piece.rows.numel() < 1.5 * len(piece.token)


def test_half_precision_is_used_exactly_where_gradients_are_recorded(random_clip, monkeypatch):
    sentences = sentences_of(random_clip, EVERY_TEMPLATE[:5], NAMES)
    vectors, encoder = vectors_of(sentences), FastTextEncoder(random_clip, sentences)
    exact = encoder(vectors)
    monkeypatch.setattr(parallel, "mixed_dtype", lambda device: torch.bfloat16)
    rounded = encoder(vectors)
    assert rounded.dtype == torch.float32
    assert 1e-4 < largest_difference(rounded, exact) < 0.05  # bf16 has 8 bits: 0.4% a product
    expected = gradients(exact, vectors)
    assert F.cosine_similarity(gradients(rounded, vectors), expected, dim=0) > 0.99
    with torch.no_grad():
        assert largest_difference(encoder(vectors), exact) < 1e-5
    assert largest_difference(encoder(vectors.detach()), exact) < 1e-5


# ----------------------------------------------------------------------------------- in parts


@pytest.mark.parametrize("world, chunk", [(2, 2), (8, None)])
def test_the_parts_of_all_processes_add_up(random_clip, monkeypatch, world, chunk):
    """Each process encodes sentences of its own; a process without any takes part, too."""
    sentences = sentences_of(random_clip, EVERY_TEMPLATE[:3], [*NAMES, "sea", "red star"])
    vectors, features, gradient = vectors_of(sentences), 0, 0
    whole = TextEncoder(random_clip, sentences)(vectors)
    monkeypatch.setattr(parallel, "world", lambda: world)
    monkeypatch.setattr(parallel, "sum_over_processes", lambda x: x)
    monkeypatch.setattr(parallel, "sum_gradients", lambda x: x)
    for rank in range(world):  # of 8, three have no class
        monkeypatch.setattr(parallel, "rank", lambda rank=rank: rank)
        part = FastTextEncoder(random_clip, sentences, chunk)(vectors)
        features, gradient = features + part, gradient + gradients(part, vectors)
    assert largest_difference(features, whole) < 1e-5
    assert largest_difference(gradient, gradients(whole, vectors)) < 1e-4


def saved_bytes(action):
    """What autograd keeps for the backward pass."""
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.setdefault((t.data_ptr(), t.shape), t), lambda t: t
    ):
        action()
    return sum(t.nbytes for t in kept.values())


def test_in_chunks_nothing_inside_the_encoder_is_kept(random_clip):
    sentences = sentences_of(random_clip, EVERY_TEMPLATE[:10], NAMES)
    whole, parts = (FastTextEncoder(random_clip, sentences, chunk) for chunk in (None, 9))
    assert all(len(piece.sentence) <= 9 for piece in parts.batches)
    vectors = vectors_of(sentences)
    features = parts(vectors).nbytes
    assert saved_bytes(lambda: whole(vectors)) > 20 * features
    assert saved_bytes(lambda: parts(vectors)) < 8 * features
