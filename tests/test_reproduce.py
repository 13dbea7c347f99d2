"""The page of results: it shows what was kept, and its tables can be worked out by hand."""

import json

import clip
import plain
import pytest
import torch
from conftest import HERE, config_of
from pytest import approx

import eval
from data import load_split, select_classes
from lib.results import harmonic_mean
from lib.world import TASKS
from tools import reproduce
from tools.reproduce import SHIFTED, TABLES, Results, filled, run_job
from tools.why import why

pytestmark = pytest.mark.usefixtures("no_pictures")


def run(dataset, classes, label, seed, accuracy, new=None, parts=None, **changed):
    task = {"dataset": dataset, "classes": classes, "shots": 16, "seed": seed, "clip": "bundled"}
    result = task | {
        "config": task | {"groups": "dataset"}, "method": label.split("-")[0], "label": label,
        "changed_flags": changed, "accuracy": accuracy, "val_accuracy": accuracy + 1,
        "zero_shot_accuracy": 50.0, "ensemble_accuracy": 60.0, "n_prompts": 8,
    }  # fmt: skip
    return [result, [result | {"classes": "new", "accuracy": new}] if new else [], parts]


def lines():
    """MoCoOp has 80 + the task's number, CoOp 1 less with seed 1, 2 less with seed 2, 3 with 3."""
    for n, task in enumerate(TASKS):
        for seed in (1, 2, 3):
            yield run(task, "all", "mocoop", seed, 80.0 + n)
            yield run(task, "all", "coop", seed, 80.0 + n - seed)
            yield run(task, "base", "mocoop", seed, 90.0, new=70.0 + n)
            yield run(task, "base", "coop", seed, 90.0, new=71.0 + n)
    yield run("shapes", "all", "mocoop-top_k1", 1, 75.0, top_k=1)
    yield run("shapes", "all", "mocoop-top_k1", 2, 77.0, top_k=1)
    yield run("shapes", "all", "coop-lr0.01", 1, 70.0, lr=0.01)


def cells(name, first, made=None):
    """What stands in a table's row behind its first cells."""
    rows = TABLES[name](Results(list(made or lines())))
    (row,) = [row for row in rows if row[: len(first)] == first]
    return row[len(first) :]


def test_means_are_over_tasks_first_and_then_over_seeds():
    h = sum(harmonic_mean(90, 71 + n) for n in range(4)) / 4
    # 81.5 less the seed
    assert cells("methods", ["CoOp"]) == ["79.5 ± 0.8", "90.0", "72.5", f"{h:.1f}"]
    assert cells("tasks", ["shapes_many", "MoCoOp"])[:3] == ["82.0", "90.0", "72.0"]
    missing = [x for x in lines() if (x[0]["dataset"], x[0]["seed"]) != ("shapes_cold", 2)]
    assert cells("methods", ["CoOp"], missing)[0] == "79.5 ± 1.0"  # the first and third seed


def test_methods_are_compared_run_by_run():
    row = cells("paired", ["CoOp"])
    assert row[:3] == ["+2.0 ± 0.8", "+0.0", "-1.0"]  # 1, 2, 3 better on each task
    assert row[4:] == ["12 of 12", "0 of 12"]


def test_ablations_are_differences_to_the_published_setting_of_the_same_seed():
    assert cells("ablations", ["`--top-k 1`"])[0] == "-4.0 ± 1.0"  # 5 and 3 less than 80
    assert cells("rates", ["coop", 0.01]) == [1, "71.0 ± 0.0", "70.0 ± 0.0"]


def test_exchanged_parts_have_a_column_per_task_and_half():
    made = list(lines())
    for n, task in enumerate(TASKS):
        for seed in (1, 2, 4):  # not every task has the fourth
            halves = {"base": 80.0 + n + seed, "new": 60.0 + n + seed}
            parts = {half: {"accuracy": {"router, prompts": x}} for half, x in halves.items()}
            made.append(run(task, "base", "mocoop", seed, 90.0, parts=parts))
    row = cells("why", ["router, prompts"], made)
    assert row[:2] == ["83.0", "63.0"]
    assert row[2:] == ["81.5", "82.5", "83.5", "84.5", "61.5", "62.5", "63.5", "64.5"]


def test_the_pages_show_the_results_that_are_kept(monkeypatch):
    monkeypatch.chdir(HERE.parent)
    results = Results(reproduce.read_results())
    for page in reproduce.PAGES:
        text = page.read_text(encoding="utf-8")
        assert filled(text, results) == text, page
    assert all(f"<!-- {name} -->" in text for name in TABLES)  # of docs/RESULTS.md


def test_the_results_that_are_kept_are_those_of_the_runs_that_are_made():
    made = [config_of(*words.split())["out"] for words in reproduce.jobs()]
    kept = []
    for result, others, parts in reproduce.read_results(HERE.parent / reproduce.RESULTS):
        name = "{label}_{shots}shot_{classes}_seed{seed}".format(**result)
        kept.append(f"out/{result['dataset']}/{name}")
        asked = [{"dataset": result["dataset"], "classes": "all"} | target
                 for target in reproduce.evaluations(result)]  # fmt: skip
        found = [{key: other[key] for key in ("dataset", "classes")} for other in others]
        assert sorted(found, key=str) == sorted(asked, key=str)
        seen = ["base", "new"] if result["classes"] == "base" else ["all", *SHIFTED]
        assert list(parts or []) == (seen if reproduce.has_swaps(result) else [])
    assert made == kept and len(set(made)) == len(made)


def test_a_run_is_made_and_evaluated_once(tmp_path, small_world, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(reproduce.torch, "set_num_threads", lambda n: None)
    words = "--method mocoop --shots 1 --epochs 1 --classes base"
    first = run_job(words)
    assert [other["classes"] for other in first[1]] == ["new"]
    assert run_job(words) == first  # with its seconds


def test_a_mixture_is_taken_apart_into_what_it_was(
    run_train, small, eurosat, random_clip, tmp_path
):
    result = run_train(f"{small} --shots 4 --epochs 6 --views 1 --classes base")
    new = eval.evaluate(tmp_path / "run", classes="new")
    parts = why(tmp_path / "run")
    assert parts == json.loads((tmp_path / "run/why.json").read_text())
    assert parts["base"]["accuracy"]["router, prompts"] == result["accuracy"]
    assert parts["new"]["accuracy"]["router, prompts"] == new["accuracy"]

    split = select_classes(load_split("eurosat", eurosat), "new")
    names, y = split.class_names, split.labels(split.test)
    pixels = [clip.clip._transform(32)(split.open(item.path)) for item in split.test]
    with torch.no_grad():
        f = plain.unit(random_clip.encode_image(torch.stack(pixels)))
        hard = {t: plain.hard_features(random_clip, t, names) for g in plain.EUROSAT for t in g}
    p = plain.prototypes(hard, plain.EUROSAT)  # (G, C, D)
    similar = torch.einsum("bd,gbd->bg", f, p[:, y])
    best = similar >= similar.sort(dim=-1, descending=True)[0][:, 1:2]  # the two best of six
    target = (similar + 10 * best).softmax(-1)
    for routing, w in (("equal weights", torch.full_like(target, 1 / 6)), ("target", target)):
        answers = torch.einsum("bg,gcd,bd->bc", w, p, f).argmax(-1)
        expected = 100 * (answers == y).float().mean().item()
        found = parts["new"]["accuracy"][f"{routing}, prototypes"]
        assert found == approx(expected, abs=0.006)
