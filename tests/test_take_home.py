"""What leaves the project: an export for NumPy, tables of answers, and their statistics."""

import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import unit

import eval
from data import load_split
from lib import answers, results
from lib.errors import BadInput
from lib.features import image_features

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")

pytestmark = pytest.mark.usefixtures("no_pictures")


@pytest.mark.parametrize(
    "flags", ["--text-bias", "--method coop --epochs 1", "--router frozen", "--router uniform"]
)
def test_the_readmes_lines_give_the_runs_own_logits(flags, run_train, run_eval, small, tmp_path):
    run_train(f"{small} --shots 1 --epochs 2 {flags}")
    status, *_ = run_eval(tmp_path / "run", "--export", tmp_path / "run.npz")
    assert status == 0
    run, features = eval.load_run(tmp_path / "run"), unit(5, 64)
    expected, _ = run.model.logits(features, run.class_names)
    (code,) = re.findall(r"```python\n(import numpy.*?)```", README, re.DOTALL)
    for feature, row in zip(features, expected):
        names = {"feature": 3 * feature.numpy()}  # as CLIP makes it, of any length
        exec(code.replace('"run.npz"', repr(str(tmp_path / "run.npz"))), names)
        assert np.allclose(names["logits"], row.numpy(), atol=1e-3)
        assert names["m"]["class_names"].tolist() == run.class_names


@pytest.mark.parametrize(
    "flags", ["--method zeroshot", "--conditional --epochs 1", "--image-side prompts --epochs 1"]
)
def test_what_would_give_another_answer_is_not_exported(flags, run_train, small, tmp_path):
    run_train(f"{small} --shots 1 {flags}")
    with pytest.raises(BadInput, match="cannot be exported"):
        answers.export(eval.load_run(tmp_path / "run"), tmp_path / "run.npz")
    assert not (tmp_path / "run.npz").exists()


def test_the_answer_for_every_test_image_is_written_as_a_table(
    own_run, run_eval, tmp_path, eurosat
):
    status, *_ = run_eval(own_run, "--csv", tmp_path / "answers.csv")
    assert status == 0
    with open(tmp_path / "answers.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    run, split = eval.load_run(own_run), load_split("eurosat", eurosat)
    assert [row["image"] for row in rows] == [item.path for item in split.test]
    features = image_features(run.clip_model, run.fingerprint, split, split.test)
    names, probabilities, weights = run.classify(features)
    result = json.loads((own_run / "result.json").read_text())
    right = 0
    for row, item, p, w in zip(rows, split.test, probabilities, weights):
        assert row["true class"] == names[item.label]
        best = p.argsort(descending=True)[:3]
        assert [row[f"class {i}"] for i in (1, 2, 3)] == [names[i] for i in best]
        assert float(row["probability 1"]) == pytest.approx(p.max().item(), abs=2e-6)
        used = [float(row[template]) for template in run.model.templates]
        assert used == pytest.approx(w.tolist(), abs=2e-6)
        right += row["class 1"] == row["true class"]
    assert round(100 * right / len(rows), 2) == result["accuracy"]


def test_macro_f1_and_confusion_are_those_worked_out_by_hand():
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 2])
    answers = torch.tensor([0, 0, 0, 1, 1, 0, 0])
    names = ["cat", "dog", "fox"]
    expected = {"cat": {"cat": 3, "dog": 1}, "dog": {"dog": 1, "cat": 1}, "fox": {"cat": 1}}
    assert results.confusion(answers, labels, names) == expected
    # F1: cat 2 * 3 / (4 + 5), dog 2 * 1 / (2 + 2), fox 0
    assert results.macro_f1(answers, labels, 3) == round(100 * (6 / 9 + 1 / 2 + 0) / 3, 2)
