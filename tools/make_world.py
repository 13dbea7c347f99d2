"""Trains the built-in world's CLIP, and draws the picture of the world.

    python -m tools.make_world              # assets/tiny_clip.pt, 20 minutes on two cores
    python -m tools.make_world --sheet FILE # only the picture

The model is a small `clip.model.CLIP` with CLIP's tokenizer, trained with CLIP's own loss. Its
captions are the hand-written templates of the world's styles.
"""

import lib.start  # noqa: F401  # isort: skip, before PyTorch

import math
import multiprocessing
import random
import time

import clip
import numpy as np
import torch
import torch.nn.functional as F
from clip.model import CLIP
from PIL import Image, ImageDraw
from tqdm import tqdm

from lib.catalogue import template_groups
from lib.clip_model import TINY_CLIP
from lib.features import as_clip_reads
from lib.files import save_torch
from lib.settings import Parser
from lib.world import CLASSES, COLOURS, DATASETS, SHAPES, SIZE, STYLES, draw

SEED = 0
IMAGES_PER_STYLE = 100  # per class: 128,000 images in all
BATCH = 256
STEPS = 1500
WARM_UP = 200
LR = 1e-3


def _draw_class(name):
    """Every training image of one class: uint8 (styles, IMAGES_PER_STYLE, 32, 32, 3)."""
    images = [draw(*name.split(), s, i) for s in STYLES for i in range(IMAGES_PER_STYLE)]
    return np.stack(images).reshape(len(STYLES), IMAGES_PER_STYLE, SIZE, SIZE, 3)


def _captions():
    """The possible captions of an image: two tables {(class, style): rows of tokens}.

    The first has one sentence per caption. The second repeats it, so that the positions of longer
    prompts are trained, too. Tokens are numbered by their position in `token_ids`, the sorted list
    of all that occur: the CLIP only has embeddings for these.
    Returns (tables, token_ids).
    """
    groups = dict(zip(STYLES, template_groups("shapes")))
    tables = [
        {
            (name, style): clip.tokenize([" ".join([t.format(name)] * n) for t in groups[style]])
            for name in CLASSES
            for style in STYLES
        }
        for n in (1, 2)
    ]
    every = torch.cat([rows for table in tables for rows in table.values()])
    token_ids, length = every.unique(), int((every > 0).sum(dim=1).max())
    for table in tables:
        for key, rows in table.items():
            table[key] = torch.searchsorted(token_ids, rows[:, :length].contiguous())
    return tables, token_ids


def train_clip():
    """Trains the CLIP and writes `assets/tiny_clip.pt`."""
    torch.manual_seed(SEED)
    rng = random.Random(SEED)
    with multiprocessing.Pool() as pool:
        images = list(tqdm(pool.imap(_draw_class, CLASSES), "drawing", len(CLASSES)))
    images = torch.from_numpy(np.stack(images))  # (classes, styles, IMAGES_PER_STYLE, 32, 32, 3)
    tables, token_ids = _captions()
    length = tables[0][CLASSES[0], STYLES[0]].shape[1]

    # 4 + 3 layers, 128 wide; 2 heads, because `clip` assumes that a text head is 64 wide.
    clip_model = CLIP(128, SIZE, 4, 128, 8, length, len(token_ids), 128, 2, 3).train()
    parameters = list(clip_model.parameters())
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
        picks = [tuple(map(rng.randrange, images.shape[:3])) for _ in range(BATCH)]
        text = torch.stack([rng.choice(table[CLASSES[c], STYLES[s]]) for c, s, _ in picks])
        batch = images[tuple(torch.tensor(picks).T)].permute(0, 3, 1, 2)
        logits, _ = clip_model(as_clip_reads(list(batch), "cpu"), text)
        # Two images may have the same caption; then either is right.
        same = (text[:, None] == text[None]).all(-1).float()
        target = same / same.sum(1, keepdim=True)
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        schedule.step()
        clip_model.logit_scale.data.clamp_(max=math.log(100))
        if step % 100 == 0 or step == STEPS - 1:
            print(
                f"step {step:4d}/{STEPS}  loss {loss:.3f}  {time.time() - start:.0f} s", flush=True
            )

    used = token_ids > 0  # token 0 was padding
    state = {key: value.half() for key, value in clip_model.state_dict().items()}
    state["token_embedding.weight"] = state["token_embedding.weight"][used]
    state["token_ids"] = token_ids[used]
    save_torch(state, TINY_CLIP)
    print(f"saved {TINY_CLIP}: {TINY_CLIP.stat().st_size / 1e6:.1f} MB")


def draw_sheet(path):
    """Draws the picture of docs/RESULTS.md: one row per style, the shifted test sets below."""
    rows = [(None, style) for style in STYLES]
    rows += [("shapes", "photo"), ("shapes_cold", "photo"), ("shapes_v2", "photo")]
    rows += [("shapes_sketch", "dashed"), ("shapes_a", "photo")]
    rows += [("shapes_r", style) for style in DATASETS["shapes_r"]]
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
    parser = Parser(__doc__)
    parser.add_argument("--sheet", metavar="FILE", help="only draw a picture of the world")
    args = parser.parse_args()
    if args.sheet:
        draw_sheet(args.sheet)
    else:
        train_clip()


if __name__ == "__main__":
    main()
