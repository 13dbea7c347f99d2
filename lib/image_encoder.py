"""CLIP's image encoder: a vision transformer computed by lib/transformer.py, or a ResNet as it is.

    (B, 3, 224, 224) -> patches and a class token (B, L, W) -> blocks -> the class token (B, D)

Only the class token is read at the end. So the last block computes keys and values for all
places, and all the rest for this one.
"""

import torch
import torch.nn as nn

from lib.errors import BadInput
from lib.transformer import blocks_of

SIDES = "frozen", "layer-norms", "prompts"
N_PROMPTS = 4


def encode_images(clip_model, pixels, dtype):
    """Image features, not normalised, of `images.as_clip_reads`: (B, 3, H, W) -> (B, D).

    dtype: of the products in the blocks.
    """
    visual = clip_model.visual
    if not hasattr(visual, "transformer"):
        with torch.autocast(pixels.device.type, dtype, enabled=dtype != torch.float32):
            return visual(pixels).float()
    patches = visual.conv1(pixels).flatten(2).transpose(1, 2)  # (B, L - 1, W)
    token = visual.class_embedding.expand(len(pixels), 1, -1)
    x = torch.cat([token, patches], dim=1) + visual.positional_embedding  # (B, L, W)
    if hasattr(visual, "prompts"):
        x = torch.cat([x, visual.prompts.expand(len(x), -1, -1)], dim=1)
    x = visual.ln_pre(x)
    *blocks, last = blocks_of(visual.transformer, dtype)
    for block in blocks:
        mixed = block.attend(*block.queries_keys_values(x).chunk(3, dim=-1))
        x = block.after_attention(x, mixed)
    return visual.ln_post(last.first_places(x)) @ visual.proj


def learnable_part(clip_model, side):
    """What `--image-side` learns in the image encoder, a module; None for `frozen`. The encoder
    does not use it before `attach`.

    side: `layer-norms`, those of the blocks, as MoCoOp's and LASP's published runs do; or
    `prompts`: N_PROMPTS tokens that join an image's patches before the first block (visual prompt
    tuning, shallow, arXiv 2203.12119). Raises BadInput for a ResNet, which has neither.
    """
    if side == "frozen":
        return None
    visual = clip_model.visual
    if not hasattr(visual, "transformer"):
        raise BadInput(f"--image-side {side} needs a CLIP with a ViT: this one has none")
    if side == "prompts":
        width = visual.class_embedding.shape[0]
        return nn.ParameterList([nn.Parameter(0.02 * torch.randn(N_PROMPTS, width))])
    norms = [norm for block in visual.transformer.resblocks for norm in (block.ln_1, block.ln_2)]
    return nn.ModuleList(norms).requires_grad_(True)


def attach(clip_model, part):
    """Makes a `learnable_part` one of the encoder's own. LayerNorms are from the start."""
    if isinstance(part, nn.ParameterList):
        clip_model.visual.prompts = part[0]
