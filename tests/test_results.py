"""The compact results and the tables made of them, on numbers that can be worked out by hand."""

import json
import time
from concurrent.futures import ThreadPoolExecutor

import clip
import plain
import pytest
import torch
from conftest import HERE, draw_image, parse, stopped_after

import eval
import train
from data import load_split, select_classes
from lib.errors import BadInput
from lib.metrics import harmonic_mean
from lib.world import TASKS
from tools import reproduce, results
from tools.why import take_apart, why


def run(dataset, classes, label, seed, accuracy, new=None, **more):
    method = label.split("-")[0]
    changed = {"top_k": 1} if label.endswith("top_k1") else more.pop("changed", {})
    config = {"dataset": dataset, "classes": classes, "shots": 16, "seed": seed, "clip": "bundled"}
    result = {
        **config, "config": config | {"groups": "dataset"}, "method": method, "label": label,
        "changed_flags": changed, "accuracy": accuracy, "val_accuracy": accuracy + 1,
        "zero_shot_accuracy": 50.0, "ensemble_accuracy": 60.0, "n_prompts": 8, "train_seconds": 2.0,
        "router": "as it is", "prompt_usage": {}, "prompt_usage_by_epoch": [], "unread": 0,
    }  # fmt: skip
    other = {**result, "classes": "new", "accuracy": new, "ensemble_accuracy": 62.0}
    return results.compact(result, [other] if new else [], more.get("why"))


@pytest.fixture
def lines():
    """MoCoOp is 80 + the task's number, CoOp 1 less with seed 1, 2 less with seed 2, 3 with 3."""
    made = []
    for n, task in enumerate(TASKS):
        for seed in (1, 2, 3):
            made.append(run(task, "all", "mocoop", seed, 80.0 + n))
            made.append(run(task, "all", "coop", seed, 80.0 + n - seed))
            made.append(run(task, "base", "mocoop", seed, 90.0, new=70.0 + n))
            made.append(run(task, "base", "coop", seed, 90.0, new=71.0 + n))
    made.append(run("shapes", "all", "mocoop-top_k1", 1, 75.0))
    made.append(run("shapes", "all", "mocoop-top_k1", 2, 77.0))
    made.append(run("shapes", "all", "coop-lr0.01", 1, 70.0, changed={"lr": 0.01}))
    return made


def cells(table, first):
    """The row of a Markdown table that begins with these cells."""
    rows = [[c.strip() for c in line.strip("| ").split(" | ")] for line in table.splitlines()]
    (row,) = [row for row in rows if row[: len(first)] == list(first)]
    return row[len(first) :]


def test_lines_are_kept_without_what_nobody_reads(lines, tmp_path):
    results.save_results(lines, tmp_path / "lines.jsonl")
    again = results.load_results(tmp_path / "lines.jsonl")
    assert again == lines == json.loads(json.dumps(lines))
    assert not any("unread" in line[0] for line in lines)
    assert "router" in lines[0][0] and "router" not in lines[-2][0]  # only published settings


def test_means_are_over_tasks_first_and_then_over_seeds(lines):
    numbers = results.Numbers(lines)
    # coop: 81.5 less the seed
    assert results.over_tasks(numbers, "coop")["all"] == {1: 80.5, 2: 79.5, 3: 78.5}
    assert cells(results.methods_table(numbers), ["CoOp"])[:3] == ["79.5 ± 0.8", "90.0", "72.5"]
    assert cells(results.tasks_table(numbers), ["shapes_many", "MoCoOp"])[0] == "82.0"
    h = sum(harmonic_mean(90, 71 + n) for n in range(4)) / 4
    assert cells(results.methods_table(numbers), ["CoOp"])[3] == f"{h:.1f}"


def test_a_mean_over_tasks_needs_every_task(lines):
    missing = [x for x in lines if (x[0]["dataset"], x[0]["seed"]) != ("shapes_cold", 2)]
    assert results.over_tasks(results.Numbers(missing), "coop")["all"] == {1: 80.5, 3: 78.5}


