"""What a training step costs, and what each idea saves (docs/SPEED.md).

    python -m tools.bench                        # every table: about half an hour on two cores
    python -m tools.bench eurosat --repeats 9    # one of them
    OMP_NUM_THREADS=1 torchrun --nproc_per_node 2 -m tools.bench ucf101     # our step, split

The first four tables compare ways to compute the same step, each with one more idea than the last.
They run in one process, in turn, so that a busy machine slows all of them alike; times are
medians. Memory is what a step adds to the loaded model, in a fresh process per row. Except for
`shapes`, CLIP is a ViT-B/16 with random weights, because speed does not depend on them.
"""

import collections
import functools
import multiprocessing
import random
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest import mock

import clip
import torch
import torch.nn as nn
import torch.nn.functional as F
from clip.model import CLIP
from torch.utils._python_dispatch import TorchDispatchMode

from lib import fast_text, parallel, world
from lib.catalogue import template_groups
from lib.clip_model import load_clip
from lib.errors import exit_on_bad_input
from lib.fast_clip import Block, blocks_of, encode_images
from lib.fast_text import FastTextEncoder
from lib.results import markdown
from lib.settings import Parser, at_least
from prompts import EOT, SoftPrompts, TextEncoder, hard_text
from train import MoCoOp, compute_losses, default_config

BATCH = 32
LAUNCH = 6e-6  # minimum seconds from one kernel to the next on a GPU
RATE = 300e12  # operations per second in half precision, well below a data-centre GPU's
EUROSAT = """Annual Crop Land,Forest,Herbaceous Vegetation Land,Highway or Road,
    Industrial Buildings,Pasture Land,Permanent Crop Land,Residential Buildings,River,Sea or Lake"""
NAME_LENGTHS = [1] * 18 + [2] * 58 + [3] * 23 + [4, 5]  # in tokens, of UCF101's 101 names
VITS = {  # width, layers, patch size, images at a time
    "ViT-B/32": (768, 12, 32, 32),
    "ViT-B/16": (768, 12, 16, 32),
    "ViT-L/14": (1024, 24, 14, 8),
}

# ---------------------------------------------------------------- text encoders, from slow to fast


class AllPositions(TextEncoder):
    """`clip`'s own way, which computes all 77 positions, including those after EOT."""

    def __init__(self, clip_model, sentences):
        super().__init__(clip_model, sentences)
        after_eot = clip_model.context_length - self.tokens.shape[1]
        self.tokens = F.pad(self.tokens, (0, after_eot), value=EOT)


@functools.cache
def blocks_with_quick_gelu(transformer, dtype):
    """As `blocks_of`, with QuickGELU as `clip` computes it."""
    blocks = [Block(block, dtype, factor=1.0) for block in transformer.resblocks]
    for block in blocks:
        block.activation = clip.model.QuickGELU()
    return blocks


class EachNodeOnce(FastTextEncoder):
    """Our encoder, but with `clip`'s QuickGELU."""

    def __call__(self, vectors=None):
        with mock.patch.object(fast_text, "blocks_of", blocks_with_quick_gelu):
            return super().__call__(vectors)


class SharedBeginnings(EachNodeOnce):
    """Computes every node of every row, including padding and nodes that are in several rows."""

    def __init__(self, clip_model, sentences):
        super().__init__(clip_model, sentences)
        self.batches = [whole_rows(batch) for batch in self.batches]


def whole_rows(piece):
    every = torch.arange(piece.rows.numel(), device=piece.rows.device)
    return replace(
        piece,
        token=piece.token[piece.rows].flatten(),
        position=piece.position[piece.rows].flatten(),
        rows=every.view(piece.rows.shape),
        first=every,
        ends=piece.first[piece.ends],
    )


class OneKernel(SharedBeginnings):
    """One tree, and so one row, per sentence: nothing is shared."""

    def __init__(self, clip_model, sentences):
        super().__init__(clip_model, [[ids] for prompt in sentences for ids in prompt])
        self.shape = len(sentences), len(sentences[0])


