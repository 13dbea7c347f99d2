"""CLIP's text encoder, for many sentences that begin alike.

Prompt learning reads the same few prompts with every class name, in every step:

    a photo of a [red star]        `clip` computes each of them on its own, all 77 positions,
    a photo of a [blue ring]       and reads one: EOT. Causal attention never looks to the right,
    a photo of a [green star]      so most of that is computed twice or for nothing.

`encode_text` is the plain way, one sentence per row, up to the last EOT. Everything below it does
the same for less: several sentences of one prompt share a *row*, behind their common beginning:

    SOS a photo of a | red star EOT | blue ring EOT | green star EOT

A mask lets each place see the common beginning and, of the rest, its own sentence up to itself;
position embeddings are those of the sentence, not of the row. Every number is the one that `clip`
computes. Rows are independent of each other and equally long. So bounding the memory (some rows
at a time), splitting the work over processes (every nth row) and leaving prompts out are all the
same thing: take some of the rows.

Letters in shapes: R rows, L places in a row, N sentences, W width of the encoder, D of its output,
G prompts, C classes, V learned vectors.
"""

import heapq
import os
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from lib import processes

CHUNK = 1024  # sentences encoded at a time
LEARNED = 2**20  # ids from here on are no tokens: LEARNED + i stands for learned vector i

# ----------------------------------------------------------------------------- one sentence a row


def encode_text(clip_model, embeddings, eot):
    """CLIP's text encoder on one sentence per row, from token embeddings to features.

    It is causal and its output is read at one position, EOT. So nothing after the last EOT of the
    batch can change the result, and those positions are not computed.

    clip_model: a `clip.model.CLIP`. embeddings: (N, L, W), L at most the model's context length.
    eot: (N,) position of EOT in each row. Returns (N, D), not normalised.
    """
    length = int(eot.max()) + 1
    x = embeddings[:, :length] + clip_model.positional_embedding[:length]
    for block in clip_model.transformer.resblocks:
        x = _block(block, x)
    x = x[torch.arange(len(x), device=x.device), eot]  # (N, W)
    return clip_model.ln_final(x) @ clip_model.text_projection


def _block(block, x, sees=None, ends=None):
    """One of clip's residual attention blocks on (R, L, W), for any L.

    The same arithmetic as `clip.model.ResidualAttentionBlock`, whose mask fits 77 tokens only.
    sees: which places look at which, None for causal attention. ends: the places that are read, if
    no block follows: whatever comes after the attention is computed for these alone.
    """
    attention = block.attn
    n_rows, length, width = x.shape
    qkv = F.linear(block.ln_1(x), attention.in_proj_weight, attention.in_proj_bias)
    q, k, v = qkv.view(n_rows, length, 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4)
    mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=sees, is_causal=sees is None)
    mixed = mixed.transpose(1, 2).reshape(n_rows, length, width)
    if ends is not None:
        x, mixed = x[ends], mixed[ends]
    x = x + attention.out_proj(mixed)
    return x + block.mlp(block.ln_2(x))


# ------------------------------------------------------------------------ many sentences in a row