def test_methods_are_compared_run_by_run(lines):
    row = cells(results.paired_table(results.Numbers(lines)), ["CoOp"])
    assert row[:3] == ["+2.0 ± 0.8", "+0.0", "-1.0"]  # 1, 2, 3 better on each task
    assert row[4:] == ["12 of 12", "0 of 12"]
    against_ensemble = cells(
        results.paired_table(results.Numbers(lines)), ["ensemble of all templates"]
    )
    assert against_ensemble[0].startswith("+21.5")


def test_ablations_are_differences_to_the_published_setting_of_the_same_seed(lines):
    row = cells(results.ablation_table(results.Numbers(lines), lines), ["`--top-k 1`"])
    assert row[0] == "-4.0 ± 1.0"  # 5 and 3 less than 80


def test_rates_are_listed_with_their_validation_accuracy(lines):
    table = results.rates_table(lines)
    assert cells(table, ["coop", "0.01"]) == ["1", "71.0 ± 0.0", "70.0 ± 0.0"]
    assert cells(table, ["mocoop", "published"])[:2] == ["3", "81.0 ± 0.0"]


def test_tables_go_to_their_places_on_the_page():
    page = "a\n<!-- one -->\nold\nold\n<!-- end -->\nb\n<!-- two -->\n<!-- end -->\nc\n"
    filled = results.filled(page, {"one": "| 1 |", "two": "| 2 |"})
    assert (
        filled == "a\n<!-- one -->\n| 1 |\n<!-- end -->\nb\n<!-- two -->\n| 2 |\n<!-- end -->\nc\n"
    )
    assert results.filled(filled, {"one": "| 1 |", "two": "| 2 |"}) == filled
    with pytest.raises(BadInput, match="no place for the table 'three'"):
        results.filled(page, {"three": "| 3 |"})


def test_ties_are_no_wins_and_seeds_are_paired_whatever_their_order(lines):
    lines.append(run("shapes", "all", "lasp", 2, 80.0))  # as MoCoOp
    lines.append(run("shapes", "all", "lasp", 1, 82.0))
    row = cells(results.paired_table(results.Numbers(lines)), ["LASP"])
    assert row[0] == "-1.0 ± 1.0" and row[4] == "0 of 2"
    assert results.differences({2: 5.0, 1: 3.0}, {1: 1.0, 2: 2.0, 3: 9.0}) == {1: 2.0, 2: 3.0}


def test_what_is_learned_of_images_has_a_table_of_its_own(lines):
    for task in TASKS:
        for seed, accuracy in ((1, 84.0), (2, 86.0), (3, 88.0)):
            more = {"changed": {"image_side": "prompts"}}
            for classes, new in (("all", None), ("base", 60.0)):
                label = "mocoop-image_sideprompts"
                lines.append(run(task, classes, label, seed, accuracy, new=new, **more))
    numbers = results.Numbers(lines)
    table = results.images_table(numbers, lines)
    row = cells(table, ["MoCoOp", "prompts"])
    assert row[:3] == ["86.0 ± 1.6", "86.0 ± 1.6", "60.0"]
    assert row[4:] == ["86.0 ± 1.6"] * len(TASKS) + ["2"]  # seconds
    assert cells(table, ["MoCoOp", "nothing"])[0] == "81.5"
    assert "prompts" not in results.ablation_table(numbers, lines)


def test_parts_exchanged_have_a_column_per_task_and_half(lines):
    def why(base, new):
        accuracy = {"base": base, "new": new}
        look = {"gate": {"entropy": base / 100}, "classes": {"cosine": new / 100}}
        return {
            half: {"accuracy": {"router, prompts": value, "router, prototypes": value + 1}} | look
            for half, value in accuracy.items()
        }

    for n, task in enumerate(TASKS):
        for seed in (1, 2, 4):  # the fourth is not every task's
            parts = why(80.0 + n + seed, 60.0 + n + seed)
            lines.append(run(task, "base", "mocoop", seed, 90.0, why=parts))
            lines.append(run(task, "base", "coop", seed, 90.0, why=why(70.0, 50.0)))
    table = results.why_table(lines)
    row = cells(table, ["router, prompts"])
    assert row[:2] == ["83.0", "63.0"]
    assert row[2:] == ["81.5", "82.5", "83.5", "84.5", "61.5", "62.5", "63.5", "64.5"]
    assert cells(table, ["router, prototypes"])[:2] == ["84.0", "64.0"]
    assert cells(table, ["CoOp: prompts"])[:2] == ["70.0", "50.0"]
    for seed in (1, 5):
        accuracy = {"router, prompts": 60.0 + seed, "target, prompts": 70.0}
        look = {"gate": {"entropy": 0.5}, "classes": {"cosine": 0.25}}
        parts = {images: {"accuracy": accuracy} | look for images in ("all", "shapes_r")}
        lines.append(run("shapes", "all", "mocoop", seed, 90.0, why=parts))
    table = results.why_shifted_table(lines)
    assert cells(table, ["router, prompts"]) == ["63.0", "nan", "nan", "nan", "63.0"]
    assert cells(results.gate_table(lines), ["shapes_r"]) == ["0.500", "0.250"]
    assert cells(results.why_table(lines), ["router, prompts"])[:2] == ["83.0", "63.0"]
    row = cells(results.gate_table(lines), ["shapes, new"])
    assert row == ["0.823", "0.623"]  # (81 + 82 + 84) / 3


