"""Tables and pictures over runs."""

import json

import pytest

import report
from backbone import BadInput


def write_run(folder, seed, accuracy, classes="all", shots=4, evaluations=(), **flags):
    """A run with the numbers that a table is made of."""
    config = {
        "dataset": "eurosat", "data": "data", "shots": shots, "classes": classes, "seed": seed,
        "method": "mocoop", "clip": "ViT-B/16", "groups": "published", "top_k": 2,
        "gate_weight": 1.0, "text_weight": 5.0, "text_scale": 1.0, "text_bias": False,
        "epochs": 50, "batch_size": 32, "lr": 0.032, "views": 8, "device": None, "out": str(folder),
    } | flags  # fmt: skip
    result = {
        "dataset": "eurosat", "classes": classes, "n_prompts": 6, "accuracy": accuracy,
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
    for seed, accuracy in ((1, 80.0), (2, 84.0), (3, 88.0)):
        write_run(tmp_path / f"s{seed}", seed, accuracy)
    write_run(tmp_path / "k1", 1, 70.0, top_k=1)
    by_method = {row["method"]: row for row in rows(report.table(tmp_path))}
    assert by_method["mocoop"]["accuracy"] == "84.0 ± 3.3"  # sqrt(32 / 3) = 3.27
    assert by_method["mocoop"]["seeds"] == "3"
    assert by_method["mocoop-top_k1"]["accuracy"] == "70.0"
    assert by_method["zero-shot"]["accuracy"] == "50.0"
    assert by_method["ensemble"]["accuracy"] == "60.0"


def test_the_table_takes_h_from_the_mean_base_and_the_mean_new_accuracy(tmp_path):
    for seed, base, new in ((1, 90.0, 50.0), (2, 80.0, 70.0)):
        write_run(tmp_path / f"s{seed}", seed, base, "base", evaluations=[("eurosat", "new", new)])
    row = next(r for r in rows(report.table(tmp_path)) if r["method"] == "mocoop")
    assert row["accuracy"] == "85.0 ± 5.0" and row["new"] == "60.0 ± 10.0"
    assert row["H"] == "70.3"  # 2 * 85 * 60 / 145


def test_other_datasets_get_a_column_each(tmp_path):
    write_run(tmp_path / "a", 1, 90.0, evaluations=[("dtd", "all", 40.0), ("eurosat", "all", 90.0)])
    row = next(r for r in rows(report.table(tmp_path)) if r["method"] == "mocoop")
    assert row["dtd"] == "40.0"


@pytest.mark.parametrize("content", ["{}", '{"config": {"seed": 1}}', "[" * 100_000])
def test_the_table_names_a_damaged_result(tmp_path, content):
    write_run(tmp_path / "a", 1, 90.0)
    (tmp_path / "a/result.json").write_text(content)
    with pytest.raises(BadInput, match="result.json is not the result of a run, or damaged"):
        report.table(tmp_path)


def test_runs_made_before_there_was_a_flag_share_a_row_with_those_after(tmp_path):
    write_run(tmp_path / "old", 1, 80.0)  # says nothing of the router
    write_run(tmp_path / "young", 2, 82.0, router="trained", conditional=False)
    row = next(r for r in rows(report.table(tmp_path)) if r["method"] == "mocoop")
    assert row["accuracy"] == "81.0 ± 1.0"


def test_a_method_that_is_not_here_is_named(tmp_path):
    write_run(tmp_path / "a", 1, 80.0, method="balanced")
    with pytest.raises(BadInput, match="'balanced', which train.METHODS lacks"):
        report.table(tmp_path)


def test_h_takes_the_seeds_that_have_both_numbers(tmp_path):
    write_run(tmp_path / "a", 1, 80.0, "base", evaluations=[("eurosat", "new", 80.0)])
    write_run(tmp_path / "b", 2, 10.0, "base")
    row = next(r for r in rows(report.table(tmp_path)) if r["method"] == "mocoop")
    assert row["H"] == "80.0"


def test_pictures_are_drawn_from_runs_on_disk(run_train, tmp_path):
    folder = tmp_path / "out"
    with pytest.raises(BadInput, match="there is no folder"):
        report.pictures(folder)
    run_train("--shots 1 --epochs 1 --out", folder / "a")
    assert report.pictures(folder) == []  # not with the method's own number of epochs


def result_like(result, folder, **changes):
    config = {**result["config"], **changes.pop("config", {})}
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(json.dumps({**result, **changes, "config": config}))


def test_curves_and_ablations_are_means_over_seeds(run_train, tmp_path):
    result = run_train("--shots 1 --epochs 1")
    preset = {"epochs": 50, "shots": 16}
    for seed, accuracy in ((1, 80.0), (2, 82.0)):
        for shots in (8, 16):
            config = {**preset, "seed": seed, "shots": shots}
            result_like(
                result,
                tmp_path / f"out/{seed}{shots}",
                shots=shots,
                accuracy=accuracy,
                config=config,
            )
        config = {**preset, "seed": seed, "top_k": 1}
        result_like(
            result, tmp_path / f"out/k{seed}", shots=16, accuracy=accuracy - 5, config=config
        )
    config = {**preset, "shots": 32, "method": "ensemble", "classifier": "ensemble"}
    result_like(result, tmp_path / "out/ensemble", shots=32, accuracy=1.0, config=config)
    config = {**preset, "clip": "RN50"}
    result_like(result, tmp_path / "out/other", shots=16, zero_shot_accuracy=2.0, config=config)
    drawn = report.pictures(tmp_path / "out")
    assert drawn == ["few_shot.png", "router.png", "usage.png", "ablation.png"]
    rows = report.accuracies(report.find_runs(tmp_path / "out"))
    rows = {key: row for key, row in rows.items() if key[2] == "bundled"}
    values = {key[3:5]: row["accuracy"] for key, row in rows.items() if key[3]}
    assert values[16, "mocoop"] == {1: 80.0, 2: 82.0}
    assert values[16, "mocoop-top_k1"] == {1: 75.0, 2: 77.0}
