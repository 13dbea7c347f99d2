"""The forks: their papers' own numbers, two rounds and two steps in plain PyTorch, whole runs."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import unit
from test_golden import clip_of, close, load

import forks
from forks import dpl, pfedmoap
from lib.errors import BadInput
from lib.features import LiveImages, pixel_batches
from lib.results import accuracy
from prompts import PromptError, hard_sentences
from train import default_config, fit, load_task


def task_of(fork, clip_model, names, **changes):
    """What a model needs of a `train.Task`."""
    table = {name: row[0] for name, row in fork.OWN.items()}
    config = default_config(method="coop") | table | fork.WORLD | changes
    return SimpleNamespace(clip_model=copy.deepcopy(clip_model), names=names, config=config)


@pytest.fixture(scope="module")
def golden_clip():
    return clip_of(*load("eurosat_base"))


def test_a_client_of_pfedmoap_is_the_authors(golden_clip):
    golden, meta = load("pfedmoap")
    changes = {"width": meta["gating_width"], "heads": meta["gating_heads"], "init": dpl.DEFAULT[0]}
    f, labels = torch.tensor(golden["image_features"]), torch.tensor(golden["labels"])
    task = task_of(pfedmoap, golden_clip, meta["class_names"], **changes)
    model = pfedmoap.Client(task, 2 * [(f, labels)], labels)
    vectors = model.prompts.context_before[0]
    experts = []
    for context in torch.tensor(golden["nonlocal_contexts"]):
        vectors.data = context
        experts.append(model.text_features().detach())
    model.experts = torch.cat(experts)
    vectors.data = torch.tensor(golden["local_context"])
    layers = [
        (f"W_{q}.{part}", getattr(of, part))
        for q, of in zip("qkvo", model.attention)
        for part in ("weight", "bias")
    ]
    for name, parameter in layers:
        parameter.data = torch.tensor(golden[f"gating/{name}"])
    outputs = model(f)
    close(outputs.text_features[0], golden["local_text_features"])
    close(outputs.logits, golden["logits"])
    loss = F.cross_entropy(outputs.logits, labels)
    close(loss, golden["loss"])
    loss.backward()
    close(vectors.grad, golden["local_context_grad"])
    for name, parameter in layers:
        gradient = golden[f"gating_grad/{name}"]
        if name in ("W_k.bias", "W_v.bias", "W_o.bias"):  # what all experts or classes share
            assert max(parameter.grad.abs().max(), abs(gradient).max()) < 1e-6
        else:
            close(parameter.grad, gradient)


@pytest.mark.parametrize("stage", ["search", "train"])
def test_dpl_is_the_authors(stage, golden_clip):
    golden, meta = load("dpl")
    found, names = None, ("text 1", "text 2", "image 1", "image 2")
    if stage == "train":
        lengths = meta["lengths_in_train_stage"]
        found = dict(zip(names, lengths["text"] + lengths["image"]))
    task = task_of(dpl, golden_clip, meta["class_names"], longest=meta["longest_context"])
    model = dpl.DeepPrompts(task, hard_sentences(golden_clip, dpl.DEFAULT, task.names), found)

    def stored(what, side, i):
        ends = ("_1", "_2", "_3") if stage == "search" else ("",)
        parts = [golden[f"{stage}/{side}_{what}_{i}{end}"] for end in ends]
        return np.concatenate(parts)[:, None]

    blocks = zip(model.attentions.values(), ("text", "text", "image", "image"), (0, 1, 0, 1))
    for attention, *where in (blocks := list(blocks)):
        attention.vectors.data = torch.tensor(stored("context", *where))
        if stage == "search":
            attention.alpha.data = torch.tensor(golden[f"search/{where[0]}_alpha"][where[1]])
    pixels = torch.tensor(load("eurosat_base")[0]["images"])
    f = LiveImages(task.clip_model, None).encode(pixels)
    outputs = model(f)
    loss = F.cross_entropy(outputs.logits, torch.tensor(golden["labels"]))
    loss.backward()
    close(f, golden[f"{stage}/image_features"])
    close(outputs.text_features[0], golden[f"{stage}/text_features"])
    close(outputs.logits, golden[f"{stage}/logits"])
    close(loss, golden[f"{stage}/loss"])
    for attention, *where in blocks:
        if len(attention.vectors):
            close(attention.vectors.grad, stored("context_grad", *where))
        if stage == "search":
            close(attention.alpha.grad, golden[f"search/{where[0]}_alpha_grad"][where[1]])


def test_an_ensemble_is_the_mean_of_embeddings_and_ends_as_its_last_template(random_clip):
    a, b = hard_sentences(random_clip, ["a photo of a {}.", "{}."], ["cat"])
    models = [dpl.DeepPrompts(task_of(dpl, random_clip, ["cat"]), of) for of in ([a], [b], [a, b])]
    long, short, both = (model.words for model in models)
    n = len(short)
    assert torch.allclose(2 * both[:n], long[:n] + short)
    assert models[2].ends == [n - 1]


# ------------------------------------------------------------------------- in plain PyTorch


def test_two_rounds_of_two_clients_are_those_of_plain_pytorch(random_clip):
    """Experts first appear in the second round. Each client is a module that trains on its own;
    what it computes for an image is in the golden arrays."""
    changes = {"experts": 2, "width": 16, "heads": 2, "rounds": 2, "epochs": 1, "batch_size": 2}
    task = task_of(pfedmoap, random_clip, ["cat", "dog", "fox"], lr=0.1, **changes)
    f, y, dealt = unit(9, 2, 64), torch.arange(9) % 3, pfedmoap.deal(3, 2)
    images = (f, y), (f[:, 0], y)
    clients = [pfedmoap.Client(task, images, of_client) for of_client in dealt]
    percents = pfedmoap.federate("pfedmoap", clients)

    expected = [pfedmoap.Client(task, images, of_client) for of_client in dealt]  # seeds again
    for number in (1, 2):
        texts = [m.text_features().detach() for m in expected]
        mean = sum(m.prompts.context_before[0].data * len(m.f) / 9 for m in expected)
        for m, of_other in zip(expected, texts[::-1]):
            if number == 2:
                m.experts, m.prompts.context_before[0].data = of_other, mean.clone()
            parts = [{"params": m.prompts.parameters(), "lr": 0.1}]
            parts += [{"params": m.attention.parameters(), "lr": 0.01}]
            optimiser = torch.optim.SGD(parts, momentum=0.9, weight_decay=5e-4)
            order = torch.randperm(len(m.f))
            for i in order[: len(order) // 2 * 2].view(-1, 2):
                f = m.f[i, torch.randint(2, (2,))]
                optimiser.zero_grad()
                F.cross_entropy(m(f).logits, m.labels[i]).backward()
                optimiser.step()
    for ours, plain, percent in zip(clients, expected, percents):
        for p, q in zip(ours.parameters(), plain.parameters()):
            close(p, q.detach().numpy())
        assert accuracy(plain(plain.test_f).logits.argmax(-1), plain.test_labels) == percent


def test_experts_are_the_nearest_or_drawn():
    prompts, c = torch.tensor([[0.0], [1.0], [3.0], [7.0]]), {"choice": "nearest", "experts": 3}
    assert pfedmoap.choose_experts(prompts, c).tolist() == [[1, 2], [0, 2], [1, 0], [2, 1]]
    c["choice"] = "random"
    drawn = {tuple(sorted(pfedmoap.choose_experts(prompts, c)[3].tolist())) for _ in range(50)}
    assert drawn == {(0, 1), (0, 2), (1, 2)}


def test_two_steps_of_the_search_are_those_of_plain_pytorch(small):
    """Alpha learns from validation images first, then the vectors from training images."""
    words = f"{small} --shots 1 --epochs 1 --batch-size 5 --longest 2 --lr 0.5 --alpha-lr 0.3"
    config, _ = forks.configure("dpl", dpl.OWN, dpl.WORLD, None, words.split())
    task = load_task(config, torch.device("cpu"))
    model = dpl.DeepPrompts(task, hard_sentences(task.clip_model, dpl.DEFAULT, task.names))
    other = copy.deepcopy(model)
    fit(model, dpl.SearchImages(model, task), task.labels("train"), None)

    torch.manual_seed(1)
    batches = torch.randperm(10, generator=torch.Generator().manual_seed(1)).split(5)
    drawn = [torch.randperm(10) for _ in batches]
    (clip_model,), blocks = other.prompts.frozen, other.attentions.values()
    adam = torch.optim.Adam([block.alpha for block in blocks], 0.3, betas=(0.5, 0.999))
    vectors = [block.vectors for block in blocks]
    sgd = torch.optim.SGD(vectors, 0.5, momentum=0.9, weight_decay=5e-4)
    for batch, val_batch in zip(batches, drawn):
        steps = (adam, "val", val_batch, None), (sgd, "train", batch, 0)
        for optimiser, part, indices, view in steps:
            (x,) = pixel_batches(clip_model, task.split, part, [indices], view)
            f = LiveImages(clip_model, None).encode(x)
            optimiser.zero_grad()
            F.cross_entropy(other(f).logits, task.labels(part)[indices]).backward()
            optimiser.step()
    for ours, plain in zip(model.attentions.values(), other.attentions.values()):
        for p, q in ((ours.vectors, plain.vectors), (ours.alpha, plain.alpha)):
            close(p, q.detach().numpy())


# ------------------------------------------------------------------------------- whole runs

SHORT = {
    "pfedmoap": "--rounds 2 --epochs 1 --clients 4 --experts 2 --width 16 --heads 2 --views 1",
    "dpl": "--search-epochs 1 --epochs 1 --longest 2",
}


def start(name, words):
    fork = {"pfedmoap": pfedmoap, "dpl": dpl}[name]
    config = forks.configure(name, fork.OWN, fork.WORLD, None, words)
    return forks.run(*config, fork.learn)


@pytest.mark.parametrize("name", SHORT)
def test_a_fork_runs_and_its_result_is_in_the_table(name, small, random_clip, tmp_path, run_eval):
    words = f"{small} --shots 1 {SHORT[name]} --out {tmp_path / 'run'}".split()
    result = start(name, words)
    assert start(name, words)["accuracy"] == result["accuracy"]
    other = words + ["--clip", str(tmp_path / "clip.pt")]
    torch.save({k: w * 1.01 for k, w in random_clip.state_dict().items()}, other[-1])
    with pytest.raises(BadInput, match="holds a run with other images, templates or CLIP weights"):
        start(name, other)
    assert result["label"] != name
    if name == "pfedmoap":
        assert result["accuracy"] == round(sum(result["clients"][name]) / 4, 2)
    status, lines, errors = run_eval("--table", tmp_path)
    assert status == 0 and not errors and any(name in line for line in lines)
    status, _, (error,) = run_eval(tmp_path / "run")
    assert status == 2 and f"is a run of {name}, which eval.py cannot load" in error


@pytest.mark.parametrize(
    "name, words, said",
    [
        ("pfedmoap", "--clients 11", "must lie between --experts and the 10 classes"),
        ("pfedmoap", "--experts 11", "--clients 4 must lie between"),
        ("pfedmoap", "--width 48", "--width 48 must divide 64"),
        ("pfedmoap", "--epochs 30 --lr 2e9 --attention-lr 2e9", "should be finite"),
        ("dpl", "--dataset shapes --clip bundled --sentences ensemble", "never seen the word"),
    ],
)
def test_what_a_fork_cannot_do_is_said(
    name, words, said, small, tmp_path, monkeypatch, small_world
):
    words = f"{small} --shots 1 {SHORT[name]} --out {tmp_path / 'run'} {words}".split()
    with pytest.raises((BadInput, PromptError), match=said):
        start(name, words)
    assert not (tmp_path / "run").exists()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(BadInput, match="start it without torchrun"):
        start(name, f"{small} --out {tmp_path / 'run'}".split())
