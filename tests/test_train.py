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
from lib.runs import BadInput, exit_on_bad_input, replacing

ROOT = Path(__file__).parents[1]
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
    assert (tmp_path / "run/router.png").stat().st_size > 1000
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


def test_the_learning_rate_warms_up_and_follows_a_cosine_that_is_cut_off():
    rates = [train.learning_rate(0.032, e, 50, 5) for e in range(50)]
    assert rates[:5] == [1e-5] * 5
    assert rates[5] == 0.032
    assert math.isclose(rates[30], 0.032 * 0.5)  # half of the cosine's 50 epochs after the start
    expected = 0.032 * 0.5 * (1 + math.cos(math.pi * 44 / 50))
    assert math.isclose(rates[49], expected) and expected > 1e-3
    assert train.learning_rate(1.0, 0, 10, 5) == 1e-5  # warm-up: min(5, round(10 / 8)) = 1
    assert train.learning_rate(1.0, 1, 10, 5) == 1.0


def test_result_json_has_the_documented_keys(finished_run):
    expected = """dataset classes shots seed method label changed_flags clip n_prompts top_k
        n_classes n_train n_test split few_shot_samples accuracy zero_shot_accuracy
        ensemble_accuracy val_accuracy macro_f1 per_class_accuracy confusion prompt_usage
        prompt_usage_by_epoch router train_seconds config"""
    assert sorted(result_of(finished_run)) == sorted(expected.split())


def test_the_seconds_of_training_are_told(run_train, small, monkeypatch, no_pictures, capsys):
    monkeypatch.setattr(train, "fit", lambda *args: (123.456, []))
    assert run_train(f"{small} --shots 1 --epochs 1")["train_seconds"] == 123.46
    assert ", 123.5 s of training\n" in capsys.readouterr().out


# ---------------------------------------------------------------------------- resuming, killing


def test_an_interrupted_run_resumes_to_the_same_numbers(
    run_train, small, tmp_path, no_pictures, capsys
):
    flags = f"{small} --shots 2 --epochs 5 --batch-size 8 --text-bias --out"
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    expected = run_train(flags, whole)
    with stopped_after(2):
        run_train(flags, parts)
    assert files_of(parts) == ["resume.pt"]
    resumed = run_train(flags, parts, "--resume")
    assert "resuming after epoch 2" in capsys.readouterr().out
    assert same_parameters(whole, parts)
    assert resumed["per_class_accuracy"] == expected["per_class_accuracy"]
    assert resumed["prompt_usage_by_epoch"] == expected["prompt_usage_by_epoch"]
    assert files_of(parts) == RUN_FILES


def test_without_resume_a_stopped_run_starts_over(run_train, small, no_pictures, capsys):
    with stopped_after(1):
        run_train(f"{small} {FINISHED}")
    with pytest.raises(BadInput, match="holds a run with epochs 2 instead of 4"):
        run_train(f"{small} --shots 1 --epochs 4 --resume")
    capsys.readouterr()
    run_train(f"{small} {FINISHED}")
    said = capsys.readouterr().out
    assert "stopped halfway: starting over without --resume" in said and "epoch   1/2" in said


def test_a_finished_run_is_left_as_it_is_by_resume(run_train, small, own_run, capsys):
    before = (own_run / "result.json").stat().st_mtime_ns
    with pytest.raises(SystemExit) as exit:
        run_train(f"{small} {FINISHED} --resume")
    assert exit.value.code == 0
    assert "is finished: nothing to resume" in capsys.readouterr().out
    assert (own_run / "result.json").stat().st_mtime_ns == before


def test_a_second_training_over_a_finished_run_can_be_resumed(
    run_train, small, own_run, no_pictures, capsys
):
    with stopped_after(1):
        run_train(f"{small} {FINISHED}")
    capsys.readouterr()
    run_train(f"{small} {FINISHED} --resume")
    said = capsys.readouterr().out
    assert "resuming after epoch 1" in said and "epoch   1/2" not in said and "epoch   2/2" in said


def test_a_run_killed_between_its_last_files_is_not_called_finished(
    run_train, small, tmp_path, capsys
):
    """A method without resume.pt: the new result stands beside the old checkpoint."""
    run_train(f"{small} --method zeroshot --shots 1 --resume")
    (tmp_path / "run/checkpoint.pt").rename(tmp_path / "run/checkpoint.tmp")
    run_train(f"{small} --method zeroshot --shots 1 --resume")
    assert capsys.readouterr().out.count("nothing to resume: a fresh start") == 2
    assert files_of(tmp_path / "run")[-2:] == ["checkpoint.tmp", "result.json"]


