"""Templates, hard prototypes, soft prompts, and the text encoder."""

import json

import clip
import pytest
import torch
import torch.nn.functional as F
from conftest import HERE

import prompts
from lib import templates
from lib.catalogue import template_groups
from lib.errors import BadInput
from prompts import SoftPrompts, hard_prototypes, template_features
from tools.steps import encode_text

NAMES = ["cat", "Annual Crop Land", "long-sleeved t-shirt"]


def as_clip_reads(model, texts):
    """clip's own text encoder, all 77 positions: (N, D), normalised."""
    return F.normalize(model.encode_text(clip.tokenize(texts)), dim=-1)


def soft(model, templates, names=NAMES):
    module = SoftPrompts(model, templates)
    module.set_classes(model, names)
    return module


def largest_difference(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


def test_template_features_are_those_of_clips_own_encoder(random_clip):
    templates = ["a photo of a {}.", "{} texture.", "a photo of a {}, a type of flower."]
    ours = template_features(random_clip, templates, NAMES)
    for t, template in enumerate(templates):
        theirs = as_clip_reads(random_clip, [template.format(name) for name in NAMES])
        assert largest_difference(ours[t], theirs) < 1e-5


def test_hard_templates_end_in_exactly_one_full_stop(random_clip):
    variants = ["a photo of a {}", "a photo of a {}.", "a photo of a {}.. "]
    ours = template_features(random_clip, variants, NAMES)
    assert torch.allclose(ours[0], ours[1], atol=1e-6)
    assert torch.allclose(ours[0], ours[2], atol=1e-6)


def test_prototypes_are_averages_of_unit_vectors_made_unit_again():
    features = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]], [[0.6, 0.8]]])  # 3 templates, 1 class
    prototypes = hard_prototypes(features, [["a", "b"], ["c"]])
    expected = torch.tensor([[[0.5**0.5, 0.5**0.5]], [[0.6, 0.8]]])
    assert torch.allclose(prototypes, expected)


@pytest.mark.parametrize(
    "template",
    ["a photo of a {}.", "{} texture.", "a photo of a {}, a type of flower.", "a close-up of {}."],
)
def test_soft_prompts_start_as_their_template_without_the_full_stop(random_clip, template):
    ours = soft(random_clip, [template]).text_features(random_clip)[0]
    plain = [template.rstrip(".").format(name) for name in NAMES]
    assert largest_difference(ours, as_clip_reads(random_clip, plain)) < 1e-5
    stopped = as_clip_reads(random_clip, [text + "." for text in plain])
    assert largest_difference(ours, stopped) > 1e-2


def test_context_is_counted_in_tokens_and_taken_from_both_sides(random_clip):
    module = soft(random_clip, ["a close-up photo of {}.", "{} texture.", "a {} in a video game."])
    assert [len(c) for c in module.context_before] == [6, 0, 1]  # a close - up photo of
    assert [len(c) for c in module.context_after] == [0, 1, 4]  # in a video game


def test_context_after_the_class_name_is_read_and_learned(random_clip):
    module = soft(random_clip, ["a photo of a {}, a type of flower."])
    before = module.text_features(random_clip)
    before[0, 0, 0].backward()
    gradients = module.context_after[0].grad.norm(dim=1)
    assert len(gradients) == 5  # , a type of flower
    assert (gradients > 0).all()
    with torch.no_grad():
        module.context_after[0][-1] += torch.linspace(-1, 1, 64)
    assert largest_difference(module.text_features(random_clip), before) > 1e-3


def test_context_is_shared_by_all_classes_and_names_stay_frozen(random_clip):
    module = soft(random_clip, ["a photo of a {}."])
    learned = {name: tuple(p.shape) for name, p in module.named_parameters()}
    assert learned == {"context_before.0": (4, 64), "context_after.0": (0, 64)}


def test_prompts_may_change_their_classes_and_keep_what_they_learned(random_clip):
    module = soft(random_clip, ["a photo of a {}.", "{} texture."])
    with torch.no_grad():
        module.context_before[0] += 0.1
    together = module.text_features(random_clip)
    module.set_classes(random_clip, NAMES[2:])
    alone = module.text_features(random_clip)
    assert alone.shape == (2, 1, 64)
    assert largest_difference(alone, together[:, 2:]) < 1e-5


def test_nothing_after_eot_reaches_the_text_features(random_clip):
    torch.manual_seed(0)
    embeddings = torch.randn(3, 20, 64)
    eot = torch.tensor([4, 9, 12])
    expected = encode_text(random_clip, embeddings, eot)
    for row, end in enumerate(eot.tolist()):
        embeddings[row, end + 1 :] = 100 * torch.randn(19 - end, 64)
    assert torch.equal(encode_text(random_clip, embeddings, eot), expected)


