"""Hard and soft prompts against clip's own encoder; what a CLIP cannot read; templates."""

import json
from types import SimpleNamespace

import clip
import pytest
import torch.nn.functional as F
from conftest import HERE

import eval
from lib.catalogue import read_groups, template_groups
from lib.clip_model import load_clip
from lib.errors import BadInput
from prompts import PromptError, SoftPrompts, template_features

# The second line: names that are read differently beside a full stop, a hyphen or an apostrophe.
NAMES = [
    *("cat", "Annual Crop Land", "long-sleeved t-shirt"),
    *("crane (bird)", "U.S.", "St. Peter's", "'s", "7", "AT&T", "a&lt", "café", "3D", "t-", "<|"),
]


def largest_difference(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


def as_clip_reads(model, texts):
    """clip's own encoder on whole sentences: (N, D), normalised."""
    return F.normalize(model.encode_text(clip.tokenize(texts)), dim=-1)


def test_hard_prompts_end_in_exactly_one_full_stop(random_clip):
    variants = ["a photo of a {}", "a photo of a {}.", "a photo of a {}.. "]
    theirs = as_clip_reads(random_clip, [f"a photo of a {name}." for name in NAMES])
    for ours in template_features(random_clip, variants, NAMES):
        assert largest_difference(ours, theirs) < 1e-5


@pytest.mark.parametrize("full_stop", [False, True])
def test_soft_prompts_start_as_their_template(random_clip, full_stop):
    """Also where the template goes on after the class name."""
    templates = ["a close-up photo of a {}.", "{} texture.", "a {} in a video game.", "{}."]
    prompts = SoftPrompts(random_clip, templates, NAMES, full_stop=full_stop)
    for template, ours in zip(templates, prompts.text_features()):
        sentence = template if full_stop else template.rstrip(".")
        theirs = as_clip_reads(random_clip, [sentence.format(name) for name in NAMES])
        assert largest_difference(ours, theirs) < 1e-5


def test_the_words_nearest_to_a_prompt_are_at_first_its_own():
    """With the bundled CLIP, which knows only a few words of the vocabulary."""
    clip_model, _ = load_clip("bundled", "cpu")
    prompts = SoftPrompts(clip_model, ["a photo {} of a"], ["circle"])
    prompts.context_after[0].data[1, 5] += 0.1  # the last vector is now at a distance of 0.1
    model = SimpleNamespace(prompts=prompts, templates=prompts.templates)
    run = SimpleNamespace(clip_model=clip_model, model=model)
    vectors = eval.nearest_words(run)["a photo {} of a"]
    assert [nearest[0][0] for nearest in vectors] == ["a", "photo", "of", "a"]
    (_, distance), _, _ = vectors[-1]
    assert distance == pytest.approx(0.1, abs=1e-3)


# ------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    "template, name, message",
    [
        ("a photo of a circle", "star", "'a photo of a circle' needs one {}"),
        ("a {} of a {}.", "star", "'a {} of a {}.' needs one {}"),
        ("a painting of a {}.", "star", "never seen the word 'painting'"),
        ("a photo of a {}.", "red zebra", "never seen the word 'zebra' (in "),
        ("a photo of a {}.", "red " * 30, "tokens long, and this CLIP reads 24"),
    ],
)
def test_what_a_clip_cannot_read_is_named(template, name, message):
    clip_model, _ = load_clip("bundled", "cpu")
    for read in (template_features, SoftPrompts):
        with pytest.raises(PromptError) as error:
            read(clip_model, [template], ["circle", name])
        assert message in str(error.value) and "\n" not in str(error.value)


def test_a_sentence_may_be_as_long_as_clip_reads(random_clip):
    template, name = "a photo of a {}.", "very " * 69 + "long"
    template_features(random_clip, [template], [name])
    with pytest.raises(PromptError, match="is 78 tokens long, and this CLIP reads 77"):
        template_features(random_clip, [template], ["very " + name])


# ------------------------------------------------------------------------------------ templates


@pytest.mark.parametrize(
    "text, message",
    [
        ("\n", "holds no template"),
        ("a {}.\nb {}.\n\na {}.\n", "two groups start with 'a {}.'"),
        ("a photo of a {}.\n\na photo\n", "'a photo' needs one {}"),
    ],
)
def test_a_file_without_groups_is_refused(tmp_path, text, message):
    (tmp_path / "groups.txt").write_text(text)
    with pytest.raises(BadInput, match=message):
        read_groups(tmp_path / "groups.txt")


def test_template_groups_are_the_published_ones():
    published = json.loads((HERE / "templates.json").read_text())
    assert len(published) == 15
    for dataset, groups in published.items():
        assert template_groups(dataset) == groups
