"""Whole runs against the same runs computed apart, from the command line to the last number.

`plain.py` is the method on a page of plain PyTorch. It is given files, seeds and the papers'
settings; train.py and eval.py are given a command line.
"""

import copy
import json
import random
import re
import shlex
import sys

import clip
import plain
import pytest
import torch
from conftest import draw_image, stopped_after
from PIL import Image

import eval
import train
from data import load_split
from lib.catalogue import template_groups
from lib.errors import BadInput
from lib.features import as_clip_reads, load_image

pytestmark = pytest.mark.usefixtures("no_pictures")

OTHER_GROUPS = [["a photo of {}, a type of land.", "{}."], ["a sketch of a {}."], ["{} texture."]]
COLOURS = "black blue brown green grey orange pink red white yellow"
ZERO_SHOT = "a centered satellite photo of {}."
OWN_GROUPS = {"groups": OTHER_GROUPS}
CASES = {  # name: (flags, settings of plain.py that `settings` does not read off them)
    "published": ("--classes base --shots 2 --seed 2 --views 3 --epochs 5 --batch-size 4", {}),
    "other numbers": (
        "--shots 2 --seed 3 --views 2 --epochs 3 --gate-weight 0.5 --text-weight 2 --text-scale 3"
        " --max-grad-norm 0 --lr 0.004 --top-k 3 --text-bias --warm-up 0",
        {},
    ),
    "words behind the name": (
        "--groups groups.txt --classes new --shots 3 --seed 5 --views 1 --epochs 2"
        " --text-target templates --full-stop",
        OWN_GROUPS,
    ),
    "groups found, random starts": (
        "--groups auto --n-groups 3 --classes base --shots 2 --seed 7 --views 2 --epochs 2"
        " --init random --gate-target mean",
        {"groups": None, "init": "random"},
    ),
    "frozen router": (
        "--router frozen --shots 1 --seed 4 --views 2 --epochs 2 --text-weight 0 --top-k 1",
        {},
    ),
    "uniform router": (
        "--router uniform --classes base --shots 2 --seed 6 --views 2 --epochs 2"
        " --init 'a picture of {}' --max-grad-norm 0.2 --text-names seen",
        {"init": "a picture of {}"},
    ),
    "CoOp": ("--method coop --shots 2 --seed 2 --views 2 --epochs 5", {}),
    "CoCoOp": (
        "--method cocoop --classes base --shots 1 --seed 2 --views 2 --epochs 2 --lr 0.02",
        {},
    ),
    "a mixture with CoCoOp's network": (
        "--conditional --text-bias --text-target templates --classes base --shots 1 --seed 3"
        " --views 2 --epochs 2 --batch-size 4 --groups groups.txt",
        OWN_GROUPS,
    ),
    "LASP": ("--method lasp --classes base --shots 2 --seed 2 --views 2 --epochs 2", {}),
    "LayerNorms": (
        "--image-side layer-norms --classes base --shots 2 --seed 2 --epochs 8 --warm-up 1"
        " --batch-size 5 --lr 0.005",
        {"side": "layer-norms", "views": 1},
    ),
    "prompts beside patches": (
        "--image-side prompts --one-group --classes base --shots 2 --seed 2 --epochs 2"
        " --batch-size 5 --gate-weight 0",
        {"side": "prompts", "views": 1, "groups": plain.ONE_GROUP},
    ),
}
STOPPED = {"other numbers": 2, "published": 2, "LayerNorms": 2, "CoOp": 3}  # after so many epochs
ON_NEW_CLASSES = "published", "groups found, random starts"


def settings(flags):
    """The settings of plain.py that flags stand for, and {flag: its word}."""
    given = dict(re.findall(r"--([\w-]+) (\w[\w.-]*)", flags))
    methods = {"coop": plain.COOP, "cocoop": plain.COCOOP, "lasp": plain.LASP}
    method = methods.get(given.get("method"), plain.MOCOOP)
    s, numbers = dict(method), {"batch-size": "batch", "max-grad-norm": "clip", "top-k": "top_k"}
    numbers |= {"warm-up": "warm_up", "gate-weight": "gate", "text-weight": "text"}
    numbers |= {"text-scale": "scale", "gate-target": "target"} | {
        key: key for key in ("views", "epochs", "lr", "router")
    }
    for flag in numbers.keys() & given.keys():
        s[numbers[flag]] = type(method[numbers[flag]])(given[flag])
    if "lr" not in given:
        s["lr"] *= s["batch"] / method["batch"]
    switches = {"--text-bias": "bias", "--full-stop": "stop", "--conditional": "conditional"}
    for switch, key in (switches | {"--text-target templates": "per_template"}).items():
        s[key] |= switch in flags
    return s, given


