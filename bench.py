"""What a training step costs, and what each way to save bought.

    python bench.py                          # every table: about ten minutes on two cores
    python bench.py eurosat --repeats 9      # one of them
    python bench.py --json bench.json        # the same for machines

Every table compares ways to do the same step in one process, in turn, so that a busy machine slows
all of them alike; times are medians. CLIP is a ViT-B/16 of random weights, except for `shapes`:
speed does not depend on them. The class names of `ucf101` and `imagenet` are made up, as long as
UCF101's real ones. Peak memory is that of a fresh process a row, above the loaded model. `growth`
draws assets/cost.png.
"""

import collections
import json
import os
import random
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import clip
import torch
import torch.nn.functional as F
from clip.model import CLIP
from torch.utils._python_dispatch import TorchDispatchMode

import encoder
import parallel
import plots
import shapes
from backbone import exit_on_bad_input, load_clip
from encoder import encode_text
from losses import gate_loss, image_loss, text_loss
from model import MoCoOp
from prompts import template_groups
from router import gate_target, mixed_logits
from train import MOCOOP, Parser, choose_device, number

BATCH = 32
EUROSAT = """Annual Crop Land,Forest,Herbaceous Vegetation Land,Highway or Road,
    Industrial Buildings,Pasture Land,Permanent Crop Land,Residential Buildings,River,Sea or Lake"""
NAME_LENGTHS = [1] * 18 + [2] * 58 + [3] * 23 + [4, 5]  # tokens; UCF101's 101 names


def class_names(size, n_classes):
    if size == "shapes":
        return shapes.DOWNSTREAM
    if size == "eurosat":
        return [name.strip() for name in EUROSAT.split(",")]
    rng = random.Random(0)
    vocabulary = clip.simple_tokenizer.SimpleTokenizer().encoder
    words = [w[:-4] for w in vocabulary if w.endswith("</w>") and w[:-4].isalpha() and w.isascii()]
    return [" ".join(rng.choices(words, k=rng.choice(NAME_LENGTHS))) for _ in range(n_classes)]


# ------------------------------------------------------------- the ways to get the text features


def one_sentence_a_row(prompts, length):
    """The sentences of `prompts.rows`, each in a row of its own: indices (N, length), EOT (N,)."""
    rows, n = prompts.rows, prompts.shape[0] * prompts.shape[1]
    index, eot = torch.zeros(n, length, dtype=torch.long), torch.zeros(n, dtype=torch.long)
    for token, position, sentence in zip(
        rows.token.cpu(), rows.position.cpu(), rows.sentence.cpu()
    ):
        common = sentence == -1
        for s in sentence[sentence >= 0].unique():
            own = sentence == s
            index[s, position[common]], index[s, position[own]] = token[common], token[own]
            eot[s] = position[own].max()
    return index.to(rows.token.device), eot.to(rows.token.device)


def clips_own(model, embeddings, eot):
    """clip's own encoder, attention module and all, on as many positions as it is given."""
    length = embeddings.shape[1]
    for block in model.transformer.resblocks:
        block.attn_mask = torch.full((length, length), -torch.inf, device=eot.device).triu(1)
    x = embeddings + model.positional_embedding[:length]
    x = model.transformer(x.permute(1, 0, 2)).permute(1, 0, 2)
    return model.ln_final(x)[torch.arange(len(x)), eot] @ model.text_projection


