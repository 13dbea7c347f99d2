"""Training, end to end: the built-in world, a run's folder, resuming, and what is refused."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import same_parameters, stopped_after

import train
from lib.errors import BadInput, exit_on_bad_input
from lib.files import torch_bytes

RUN_FILES = ["checkpoint.pt", "result.json", "router.png"]
FINISHED = "--shots 1 --epochs 2"  # the settings of `finished_run`


def files_of(folder):
    return sorted(file.name for file in folder.iterdir())


def result_of(folder):
    return json.loads((folder / "result.json").read_text())


# ---------------------------------------------------------------------------- the whole method


def test_the_built_in_world_is_learned(run_train, small_world, tmp_path):
    """A short run; the README's numbers are of 50 epochs."""
    result = run_train("--epochs 5")
    assert files_of(tmp_path / "run") == RUN_FILES
    assert result["accuracy"] > max(result["zero_shot_accuracy"], result["ensemble_accuracy"]) + 1
    assert (result["n_train"], result["n_test"], result["n_classes"]) == (320, 480, 20)


def test_the_same_seed_gives_the_same_numbers_bit_for_bit(
    run_train, small, finished_run, tmp_path, no_pictures
):
    result, again = result_of(finished_run), run_train(f"{small} {FINISHED}")
    assert same_parameters(tmp_path / "run", finished_run)
    assert result["per_class_accuracy"] == again["per_class_accuracy"]
    other = run_train(f"{small} {FINISHED} --seed 2 --out", tmp_path / "other")
    assert not same_parameters(tmp_path / "other", finished_run, tolerance=1e-3)
    assert other["prompt_usage"] != result["prompt_usage"]


def test_result_json_has_the_documented_keys(finished_run):
    expected = """dataset classes shots seed method label changed_flags clip n_prompts top_k
        n_classes n_train n_test split few_shot_samples accuracy zero_shot_accuracy
        ensemble_accuracy val_accuracy macro_f1 per_class_accuracy confusion prompt_usage
        prompt_usage_by_epoch router train_seconds config class_names groups clip_fingerprint
        made_of"""
    assert sorted(result_of(finished_run)) == sorted(expected.split())


# ---------------------------------------------------------------------------- resuming, killing


def test_an_interrupted_run_resumes_to_the_same_numbers(
    run_train, small, tmp_path, no_pictures, capsys
):
    flags = f"{small} --shots 2 --epochs 5 --batch-size 8 --text-bias --out"
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    expected = run_train(flags, whole)
    with stopped_after(2):
        run_train(flags, parts)
    assert files_of(parts) == ["config.json", "resume.pt"]
    with pytest.raises(BadInput, match="holds a run with seed 1 instead of 2"):
        run_train(flags, parts, "--seed", 2)
    resumed = run_train(flags, parts, "--resume")
    assert "resuming after epoch 2" in capsys.readouterr().out
    assert same_parameters(whole, parts)
    assert resumed["per_class_accuracy"] == expected["per_class_accuracy"]
    assert resumed["prompt_usage_by_epoch"] == expected["prompt_usage_by_epoch"]
    assert files_of(parts) == RUN_FILES


def test_only_resume_continues_a_stopped_run_until_it_is_finished(
    run_train, small, own_run, no_pictures, capsys
):
    for resume, epochs in (("", ["1/2", "2/2"]), ("--resume", ["2/2"])):
        with stopped_after(1):
            run_train(f"{small} {FINISHED}")
        capsys.readouterr()
        run_train(f"{small} {FINISHED} {resume}")
        lines = [line.split() for line in capsys.readouterr().out.splitlines()]
        assert [words[1] for words in lines if words[:1] == ["epoch"]] == epochs

    before = (own_run / "result.json").stat().st_mtime_ns
    assert run_train(f"{small} {FINISHED} --resume") == result_of(own_run)
    assert (own_run / "result.json").stat().st_mtime_ns == before


def test_a_run_killed_between_its_last_files_is_not_called_finished(
    run_train, small, own_run, no_pictures
):
    """The new result stands there before the new checkpoint."""
    (own_run / "checkpoint.pt").unlink()
    run_train(f"{small} {FINISHED} --resume")
    assert files_of(own_run) == RUN_FILES