@pytest.fixture(scope="module")
def data_root(eurosat, tmp_path_factory):
    """All its images are test images, too: the more there are, the more a percentage tells. But for
    a few, so that classes differ in size. Names are not in the order of the alphabet."""
    root = tmp_path_factory.mktemp("more") / "eurosat"
    root.mkdir()
    for folder in ("2750", "2750/again"):  # an image of two parts needs two names
        (root / folder).mkdir()
        for images in (eurosat / "eurosat/2750").iterdir():
            (root / folder / images.name).symlink_to(images)
    split = json.loads((eurosat / "eurosat/split_zhou_EuroSAT.json").read_text())
    every = split["test"] + split["val"] + split["train"]
    every = [(f"again/{path}", label, name) for path, label, name in every]
    split["test"] = [e for i, e in enumerate(every) if i % 16 > e[1]]
    names = {label: name for _, label, name in every}
    split = {part: [[p, y, names[3 * y % 10]] for p, y, _ in own] for part, own in split.items()}
    (root / "split_zhou_EuroSAT.json").write_text(json.dumps(split))
    return root.parent


@pytest.fixture
def start(monkeypatch, tmp_path):
    """Starts a script of the project with a command line, from an empty folder."""
    monkeypatch.chdir(tmp_path)

    def start(script, *args):
        argv = [f"{script.__name__}.py", *(a for arg in args for a in shlex.split(arg))]
        monkeypatch.setattr(sys, "argv", argv)
        script.main()

    return start


class Task:
    """EuroSAT's files, read without the project: lists of (path, label), names."""

    def __init__(self, root, classes, shots, seed):
        self.images = root / "eurosat/2750"
        lists = json.loads((root / "eurosat/split_zhou_EuroSAT.json").read_text())
        names = {label: name for part in lists.values() for _, label, name in part}
        self.every_name = [names[label] for label in range(10)]
        self.seen = {"all": slice(0, 10), "base": slice(0, 5), "new": slice(5, 10)}[classes]
        self.names = self.every_name[self.seen]
        rng = random.Random(seed)
        drawn = {
            "train": self.few_shot(lists["train"], shots, rng),
            "val": self.few_shot(lists["val"], min(shots, 4), rng),
            "test": lists["test"],
        }
        for part, entries in drawn.items():
            own = [(path, y - self.seen.start) for path, y, *_ in entries]
            own = [(path, y) for path, y in own if 0 <= y < len(self.names)]
            setattr(self, part, own)

    @staticmethod
    def few_shot(entries, shots, rng):
        return plain.few_shot([(path, label) for path, label, _ in entries], shots, rng)

    def loader(self, data_root, clip_model, side):
        """Training images as `plain.train` takes them. Which crop belongs to a path and a number is
        the project's to say (`load_image`, which test_features.py looks after)."""
        split = load_split("eurosat", data_root)

        def pixels(i, view):
            image = load_image(split, f"2750/{self.train[i][0]}", view, 32)
            return as_clip_reads([image], "cpu")[0]

        def load(indices, views, epoch):
            views = views if side is None else torch.full_like(views, epoch)  # cropped anew
            batch = torch.stack([pixels(i, int(v)) for i, v in zip(indices, views)])
            return plain.unit(clip_model.encode_image(batch)) if side is None else batch

        return load


class Pets:
    """A folder of one's own, {train,test}/<class>/*, with as many classes as EuroSAT."""

    def __init__(self, folder):
        self.folder, self.images = folder, folder / "test"
        self.names = [f"{c} parrot" for c in COLOURS.split()]
        self.test = [(f"{name}/{i}.jpg", y) for y, name in enumerate(self.names) for i in range(8)]
        for part in ("train", "test"):
            for path, _ in self.test:
                draw_image(folder / part / path, f"{part} {path}")