class Sentences:
    """G prompts x C classes, packed into rows, to be encoded in every step."""

    def __init__(self, clip_model, prompts):
        """prompts: [prompt][class] -> ids from SOS to EOT, of tokens or (LEARNED + i) of the
        vectors that `encode` will be given."""
        everything = {i for sentences in prompts for sentence in sentences for i in sentence}
        tokens = sorted(i for i in everything if i < LEARNED)
        # Encoding looks ids up in one table: the frozen embeddings, then the learned vectors.
        place = {token: i for i, token in enumerate(tokens)}
        place |= {i: len(tokens) + i - LEARNED for i in everything if i >= LEARNED}
        weight = clip_model.token_embedding.weight
        self.shape = len(prompts), len(prompts[0])  # (G, C)
        self.frozen = weight[tokens].float()  # (tokens, W)
        placed = [[[place[i] for i in sentence] for sentence in prompt] for prompt in prompts]
        self.rows = pack(placed, weight.shape[1], weight.device)

    def encode(self, clip_model, vectors=None, only=None, chunk=CHUNK):
        """Features of all sentences: (G, C, D), not normalised.

        vectors: None, (V, W), or (B, V, W) for B sets of vectors; the result is then (B, G, C, D).
        only: None or (G,) bool, the prompts to encode; the others get zeros.
        chunk: see `encode_rows_in_pieces`.
        """
        rows, n_sentences = self.rows, self.shape[0] * self.shape[1]
        if only is not None:
            rows = rows[only[rows.prompt]]
        if vectors is None:
            table, sets = self.frozen, ()
        elif vectors.dim() == 2:
            table, sets = torch.cat([self.frozen, vectors]), ()
        else:  # one table after the other, and the rows once for each
            tables = torch.cat([self.frozen.expand(len(vectors), -1, -1), vectors], dim=1)
            rows = rows.repeat(len(tables), tables.shape[1], n_sentences)
            table, sets, n_sentences = (
                tables.flatten(0, 1),
                (len(tables),),
                len(tables) * n_sentences,
            )
        features = encode_rows_in_pieces(clip_model, table, rows, n_sentences, chunk)
        return features.view(*sets, *self.shape, -1)


@dataclass
class Rows:
    """Sentences packed into rows, all on one device."""

    token: torch.Tensor  # (R, L): what stands at each place, an index into a table of embeddings
    position: torch.Tensor  # (R, L): where in its sentence that place is
    sentence: torch.Tensor  # (R, L): whose place it is; -1 for the common beginning, -2 for nobody
    ends: torch.Tensor  # (R, L): whether a sentence ends there, with its EOT
    prompt: torch.Tensor  # (R,): the prompt that the row's sentences belong to

    def __getitem__(self, some):
        return Rows(*(field[some] for field in vars(self).values()))

    def __len__(self):
        return len(self.prompt)

    def repeat(self, n, n_tokens, n_sentences):
        """n copies: copy i points i * n_tokens further into the table, and numbers its sentences
        from i * n_sentences on."""
        rows = self[torch.arange(len(self)).repeat(n)]
        time = torch.arange(n, device=rows.token.device).repeat_interleave(len(self))[:, None]
        rows.token += time * n_tokens
        rows.sentence += torch.where(rows.sentence >= 0, time * n_sentences, 0)
        return rows


