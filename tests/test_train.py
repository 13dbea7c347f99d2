"""Training, end to end: the built-in world, EuroSAT's files, resuming, and what is refused."""

import json
import math
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import parse, stopped_after

import train
from data import few_shot, load_split
from lib import images
from lib.errors import BadInput, exit_on_bad_input
from lib.files import replacing
from lib.flags import method_defaults

ROOT = Path(__file__).parents[1]
RUN_FILES = ["checkpoint.pt", "result.json", "router.png"]


def checkpoint(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def same_parameters(a, b):
    a, b = checkpoint(a)["model"], checkpoint(b)["model"]
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def command(*args):
    """train.py as a user starts it: (exit status, standard output, standard error)."""
    run = [sys.executable, str(ROOT / "train.py"), *map(str, args)]
    # A proxy that nobody serves: there is no network, whatever the machine has.
    env = os.environ | {"https_proxy": "http://127.0.0.1:9", "http_proxy": "http://127.0.0.1:9"}
    done = subprocess.run(run, env=env, capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout, done.stderr


# ---------------------------------------------------------------------------- the whole method


def test_the_embedded_world_is_learned(run_train, tmp_path):
    """A short run; the README's numbers are of 50 epochs."""
    result = run_train("--shots 16 --epochs 15")
    assert sorted(f.name for f in (tmp_path / "run").iterdir()) == RUN_FILES
    assert result["accuracy"] > max(result["zero_shot_accuracy"], result["ensemble_accuracy"]) + 2
    assert result["n_train"] == 320 and result["n_test"] == 2400 and result["n_classes"] == 20
    assert len(result["per_class_accuracy"]) == 20
    assert np.isclose(
        np.mean(list(result["per_class_accuracy"].values())), result["accuracy"], atol=0.02
    )
    assert np.isclose(sum(result["prompt_usage"].values()), 1, atol=1e-3)
    assert result["config"]["lr"] == 0.032 and result["config"]["top_k"] == 2
    for row in result["router"]["share"]:
        assert np.isclose(sum(row), 1, atol=1e-3)


def test_the_same_seed_gives_the_same_numbers_bit_for_bit(run_train, tmp_path):
    a = run_train("--shots 1 --epochs 2 --out", tmp_path / "a")
    b = run_train("--shots 1 --epochs 2 --out", tmp_path / "b")
    other = run_train("--shots 1 --epochs 2 --seed 2 --out", tmp_path / "c")
    assert same_parameters(tmp_path / "a", tmp_path / "b")
    assert a["per_class_accuracy"] == b["per_class_accuracy"] != other["per_class_accuracy"]


@pytest.fixture(scope="module")
def archive(random_clip_file, tmp_path_factory):
    """The random CLIP as a TorchScript archive, as OpenAI ships theirs."""
    model, _ = train.load_clip(random_clip_file, torch.device("cpu"))
    inputs = torch.zeros(1, 3, 32, 32), torch.ones(1, 77, dtype=torch.long)
    path = tmp_path_factory.mktemp("archive") / "clip.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(model, inputs, check_trace=False), path)
    return path


def test_eurosat_trains_from_its_files_with_either_kind_of_clip(
    run_train, eurosat, archive, random_clip_file, tmp_path, monkeypatch
):
    used = []
    encode = train.image_features

    def spy(clip_model, fingerprint, split, items, *rest, **options):
        used.append(items)
        return encode(clip_model, fingerprint, split, items, *rest, **options)

    monkeypatch.setattr(train, "image_features", spy)
    monkeypatch.setattr(images, "image_features", spy)
    flags = f"--dataset eurosat --shots 4 --epochs 2 --data {eurosat} --out"
    a = run_train(flags, tmp_path / "a", "--clip", archive)
    expected = few_shot(load_split("eurosat", eurosat), 4, 1)
    assert used == [expected.test, expected.val, expected.train]
    b = run_train(flags, tmp_path / "b", "--clip", random_clip_file)
    for result in (a, b):
        assert result["split"] == "coop" and result["n_prompts"] == 6
        assert (result["n_train"], result["n_test"], result["n_classes"]) == (40, 30, 10)
    assert same_parameters(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "a/checkpoint.pt").stat().st_size < 1_000_000


def test_base_training_meets_base_names_and_new_training_new_ones(run_train, tmp_path):
    base = run_train("--shots 1 --epochs 1 --classes base --out", tmp_path / "base")
    new = run_train("--shots 1 --epochs 1 --classes new --out", tmp_path / "new")
    names = load_split("shapes", "").class_names
    assert list(base["per_class_accuracy"]) == names[:10]
    assert list(new["per_class_accuracy"]) == names[10:]
    assert base["n_test"] == new["n_test"] == 1200


# ------------------------------------------------------------------------------ optimisation


def test_the_learning_rate_warms_up_and_follows_a_cosine_that_is_cut_off():
    rates = [train.learning_rate(e, 50, 0.032, 5) for e in range(50)]
    assert rates[:5] == [1e-5] * 5
    assert rates[5] == 0.032
    assert math.isclose(rates[30], 0.032 * 0.5)  # half of the cosine's 50 epochs after the start
    expected = 0.032 * 0.5 * (1 + math.cos(math.pi * 44 / 50))
    assert math.isclose(rates[49], expected) and expected > 1e-3
    assert train.learning_rate(0, 10, 1.0, 5) == 1e-5  # warm-up: min(5, round(10 / 8)) = 1
    assert train.learning_rate(1, 10, 1.0, 5) == 1.0


def test_the_learning_rate_grows_with_the_batch():
    def lr(*flags):
        return train.resolve(parse(flags))[0]["lr"]

    assert lr() == 0.032
    assert math.isclose(lr("--batch-size", "64"), 0.064)
    assert lr("--batch-size", "64", "--lr", "0.1") == 0.1
    assert lr("--method", "cocoop") == 0.002  # for its own batch, which is 1
    assert math.isclose(lr("--method", "cocoop", "--batch-size", "4"), 0.008)


# ------------------------------------------------------------------- folders, resuming, killing


def folder_of(*flags):
    return str(train.resolve(parse(flags))[2])


def test_a_run_is_named_after_what_it_is():
    assert folder_of() == "out/shapes/mocoop_16shot_all_seed1"
    base = folder_of("--dataset", "eurosat", "--shots", "4", "--classes", "base", "--seed", "3")
    assert base == "out/eurosat/mocoop_4shot_base_seed3"
    assert (
        folder_of("--top-k", "1", "--text-bias")
        == "out/shapes/mocoop-text_bias-top_k1_16shot_all_seed1"
    )
    assert folder_of("--top-k", "2") == folder_of()  # the preset's own value
    assert folder_of("--out", "here") == "here"
    assert folder_of("--batch-size", "64") == "out/shapes/mocoop-batch_size64_16shot_all_seed1"
    real = folder_of("--dataset", "eurosat", "--clip", "ViT-L/14")
    assert real == "out/eurosat/mocoop-clipViT-L-14_16shot_all_seed1"
    init = folder_of("--method", "coop", "--init", "a painting of {}.")
    assert init == "out/shapes/coop-inita-painting-of-._16shot_all_seed1"
    stopped = folder_of("--method", "coop", "--no-full-stop")
    assert stopped == "out/shapes/coop-full_stopFalse_16shot_all_seed1"


def test_every_flag_of_a_method_shows_in_the_runs_name():
    """So that no run is taken for another, nor shares its row in a table."""
    task = ["--dataset", "eurosat"]
    names = {folder_of(*task): "nothing changed"}
    flags = {k: v for part in train.FLAGS.values() for k, v in part.items()}
    for flag, own in method_defaults(train.FLAGS).items():
        kind, dashed = flags[flag][1], flag.replace("_", "-")
        if kind is bool:
            given = [f"--no-{dashed}" if own else f"--{dashed}"]
        else:
            other = next(x for x in kind if x != own) if isinstance(kind, tuple) else None
            given = [f"--{dashed}", str(other or ("random" if flag == "init" else own + 1))]
        given += {"n_groups": ["--groups", "auto"]}.get(flag, [])
        name = folder_of(*task, *given)
        assert name not in names, (given, names[name])
        names[name] = given


def test_an_interrupted_run_resumes_to_the_same_numbers(run_train, tmp_path, capsys):
    whole = run_train("--shots 2 --epochs 5 --text-bias --out", tmp_path / "whole")
    flags = "--shots 2 --epochs 5 --text-bias --out"
    with stopped_after(2):
        run_train(flags, tmp_path / "parts")
    assert [f.name for f in (tmp_path / "parts").iterdir()] == ["resume.pt"]
    resumed = run_train(flags, tmp_path / "parts", "--resume")
    assert "resuming after epoch 2" in capsys.readouterr().out
    assert same_parameters(tmp_path / "whole", tmp_path / "parts")
    assert resumed["per_class_accuracy"] == whole["per_class_accuracy"]
    assert sorted(f.name for f in (tmp_path / "parts").iterdir()) == RUN_FILES


def test_resume_starts_fresh_without_a_run_and_leaves_a_finished_one(run_train, tmp_path, capsys):
    run_train("--shots 1 --epochs 1 --resume")
    assert "nothing to resume: a fresh start" in capsys.readouterr().out
    before = (tmp_path / "run/result.json").stat().st_mtime_ns
    with pytest.raises(SystemExit) as exit:
        run_train("--shots 1 --epochs 1 --resume")
    assert exit.value.code == 0
    assert "is finished: nothing to resume" in capsys.readouterr().out
    assert (tmp_path / "run/result.json").stat().st_mtime_ns == before


def test_without_resume_a_stopped_run_starts_over(run_train, small, capsys):
    with stopped_after(2):
        run_train(f"{small} --shots 1 --epochs 3")
    capsys.readouterr()
    run_train(f"{small} --shots 1 --epochs 3")
    said = capsys.readouterr().out
    assert "stopped halfway: starting over without --resume" in said and "epoch   1/3" in said


def test_a_second_training_over_a_finished_run_can_be_resumed(run_train, small, capsys):
    run_train(f"{small} --shots 1 --epochs 3")
    with stopped_after(2):
        run_train(f"{small} --shots 1 --epochs 3")
    capsys.readouterr()
    run_train(f"{small} --shots 1 --epochs 3 --resume")
    said = capsys.readouterr().out
    assert "resuming after epoch 2" in said and "epoch   2/3" not in said and "epoch   3/3" in said


def test_a_run_that_is_too_old_to_know_a_flag_had_its_default(run_train, small, tmp_path):
    run_train(f"{small} --shots 1 --epochs 1")
    file = tmp_path / "run/result.json"
    result = json.loads(file.read_text())
    del result["config"]["text_scale"]
    file.write_text(json.dumps(result))
    with pytest.raises(BadInput, match="holds a run with text_scale 1.0 instead of 2.0"):
        run_train(f"{small} --shots 1 --epochs 1 --text-scale 2")
    run_train(f"{small} --shots 1 --epochs 1 --text-scale 1")


def test_a_rerun_replaces_its_folder_and_says_so(run_train, tmp_path, capsys):
    run_train("--shots 1 --epochs 1")
    for name in ("eval_shapes_all.json", "eval_shapes_all.png", "samples_shapes_all.png"):
        (tmp_path / "run" / name).write_text("{}")  # of the checkpoint that goes
    (tmp_path / "run/why.json").write_text("{}")
    run_train("--shots 1 --epochs 1")
    assert "they will be replaced" in capsys.readouterr().out
    assert sorted(f.name for f in (tmp_path / "run").iterdir()) == RUN_FILES
    assert [f.name for f in tmp_path.iterdir() if f.name.startswith(".")] == []


@pytest.mark.parametrize("resume", ["", "--resume"])
def test_a_folder_with_another_configuration_is_refused(run_train, resume):
    run_train("--shots 1 --epochs 1")
    with pytest.raises(BadInput, match="holds a run with seed 1 instead of 2"):
        run_train(f"--shots 1 --epochs 1 --seed 2 {resume}")


def test_an_interrupted_run_of_another_configuration_is_not_resumed(run_train):
    with stopped_after(1):
        run_train("--shots 1 --epochs 3")
    with pytest.raises(BadInput, match="holds a run with epochs 3 instead of 4"):
        run_train("--shots 1 --epochs 4 --resume")


def test_a_folder_with_other_files_is_left_alone(run_train, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/thesis.tex").write_text("years of work")
    with pytest.raises(BadInput, match="holds thesis.tex, which is no run's"):
        run_train("--shots 1 --epochs 1")
    assert (tmp_path / "run/thesis.tex").read_text() == "years of work"


def test_files_that_only_look_like_a_runs_are_left_alone(run_train, tmp_path):
    (tmp_path / "run").mkdir()
    for name in ("eval_notes.csv", "samples_of_mine", "checkpoint.pt"):
        (tmp_path / "run" / name).write_text("years of work")
        with pytest.raises(BadInput, match=f"holds {name}, which is no run's"):
            run_train("--shots 1 --epochs 1")
        (tmp_path / "run" / name).unlink()


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


def test_a_stopped_run_goes_on_when_its_data_has_moved(run_train, own_eurosat, random_clip_file):
    flags = f"--dataset eurosat --clip {random_clip_file} --views 1 --shots 1 --epochs 3 --data"
    with stopped_after(2):
        run_train(flags, own_eurosat)
    moved = own_eurosat.rename(own_eurosat.parent / "there")
    result = run_train(flags, moved, "--resume")
    assert len(result["prompt_usage_by_epoch"]) == 3


def test_only_a_whole_file_replaces_another(tmp_path):
    (tmp_path / "file").write_text("good")
    with pytest.raises(KeyError), replacing(tmp_path / "file") as scratch:
        scratch.write_text("half")
        raise KeyError
    assert [f.read_text() for f in tmp_path.iterdir()] == ["good"]


def test_damaged_files_of_an_earlier_run_are_named(run_train, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/result.json").write_text("{")
    with pytest.raises(BadInput, match="result.json is not the result of a run, or damaged"):
        run_train("--shots 1 --epochs 1")
    (tmp_path / "run/resume.pt").write_text("half")
    with pytest.raises(BadInput, match="resume.pt is not a state to resume from"):
        run_train("--shots 1 --epochs 1 --resume")


# ------------------------------------------------------------------------------------ refused


@pytest.mark.parametrize(
    "flags, said",
    [
        ("--shots 0", "argument --shots: must be from 1"),
        ("--top-k 0", "argument --top-k: must be from 1"),
        ("--method mocop", "argument --method: invalid choice: 'mocop'"),
        ("--shots many", "argument --shots: invalid int value: 'many'"),
        ("--classes old", "invalid choice: 'old'"),
        ("--lr -1", "argument --lr: must be from 1e-09"),
        ("--gate-weight nan", "argument --gate-weight: must be"),
        ("--seed 99999999999999999999", "argument --seed: must be"),
        ("--device meta", "no device 'meta'"),
        ("--seed -1", "argument --seed: must be"),
        ("--lr nan", "argument --lr: must be from 1e-09"),
        ("--top-k 9", "--top-k 9 is above the number of prompts, 8"),
        ("--dataset eurosta", "unknown dataset 'eurosta' (did you mean 'eurosat'?)"),
        ("--dataset shapes_v2", "shapes_v2 has no training images"),
        ("--clip nothing.pt", "no CLIP file nothing.pt"),
        ("--groups nothing.txt", "cannot read nothing.txt"),
        ("--device tpu9", "no device 'tpu9'"),
        ("--device cuda:77", "no device 'cuda:77'"),
        ("--dataset eurosat --data nowhere", "no images at nowhere/eurosat/2750"),
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


def test_a_loss_that_is_not_finite_ends_the_run_and_leaves_nothing(run_train, tmp_path, capsys):
    with pytest.raises(BadInput, match="training has diverged in epoch (.*): try") as error:
        run_train("--shots 1 --epochs 8 --lr 1e9")
    assert not (tmp_path / "run").exists()
    whole = capsys.readouterr().out.count("\nepoch ")
    assert f"in epoch {whole + 1}: try a smaller --lr" in str(error.value)


def test_what_a_run_left_stays_when_it_is_made_again_and_diverges(
    run_train, small, tmp_path, monkeypatch
):
    result = run_train(f"{small} --shots 1 --epochs 1")
    monkeypatch.setattr(train, "image_loss", lambda logits, labels: logits.sum() * torch.nan)
    with pytest.raises(BadInput, match="training has diverged in epoch 1:"):
        run_train(f"{small} --shots 1 --epochs 1")
    assert sorted(f.name for f in (tmp_path / "run").iterdir()) == RUN_FILES
    assert json.loads((tmp_path / "run/result.json").read_text()) == result


def test_the_seconds_of_training_are_told(run_train, small, monkeypatch, capsys):
    monkeypatch.setattr(train, "fit", lambda *args: (123.456, []))
    assert run_train(f"{small} --shots 1 --epochs 1")["train_seconds"] == 123.46
    assert ", 123.5 s of training\n" in capsys.readouterr().out


def test_a_run_that_is_interrupted_ends_with_the_status_of_that(monkeypatch):
    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as exit:
        exit_on_bad_input(interrupted)
    assert exit.value.code == 130


def test_the_command_line_says_in_one_line_what_is_missing(tmp_path):
    status, out, error = command("--dataset", "eurosat", "--data", tmp_path / "none")
    assert status == 2
    assert error.count("\n") == 1 and "2750" in error and "--data" in error


@pytest.mark.slow
def test_a_killed_process_resumes_to_the_same_numbers(tmp_path):
    flags = ["--shots", "2", "--epochs", "12", "--out"]
    assert command(*flags, tmp_path / "whole")[0] == 0
    run = [sys.executable, str(ROOT / "train.py"), *flags, str(tmp_path / "parts")]
    for _ in range(3):  # killed three times, whatever it was doing
        process = subprocess.Popen([*run, "--resume"], stdout=subprocess.PIPE, text=True)
        for line in process.stdout:
            if line.startswith("epoch") and int(line.split()[1].split("/")[0]) % 3 == 0:
                break
        process.kill()
        process.wait()
    status, out, _ = command(*flags, tmp_path / "parts", "--resume")
    assert status == 0 and "resuming after epoch" in out
    assert same_parameters(tmp_path / "whole", tmp_path / "parts")


def test_result_json_has_the_documented_keys(run_train):
    result = run_train("--shots 1 --epochs 1")
    expected = """dataset classes shots seed method label changed_flags clip n_prompts top_k
        n_classes n_train n_test split few_shot_samples accuracy zero_shot_accuracy
        ensemble_accuracy val_accuracy per_class_accuracy prompt_usage prompt_usage_by_epoch
        router train_seconds config"""
    assert sorted(result) == sorted(expected.split())
    assert json.loads(json.dumps(result)) == result


def test_a_folder_that_cannot_be_written_is_refused_before_anything_else(tmp_path, monkeypatch):
    """Permissions say that root may write anywhere."""
    monkeypatch.setattr(train, "few_shot_split", None)  # not reached
    (tmp_path / "file").write_text("")
    for out in ("/proc/x", str(tmp_path / "file/run")):
        config, groups, folder, resume = train.resolve(parse(["--out", out]))
        with pytest.raises(BadInput, match="cannot write in .*: name another --out"):
            train.train(config, groups, folder, resume)


def test_help_does_not_wait_for_what_it_does_not_need():
    heavy = "matplotlib", "torchvision", "clip", "gdown"
    code = f"import sys, train; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_output_into_a_closed_pipe_ends_quietly(tmp_path):
    run = f"{sys.executable} {ROOT / 'train.py'} --shots 1 --epochs 3 --out {tmp_path / 'run'}"
    done = subprocess.run(
        f"{run} | head -1", shell=True, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.startswith("shapes: 20 all classes") and done.stderr == ""


def test_two_runs_never_share_a_folder(run_train, tmp_path, monkeypatch):
    """The second is refused while the first is training; afterwards the folder is free."""
    fit = train.fit

    def fit_and_meet_another(*args):
        with pytest.raises(BadInput, match="another process trains into .*name another --out"):
            run_train("--shots 1 --epochs 1")
        return fit(*args)

    monkeypatch.setattr(train, "fit", fit_and_meet_another)
    run_train("--shots 1 --epochs 1")
    monkeypatch.setattr(train, "fit", fit)
    run_train("--shots 1 --epochs 1")


def test_a_run_killed_between_its_last_files_is_not_called_finished(run_train, tmp_path, capsys):
    """A method without resume.pt: the new result stands beside the old checkpoint."""
    run_train("--method zeroshot --shots 1")
    shutil.copy(tmp_path / "run/checkpoint.pt", tmp_path / "run/checkpoint.tmp")
    run_train("--method zeroshot --shots 1 --resume")
    assert "nothing to resume: a fresh start" in capsys.readouterr().out
    assert sorted(f.name for f in (tmp_path / "run").iterdir()) == RUN_FILES[:2]


def test_what_a_desktop_leaves_in_a_runs_folder_is_left_alone(run_train, tmp_path):
    run_train("--shots 1 --epochs 1")
    (tmp_path / "run/.DS_Store").write_text("a Mac looked at router.png")
    run_train("--shots 1 --epochs 1")
    assert (tmp_path / "run/.DS_Store").read_text() == "a Mac looked at router.png"