STEPS = {  # name: text encoder, method, whether images are encoded in the step
    "straightforward": (AllPositions, "mocoop", True),
    "images encoded once": (AllPositions, "mocoop", False),
    "stop at EOT": (TextEncoder, "mocoop", False),
    "attention in one kernel": (OneKernel, "mocoop", False),
    "shared beginnings": (SharedBeginnings, "mocoop", False),
    "each node once": (EachNodeOnce, "mocoop", False),
    "QuickGELU as silu": (FastTextEncoder, "mocoop", False),
    "CoOp, one prompt, 77 positions, images encoded once": (AllPositions, "coop", False),
}
OURS = ["QuickGELU as silu"]
SIZES = {
    "shapes": list(STEPS),
    "eurosat": list(STEPS),
    "ucf101": list(STEPS)[2:-1],  # 606 sentences at 77 positions would take 25 GB
    "imagenet": OURS,
}

# ------------------------------------------------------------------------------------------ a step


def class_names(size):
    """The names of a dataset; for the larger ones, random words with as many tokens."""
    if size == "shapes":
        return world.SHAPES_CLASSES
    if size == "eurosat":
        return [name.strip() for name in EUROSAT.split(",")]
    rng = random.Random(0)
    vocabulary = clip.simple_tokenizer.SimpleTokenizer().encoder
    words = [w[:-4] for w in vocabulary if w.endswith("</w>") and w[:-4].isalpha() and w.isascii()]
    n_classes = {"ucf101": 101, "imagenet": 1000}[size]
    return [" ".join(rng.choices(words, k=rng.choice(NAME_LENGTHS))) for _ in range(n_classes)]


def clip_of(size, device):
    if size == "shapes":
        return load_clip("bundled", device)[0]
    clip_model = CLIP(512, 224, 12, 768, 16, 77, 49408, 512, 8, 12).float()
    return clip_model.requires_grad_(False).eval().to(device)


class Step:
    """One training step, computed by calling it."""

    def __init__(self, name, size, clip_model, names):
        torch.manual_seed(0)
        encoder, method, self.live = STEPS[name]
        self.clip_model, self.device = clip_model, clip_model.logit_scale.device
        config = default_config(dataset=size, method=method)
        groups = template_groups(size) if method == "mocoop" else [["a photo of a {}."]]
        self.model = MoCoOp(clip_model, groups, names, config)
        templates = self.model.templates
        self.model.prompts = SoftPrompts(clip_model, templates, names, text_encoder=encoder)
        self.model.to(self.device)
        self.optimiser = torch.optim.SGD(
            self.model.parameters(), lr=1e-3, momentum=0.9, fused=self.device.type == "cuda"
        )
        pixels, width = clip_model.visual.input_resolution, clip_model.text_projection.shape[1]
        self.images = torch.randn(BATCH, 3, pixels, pixels, device=self.device)
        self.image_features = F.normalize(torch.randn(BATCH, width, device=self.device), dim=-1)
        self.labels = torch.randint(len(names), (BATCH,), device=self.device)
        hard = torch.randn(len(groups), len(names), width, device=self.device)
        self.hard = hard_text(F.normalize(hard, dim=-1), [group[:1] for group in groups])

    def __call__(self):
        text_features = None  # the fast encoders handle half precision themselves
        f, dtype = self.image_features, parallel.mixed_dtype(self.device)
        with torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32):
            if self.live:
                f = F.normalize(self.clip_model.encode_image(self.images).float(), dim=-1)
            if isinstance(self.model.prompts.encoder, TextEncoder):
                text_features = self.model.text_features().float()
        outputs = self.model(f, text_features=text_features)
        losses = compute_losses(self.model, f, self.labels, outputs, self.hard, slice(None))
        self.optimiser.zero_grad()
        sum(weight * value for weight, value in losses.values()).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimiser.step()

    def n_tokens(self):
        """How many tokens the text encoder computes."""
        encoder = self.model.prompts.encoder
        if isinstance(encoder, TextEncoder):
            return encoder.tokens.numel()
        return sum(len(batch.token) for batch in encoder.batches)


