"""CLIP's image encoder: a vision transformer computed by lib/transformer.py, or a ResNet as it is.

    (B, 3, 224, 224) -> patches and a class token (B, L, W) -> blocks -> the class token (B, D)

Only the class token is read at the end. So the last block computes keys and values for all
places, and all the rest for this one.
"""

import torch

from lib.errors import BadInput
from lib.transformer import blocks_of


def encode_images(clip_model, pixels, dtype):
    """Image features, not normalised, of `images.as_clip_reads`: (B, 3, H, W) -> (B, D).

    dtype: of the matrix products.
    """
    visual = clip_model.visual
    if not is_transformer(clip_model):
        with torch.autocast(pixels.device.type, dtype, enabled=dtype != torch.float32):
            return visual(pixels).float()
    patches = visual.conv1(pixels).flatten(2).transpose(1, 2)  # (B, L - 1, W)
    token = visual.class_embedding.expand(len(pixels), 1, -1)
    x = visual.ln_pre(torch.cat([token, patches], dim=1) + visual.positional_embedding)
    *blocks, last = blocks_of(visual.transformer, dtype)
    for block in blocks:
        mixed = block.attend(*block.queries_keys_values(x).chunk(3, dim=-1))
        x = block.rest(x, mixed)
    return visual.ln_post(last.first_places(x)) @ visual.proj


def is_transformer(clip_model):
    return hasattr(clip_model.visual, "transformer")


def learnable_layer_norms(clip_model):
    """The LayerNorms of the image encoder's blocks, unfrozen. Raises BadInput for a ResNet."""
    if not is_transformer(clip_model):
        raise BadInput("--tune-visual-ln needs a CLIP with a ViT: this one has none")
    blocks = clip_model.visual.transformer.resblocks
    norms = [norm for block in blocks for norm in (block.ln_1, block.ln_2)]
    return torch.nn.ModuleList(norms).requires_grad_(True)