@pytest.fixture(scope="module")
def pets(tmp_path_factory):
    return Pets(tmp_path_factory.mktemp("own") / "pets")


def read(folder, items):
    """The images of (path, label), as clip preprocesses them: (N, 3, 32, 32)."""
    transform = clip.clip._transform(32)
    return torch.stack([transform(Image.open(folder / path)) for path, _ in items])


def ensemble(clip_model, groups, names):
    """The mean feature of all templates, per class: (C, D)."""
    every = [plain.hard_features(clip_model, t, names) for group in groups for t in group]
    return plain.unit(torch.stack(every).mean(0))


def right(logits, items):
    """Top-1 accuracy in percent."""
    labels = torch.tensor([label for _, label in items])
    return 100 * (logits.argmax(dim=-1) == labels).float().mean().item()


def ours_by_name(model, clip_model, side):
    """{a name in a checkpoint: the parameter of plain.py}."""
    named = {f"prompts.context_before.{g}": c for g, c in enumerate(model.contexts)}
    named |= {f"prompts.context_after.{g}": c for g, c in enumerate(model.afters)}
    if model.gate is not None:
        named |= {"router.gate.weight": model.gate.weight, "router.gate.bias": model.gate.bias}
    if model.bias is not None:
        named["text_bias"] = model.bias
    if model.s["conditional"]:
        for i, layer in ((0, model.down), (2, model.up)):
            named |= {f"shift.{i}.weight": layer.weight, f"shift.{i}.bias": layer.bias}
    if side == "prompts":
        named["image_side.0"] = model.tokens
    if side == "layer-norms":
        blocks = clip_model.visual.transformer.resblocks
        norms = [norm for block in blocks for norm in (block.ln_1, block.ln_2)]
        for i, norm in enumerate(norms):
            named |= {f"image_side.{i}.weight": norm.weight, f"image_side.{i}.bias": norm.bias}
    return named


def check_numbers(found, model, untrained, names, items, f, plain_f, groups, zero_shot, kinds=None):
    """Every number of a result.json or eval_*.json about some test images. f, plain_f: their
    features (N, D), by the run's image encoder and by CLIP's. groups, zero_shot: templates. kinds:
    of each image, for the router's table; None for its class."""
    with torch.no_grad():
        _, weights, _, logits = model(f, names)
    answers = torch.stack(logits).argmax(dim=-1)
    assert found["accuracy"] == pytest.approx(right(torch.stack(logits), items), abs=0.006)
    for label, name in enumerate(names):
        own = [int(a) == label for a, (_, y) in zip(answers, items) if y == label]
        expected = 100 * sum(own) / len(own)
        assert found["per_class_accuracy"][name] == pytest.approx(expected, abs=0.006)
    assert list(found["per_class_accuracy"]) == names
    one = plain.hard_features(untrained, zero_shot, names)
    assert found["zero_shot_accuracy"] == pytest.approx(right(plain_f @ one.T, items), abs=0.006)
    every = ensemble(untrained, groups, names)
    assert found["ensemble_accuracy"] == pytest.approx(right(plain_f @ every.T, items), abs=0.006)
    usage = list(found["prompt_usage"].values())
    assert usage == pytest.approx(weights.mean(0).tolist(), abs=1.5e-4)
    kinds = kinds or [names[y] for _, y in items]
    assert set(found["router"]["rows"]) == set(kinds)
    for name, row in zip(found["router"]["rows"], found["router"]["share"], strict=True):
        own = torch.tensor([kind == name for kind in kinds])
        assert row == pytest.approx(weights[own].mean(0).tolist(), abs=1.5e-4)
    assert found["n_test"] == len(items) and found["n_classes"] == len(names)
    assert found["n_prompts"] == len(model.contexts)
    starts = [group[0] for group in model.s["groups"]]
    if len(starts) == 1 and model.s["init"] not in (None, "random"):
        starts = [model.s["init"]]  # what a single prompt started from
    assert list(found["prompt_usage"]) == starts
    top_k = len(starts) if model.s["router"] == "uniform" else min(model.s["top_k"], len(starts))
    assert found["top_k"] == top_k


