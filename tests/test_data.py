"""Splits, few-shot samples, base and new classes."""

import gzip
import json
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import HERE

from data import Item, Split, few_shot, load_split, select_classes
from lib.catalogue import DATASETS
from lib.errors import BadInput

NAMES = ["Annual Crop Land", "Forest", "Herbaceous Vegetation Land", "Highway or Road"]


def drop(root, label, *parts):
    """Takes a label's images out of EuroSAT's lists."""
    file = root / "eurosat/split_zhou_EuroSAT.json"
    split = json.loads(file.read_text())
    for part in parts:
        split[part] = [entry for entry in split[part] if entry[1] != label]
    file.write_text(json.dumps(split))


# ---------------------------------------------------------------------------------- the split


def test_eurosat_loads_from_the_fields_layout(eurosat):
    split = load_split("eurosat", eurosat)
    assert (len(split.train), len(split.val), len(split.test)) == (80, 50, 30)
    assert split.class_names[:4] == NAMES
    assert split.source == "coop"
    for item in split.train + split.val + split.test:
        folder = {0: "AnnualCrop", 3: "Highway", 9: "SeaLake"}.get(item.label)
        assert folder is None or item.path.startswith(f"2750/{folder}/{folder}_")


def test_an_unknown_dataset_gets_the_nearest_name(tmp_path):
    with pytest.raises(BadInput, match="unknown dataset 'eurosta' .did you mean 'eurosat'"):
        load_split("eurosta", tmp_path)


def test_missing_images_are_counted_and_the_first_is_named(own_eurosat):
    split = load_split("eurosat", own_eurosat)
    for item in split.train[2:5]:
        (own_eurosat / "eurosat" / item.path).unlink()
    first = own_eurosat / "eurosat" / split.train[2].path
    with pytest.raises(BadInput, match=f"3 of 160 images .* are missing, the first is {first}"):
        load_split("eurosat", own_eurosat)


@pytest.mark.parametrize("text", ["", '{"train": []}', '{"train": 1, "val": 2, "test": 3}'])
def test_a_split_file_that_is_not_one_is_refused(own_eurosat, text):
    (own_eurosat / "eurosat/split_zhou_EuroSAT.json").write_text(text)
    with pytest.raises(BadInput, match="split_zhou_EuroSAT.json is not a split file"):
        load_split("eurosat", own_eurosat)


def test_labels_with_gaps_are_refused(own_eurosat):
    drop(own_eurosat, 4, "train", "val", "test")
    with pytest.raises(BadInput, match="labels must run from 0 without gaps"):
        load_split("eurosat", own_eurosat)


@pytest.mark.parametrize("part", ["train", "test"])
def test_a_class_without_images_is_named(own_eurosat, part):
    drop(own_eurosat, 1, part)
    with pytest.raises(BadInput, match=f"the class 'Forest' has no image in {part}"):
        load_split("eurosat", own_eurosat)


def test_one_list_of_another_length_is_enough_to_say_so(eurosat, monkeypatch, capsys):
    for counts, said in (((80, 50, 31), True), ((80, 50, 30), False)):
        row = replace(DATASETS["eurosat"], counts=counts)
        monkeypatch.setitem(DATASETS, "eurosat", row)
        assert (load_split("eurosat", eurosat).samples == "own") == said
        assert ("NOT comparable" in capsys.readouterr().out) == said


# ------------------------------------------------------------------------- few-shot, base, new


def test_few_shot_images_are_drawn_before_the_cut_to_base_or_new():
    content = json.loads(gzip.decompress((HERE / "eurosat_train_val.json.gz").read_bytes()))
    lists = {
        part: [Item(f"2750/{path}", label) for path, label, _ in content[part]] for part in content
    }
    names = [str(i) for i in range(10)]
    split = Split("eurosat", Path("eurosat"), "coop", names, **lists, test=[])
    sample = few_shot(split, 4, 1)
    base, new = select_classes(sample, "base"), select_classes(sample, "new")
    assert [i.path for i in base.train + new.train] == [i.path for i in sample.train]
    # Cut first, the new classes would be drawn from the start of the random stream.
    cut_first = few_shot(select_classes(split, "new"), 4, 1)
    assert [i.path for i in cut_first.train] != [i.path for i in new.train]
    assert few_shot(split, 4, 2).train != sample.train


def test_base_is_the_first_half_rounded_up_and_both_count_from_0():
    items = [Item(f"{label}.jpg", label) for label in (4, 2, 0, 1, 3)]
    split = Split("d", None, "coop", list("abcde"), items, items, items)
    base, new = select_classes(split, "base"), select_classes(split, "new")
    assert base.class_names == ["a", "b", "c"] and new.class_names == ["d", "e"]
    assert base.test == [Item("2.jpg", 2), Item("0.jpg", 0), Item("1.jpg", 1)]
    assert new.test == [Item("4.jpg", 1), Item("3.jpg", 0)]
    assert select_classes(split, "all") == split


def test_a_class_with_fewer_images_than_shots_gives_all_and_says_so(capsys):
    items = [Item(f"{label}/{i}.jpg", label) for label, n in ((0, 5), (1, 2)) for i in range(n)]
    sample = few_shot(Split("d", None, "coop", ["cat", "dog"], items, [], items), 4, 1)
    assert [i.label for i in sample.train] == [0, 0, 0, 0, 1, 1]
    assert "using all images of 1 classes with fewer than 4 (dog ...)" in capsys.readouterr().out
