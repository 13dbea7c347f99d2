"""Split files, few-shot samples, base and new classes."""

import pytest

from data import Item, Split, few_shot, load_split, select_classes
from lib.errors import BadInput


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "is not a split file"),
        ('{"train": []}', "is not a split file"),
        ('{"train": 1, "val": 2, "test": 3}', "is not a split file"),
        (10**5 * "[", "is not a split file"),
        (
            '{"train": [["a.jpg", 0, "cat"]], "val": [], "test": [["b.jpg", 2, "fox"]]}',
            r"the labels must run from 0 without gaps, found \[0, 2\]",
        ),
        (
            '{"train": [["a.jpg", 0, "cat"]], "val": [], "test": [["b.jpg", 1, "fox"]]}',
            "2 of 2 images of eurosat are missing, the first is .*a.jpg",
        ),
    ],
)
def test_a_split_file_with_a_fault_is_refused(own_eurosat, text, message):
    (own_eurosat / "eurosat/split_zhou_EuroSAT.json").write_text(text)
    with pytest.raises(BadInput, match=message):
        load_split("eurosat", own_eurosat)


def test_base_is_the_first_half_rounded_up_and_both_count_from_0():
    items = [Item(f"{name}.jpg", label) for label, name in enumerate("abcde")]
    split = Split("d", None, "coop", list("abcde"), items, items, items)
    base, new = select_classes(split, "base"), select_classes(split, "new")
    assert base.class_names == ["a", "b", "c"] and base.test == items[:3]
    assert new.class_names == ["d", "e"] and new.test == [Item("d.jpg", 0), Item("e.jpg", 1)]


def test_a_class_with_fewer_images_than_shots_gives_all_and_is_named(capsys):
    items = [Item("", label) for label in (0, 0, 0, 0, 0, 1, 1)]
    sample = few_shot(Split("d", None, "coop", ["cat", "dog"], items, [], items), 4, 1)
    assert [item.label for item in sample.train] == [0, 0, 0, 0, 1, 1]
    assert "using all images of 1 classes with fewer than 4 (dog ...)" in capsys.readouterr().out
