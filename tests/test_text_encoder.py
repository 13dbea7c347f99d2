"""The text encoder on trees of sentences: the same numbers as one sentence a row, for less."""

import gzip
import json
import random
from types import SimpleNamespace

import clip
import pytest
import torch
import torch.nn.functional as F
from conftest import HERE

from lib import processes, text_encoder, tokens
from lib.catalogue import DATASETS
from lib.packing import join, pack
from lib.templates import all_templates
from lib.text_encoder import chunk_for
from prompts import SoftPrompts, template_features
from tools.steps import encode_text

NAMES = ["cat", "sea", "Annual Crop Land", "long-sleeved t-shirt", "red star", "red ring"]
EVERY_TEMPLATE = sorted({t for row in DATASETS.values() for t in all_templates(row.templates)})
# Names that the tokenizer reads differently beside a full stop, a hyphen or an apostrophe.
AWKWARD = [
    "crane (bird)",
    "U.S.",
    "St. Peter's",
    "'s",
    "7",
    "AT&T",
    "a&lt",
    "café",
    "3D",
    "t-",
    "<|",
]


def largest_difference(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


def soft(model, templates, names=NAMES, chunk=None):
    prompts = SoftPrompts(model, templates)
    prompts.set_classes(model, names, chunk)
    return prompts


def one_by_one(model, prompts, names=NAMES):
    """The prompts' text features, each sentence by itself: tokens from `clip.tokenize`, with the
    context in the place of the template's words."""
    features = []
    for template, before, after in zip(
        prompts.templates, prompts.context_before, prompts.context_after
    ):
        tokens = clip.tokenize([template.rstrip(".").replace("{}", name) for name in names])
        embedded, eot = model.token_embedding(tokens), tokens.argmax(dim=-1)
        rows = []
        for row, end in zip(embedded, eot.tolist()):
            name = row[1 + len(before) : end - len(after)]
            rows.append(torch.cat([row[:1], before, name, after, row[end:]]))
        features.append(encode_text(model, torch.stack(rows), eot))
    return F.normalize(torch.stack(features), dim=-1)


def gradients(prompts, features):
    """Of a fixed weighting of the features, by parameter."""
    weighting = torch.randn(features.shape, generator=torch.Generator().manual_seed(0))
    prompts.zero_grad()
    (features * weighting).sum().backward()
    return torch.cat([p.grad.flatten() for p in prompts.parameters()])


def real_names():
    splits = json.loads(gzip.decompress((HERE / "field_splits.json.gz").read_bytes()))
    assert len(splits) == 7
    return {key: [n.replace("_", " ") for n in split["names"]] for key, split in splits.items()}


def test_every_template_of_every_dataset_gets_its_own_features_and_gradients(random_clip):
    prompts = soft(random_clip, EVERY_TEMPLATE)
    shared, plain = prompts.text_features(random_clip), one_by_one(random_clip, prompts)
    assert len(EVERY_TEMPLATE) > 40
    assert largest_difference(shared, plain) < 1e-5
    assert largest_difference(gradients(prompts, shared), gradients(prompts, plain)) < 1e-4


def test_the_real_class_names_get_their_own_features(random_clip):
    for names in real_names().values():
        prompts = soft(random_clip, ["a photo of a {}, a type of flower.", "{}."], names)
        with torch.no_grad():
            shared = prompts.text_features(random_clip)
            plain = one_by_one(random_clip, prompts, names)
        assert largest_difference(shared, plain) < 1e-5


def test_half_precision_products_move_features_by_little(random_clip):
    prompts = soft(random_clip, EVERY_TEMPLATE[:5])
    exact = prompts.text_features(random_clip)
    rounded = prompts.text_features(random_clip, dtype=torch.bfloat16)
    assert rounded.dtype == torch.float32
    assert 1e-5 < largest_difference(rounded, exact) < 0.05
    expected = gradients(prompts, exact)
    assert F.cosine_similarity(gradients(prompts, rounded), expected, dim=0) > 0.99


# --------------------------------------------------------------------------------------- packing


def random_trees(rng):
    trees, number = [], 0
    for _ in range(rng.randint(1, 6)):
        start = [0, *rng.choices(range(10, 20), k=rng.randint(0, 8))]
        tree = {}
        for _ in range(rng.randint(1, 40)):  # some begin alike, some are the same
            tree[number] = [*start, *rng.choices(range(20, 23), k=rng.randint(0, 6)), 1]
            number += 1
        trees.append(tree)
    return trees


def what_eot_sees(piece):
    """{sentence: the tokens that its EOT sees, in order, and itself}."""
    found = {}
    for number, end in zip(piece.sentence.tolist(), piece.ends.tolist()):
        row, i = divmod(piece.first[end].item(), piece.rows.shape[1])
        places = piece.rows[row][piece.sees[row, 0, i] == 0]
        assert piece.position[places].tolist() == list(range(len(places)))
        assert places[-1] == end
        found[number] = piece.token[places].tolist()
    return found


@pytest.mark.parametrize("seed", range(20))
def test_each_eot_sees_its_own_sentence_in_order_and_nothing_else(seed):
    trees = random_trees(random.Random(seed))
    pieces = pack(trees)
    for tree, piece in zip(trees, pieces):
        assert what_eot_sees(piece) == tree
    together = {number: sentence for tree in trees for number, sentence in tree.items()}
    assert what_eot_sees(join(pieces)) == together
    moved = what_eot_sees(join([piece.moved(100, 1000) for piece in pieces]))
    assert moved == {n + 1000: [i + 100 for i in sentence] for n, sentence in together.items()}


@pytest.mark.parametrize("seed", range(20))
def test_every_place_sees_what_stands_before_it_in_all_its_rows(seed):
    for piece in pack(random_trees(random.Random(seed))):
        visible = {}
        for row in range(len(piece.rows)):
            for i in range(piece.rows.shape[1]):
                places = piece.rows[row][piece.sees[row, 0, i] == 0].tolist()
                assert places  # or softmax would have nothing to look at
                if places[-1] == piece.rows[row, i] and len(set(places)) == len(places):
                    visible.setdefault(places[-1], set()).add(tuple(places))
        for place, position in enumerate(piece.position.tolist()):
            (only,) = visible[place]  # the same in every row
            assert len(only) == position + 1


def test_what_sentences_have_in_common_is_computed_once():
    (piece,) = pack(
        [{0: [0, 5, 6, 7, 1], 1: [0, 5, 6, 8, 1], 2: [0, 5, 6, 7, 9, 1], 3: [0, 5, 6, 8, 1]}]
    )
    # sorted: 5 6 7 EOT | EOT after 9 | 8 EOT, twice the same sentence
    assert len(piece.token) == len({(0,), (5,), (6,), (7,), "7 1", (9,), "9 1", (8,), "8 1"})
    assert piece.ends[piece.sentence == 1] == piece.ends[piece.sentence == 3]


def test_trees_of_many_sentences_take_several_rows():
    (piece,) = pack([{i: [0, 5, 6, 10 + i, 1] for i in range(200)}])
    assert len(piece.token) == 3 + 200 * 2
    assert len(piece.rows) > 5 and piece.rows.shape[1] < 100
    in_rows = (piece.sees[:, 0].diagonal(dim1=1, dim2=2) == 0).sum()
    assert in_rows == piece.rows.numel()  # every place sees itself, also where a row is too long
    assert piece.rows.numel() < 1.5 * len(piece.token)


# ----------------------------------------------------------------------- only some of the trees


@pytest.mark.parametrize("world", [2, 3, 8])
@pytest.mark.parametrize("chunk", [None, 2])
def test_processes_have_every_sentence_once(random_clip, monkeypatch, world, chunk):
    prompts, found = soft(random_clip, EVERY_TEMPLATE[:3]), []
    whole = prompts.text_features(random_clip)
    monkeypatch.setattr(processes, "world", lambda: world)
    for rank in range(world):  # of 8, two have no class
        monkeypatch.setattr(processes, "rank", lambda rank=rank: rank)
        prompts.set_classes(random_clip, NAMES, chunk)
        found += [n for batch in prompts.sentences.batches for n in batch.sentence.tolist()]
        with monkeypatch.context() as patch:  # one without a sentence waits for the others, too
            patch.setattr(processes, "sum_over_processes", lambda x: x)
            patch.setattr(processes, "sum_gradients", lambda x: x)
            assert prompts.text_features(random_clip).requires_grad
    assert sorted(found) == list(range(whole.shape[0] * len(NAMES)))


def test_some_prompts_and_sets_of_vectors_may_take_several_batches(random_clip):
    prompts = soft(random_clip, EVERY_TEMPLATE[:4])
    only, shift = [1, 3], 0.1 * torch.randn(3, 64)
    expected = prompts.text_features(random_clip, shift=shift)
    wanted = gradients(prompts, expected[:, only])
    prompts.set_classes(random_clip, NAMES, chunk=4)
    parts = prompts.text_features(random_clip, shift=shift, only=only)
    assert largest_difference(parts[:, only], expected[:, only]) < 1e-5
    assert largest_difference(gradients(prompts, parts[:, only]), wanted) < 1e-4


def test_on_a_gpu_as_many_sentences_are_encoded_as_have_room_in_every_process(monkeypatch):
    """Worked out by hand, with a GPU's figures but without one."""
    gpu = SimpleNamespace(
        logit_scale=SimpleNamespace(device=SimpleNamespace(type="cuda")),
        text_projection=torch.zeros(64, 512),
        transformer=SimpleNamespace(resblocks=[None] * 3),
    )
    longest = 28 * 64 * 3 * 10  # bytes of a sentence of ten places
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (30 * longest, 99 * longest))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 12 * longest)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 2 * longest)
    prompts = [[range(4), range(10)], [range(7)]]
    assert chunk_for(gpu, prompts) == (30 + 12 - 2) / 2
    monkeypatch.setattr(processes, "gather", lambda action: [action(), 7])
    assert chunk_for(gpu, prompts) == 7  # another process has less


