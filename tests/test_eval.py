"""Runs evaluated elsewhere, and tables over runs."""

import json
import sys
from zipfile import ZipFile

import numpy as np
import pytest
import torch
from conftest import draw_image

import eval
from lib.errors import BadInput


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
    with ZipFile(file) as archive:  # a byte inside the largest tensor
        record = max(archive.infolist(), key=lambda entry: entry.file_size)
    inside = record.header_offset + 30 + len(record.filename) + 200
    assert record.file_size > 1000
    for damaged in (
        whole[:1000],
        whole[:inside] + bytes([whole[inside] ^ 1]) + whole[inside + 1 :],
    ):
        file.write_bytes(damaged)
        with pytest.raises(BadInput, match="checkpoint.pt is not a checkpoint of a run"):
            eval.evaluate(tmp_path / "run")
    file.write_bytes(whole)
    lacking = torch.load(file, weights_only=True)
    del lacking["model"]["router.gate.bias"]
    torch.save(lacking, file)
    with pytest.raises(BadInput, match="checkpoint.pt does not fit the run it names"):
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


@pytest.mark.parametrize(
    "flags",
    [
        "",
        "run --table out",
        "--table nowhere",
        "nowhere",
        "--table . --words",
        "a --words --data b",
    ],
)
def test_bad_input_gets_one_line(flags, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["eval.py", *flags.split()])
    with pytest.raises(SystemExit) as exit:
        eval.main()
    assert exit.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