@pytest.mark.parametrize("change", ["templates", "weights", "images"])
def test_a_stopped_run_is_not_resumed_with_other_parts(
    run_train, own_eurosat, tmp_path, random_clip, change
):
    (tmp_path / "groups.txt").write_text("a photo of a {}.\n\na sketch of a {}.\n")
    torch.save(random_clip.state_dict(), tmp_path / "clip.pt")
    flags = f"--dataset eurosat --data {own_eurosat} --views 1 --shots 1 --epochs 3"
    flags = flags, "--groups", tmp_path / "groups.txt", "--clip", tmp_path / "clip.pt"
    with stopped_after(1):
        run_train(*flags)
    if change == "templates":
        (tmp_path / "groups.txt").write_text("a photo of a {}.\n\na drawing of a {}.\n")
    elif change == "weights":
        state = {k: v + 0.01 for k, v in random_clip.state_dict().items()}
        torch.save(state, tmp_path / "clip.pt")
    else:
        file = own_eurosat / "eurosat/split_zhou_EuroSAT.json"
        split = json.loads(file.read_text())
        split["train"] = split["train"][::-1]
        file.write_text(json.dumps(split))
    with pytest.raises(BadInput, match="other images, templates or CLIP weights"):
        run_train(*flags, "--resume")


def test_a_stopped_run_goes_on_when_its_data_has_moved(
    run_train, own_eurosat, random_clip_file, no_pictures
):
    flags = f"--dataset eurosat --clip {random_clip_file} --views 1 --shots 1 --epochs 3 --data"
    with stopped_after(2):
        run_train(flags, own_eurosat)
    moved = own_eurosat.rename(own_eurosat.parent / "there")
    result = run_train(flags, moved, "--resume")
    assert len(result["prompt_usage_by_epoch"]) == 3


def command(*words):
    """train.py as a user starts it."""
    return [sys.executable, str(ROOT / "train.py"), *map(str, words)]


@pytest.mark.slow
def test_a_killed_process_resumes_to_the_same_numbers(tmp_path):
    flags = ["--shots", "2", "--epochs", "12", "--out"]
    subprocess.run(command(*flags, tmp_path / "whole"), check=True, capture_output=True)
    parts = command(*flags, tmp_path / "parts", "--resume")
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


def test_a_rerun_replaces_its_own_files_and_says_so(
    run_train, small, own_run, tmp_path, no_pictures, capsys
):
    for name in ("eval_shapes_all.json", "eval_shapes_all.png", "samples_shapes_all.png"):
        (own_run / name).write_text("{}")  # of the checkpoint that goes
    (own_run / "why.json").write_text("{}")
    (own_run / ".DS_Store").write_text("a Mac looked at router.png")
    run_train(f"{small} {FINISHED}")
    assert "they will be replaced" in capsys.readouterr().out
    assert files_of(own_run) == [".DS_Store", *RUN_FILES]
    assert (own_run / ".DS_Store").read_text() == "a Mac looked at router.png"


@pytest.mark.parametrize("resume", ["", "--resume"])
def test_a_folder_with_another_configuration_is_refused(run_train, small, own_run, resume):
    with pytest.raises(BadInput, match="holds a run with seed 1 instead of 2"):
        run_train(f"{small} {FINISHED} --seed 2 {resume}")


def test_a_run_that_is_too_old_to_know_a_setting_had_its_default(
    run_train, small, own_run, no_pictures
):
    result = result_of(own_run)
    del result["config"]["text_scale"]
    (own_run / "result.json").write_text(json.dumps(result))
    with pytest.raises(BadInput, match="holds a run with text_scale 1.0 instead of 2.0"):
        run_train(f"{small} {FINISHED} --text-scale 2")
    run_train(f"{small} {FINISHED}")


@pytest.mark.parametrize("name", ["thesis.tex", "eval_notes.csv", "samples_mine", "checkpoint.pt"])
def test_a_folder_with_other_files_is_left_alone(run_train, tmp_path, name):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).write_text("years of work")
    with pytest.raises(BadInput, match=rf"is not empty and holds no run \({name}\)"):
        run_train("--shots 1 --epochs 1")
    assert (tmp_path / "run" / name).read_text() == "years of work"