# --------------------------------------------------------------------------------------- measuring


def seconds(action):
    start = time.perf_counter()
    action()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


class Operations(TorchDispatchMode):
    """Counts tensor operations, and the matrix products of the linear layers by shape and dtype:
    {(M, K, N, dtype): count}."""

    def __init__(self):
        super().__init__()
        self.products, self.launches = collections.Counter(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            a, b = args[-2:]
            self.products[(*a.shape, b.shape[1], a.dtype)] += 1
        # Each operation that computes something launches a kernel on a GPU; some launch two.
        free = "empty", "empty_like", "_unsafe_view", "empty_strided", "new_empty"
        self.launches += not func.is_view and func.overloadpacket.__name__ not in free
        return func(*args, **(kwargs or {}))

    def flop(self):
        """Multiplications and additions in the linear layers."""
        return sum(2 * m * k * n * count for (m, k, n, _), count in self.products.items())


def operations_of(step):
    with Operations() as counted:
        step()
    return counted


def products_alone(products, device):
    """A function that computes these matrix products and nothing else."""
    pairs = []
    for (m, k, n, dtype), count in products.items():
        make = partial(torch.randn, device=device, dtype=dtype)
        pairs.append((make(m, k), make(n, k).T, count))

    def compute():
        for a, b, count in pairs:
            for _ in range(count):
                torch.mm(a, b)

    return compute


def in_fresh_process(function, *args):
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def memory(name, size, device):
    """The bytes that a step adds to the process's memory, and the peak of the whole process."""
    step = Step(name, size, clip_of(size, device), class_names(size))
    blocks_of(step.clip_model.transformer, parallel.mixed_dtype(device))  # part of the model
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        peak = torch.cuda.max_memory_allocated()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        before = _status("VmRSS")
        step()
        peak = _status("VmHWM")
    return peak - before, peak


def _status(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


# -------------------------------------------------------------------------------------- the tables


def steps_table(size, repeats, device):
    """Times every way to compute the step of one size; under torchrun, only ours."""
    alone = parallel.world() == 1
    rows = SIZES[size] if alone else OURS
    clip_model, names = clip_of(size, device), class_names(size)
    steps = {row: Step(row, size, clip_model, names) for row in rows}
    counted = {row: operations_of(step) for row, step in steps.items()}
    products = {row: products_alone(counted[row].products, device) for row in rows}
    times, plain_times = collections.defaultdict(list), collections.defaultdict(list)
    for _ in range(repeats):
        for row, step in steps.items():
            if size != "imagenet":  # memory and caches now hold another row's data
                step()
            times[row].append(seconds(step))
            plain_times[row].append(seconds(products[row]))

    columns = "ms", "faster", "text tokens", "GFLOP", "of plain rate", "adds MB", "GB in all"
    table, first = [["a step", *columns]], statistics.median(times[rows[0]])
    for row, step in steps.items():
        took, plain = statistics.median(times[row]), statistics.median(plain_times[row])
        cells = [f"{1000 * took:,.0f}", f"{first / took:.1f} x", f"{step.n_tokens():,}"]
        cells += [f"{counted[row].flop() / 1e9:,.1f}", f"{plain / took:.0%}"]
        if alone:
            added, peak = in_fresh_process(memory, row, size, device)
            cells += [f"{added / 1e6:,.0f}", f"{peak / 1e9:.1f}"]
        table.append([row, *cells])
    print(f"\n{size}: {len(template_groups(size))} x {len(names)} sentences\n")
    print(markdown(table))


def images_table(repeats, device):
    """Times ways to encode the same images, for CLIP's three ViTs."""
    table = [["CLIP", "encoding", "images per second", "faster"]]
    for name, (width, layers, patch, n) in VITS.items():
        ways = image_encoders(width, layers, patch, n, device)
        times = {way: [] for way in ways}
        for _ in range(repeats + 1):  # the first does not count
            for way, encode in ways.items():
                times[way].append(seconds(encode))
        took = {way: statistics.median(times[way][1:]) for way in ways}
        first, *_ = took.values()
        table += [[name, way, f"{n / t:,.1f}", f"{first / t:.2f} x"] for way, t in took.items()]
    print("\nimages\n")
    print(markdown(table))


def image_encoders(width, layers, patch, n, device):
    """{name: a function that encodes n images of 224 pixels}, for a ViT with random weights."""
    clip_model = CLIP(512, 224, layers, width, patch, 77, 10, 512, 8, 1).float()
    clip_model.requires_grad_(False).eval().to(device)
    images = torch.randn(n, 3, 224, 224, device=device)
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    last = blocks_of(clip_model.visual.transformer, dtype)[-1]

    def every_position(x):  # in the last block, too
        mixed = last.attend(*last.queries_keys_values(x).chunk(3, dim=-1))
        return last.after_attention(x, mixed)[:, 0]

    @torch.no_grad()
    def clips_own():
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            clip_model.encode_image(images)

    @torch.no_grad()
    def ours(first_positions):
        last.first_positions = first_positions
        encode_images(clip_model, images, dtype)

    return {
        "clip's own": clips_own,
        "blocks made ready": partial(ours, every_position),
        "class token alone in the last": partial(ours, last.first_positions),
    }


def launches_table():
    """Counts the operations that a step would launch on a GPU, and estimates its time."""
    table = [["a step", "launches", "TFLOP", "ms, estimated"]]
    for size in ("eurosat", "imagenet"):
        # In a single batch, the launches do not depend on the number of classes, and the products
        # are proportional to the tokens, so ten classes are enough.
        clip_model, names = clip_of(size, torch.device("cpu")), class_names(size)
        few, every = (Step(*OURS, size, clip_model, some) for some in (names[:10], names))
        with mock.patch.object(parallel, "mixed_dtype", lambda device: torch.bfloat16):
            few()  # the first call prepares the blocks
            counted = operations_of(few)
        flop = counted.flop() * every.n_tokens() / few.n_tokens()
        took = counted.launches * LAUNCH + flop / RATE
        table.append([size, f"{counted.launches:,}", f"{flop / 1e12:.2f}", f"{1000 * took:,.0f}"])
    print(f"\nlaunches, with {1e6 * LAUNCH:.0f} us for each and {RATE / 1e12:.0f} TFLOP/s\n")
    print(markdown(table))


def run_command_line():
    parser = Parser(__doc__)
    tables = *SIZES, "images", "launches"
    parser.add_argument("tables", nargs="*", help=f"default: all of {', '.join(tables)}")
    parser.add_argument("--repeats", type=at_least(int, 1), default=5, help="timed steps per row")
    parser.add_argument("--device", help="cpu, cuda, ... (default: cuda if there is one)")
    args = parser.parse_args()
    unknown = set(args.tables) - set(tables)
    if unknown:
        parser.error(f"no table {unknown.pop()!r}: {', '.join(tables)}")
    device = parallel.choose_device(args.device)
    parallel.join(device)
    chip = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    threads, n = torch.get_num_threads(), parallel.world()
    print(f"torch {torch.__version__}, {chip}, {threads} threads, {n} processes")
    for name in args.tables or tables:
        if name == "images":
            images_table(args.repeats, device)
        elif name == "launches":
            launches_table()
        else:
            steps_table(name, args.repeats, device)
    parallel.leave()


if __name__ == "__main__":
    exit_on_bad_input(run_command_line)
