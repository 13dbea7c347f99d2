"""The embedded world: coloured shapes drawn in styles, and a thumb-sized CLIP that has seen them.

    python shapes.py              # redraw the world and retrain its CLIP (10 minutes on two cores)
    python shapes.py --sheet FILE # only draw a picture of the world

Everything that prompt learning needs in miniature, without a download: 16 shapes x 10 colours make
160 classes, and every image is drawn in one of eight *styles* (photo, large, small, many, sketch,
pixelated, blurry, dark) that have words in the captions, as CLIP's own training images had. The
CLIP is `clip.model.CLIP` itself with CLIP's tokenizer, only small, trained with CLIP's loss.

The downstream dataset `shapes` is 20 of the classes seen through another camera (a warm tint and
mottled backgrounds that the CLIP never met), in all styles alike. Four shifted test sets stand
for ImageNet's: `shapes_v2` (striped backgrounds), `shapes_sketch` (dashed line drawings),
`shapes_a` (turned, pushed aside, half hidden), `shapes_r` (chalk, hatching, mosaic, cut-outs).

An image is named by a path such as `test/red circle/sketch/003`, and that name seeds its drawing:
the world is the same everywhere, and none of it lies on disk.
"""

import argparse
import colorsys
import hashlib
import math
import multiprocessing
import random
import time
from pathlib import Path

import clip
import numpy as np
import torch
import torch.nn.functional as F
from clip.model import CLIP
from PIL import Image, ImageDraw, ImageFilter
from torchvision.transforms.functional import normalize
from tqdm import tqdm

from backbone import MEAN, STD, TINY_CLIP
from encoder import encode_text
from prompts import TEMPLATE_GROUPS

SOURCE_HASH = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()  # names this way to draw
SIZE = 32  # pixels a side of a finished image
MOTTLE = 0.3  # how deep the downstream backgrounds' blotches are; the CLIP met at most 0.15
FINE = 4  # masks are drawn this many times larger and averaged down: soft edges

# ------------------------------------------------------------------------------- what there is


def _arc(start, stop, radius=1.0, centre=(0.0, 0.0), corners=40):
    """Corners along a circle, angles in degrees, counted from the right: (corners, 2), y up."""
    angle = np.radians(np.linspace(start, stop, corners))
    return radius * np.stack([np.cos(angle), np.sin(angle)], axis=1) + centre


def _polygon(n, first=90.0, radius=1.0):
    return _arc(first, first + 360.0 * (n - 1) / n, radius, corners=n)


def _star(points, inner):
    corners = [_polygon(points), _polygon(points, 90.0 + 180.0 / points, inner)]
    return np.stack(corners, axis=1).reshape(-1, 2)


_T = np.linspace(0.0, 2 * math.pi, 60, endpoint=False)
_HEART = (16 * np.sin(_T) ** 3, 13 * np.cos(_T) - 5 * np.cos(2 * _T) - 2 * np.cos(3 * _T) + 1)
_ARROW = [[-1, 0.3], [0.1, 0.3], [0.1, 0.8], [1, 0], [0.1, -0.8], [0.1, -0.3], [-1, -0.3]]
_CROSS = [[-1, 1], [-1, 3], [1, 3], [1, 1], [3, 1], [3, -1]]  # and the same again, turned round

# name -> outlines in [-1, 1], y up; a second outline is a hole
SHAPES = {
    "circle": [_polygon(60) * 0.9],
    "oval": [_polygon(60) * [1.0, 0.6]],
    "ring": [_polygon(60) * 0.95, _polygon(60) * 0.5],
    "crescent": [np.concatenate([_arc(45, 315), _arc(290, 70, 0.75, (0.45, 0.0))])],
    "semicircle": [_arc(0, 180) - [0.0, 0.45]],
    "square": [_polygon(4, 45.0, 1.15)],
    "rectangle": [np.array([[-1, 0.5], [-1, -0.5], [1, -0.5], [1, 0.5]])],
    "diamond": [_polygon(4) * [0.65, 1.0]],
    "triangle": [_polygon(3, radius=1.1) - [0.0, 0.2]],
    "pentagon": [_polygon(5)],
    "hexagon": [_polygon(6, 0.0)],
    "star": [_star(5, 0.42) * 1.1],
    "cross": [np.array(_CROSS + [[-x, -y] for x, y in _CROSS]) / 3.0],
    "arrow": [np.array(_ARROW)],
    "heart": [np.stack(_HEART, axis=1) / 16.0],
    "teardrop": [np.stack([0.95 * np.sin(_T) * np.sin(_T / 2) ** 1.5, np.cos(_T)], axis=1)],
}