def test_a_stopped_run_goes_on_with_moved_data_but_not_with_other_parts(
    run_train, own_eurosat, tmp_path, random_clip, no_pictures
):
    groups, clip_file = tmp_path / "groups.txt", tmp_path / "clip.pt"
    groups.write_text("a photo of a {}.\n\na sketch of a {}.\n")
    torch.save(random_clip.state_dict(), clip_file)
    flags = "--dataset eurosat --views 1 --shots 1 --epochs 3 --data"
    parts = "--groups", groups, "--clip", clip_file
    with stopped_after(1):
        run_train(flags, own_eurosat, *parts)

    split_file = own_eurosat / "eurosat/split_zhou_EuroSAT.json"
    split = json.loads(split_file.read_text())
    weights = {key: value + 0.01 for key, value in random_clip.state_dict().items()}
    for file, other in (
        (groups, b"a photo of a {}.\n\na drawing of a {}.\n"),
        (clip_file, torch_bytes(weights)),
        (split_file, json.dumps(split | {"train": split["train"][::-1]}).encode()),
    ):
        before = file.read_bytes()
        file.write_bytes(other)
        with pytest.raises(BadInput, match="other images, templates or CLIP weights"):
            run_train(flags, own_eurosat, *parts, "--resume")
        file.write_bytes(before)
    there = own_eurosat.rename(tmp_path / "there")
    result = run_train(flags, there, *parts, "--resume")
    assert len(result["prompt_usage_by_epoch"]) == 3


@pytest.mark.slow
def test_a_killed_process_resumes_to_the_same_numbers(tmp_path):
    program = [sys.executable, Path(train.__file__), "--shots", "2", "--epochs", "12", "--out"]
    subprocess.run([*program, tmp_path / "whole"], check=True, capture_output=True)
    parts = [*program, tmp_path / "parts", "--resume"]
    for _ in range(3):  # killed three times, whatever it was doing
        process = subprocess.Popen(parts, stdout=subprocess.PIPE, text=True)
        for line in process.stdout:
            if line.startswith("epoch") and int(line.split()[1].split("/")[0]) % 3 == 0:
                break
        process.kill()
        process.wait()
    done = subprocess.run(parts, check=True, capture_output=True, text=True)
    assert "resuming after epoch" in done.stdout
    assert same_parameters(tmp_path / "whole", tmp_path / "parts")


# -------------------------------------------------------------------------------- a run's folder


def test_a_rerun_replaces_its_own_files_alone(run_train, small, own_run, no_pictures):
    stale = "eval_shapes_all.json", "eval_shapes_all.png", "samples_shapes_all.png", "why.json"
    for name in (*stale, ".DS_Store"):
        (own_run / name).write_text("{}")
    run_train(f"{small} {FINISHED}")
    assert files_of(own_run) == [".DS_Store", *RUN_FILES]


def test_a_folder_with_another_configuration_is_refused(run_train, small, own_run):
    with pytest.raises(BadInput, match="holds a run with seed 1 instead of 2"):
        run_train(f"{small} {FINISHED} --seed 2")


def test_a_run_that_is_too_old_to_know_a_setting_had_its_default(run_train, small, own_run):
    result = result_of(own_run)
    del result["config"]["text_scale"]
    (own_run / "result.json").write_text(json.dumps(result))
    with pytest.raises(BadInput, match="holds a run with text_scale 1.0 instead of 2.0"):
        run_train(f"{small} {FINISHED} --text-scale 2")


@pytest.mark.parametrize("name", ["thesis.tex", "checkpoint.pt"])
def test_a_folder_with_other_files_is_left_alone(run_train, tmp_path, name):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).write_text("years of work")
    with pytest.raises(BadInput, match=rf"is not empty and holds no run \({name}\)"):
        run_train("--shots 1 --epochs 1")
    assert (tmp_path / "run" / name).read_text() == "years of work"


def test_a_damaged_state_is_named(run_train, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/resume.pt").write_text("half")
    with pytest.raises(BadInput, match="resume.pt is not a state to resume from"):
        run_train("--shots 1 --epochs 1 --resume")


def test_a_folder_that_cannot_be_written_is_refused_before_anything_else(
    run_train, tmp_path, monkeypatch
):
    monkeypatch.setattr(train, "few_shot_split", None)  # not reached
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match="cannot write in .*: choose another --out"):
        run_train("--out", tmp_path / "file/run")


