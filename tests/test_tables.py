"""Tables over runs."""

import json

import pytest
import torch

from lib import metrics, tables
from lib.errors import BadInput
from lib.runs import find_runs


def write_run(folder, seed, accuracy, classes="all", shots=4, evaluations=(), **flags):
    """A run with the numbers that a table is made of."""
    config = {
        "dataset": "eurosat", "data": "data", "shots": shots, "classes": classes, "seed": seed,
        "method": "mocoop", "clip": "ViT-B/16", "groups": "published", "top_k": 2,
        "gate_weight": 1.0, "text_weight": 5.0, "text_scale": 1.0, "text_bias": False,
        "epochs": 50, "batch_size": 32, "lr": 0.032, "views": 8, "device": None, "out": str(folder),
    } | flags  # fmt: skip
    result = {
        "dataset": "eurosat", "classes": classes, "shots": shots, "seed": seed, "n_prompts": 6,
        "method": "mocoop", "clip": "ViT-B/16", "accuracy": accuracy, "changed_flags": flags,
        "label": "-".join(["mocoop", *(f"{k}{v}" for k, v in flags.items())]),
        "prompt_usage": {}, "router": {}, "n_train": 40,
        "zero_shot_accuracy": 50.0, "ensemble_accuracy": 60.0,
        "config": config,
    }  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(json.dumps(result))
    for target, which, value in evaluations:
        other = result | {"dataset": target, "classes": which, "accuracy": value}
        (folder / f"eval_{target}_{which}.json").write_text(json.dumps(other))


def rows(text):
    """The Markdown table as dictionaries."""
    header, _, *lines = [
        [c.strip() for c in line.strip("|").split("|")] for line in text.splitlines()
    ]
    return [dict(zip(header, line)) for line in lines]


def test_the_table_averages_over_seeds_with_the_population_deviation(tmp_path):
    for seed, accuracy in ((1, 80.0), (2, 84.0), (5, 88.0)):
        write_run(tmp_path / f"s{seed}", seed, accuracy)
    write_run(tmp_path / "k1", 1, 70.0, top_k=1)
    by_method = {row["method"]: row for row in rows(tables.runs_table(find_runs(tmp_path)))}
    assert by_method["mocoop"]["accuracy"] == "84.0 ± 3.3"  # sqrt(32 / 3) = 3.27
    assert by_method["mocoop"]["seeds"] == "3"
    assert by_method["mocoop-top_k1"]["accuracy"] == "70.0"
    assert by_method["zero-shot"]["accuracy"] == "50.0"
    assert by_method["ensemble"]["accuracy"] == "60.0"


def test_the_table_takes_h_from_the_mean_base_and_the_mean_new_accuracy(tmp_path):
    for seed, base, new in ((1, 90.0, 50.0), (2, 80.0, 70.0)):
        write_run(tmp_path / f"s{seed}", seed, base, "base", evaluations=[("eurosat", "new", new)])
    row = next(r for r in rows(tables.runs_table(find_runs(tmp_path))) if r["method"] == "mocoop")
    assert row["accuracy"] == "85.0 ± 5.0" and row["new"] == "60.0 ± 10.0"
    assert row["H"] == "70.3"  # 2 * 85 * 60 / 145


def test_clip_as_it_is_has_its_own_numbers_in_every_column(tmp_path):
    for seed in (1, 2):
        write_run(tmp_path / f"{seed}", seed, 90.0, "base", evaluations=[("eurosat", "new", 70.0)])
        file = tmp_path / f"{seed}/eval_eurosat_new.json"
        other = json.loads(file.read_text()) | {"zero_shot_accuracy": 41.0 + seed}
        file.write_text(json.dumps(other | {"ensemble_accuracy": 45.0}))
    by_method = {row["method"]: row for row in rows(tables.runs_table(find_runs(tmp_path)))}
    assert by_method["zero-shot"]["accuracy"] == "50.0"
    assert by_method["zero-shot"]["new"] == "42.5 ± 0.5"
    assert by_method["ensemble"]["new"] == "45.0" and by_method["mocoop"]["new"] == "70.0"


def test_ensembles_of_other_templates_have_rows_of_their_own(tmp_path):
    write_run(tmp_path / "own", 1, 90.0)
    write_run(tmp_path / "auto", 1, 90.0, groups="auto")  # the same templates, in other groups
    write_run(tmp_path / "file", 1, 90.0, groups="mine.txt")
    file = tmp_path / "file/result.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"ensemble_accuracy": 33.0}))
    found = rows(tables.runs_table(find_runs(tmp_path)))
    found = [row["accuracy"] for row in found if row["method"] == "ensemble"]
    assert sorted(found) == ["33.0", "60.0"]


def test_of_two_classes_with_one_name_both_keep_their_accuracy():
    """ImageNet has a few."""
    answers, labels = torch.tensor([0, 0, 1, 2, 2, 2]), torch.tensor([0, 0, 1, 1, 2, 0])
    found = metrics.per_class_accuracy(answers, labels, ["crane", "sea", "crane", "fox"])
    assert found == {"crane": 66.67, "sea": 50.0, "crane (2)": 100.0, "fox": None}


