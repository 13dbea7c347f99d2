"""The text encoder on rows of sentences: the same numbers as one sentence a row, for less."""

import gzip
import json
import random

import pytest
import torch
import torch.nn.functional as F
from conftest import HERE

from lib import encoder
from lib.catalogue import DATASETS
from lib.encoder import encode_text, pack
from lib.templates import all_templates
from prompts import SoftPrompts
from tools.steps import one_sentence_a_row

NAMES = ["cat", "sea", "Annual Crop Land", "long-sleeved t-shirt", "red star", "red ring"]
EVERY_TEMPLATE = sorted({t for row in DATASETS.values() for t in all_templates(row.templates)})


def largest_difference(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


def soft(model, templates, names=NAMES):
    prompts = SoftPrompts(model, templates)
    prompts.set_classes(model, names)
    return prompts


def one_by_one(model, prompts):
    """The prompts' text features without sharing anything, by the plain encoder."""
    index, eot = one_sentence_a_row(prompts, model.context_length)
    table = torch.cat([prompts.sentences.frozen, prompts.context()])
    features = encode_text(model, F.embedding(index, table), eot)
    return F.normalize(features, dim=-1).view(*prompts.sentences.shape, -1)


def gradients(prompts, features):
    """Of a fixed weighting of the features, by parameter."""
    weighting = torch.randn(features.shape, generator=torch.Generator().manual_seed(0))
    prompts.zero_grad()
    (features * weighting).sum().backward()
    return torch.cat([p.grad.flatten() for p in prompts.parameters()])


def test_rows_give_every_template_of_every_dataset_its_own_features_and_gradients(random_clip):
    prompts = soft(random_clip, EVERY_TEMPLATE)
    shared, plain = prompts.text_features(random_clip), one_by_one(random_clip, prompts)
    assert len(EVERY_TEMPLATE) > 40
    assert largest_difference(shared, plain) < 1e-5
    assert largest_difference(gradients(prompts, shared), gradients(prompts, plain)) < 1e-4


def test_rows_give_the_real_class_names_their_own_features(random_clip):
    splits = json.loads(gzip.decompress((HERE / "field_splits.json.gz").read_bytes()))
    assert len(splits) == 7
    for split in splits.values():
        names = [name.replace("_", " ") for name in split["names"]]
        prompts = soft(random_clip, ["a photo of a {}, a type of flower.", "{}."], names)
        with torch.no_grad():
            shared, plain = prompts.text_features(random_clip), one_by_one(random_clip, prompts)
        assert largest_difference(shared, plain) < 1e-5


# --------------------------------------------------------------------------------------- packing


def sentences_in(rows):
    """The sentences that stand in rows: {sentence: its tokens in order}."""
    found = {}
    for row in range(len(rows)):
        owners = rows.sentence[row].tolist()
        for s in {owner for owner in owners if owner >= 0}:
            places = [i for i, owner in enumerate(owners) if owner in (-1, s)]
            places.sort(key=lambda i: rows.position[row, i])
            assert rows.position[row, places].tolist() == list(range(len(places)))
            assert rows.ends[row, places].tolist() == [False] * (len(places) - 1) + [True]
            assert s not in found
            found[s] = rows.token[row, places].tolist()
    return found


@pytest.mark.parametrize("seed", range(20))
def test_every_sentence_stands_whole_in_exactly_one_row(seed):
    rng = random.Random(seed)
    prompts = []
    for _ in range(rng.randint(1, 6)):
        start = [0, *rng.choices(range(10, 20), k=rng.randint(0, 8))]
        n = rng.randint(1, 40)
        prompts.append(
            [[*start, *rng.choices(range(20, 30), k=rng.randint(0, 6)), 1] for _ in range(n)]
        )
    rows = pack(prompts, width=rng.choice([16, 64, 512]))
    flat = [sentence for sentences in prompts for sentence in sentences]
    assert sentences_in(rows) == dict(enumerate(flat))
    owner = [g for g, sentences in enumerate(prompts) for _ in sentences]
    for row, sentence in zip(rows.prompt.tolist(), rows.sentence):
        assert {owner[s] for s in sentence[sentence >= 0]} == {row}
    unused = (rows.sentence == -2).sum() / rows.sentence.numel()
    assert unused < 0.5


def test_the_common_beginning_of_a_prompt_is_computed_once_if_all_fits_a_row():
    sentences = [[0, 5, 6, name, 1] for name in (7, 8, 9)]
    rows = pack([sentences], width=10**6)  # attention costs next to nothing
    assert rows.token.tolist() == [[0, 5, 6, 7, 1, 8, 1, 9, 1]]
    assert rows.position.tolist() == [[0, 1, 2, 3, 4, 3, 4, 3, 4]]


def test_narrow_encoders_get_shorter_rows():
    sentences = [[0, 5, 6, name, 1] for name in range(10, 200)]
    lengths = [pack([sentences], width).token.shape[1] for width in (8, 64, 512, 10**6)]
    assert lengths == sorted(lengths) and lengths[0] < 20 and lengths[-1] == 3 + 190 * 2


# ------------------------------------------------------------------------- only some of the rows


def test_features_and_gradients_do_not_depend_on_the_chunk(random_clip):
    prompts = soft(random_clip, EVERY_TEMPLATE[:9])
    whole = prompts.text_features(random_clip)
    expected = gradients(prompts, whole)
    for chunk in (1, 7, 20):
        parts = prompts.text_features(random_clip, chunk=chunk)
        assert largest_difference(parts, whole) < 1e-5
        assert largest_difference(gradients(prompts, parts), expected) < 1e-4


def saved_bytes(action):
    """What autograd keeps for the backward pass, apart from parameters."""
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.setdefault((t.data_ptr(), t.shape), t), lambda t: t
    ):
        result = action()
    assert result.requires_grad
    return sum(t.nbytes for t in kept.values())


def test_in_chunks_nothing_inside_the_encoder_is_kept(random_clip):
    prompts = soft(random_clip, EVERY_TEMPLATE)
    whole = saved_bytes(lambda: prompts.text_features(random_clip))
    parts = saved_bytes(lambda: prompts.text_features(random_clip, chunk=30))
    features = prompts.sentences.shape[0] * prompts.sentences.shape[1] * 64 * 4
    assert whole > 20 * features
    assert parts < 8 * features


def test_prompts_that_nobody_reads_are_left_out_and_get_zero_gradients(random_clip, monkeypatch):
    prompts = soft(random_clip, ["a photo of a {}.", "{} texture.", "a sketch of a {}."])
    whole = prompts.text_features(random_clip)
    seen = []
    encode = encoder.encode_rows
    monkeypatch.setattr(
        encoder, "encode_rows", lambda m, e, rows: seen.extend(rows.prompt) or encode(m, e, rows)
    )
    only = torch.tensor([True, False, True])
    some = prompts.text_features(random_clip, only=only)
    assert set(map(int, seen)) == {0, 2}
    assert largest_difference(some[only], whole[only]) < 1e-5
    some[only].sum().backward()
    assert prompts.context_after[1].grad.abs().max() == 0
    assert prompts.context_before[0].grad.abs().max() > 0