def test_features_and_gradients_do_not_depend_on_the_chunk(random_clip):
    prompts = soft(random_clip, EVERY_TEMPLATE[:9])
    whole = prompts.text_features(random_clip)
    expected = gradients(prompts, whole)
    for chunk in (1, 4, 7, 20):
        prompts.set_classes(random_clip, NAMES, chunk)
        assert len(prompts.sentences.batches) > 1
        assert all(len(piece.sentence) <= chunk for piece in prompts.sentences.batches)
        parts = prompts.text_features(random_clip)
        assert largest_difference(parts, whole) < 1e-5
        assert largest_difference(gradients(prompts, parts), expected) < 1e-4


def saved_bytes(action):
    """What autograd keeps for the backward pass."""
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
    prompts.set_classes(random_clip, NAMES, chunk=30)
    parts = saved_bytes(lambda: prompts.text_features(random_clip))
    features = prompts.sentences.shape[0] * prompts.sentences.shape[1] * 64 * 4
    assert whole > 20 * features
    assert parts < 8 * features


def test_prompts_that_nobody_reads_are_left_out_and_get_zero_gradients(random_clip, monkeypatch):
    prompts = soft(random_clip, ["a photo of a {}.", "{} texture.", "a sketch of a {}."])
    whole = prompts.text_features(random_clip)
    seen = []
    encode = text_encoder.encode_piece
    monkeypatch.setattr(
        text_encoder,
        "encode_piece",
        lambda m, table, piece, dtype: (
            seen.extend(piece.sentence.tolist()) or encode(m, table, piece, dtype)
        ),
    )
    some = prompts.text_features(random_clip, only=[0, 2])
    assert {number // len(NAMES) for number in seen} == {0, 2}
    assert largest_difference(some[[0, 2]], whole[[0, 2]]) < 1e-5
    some[[0, 2]].sum().backward()
    assert prompts.context_after[1].grad.abs().max() == 0
    assert prompts.context_before[0].grad.abs().max() > 0


# ----------------------------------------------------------------------------------------- words


def clips_tokens(text):
    row = clip.tokenize(text)[0]
    return row[1 : row.argmax()].tolist()


@pytest.mark.parametrize("n", range(4))
def test_names_in_templates_are_read_as_the_whole_sentence_is(n):
    real = [name for names in real_names().values() for name in names]
    templates = [*random.Random(n).sample(EVERY_TEMPLATE, 4), "{}."]
    for template in templates:
        for name, ids in zip(real, tokens.fill_in(template, real)):
            assert list(ids) == clips_tokens(template.replace("{}", name)), (template, name)


def test_names_that_join_with_what_stands_beside_them_are_read_as_the_whole_sentence_is():
    beside = [
        "{}",
        "x{}",
        "{}x",
        "a {}-like",
        "'{}",
        "({})",
        "{}'s toy",
        "{} & co",
        "&{};",
        "{}lt;",
    ]
    for template in [*beside, "{}.", "7{}7", "\t{}\n", "é{}", "{}|>", "<|{}"]:
        for name, ids in zip(AWKWARD, tokens.fill_in(template, AWKWARD)):
            assert list(ids) == clips_tokens(template.replace("{}", name)), (template, name)


def test_names_and_templates_are_read_once_each(monkeypatch):
    read = []
    monkeypatch.setattr(tokens, "token_ids", lambda text: read.append(text) or (len(text),))
    names = ["cat", "sea star", "U.S."]
    filled = tokens.fill_in("a photo of a {}.", names)
    assert filled == [(13, 3, 1), (13, 8, 1), (len("a photo of a U.S.."),)]
    assert "a photo of a cat." not in read and "a photo of a U.S.." in read


def test_template_features_are_the_same_in_parts(random_clip):
    whole = template_features(random_clip, EVERY_TEMPLATE[:6], NAMES)
    parts = template_features(random_clip, EVERY_TEMPLATE[:6], NAMES, chunk=4)
    assert largest_difference(parts, whole) < 1e-5