def test_other_datasets_get_a_column_each(tmp_path):
    write_run(tmp_path / "a", 1, 90.0, evaluations=[("dtd", "all", 40.0), ("eurosat", "all", 90.0)])
    row = next(r for r in rows(tables.runs_table(find_runs(tmp_path))) if r["method"] == "mocoop")
    assert row["dtd"] == "40.0"


@pytest.mark.parametrize("content", ["{}", '{"config": {"seed": 1}}', "[" * 100_000])
def test_the_table_names_a_damaged_result(tmp_path, content):
    write_run(tmp_path / "a", 1, 90.0)
    (tmp_path / "a/result.json").write_text(content)
    with pytest.raises(BadInput, match="result.json is not the result of a run, or damaged"):
        tables.runs_table(find_runs(tmp_path))


def test_a_result_that_does_not_know_its_own_label_is_to_be_made_again(tmp_path):
    write_run(tmp_path / "old", 1, 80.0)
    result = json.loads((tmp_path / "old/result.json").read_text())
    del result["label"], result["changed_flags"]
    (tmp_path / "old/result.json").write_text(json.dumps(result))
    with pytest.raises(BadInput, match="result.json is from an older version: remove"):
        find_runs(tmp_path)


def test_a_method_that_is_not_here_has_its_row(tmp_path):
    write_run(tmp_path / "a", 1, 80.0)
    for seed, accuracy in ((1, 81.0), (2, 83.0)):
        write_run(tmp_path / f"b{seed}", seed, accuracy)
        file = tmp_path / f"b{seed}/result.json"
        result = json.loads(file.read_text()) | {"method": "balanced", "label": "balanced"}
        file.write_text(json.dumps(result))
    by_method = {row["method"]: row for row in rows(tables.runs_table(find_runs(tmp_path)))}
    assert by_method["balanced"]["accuracy"] == "82.0 ± 1.0"


def test_h_takes_the_seeds_that_have_both_numbers(tmp_path):
    write_run(tmp_path / "a", 1, 10.0, "base")
    write_run(tmp_path / "b", 2, 80.0, "base", evaluations=[("eurosat", "new", 80.0)])
    row = next(r for r in rows(tables.runs_table(find_runs(tmp_path))) if r["method"] == "mocoop")
    assert row["H"] == "80.0"


def test_h_has_the_deviation_of_the_seeds_own():
    columns = {"accuracy": {1: 90.0, 2: 60.0}, "new": {2: 60.0, 1: 45.0}}
    assert tables.mean_h(columns) == pytest.approx((2 * 75 * 52.5 / 127.5, 0.0))


def test_runs_with_other_clips_are_in_other_rows(tmp_path):
    for clip, accuracy in (("ViT-B/16", 80.0), ("RN50", 60.0)):
        write_run(tmp_path / f"{accuracy}", 1, accuracy)
        file = tmp_path / f"{accuracy}/result.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"clip": clip}))
    found = rows(tables.runs_table(find_runs(tmp_path)))
    found = {row["CLIP"]: row for row in found if row["method"] == "mocoop"}
    assert {clip: row["accuracy"] for clip, row in found.items()} == {
        "ViT-B/16": "80.0", "RN50": "60.0"
    }  # fmt: skip
    assert {(row["dataset"], row["classes"], row["shots"]) for row in found.values()} == {
        ("eurosat", "all", "4")
    }


def test_every_pair_of_dataset_and_classes_has_a_column(tmp_path):
    evaluations = [("dtd", "base", 1.0), ("dtd", "new", 2.0), ("eurosat", "new", 3.0)]
    write_run(tmp_path / "base", 1, 90.0, "base", evaluations=evaluations)
    write_run(tmp_path / "all", 1, 80.0, evaluations=[("eurosat", "new", 70.0)])
    found = rows(tables.runs_table(find_runs(tmp_path)))
    found = {row["classes"]: row for row in found if row["method"] == "mocoop"}
    row = found["base"]
    assert (row["dtd"], row["dtd new"], row["new"]) == ("1.0", "2.0", "3.0")
    assert found["all"]["new"] == "70.0" and found["all"]["H"] == ""  # H is of base runs


@pytest.mark.parametrize("method", ["zeroshot", "ensemble"])
def test_clip_as_it_is_has_one_row(tmp_path, method):
    write_run(tmp_path / "a", 1, 50.0 if method == "zeroshot" else 60.0)
    file = tmp_path / "a/result.json"
    result = json.loads(file.read_text()) | {"method": method, "label": method}
    file.write_text(json.dumps(result))
    found = rows(tables.runs_table(find_runs(tmp_path)))
    assert [(row["method"], row["accuracy"]) for row in found] == [
        ("ensemble", "60.0"),
        ("zero-shot", "50.0"),
    ]