# name -> hue in degrees, saturation, value
COLOURS = {
    "red": (0, 0.85, 0.85),
    "orange": (26, 0.90, 0.95),
    "yellow": (52, 0.85, 0.95),
    "green": (115, 0.70, 0.65),
    "teal": (178, 0.75, 0.60),
    "blue": (222, 0.80, 0.85),
    "purple": (276, 0.65, 0.70),
    "pink": (330, 0.45, 0.95),
    "brown": (24, 0.65, 0.50),
    "gray": (0, 0.04, 0.50),
}

STYLES = ("photo", "large", "small", "many", "sketch", "pixelated", "blurry", "dark")

CLASSES = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]  # 160, the CLIP's world
# The 20 downstream classes: one draw, made before any method was run. Sorted as labels.
DOWNSTREAM = sorted(random.Random("downstream").sample(CLASSES, 20))

# ------------------------------------------------------------------------------------ drawing


def _mask(shape, style, rng, hard):
    """Where the shape is: float (SIZE, SIZE) in [0, 1]."""
    canvas = Image.new("L", (SIZE * FINE, SIZE * FINE))
    pen = ImageDraw.Draw(canvas)
    half = SIZE * FINE / 2
    low, high = {"large": (0.85, 1.0), "small": (0.28, 0.38)}.get(style, (0.5, 0.68))
    drift = 0.06 if style == "large" else 0.18
    x, y = rng.uniform(-drift, drift), rng.uniform(-drift, drift)
    if hard:  # pushed towards an edge
        angle = rng.uniform(0, 2 * math.pi)
        x, y = 0.4 * math.cos(angle), 0.4 * math.sin(angle)
    places = [(x, y, rng.uniform(low, high))]
    if style == "many":  # a jittered 3 x 3 grid with gaps
        grid = [(x, y) for x in (-0.64, 0, 0.64) for y in (-0.64, 0, 0.64)]
        places = [
            (x + rng.uniform(-0.06, 0.06), y + rng.uniform(-0.06, 0.06), rng.uniform(0.24, 0.3))
            for x, y in rng.sample(grid, rng.randint(5, 8))
        ]
    turn = math.radians(rng.uniform(-45, 45) if hard else rng.uniform(-15, 15))
    rotate = np.array([[math.cos(turn), math.sin(turn)], [-math.sin(turn), math.cos(turn)]])
    width = round(FINE * rng.uniform(1.2, 2.0))
    for x, y, scale in places:
        for i, outline in enumerate(SHAPES[shape]):
            points = (outline @ rotate * scale + [x, y]) * [half, -half] + half
            closed = np.concatenate([points, points[:2]])
            if style == "dashed":
                for dash in _dashes(closed):
                    pen.line(dash, fill=255, width=width, joint="curve")
            elif style in ("sketch", "chalk"):
                pen.line([tuple(p) for p in closed], fill=255, width=width, joint="curve")
            else:
                pen.polygon([tuple(p) for p in points], fill=0 if i else 255)
    if style == "hatched":
        rows = np.add.outer(np.arange(SIZE * FINE), np.arange(SIZE * FINE)) // 7 % 2
        canvas = Image.fromarray(np.asarray(canvas) * rows.astype(np.uint8))
    return np.asarray(canvas.resize((SIZE, SIZE), Image.BOX), dtype=np.float32) / 255


def _dashes(points, on=11, gap=6):
    """A line (n, 2) cut into dashes `on` fine pixels long with gaps between them."""
    along = np.insert(np.linalg.norm(np.diff(points, axis=0), axis=1).cumsum(), 0, 0.0)
    at = np.arange(0.0, along[-1])
    x, y = np.interp(at, along, points[:, 0]), np.interp(at, along, points[:, 1])
    starts = range(0, len(at) - 1, on + gap)
    return [list(zip(x[i : i + on], y[i : i + on])) for i in starts]


def _background(style, kind, noise, rng):
    """(SIZE, SIZE, 3) in [0, 1]. kind: plain (what the CLIP was trained on), mottled or striped."""
    tint = 1.0 - 0.10 * noise.random(3)  # a light, faintly coloured surface
    if style in ("sketch", "dashed"):
        level = np.full((SIZE, SIZE), 0.97)  # paper
    elif style in ("chalk", "cutout"):
        level = np.full((SIZE, SIZE), 0.15)
    else:
        slope = np.linspace(-0.5, 0.5, SIZE) * rng.uniform(-0.2, 0.2)
        level = rng.uniform(0.72, 0.95) + np.add.outer(rng.choice((-1, 1)) * slope, slope)
    if kind in ("plain", "mottled"):
        depth = MOTTLE if kind == "mottled" else rng.uniform(0, 0.15)
        spots = Image.fromarray(noise.random((6, 6), dtype=np.float32))
        level = level - depth * np.asarray(spots.resize((SIZE, SIZE), Image.BICUBIC))
    else:
        angle, period = rng.uniform(0, math.pi), rng.uniform(4, 7)
        phase = np.add.outer(np.arange(SIZE) * math.sin(angle), np.arange(SIZE) * math.cos(angle))
        level = level - 0.3 * (phase % period < period / 2)
    return level[..., None] * tint


