"""What a training step costs (docs/SPEED.md).

    python -m tools.bench                        # every table, about ten minutes on two cores
    python -m tools.bench eurosat --repeats 9    # one of them

Three tables compare ways to compute the same step, at the sizes of three datasets:

    straightforward   CLIP's own way: every sentence alone, at all 77 positions, also those after
                      EOT, and the images encoded in the step
    plain             `prompts.TextEncoder`, with cached image features
    fast              `lib.fast_text.FastTextEncoder`, with cached image features

The last one compares CLIP's own image encoder and `lib.fast_clip.encode_images`. The rows run in
turn in one process, so that a busy machine slows all of them alike; times are medians. The last
column is the time of a row's matrix products alone, divided by the time of the row. Except for
`shapes`, CLIP is a ViT-B/16 with random weights, because speed does not depend on them.
"""

import lib.start  # noqa: F401  # isort: skip, before PyTorch

import time

import torch
import torch.nn.functional as F
from clip.model import CLIP
from torch.utils._python_dispatch import TorchDispatchMode

from lib import parallel
from lib.catalogue import all_templates, template_groups
from lib.clip_model import load_clip
from lib.errors import exit_on_bad_input
from lib.fast_clip import encode_images
from lib.settings import Parser, at_least
from lib.world import SHAPES_CLASSES
from prompts import EOT, hard_text, template_features
from train import compute_losses, default_config, make_model

BATCH = 32
STEPS = ["straightforward", "plain", "fast"]
ROWS = {
    "shapes": STEPS,
    "eurosat": STEPS,
    "ucf101": STEPS[1:],  # 606 sentences at 77 positions would take 25 GB
    "images": ["clip's own", "fast"],
}
NAMES = {  # separated by commas; CLIP ignores white space around a name
    "shapes": ",".join(SHAPES_CLASSES),
    "eurosat": """Annual Crop Land,Forest,Herbaceous Vegetation Land,Highway or Road,
        Industrial Buildings,Pasture Land,Permanent Crop Land,Residential Buildings,River,
        Sea or Lake""",
    "ucf101": """Apply Eye Makeup,Apply Lipstick,Archery,Baby Crawling,Balance Beam,Band Marching,
        Baseball Pitch,Basketball,Basketball Dunk,Bench Press,Biking,Billiards,Blow Dry Hair,
        Blowing Candles,Body Weight Squats,Bowling,Boxing Punching Bag,Boxing Speed Bag,
        Breast Stroke,Brushing Teeth,Clean And Jerk,Cliff Diving,Cricket Bowling,Cricket Shot,
        Cutting In Kitchen,Diving,Drumming,Fencing,Field Hockey Penalty,Floor Gymnastics,
        Frisbee Catch,Front Crawl,Golf Swing,Haircut,Hammering,Hammer Throw,Handstand Pushups,
        Handstand Walking,Head Massage,High Jump,Horse Race,Horse Riding,Hula Hoop,Ice Dancing,
        Javelin Throw,Juggling Balls,Jumping Jack,Jump Rope,Kayaking,Knitting,Long Jump,Lunges,
        Military Parade,Mixing,Mopping Floor,Nunchucks,Parallel Bars,Pizza Tossing,Playing Cello,
        Playing Daf,Playing Dhol,Playing Flute,Playing Guitar,Playing Piano,Playing Sitar,
        Playing Tabla,Playing Violin,Pole Vault,Pommel Horse,Pull Ups,Punch,Push Ups,Rafting,
        Rock Climbing Indoor,Rope Climbing,Rowing,Salsa Spin,Shaving Beard,Shotput,Skate Boarding,
        Skiing,Skijet,Sky Diving,Soccer Juggling,Soccer Penalty,Still Rings,Sumo Wrestling,Surfing,
        Swing,Table Tennis Shot,Tai Chi,Tennis Swing,Throw Discus,Trampoline Jumping,Typing,
        Uneven Bars,Volleyball Spiking,Walking With Dog,Wall Pushups,Writing On Board,Yo Yo""",
}

# -------------------------------------------------------------------------------- what is measured


def clip_of(table, device):
    if table == "shapes":
        return load_clip("bundled", device)[0]
    clip_model = CLIP(512, 224, 12, 768, 16, 77, 49408, 512, 8, 12)
    return clip_model.requires_grad_(False).to(device)


