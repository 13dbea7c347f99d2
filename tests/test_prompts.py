"""Hard prompts, soft prompts and the plain text encoder, against clip's own encoder; templates.

Both encoders round fp32 products in another order. That moves features by some 1e-6 of the largest
and gradients, which are sums of more terms, by some 1e-5.
"""

import copy
import gzip
import json
import sys
from unittest import mock

import clip
import pytest
import torch
import torch.nn.functional as F
from conftest import HERE

import train
from lib.catalogue import DATASETS, all_templates, read_groups, template_groups
from lib.clip_model import load_clip
from lib.errors import BadInput
from lib.fast_text import FastTextEncoder
from prompts import PromptError, SoftPrompts, TextEncoder, template_features

NAMES = ["cat", "Annual Crop Land", "long-sleeved t-shirt"]
# Names that the tokenizer reads differently beside a full stop, a hyphen or an apostrophe.
AWKWARD = [
    "crane (bird)", "U.S.", "St. Peter's", "'s", "7", "AT&T", "a&lt", "café", "3D", "t-", "<|"
]  # fmt: skip
EVERY_TEMPLATE = sorted({t for row in DATASETS.values() for t in all_templates(row.templates)})
SPLITS = json.loads(gzip.decompress((HERE / "field_splits.json.gz").read_bytes()))
REAL_NAMES = [name.replace("_", " ") for split in SPLITS.values() for name in split["names"]]


def largest_difference(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


def as_clip_reads(model, texts):
    """clip's own encoder on whole sentences: (N, D), normalised."""
    return F.normalize(model.encode_text(clip.tokenize(texts)), dim=-1)


def prompts_as_clip_reads(model, prompts, names):
    """The features of soft prompts from clip's own encoder, all its positions: (G, C, D), not
    normalised. What it looks up is exchanged for the words of a name between context vectors."""
    length, features = model.context_length, []
    for before, after in zip(prompts.context_before, prompts.context_after):
        tokens = clip.tokenize(names, length)
        rows = [
            torch.cat([row[:1], before, row[1:end], after, row[end:]])[:length]
            for row, end in zip(model.token_embedding(tokens), tokens.argmax(dim=-1))
        ]
        moved = tokens.roll(len(before) + len(after), dims=1)  # EOT is where it looks
        with mock.patch.object(model.token_embedding, "forward", return_value=torch.stack(rows)):
            features.append(model.encode_text(moved))
    return torch.stack(features)


def gradients(features, inputs):
    """Of a fixed weighting of the features."""
    weighting = torch.randn(features.shape, generator=torch.Generator().manual_seed(0))
    parts = torch.autograd.grad((features * weighting).sum(), inputs)
    return torch.cat([part.flatten() for part in parts])


def check_as_clip_reads(clip_model, prompts, names=None):
    """Wherever their context has moved to, soft prompts have the features of clip's own encoder,
    and the gradients."""
    learned = list(prompts.parameters())
    for p in learned:
        p.data += 0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
    ours = prompts.text_features(names)
    names = names or prompts.class_names
    theirs = F.normalize(prompts_as_clip_reads(clip_model, prompts, names), dim=-1)
    assert largest_difference(ours, theirs) < 1e-5
    assert largest_difference(gradients(ours, learned), gradients(theirs, learned)) < 1e-4


# ---------------------------------------------------------------------------------- hard prompts


def test_hard_prompts_are_read_as_clip_reads_them(random_clip):
    tasks = (EVERY_TEMPLATE, NAMES), (["a {}, a type of flower."], AWKWARD + REAL_NAMES[::4])
    assert len(EVERY_TEMPLATE) > 40 and len(REAL_NAMES) == 593
    for templates, names in tasks:
        ours = template_features(random_clip, templates, names)
        for template, features in zip(templates, ours):
            theirs = as_clip_reads(random_clip, [template.replace("{}", n) for n in names])
            assert largest_difference(features, theirs) < 1e-5


def test_hard_prompts_end_in_exactly_one_full_stop(random_clip):
    variants = ["a photo of a {}", "a photo of a {}.", "a photo of a {}.. "]
    theirs = as_clip_reads(random_clip, [f"a photo of a {name}." for name in NAMES])
    for ours in template_features(random_clip, variants, NAMES):
        assert largest_difference(ours, theirs) < 1e-5


def test_a_sentence_may_be_as_long_as_clip_reads(random_clip):
    template, name = "a photo of a {}.", "very " * 69 + "long"
    ours = template_features(random_clip, [template], [name])[0]
    theirs = as_clip_reads(random_clip, template.format(name))
    assert largest_difference(ours, theirs) < 1e-5
    with pytest.raises(PromptError, match="is 78 tokens long, and this CLIP reads 77"):
        template_features(random_clip, [template], ["very " + name])


# ---------------------------------------------------------------------------------- soft prompts


@pytest.mark.parametrize("full_stop", [False, True])
def test_soft_prompts_start_as_their_template(random_clip, full_stop):
    templates = ["a photo of a {}.", "{} texture.", "a {} in a video game.", "{}."]
    ours = SoftPrompts(random_clip, templates, NAMES + AWKWARD, full_stop=full_stop)
    for template, features in zip(templates, ours.text_features()):
        sentence = template if full_stop else template.rstrip(".")
        theirs = as_clip_reads(random_clip, [sentence.format(n) for n in NAMES + AWKWARD])
        assert largest_difference(features, theirs) < 1e-5


@pytest.mark.parametrize("text_encoder", [TextEncoder, FastTextEncoder])
def test_embeddings_that_a_clip_lacks_reach_nothing(text_encoder):
    lacking, _ = load_clip("bundled", "cpu")
    assert lacking.token_embedding.weight[0].isnan().all()  # clip's own padding
    whole = copy.deepcopy(lacking)
    whole.token_embedding.weight.nan_to_num_()
    names, templates = ["circle", "dark red star"], ["a photo of a {}.", "{} photo"]
    check_as_clip_reads(whole, SoftPrompts(lacking, templates, names, text_encoder=text_encoder))


def test_prompts_read_any_names_as_clip_does_learn_from_it_and_keep_their_own(random_clip):
    templates = ["a close-up of {}.", "{} texture.", "a {} in a video game.", "{}, a type of pet."]
    prompts = SoftPrompts(random_clip, templates, NAMES + AWKWARD)
    with pytest.raises(PromptError, match="the prompt .* with 'very .* is 8. tokens long"):
        prompts.text_features(["cat", "sea", "very " * 80])
    for names in (["sea", "cat", "7"], ["sea", "dog", "7"], None):
        check_as_clip_reads(random_clip, prompts, names)


# ------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    "template, name, said",
    [
        ("a photo of a circle", "star", "'a photo of a circle' needs one {}"),
        ("a {} of a {}.", "star", "'a {} of a {}.' needs one {}"),
        ("a painting of a {}.", "star", "never seen the word 'painting'"),
        ("a photo of a {}.", "red zebra", "never seen the word 'zebra' (in "),
        ("a photo of a {}.", "red " * 30, "tokens long, and this CLIP reads 24"),
    ],
)
def test_what_a_clip_cannot_read_is_named(template, name, said):
    clip_model, _ = load_clip("bundled", "cpu")
    for read in (template_features, SoftPrompts):
        with pytest.raises(PromptError) as error:
            read(clip_model, [template], ["circle", name])
        assert said in str(error.value) and "\n" not in str(error.value)