def draw(colour, shape, style, seed, dataset=None):
    """One image of the world.

    dataset: None for the CLIP's training images, else `shapes` or one of its shifted test sets.
    seed: anything with a stable `str`; the same arguments give the same image.
    Returns a (32, 32) RGB PIL image.
    """
    rng = random.Random(f"{dataset}/{colour} {shape}/{style}/{seed}")
    noise = np.random.default_rng(rng.getrandbits(64))
    hue, saturation, value = COLOURS[colour]
    rgb = colorsys.hsv_to_rgb(
        (hue + rng.uniform(-6, 6)) / 360 % 1.0,
        min(1.0, saturation * rng.uniform(0.85, 1.1)),
        min(1.0, value * rng.uniform(0.9, 1.1)),
    )
    kind = {None: "plain", "shapes_v2": "striped"}.get(dataset, "mottled")
    alpha = _mask(shape, style, rng, hard=dataset == "shapes_a")[..., None]
    image = alpha * np.array(rgb) + (1 - alpha) * _background(style, kind, noise, rng)
    if dataset == "shapes_a":  # a bar hides part of it
        start, thick = rng.randint(6, 20), rng.randint(4, 6)
        bar = image if rng.random() < 0.5 else image.swapaxes(0, 1)
        bar[start : start + thick] = rng.uniform(0.2, 0.9)
    if style == "dark":
        image = image * rng.uniform(0.22, 0.4)
    if dataset:  # the other camera: warm light
        image = image * [1.0, 0.9, 0.75]
    image = image + 0.02 * noise.standard_normal(image.shape)
    image = Image.fromarray((image.clip(0, 1) * 255).round().astype(np.uint8))
    if style in ("pixelated", "mosaic"):
        cells = rng.choice((8, 9, 10))
        image = image.resize((cells, cells), Image.BOX)
        image = image.resize((SIZE, SIZE), Image.NEAREST)
        if style == "mosaic":
            grid = np.arange(SIZE) * cells // SIZE
            seam = np.insert(np.diff(grid) > 0, 0, False)
            image = np.where((seam[:, None] | seam[None])[..., None], 255, np.asarray(image))
            image = Image.fromarray(image.astype(np.uint8))
    elif style == "blurry":
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(1.8, 2.6)))
    return image


# ---------------------------------------------------------------------------------- datasets

# name -> its styles; all but `shapes` are test sets only
DATASETS = {
    "shapes": STYLES,
    "shapes_v2": STYLES,
    "shapes_sketch": ("dashed",),
    "shapes_a": STYLES,
    "shapes_r": ("chalk", "hatched", "mosaic", "cutout"),
}
PER_CLASS = {"train": 64, "val": 24, "test": 120}  # shared equally by the styles


