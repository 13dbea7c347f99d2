"""The compact results and the tables made of them, on numbers that can be worked out by hand."""

import json

import pytest
import torch
from conftest import parse

import eval
import train
from data import load_split
from lib.errors import BadInput
from lib.metrics import harmonic_mean
from lib.world import TASKS
from tools import reproduce, results
from tools.why import take_apart


def run(dataset, classes, label, seed, accuracy, new=None, **more):
    method = label.split("-")[0]
    changed = {"top_k": 1} if label.endswith("top_k1") else more.pop("changed", {})
    config = {"dataset": dataset, "classes": classes, "shots": 16, "seed": seed, "clip": "bundled"}
    result = {
        **config, "config": config | {"groups": "dataset"}, "method": method, "label": label,
        "changed_flags": changed, "accuracy": accuracy, "val_accuracy": accuracy + 1,
        "zero_shot_accuracy": 50.0, "ensemble_accuracy": 60.0, "n_prompts": 8, "train_seconds": 2.0,
        "router": "as it is", "prompt_usage": {}, "prompt_usage_by_epoch": [], "unread": 0,
    }  # fmt: skip
    other = {**result, "classes": "new", "accuracy": new, "ensemble_accuracy": 62.0}
    return results.compact(result, [other] if new else [], more.get("why"))


@pytest.fixture
def lines():
    """MoCoOp is 80 + the task's number, CoOp 1 less with seed 1, 2 less with seed 2, 3 with 3."""
    made = []
    for n, task in enumerate(TASKS):
        for seed in (1, 2, 3):
            made.append(run(task, "all", "mocoop", seed, 80.0 + n))
            made.append(run(task, "all", "coop", seed, 80.0 + n - seed))
            made.append(run(task, "base", "mocoop", seed, 90.0, new=70.0 + n))
            made.append(run(task, "base", "coop", seed, 90.0, new=71.0 + n))
    made.append(run("shapes", "all", "mocoop-top_k1", 1, 75.0))
    made.append(run("shapes", "all", "mocoop-top_k1", 2, 77.0))
    made.append(run("shapes", "all", "coop-lr0.01", 1, 70.0, changed={"lr": 0.01}))
    return made


def cells(table, first):
    """The row of a Markdown table that begins with these cells."""
    rows = [[c.strip() for c in line.strip("| ").split(" | ")] for line in table.splitlines()]
    (row,) = [row for row in rows if row[: len(first)] == list(first)]
    return row[len(first) :]


def test_lines_are_kept_without_what_nobody_reads(lines, tmp_path):
    results.save_results(lines, tmp_path / "lines.jsonl")
    again = results.load_results(tmp_path / "lines.jsonl")
    assert again == lines == json.loads(json.dumps(lines))
    assert not any("unread" in line[0] for line in lines)
    assert "router" in lines[0][0] and "router" not in lines[-2][0]  # only published settings


def test_means_are_over_tasks_first_and_then_over_seeds(lines):
    numbers = results.Numbers(lines)
    # coop: 81.5 less the seed
    assert results.over_tasks(numbers, "coop")["all"] == {1: 80.5, 2: 79.5, 3: 78.5}
    assert cells(results.methods_table(numbers), ["CoOp"])[:3] == ["79.5 ± 0.8", "90.0", "72.5"]
    assert cells(results.tasks_table(numbers), ["shapes_many", "MoCoOp"])[0] == "82.0"
    h = sum(harmonic_mean(90, 71 + n) for n in range(4)) / 4
    assert cells(results.methods_table(numbers), ["CoOp"])[3] == f"{h:.1f}"


def test_a_mean_over_tasks_needs_every_task(lines):
    missing = [x for x in lines if (x[0]["dataset"], x[0]["seed"]) != ("shapes_cold", 2)]
    assert results.over_tasks(results.Numbers(missing), "coop")["all"] == {1: 80.5, 3: 78.5}


