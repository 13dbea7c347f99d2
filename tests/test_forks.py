"""The forks: their papers' own numbers, a round and a search in plain PyTorch, and whole runs."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from conftest import unit
from test_golden import clip_of, close, load
from torch.nn.utils import parameters_to_vector

import forks
from forks import dpl, pfedmoap
from lib.errors import BadInput
from lib.features import CachedImages, pixel_batches
from lib.results import accuracy
from prompts import PromptError
from train import default_config, load_task


@pytest.fixture(scope="module")
def golden_clip():
    return clip_of(*load("eurosat_base"))


def tensors(golden, prefix):
    return {
        k.removeprefix(prefix): torch.tensor(v)
        for k, v in golden.items()
        if k[: len(prefix)] == prefix
    }


def client(clip_model, names, **changes):
    table = {name: row[0] for name, row in pfedmoap.OWN.items()}
    config = default_config(method="coop") | table | pfedmoap.WORLD | changes
    return pfedmoap.Client(clip_model, names, config)


def test_a_client_of_pfedmoap_is_the_authors(golden_clip):
    golden, meta = load("pfedmoap")
    sizes = {"width": meta["gating_width"], "heads": meta["gating_heads"]}
    model = client(golden_clip, meta["class_names"], init="a photo of a {}.", **sizes)
    (vectors,) = [p for p in model.prompts.parameters() if p.numel()]
    experts = []
    for context in torch.tensor(golden["nonlocal_contexts"]):
        vectors.data = context
        experts.append(pfedmoap.pool(model.prompts.text_features()[0].detach(), sizes["width"]))
    close(torch.stack(experts), golden["nonlocal_text_features_pooled"])
    vectors.data = torch.tensor(golden["local_context"])
    close(model.prompts.text_features()[0], golden["local_text_features"])
    layers = dict(zip("qkvo", model.attention))
    for name, layer in layers.items():
        layer.load_state_dict(tensors(golden, f"gating/W_{name}."))
    logits = model(torch.tensor(golden["image_features"]), torch.stack(experts))
    close(logits, golden["logits"])
    loss = F.cross_entropy(logits, torch.tensor(golden["labels"]))
    close(loss, golden["loss"])
    loss.backward()
    close(vectors.grad, golden["local_context_grad"])
    for name, layer in layers.items():
        for part, gradient in tensors(golden, f"gating_grad/W_{name}.").items():
            found = getattr(layer, part).grad
            if part == "bias" and name != "q":  # no softmax sees what all experts or classes share
                assert max(found.abs().max(), gradient.abs().max()) < 1e-6
            else:
                close(found, gradient.numpy())


@pytest.mark.parametrize("stage", ["search", "train"])
def test_dpl_is_the_authors(stage, golden_clip):
    golden, meta = load("dpl")
    lengths = [[[n] for n in of] for of in meta["lengths_in_train_stage"].values()]
    if stage == "search":
        lengths = 2 * [2 * [[*range(meta["longest_context"] + 1)]]]
    names, draws = meta["class_names"], (torch.randn, torch.randn)
    model = dpl.DeepPrompts(golden_clip, names, dpl.DEFAULT, lengths, draws, {})
    sides = {"text": model.text, "image": model.image}
    contexts = {}  # {the end of their name: (block's vectors, candidate, length)}
    for side, part in sides.items():
        for block, candidates in enumerate(part.lengths.tolist()):
            for i, n in enumerate(candidates):
                key = f"{block}_{n}" if stage == "search" else f"{block}"
                if f"{stage}/{side}_context_{key}" in golden:
                    contexts[side, key] = part.vectors[block], i, n
                    stored = torch.tensor(golden[f"{stage}/{side}_context_{key}"])
                    part.vectors[block].data[i, :n] = stored
        if stage == "search":
            part.alpha.data = torch.tensor(golden[f"search/{side}_alpha"])
    assert len(contexts) == (12 if stage == "search" else 4)
    pixels = torch.tensor(load("eurosat_base")[0]["images"])
    close(model.text_features(), golden[f"{stage}/text_features"])
    close(model.image_features(pixels), golden[f"{stage}/image_features"])
    logits = model(pixels).logits
    close(logits, golden[f"{stage}/logits"])
    loss = F.cross_entropy(logits, torch.tensor(golden["labels"]))
    close(loss, golden[f"{stage}/loss"])
    loss.backward()
    for (side, key), (vectors, i, n) in contexts.items():
        close(vectors.grad[i, :n], golden[f"{stage}/{side}_context_grad_{key}"])
    for side, part in sides.items() if stage == "search" else ():
        close(part.alpha.grad, golden[f"search/{side}_alpha_grad"])


# ------------------------------------------------------------------------- in plain PyTorch


def test_two_rounds_of_two_clients_are_those_of_plain_pytorch(random_clip):
    """The second is the first with experts. Each client is a module that trains on its own; what it
    computes for an image is in the golden arrays."""
    names, sizes = ["cat", "dog", "fox"], {"clients": 2, "experts": 2, "width": 16, "heads": 2}
    short = {"rounds": 2, "epochs": 2, "batch_size": 2, "attention_lr": 0.05, "lr": 0.1}
    torch.manual_seed(1)
    model = client(random_clip, names, **sizes, **short)
    f, y = unit(9, 2, 64), torch.arange(9) % 3
    own = pfedmoap.deal(y, 3, 2)
    assert sorted(map(len, own)) == [3, 6] and sorted(torch.cat(own).tolist()) == list(range(9))
    clients, rng = [copy.deepcopy(model), copy.deepcopy(model)], torch.Generator().manual_seed(1)
    test = [(f[i, 0], y[i]) for i in own]
    percents, state = pfedmoap.federate("pfedmoap", model, CachedImages(f), y, test)

    for number in (1, 2):
        texts = [m.prompts.text_features()[:, :, ::4].detach() for m in clients]
        mean = sum(m.prompts.context_before[0].data * len(i) / 9 for m, i in zip(clients, own))
        for m, indices, expert in zip(clients, own, texts[::-1]):
            m.prompts.context_before[0].data = mean.clone()
            expert = expert if number == 2 else None
            prompts, attention = [m.prompts.context_before[0]], [*m.attention.parameters()]
            learned, speed = prompts + (attention if expert is not None else []), {}
            for epoch in (0, 1):  # too few for a warm-up
                lr = 0.1 if epoch == 0 else 0.05
                order = indices[torch.randperm(len(indices), generator=rng)]
                views = torch.randint(2, (9,), generator=rng)
                for i in order[: len(order) // 2 * 2].view(-1, 2):
                    loss = F.cross_entropy(m(f[i, views[i]], expert), y[i])
                    for p, g in zip(learned, torch.autograd.grad(loss, learned)):
                        speed[p] = 0.9 * speed.get(p, 0) + g + 5e-4 * p.data
                        p.data = p.data - (lr if p is prompts[0] else 0.05) * speed[p]
    for row, m, found, indices, expert in zip(state, clients, percents, own, texts[::-1]):
        expected = parameters_to_vector(m.parameters()).detach()
        assert (row - expected).abs().max() < 1e-4 * expected.abs().max()
        answers = m(f[indices, 0], expert).argmax(-1)
        assert accuracy(answers, y[indices]) == found


def test_experts_are_the_nearest_or_drawn():
    prompts, rng = torch.tensor([[0.0], [1.0], [3.0], [7.0]]), torch.Generator().manual_seed(0)
    nearest = [pfedmoap.choose_experts(i, prompts, 2, "nearest", rng).tolist() for i in range(4)]
    assert nearest == [[1, 2], [0, 2], [1, 0], [2, 1]]
    drawn = [pfedmoap.choose_experts(3, prompts, 2, "random", rng).tolist() for _ in range(50)]
    assert {tuple(sorted(pair)) for pair in drawn} == {(0, 1), (0, 2), (1, 2)}


def test_two_steps_of_the_search_are_those_of_plain_pytorch(small):
    """Alpha learns from validation images first, then the vectors from training images."""
    words = (
        f"{small} --shots 1 --search-epochs 1 --batch-size 5 --longest 2 --lr 0.5 --alpha-lr 0.3"
    )
    config, _ = forks.configure("dpl", dpl.OWN, dpl.WORLD, None, words.split())
    task = load_task(config, torch.device("cpu"))
    about, lengths = (task.clip_model, task.names, dpl.DEFAULT), 2 * [2 * [[0, 1, 2]]]
    model = dpl.DeepPrompts(*about, lengths, (torch.rand, torch.randn), config)
    other = copy.deepcopy(model)
    dpl.search(model, task, dpl.Pixels(task.clip_model, task.split))

    def gradients(part, indices, learned):
        (x,) = pixel_batches(
            task.clip_model, task.split, part, [indices], 0 if part == "train" else None
        )
        loss = F.cross_entropy(other(x).logits, task.labels(part)[indices])
        return zip(learned, torch.autograd.grad(loss, learned))

    rng = torch.Generator().manual_seed(1)
    batches = torch.randperm(10, generator=rng).split(5)
    drawn = [torch.randperm(10, generator=rng) for _ in batches]
    alpha, vectors = (
        [other.text.alpha, other.image.alpha],
        [*other.text.vectors, *other.image.vectors],
    )
    speed, square = {}, {}
    for step, (batch, val_batch) in enumerate(zip(batches, drawn), 1):
        for a, g in gradients("val", val_batch, alpha):
            speed[a] = 0.5 * speed.get(a, 0) + 0.5 * g
            square[a] = 0.999 * square.get(a, 0) + 0.001 * g**2
            size = (square[a] / (1 - 0.999**step)).sqrt() + 1e-8
            a.data = a.data - 0.3 * speed[a] / (1 - 0.5**step) / size
        for v, g in gradients("train", batch, vectors):
            speed[v] = 0.9 * speed.get(v, 0) + g + 5e-4 * v.data
            v.data = v.data - 0.5 * speed[v]
    for ours, expected in zip(model.parameters(), other.parameters()):
        assert (ours - expected).abs().max() < 1e-4 * expected.abs().max()


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
    assert json.loads((tmp_path / "run/result.json").read_text())["method"] == name
    if name == "pfedmoap":
        assert [len(result["clients"][kind]) for kind in pfedmoap.KINDS] == [4, 4, 4]
        assert result["accuracy"] == round(sum(result["clients"][name]) / 4, 2)
    else:
        assert [len(of) for of in result["lengths"]] == [2, 2]
    status, lines, errors = run_eval("--table", tmp_path)
    assert status == 0 and not errors and any(name in line for line in lines)
    status, _, (error,) = run_eval(tmp_path / "run")
    assert status == 2 and f"is a run of {name}, which only its own program can load" in error


@pytest.mark.parametrize(
    "name, words, said",
    [
        ("pfedmoap", "--clients 11", "must lie between --experts and the 10 classes"),
        ("pfedmoap", "--experts 11", "--clients 4 must lie between"),
        ("pfedmoap", "--width 48", "--width 48 must divide 64"),
        ("pfedmoap", "--epochs 30 --lr 2e9 --attention-lr 2e9", "should be finite"),
        ("pfedmoap", "--resume", "unrecognized arguments: --resume"),
        ("dpl", "--dataset shapes --clip bundled --sentences ensemble", "never seen the word"),
        ("dpl", "--classes base", "unrecognized arguments"),
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
