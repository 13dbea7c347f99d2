"""Trains the built-in world's CLIP, and draws the picture of the world.

    python -m tools.make_world              # assets/tiny_clip.pt, 10 minutes on two cores
    python -m tools.make_world --sheet FILE # the picture alone

The CLIP is `clip.model.CLIP` itself with CLIP's tokenizer, only small, and it is trained with
CLIP's own loss. Its captions are the hand-written templates of the world's styles.
"""

import argparse
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
from torchvision.transforms.functional import normalize
from tqdm import tqdm

from lib.catalogue import template_groups
from lib.clip_model import MEAN, STD, TINY_CLIP
from lib.files import replacing
from lib.world import CLASSES, COLOURS, DATASETS, SHAPES, SIZE, STYLES, draw
from tools.steps import encode_text

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
    groups = dict(zip(STYLES, template_groups("shapes")))
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
    """Trains the CLIP and writes `assets/tiny_clip.pt`."""
    torch.manual_seed(SEED)
    rng = random.Random(SEED)
    with multiprocessing.Pool() as pool:
        images = list(tqdm(pool.imap(_draw_class, CLASSES), "drawing", len(CLASSES)))
    images = torch.from_numpy(np.stack(images))  # (classes, styles, IMAGES_PER_STYLE, 32, 32, 3)
    tables, token_ids = _captions()
    longest = max(rows.shape[1] for rows in tables[1].values())

    # 4 + 3 layers, 128 wide; 2 heads, as `clip` takes a text head to be 64 wide.
    clip_model = CLIP(128, SIZE, 4, 128, 8, longest, len(token_ids), 128, 2, 3).train()
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
        picks = [
            (
                rng.randrange(len(CLASSES)),
                rng.randrange(len(STYLES)),
                rng.randrange(images.shape[2]),
            )
            for _ in range(BATCH)
        ]
        captions = [rng.choice(table[CLASSES[c], STYLES[s]]) for c, s, _ in picks]
        text = torch.stack(captions)
        batch = images[tuple(torch.tensor(picks).T)]
        image_features = F.normalize(clip_model.encode_image(_preprocess(batch)), dim=-1)
        embeddings = clip_model.token_embedding(text)
        text_features = F.normalize(encode_text(clip_model, embeddings, text.argmax(-1)), dim=-1)
        logits = clip_model.logit_scale.exp() * image_features @ text_features.T
        # Two images may share one caption; then either is right.
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
    with replacing(TINY_CLIP) as scratch:
        torch.save(state, scratch)
    print(f"saved {TINY_CLIP}: {TINY_CLIP.stat().st_size / 1e6:.1f} MB")


def draw_sheet(path):
    """The README's picture of the world: one row per style, the shifted test sets below."""
    rows = [(None, style) for style in STYLES]
    rows += [(name, style) for name in DATASETS for style in DATASETS[name]]
    # Datasets in the styles that the CLIP has seen: one row each, and one for each camera.
    rows = [(name, s) for name, s in rows if not name or s == "photo" or s not in STYLES]
    rows = [row for row in rows if row[0] not in ("shapes_fine", "shapes_many")]
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
