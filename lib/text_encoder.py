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

from functools import partial

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
        batches, nothing inside the encoder is kept for the backward pass: each batch is computed
        again there (activation checkpointing), so memory grows with the chunk and not with the
        number of sentences.
        """
        weight = clip_model.token_embedding.weight
        self.shape = n_prompts, n_classes = len(prompts), len(prompts[0])  # (G, C)
        self.chunk = chunk or chunk_for(clip_model, prompts)
        # The classes are cut into ranges of at most a chunk, as many for each process; a tree is
        # what a prompt makes of a range.
        rank, world = processes.rank(), processes.world()
        n_ranges = world * max(1, -(-n_classes // self.chunk))
        cuts = [n_classes * i // n_ranges for i in range(n_ranges + 1)]
        own = [range(*cuts[i : i + 2]) for i in range(rank, n_ranges, world)]
        trees = {
            (g, classes): {g * n_classes + c: prompts[g][c] for c in classes}
            for g in range(n_prompts)
            for classes in own
            if classes
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
        self.batches = in_batches(pieces, self.chunk)

    def encode(self, clip_model, vectors=None, only=None, dtype=torch.float32):
        """Features of all sentences: (G, C, D), not normalised.

        vectors: None, (V, W), or (B, V, W) for B sets of vectors; the result is then (B, G, C, D).
        only: None, or the prompts to encode, a list of numbers; the others get zeros. dtype: of the
        products in the blocks.
        """
        batches, sets, n_sentences = self.batches, (), self.shape[0] * self.shape[1]
        if only is not None:
            batches = in_batches([piece for g in only for piece in self.pieces[g]], self.chunk)
        table = self.frozen
        if vectors is not None:
            vectors = processes.sum_gradients(vectors)
            table = torch.cat([table.expand(*vectors.shape[:-2], -1, -1), vectors], dim=-2)
        if table.dim() == 3:  # one table after the other, and the sentences once for each
            sets, n_tokens = table.shape[:1], table.shape[1]
            copies = [
                batch.moved(i * n_tokens, i * n_sentences)
                for i in range(len(table))
                for batch in batches
            ]
            batches, table = in_batches(copies, self.chunk), table.flatten(0, 1)
            n_sentences *= sets[0]
        features = encode_batches(clip_model, table, batches, n_sentences, dtype)
        return features.view(*sets, *self.shape, -1)


def encode_batches(clip_model, table, batches, n_sentences, dtype):
    """Features of sentences, computed batch by batch and by all processes: (N, D), not normalised.

    table: (tokens, W), the embeddings that `batch.token` points into. Sentences that are in no
    batch get zeros.
    """
    features = table.new_zeros(n_sentences, clip_model.text_projection.shape[1])
    encode = encode_piece
    if len(batches) > 1 and table.requires_grad:
        encode = partial(checkpoint, encode, use_reentrant=False, preserve_rng_state=False)
    if batches:
        parts = [encode(clip_model, table, batch, dtype) for batch in batches]
        sentences = torch.cat([batch.sentence for batch in batches])
        features = features.index_copy(0, sentences, torch.cat(parts))
    else:  # this process takes part in the backward pass all the same
        features = features + table[:0].sum()
    return processes.sum_over_processes(features)


def encode_piece(clip_model, table, piece, dtype):
    """CLIP's text encoder on the sentences of a piece: (N, D), not normalised."""
    x = table.index_select(0, piece.token) + clip_model.positional_embedding[piece.position]
    sees, rows = piece.sees.to(dtype), piece.rows.flatten()

    def attention(block, x):  # (P, W) -> (R * L, W)
        qkv = block.queries_keys_values(x).index_select(0, rows).view(*piece.rows.shape, -1)
        return block.attend(*qkv.chunk(3, dim=-1), sees).flatten(0, 1)

    *blocks, last = blocks_of(clip_model.transformer, dtype)
    for block in blocks:
        x = block.after_attention(x, attention(block, x).index_select(0, piece.first))
    # What follows the last attention is computed for EOT alone.
    mixed = attention(last, x).index_select(0, piece.first[piece.ends])
    x = last.after_attention(x.index_select(0, piece.ends), mixed)  # (N, W)
    return clip_model.ln_final(x) @ clip_model.text_projection


def chunk_for(clip_model, prompts):
    """How many sentences to encode at a time: `CHUNK` on a CPU; on a GPU as many as half of its
    free memory has room for, as more than one batch means computing each of them twice."""
    device, width = clip_model.logit_scale.device, clip_model.text_projection.shape[0]
    if device.type != "cuda":
        return CHUNK
    # For the backward pass a place keeps, of each layer, x twice in fp32 and 10 W half numbers.
    bytes_per_place = 28 * width * len(clip_model.transformer.resblocks)
    places = max(len(sentence) for sentences in prompts for sentence in sentences)
    free, _ = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    # The processes of one run must agree.
    return min(processes.gather(lambda: max(1, int(free / 2 / (bytes_per_place * places)))))