class Setting:
    """A model, prompts and a batch of one size, to run steps on."""

    def __init__(self, size, device, groups=None, n_classes=101):
        torch.manual_seed(0)
        if size == "shapes":
            self.clip = load_clip("bundled", device)[0]
        else:
            self.clip = CLIP(512, 224, 12, 768, 16, 77, 49408, 512, 8, 12).float()
            self.clip = self.clip.requires_grad_(False).eval().to(device)
        groups = template_groups(size) if groups is None else groups
        names = class_names(size, n_classes)
        self.model = MoCoOp(self.clip, groups, MOCOOP).to(device)
        self.model.prompts.set_classes(self.clip, names)
        self.autocast = torch.autocast("cuda", torch.bfloat16, enabled=device.type == "cuda")
        self.index, self.eot = one_sentence_a_row(self.model.prompts, self.clip.context_length)
        self.optimiser = torch.optim.SGD(self.model.parameters(), lr=1e-3, momentum=0.9)
        width, pixels = self.clip.text_projection.shape[1], self.clip.visual.input_resolution
        self.images = torch.randn(BATCH, 3, pixels, pixels, device=device)
        self.image_features = F.normalize(torch.randn(BATCH, width, device=device), dim=-1)
        self.labels = torch.randint(len(names), (BATCH,), device=device)
        shape = len(groups), len(names), width
        self.prototypes = F.normalize(torch.randn(shape, device=device), dim=-1)

    def one_a_row(self, encode, length):
        """Text features the plain way: (G, C, D)."""
        prompts = self.model.prompts
        table = torch.cat([prompts.frozen, prompts.context()])
        features = encode(self.clip, F.embedding(self.index[:, :length], table), self.eot).float()
        return F.normalize(features, dim=-1).view(*prompts.shape, -1)

    def step(self, text, live=False, losses=("gate", "text")):
        """One step of training. text: gives the text features; live: encodes images, too."""
        f = self.image_features
        if live:
            with self.autocast:
                f = F.normalize(self.clip.encode_image(self.images).float(), dim=-1)
        gate_logits, weights = self.model.router(f)
        with self.autocast:
            t = text(weights)
        total = image_loss(mixed_logits(f, t, weights, self.model.logit_scale), self.labels)
        if "gate" in losses:
            target = gate_target(f, self.prototypes, self.labels, self.model.router.top_k)
            total = total + gate_loss(gate_logits, target)
        if "text" in losses:
            total = total + MOCOOP["text_weight"] * text_loss(t, self.prototypes)
        self.optimiser.zero_grad()
        total.backward()
        self.optimiser.step()

    def ways(self):
        """{name: (step, tokens that the text encoder computes)}, each with one more idea."""
        to_eot = int(self.eot.max()) + 1
        n, rows = len(self.eot), self.model.prompts.rows.token

        def plain(encode, length, **options):
            text = partial(self.one_a_row, encode, length)
            return partial(self.step, lambda weights: text(), **options), n * length

        return {
            "straightforward": plain(clips_own, self.clip.context_length, live=True),
            "images encoded once": plain(clips_own, self.clip.context_length),
            "stop at EOT": plain(clips_own, to_eot),
            "attention in one kernel": plain(encode_text, to_eot),
            "shared beginnings": (partial(self.step, lambda weights: self.shared()), rows.numel()),
        }

    def shared(self):
        return self.model.text_features(self.clip)


# -------------------------------------------------------------------------------------- measuring


def seconds(action):
    start = time.perf_counter()
    action()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


class Products(TorchDispatchMode):
    """Counts the matrix products of the linear layers by their shapes: {(M, K, N): how many}."""

    def __init__(self):
        super().__init__()
        self.shapes = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            a, b = args[-2:]
            self.shapes[(*a.shape, b.shape[1])] += 1
        return func(*args, **(kwargs or {}))


def compare(ways, repeats, device):
    """Runs steps in turn: {name: {seconds, operations, plain_seconds}}, medians over the repeats.

    operations: multiplications and additions in the linear layers. plain_seconds: what the same
    matrix products take alone.
    """
    products, times = {}, collections.defaultdict(list)
    for name, (step, _) in ways.items():
        with Products() as products[name]:
            step()
    pairs = {}
    for m, k, n in set().union(*(p.shapes for p in products.values())):
        pairs[m, k, n] = torch.randn(m, k, device=device), torch.randn(n, k, device=device).T
    for _ in range(repeats):
        for name, (step, _) in ways.items():
            times[name].append(seconds(step))
        for shape, pair in pairs.items():
            times[shape].append(seconds(partial(torch.mm, *pair)))
    median = {key: statistics.median(values) for key, values in times.items()}
    return {
        name: {
            "seconds": median[name],
            "operations": sum(2 * m * k * n * c for (m, k, n), c in p.shapes.items()),
            "plain_seconds": sum(median[shape] * c for shape, c in p.shapes.items()),
        }
        for name, p in products.items()
    }


