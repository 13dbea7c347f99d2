"""Pictures: what they show are the numbers of the runs, under the right names."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
from PIL import Image

import eval
from data import load_split, select_classes
from lib import pictures, world
from lib.errors import BadInput
from lib.runs import find_runs

PROMPTS = ["a photo of a {}.", "a sketch of a {}.", "{} texture."]
STYLES = ["photo", "sketch"]


@pytest.fixture
def figures(monkeypatch):
    """{file name: figure} of what is drawn; the files stay empty."""
    found = {}

    def keep(figure, path, **options):
        found[path.name] = figure
        path.touch()

    monkeypatch.setattr(pictures, "save_figure", keep)
    yield found
    plt.close("all")


def run(method="mocoop", shots=16, seed=1, accuracy=80.0, classes="all", new=None, **changed):
    """A run as `find_runs` gives it. Its router's table begins with seed / 10."""
    first, clip = seed / 10, changed.pop("clip", "ViT-B/16")
    result = {
        "dataset": "eurosat", "classes": classes, "shots": shots, "seed": seed, "method": method,
        "clip": clip, "accuracy": accuracy, "zero_shot_accuracy": 50.0 + seed,
        "ensemble_accuracy": 60.0, "changed_flags": changed, "n_prompts": 3,
        "label": "-".join([method, *(f"{k}{v}" for k, v in changed.items())]),
        "prompt_usage": dict.fromkeys(PROMPTS, 1 / 3),
        "router": {"rows": STYLES, "share": [[first, 0.9 - first, 0.1], [0.2, 0.7, 0.1]]},
        "prompt_usage_by_epoch": [[first, 0.9 - first, 0.1], [0.25, 0.25, 0.5]],
        "config": {"seed": seed, "shots": shots, "groups": "dataset"},
    }  # fmt: skip
    evaluations = [result | {"classes": "new", "accuracy": new}] if new else []
    return result, evaluations


def heat_map(figure):
    """(rows' names, columns' names, the numbers written in the cells), as they are seen."""
    (axes,) = figure.axes
    ticks = axes.get_yticklabels(), axes.get_xticklabels()
    names = [[tick.get_text() for tick in side] for side in ticks]
    cells = np.full((len(names[0]), len(names[1])), -1)
    for text in axes.texts:
        x, y = text.get_position()
        cells[y, x] = int(text.get_text())
        if cells[y, x] != 60:
            assert text.get_color() == ("white" if cells[y, x] > 60 else "black")  # on grey
    assert axes.images[0].get_clim() == (0, 1) and axes.images[0].get_cmap().name == "Greys"
    assert np.allclose(axes.images[0].get_array() * 100, cells, atol=0.51)
    return *names, cells.tolist()


def lines(axes):
    """{label: (x, y)}"""
    drawn = {line.get_label(): line.get_data() for line in axes.lines}
    return {label: (list(x), list(y)) for label, (x, y) in drawn.items()}


def test_a_runs_picture_has_its_table(figures, tmp_path):
    result, _ = run(seed=3)
    pictures.router_picture(result, tmp_path / "router.png")
    found = heat_map(figures["router.png"])
    assert found == (STYLES, PROMPTS, [[30, 60, 10], [20, 70, 10]])


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
    assert "(the 40 most unusual)" in figures["router.png"].axes[0].get_title(loc="left")


def test_curves_are_means_over_seeds_of_the_methods_own_settings(figures, tmp_path):
    runs = [run(shots=n, seed=s, accuracy=70.0 + n + s) for n in (16, 4, 8) for s in (1, 2, 3)]
    runs += [run("coop", shots=n, accuracy=60.0 + n) for n in (4, 16)]
    runs += [run(accuracy=1.0, top_k=1), run(accuracy=2.0, clip="RN50")]
    runs += [run(accuracy=3.0, classes="base")]
    pictures.draw_pictures(runs, tmp_path)
    (axes,) = figures["few_shot.png"].axes
    drawn = lines(axes)
    assert drawn.keys() == {"mocoop", "coop", "zero-shot", "ensemble"}
    assert drawn["mocoop"] == ([4, 8, 16], [76.0, 80.0, 88.0])
    assert drawn["coop"] == ([4, 16], [64.0, 76.0])
    assert drawn["zero-shot"][1] == [52.0, 52.0] and drawn["ensemble"][1] == [60.0, 60.0]
    band = axes.collections[1].get_paths()[0].vertices[:, 1]  # of mocoop, after coop's
    assert "3 seeds at most" in axes.get_title(loc="left")
    std = (2 / 3) ** 0.5
    assert band.min() == pytest.approx(76 - std) and band.max() == pytest.approx(88 + std)