def test_methods_are_compared_run_by_run(lines):
    row = cells(results.paired_table(results.Numbers(lines)), ["CoOp"])
    assert row[:3] == ["+2.0 ± 0.8", "+0.0", "-1.0"]  # 1, 2, 3 better on each task
    assert row[4:] == ["12 of 12", "0 of 12"]
    against_ensemble = cells(
        results.paired_table(results.Numbers(lines)), ["ensemble of all templates"]
    )
    assert against_ensemble[0].startswith("+21.5")


def test_ablations_are_differences_to_the_published_setting_of_the_same_seed(lines):
    row = cells(results.ablation_table(results.Numbers(lines), lines), ["`--top-k 1`"])
    assert row[0] == "-4.0 ± 1.0"  # 5 and 3 less than 80


def test_rates_are_listed_with_their_validation_accuracy(lines):
    table = results.rates_table(lines)
    assert cells(table, ["coop", "0.01"]) == ["1", "71.0 ± 0.0", "70.0 ± 0.0"]
    assert cells(table, ["mocoop", "published"])[:2] == ["3", "81.0 ± 0.0"]


def test_tables_go_to_their_places_on_the_page():
    page = "a\n<!-- one -->\nold\nold\n<!-- end -->\nb\n<!-- two -->\n<!-- end -->\nc\n"
    filled = results.filled(page, {"one": "| 1 |", "two": "| 2 |"})
    assert (
        filled == "a\n<!-- one -->\n| 1 |\n<!-- end -->\nb\n<!-- two -->\n| 2 |\n<!-- end -->\nc\n"
    )
    assert results.filled(filled, {"one": "| 1 |", "two": "| 2 |"}) == filled
    with pytest.raises(BadInput, match="no place for the table 'three'"):
        results.filled(page, {"three": "| 3 |"})


def test_a_mixture_is_taken_apart_into_what_it_was(run_train, tmp_path):
    result = run_train("--shots 2 --epochs 2")
    parts = take_apart(eval.load_run(tmp_path / "run"), load_split("shapes", "anywhere"))
    assert parts["accuracy"]["router, prompts"] == result["accuracy"]
    # prototypes with equal weights are all but the ensemble
    assert abs(parts["accuracy"]["equal weights, prototypes"] - result["ensemble_accuracy"]) < 2
    assert parts["accuracy"]["target, prototypes"] > parts["accuracy"]["equal weights, prototypes"]
    assert 1 / 8 < parts["gate"]["best prompt's share"] < 1
    assert 0 < parts["gate"]["entropy"] < torch.tensor(8.0).log()
    cosines = parts["classes"]
    assert all(-1 < value < 1 for value in cosines.values())
    assert cosines["cosine of prompt and prototype"] > cosines["cosine of two classes, prompts"]


def test_every_run_of_the_reproduction_is_one_that_train_takes_and_none_is_made_twice():
    folders = set()
    for flags in reproduce.jobs():
        config, _, folder, _ = train.resolve(parse(flags.split()))
        folders.add(folder)
        evaluated = [(t.get("dataset"), t.get("classes")) for t in reproduce.evaluations(config)]
        if config["classes"] == "base":
            new = [] if config["method"] == "linear" else [(None, "new")]
            assert evaluated == new
    assert len(folders) == len(list(reproduce.jobs())) > 500


def test_a_run_is_made_once_and_kept(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = "--method mocoop --shots 1 --epochs 1 --classes base"
    monkeypatch.setattr(reproduce.torch, "set_num_threads", lambda n: None)
    monkeypatch.setattr(reproduce, "is_to_be_taken_apart", lambda folder: True)
    monkeypatch.setattr(reproduce.results, "SHIFTED", ())
    first = reproduce.run_job(flags)
    assert [e["classes"] for e in first[1]] == ["new"] and set(first[2]) == {"base", "new"}
    with monkeypatch.context() as patch:
        patch.setattr(train, "train", None)  # what is there is not made again
        patch.setattr(eval, "evaluate", None)
        assert reproduce.run_job(flags) == first
    again = reproduce.run_job(flags, again=True)
    assert reproduce.without_times(again)[:2] == reproduce.without_times(first)[:2]
