"""CLIP's text encoder, for many sentences that begin alike.

Prompt learning reads the same few prompts with every class name, in every step:

    a photo of a [red star]        `clip` computes each of them on its own, all 77 positions,
    a photo of a [blue ring]       and reads one: EOT. Causal attention never looks to the right,
    a photo of a [green star]      so most of that is computed twice or for nothing.

Here the sentences of a prompt form a tree (lib/packing.py): each place of it is computed once, and
nothing after an EOT is. Every number is the one that `clip` computes. Trees are independent of
each other. So bounding the memory (some trees at a time), splitting the work over processes (a
part of each) and leaving prompts out are all the same thing: take some of the trees.

Letters in shapes: P places, R rows, L places in a row, N sentences, W width of the encoder, D of
its output, G prompts, C classes, V learned vectors.
"""

import torch
from torch.utils.checkpoint import checkpoint

from lib import processes
from lib.packing import in_batches, pack
from lib.transformer import blocks_of

CHUNK = 1024  # sentences encoded at a time, on a CPU
LEARNED = 2**20  # ids from here on are no tokens: LEARNED + i stands for learned vector i


class Sentences:
    """G prompts x C classes, laid out once, to be encoded in every step."""

    def __init__(self, clip_model, prompts, chunk=None):
        """prompts: [prompt][class] -> ids from SOS to EOT, of tokens or (LEARNED + i) of the
        vectors that `encode` will be given.

        chunk: how many sentences are encoded at a time; None for `chunk_for`. If that takes several
        pieces, nothing inside the encoder is kept for the backward pass: each piece is computed
        again there (activation checkpointing), so memory grows with the chunk and not with the
        number of sentences.
        """
        weight = clip_model.token_embedding.weight
        self.shape = n_prompts, n_classes = len(prompts), len(prompts[0])  # (G, C)
        self.chunk = chunk or chunk_for(clip_model, prompts)
        # A tree is a part of a prompt's classes: at most a chunk, and this process's own.
        rank, world = processes.rank(), processes.world()
        n_parts = world * -(-n_classes // self.chunk)
        cuts = [n_classes * part // n_parts for part in range(n_parts + 1)]
        parts = [range(*cuts[i : i + 2]) for i in range(rank, n_parts, world)]
        trees = {
            (g, part): {g * n_classes + c: prompts[g][c] for c in part}
            for g in range(n_prompts)
            for part in parts
            if part
        }
        pieces = pack(list(trees.values()), weight.device)
        # Encoding looks ids up in one table: the frozen embeddings, then the learned vectors.
        ids = torch.cat([weight.new_zeros(0).long(), *(piece.token for piece in pieces)])
        frozen = ids[ids < LEARNED].unique()
        for piece in pieces:
            token = piece.token
            learned = len(frozen) + token - LEARNED
            piece.token = torch.where(token < LEARNED, torch.searchsorted(frozen, token), learned)
        self.frozen = weight[frozen].float()  # (tokens, W)
        self.pieces = [[] for _ in prompts]  # of each prompt
        for (g, _), piece in zip(trees, pieces):
            self.pieces[g].append(piece)
        self.all = in_batches(pieces, self.chunk)

    def encode(self, clip_model, vectors=None, only=None, dtype=torch.float32):
        """Features of all sentences: (G, C, D), not normalised.

        vectors: None, (V, W), or (B, V, W) for B sets of vectors; the result is then (B, G, C, D).
        only: None, or the prompts to encode, a list of numbers; the others get zeros. dtype: of the
        matrix products.
        """
        pieces, sets, n_sentences = self.all, (), self.shape[0] * self.shape[1]
        if only is not None:
            pieces = in_batches([piece for g in only for piece in self.pieces[g]], self.chunk)
        if vectors is not None:
            vectors = processes.sum_gradients(vectors)
        if vectors is None:
            table = self.frozen
        elif vectors.dim() == 2:
            table = torch.cat([self.frozen, vectors])
        else:  # one table after the other, and the pieces once for each
            tables = torch.cat([self.frozen.expand(len(vectors), -1, -1), vectors], dim=1)
            copies = [
                piece.moved(i * tables.shape[1], i * n_sentences)
                for i in range(len(tables))
                for piece in pieces
            ]
            pieces = in_batches(copies, self.chunk)
            sets, table, n_sentences = (
                tables.shape[:1],
                tables.flatten(0, 1),
                n_sentences * len(tables),
            )
        features = encode_pieces(clip_model, table, pieces, n_sentences, dtype)
        return features.view(*sets, *self.shape, -1)


def encode_pieces(clip_model, table, pieces, n_sentences, dtype):
    """Features of sentences, computed piece by piece and by all processes: (N, D), not normalised.

    table: (tokens, W), the embeddings that `piece.token` points into. Sentences that are in no
    piece get zeros.
    """
    features = table.new_zeros(n_sentences, clip_model.text_projection.shape[1])
    if not pieces:  # a process without any takes part in the backward pass
        features = features + table[:0].sum()
    for piece in pieces:
        if len(pieces) > 1 and table.requires_grad:
            options = {"use_reentrant": False, "preserve_rng_state": False}
            encoded = checkpoint(encode_piece, clip_model, table, piece, dtype, **options)
        else:
            encoded = encode_piece(clip_model, table, piece, dtype)
        features = features.index_copy(0, piece.sentence, encoded)
    return processes.sum_over_processes(features)


def encode_piece(clip_model, table, piece, dtype=torch.float32):
    """CLIP's text encoder on the sentences of a piece: (N, D), not normalised."""
    x = table.index_select(0, piece.token) + clip_model.positional_embedding[piece.position]
    sees, rows = piece.sees.to(dtype), piece.rows.flatten()

    def attention(block, x):  # (P, W) -> (R * L, W)
        qkv = block.queries_keys_values(x).index_select(0, rows).view(*piece.rows.shape, -1)
        return block.attend(*qkv.chunk(3, dim=-1), sees).flatten(0, 1)

    *blocks, last = blocks_of(clip_model.transformer, dtype)
    for block in blocks:
        x = block.rest(x, attention(block, x).index_select(0, piece.first))
    # What follows the last attention is computed for EOT alone.
    mixed = attention(last, x).index_select(0, piece.first[piece.ends])
    x = last.rest(x.index_select(0, piece.ends), mixed)  # (N, W)
    return clip_model.ln_final(x) @ clip_model.text_projection


def chunk_for(clip_model, prompts):
    """How many sentences to encode at a time: `CHUNK` on a CPU; on a GPU as many as half of its
    free memory has room for, as more than one piece means computing each of them twice."""
    device, width = clip_model.logit_scale.device, clip_model.text_projection.shape[0]
    if device.type != "cuda":
        return CHUNK
    # For the backward pass a place keeps, of each layer, x twice in fp32 and 10 W half numbers.
    bytes_per_place = 28 * width * len(clip_model.transformer.resblocks)
    places = max(len(sentence) for sentences in prompts for sentence in sentences)
    free, _ = torch.cuda.mem_get_info(device)
    return max(1, int(free / 2 / (bytes_per_place * places)))
