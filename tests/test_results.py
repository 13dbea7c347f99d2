"""Numbers, tables and pictures: the runs' own numbers, under the right names."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import eval
from data import load_split
from lib import errors, pictures, results
from lib.errors import BadInput
from lib.features import image_features
from lib.runs import find_runs

PROMPTS = ["a photo of a {}.", "a sketch of a {}.", "{} texture."]
STYLES = ["photo", "sketch"]


def run(method="mocoop", shots=16, seed=1, accuracy=80.0, classes="all", others=(), **changed):
    """A run as `find_runs` gives it. Its router's table begins with seed / 10.

    others: (dataset, classes, accuracy) of its evaluations. changed: its other settings.
    """
    first, clip = seed / 10, changed.get("clip", "ViT-B/16")
    result = {
        "dataset": "eurosat", "classes": classes, "shots": shots, "seed": seed, "method": method,
        "clip": clip, "accuracy": accuracy, "zero_shot_accuracy": 50.0 + seed,
        "ensemble_accuracy": 60.0, "changed_flags": changed, "n_prompts": 3, "n_train": 40,
        "label": "-".join([method, *(f"{k}{v}" for k, v in changed.items())]),
        "prompt_usage": dict.fromkeys(PROMPTS, 1 / 3),
        "router": {"rows": STYLES, "share": [[first, 0.9 - first, 0.1], [0.2, 0.7, 0.1]]},
        "config": {
            "dataset": "eurosat", "classes": classes, "seed": seed, "shots": shots, "clip": clip,
            "groups": "auto" if changed.get("groups") == "auto" else "dataset",
        },
    }  # fmt: skip
    keys = "dataset", "classes", "accuracy"
    return result, [result | dict(zip(keys, other)) for other in others]


# ------------------------------------------------------------------------------------- numbers


def test_of_two_classes_with_one_name_both_keep_their_accuracy():
    """ImageNet has a few."""
    answers, labels = torch.tensor([0, 0, 1, 2, 2, 2]), torch.tensor([0, 0, 1, 1, 2, 0])
    found = results.per_class_accuracy(answers, labels, ["crane", "sea", "crane", "fox"])
    assert found == {"crane": 66.67, "sea": 50.0, "crane (2)": 100.0, "fox": None}


# -------------------------------------------------------------------------------------- tables


def rows(runs):
    """The rows of the Markdown table as dictionaries."""
    header, _, *lines = [
        [c.strip() for c in line.strip("|").split("|")]
        for line in results.runs_table(runs).splitlines()
    ]
    return [dict(zip(header, line)) for line in lines]


def row_of(runs, method="mocoop"):
    (row,) = [row for row in rows(runs) if row["method"] == method]
    return row


def test_the_table_averages_over_seeds_with_the_population_deviation():
    runs = [run(seed=s, accuracy=a) for s, a in ((1, 80.0), (2, 84.0), (6, 88.0))]
    runs += [run(accuracy=70.0, top_k=1), run("balanced", accuracy=60.0)]
    assert row_of(runs)["accuracy"] == "84.0 ± 3.3"  # sqrt(32 / 3) = 3.27
    assert row_of(runs)["seeds"] == "3"
    assert row_of(runs, "mocoop-top_k1")["accuracy"] == "70.0"
    assert row_of(runs, "balanced")["accuracy"] == "60.0"  # a method that is not here
    assert row_of(runs, "zero-shot")["accuracy"] == "53.0 ± 2.2"  # sqrt(14 / 3) = 2.16
    assert row_of(runs, "ensemble")["accuracy"] == "60.0"


def test_h_is_of_the_mean_base_and_the_mean_new_accuracy_of_seeds_with_both():
    runs = [
        run(seed=s, accuracy=base, classes="base", others=[("eurosat", "new", new)])
        for s, base, new in ((1, 90.0, 50.0), (2, 80.0, 70.0))
    ]
    row = row_of(runs)
    assert (row["accuracy"], row["new"]) == ("85.0 ± 5.0", "60.0 ± 10.0")
    assert row["H"] == "70.3"  # 2 * 85 * 60 / 145
    row = row_of([*runs, run(seed=3, accuracy=10.0, classes="base")])
    assert row["H"] == "70.3 (2 of 3 seeds)" and row["new"] == "60.0 ± 10.0 (2 of 3 seeds)"


def test_clip_as_it_is_has_its_own_numbers_in_every_column():
    runs = []
    for seed in (1, 2):
        result, [other] = run(seed=seed, classes="base", others=[("eurosat", "new", 70.0)])
        other |= {"zero_shot_accuracy": 41.0 + seed, "ensemble_accuracy": 45.0}
        runs.append((result, [other]))
    row = row_of(runs, "zero-shot")
    assert (row["accuracy"], row["new"]) == ("51.5 ± 0.5", "42.5 ± 0.5")
    assert row_of(runs, "ensemble")["new"] == "45.0"


def test_an_ensemble_of_other_templates_has_a_row_of_its_own():
    result, _ = run(groups="mine.txt")
    runs = [run(), run(groups="auto")]  # the same templates, in other groups
    runs += [(result | {"ensemble_accuracy": 33.0}, [])]
    found = {row["method"]: row["accuracy"] for row in rows(runs)}
    assert (found["ensemble"], found["ensemble-groupsmine.txt"]) == ("60.0", "33.0")


def test_every_other_task_has_a_column():
    others = [("dtd", "base", 1.0), ("dtd", "new", 2.0), ("eurosat", "new", 3.0)]
    runs = [run(classes="base", others=[*others, ("eurosat", "base", 9.0)])]
    runs += [run(others=[("eurosat", "new", 70.0), ("dtd", "all", 40.0)])]
    found = {row["classes"]: row for row in rows(runs) if row["method"] == "mocoop"}
    base, every = found["base"], found["all"]
    assert (base["dtd"], base["dtd new"], base["new"]) == ("1.0", "2.0", "3.0")
    assert (every["dtd"], every["new"], every["H"]) == ("40.0", "70.0", "–")  # H is of base runs
    assert base["accuracy"] == "80.0"  # not that of the evaluation on its own task


@pytest.mark.parametrize("name", ["accuracy", "new"])
def test_a_dataset_may_be_named_like_a_column(name):
    row = row_of([run(classes="base", others=[(name, "base", 7.0)])])
    assert (row["accuracy"], row[f"{name} images"]) == ("80.0", "7.0") and "H" not in row


def test_runs_with_other_clips_are_in_other_rows():
    found = rows([run(), run(clip="RN50", accuracy=60.0)])
    accuracies = {row["CLIP"]: row["accuracy"] for row in found if "mocoop" in row["method"]}
    assert accuracies == {"ViT-B/16": "80.0", "RN50": "60.0"}


def measured(seed=1, accuracy=80.0, others=(), settings=None, **content):
    """A run whose result tells what was measured."""
    result, evaluations = run(seed=seed, accuracy=accuracy, others=others)
    content = {"class_names": ["a", "b"], "n_test": 8, "groups": [["{}."]], "clip_fingerprint": "1",
               "folder": f"out/{seed}"} | content  # fmt: skip
    config = result["config"] | (settings or {})
    return result | content | {"config": config}, [other | content for other in evaluations]


@pytest.mark.parametrize(
    "other, differs",
    [
        ({"class_names": ["a", "c"]}, "class_names"),
        ({"n_test": 9}, "n_test"),
        ({"groups": [["a {}."]]}, "groups"),
        ({"clip_fingerprint": "2"}, "clip_fingerprint"),
        ({"settings": {"epochs": 7}}, "epochs"),  # another version's default
        ({"clip_fingerprint": None, "groups": None}, "groups, clip_fingerprint"),  # an older result
    ],
)
def test_what_differs_under_one_name_has_a_row_of_its_own(other, differs, capsys):
    runs = [measured(1, 80.0), measured(2, 60.0, **other), measured(3, 82.0)]
    assert row_of(runs)["accuracy"] == "81.0 ± 1.0"
    assert row_of(runs, "mocoop (2)")["accuracy"] == "60.0"
    line, *_ = [x for x in capsys.readouterr().err.splitlines() if " mocoop " in f"{x} "]
    assert line.startswith("kept apart: results of eurosat") and line.endswith(f"in {differs}")


def test_paths_and_machines_share_a_row():
    moved = {"data": "/b", "out": "x", "device": "cuda", "chunk": 7, "text_encoder": "plain",
             "dataset": "/b/pets", "clip": "/b/clip.pt", "groups": "/b/groups.txt"}  # fmt: skip
    runs = [measured(1, 80.0), measured(2, 84.0, settings=moved, clip="/b/ViT-B/16")]
    runs[0][0]["clip"] = "/a/16"
    assert row_of(runs)["accuracy"] == "82.0 ± 2.0"


def test_columns_of_one_name_are_kept_apart(capsys):
    runs = [measured(1, others=[("dtd", "all", 40.0)])]
    runs += [measured(2, others=[("dtd", "all", 50.0)])]
    runs[1][1][0]["n_test"] = 9
    row = row_of(runs)
    assert (row["dtd"], row["dtd (2)"]) == ("40.0 (1 of 2 seeds)", "50.0 (1 of 2 seeds)")
    assert "results of dtd that differ in n_test" in capsys.readouterr().err


def test_a_run_that_appears_twice_for_a_seed_is_named(capsys):
    runs = [measured(1, 80.0), measured(1, 90.0, folder="out/copy")]
    assert row_of(runs)["accuracy"] == "80.0"
    said = capsys.readouterr().err
    assert said == "left out: out/copy: seed 1 of mocoop appears twice\n"


def test_names_are_shown_and_not_obeyed(tmp_path, capsys):
    result, _ = run()
    names = {"dataset": "a|b\x1b[2J\nc", "label": "x\x9b1m|"}
    table = results.runs_table([(result | names, [])])
    assert table.count("\n") == 4 and "\x1b" not in table and "a\\|b" in table
    errors.warn("\x1b]0;title\x07 two\nlines")
    errors.say("\r\x7f\u2028")
    said = capsys.readouterr()
    assert (said.out, said.err) == ("\\r\\x7f\\u2028\n", "\\x1b]0;title\\x07 two\\nlines\n")


def test_what_is_not_a_result_is_named_and_left_out(tmp_path, capsys):
    result, _ = run()
    for name in ("run", "foreign"):
        (tmp_path / name).mkdir()
    (tmp_path / "run/result.json").write_text(json.dumps(result))
    (tmp_path / "run/eval_notes.json").write_text("{}")
    (tmp_path / "foreign/result.json").write_text(json.dumps({"accuracy": 80.0}))
    (tmp_path / "elsewhere/deep").mkdir(parents=True)
    (tmp_path / "elsewhere/deep/back").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/linked").symlink_to(tmp_path / "run")  # links are followed
    (tmp_path / "runs/loop").symlink_to(tmp_path / "elsewhere")
    assert find_runs(tmp_path / "runs") == [
        (result | {"folder": str(tmp_path / "runs/linked")}, [])
    ]
    capsys.readouterr()
    assert find_runs(tmp_path / "run") == [(result | {"folder": str(tmp_path / "run")}, [])]
    with pytest.raises(BadInput, match="no finished run below"):
        find_runs(tmp_path / "foreign")
    notes, foreign = capsys.readouterr().err.splitlines()
    assert "run/eval_notes.json is not a result of a run" in notes
    assert "foreign/result.json is not a result of a run" in foreign


# ------------------------------------------------------------------------------------ pictures


@pytest.fixture
def figures(monkeypatch):
    """{file name: figure} of what is drawn; the files stay empty."""
    found = {}

    def keep(figure, path, **options):
        found[path.name] = figure
        path.touch()

    monkeypatch.setattr(pictures, "save_figure", keep)
    return found


def heat_map(figure):
    """(rows' names, columns' names, the numbers written in the cells), as they are seen."""
    (axes,) = figure.axes
    ticks = axes.get_yticklabels(), axes.get_xticklabels()
    names = [[tick.get_text() for tick in side] for side in ticks]
    cells = np.full((len(names[0]), len(names[1])), -1)
    for text in axes.texts:
        x, y = text.get_position()
        cells[y, x] = int(text.get_text())
    assert axes.images[0].get_clim() == (0, 1)
    assert np.allclose(axes.images[0].get_array() * 100, cells, atol=0.51)
    return *names, cells.tolist()


def title(figure):
    return figure.axes[0].get_title(loc="left")


def lines(figure):
    """{label: (x, y)}"""
    drawn = {line.get_label(): line.get_data() for line in figure.axes[0].lines}
    return {label: (list(x), list(y)) for label, (x, y) in drawn.items()}


def test_of_many_classes_the_most_unusual_are_shown_under_their_names(figures, tmp_path):
    result, _ = run()
    share = np.full((100, 3), [0.5, 0.3, 0.2])
    unusual = list(range(7, 87, 2))  # 40 of them
    share[unusual] = [[0.1, 0.1 + i / 200, 0.8 - i / 200] for i in unusual]
    result["router"] = {"rows": [f"class {i}" for i in range(100)], "share": share.tolist()}
    pictures.router_picture(result, tmp_path / "router.png")
    rows, _, cells = heat_map(figures["router.png"])
    assert rows == [f"class {i}" for i in unusual]
    assert np.allclose(cells, 100 * share[unusual], atol=0.51)
    assert "(the 40 most unusual)" in title(figures["router.png"])


def test_curves_are_means_over_seeds_of_the_methods_own_settings(figures, tmp_path):
    runs = [run(shots=n, seed=s, accuracy=70.0 + n + s) for n in (16, 4, 8) for s in (1, 2, 3)]
    runs += [run("coop", shots=n, accuracy=60.0 + n) for n in (4, 16)]
    runs += [run(accuracy=1.0, top_k=1), run(accuracy=2.0, clip="RN50")]
    runs += [run(accuracy=3.0, classes="base")]
    pictures.draw_pictures(runs, tmp_path)
    drawn = lines(figures["few_shot.png"])
    assert drawn.keys() == {"mocoop", "coop", "zero-shot", "ensemble"}
    assert drawn["mocoop"] == ([4, 8, 16], [76.0, 80.0, 88.0])
    assert drawn["coop"] == ([4, 16], [64.0, 76.0])
    assert drawn["zero-shot"][1] == [52.0, 52.0] and drawn["ensemble"][1] == [60.0, 60.0]


def test_router_maps_are_means_over_seeds_at_the_most_shots(figures, tmp_path):
    runs = [run(seed=s) for s in (1, 2, 6)] + [run(seed=9, shots=4), run(seed=9, top_k=1)]
    runs += [run(seed=8, classes="base")]
    pictures.draw_pictures(runs, tmp_path)
    found = heat_map(figures["router.png"])
    assert found == (STYLES, PROMPTS, [[30, 60, 10], [20, 70, 10]])
    assert "16 shots, mean of 3 seeds" in title(figures["router.png"])


def test_a_new_mixture_shows_in_every_picture(figures, tmp_path):
    runs = [run(method, shots=n) for method in ("mocoop", "balanced") for n in (8, 16)]
    pictures.draw_pictures(runs, tmp_path)
    assert figures.keys() == {"few_shot.png", "router.png", "router_balanced.png"}
    assert "balanced" in lines(figures["few_shot.png"])


def test_pictures_are_files_and_nothing_is_drawn_of_nothing(tmp_path, capsys):
    with pytest.raises(BadInput, match="nothing to draw below"):
        pictures.draw_pictures([run(epochs=1)], tmp_path)  # not the method's own settings
    pictures.draw_pictures([run(shots=8), run()], tmp_path)
    drawn = ["few_shot.png", "router.png"]
    assert capsys.readouterr().out == f"saved in {tmp_path}: {', '.join(drawn)}\n"
    for name in drawn:
        assert np.asarray(Image.open(tmp_path / name)).std() > 1


def test_the_sheet_of_samples_shows_what_was_answered(own_run, eurosat, figures):
    eval.evaluate(own_run)
    run, split = eval.load_run(own_run), load_split("eurosat", eurosat)
    features = image_features(run.clip_model, run.fingerprint, split, split.test)
    names, probabilities, weights = run.classify(features)
    images = [split.open(item.path).tobytes() for item in split.test]
    sheet = [axes for axes in figures["samples_eurosat_all.png"].axes if axes.images]
    shown = [images.index(np.asarray(axes.images[0].get_array()).tobytes()) for axes in sheet]
    assert len(set(shown)) == 16
    assert len({split.test[i].label for i in shown}) > 4  # from everywhere
    n_wrong = 0
    for axes, i in zip(sheet, shown):
        truth, answer = names[split.test[i].label], names[probabilities[i].argmax()]
        said = [truth] if answer == truth else [f"{truth},", f"taken for {answer}"]
        for g in weights[i].argsort(descending=True)[:2].tolist():
            said.append(f"{100 * weights[i, g]:.0f}% {run.model.templates[g]}")
        assert axes.get_title(loc="left").split("\n") == said
        n_wrong += answer != truth
    assert 0 < n_wrong < 16
