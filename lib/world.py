"""The built-in world: coloured shapes drawn in styles, in place of a dataset on disk.

Everything that prompt learning needs in miniature, without a download: 16 shapes x 10 colours make
160 classes, and every image is drawn in one of eight *styles* (photo, large, small, many, sketch,
pixelated, blurry, dark) that have words in the templates, as styles of photos have in captions. Its
CLIP was trained on all 160 classes (`python -m tools.make_world`).

The few-shot dataset `shapes` is 20 of the classes seen through another camera (a warm tint and
mottled backgrounds that the CLIP never saw), in all styles alike. Three more tasks: `shapes_fine`
(20 classes that share their shapes and colours), `shapes_many` (40 classes), `shapes_cold` (20
others through a worse camera: cold light, low contrast, noise, tiled backgrounds).

Four shifted test sets of `shapes` stand in for ImageNet's: `shapes_v2` (striped backgrounds),
`shapes_sketch` (dashed line drawings), `shapes_a` (rotated, off-centre, half hidden), `shapes_r`
(chalk, hatching, mosaic, cut-outs).

An image is named by a path such as `test/red circle/sketch/003`, and that name seeds its drawing:
the world is the same everywhere, and none of it is stored.
"""

import colorsys
import hashlib
import math
import random
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

SOURCE_HASH = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()  # identifies this way to draw
SIZE = 32  # width and height of an image in pixels
MOTTLE = 0.3  # how deep the downstream backgrounds' blotches are; the CLIP saw at most 0.15
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
_CROSS = [[-1, 1], [-1, 3], [1, 3], [1, 1], [3, 1], [3, -1]]  # and again, rotated by 180°

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


def _sample(seed, names, n):
    return sorted(random.Random(seed).sample(list(names), n))


# The classes of each task, sorted as labels: one draw each, made before any method was run on it.
SHAPES_CLASSES = _sample("downstream", CLASSES, 20)
TASKS = {
    "shapes": SHAPES_CLASSES,
    "shapes_fine": [
        f"{c} {s}" for c in _sample("fine", COLOURS, 5) for s in _sample("fine", SHAPES, 4)
    ],
    "shapes_many": _sample("many", CLASSES, 40),
    "shapes_cold": _sample("cold", [name for name in CLASSES if name not in SHAPES_CLASSES], 20),
}

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
    """(SIZE, SIZE, 3) in [0, 1]. kind: plain (what the CLIP was trained on), mottled, striped or
    tiled."""
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
    elif kind == "tiled":
        period, first = rng.randint(7, 10), rng.randint(0, 6)
        joint = (np.arange(SIZE) + first) % period == 0
        level = level - 0.3 * (joint[:, None] | joint)
    else:
        angle, period = rng.uniform(0, math.pi), rng.uniform(4, 7)
        phase = np.add.outer(np.arange(SIZE) * math.sin(angle), np.arange(SIZE) * math.cos(angle))
        level = level - 0.3 * (phase % period < period / 2)
    return level[..., None] * tint


def draw(colour, shape, style, seed, dataset=None):
    """One image of the world.

    dataset: None for the CLIP's training images, else a name of DATASETS.
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
    kinds = {None: "plain", "shapes_v2": "striped", "shapes_cold": "tiled"}
    kind, cold = kinds.get(dataset, "mottled"), dataset == "shapes_cold"
    alpha = _mask(shape, style, rng, hard=dataset == "shapes_a")[..., None]
    image = alpha * np.array(rgb) + (1 - alpha) * _background(style, kind, noise, rng)
    if dataset == "shapes_a":  # a bar hides part of it
        start, thick = rng.randint(6, 20), rng.randint(4, 6)
        bar = image if rng.random() < 0.5 else image.swapaxes(0, 1)
        bar[start : start + thick] = rng.uniform(0.2, 0.9)
    if style == "dark":
        image = image * rng.uniform(0.22, 0.4)
    if cold:
        image = 0.15 + 0.6 * image * [0.75, 0.9, 1.0]
    elif dataset:  # the other camera: warm light
        image = image * [1.0, 0.9, 0.75]
    image = image + (0.05 if cold else 0.02) * noise.standard_normal(image.shape)
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

# name -> its styles; those that are not tasks are test sets only
DATASETS = {
    **dict.fromkeys(TASKS, STYLES),
    "shapes_v2": STYLES,
    "shapes_sketch": ("dashed",),
    "shapes_a": STYLES,
    "shapes_r": ("chalk", "hatched", "mosaic", "cutout"),
}
PER_CLASS = {"train": 64, "val": 24, "test": 120}  # divided equally among the styles


def class_names(dataset):
    return TASKS.get(dataset, SHAPES_CLASSES)


def lists(dataset):
    """{"train" | "val" | "test": [(path, label), ...]} of a dataset.

    A path, `test/red circle/sketch/003`, is all it takes to draw an image.
    """
    styles = DATASETS[dataset]
    return {
        part: [
            (f"{part}/{name}/{style}/{i:03d}", label)
            for label, name in enumerate(class_names(dataset))
            for style in styles
            for i in range(n // len(styles))
            if part == "test" or dataset in TASKS
        ]
        for part, n in PER_CLASS.items()
    }


def draw_path(dataset, path):
    """The PIL image at a path of `lists(dataset)`."""
    part, name, style, i = path.split("/")
    return draw(*name.split(), style, f"{part}/{i}", dataset)


def style_of(path):
    """The style that an image was drawn in, by its path."""
    return path.split("/")[2]