def make_action(row, table, clip_model, images):
    """A function that does what a row of a table says with these images, (B, 3, H, W).

    It returns their features (B, D), or the losses of a training step, {name: (weight, value)}.
    """
    # On a GPU every row computes in half precision. The fast encoders see to it themselves.
    half = torch.autocast("cuda", enabled=images.is_cuda and row != "fast")

    def encode():
        if row == "fast":
            return encode_images(clip_model, images, parallel.mixed_dtype(images.device))
        return clip_model.encode_image(images)

    if table == "images":
        return half(encode)
    torch.manual_seed(0)
    names, groups = NAMES[table].split(","), template_groups(table)
    config = default_config(dataset=table, text_encoder="fast" if row == "fast" else "plain")
    model = make_model(clip_model, groups, names, config)
    if row == "straightforward":
        encoder = model.prompts.encoder
        after_eot = clip_model.context_length - encoder.tokens.shape[1]
        encoder.tokens = F.pad(encoder.tokens, (0, after_eot), value=EOT)
    cached = half(encode)()
    labels = torch.arange(BATCH, device=images.device) % len(names)
    hard = hard_text(template_features(clip_model, all_templates(groups), names), groups)
    optimiser = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, fused=images.is_cuda)

    def step():
        with half:
            f = F.normalize(encode() if row == "straightforward" else cached, dim=-1)
            losses = compute_losses(model, f, labels, model(f), hard)
        optimiser.zero_grad()
        sum(weight * value for weight, value in losses.values()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        return losses

    return step


# --------------------------------------------------------------------------------------- measuring


class Products(TorchDispatchMode):
    """The matrix products of an action's linear layers. A call computes them again, on one matrix
    of each shape, and nothing else."""

    def __init__(self, action):
        super().__init__()
        self.matrices, self.pairs = {}, []
        with self:
            action()

    def __torch_dispatch__(self, func, types, args, kwargs):
        if str(func) in ("aten.mm.default", "aten.addmm.default"):
            # To keep all matrices would take gigabytes.
            keep = self.matrices.setdefault
            self.pairs.append([keep((m.shape, m.dtype), m.detach()) for m in args[-2:]])
        return func(*args, **kwargs)

    def __call__(self):
        for left, right in self.pairs:
            torch.mm(left, right)


def seconds(action):
    """The time of the second of two calls: before the first, caches hold another action's data."""
    for _ in range(2):
        start = time.perf_counter()
        action()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    return time.perf_counter() - start


def print_table(table, device, repeats):
    """Measures the rows of a table in turn."""
    clip_model = clip_of(table, device)
    pixels = clip_model.visual.input_resolution
    images = torch.randn(BATCH, 3, pixels, pixels, device=device)
    actions = [make_action(row, table, clip_model, images) for row in ROWS[table]]
    pairs = [(action, Products(action)) for action in actions]
    times = []  # (repeats, rows, 2)
    for _ in range(repeats):
        times.append([[seconds(action) for action in pair] for pair in pairs])
    medians = torch.tensor(times).median(dim=0).values.tolist()
    print(f"\n| {table} | ms | images per second | faster | of the machine's rate |")
    print("| --- | --- | --- | --- | --- |")
    for row, (took, products) in zip(ROWS[table], medians):
        speed = f"{1000 * took:,.1f} | {BATCH / took:,.1f} | {medians[0][0] / took:.1f} x"
        print(f"| {row} | {speed} | {products / took:.0%} |")


def main():
    parser = Parser(__doc__)
    parser.add_argument("tables", nargs="*", choices=ROWS, help="default: all of them")
    parser.add_argument("--repeats", type=at_least(int, 1), default=5, help="timed steps per row")
    parser.add_argument("--device", help="cpu, cuda, ... (default: cuda if there is one)")
    args = parser.parse_args()
    device = parallel.choose_device(args.device)
    print(f"torch {torch.__version__}, {device}, {torch.get_num_threads()} threads")
    for table in args.tables or ROWS:
        print_table(table, device, args.repeats)


if __name__ == "__main__":
    exit_on_bad_input(main)