def test_scripts_end_with_one_line_about_it(
    small, eurosat, tmp_path, finished_run, run_eval, monkeypatch, capsys
):
    photo = next(eurosat.rglob("*.jpg"))
    status, _, errors = run_eval(finished_run, "--images", photo, "--names", "a," + 80 * "very")
    assert status == 2 and len(errors) == 1 and "this CLIP reads 77" in errors[0]
    out = tmp_path / "refused"
    monkeypatch.setattr(sys, "argv", f"train.py {small} --init photo --out {out}".split())
    with pytest.raises(SystemExit) as exit:
        train.main()
    said = "the template 'photo' needs one {} where the class name goes\n"
    assert exit.value.code == 2 and capsys.readouterr().err == said
    assert not out.exists() and issubclass(PromptError, ValueError)


# --------------------------------------------------------------------------------------- groups


def test_groups_of_ones_own_are_lines_with_blank_lines_between(tmp_path):
    file = tmp_path / "groups.txt"
    file.write_text("\na photo of a {}.\na picture of a {}.\n\n\n{} texture.\n")
    assert read_groups(file) == [["a photo of a {}.", "a picture of a {}."], ["{} texture."]]
    file.write_text("\ufeffa photo of a {}.\n", encoding="utf-8")  # as Windows' Notepad saves
    assert read_groups(file) == [["a photo of a {}."]]


@pytest.mark.parametrize(
    "text, said",
    [
        ("\n", "holds no template"),
        ("a {}.\nb {}.\n\na {}.\n", "two groups start with 'a {}.'"),
        ("a photo of a {}.\n\na photo\n", "'a photo' needs one {}"),
        (None, "cannot read"),
    ],
)
def test_a_file_without_groups_is_refused(tmp_path, text, said):
    if text is not None:
        (tmp_path / "groups.txt").write_text(text)
    with pytest.raises(BadInput) as error:
        read_groups(tmp_path / "groups.txt")
    assert said in str(error.value)


def test_template_groups_are_the_published_ones():
    published = json.loads((HERE / "templates.json").read_text())
    assert len(published) == 15
    for dataset, groups in published.items():
        assert template_groups(dataset) == groups