def test_the_text_bias_is_added_before_normalising(random_clip):
    module = soft(random_clip, ["a photo of a {}."])
    bias = torch.randn(1, 64, generator=torch.Generator().manual_seed(0))
    texts = [f"a photo of a {name}" for name in NAMES]
    plain = random_clip.encode_text(clip.tokenize(texts))
    expected = F.normalize(plain + bias, dim=-1)
    assert largest_difference(module.text_features(random_clip, bias)[0], expected) < 1e-5


def test_a_template_without_a_place_for_the_name_is_refused(random_clip, tmp_path):
    with pytest.raises(BadInput, match="needs one {}"):
        SoftPrompts(random_clip, ["a photo of a cat"])
    with pytest.raises(BadInput, match="needs one {}"):
        template_features(random_clip, ["a {} and a {}"], NAMES)
    (tmp_path / "groups.txt").write_text("a photo of a {}.\n\na photo\n")
    with pytest.raises(BadInput, match="'a photo' needs one {}"):
        templates.read_groups(tmp_path / "groups.txt")


def test_a_class_name_too_long_for_clip_is_refused_by_name(random_clip):
    long = "very " * 80 + "long"
    with pytest.raises(BadInput, match="is 8. tokens long, and this CLIP reads 77"):
        soft(random_clip, ["a photo of a {}."], [long])
    with pytest.raises(BadInput, match="and this CLIP reads 77"):
        template_features(random_clip, ["a photo of a {}."], [long])
    just = "very " * 69 + "long"  # with SOS, "a photo of a", "." and EOT
    with pytest.raises(BadInput, match="is 78 tokens long"):
        template_features(random_clip, ["a photo of a {}."], ["very " + just])
    ours = template_features(random_clip, ["a photo of a {}."], [just])[0]
    theirs = random_clip.encode_text(clip.tokenize(f"a photo of a {just}."))
    assert torch.allclose(ours, torch.nn.functional.normalize(theirs, dim=-1), atol=1e-5)


def test_groups_of_ones_own_are_lines_with_blank_lines_between(tmp_path):
    file = tmp_path / "groups.txt"
    file.write_text("\na photo of a {}.\na picture of a {}.\n\n\n{} texture.\n")
    assert templates.read_groups(file) == [
        ["a photo of a {}.", "a picture of a {}."],
        ["{} texture."],
    ]
    file.write_text("\ufeffa photo of a {}.\n", encoding="utf-8")  # as Windows' Notepad saves
    assert templates.read_groups(file) == [["a photo of a {}."]]
    file.write_text("\n")
    with pytest.raises(BadInput, match="holds no template"):
        templates.read_groups(file)
    with pytest.raises(BadInput, match="cannot read"):
        templates.read_groups(tmp_path / "absent.txt")
    file.write_text("a {}.\nb {}.\n\na {}.\n")
    with pytest.raises(BadInput, match="two groups start with 'a {}.'"):
        templates.read_groups(file)


def test_template_groups_have_the_published_sizes():
    sizes = {
        "caltech101": [1, 1, 1, 4, 2],
        "dtd": [1, 1, 1, 4, 2],
        "eurosat": [1, 1, 2, 2, 4, 2],
        "fgvc_aircraft": [1, 1, 1, 4, 2],
        "food101": [1, 3, 4, 2],
        "imagenet": [1, 1, 1, 1, 2, 2, 3, 1, 1, 1, 7, 2, 1, 2, 1, 1, 1, 1, 1, 1],
        "imagenetv2": [1, 1, 1, 1, 2, 2, 3, 1, 1, 1, 2, 2, 1, 1, 1, 1],
        "oxford_flowers": [1, 1, 1, 4, 2],
        "oxford_pets": [1, 2, 1, 1, 4, 2],
        "stanford_cars": [3, 1, 1, 4, 2],
        "sun397": [1, 1, 4, 2],
        "ucf101": [1, 1, 1, 1, 4, 2],
    }
    for dataset, expected in sizes.items():
        assert [len(group) for group in template_groups(dataset)] == expected
    for variant in ("imagenet_a", "imagenet_r", "imagenet_sketch"):
        assert template_groups(variant) == template_groups("imagenetv2")


def test_template_groups_are_the_published_ones():
    published = json.loads((HERE / "templates.json").read_text())
    assert len(published) == 15
    for dataset, groups in published.items():
        assert template_groups(dataset) == groups


def test_the_groups_shown_at_the_top_of_the_file_are_eurosats():
    shown = prompts.__doc__.split("one per line:")[1].split("Those of all")[0].strip()
    shown = shown.replace("|\n", "|")  # one group takes two lines
    groups = [[t.strip() for t in line.split("|")] for line in shown.splitlines()]
    assert groups == template_groups("eurosat")