def test_methods_below_zero_shot_are_seen(figures, tmp_path):
    runs = [run(shots=n, accuracy=45.0) for n in (8, 16)]
    runs += [run("linear", shots=n, accuracy=5.0 + n) for n in (8, 16)]
    pictures.draw_pictures(runs, tmp_path)
    (axes,) = figures["few_shot.png"].axes
    assert 20 < axes.get_ylim()[0] < 45  # CLIP as it is: 51


def test_router_and_usage_are_means_over_seeds_at_the_most_shots(figures, tmp_path):
    runs = [run(seed=s) for s in (1, 2, 6)] + [run(seed=9, shots=4), run(seed=9, top_k=1)]
    runs += [run(seed=8, classes="base")]
    pictures.draw_pictures(runs, tmp_path)
    found = heat_map(figures["router.png"])
    assert found == (STYLES, PROMPTS, [[30, 60, 10], [20, 70, 10]])
    assert "16 shots, mean of 3 seeds" in figures["router.png"].axes[0].get_title(loc="left")
    drawn = lines(figures["usage.png"].axes[0])
    assert list(drawn) == PROMPTS
    for template, expected in zip(PROMPTS, [[30, 25], [60, 25], [10, 50]]):
        epochs, share = drawn[template]
        assert epochs == [1, 2] and share == pytest.approx(expected)


def test_one_seed_is_named(figures, tmp_path):
    pictures.draw_pictures([run(seed=3)], tmp_path)
    for name in ("router.png", "usage.png"):
        assert "seed 3" in figures[name].axes[0].get_title(loc="left")


def test_a_name_may_hold_dollars(tmp_path):
    result, _ = run()
    result["router"]["rows"] = ["$a", "from $5 to $$ \\frac$"]
    pictures.router_picture(result, tmp_path / "router.png")
    figure = pictures.heat_map(PROMPTS, result["router"]["rows"], np.eye(3)[:2], "title")
    assert not any(text.get_parse_math() for text in figure.axes[0].get_yticklabels())
    plt.close(figure)


def test_bars_have_their_own_names_and_lengths(figures, tmp_path):
    runs = []
    for seed in (1, 2):
        runs += [run(seed=seed, accuracy=80.0 + 2 * seed)]
        runs += [run(seed=seed, classes="base", accuracy=90.0, new=60.0)]
        runs += [
            run(seed=seed, accuracy=70.0, top_k=1),
            run(seed=seed, accuracy=75.0, one_group=True),
        ]
        runs += [run(seed=seed, accuracy=76.0, lr=0.1), run(seed=seed, shots=4, accuracy=1.0)]
        runs += [run("coop", seed=seed, accuracy=50.0, init="random")]
        auto, _ = run(seed=seed, accuracy=77.0, groups="auto")
        runs += [(auto | {"config": auto["config"] | {"groups": "auto"}}, [])]
    pictures.draw_pictures(runs, tmp_path)
    h, everything = figures["ablation.png"].axes
    assert everything.get_xlabel() == "accuracy, all classes (%)"
    assert h.get_xlabel() == "H, base to new (%)"
    names = [t.get_text() for t in h.get_yticklabels()]  # which both share
    widths = dict(zip(names, (bar.get_width() for bar in everything.patches)))
    assert widths == {"MoCoOp": 83.0, "top k 1": 70.0, "one group": 75.0, "groups auto": 77.0}
    (errors,) = everything.collections  # mean ± std
    ends = {names[round(y)]: (low, high) for (low, y), (high, _) in errors.get_segments()}
    assert ends["MoCoOp"] == (82.0, 84.0) and ends["top k 1"] == (70.0, 70.0)
    widths = dict(zip(names, (bar.get_width() for bar in h.patches)))
    assert widths["MoCoOp"] == 72.0 and np.isnan(widths["top k 1"])
    dotted = everything.lines[-1].get_xdata()
    assert list(dotted) == [83.0, 83.0]


