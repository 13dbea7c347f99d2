"""Fast versions of the attention blocks that make up both CLIP encoders; the fast image encoder.

A block computes what `clip.model.ResidualAttentionBlock` does, with less work:

- nothing is copied around the attention, and without gradients, residuals are added in place;
- QuickGELU, x * sigmoid(1.702 x), reads and writes the encoder's widest activations three times.
  silu(x) = x * sigmoid(x) does so once, and 1.702 QuickGELU(x) = silu(1.702 x). So the weights
  before it are multiplied by 1.702, and those after it are divided by 1.702;
- on a GPU the weights are rounded to half precision once instead of in every step. The residual
  stream x stays in fp32, and so does LayerNorm.

A block therefore holds copies of most weights, made when it is first used. Changing CLIP's weights
later has no effect on it, except for LayerNorms.

Dimensions: R rows of a batch, L positions in a row, W width of the encoder.
"""

import weakref

import torch
import torch.nn.functional as F

QUICK_GELU = 1.702


class Block:
    """One residual attention block. Its steps take (..., W), only attention takes (R, L, W).

    Raises ValueError if parameters other than the LayerNorms' require gradients.
    """

    def __init__(self, block, dtype):
        """block: a `clip.model.ResidualAttentionBlock`. dtype: of the matrix products."""

        def frozen(layer, names, factor=1.0):
            parameters = [getattr(layer, name) for name in names]
            if any(p.requires_grad for p in parameters):
                raise ValueError(f"{', '.join(names)} of {layer} should be frozen")
            return [p.to(dtype) if factor == 1 else (p * factor).to(dtype) for p in parameters]

        attention, mlp = block.attn, block.mlp
        self.dtype, self.n_heads = dtype, attention.num_heads
        self.norm_1, self.norm_2 = block.ln_1, block.ln_2  # clip's own, as they may be trained
        self.qkv_weight, self.qkv_bias = frozen(attention, ["in_proj_weight", "in_proj_bias"])
        self.out = frozen(attention.out_proj, ["weight", "bias"])
        self.up = frozen(mlp.c_fc, ["weight", "bias"], QUICK_GELU)
        down = mlp.c_proj
        self.down = frozen(down, ["weight"], 1 / QUICK_GELU) + frozen(down, ["bias"])

    def queries_keys_values(self, x):
        """x (..., W) -> q, k, v, each (..., W), in one (..., 3 W)."""
        return F.linear(self.norm_1(x).to(self.dtype), self.qkv_weight, self.qkv_bias)

    def attend(self, q, k, v, mask=None):
        """q (R, Q, W), k and v (R, L, W) -> (R, Q, W). mask: None, or (R, 1, Q, L) of 0 and
        -inf, added to the scores."""
        heads = (part.unflatten(-1, (self.n_heads, -1)).transpose(1, 2) for part in (q, k, v))
        return F.scaled_dot_product_attention(*heads, attn_mask=mask).transpose(1, 2).flatten(2)

    def after_attention(self, x, attended):
        """The attention's projection, the MLP, and both residuals: x and attended, both (..., W),
        -> (..., W). Without gradients, x is overwritten."""
        x = _plus(x, F.linear(attended, *self.out))
        hidden = F.linear(self.norm_2(x).to(self.dtype), *self.up)
        hidden = F.silu(hidden, inplace=not hidden.requires_grad)
        return _plus(x, F.linear(hidden, *self.down))

    def first_positions(self, x):
        """The block's output at only the first position of each row: (R, L, W) -> (R, W)."""
        normed, width = self.norm_1(x).to(self.dtype), x.shape[-1]
        q = F.linear(normed[:, :1], self.qkv_weight[:width], self.qkv_bias[:width])
        kv = F.linear(normed, self.qkv_weight[width:], self.qkv_bias[width:])
        return self.after_attention(x[:, 0], self.attend(q, *kv.chunk(2, dim=-1))[:, 0])


def _plus(x, change):
    """x + change; in place without gradients, since x is then not needed again."""
    return x + change if change.requires_grad else x.add_(change)


_READY = weakref.WeakKeyDictionary()  # transformer -> {dtype: [Block, ...]}


def blocks_of(transformer, dtype):
    """The fast blocks of a `clip.model.Transformer`, made once per dtype."""
    ready = _READY.setdefault(transformer, {})
    if dtype not in ready:
        ready[dtype] = [Block(block, dtype) for block in transformer.resblocks]
    return ready[dtype]


def encode_images(clip_model, pixels, dtype):
    """Image features, not normalised, of preprocessed images: (B, 3, H, W) -> (B, D).

    CLIP's vision transformer is computed here, a ResNet or a changed attention by `clip`. Only the
    class token is read at the end, so the last block computes keys and values at all positions and
    everything else for this token only. dtype: of the matrix products in the blocks.
    """
    visual = clip_model.visual
    blocks = visual.transformer.resblocks if hasattr(visual, "transformer") else []
    if not blocks or any(type(block.attn) is not torch.nn.MultiheadAttention for block in blocks):
        with torch.autocast(pixels.device.type, dtype, enabled=dtype != torch.float32):
            return visual(pixels).float()
    patches = visual.conv1(pixels).flatten(2).transpose(1, 2)  # (B, L - 1, W)
    token = visual.class_embedding.expand(len(pixels), 1, -1)
    x = torch.cat([token, patches], dim=1) + visual.positional_embedding  # (B, L, W)
    if hasattr(visual, "prompts"):  # learned tokens, see `lib.features.learnable_part`
        x = torch.cat([x, visual.prompts.expand(len(x), -1, -1)], dim=1)
    x = visual.ln_pre(x)
    *blocks, last = blocks_of(visual.transformer, dtype)
    for block in blocks:
        attended = block.attend(*block.queries_keys_values(x).chunk(3, dim=-1))
        x = block.after_attention(x, attended)
    return visual.ln_post(last.first_positions(x)) @ visual.proj