def test_the_pages_show_the_results_that_are_kept(monkeypatch):
    monkeypatch.chdir(HERE.parent)
    lines = results.load_results()
    assert len(lines) == len(list(reproduce.jobs()))
    for page, tables in results.pages(lines).items():
        text = page.read_text(encoding="utf-8")
        assert results.filled(text, tables) == text, page


def test_a_mixture_is_taken_apart_into_what_it_was(
    run_train, eurosat, random_clip, random_clip_file, tmp_path
):
    more_photos = str(tmp_path / "photos")
    for name in ("cat", "dog", "fox"):
        for i in range(20):
            draw_image(tmp_path / f"photos/{name}/{i}.jpg", f"{name}{i}")
    files = f"--dataset eurosat --data {eurosat} --clip {random_clip_file}"
    result = run_train(f"{files} --shots 4 --epochs 6 --views 1 --classes base")
    run = eval.load_run(tmp_path / "run")
    split = select_classes(load_split("eurosat", eurosat), "new")
    parts = why(tmp_path / "run", datasets=(more_photos,))
    assert parts["new"] == take_apart(run, split)
    elsewhere = eval.evaluate(tmp_path / "run", dataset=str(more_photos), classes="all")
    accuracy = parts[more_photos]["accuracy"]["router, prompts"]
    assert accuracy == elsewhere["accuracy"] != result["accuracy"]
    assert parts["base"]["accuracy"]["router, prompts"] == result["accuracy"]
    with torch.no_grad():
        pixels = [clip.clip._transform(32)(split.open(item.path)) for item in split.test]
        f = plain.unit(random_clip.encode_image(torch.stack(pixels)))
        gate = run.model.router.gate  # after six epochs it hardly tells images apart
        gate.weight.normal_(std=8, generator=torch.Generator().manual_seed(1))
        gate.bias.copy_(-gate.weight @ f.mean(0))
    found = take_apart(run, split)
    model = plain.Plain(random_clip, plain.MOCOOP, 1)
    state, names = run.model.state_dict(), split.class_names
    with torch.no_grad():
        for g, context in enumerate(model.contexts):
            context.copy_(state[f"prompts.context_before.{g}"])
        model.gate.weight.copy_(state["router.gate.weight"])
        model.gate.bias.copy_(state["router.gate.bias"])
        scores, weights, (soft,), _ = model(f, names)
    hard = {t: plain.hard_features(random_clip, t, names) for g in plain.EUROSAT for t in g}
    p, y = plain.prototypes(hard, plain.EUROSAT), split.labels(split.test)
    similar = torch.einsum("bd,bgd->bg", f, p[:, y].transpose(0, 1))
    boost = torch.zeros_like(similar)
    for row, best in zip(boost, similar.argsort(dim=-1, descending=True)):
        row[best[:2]] = 10.0
    target = (similar + boost).softmax(-1)
    for routing, w in (
        ("router", weights),
        ("equal weights", 1 / 6 + 0 * weights),
        ("target", target),
    ):
        for what, t in (("prompts", soft), ("prototypes", p), ("half and half", (soft + p) / 2)):
            logits = torch.einsum("bg,gcd,bd->bc", w, t, f)
            expected = 100 * (logits.argmax(-1) == y).float().mean().item()
            assert found["accuracy"][f"{routing}, {what}"] == pytest.approx(expected, abs=0.006)
    gate = scores.softmax(-1)
    assert len(gate.argmax(-1).unique()) > 1
    assert found["gate"]["best prompt's share"] == pytest.approx(
        gate.max(-1)[0].mean().item(), abs=1e-4
    )
    entropy = -(gate * gate.log()).sum(-1).mean().item()
    assert found["gate"]["entropy"] == pytest.approx(entropy, abs=1e-4)
    for what, t in (("prompts", soft), ("prototypes", p)):
        pairs = [t[g, a] @ t[g, b] for g in range(6) for a in range(5) for b in range(a)]
        between = found["classes"][f"cosine of two classes, {what}"]
        assert between == pytest.approx(torch.stack(pairs).mean().item(), abs=1e-4)
    own = torch.stack([soft[g, c] @ p[g, c] for g in range(6) for c in range(5)]).mean().item()
    assert found["classes"]["cosine of prompt and prototype"] == pytest.approx(own, abs=1e-4)


