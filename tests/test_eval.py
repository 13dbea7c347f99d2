"""Runs evaluated elsewhere, and tables over runs."""

import json
import sys

import numpy as np
import pytest
import torch
from conftest import draw_image

import eval
from backbone import BadInput


def test_a_run_on_its_own_test_images_repeats_its_result(run_train, tmp_path):
    trained = run_train("--shots 2 --epochs 2 --text-bias")
    again = eval.evaluate(tmp_path / "run")
    for key in trained:
        if key != "val_accuracy":
            assert again[key] == trained[key], key
    written = {"eval_shapes_all.json", "eval_shapes_all.png", "samples_shapes_all.png"}
    assert written <= {f.name for f in (tmp_path / "run").iterdir()}


def test_new_class_names_go_into_the_learned_prompts(run_train, tmp_path):
    base = run_train("--shots 4 --epochs 3 --classes base")
    new = eval.evaluate(tmp_path / "run", classes="new")
    assert not set(base["per_class_accuracy"]) & set(new["per_class_accuracy"])
    assert new["classes"] == "new" and new["n_test"] == 1200 and new["n_train"] == 40
    assert new["accuracy"] > 20  # 10 is chance
    stored = json.loads((tmp_path / "run/eval_shapes_new.json").read_text())
    assert stored == new


def test_another_dataset_brings_its_class_names_and_templates(run_train, tmp_path):
    run_train("--shots 1 --epochs 1")
    result = eval.evaluate(tmp_path / "run", dataset="shapes_sketch")
    assert result["dataset"] == "shapes_sketch" and result["router"]["rows"] == ["dashed"]
    assert result["config"]["dataset"] == "shapes"  # the run's own


def test_a_router_picture_over_classes_for_real_images(
    run_train, eurosat, random_clip_file, tmp_path
):
    run_train(f"--dataset eurosat --epochs 1 --data {eurosat} --clip {random_clip_file}")
    result = eval.evaluate(tmp_path / "run", classes="base")
    assert result["router"]["rows"] == list(result["per_class_accuracy"])
    assert np.allclose(np.sum(result["router"]["share"], axis=1), 1, atol=1e-3)


def test_a_checkpoint_from_another_clip_is_refused(run_train, random_clip_file, tmp_path):
    run_train("--shots 1 --epochs 1")
    with pytest.raises(BadInput, match="was trained with another CLIP than"):
        eval.evaluate(tmp_path / "run", clip=random_clip_file)


def test_what_is_no_run_is_refused(run_train, tmp_path):
    with pytest.raises(BadInput, match="holds no finished run"):
        eval.evaluate(tmp_path)
    run_train("--shots 1 --epochs 1")
    file = tmp_path / "run/checkpoint.pt"
    whole = file.read_bytes()
    for damaged in (whole[:1000], whole[:9000] + bytes([whole[9000] ^ 1]) + whole[9001:]):
        file.write_bytes(damaged)
        with pytest.raises(BadInput, match="checkpoint.pt is not a checkpoint of a run"):
            eval.evaluate(tmp_path / "run")
    file.write_bytes(whole[:1000])
    with pytest.raises(BadInput, match="checkpoint.pt is not a checkpoint of a run"):
        eval.evaluate(tmp_path / "run")
    torch.save({}, file)
    with pytest.raises(BadInput, match="checkpoint.pt lacks 'config'"):
        eval.evaluate(tmp_path / "run")


def test_another_folder_of_the_same_name_is_refused(run_train, random_clip_file, tmp_path):
    for root in ("a", "b"):
        for name in ("cat", "dog"):
            for i in range(6):
                draw_image(tmp_path / root / "photos" / name / f"{i}.jpg", f"{name}{i}")
    flags = f"--epochs 1 --views 1 --clip {random_clip_file} --dataset"
    own = run_train(flags, tmp_path / "a/photos/")
    again = eval.evaluate(tmp_path / "run", dataset=str(tmp_path / "b/../a/photos"))
    assert again["accuracy"] == own["accuracy"]
    with pytest.raises(BadInput, match="has the name of the run's own dataset"):
        eval.evaluate(tmp_path / "run", dataset=str(tmp_path / "b/photos"))


@pytest.mark.parametrize("content", ["{}", '{"config": {"seed": 1}}', "[" * 100_000])
def test_the_table_names_a_damaged_result(tmp_path, content):
    write_run(tmp_path / "a", 1, 90.0)
    (tmp_path / "a/result.json").write_text(content)
    with pytest.raises(BadInput, match="result.json is not the result of a run, or damaged"):
        eval.table(tmp_path)


@pytest.mark.parametrize("flags", ["", "run --table out", "--table nowhere", "nowhere"])
def test_bad_input_gets_one_line(flags, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["eval.py", *flags.split()])
    with pytest.raises(SystemExit) as exit:
        eval.main()
    assert exit.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


# ---------------------------------------------------------------------------------- the table


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
        "n_train": 40, "zero_shot_accuracy": 50.0, "ensemble_accuracy": 60.0, "config": config,
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
    by_method = {row["method"]: row for row in rows(eval.table(tmp_path))}
    assert by_method["mocoop"]["accuracy"] == "84.0 ± 3.3"  # sqrt(32 / 3) = 3.27
    assert by_method["mocoop"]["seeds"] == "3"
    assert by_method["mocoop-top_k1"]["accuracy"] == "70.0"
    assert by_method["zero-shot"]["accuracy"] == "50.0"
    assert by_method["ensemble"]["accuracy"] == "60.0"


def test_the_table_takes_h_from_the_mean_base_and_the_mean_new_accuracy(tmp_path):
    for seed, base, new in ((1, 90.0, 50.0), (2, 80.0, 70.0)):
        write_run(tmp_path / f"s{seed}", seed, base, "base", evaluations=[("eurosat", "new", new)])
    row = next(r for r in rows(eval.table(tmp_path)) if r["method"] == "mocoop")
    assert row["accuracy"] == "85.0 ± 5.0" and row["new"] == "60.0 ± 10.0"
    assert row["H"] == "70.3"  # 2 * 85 * 60 / 145


def test_other_datasets_get_a_column_each(tmp_path):
    write_run(tmp_path / "a", 1, 90.0, evaluations=[("dtd", "all", 40.0), ("eurosat", "all", 90.0)])
    row = next(r for r in rows(eval.table(tmp_path)) if r["method"] == "mocoop")
    assert row["dtd"] == "40.0"