def test_damaged_files_of_an_earlier_run_are_named(run_train, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/result.json").write_text("{")
    with pytest.raises(BadInput, match="result.json is not the result of a run, or damaged"):
        run_train("--shots 1 --epochs 1")
    (tmp_path / "run/resume.pt").write_text("half")
    with pytest.raises(BadInput, match="resume.pt is not a state to resume from"):
        run_train("--shots 1 --epochs 1 --resume")


def test_only_a_whole_file_replaces_another(tmp_path):
    (tmp_path / "file").write_text("good")
    with pytest.raises(KeyError), replacing(tmp_path / "file") as scratch:
        scratch.write_text("half")
        raise KeyError
    assert [f.read_text() for f in tmp_path.iterdir()] == ["good"]


def test_a_folder_that_cannot_be_written_is_refused_before_anything_else(
    run_train, tmp_path, monkeypatch
):
    """Permissions say that root may write anywhere."""
    monkeypatch.setattr(train, "few_shot_split", None)  # not reached
    (tmp_path / "file").write_text("")
    for out in ("/proc/x", tmp_path / "file/run"):
        with pytest.raises(BadInput, match="cannot write in .*: choose another --out"):
            run_train("--out", out)


# ------------------------------------------------------------------------------------ refused


@pytest.mark.parametrize(
    "flags, said",
    [
        ("--shots 0", "argument --shots: must be at least 1, not 0"),
        ("--shots many", "argument --shots: invalid int value: 'many'"),
        ("--seed -1", "argument --seed: must be"),
        ("--seed 99999999999999999999", "argument --seed: must be"),
        ("--lr nan", "argument --lr: must be at least 1e-09"),
        ("--method mocop", "argument --method: invalid choice: 'mocop'"),
        ("--top-k 9", "--top-k 9 is above the number of prompts, 8"),
        ("--one-group --top-k 3", "--top-k 3 is above the number of prompts, 1"),
        ("--groups auto --n-groups 30", "--n-groups 30 is above the number of templates, 20"),
        ("--init photo", "the template 'photo' needs one {}"),
        ("--dataset eurosta", "unknown dataset 'eurosta' (did you mean 'eurosat'?)"),
        ("--dataset shapes_v2", "shapes_v2 has no training images"),
        ("--dataset eurosat --data nowhere", "nowhere or name another --data"),
        ("--clip nothing.pt", "no CLIP file nothing.pt"),
        ("--groups nothing.txt", "cannot read nothing.txt"),
        ("--device tpu9", "no device 'tpu9'"),
        ("--device meta", "no device 'meta'"),
        ("--device cuda:77", "no device 'cuda:77'"),
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
    """By itself, and by an earlier run."""
    result, loss, factors = result_of(own_run), train.image_loss, iter([1.0, math.nan])
    monkeypatch.setattr(train, "image_loss", lambda *args: next(factors) * loss(*args))
    with pytest.raises(BadInput, match="training has diverged in epoch 2: try a smaller --lr"):
        run_train(f"{small} {FINISHED}")
    assert files_of(own_run) == sorted([*RUN_FILES, "resume.pt"]) and result_of(own_run) == result
    assert torch.load(own_run / "resume.pt", weights_only=True)["epoch"] == 1


# ---------------------------------------------------------------------------- the command line


def test_a_run_that_is_interrupted_ends_with_the_status_of_that():
    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as exit:
        exit_on_bad_input(interrupted)
    assert exit.value.code == 130


def test_help_does_not_wait_for_what_it_does_not_need():
    heavy = "matplotlib", "torchvision", "clip"
    code = f"import sys, train; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_output_into_a_closed_pipe_ends_quietly():
    code = "from lib.runs import exit_on_bad_input as run; run(lambda: [*map(print, range(10**5))])"
    done = subprocess.run(
        f"{sys.executable} -c '{code}' | head -1",
        shell=True, cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert (done.stdout, done.stderr) == ("0\n", "")


def test_of_two_runs_in_one_folder_none_is_lost_in_silence(run_train, small, monkeypatch):
    fit = train.fit

    def fit_while_another_finishes(*arguments):
        monkeypatch.setattr(train, "fit", fit)
        run_train(f"{small} --shots 1 --epochs 1 --seed 2")
        return fit(*arguments)

    monkeypatch.setattr(train, "fit", fit_while_another_finishes)
    with pytest.raises(BadInput, match="holds a run with seed 2 instead of 1"):
        run_train(f"{small} --shots 1 --epochs 1")
