"""Runs evaluated elsewhere, and what eval.py prints."""

import json
import os
import shutil
from pathlib import Path
from zipfile import ZipFile

import pytest
import torch
from conftest import checkpoint, draw_image

import eval
from lib import answers
from lib.errors import BadInput

pytestmark = pytest.mark.usefixtures("no_pictures")


def test_a_run_on_its_own_test_images_repeats_its_result(own_run):
    trained = json.loads((own_run / "result.json").read_text())
    again = eval.evaluate(own_run)
    assert again == trained | {"val_accuracy": None, "target": "eurosat"}
    assert json.loads((own_run / "eval_eurosat_all.json").read_text()) == again
    written = {"eval_eurosat_all.json", "eval_eurosat_all.png", "samples_eurosat_all.png"}
    assert written <= {f.name for f in own_run.iterdir()}


def test_a_setting_that_is_younger_than_the_run_has_its_default(own_run):
    stored = checkpoint(own_run)
    accuracy = eval.evaluate(own_run)["accuracy"]
    for name in ("text_encoder", "conditional", "chunk"):
        del stored["config"][name]
    del stored["prompt_names"]
    torch.save(stored, own_run / "checkpoint.pt")
    assert eval.evaluate(own_run)["accuracy"] == accuracy


def test_a_checkpoint_from_another_clip_is_refused(finished_run):
    with pytest.raises(BadInput, match="was trained with another CLIP than"):
        eval.load_run(finished_run, clip="bundled")


class Command:
    """Unpickled, it runs a command."""

    def __reduce__(self):
        return os.system, ("touch written",)


@pytest.mark.parametrize("file", ["checkpoint.pt", "resume.pt", "clip.pt"])
def test_a_strangers_file_runs_no_command(file, own_run, small, run_train, monkeypatch, tmp_path):
    monkeypatch.chdir(own_run)
    torch.save({"config": Command(), "model": Command()}, file)
    with pytest.raises(BadInput, match=f"{file} is not a "):
        if file == "checkpoint.pt":
            eval.load_run(own_run)
        elif file == "resume.pt":
            run_train(small, "--out", own_run)
        else:
            run_train(small, "--clip", file, "--out", tmp_path / "other")
    assert not Path("written").exists()


def test_a_folder_of_ones_own_has_new_classes_and_h(eurosat, run_train, run_eval, tmp_path, small):
    """Its runs know it by its path, a table by its name."""
    clip = small.split("--clip")[1]
    own = f"--dataset {eurosat / 'eurosat/2750'} --clip {clip} --classes base"
    run_train(f"{own} --shots 1 --epochs 1 --views 1")
    assert run_eval(tmp_path / "run", "--classes", "new")[0] == 0
    _, lines, _ = run_eval("--table", tmp_path)
    head, _, *rows = [[cell.strip() for cell in line.split("|")] for line in lines]
    row = dict(zip(head, next(row for row in rows if "mocoop" in "".join(row))))
    assert row["dataset"] == "2750" and float(row["new"]) > 0 and float(row["H"]) > 0


def test_what_is_no_run_is_refused(own_run, tmp_path):
    with pytest.raises(BadInput, match="holds no finished run"):
        eval.load_run(tmp_path)
    file = own_run / "checkpoint.pt"
    whole = file.read_bytes()
    with ZipFile(file) as archive:  # a byte inside the largest tensor
        record = max(archive.infolist(), key=lambda entry: entry.file_size)
    inside = record.header_offset + 30 + len(record.filename) + 200
    assert record.file_size > 1000
    file.write_bytes(whole[:inside] + bytes([whole[inside] ^ 1]) + whole[inside + 1 :])
    with pytest.raises(BadInput, match="checkpoint.pt is not a checkpoint of a run"):
        eval.load_run(own_run)
    file.write_bytes(whole)
    lacking = checkpoint(own_run)
    del lacking["model"]["router.gate.bias"]
    for content in (lacking, {}):
        torch.save(content, file)
        with pytest.raises(BadInput, match="checkpoint.pt"):
            eval.load_run(own_run)