def split(dataset):
    """{"train" | "val" | "test": [(path, label), ...]} of a downstream dataset.

    A path, `test/red circle/sketch/003`, says all there is to know of an image.
    """
    styles = DATASETS[dataset]
    return {
        part: [
            (f"{part}/{name}/{style}/{i:03d}", label)
            for label, name in enumerate(DOWNSTREAM)
            for style in styles
            for i in range(n // len(styles))
            if part == "test" or dataset == "shapes"
        ]
        for part, n in PER_CLASS.items()
    }


def draw_path(dataset, path):
    """The image at a path of `split(dataset)`."""
    part, name, style, i = path.split("/")
    return draw(*name.split(), style, f"{part}/{i}", dataset)


def style_of(path):
    return path.split("/")[2]


# -------------------------------------------------------------------------- training its CLIP

SEED = 0
IMAGES_PER_STYLE = 100  # of each class: 128,000 images in all
BATCH = 256
STEPS = 1500
WARM_UP = 200
LR = 1e-3


def _draw_class(name):
    """Every training image of one class: uint8 (styles, IMAGES_PER_STYLE, 32, 32, 3)."""
    images = [draw(*name.split(), s, i) for s in STYLES for i in range(IMAGES_PER_STYLE)]
    return np.stack(images).reshape(len(STYLES), IMAGES_PER_STYLE, SIZE, SIZE, 3)


def _preprocess(images):
    """uint8 (N, 32, 32, 3) -> what CLIP takes, float (N, 3, 32, 32)."""
    images = images.permute(0, 3, 1, 2).float() / 255
    return normalize(images, MEAN, STD)


def _captions():
    """What may be said of an image: two tables (class, style) -> rows of tokens.

    The first has one sentence a caption. The second says it twice, so that longer prompts find
    their positions trained as well. Tokens are numbered by their place in `token_ids`, the sorted
    list of all that occur: the CLIP gets embeddings for those alone.
    Returns (tables, token_ids).
    """
    groups = dict(zip(STYLES, TEMPLATE_GROUPS["shapes"]))
    tables = [
        {
            (name, style): clip.tokenize(
                [" ".join([t.format(name)] * times) for t in groups[style]]
            )
            for name in CLASSES
            for style in STYLES
        }
        for times in (1, 2)
    ]
    token_ids = torch.cat([rows for table in tables for rows in table.values()]).unique()
    for table in tables:
        length = max(int((rows > 0).sum(dim=1).max()) for rows in table.values())
        for key, rows in table.items():
            table[key] = torch.searchsorted(token_ids, rows[:, :length].contiguous())
    return tables, token_ids


def train_clip():
    """Trains the thumb-sized CLIP with CLIP's own loss and writes `assets/tiny_clip.pt`."""
    torch.manual_seed(SEED)
    rng = random.Random(SEED)
    with multiprocessing.Pool() as pool:
        images = list(tqdm(pool.imap(_draw_class, CLASSES), "drawing", len(CLASSES)))
    images = torch.from_numpy(np.stack(images))  # (classes, styles, IMAGES_PER_STYLE, 32, 32, 3)
    tables, token_ids = _captions()
    longest = max(rows.shape[1] for rows in tables[1].values())

    # 4 + 3 layers, 128 wide; 2 heads, as `clip` takes a text head to be 64 wide.
    model = CLIP(128, SIZE, 4, 128, 8, longest, len(token_ids), 128, 2, 3).train()
    parameters = list(model.parameters())
    optimiser = torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": 0.1},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ],
        lr=LR,
        betas=(0.9, 0.98),
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser,
        lambda step: min(
            (step + 1) / WARM_UP,
            0.5 * (1 + math.cos(math.pi * max(0, step - WARM_UP) / STEPS)),
        ),
    )
    start = time.time()
    for step in range(STEPS):
        table = tables[1 if step % 8 == 0 else 0]
        picks = [
            (
                rng.randrange(len(CLASSES)),
                rng.randrange(len(STYLES)),
                rng.randrange(images.shape[2]),
            )
            for _ in range(BATCH)
        ]
        told = [rng.choice(table[CLASSES[c], STYLES[s]]) for c, s, _ in picks]
        text = torch.stack(told)
        batch = images[tuple(torch.tensor(picks).T)]
        image_features = F.normalize(model.encode_image(_preprocess(batch)), dim=-1)
        embeddings = model.token_embedding(text)
        text_features = F.normalize(encode_text(model, embeddings, text.argmax(-1)), dim=-1)
        logits = model.logit_scale.exp() * image_features @ text_features.T
        # Two images may share one caption; then either is right.
        same = (text[:, None] == text[None]).all(-1).float()
        target = same / same.sum(1, keepdim=True)
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        schedule.step()
        model.logit_scale.data.clamp_(max=math.log(100))
        if step % 100 == 0 or step == STEPS - 1:
            print(
                f"step {step:4d}/{STEPS}  loss {loss:.3f}  {time.time() - start:.0f} s", flush=True
            )

    used = token_ids > 0  # token 0 was padding
    state = {key: value.half() for key, value in model.state_dict().items()}
    state["token_embedding.weight"] = state["token_embedding.weight"][used]
    state["token_ids"] = token_ids[used]
    TINY_CLIP.parent.mkdir(exist_ok=True)
    torch.save(state, TINY_CLIP)
    print(f"saved {TINY_CLIP}: {TINY_CLIP.stat().st_size / 1e6:.1f} MB")


def draw_sheet(path):
    """The README's picture of the world: a row a style, the shifted test sets below."""
    rows = [(None, style) for style in STYLES]
    rows += [(name, style) for name in DATASETS for style in DATASETS[name]]
    rows = [row for row in rows if row[0] not in ("shapes_v2", "shapes_a") or row[1] == "photo"]
    cell, margin = 2 * (SIZE + 2), 130
    sheet = Image.new("RGB", (margin + cell * len(SHAPES), cell * len(rows)), "white")
    pen = ImageDraw.Draw(sheet)
    for y, (dataset, style) in enumerate(rows):
        pen.text((6, y * cell + 14), f"{dataset or 'seen by its CLIP'}\n{style}", fill="black")
        for x, shape in enumerate(SHAPES):
            colour = list(COLOURS)[(x + y) % len(COLOURS)]
            image = draw(colour, shape, style, 0, dataset).resize(
                (2 * SIZE, 2 * SIZE), Image.NEAREST
            )
            sheet.paste(image, (margin + x * cell, y * cell))
    sheet.save(path)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sheet", metavar="FILE", help="only draw a picture of the world")
    args = parser.parse_args()
    if args.sheet:
        draw_sheet(args.sheet)
    else:
        train_clip()


if __name__ == "__main__":
    main()
