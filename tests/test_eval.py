"""Runs evaluated elsewhere, and tables over runs."""

import json
import shutil
from zipfile import ZipFile

import numpy as np
import pytest
import torch
from conftest import draw_image

import eval
from lib import pictures
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
    "flags, said",
    [
        ("", "name a RUN, or --table DIR, or --plots DIR"),
        ("run --table out", "name a RUN, or --table DIR, or --plots DIR"),
        ("--table nowhere", "there is no folder nowhere"),
        ("nowhere", "nowhere holds no finished run"),
        ("--table . --words", "--words means nothing here"),
    ],
)
def test_bad_input_gets_one_line(flags, said, tmp_path, monkeypatch, run_eval):
    monkeypatch.chdir(tmp_path)
    status, _, errors = run_eval(*flags.split())
    assert status == 2 and len(errors) == 1 and said in errors[0]


def test_tables_and_words_are_printed_and_what_cannot_be_drawn_is_said(
    run_train, small, tmp_path, run_eval
):
    out = tmp_path / "out"
    result = run_train(f"{small} --shots 1 --epochs 2 --out", out / "a")
    status, lines, _ = run_eval("--table", out)
    assert status == 0 and any(f"| {result['accuracy']:.1f} |" in line for line in lines)
    status, lines, errors = run_eval("--plots", out)
    assert status == 2 and lines == [] and "nothing to draw below" in errors[0]
    status, lines, _ = run_eval(out / "a", "--words")
    first, *vectors = lines[: lines.index("a photo of a {}.")]
    assert status == 0 and first == "a centered satellite photo of {}."
    assert [line.split()[0] for line in vectors] == ["v1", "v2", "v3", "v4", "v5"]
    behind = "--init", "a {} of a nice kind", "--out", out / "b"
    run_train(f"{small} --shots 1 --epochs 1 --one-group", *behind)
    _, lines, _ = run_eval(out / "b", "--words")
    words = [line.split()[:2] for line in lines[1:]]
    assert words == [["v1", "a"], ["v2", "of"], ["v3", "a"], ["v4", "nice"], ["v5", "kind"]]


def test_pictures_go_where_the_runs_are(run_train, small, tmp_path, run_eval, monkeypatch):
    run_train(f"{small} --shots 1 --epochs 1 --out", tmp_path / "out/a")
    monkeypatch.setattr(
        pictures, "draw_pictures", lambda runs, folder: (folder / "x.png").touch() or ["x.png"]
    )
    status, lines, _ = run_eval("--plots", tmp_path / "out")
    assert (status, lines) == (0, [f"saved in {tmp_path / 'out'}: x.png"])
    assert (tmp_path / "out/x.png").exists()


def test_every_prompt_with_a_weight_is_told():
    weights = torch.tensor([0.04, 0.0, 0.95, 0.01])
    assert eval.used_prompts(weights, ["a", "b", "c", "d"]) == ["95% c", "4% a", "1% d"]


def test_a_run_whose_files_have_moved_is_told_where_they_are(
    run_train, own_eurosat, random_clip_file, tmp_path, run_eval
):
    clip_file, photo = tmp_path / "clip.pt", tmp_path / "photo.jpg"
    shutil.copy(random_clip_file, clip_file)
    draw_image(photo, 1)
    flags = "--dataset eurosat --shots 1 --epochs 1 --image-side prompts --data"
    result = run_train(flags, own_eurosat, "--clip", clip_file)
    data, moved, run = own_eurosat.rename(tmp_path / "there"), tmp_path / "b.pt", tmp_path / "run"
    clip_file.rename(moved)
    for command in (["--data", data], ["--words"], ["--images", photo]):
        assert run_eval(run, *command)[0] == 2
        assert run_eval(run, *command, "--clip", moved)[0] == 0
        status, _, errors = run_eval(run, *command, "--clip", moved, "--device", "tpu9")
        assert status == 2 and "no device 'tpu9'" in errors[0]
    again = json.loads((run / "eval_eurosat_all.json").read_text())
    assert again["accuracy"] == result["accuracy"]
    status, _, errors = run_eval(run, "--clip", moved)
    assert status == 2 and "no images at" in errors[0]


def test_a_run_finds_its_files_from_any_folder(
    run_train, random_clip_file, tmp_path, monkeypatch, capsys
):
    for name in ("cat", "dog"):
        for i in range(6):
            draw_image(tmp_path / f"photos/{name}/{i}.jpg", f"{name}{i}")
    (tmp_path / "mine.txt").write_text("a photo of a {}.\n\na sketch of a {}.\n")
    shutil.copy(random_clip_file, tmp_path / "clip.pt")
    (tmp_path / "deep").mkdir()
    for folder, up in ((tmp_path, ""), (tmp_path / "deep", "../")):  # the second replaces the first
        monkeypatch.chdir(folder)
        files = {"dataset": "photos", "groups": "mine.txt", "clip": "clip.pt"}
        flags = " ".join(f"--{flag} {up}{file}" for flag, file in files.items())
        result = run_train(f"{flags} --shots 1 --epochs 1 --views 1")
        assert {flag: result["config"][flag] for flag in files} == {
            flag: str(tmp_path / file) for flag, file in files.items()
        }
        assert result["label"] == "mocoop-clipclip-epochs1-groupsmine-views1"
        assert result["changed_flags"].keys() == {"clip", "epochs", "groups", "views"}
    assert eval.evaluate(tmp_path / "run")["accuracy"] == result["accuracy"]
    assert "SUN397" not in capsys.readouterr().out  # whose templates serve who has none
    with pytest.raises(BadInput, match="run lies in the dataset itself: name another --out"):
        run_train(f"{flags} --shots 1 --out ../photos/run")