@pytest.mark.parametrize(
    "flags, said",
    [
        ("", "name a RUN, or --table DIR, or --plots DIR"),
        ("--table nowhere", "no finished run below nowhere"),
        ("nowhere", "nowhere holds no finished run"),
        ("--table . --words", "--words has no effect here"),
    ],
)
def test_bad_input_gets_one_line(flags, said, tmp_path, monkeypatch, run_eval):
    monkeypatch.chdir(tmp_path)
    status, _, errors = run_eval(*flags.split())
    assert status == 2 and len(errors) == 1 and said in errors[0]


def test_tables_and_words_are_printed_and_what_cannot_be_drawn_is_said(
    own_run, run_train, small, tmp_path, run_eval
):
    result = json.loads((own_run / "result.json").read_text())
    status, lines, _ = run_eval("--table", tmp_path)
    assert status == 0 and any(f"| {result['accuracy']:.1f} |" in line for line in lines)
    status, lines, errors = run_eval("--plots", tmp_path)
    assert status == 2 and lines == [] and "nothing to draw below" in errors[0]
    status, lines, _ = run_eval(own_run, "--words")
    clip_line, first, *vectors = lines[: lines.index("a photo of a {}.")]
    assert f"is {result['clip']}" in clip_line  # a path that the checkpoint names
    assert status == 0 and first == "a centered satellite photo of {}."
    assert [line.split()[0] for line in vectors] == ["v1", "v2", "v3", "v4", "v5"]
    init = "--init", "a {} of a nice kind", "--out", tmp_path / "two_sided"
    run_train(f"{small} --shots 1 --epochs 1 --one-group", *init)
    _, lines, _ = run_eval(tmp_path / "two_sided", "--words")
    words = [line.split()[:2] for line in lines[2:]]
    assert words == [["v1", "a"], ["v2", "of"], ["v3", "a"], ["v4", "nice"], ["v5", "kind"]]


def test_every_prompt_with_a_weight_is_told():
    weights = torch.tensor([0.04, 0.0, 0.95, 0.01])
    assert answers.used_prompts(weights, ["a", "b", "c", "d"]) == ["95% c", "4% a", "1% d"]


def test_a_run_whose_files_have_moved_is_told_where_they_are(
    run_train, own_eurosat, random_clip_file, tmp_path, run_eval
):
    clip_file, moved, run = tmp_path / "a.pt", tmp_path / "b.pt", tmp_path / "run"
    shutil.copy(random_clip_file, clip_file)
    flags = "--dataset eurosat --shots 1 --epochs 1 --image-side prompts --data"
    result = run_train(flags, own_eurosat, "--clip", clip_file)
    data = own_eurosat.rename(tmp_path / "there")
    clip_file.rename(moved)
    assert run_eval(run, "--data", data)[0] == 2
    assert run_eval(run, "--data", data, "--clip", moved)[0] == 0
    again = json.loads((run / "eval_eurosat_all.json").read_text())
    assert again["accuracy"] == result["accuracy"]
    status, _, errors = run_eval(run, "--clip", moved, "--device", "tpu9")
    assert status == 2 and "no device 'tpu9'" in errors[0]


def test_a_run_finds_its_files_from_any_folder(
    run_train, random_clip_file, tmp_path, monkeypatch, capsys
):
    for name in ("cat", "dog"):
        for i in range(6):
            draw_image(tmp_path / "photos" / name / f"{i}.jpg", f"{name}{i}")
    (tmp_path / "mine.txt").write_text("a photo of a {}.\n\na sketch of a {}.\n")
    shutil.copy(random_clip_file, tmp_path / "clip.pt")
    files = {"dataset": "photos", "groups": "mine.txt", "clip": "clip.pt"}
    flags = " ".join(f"--{flag} {file}" for flag, file in files.items())
    monkeypatch.chdir(tmp_path)
    result = run_train(f"{flags} --shots 1 --epochs 1 --views 1")
    assert {flag: result["config"][flag] for flag in files} == {
        flag: str(tmp_path / file) for flag, file in files.items()
    }
    assert result["label"] == "mocoop-clipclip-epochs1-groupsmine-views1"
    with pytest.raises(BadInput, match="run lies in the dataset itself: choose another --out"):
        run_train(f"{flags} --shots 1 --out photos/run")
    monkeypatch.chdir("/")
    assert eval.evaluate(tmp_path / "run")["accuracy"] == result["accuracy"]
    assert "SUN397" not in capsys.readouterr().out  # whose templates serve who has none
