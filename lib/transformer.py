"""The blocks that both encoders of CLIP are made of, frozen and ready to compute.

A block computes what `clip.model.ResidualAttentionBlock` does, only with less:

- nothing is copied around the attention, and where nothing is learned, sums are made in place;
- QuickGELU, x * sigmoid(1.702 x), reads and writes the widest numbers of the encoder three times.
  But 1.702 QuickGELU(x) = silu(1.702 x), with silu(x) = x * sigmoid(x), which does it once. So the
  weights before it are multiplied by 1.702 and those behind it divided;
- on a GPU the weights are rounded to half precision once and not in every step. What runs past
  the blocks, x, stays fp32, and so does LayerNorm.

So a block has copies of most weights, made when it is first used: what changes CLIP's weights
later, but for LayerNorms, is not seen.

Letters in shapes: R rows of a batch, L places in a row, W width of the encoder.
"""

import weakref

import torch.nn.functional as F

QUICK_GELU = 1.702


class Block:
    """One residual attention block. Its steps take (..., W), and attention (R, L, W).

    Raises ValueError for weights to be learned: only the LayerNorms' may be.
    """

    def __init__(self, block, dtype, factor=QUICK_GELU):
        """block: a `clip.model.ResidualAttentionBlock`. dtype: of the products."""

        def frozen(layer, names, factor=1.0):
            parameters = [getattr(layer, name) for name in names]
            if any(p.requires_grad for p in parameters):
                raise ValueError(f"{', '.join(names)} of {layer} should be frozen")
            return [p.to(dtype) if factor == 1 else (p * factor).to(dtype) for p in parameters]

        attention, mlp = block.attn, block.mlp
        self.dtype, self.n_heads = dtype, attention.num_heads
        self.norm_1, self.norm_2 = block.ln_1, block.ln_2  # clip's own, as these may be learned
        self.qkv_weight, self.qkv_bias = frozen(attention, ["in_proj_weight", "in_proj_bias"])
        self.out = frozen(attention.out_proj, ["weight", "bias"])
        self.up = frozen(mlp.c_fc, ["weight", "bias"], factor)
        self.down = frozen(mlp.c_proj, ["weight"], 1 / factor) + frozen(mlp.c_proj, ["bias"])

    def queries_keys_values(self, x):
        """x (..., W) -> q, k, v, each (..., W), in one (..., 3 W)."""
        return F.linear(self.norm_1(x).to(self.dtype), self.qkv_weight, self.qkv_bias)

    def attend(self, q, k, v, sees=None):
        """q (R, Q, W), k and v (R, L, W) -> (R, Q, W). sees: None, or what is added to the scores
        of each place looked at, (R, 1, Q, L): 0 or -inf."""
        heads = (part.unflatten(-1, (self.n_heads, -1)).transpose(1, 2) for part in (q, k, v))
        return F.scaled_dot_product_attention(*heads, attn_mask=sees).transpose(1, 2).flatten(2)

    def after_attention(self, x, mixed):
        """The attention's projection, the MLP, and both residuals: x and mixed, both (..., W), ->
        (..., W). Where nothing is learned, x is overwritten."""
        x = _plus(x, F.linear(mixed, *self.out))
        hidden = F.linear(self.norm_2(x).to(self.dtype), *self.up)
        return _plus(x, F.linear(self.activation(hidden), *self.down))

    def activation(self, hidden):
        return F.silu(hidden, inplace=not hidden.requires_grad)

    def first_places(self, x):
        """The block's output at the first place of each row alone: (R, L, W) -> (R, W)."""
        normed, width = self.norm_1(x).to(self.dtype), x.shape[-1]
        q = F.linear(normed[:, :1], self.qkv_weight[:width], self.qkv_bias[:width])
        kv = F.linear(normed, self.qkv_weight[width:], self.qkv_bias[width:])
        return self.after_attention(x[:, 0], self.attend(q, *kv.chunk(2, dim=-1))[:, 0])


def _plus(x, change):
    """x + change; in place where nobody will need x again, which is where nothing is learned."""
    return x + change if change.requires_grad else x.add_(change)


_READY = weakref.WeakKeyDictionary()  # transformer -> {dtype: [Block, ...]}


def blocks_of(transformer, dtype):
    """The blocks of a `clip.model.Transformer`, made ready once for each dtype."""
    ready = _READY.setdefault(transformer, {})
    if dtype not in ready:
        ready[dtype] = [Block(block, dtype) for block in transformer.resblocks]
    return ready[dtype]