def test_a_new_mixture_shows_in_every_picture(figures, tmp_path):
    runs = [
        run(method, shots=shots, accuracy=accuracy)
        for method, accuracy in (("mocoop", 80.0), ("balanced", 90.0))
        for shots in (8, 16)
    ]
    pictures.draw_pictures(runs, tmp_path)
    mixtures = {f"{name}{of}.png" for name in ("router", "usage") for of in ("", "_balanced")}
    assert figures.keys() == {"few_shot.png", "ablation.png"} | mixtures
    assert lines(figures["few_shot.png"].axes[0])["balanced"] == ([8, 16], [90.0, 90.0])
    axes = figures["ablation.png"].axes[0]
    bars = dict(zip([t.get_text() for t in axes.get_yticklabels()], axes.patches))
    assert {name: bar.get_width() for name, bar in bars.items()} == {"MoCoOp": 80, "balanced": 90}


def test_datasets_are_drawn_apart(figures, tmp_path):
    runs = [run(shots=shots) for shots in (8, 16)]
    other = [(result | {"dataset": "dtd", "accuracy": 40.0}, []) for result, _ in runs]
    drawn = pictures.draw_pictures(runs + other, tmp_path)
    assert {"dtd_few_shot.png", "eurosat_few_shot.png", "dtd_router.png"} <= set(drawn)
    assert lines(figures["dtd_few_shot.png"].axes[0])["mocoop"][1] == [40.0, 40.0]
    assert lines(figures["eurosat_few_shot.png"].axes[0])["mocoop"][1] == [80.0, 80.0]


def test_pictures_are_files_and_nothing_is_drawn_of_nothing(run_train, tmp_path):
    with pytest.raises(BadInput, match="there is no folder"):
        find_runs(tmp_path / "out")
    run_train("--shots 1 --epochs 1 --out", tmp_path / "out/a")
    # Not the method's own number of epochs.
    assert pictures.draw_pictures(find_runs(tmp_path / "out"), tmp_path) == []
    drawn = pictures.draw_pictures([run(shots=8), run()], tmp_path)
    assert drawn == ["few_shot.png", "router.png", "usage.png"]
    for name in drawn:
        assert np.asarray(Image.open(tmp_path / name)).std() > 1


def test_an_evaluations_pictures_show_what_was_answered(run_train, figures, tmp_path):
    """Of a hard test set, where some answers are wrong."""
    run_train("--shots 1 --epochs 1")
    sheets = []
    for _ in range(2):
        result = eval.evaluate(tmp_path / "run", dataset="shapes_a", classes="new")
        sheets.append(figures["samples_shapes_a_new.png"])
    rows, columns, cells = heat_map(figures["eval_shapes_a_new.png"])
    assert (rows, columns) == (list(world.STYLES), list(result["prompt_usage"]))
    assert np.allclose(cells, 100 * np.array(result["router"]["share"]), atol=0.51)

    run = eval.load_run(tmp_path / "run")
    split = select_classes(load_split("shapes_a", "nowhere"), "new")
    items = {split.open(item.path).tobytes(): item for item in split.test}
    sheet, again = ([axes for axes in figure.axes if axes.images] for figure in sheets)
    for one, other in zip(sheet, again, strict=True):
        assert np.array_equal(one.images[0].get_array(), other.images[0].get_array())
    images = [Image.fromarray(np.asarray(axes.images[0].get_array())) for axes in sheet]
    assert len({image.tobytes() for image in images}) == 16
    assert len({items[image.tobytes()].label for image in images}) > 4  # from everywhere
    names, probabilities, weights = run.classify(images, split.class_names)
    wrong = 0
    for axes, image, p, w in zip(sheet, images, probabilities, weights):
        truth, answer = names[items[image.tobytes()].label], names[p.argmax()]
        said = [truth] if answer == truth else [f"{truth},", f"taken for {answer}"]
        for g in w.argsort(descending=True)[:2].tolist():
            said.append(f"{100 * w[g]:.0f}% {run.model.templates[g]}")
        assert axes.get_title(loc="left").split("\n") == said
        assert axes._left_title.get_color() == ("black" if answer == truth else "firebrick")
        wrong += answer != truth
    assert 0 < wrong < 16