def in_fresh_process(call, processes=0):
    """What `bench.<call>` prints, as JSON. processes: by torchrun, with one thread each."""
    command = [sys.executable, "-c", f"import bench; bench.{call}"]
    environment = dict(os.environ)
    if processes:
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--no-python"]
        command = [sys.executable, *torchrun, f"--nproc-per-node={processes}", *command]
        environment["OMP_NUM_THREADS"] = "1"
    done = subprocess.run(
        command, env=environment, cwd=Path(__file__).parent, capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"bench.{call} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def memory(size, way, device, **kwargs):
    """Prints the bytes that a step adds to what the process has before it, and its seconds."""
    setting = Setting(size, torch.device(device), **kwargs)
    step = setting.ways()[way][0]
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        took = seconds(step)
        peak = torch.cuda.max_memory_allocated()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        before = _status("VmRSS")
        took = seconds(step)
        peak = _status("VmHWM")
    print(json.dumps({"added_bytes": peak - before, "bytes": peak, "seconds": took}))


def _status(field):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024


def time_steps(size, n):
    """Prints the median seconds of n steps. Runs under torchrun, too."""
    parallel.start(torch.device("cpu"))
    setting = Setting(size, torch.device("cpu"))
    step = setting.ways()["shared beginnings"][0]
    step()
    print(json.dumps(statistics.median(seconds(step) for _ in range(n))))
    parallel.stop()


# ----------------------------------------------------------------------------------- the tables


def markdown(columns, rows):
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def steps_table(size, repeats, device):
    """Every way to do the step of one size, each with one more idea than the last."""
    setting = Setting(size, device)
    ways = setting.ways()
    if size == "ucf101":  # 606 sentences at 77 positions would take 25 GB
        del ways["straightforward"], ways["images encoded once"]
    if size == "eurosat":
        coop = Setting(size, device, groups=[["a photo of a {}."]])
        text = partial(coop.one_a_row, clips_own, 77)
        step = partial(coop.step, lambda weights: text(), losses=())
        ways["CoOp, one prompt, 77 positions, images encoded once"] = step, len(coop.eot) * 77
    result = compare(ways, repeats, device)
    first = next(iter(result.values()))["seconds"]
    rows = []
    for name, (_, tokens) in ways.items():
        row = result[name]
        row["tokens"] = tokens
        if "CoOp" not in name:
            call = f"memory({size!r}, {name!r}, {device.type!r})"
            row["added_bytes"] = in_fresh_process(call)["added_bytes"]
        rows.append(
            [
                name,
                f"{1000 * row['seconds']:,.0f}",
                f"{first / row['seconds']:.1f} x",
                f"{tokens:,}",
                f"{row['operations'] / 1e9:,.1f}",
                f"{100 * row['plain_seconds'] / row['seconds']:.0f} %",
                f"{row['added_bytes'] / 1e6:,.0f}" if "added_bytes" in row else "",
            ]
        )
    columns = "a step", "ms", "faster", "text tokens", "GFLOP", "of plain rate", "adds MB"
    print(f"\n{size}: {' x '.join(map(str, setting.model.prompts.shape))} sentences\n")
    print(markdown(columns, rows))
    plain, shared = result["attention in one kernel"], result["shared beginnings"]
    saved = plain["tokens"] / shared["tokens"]
    real = (setting.model.prompts.rows.sentence > -2).sum().item()
    print(
        f"\nshared beginnings: {plain['seconds'] / shared['seconds']:.2f} x faster with"
        f" {saved:.2f} x fewer tokens; {real / shared['tokens']:.0%} of the places in rows are used"
    )
    return result


def processes_table(repeats):
    """One process with one thread against two with one thread each, in turn."""
    times = {1: [], 2: []}
    for _ in range(repeats):
        for n in times:
            times[n].append(in_fresh_process("time_steps('ucf101', 3)", processes=n))
    one, two = (statistics.median(times[n]) for n in times)
    print("\nucf101, one thread a process\n")
    rows = [[1, f"{1000 * one:,.0f}", ""], [2, f"{1000 * two:,.0f}", f"{one / two:.2f} x"]]
    print(markdown(("processes", "ms", "faster"), rows))
    return {"1": one, "2": two}


def imagenet_table(device):
    """One step of 20 prompts x 1,000 classes, in a fresh process."""
    result = in_fresh_process(
        f"memory('imagenet', 'shared beginnings', {device.type!r}, n_classes=1000)"
    )
    epoch = result["seconds"] * 16 * 1000 / BATCH
    print("\nimagenet: 20 x 1000 sentences, batch of 32, in chunks\n")
    row = f"{result['seconds']:,.1f}", f"{epoch / 3600:,.1f}", f"{result['bytes'] / 1e9:.1f}"
    print(markdown(("seconds a step", "hours an epoch of 16 shots", "GB in all"), [row]))
    return result


def growth(repeats, device, picture):
    """The time of a step against the number of classes and of prompts, and its picture."""
    sizes = [(1, c) for c in (10, 30, 100, 300, 1000)] + [(g, 100) for g in (2, 5, 10, 20)]
    settings = [Setting("imagenet", device, [["a photo of a {}."]] * g, c) for g, c in sizes]
    for setting in settings:
        setting.clip = settings[0].clip  # one is enough
    times = [[] for _ in sizes]
    for _ in range(repeats):
        for setting, own_times in zip(settings, times):
            own_times.append(seconds(lambda s=setting: s.step(lambda weights: s.shared())))
    rows = [
        {"prompts": g, "classes": c, "seconds": statistics.median(own_times)}
        for (g, c), own_times in zip(sizes, times)
    ]
    plots.cost_picture(rows, encoder.CHUNK, picture)
    print(f"\ngrowth: see {picture}\n")
    cells = [(r["prompts"], r["classes"], f"{1000 * r['seconds']:,.0f}") for r in rows]
    print(markdown(("prompts", "classes", "ms a step"), cells))
    return rows


def run():
    parser = Parser(description=__doc__.split("\n")[0])
    tables = "shapes", "eurosat", "ucf101", "processes", "imagenet", "growth"
    parser.add_argument("tables", nargs="*", help=f"which (default: all of {', '.join(tables)})")
    parser.add_argument("--repeats", type=number(int, 1), default=3, help="default: 3")
    parser.add_argument("--device", help="cpu, cuda, ... (default: cuda if there is one)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="writes all figures there")
    picture = Path("assets", "cost.png")
    parser.add_argument("--picture", type=Path, default=picture, help=f"default: {picture}")
    args = parser.parse_args()
    unknown = set(args.tables) - set(tables)
    if unknown:
        parser.error(f"no table {unknown.pop()!r}: {', '.join(tables)}")
    for file in filter(None, (args.json, args.picture)):
        if not file.absolute().parent.is_dir():
            parser.error(f"there is no folder for {file}")
    device = choose_device(args.device)
    figures = {
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "repeats": args.repeats,
    }
    print(", ".join(f"{key} {value}" for key, value in figures.items()))
    for name in args.tables or tables:
        if name == "processes":
            figures[name] = processes_table(args.repeats)
        elif name == "imagenet":
            figures[name] = imagenet_table(device)
        elif name == "growth":
            figures[name] = growth(args.repeats, device, args.picture)
        else:
            figures[name] = steps_table(name, args.repeats, device)
        if args.json:
            args.json.write_text(json.dumps(figures, indent=1) + "\n")


def main():
    exit_on_bad_input(run)


if __name__ == "__main__":
    main()