def test_a_learned_image_encoder_is_taken_apart_with_its_own_features(run_train, small, tmp_path):
    result = run_train(f"{small} --shots 2 --epochs 3 --image-side prompts --lr 1")
    found = take_apart(
        eval.load_run(tmp_path / "run"), load_split("eurosat", result["config"]["data"])
    )
    assert found["accuracy"]["router, prompts"] == result["accuracy"]


def test_every_run_of_the_reproduction_is_one_that_train_takes_and_none_is_made_twice():
    folders = set()
    for flags in reproduce.jobs():
        config, _, folder, _ = train.resolve(parse(flags.split()))
        folders.add(folder)
        evaluated = [(t.get("dataset"), t.get("classes")) for t in reproduce.evaluations(config)]
        if config["classes"] == "base":
            new = [] if config["method"] == "linear" else [(None, "new")]
            assert evaluated == new
    assert len(folders) == len(list(reproduce.jobs())) > 500


def test_the_results_that_are_kept_are_those_of_the_runs_that_are_made():
    """So that a run's flags, what it is evaluated on and whether it is taken apart are not changed
    without making docs/results.jsonl again."""
    made, kept = set(), set()
    for flags in reproduce.jobs():
        config, _, folder, _ = train.resolve(parse(flags.split()))
        apart = reproduce.is_to_be_taken_apart(config, folder)
        what = {(t.get("dataset"), t.get("classes")) for t in reproduce.evaluations(config)}
        what = {(d or config["dataset"], c or "all") for d, c in what}
        parts = ("base", "new") if config["classes"] == "base" else ("all", *results.SHIFTED)
        made.add((str(folder), frozenset(what), parts if apart else None))
    for result, others, parts in results.load_results(HERE.parent / results.RESULTS):
        folder = f"out/{result['dataset']}/{result['label']}_{result['shots']}shot"
        folder += f"_{result['classes']}_seed{result['seed']}"
        what = frozenset((other["dataset"], other["classes"]) for other in others)
        kept.add((folder, what, tuple(parts) if parts else None))
    assert made == kept


