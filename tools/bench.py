"""What a training step costs, and what each way to save bought.

    python -m tools.bench                          # every table: a quarter of an hour
    python -m tools.bench eurosat --repeats 9      # one of them
    python -m tools.bench --json bench.json        # the same for machines

Tables of steps compare ways to take the same one (tools/steps.py) in one process, in turn, so that
a busy machine slows all of them alike; times are medians. Peak memory is that of a fresh process
per row, above the loaded model. `growth` draws assets/cost.png.
"""

import json
import os
import statistics
import subprocess
import sys
from functools import partial
from pathlib import Path
from unittest import mock

import matplotlib.pyplot as plt
import numpy as np
import torch

from lib import processes
from lib.errors import exit_on_bad_input
from lib.flags import Parser, number
from lib.pictures import save_figure
from lib.tables import markdown
from lib.text_encoder import CHUNK
from lib.transformer import blocks_of
from tools.measure import Operations, compare, seconds
from tools.steps import BATCH, VITS, Setting, clips_own, image_ways

LAUNCH = 6e-6  # seconds that a GPU needs at least from one kernel to the next
RATE = 300e12  # operations per second of half precision products, well below a data-centre GPU's

# ------------------------------------------------------------------------------------ measuring


def in_fresh_process(call, n=0):
    """What `bench.<call>` prints, as JSON. n: processes of torchrun, with one thread each."""
    command = [sys.executable, "-c", f"from tools import bench; bench.{call}"]
    environment = dict(os.environ)
    if n:
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--no-python"]
        command = [sys.executable, *torchrun, f"--nproc-per-node={n}", *command]
        environment["OMP_NUM_THREADS"] = "1"
    done = subprocess.run(
        command, env=environment, cwd=Path(__file__).parents[1], capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"bench.{call} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def memory(size, way, device, **kwargs):
    """Prints the bytes that a step adds to what the process has before it, and its seconds."""
    setting = Setting(size, torch.device(device), **kwargs)
    step = setting.ways()[way][0]
    blocks_of(setting.clip_model.transformer, setting.dtype)  # part of the model
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
    processes.join(torch.device("cpu"))
    setting = Setting(size, torch.device("cpu"))
    step = setting.step
    step()
    print(json.dumps(statistics.median(seconds(step) for _ in range(n))))
    processes.leave()


# ----------------------------------------------------------------------------------- the tables


def steps_table(size, repeats, device):
    """Every way to do the step of one size, each with one more idea than the last."""
    setting = Setting(size, device)
    ways = setting.ways()
    if size == "ucf101":  # 606 sentences at 77 positions would take 25 GB
        del ways["straightforward"], ways["images encoded once"]
    if size == "eurosat":
        coop = Setting(size, device, groups=[["a photo of a {}."]])
        step = partial(coop.step, partial(coop.one_a_row, clips_own, 77), losses=())
        ways["CoOp, one prompt, 77 positions, images encoded once"] = step, len(coop.eot) * 77
    result = compare(ways, repeats, device)
    first = next(iter(result.values()))["seconds"]
    rows = []
    for name, (_, tokens) in ways.items():
        row = result[name]
        row["tokens"] = tokens
        if "CoOp" not in name:
            call = f"memory({size!r}, {name!r}, {str(device)!r})"
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
    print(f"\n{size}: {' x '.join(map(str, setting.model.prompts.sentences.shape))} sentences\n")
    print(markdown([columns, *rows]))
    return result


def processes_table(repeats):
    """One process with one thread against two with one thread each, in turn."""
    times = {1: [], 2: []}
    for _ in range(repeats):
        for n in times:
            times[n].append(in_fresh_process("time_steps('ucf101', 3)", n=n))
    one, two = (statistics.median(times[n]) for n in times)
    print("\nucf101, one thread per process\n")
    rows = [[1, f"{1000 * one:,.0f}", ""], [2, f"{1000 * two:,.0f}", f"{one / two:.2f} x"]]
    print(markdown([("processes", "ms", "faster"), *rows]))
    return {"1": one, "2": two}


def imagenet_table(device):
    """One step of 20 prompts x 1,000 classes, in a fresh process."""
    result = in_fresh_process(
        f"memory('imagenet', 'QuickGELU as silu', {str(device)!r}, n_classes=1000)"
    )
    epoch = result["seconds"] * 16 * 1000 / BATCH
    print("\nimagenet: 20 x 1000 sentences, batch of 32, in chunks\n")
    row = f"{result['seconds']:,.1f}", f"{epoch / 3600:,.1f}", f"{result['bytes'] / 1e9:.1f}"
    print(markdown([("seconds per step", "hours per epoch of 16 shots", "GB in all"), row]))
    return result


# What the operations of a step are, by their names.
PARTS = {
    "matrix products": ("addmm", "mm"),
    "attention": ("scaled_dot_product", "flash_attention", "efficient_attention"),
    "QuickGELU": ("silu",),
    "LayerNorm": ("native_layer_norm",),
    "moving places to rows and back": ("index", "scatter", "gather"),
    "copies and zeros": ("copy_", "fill_", "cat", "zero_"),
    "residuals": ("add",),
}


def parts_table(size, repeats, device):
    """Where the time of our step goes, operation by operation: {part: seconds per step}."""
    step = Setting(size, device).step
    step()
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or the profiler says what it does
    with torch.profiler.profile() as profiler:
        took = statistics.median(seconds(step) for _ in range(repeats))
    parts = dict.fromkeys([*PARTS, "all else"], 0.0)
    on_gpu = device.type == "cuda"
    for event in profiler.key_averages():
        if on_gpu and event.device_type == torch.autograd.DeviceType.CUDA:
            continue  # a kernel: its time stands with the operation that launched it
        own = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        own /= 1e6 * repeats
        name = event.key.removeprefix("aten::")
        whose = (p for p, starts in PARTS.items() if name.lstrip("_").startswith(starts))
        parts[next(whose, "all else")] += own
    print(f"\n{size}: where {1000 * took:,.0f} ms go (with the profiler's own part)\n")
    rows = [
        (part, f"{1000 * t:,.1f}", f"{t / sum(parts.values()):.0%}") for part, t in parts.items()
    ]
    print(markdown([("part of a step", "ms", "share"), *rows]))
    return parts


def images_table(repeats, device):
    """Ways to encode the same images, for the three ViTs of CLIP: {model: {way: seconds}}."""
    result, rows = {}, []
    for name, (width, layers, patch, n) in VITS.items():
        ways = image_ways(width, layers, patch, n, device)
        times = {way: [] for way in ways}
        for _ in range(repeats + 1):  # the first does not count
            for way, encode in ways.items():
                times[way].append(seconds(encode) / n)
        result[name] = {way: statistics.median(t[1:]) for way, t in times.items()}
        first, *_ = result[name].values()
        rows += [
            (name, way, f"{1000 * t:,.1f}", f"{first / t:.2f} x") for way, t in result[name].items()
        ]
    print("\nimages\n")
    print(markdown([("CLIP", "encoding", "ms per image", "faster"), *rows]))
    return result


def launches_table():
    """How many operations a step asks a GPU for, counted here, and what that makes of its time."""
    rows, result = [], {}
    for size, n_classes in (("eurosat", 10), ("imagenet", 1000)):
        # In one piece their number does not depend on the classes: ten do, and products in
        # proportion.
        few, all_ = (Setting(size, torch.device("cpu"), n_classes=c) for c in (10, n_classes))
        with mock.patch.object(processes, "mixed_dtype", lambda device: torch.bfloat16):
            few.step()  # the first makes the blocks ready
            with Operations() as counted:
                few.step()
        n, flop = counted.launches, counted.flop * all_.places() / few.places()
        took = n * LAUNCH + flop / RATE
        result[size] = {"launches": n, "flop": flop, "estimated_seconds": took}
        rows.append([size, f"{n:,}", f"{flop / 1e12:.2f}", f"{1000 * took:,.0f}"])
    print(f"\nlaunches, with {1e6 * LAUNCH:.0f} us for each and {RATE / 1e12:.0f} TFLOP/s\n")
    print(markdown([("a step", "launches", "TFLOP", "ms, estimated"), *rows]))
    return result


def growth(repeats, device, picture):
    """The time of a step against the number of classes and of prompts, and its picture."""
    sizes = [(1, c) for c in (10, 30, 100, 300, 1000)] + [(g, 100) for g in (2, 5, 10, 20)]
    clip_model = Setting("imagenet", device, n_classes=1).clip_model  # one for all
    settings = [
        Setting("imagenet", device, [["a photo of a {}."]] * g, c, clip_model) for g, c in sizes
    ]
    times = [[] for _ in sizes]
    for _ in range(repeats):
        for setting, own_times in zip(settings, times):
            own_times.append(seconds(setting.step))
    rows = [
        {"prompts": g, "classes": c, "seconds": statistics.median(own_times)}
        for (g, c), own_times in zip(sizes, times)
    ]
    draw_cost(rows, picture)
    print(f"\ngrowth: see {picture}\n")
    cells = [(r["prompts"], r["classes"], f"{1000 * r['seconds']:,.0f}") for r in rows]
    print(markdown([("prompts", "classes", "ms per step"), *cells]))
    return rows


def draw_cost(rows, path):
    """Seconds per step against the number of sentences, with the straight line through the first.
    rows: dictionaries of prompts, classes, seconds."""
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    sentences = np.array([row["prompts"] * row["classes"] for row in rows])
    times = np.array([row["seconds"] for row in rows])
    one = np.array([row["prompts"] == 1 for row in rows])
    axes.plot(sentences[one], times[one], "ko", label="1 prompt, 10 to 1,000 classes")
    axes.plot(sentences[~one], times[~one], "k^", mfc="white", label="2 to 20 prompts, 100 classes")
    small = sentences <= CHUNK
    slope = times[small].sum() / sentences[small].sum()
    ends = np.array([sentences.min(), sentences.max()])
    axes.plot(ends, slope * ends, "k-", lw=1, label=f"{1000 * slope:.1f} ms per sentence")
    axes.plot(ends, 1.5 * slope * ends, "k:", lw=1, label="1.5 x that: each is encoded twice")
    axes.axvline(CHUNK, color="grey", lw=1, ls="--")
    axes.text(CHUNK, times.min(), f"in pieces above {CHUNK:,} ", color="grey", ha="right")
    axes.set(xscale="log", yscale="log", xlabel="sentences: prompts x classes", ylabel="step (s)")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.legend(frameon=False)
    save_figure(figure, path)


def run_command_line():
    parser = Parser(description=__doc__.split("\n")[0])
    sizes = "shapes", "eurosat", "ucf101"
    tables = *sizes, "parts", "images", "launches", "processes", "imagenet", "growth"
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
    device = processes.choose_device(args.device)
    figures = {
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "repeats": args.repeats,
    }
    print(", ".join(f"{key} {value}" for key, value in figures.items()))
    for name in args.tables or tables:
        if name == "parts":
            figures[name] = {s: parts_table(s, args.repeats, device) for s in sizes}
        elif name == "images":
            figures[name] = images_table(args.repeats, device)
        elif name == "launches":
            figures[name] = launches_table()
        elif name == "processes":
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
    exit_on_bad_input(run_command_line)


if __name__ == "__main__":
    main()