# ------------------------------------------------------------------------------------ refused


@pytest.mark.parametrize(
    "flags, said",
    [
        ("--shots 0", "argument --shots: must be at least 1, not 0"),
        ("--seed 99999999999999999999", "argument --seed: must be"),
        ("--lr nan", "argument --lr: must be at least 1e-09"),
        ("--top-k 9", "--top-k 9 is above the number of prompts, 8"),
        ("--groups auto --n-groups 30", "--n-groups 30 is above the number of templates, 20"),
        ("--init photo", "the template 'photo' needs one {}"),
        ("--dataset eurosta", "did you mean 'eurosat'?"),
        ("--dataset shapes_v2", "shapes_v2 has no training images"),
        ("--dataset eurosat --data nowhere", "nowhere or name another --data"),
        ("--clip nothing.pt", "no CLIP file nothing.pt"),
        ("--groups nothing.txt", "cannot read nothing.txt"),
        ("--device tpu9", "no device 'tpu9'"),
        ("--device meta", "no device 'meta'"),
    ],
)
def test_bad_input_gets_one_line_and_leaves_nothing(flags, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py", *flags.split()])
    with pytest.raises(SystemExit) as exit:
        train.main()
    assert exit.value.code == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_training_that_diverges_says_where_and_keeps_what_was_saved(
    run_train, small, own_run, monkeypatch
):
    result, loss, factors = result_of(own_run), train.image_loss, iter([1.0, math.nan])
    monkeypatch.setattr(train, "image_loss", lambda *args: next(factors) * loss(*args))
    with pytest.raises(BadInput, match="training has diverged in epoch 2: try a smaller --lr"):
        run_train(f"{small} {FINISHED}")
    assert files_of(own_run) == sorted([*RUN_FILES, "config.json", "resume.pt"])
    assert result_of(own_run) == result
    assert torch.load(own_run / "resume.pt", weights_only=True)["epoch"] == 1


# ---------------------------------------------------------------------------- the command line


@pytest.mark.parametrize("reason, status", [(KeyboardInterrupt, 130), (BrokenPipeError, 1)])
def test_who_stops_a_run_or_closes_its_output_meets_no_traceback(
    reason, status, tmp_path, monkeypatch
):
    def stopped():
        raise reason

    monkeypatch.setattr(sys, "stderr", None)  # closed as well
    with open(tmp_path / "output", "w") as output, pytest.raises(SystemExit) as exit:
        monkeypatch.setattr(sys, "stdout", output)
        exit_on_bad_input(stopped)
    assert exit.value.code == status


# --------------------------------------------------------------------------- two runs, one folder


@pytest.fixture
def while_training(monkeypatch):
    """`while_training(action)`: the next training is interrupted by an action before it begins."""
    fit = train.fit

    def interrupt(action):
        def fit_after(*arguments):
            monkeypatch.setattr(train, "fit", fit)
            action()
            return fit(*arguments)

        monkeypatch.setattr(train, "fit", fit_after)

    return interrupt


def test_a_folder_belongs_to_its_run_from_the_start(run_train, small, tmp_path, while_training):
    flags, refused = f"{small} --shots 1 --epochs 1", []

    def others():
        assert files_of(tmp_path / "run") == ["config.json"]
        for change in ("--seed 2", "--classes base", "--lr 0.1"):
            with pytest.raises(BadInput, match="holds a run with .*: remove it or choose another"):
                run_train(f"{flags} {change}")
            refused.append(change)

    while_training(others)
    run_train(flags)
    assert len(refused) == 3 and files_of(tmp_path / "run") == RUN_FILES


def test_two_processes_with_one_configuration_leave_the_same_files(
    run_train, small, finished_run, tmp_path, while_training, no_pictures
):
    while_training(lambda: run_train(f"{small} {FINISHED}"))
    run_train(f"{small} {FINISHED}")
    assert (
        same_parameters(tmp_path / "run", finished_run) and files_of(tmp_path / "run") == RUN_FILES
    )


def test_a_handled_stop_that_saved_nothing_leaves_nothing(
    run_train, small, tmp_path, while_training
):
    def stop():
        raise KeyboardInterrupt

    while_training(stop)
    with pytest.raises(KeyboardInterrupt):
        run_train(f"{small} --shots 1 --epochs 1")
    assert not (tmp_path / "run").exists()


def test_after_a_kill_the_same_configuration_goes_on_and_another_is_refused(
    run_train, small, eurosat, tmp_path, own_eurosat, no_pictures
):
    flags = "--shots 1 --epochs 1 --dataset eurosat --data"
    clip = "--clip", small.split()[-1]
    (tmp_path / "run").mkdir()
    config = train.configure([*flags.split(), str(eurosat), *clip])[0]
    (tmp_path / "run/config.json").write_text(json.dumps({"config": config}))
    with pytest.raises(BadInput, match="holds a run with shots 1 instead of 2"):
        run_train(flags, own_eurosat, *clip, "--shots", 2)
    run_train(flags, own_eurosat, *clip)  # elsewhere, and the same
    assert files_of(tmp_path / "run") == RUN_FILES

    image = next((own_eurosat / "eurosat/2750").rglob("*.jpg")).parent
    for file in image.iterdir():
        file.write_bytes(file.read_bytes() + b"changed")
    with pytest.raises(BadInput, match="holds a run with other images, templates or CLIP weights"):
        run_train(flags, own_eurosat, *clip)


# ----------------------------------------------------------------------------- damaged, or strange


@pytest.mark.parametrize(
    "file, change",
    [
        ("result.json", {"accuracy": "80"}),
        ("result.json", {"accuracy": float("nan")}),
        ("result.json", {"accuracy": 101.0}),
        ("result.json", {"seed": True}),
        ("result.json", {"shots": -1}),
        ("result.json", {"router": {"rows": [1], "share": [[0.5]]}}),
        ("result.json", {"router": {"rows": ["a"], "share": [["b"]]}}),
        ("result.json", {"config": []}),
        ("result.json", {"groups": [[1]]}),
        ("checkpoint.pt", {"groups": "a photo of a {}."}),
        ("checkpoint.pt", {"class_names": [1, 2]}),
        ("checkpoint.pt", {"clip_fingerprint": None}),
        ("checkpoint.pt", {"model": [torch.ones(2)]}),
        ("checkpoint.pt", {"model": {1: torch.ones(2)}}),
        ("checkpoint.pt", {"groups": [[]]}),
        ("checkpoint.pt", {"config": {"method": []}}),
        ("checkpoint.pt", {"config": {"help": True, "seed": "x"}}),
        ("checkpoint.pt", {"config": {"top_k": "many"}}),
        ("checkpoint.pt", {"config": {"method": "unknown"}}),
        ("checkpoint.pt", {"config": {"text_bias": True}}),
        ("resume.pt", {"epoch": -1}),
        ("resume.pt", {"usage": [["a"]]}),
        ("resume.pt", {"order_rng": 3}),
        ("resume.pt", {"order_rng": torch.zeros(3, dtype=torch.uint8)}),
        ("resume.pt", {"model": {}}),
        ("resume.pt", {"optimiser": {"state": [], "param_groups": []}}),
        ("resume.pt", {"seconds": float("inf")}),
        ("config.json", {"config": {"clip": 5}}),
        ("config.json", {"config": 1}),
    ],
)
def test_a_value_of_another_kind_is_one_line(
    file, change, run_train, run_eval, small, own_run, capsys
):
    if file in ("resume.pt", "config.json"):
        with stopped_after(1):
            run_train(f"{small} {FINISHED}")
    path = own_run / file
    if path.suffix == ".json":
        content = json.loads(path.read_text())
        path.write_text(json.dumps(content | change))
    else:
        content = torch.load(path, weights_only=True)
        change = {k: content[k] | v if k == "config" else v for k, v in change.items()}
        torch.save(content | change, path)
    if file == "checkpoint.pt":
        status, _, errors = run_eval(own_run)
        assert status == 2 and len(errors) == 1
    else:
        with pytest.raises(BadInput) as error:
            run_train(f"{small} {FINISHED} --resume")
        assert "\n" not in str(error.value)
    if file == "result.json":
        status, _, errors = run_eval("--table", own_run)
        assert status == 2 and "left out: " in errors[0] and len(errors) == 2