def test_a_run_is_made_once_and_kept(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = "--method mocoop --shots 1 --epochs 1 --classes base"
    monkeypatch.setattr(reproduce.torch, "set_num_threads", lambda n: None)
    monkeypatch.setattr(reproduce, "is_to_be_taken_apart", lambda config, folder: True)
    monkeypatch.setattr(reproduce.results, "SHIFTED", ())
    first = reproduce.run_job(flags)
    assert [e["classes"] for e in first[1]] == ["new"] and set(first[2]) == {"base", "new"}
    with monkeypatch.context() as patch:
        patch.setattr(train, "train", None)  # what is there is not made again
        patch.setattr(eval, "evaluate", None)
        assert reproduce.run_job(flags) == first
    again = reproduce.run_job(flags, again=True)
    assert reproduce.without_times(again)[:2] == reproduce.without_times(first)[:2]


def test_a_reproduction_that_was_stopped_goes_on_with_its_half_finished_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(reproduce.torch, "set_num_threads", lambda n: None)
    flags = "--method mocoop --shots 1 --epochs 3"
    with stopped_after(2):
        reproduce.run_job(flags)
    rates, learning_rate = [], train.learning_rate
    monkeypatch.setattr(
        train, "learning_rate", lambda *a, **k: rates.append(a[0]) or learning_rate(*a, **k)
    )
    reproduce.run_job(flags)
    assert set(rates) == {2}  # the third epoch alone


def test_pictures_of_the_method_are_without_what_is_learned_of_images(lines, monkeypatch, capsys):
    lines.append(run("shapes", "all", "mocoop-image_sideprompts", 1, 85.0,
                     changed={"image_side": "prompts"}))  # fmt: skip
    drawn = []
    monkeypatch.setattr(reproduce, "draw_pictures", lambda runs, folder: drawn.extend(runs) or [])
    monkeypatch.setattr(reproduce.results, "pages", lambda lines: {})
    reproduce.write_tables(lines)
    labels = {result["label"] for result, _ in drawn}
    assert labels == {"mocoop", "coop", "mocoop-top_k1", "coop-lr0.01"}
    assert {result["dataset"] for result, _ in drawn} == {"shapes"}


class _Threads:
    """A pool of threads in place of processes, so that what a test replaces is replaced there."""

    def __init__(self, n, mp_context):
        self.pool = ThreadPoolExecutor(4)

    def __enter__(self):
        return self.pool

    def __exit__(self, *args):
        self.pool.shutdown()


def test_runs_are_listed_in_their_order_and_not_as_they_ended(monkeypatch, capsys):
    def run_job(flags, again):
        time.sleep(0.02 * (5 - int(flags)))
        return [{"accuracy": float(flags), "train_seconds": 1.0}, [], None]

    monkeypatch.setattr(reproduce, "ProcessPoolExecutor", _Threads)
    monkeypatch.setattr(reproduce, "run_job", run_job)
    clock = iter(range(0, 6000, 600))  # a run every ten minutes
    monkeypatch.setattr(reproduce.time, "time", lambda: next(clock))
    lines = reproduce.run_all(["1", "2", "3", "4"])
    assert list(lines) == ["1", "2", "3", "4"]
    assert [line[0]["accuracy"] for line in lines.values()] == [1.0, 2.0, 3.0, 4.0]
    said = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [(line[0], line[1], line[3]) for line in said] == [
        ("1/4", "10", "30"), ("2/4", "20", "20"), ("3/4", "30", "10"), ("4/4", "40", "0")
    ]  # fmt: skip


@pytest.mark.parametrize("changes", [False, True])
def test_a_run_that_gives_something_else_the_second_time_is_noticed(monkeypatch, capsys, changes):
    def run_all(todo, again=False):
        accuracy = 80.0 + (changes and again)
        return {f: [{"accuracy": accuracy, "train_seconds": time.time()}, [], None] for f in todo}

    monkeypatch.setattr(reproduce, "run_all", run_all)
    todo = [f"--seed {n}" for n in range(40)]
    if changes:
        with pytest.raises(BadInput, match="gave something else than before"):
            reproduce.run_again(todo)
    else:
        reproduce.run_again(todo)
        assert "4 of 40 runs" in capsys.readouterr().out


def test_a_run_taken_again_is_taken_from_the_start(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(reproduce.torch, "set_num_threads", lambda n: None)
    flags = "--method zeroshot --shots 1"
    reproduce.run_job(flags)
    (other,) = (tmp_path / "out/shapes").iterdir()
    stale = tmp_path / "out/again/shapes" / other.name
    reproduce.run_job(flags, again=True)
    result = json.loads((stale / "result.json").read_text())
    (stale / "result.json").write_text(json.dumps(result | {"accuracy": 1.0}))
    assert reproduce.run_job(flags, again=True)[0]["accuracy"] == result["accuracy"]
    assert reproduce.run_job(flags)[0]["accuracy"] == result["accuracy"]


def test_rates_are_multiples_of_each_methods_own():
    rates = {}
    for flags in reproduce.jobs():
        given = parse(flags.split())
        if given.lr:
            rates.setdefault(given.method, set()).add(given.lr)
    own = {"mocoop": 0.032, "lasp": 0.032, "coop": 0.002, "cocoop": 0.002}
    assert {m: sorted(found) for m, found in rates.items()} == {
        m: pytest.approx([0.3 * lr, 3 * lr]) for m, lr in own.items()
    }