def check_probabilities(folder, model, about, other_names):
    """What a program gets that loads the run, for some of its test images: with the run's names,
    and with as many others."""
    names, items, f, *_ = about
    images = [Image.open(folder / path) for path, _ in items[:4]]
    run = eval.load_run("run")
    for given, expected_names in ((None, names), (other_names[: len(names)],) * 2):
        found_names, probabilities, found_weights = run.classify(images, given)
        with torch.no_grad():
            _, weights, _, logits = model(f[:4], expected_names)
        assert found_names == expected_names
        found_logits, _ = run.model.logits(f[:4], expected_names)  # softmax forgets what all share
        assert torch.allclose(found_logits, torch.stack(logits), atol=1e-4)
        assert torch.allclose(probabilities, torch.stack(logits).softmax(dim=-1), atol=1e-5)
        assert torch.allclose(found_weights, weights, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_a_run_is_the_one_computed_apart(
    name, start, data_root, pets, random_clip, random_clip_file, tmp_path, capsys
):
    flags, more = CASES[name]
    s, given = settings(flags)
    s |= more
    (tmp_path / "groups.txt").write_text("\n\n".join("\n".join(g) for g in OTHER_GROUPS))
    command = f"--dataset eurosat --data {data_root} --clip {random_clip_file} --out run {flags}"
    if name in STOPPED:
        with stopped_after(STOPPED[name]):
            start(train, command)
        command += " --resume"
    start(train, command)
    printed = capsys.readouterr().out

    checkpoint = torch.load(tmp_path / "run/checkpoint.pt", weights_only=True)
    s["groups"] = s["groups"] or checkpoint["groups"]
    seed, shots = int(given["seed"]), int(given["shots"])
    task = Task(data_root, given.get("classes", "all"), shots, seed)
    clip_model = plain.shortened(random_clip)
    load = task.loader(data_root, clip_model, s["side"])
    labels = torch.tensor([label for _, label in task.train])
    names, seen = task.every_name, task.seen
    if given.get("text-names") == "seen":
        names, seen = task.names, slice(None)
    model, told = plain.train(clip_model, s, seed, names, seen, load, labels)

    expected = ours_by_name(model, clip_model, s["side"])
    assert checkpoint["model"].keys() == expected.keys()
    for key, value in expected.items():
        found = checkpoint["model"][key]
        assert found.shape == value.shape
        if value.numel():
            assert (found - value).abs().max() <= 1e-5 * value.abs().max(), key
    assert checkpoint["class_names"] == task.names

    epochs = re.findall(r"epoch +(\d+)/\d+  lr ([\d.]+)  loss ([\d.]+) = (.*?)  prompts", printed)
    assert [int(epoch) for epoch, *_ in epochs] == list(range(1, s["epochs"] + 1))
    for (epoch, lr, total, terms), (losses, _) in zip(epochs, told):
        weights = {"image": 1.0, "gate": s["gate"], "text": s["text"]}
        expected = sum(weights[loss] * value for loss, value in losses.items())
        assert float(total) == pytest.approx(expected, rel=1e-4, abs=1e-3)
        assert float(lr) == pytest.approx(plain.learning_rate(s, int(epoch) - 1, 1.0), abs=6e-6)
        said = {word.split()[0]: word.split() for word in terms.split(" + ")}
        assert said.keys() == losses.keys()
        for loss, value in losses.items():
            assert float(said[loss][1]) == weights[loss]
            assert float(said[loss][3]) == pytest.approx(value, abs=1e-3)

    result = json.loads((tmp_path / "run/result.json").read_text())

    @torch.no_grad()
    def features(of, items):
        pixels = read(of.images, items)
        return model.image_features(pixels), plain.unit(untrained.encode_image(pixels))

    untrained = plain.shortened(random_clip)
    about = task.names, task.test, *features(task, task.test), s["groups"], ZERO_SHOT
    check_numbers(result, model, untrained, *about)
    check_probabilities(task.images, model, about, pets.names)
    with torch.no_grad():
        val = torch.stack(model(features(task, task.val)[0], task.names)[3])
    assert result["val_accuracy"] == pytest.approx(right(val, task.val), abs=0.006)
    assert result["n_train"] == len(task.train)
    for ours, (_, share) in zip(result["prompt_usage_by_epoch"], told, strict=True):
        assert ours == pytest.approx(share.tolist(), abs=1.5e-4)

    # The run on other classes, and on a folder with other names, which has templates of its own.
    if name in ON_NEW_CLASSES:
        start(eval, "run --classes new")
        found = json.loads((tmp_path / "run/eval_eurosat_new.json").read_text())
        task = Task(data_root, "new", shots, seed)
        about = task.names, task.test, *features(task, task.test), s["groups"], ZERO_SHOT
        check_numbers(found, model, untrained, *about)
        assert found["val_accuracy"] is None and found["n_train"] == result["n_train"]
    start(eval, f"run --dataset {pets.folder} --classes all")
    found = json.loads((tmp_path / "run/eval_pets_all.json").read_text())
    about = pets.names, pets.test, *features(pets, pets.test), plain.SUN397, "a photo of a {}."
    check_numbers(found, model, untrained, *about)


@pytest.mark.parametrize("method", ["linear", "linear_zeroshot"])
def test_a_linear_probe_is_the_one_computed_apart(
    method, start, data_root, random_clip, random_clip_file, tmp_path, capsys, monkeypatch
):
    """At the minimum of logistic regression the gradients of the two terms cancel, which says what
    it was fitted to, and how strongly; what the strength was chosen on, the number alone does not
    tell. Before it another run has stored crops of its images."""
    chosen_on = []
    fit_probe = train.fit_probe

    def spy(class_names, features, val_features, labels, val_labels, *more):
        chosen_on.append((val_features, val_labels))
        return fit_probe(class_names, features, val_features, labels, val_labels, *more)

    monkeypatch.setattr(train, "fit_probe", spy)
    files = f"--dataset eurosat --data {data_root} --clip {random_clip_file} --shots 3 --seed 2"
    start(train, f"{files} --classes new --epochs 1 --views 1 --out crops")
    start(train, f"{files} --classes new --method {method} --out run")
    c = float(re.search(r"C = (\S+)", capsys.readouterr().out)[1])
    task = Task(data_root, "new", 3, 2)
    x, val, test = (random_clip.encode_image(read(task.images, items)).double()
                    for items in (task.train, task.val, task.test))  # fmt: skip
    y = torch.tensor([label for _, label in task.train])
    centre = torch.zeros(len(task.names), x.shape[1]).double()
    if method == "linear_zeroshot":  # it starts as CLIP does, and stays near
        x, val, test = map(plain.unit, (x, val, test))
        hard = plain.hard_features(random_clip, ZERO_SHOT, task.names)
        centre += random_clip.logit_scale.exp() * hard
    run = eval.load_run("run")
    weight, bias = run.model.weight.double(), run.model.bias.double()
    ((val_features, val_labels),) = chosen_on
    assert torch.allclose(val_features.double(), val, atol=1e-4)
    assert val_labels.tolist() == [label for _, label in task.val]
    residual = (x @ weight.T + bias).softmax(-1) - torch.nn.functional.one_hot(y)
    assert (residual.sum(0) if method == "linear" else bias).abs().max() < 1e-4
    moved = weight - centre
    tolerance = 0.02 if method == "linear" else 0.2  # c is 10^6: rounding shows
    assert (moved + c * residual.T @ x).abs().max() < tolerance * moved.abs().max()
    result = json.loads((tmp_path / "run/result.json").read_text())
    for key, features, items in (("accuracy", test, task.test), ("val_accuracy", val, task.val)):
        assert result[key] == pytest.approx(right(features @ weight.T + bias, items), abs=0.006)
    _, probabilities, weights = run.classify([Image.open(task.images / p) for p, _ in task.test])
    assert torch.allclose(probabilities.double(), (test @ weight.T + bias).softmax(-1), atol=1e-4)
    assert weights.shape == (len(task.test), 0)
    start(eval, "run")
    again = json.loads((tmp_path / "run/eval_eurosat_new.json").read_text())
    assert again["accuracy"] == result["accuracy"]
    with pytest.raises(BadInput, match="knows no other"):  # not even as many
        run.classify([Image.open(task.images / task.test[0][0])], task.names[::-1])


@pytest.mark.parametrize(
    "flags, groups",
    [
        ("zeroshot", [[ZERO_SHOT]]),
        ("ensemble --groups groups.txt", OTHER_GROUPS),
    ],
)
def test_clip_as_it_is_is_the_one_computed_apart(
    flags, groups, start, data_root, pets, random_clip, random_clip_file, tmp_path
):
    (tmp_path / "groups.txt").write_text("\n\n".join("\n".join(g) for g in OTHER_GROUPS))
    files = f"--dataset eurosat --data {data_root} --clip {random_clip_file}"
    start(train, f"{files} --classes base --method {flags} --shots 1 --out run")
    other_groups = [["a photo of a {}."]] if flags == "zeroshot" else plain.SUN397
    start(eval, f"run --dataset {pets.folder}")
    for task, templates, file in (
        (Task(data_root, "base", 1, 1), groups, "result.json"),
        (pets, other_groups, "eval_pets_base.json"),
    ):
        names = task.names if task is not pets else pets.names[:5]
        items = [(path, label) for path, label in task.test if label < len(names)]
        texts = ensemble(random_clip, templates, names)
        f = plain.unit(random_clip.encode_image(read(task.images, items)))
        found = json.loads((tmp_path / "run" / file).read_text())
        assert found["accuracy"] == pytest.approx(right(f @ texts.T, items), abs=0.006)
        assert found["n_prompts"] == 0 and found["prompt_usage"] == {}
    assert not (tmp_path / "run/router.png").exists()
    with pytest.raises(BadInput, match="has no prompts"):
        eval.nearest_words(eval.load_run("run"))
    names = ["sea", "lake", "old forest"]  # of one's own, with the run's templates
    images = [Image.open(pets.images / path) for path, _ in items]
    found_names, probabilities, _ = eval.load_run("run").classify(images, names)
    texts = ensemble(random_clip, groups, names)
    expected = (random_clip.logit_scale.exp() * f @ texts.T).softmax(-1)
    assert found_names == names and torch.allclose(probabilities, expected, atol=1e-5)


def test_the_built_in_worlds_numbers_are_those_computed_apart(start, small_world, tmp_path):
    """The bundled CLIP, which knows its classes; drawn images; a router's table by style; templates
    of one's own, which count on the run's own dataset alone."""
    of_world = template_groups("shapes")
    groups = [of_world[7], of_world[5]]
    (tmp_path / "groups.txt").write_text("\n\n".join(map("\n".join, groups)))
    start(train, "--shots 1 --epochs 1 --seed 2 --classes new --groups groups.txt --out run")
    start(eval, "run --dataset shapes_r --classes new")
    run = eval.load_run("run")
    clip_model = copy.deepcopy(run.clip_model)
    clip_model.token_embedding.weight.data.nan_to_num_()  # of unknown words: clip pads with one
    model = plain.Plain(clip_model, plain.MOCOOP | {"groups": groups}, 2)
    with torch.no_grad():
        for name, value in ours_by_name(model, clip_model, None).items():
            value.copy_(run.model.state_dict()[name])
    transform = clip.clip._transform(clip_model.visual.input_resolution)
    for file, dataset, templates in (
        ("result.json", "shapes", groups),
        ("eval_shapes_r_new.json", "shapes_r", of_world),
    ):
        split = load_split(dataset, "nowhere")
        names = split.class_names[10:]
        items = [(item.path, item.label - 10) for item in split.test if item.label >= 10]
        pixels = torch.stack([transform(split.open(path)) for path, _ in items])
        with torch.no_grad():
            f = plain.unit(clip_model.encode_image(pixels))
        found = json.loads((tmp_path / "run" / file).read_text())
        about = names, items, f, f, templates, "a photo of a {}."
        styles = [path.split("/")[2] for path, _ in items]
        check_numbers(found, model, clip_model, *about, kinds=styles)