def pack(prompts, width, device=None):
    """Packs sentences into rows.

    prompts: [prompt][sentence] -> indices into a table of embeddings, EOT last. Sentences are
    numbered through: those of the first prompt, those of the second, ... width: W.

    Long rows repeat the common beginning less often, short ones spend less on attention, and the
    longest row sets the length of all; a few lengths are tried and the cheapest is kept.
    """
    # What a prompt's sentences have in common; EOT is always a sentence's own.
    n_shared = [len(os.path.commonprefix([s[:-1] for s in sentences])) for sentences in prompts]
    n_own = [[len(s) - n for s in sentences] for sentences, n in zip(prompts, n_shared)]
    tries = []
    for n_parts in sorted({int(1.25**power) for power in range(40)}):  # of the longest prompt
        length = max(
            n + max(max(sizes), -(-sum(sizes) // n_parts)) for n, sizes in zip(n_shared, n_own)
        )
        deals = [_deal(sizes, length - n) for n, sizes in zip(n_shared, n_own)]
        loads = [n + load for n, deal in zip(n_shared, deals) for load, _ in deal]
        # In each layer the linear parts cost 12 W^2 per place and attention 2 W L, which runs at
        # a lower rate: about as if it were W L on top of W^2.
        per_process = -(-len(loads) // processes.world())
        tries.append((per_process * max(loads) * (width + max(loads)), deals))
        if n_parts >= max(map(len, prompts)):
            break
    _, deals = min(tries, key=lambda t: t[0])
    rows, owners, first = [], [], 0
    for g, (sentences, n, deal) in enumerate(zip(prompts, n_shared, deals)):
        for _, members in deal:
            row = [(token, i, -1, False) for i, token in enumerate(sentences[0][:n])]
            for s in members:
                tail = list(enumerate(sentences[s]))[n:]
                row += [(token, i, first + s, i == tail[-1][0]) for i, token in tail]
            rows.append(row)
            owners.append(g)
        first += len(sentences)
    length = max(map(len, rows))
    padded = [row + [(row[0][0], 0, -2, False)] * (length - len(row)) for row in rows]
    token, position, sentence, ends = torch.tensor(padded, device=device).unbind(dim=-1)
    prompt = torch.tensor(owners, device=device)
    return Rows(token, position, sentence, ends.bool(), prompt)


def _deal(sizes, room):
    """Sentences of these sizes dealt to as few rows as have the room on average, the longest first
    and each to the emptiest row: one (tokens, [sentence, ...]) per row."""
    rows = [(0, r, []) for r in range(-(-sum(sizes) // room))]
    for s in sorted(range(len(sizes)), key=lambda s: -sizes[s]):
        load, r, members = rows[0]
        members.append(s)
        heapq.heapreplace(rows, (load + sizes[s], r, members))
    return [(load, members) for load, _, members in rows if members]


def encode_rows(clip_model, embeddings, rows):
    """`encode_text` for rows of many sentences; each gets the feature that it would get alone.

    embeddings: (R, L, W). Returns (N, D) for the N sentences that end in these rows, in the order
    of `rows.sentence[rows.ends]`, not normalised.
    """
    own = rows.sentence[:, :, None] == rows.sentence[:, None, :]  # (R, L looking, L looked at)
    common = rows.sentence[:, None, :] == -1
    sees = (own | common).tril()[:, None]  # (R, 1, L, L), the same for all heads
    ends = rows.ends.nonzero(as_tuple=True)
    x = embeddings + clip_model.positional_embedding[rows.position]
    *blocks, last = clip_model.transformer.resblocks
    for block in blocks:
        x = _block(block, x, sees)
    x = _block(last, x, sees, ends)  # (N, W)
    return clip_model.ln_final(x) @ clip_model.text_projection


def encode_rows_in_pieces(clip_model, table, rows, n_sentences, chunk):
    """Features of all sentences, computed in pieces and by all processes: (N, D), not normalised.

    table: (tokens, W), the embeddings that `rows.token` points into. chunk: how many sentences are
    encoded at a time. If that takes several pieces, nothing inside the encoder is kept for the
    backward pass: each piece is computed again there (activation checkpointing), so memory grows
    with the chunk and not with the number of sentences. Sentences without a row get zeros.
    """
    table = processes.sum_gradients(table)
    pieces = in_pieces(rows[processes.rank() :: processes.world()], chunk)
    features = table.new_zeros(n_sentences, clip_model.text_projection.shape[1])
    features = features + table[:0].sum()  # a process without rows takes part in the backward pass
    for piece in pieces:

        def encode(table, piece=piece):
            return encode_rows(clip_model, F.embedding(piece.token, table), piece).float()

        if len(pieces) > 1 and table.requires_grad:
            encoded = checkpoint(encode, table, use_reentrant=False, preserve_rng_state=False)
        else:
            encoded = encode(table)
        features = features.index_copy(0, piece.sentence[piece.ends], encoded)
    return processes.sum_over_processes(features)


def in_pieces(rows, chunk):
    """Pieces of the rows with about `chunk` sentences each."""
    if not len(rows):
        return []
    per_row = rows.ends.sum().item() / len(rows)
    n_rows = max(1, int(chunk / per_row))
    return [rows[i : i + n_rows] for i in range(0, len(rows), n_rows)]
