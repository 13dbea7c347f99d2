"""CLIP's text encoder, for many sentences that begin alike.

Prompt learning reads the same few prompts with every class name, in every step:

    a photo of a [red star]        `clip` encodes each of them separately, at all 77 positions,
    a photo of a [blue ring]       and reads one of these: EOT. Attention is causal, so most of
    a photo of a [green star]      that work is repeated or never used.

Here the sentences of a prompt form a tree, since they begin alike, as may their names:

    SOS a photo of a -- red -- star EOT         A node of the tree is a token and all the tokens
                     |      \\- ring EOT         before it. The encoder computes the same there
                      \\- blue -- ring EOT       for every sentence that contains the node.

Each node is computed once, and nothing is computed after an EOT. The results equal those of
`TextEncoder` in prompts.py. Trees are independent of each other: to limit memory, some trees
are encoded at a time; to split the work, each process gets some of the trees.

Nodes are numbered depth first. `last[j]` is the last node below node j in the tree, so j precedes
or equals i in a sentence exactly if j <= i <= last[j]. Everything but attention works on single
nodes. Attention works on *rows* of neighbouring sentences: a row that begins in the middle of the
tree repeats the path to its first sentence. A mask keeps the sentences of a row apart.

Dimensions: P nodes, R rows, L nodes in a row, N sentences, W width of the encoder, D of
its output, G prompts, C classes, V learned vectors.
"""

import os
from dataclasses import dataclass, fields, replace
from functools import partial
from itertools import pairwise

import torch
from torch.utils.checkpoint import checkpoint

from lib import parallel
from lib.fast_clip import blocks_of

CHUNK = {"cpu": 1024, "cuda": 8192}  # sentences encoded at a time; 8,192 take 5 GB at CLIP's size
# A node in a row of L nodes costs L for attention, and this much for copying it to the row and
# back. (Measured; a wide range of values works as well.)
MOVING = 40

# ------------------------------------------------------------------------------ the text encoder


class FastTextEncoder:
    """G prompts x C classes, laid out once, to be encoded in every step."""

    def __init__(self, clip_model, sentences, chunk=None):
        """sentences: [prompt][class] -> ids from SOS to EOT. Those below the size of the vocabulary
        are tokens; the others are rows of the vectors that are passed to the call.

        chunk: how many sentences are encoded at a time, CHUNK if None. With several batches, no
        activations are kept for the backward pass, which computes each batch again (activation
        checkpointing). Memory then grows with the chunk and not with the number of sentences.
        """
        weight = clip_model.token_embedding.weight
        self.clip_model = clip_model
        self.shape = n_prompts, n_classes = len(sentences), len(sentences[0])  # (G, C)
        self.chunk = chunk or CHUNK[weight.device.type]
        # The classes are cut into ranges of at most a chunk, the same number for each process. The
        # sentences of one prompt for one range form a tree.
        rank, world = parallel.rank(), parallel.world()
        n_ranges = world * max(1, -(-n_classes // self.chunk))
        cuts = [n_classes * i // n_ranges for i in range(n_ranges + 1)]
        own = [range(*cuts[i : i + 2]) for i in range(rank, n_ranges, world)]
        trees = [
            {g * n_classes + c: sentences[g][c] for c in classes}
            for g in range(n_prompts)
            for classes in own
            if classes
        ]
        pieces = pack(trees, weight.device)
        # Encoding looks ids up in one small table: the frozen embeddings in use, then the vectors.
        ids = torch.cat([weight.new_zeros(0).long(), *(piece.token for piece in pieces)])
        frozen = ids[ids < len(weight)].unique()
        for piece in pieces:
            token = piece.token
            vector = len(frozen) + token - len(weight)
            piece.token = torch.where(
                token < len(weight), torch.searchsorted(frozen, token), vector
            )
        self.frozen = weight[frozen].float()  # (tokens, W)
        self.batches = in_batches(pieces, self.chunk)

    def __call__(self, vectors=None):
        """Features of all sentences: (G, C, D), not normalised.

        vectors: None, (V, W), or (B, V, W) for B sets of vectors; the result is then (B, G, C, D).
        """
        batches, sets, n_sentences = self.batches, (), self.shape[0] * self.shape[1]
        table = self.frozen
        if vectors is not None:
            vectors = parallel.sum_gradients(vectors)
            table = torch.cat([table.expand(*vectors.shape[:-2], -1, -1), vectors], dim=-2)
        if table.dim() == 3:  # concatenate the tables, and repeat the sentences for each
            sets, n_tokens = table.shape[:1], table.shape[1]
            copies = [
                batch.moved(i * n_tokens, i * n_sentences)
                for i in range(len(table))
                for batch in batches
            ]
            batches, table = in_batches(copies, self.chunk), table.flatten(0, 1)
            n_sentences *= sets[0]
        features = encode_batches(self.clip_model, table, batches, n_sentences)
        return features.view(*sets, *self.shape, -1)


def encode_batches(clip_model, table, batches, n_sentences):
    """Features of sentences, computed in batches and by all processes: (N, D), not normalised.

    table: (tokens, W), the embeddings that `batch.token` indexes. Sentences in no batch get
    zeros.
    """
    features = table.new_zeros(n_sentences, clip_model.text_projection.shape[1])
    encode, learns = encode_piece, table.requires_grad
    dtype = parallel.mixed_dtype(table.device) if learns else torch.float32
    if len(batches) > 1 and learns:
        encode = partial(checkpoint, encode, use_reentrant=False, preserve_rng_state=False)
    if batches:
        parts = [encode(clip_model, table, batch, dtype) for batch in batches]
        sentences = torch.cat([batch.sentence for batch in batches])
        features = features.index_copy(0, sentences, torch.cat(parts))
    else:  # this process still takes part in the backward pass
        features = features + table[:0].sum()
    return parallel.sum_over_processes(features)


def encode_piece(clip_model, table, piece, dtype):
    """CLIP's text encoder on the sentences of a piece: (N, D), not normalised.

    dtype: of the matrix products.
    """
    x = table.index_select(0, piece.token) + clip_model.positional_embedding[piece.position]
    mask, rows = piece.mask.to(dtype), piece.rows.flatten()

    def attention(block, x):  # (P, W) -> (R * L, W)
        qkv = block.queries_keys_values(x).index_select(0, rows).view(*piece.rows.shape, -1)
        return block.attend(*qkv.chunk(3, dim=-1), mask).flatten(0, 1)

    *blocks, last = blocks_of(clip_model.transformer, dtype)
    for block in blocks:
        x = block.after_attention(x, attention(block, x).index_select(0, piece.first))
    # What follows the last attention is computed only for EOT.
    mixed = attention(last, x).index_select(0, piece.first[piece.ends])
    x = last.after_attention(x.index_select(0, piece.ends), mixed)  # (N, W)
    return clip_model.ln_final(x) @ clip_model.text_projection


# ------------------------------------------------------------------------- sentences laid out


@dataclass
class Piece:
    """Sentences that are encoded together, all on one device."""

    token: torch.Tensor  # (P,): the token of each node, an index into a table of embeddings
    position: torch.Tensor  # (P,): the number of tokens before it
    rows: torch.Tensor  # (R, L): the nodes that attention works on
    mask: torch.Tensor  # (R, 1, L, L): 0 where one node of a row attends to another, else -inf
    first: torch.Tensor  # (P,): the first place of a node in the flattened rows
    ends: torch.Tensor  # (N,): the node of each sentence's EOT
    sentence: torch.Tensor  # (N,): the number of that sentence

    def moved(self, tokens, sentences):
        """A copy with these offsets added to its tokens and to its sentence numbers."""
        return replace(self, token=self.token + tokens, sentence=self.sentence + sentences)


def join(pieces):
    """Joins several pieces into one. Their rows must have the same length."""
    if len(pieces) == 1:
        return pieces[0]
    columns = {field.name: [getattr(p, field.name) for p in pieces] for field in fields(Piece)}
    positions, in_rows = 0, 0
    for i, piece in enumerate(pieces):
        for name, offset in (("rows", positions), ("ends", positions), ("first", in_rows)):
            columns[name][i] = columns[name][i] + offset
        positions, in_rows = positions + len(piece.token), in_rows + piece.rows.numel()
    return Piece(**{name: torch.cat(parts) for name, parts in columns.items()})


def in_batches(pieces, at_once):
    """Joins pieces into a list of batches of at most `at_once` sentences, or of a single piece."""
    batches, n = [], at_once
    for piece in pieces:
        n += len(piece.sentence)
        if n > at_once:
            batches.append([])
            n = len(piece.sentence)
        batches[-1].append(piece)
    return [join(batch) for batch in batches]


def pack(trees, device=None):
    """Lays out one `Piece` per tree, all with rows of the same length.

    trees: a list of {number: sentence}; a sentence is a list of ints, SOS first and EOT last.
    """
    if not trees:
        return []
    trees = [sorted(tree.items(), key=lambda item: item[1]) for tree in trees]
    shared = [_shared_prefixes([sentence for _, sentence in tree]) for tree in trees]
    sizes = [
        [(len(sentence), n) for (_, sentence), n in zip(tree, counts)]
        for tree, counts in zip(trees, shared)
    ]
    length = _best_length(sizes)
    return [_lay_out(tree, counts, length, device) for tree, counts in zip(trees, shared)]


def _shared_prefixes(sentences):
    """How many tokens each sentence has in common with the one before it; 0 for the first."""
    return [0] + [len(os.path.commonprefix(pair)) for pair in pairwise(sentences)]


def _best_length(sizes):
    """The row length at which attention costs least. Long rows repeat fewer nodes; short rows
    compute less of what the mask hides. sizes: [(tokens, shared prefix)] of each tree."""
    longest = max(size for tree in sizes for size, _ in tree)
    whole = max(sum(size - n for size, n in tree) for tree in sizes)
    tries = {min(int(longest * 1.1**power), whole) for power in range(40)}

    def cost(length):
        n_rows = 0
        for tree in sizes:
            load = length  # the row counts as full, so that the first sentence starts one
            for size, n in tree:  # fills rows as `_lay_out` does
                load += size - n
                if load > length:
                    n_rows, load = n_rows + 1, size
        return n_rows * length * (MOVING + length)

    return min(sorted(tries), key=cost)


def _lay_out(tree, shared, length, device):
    """The piece of one tree. tree: [(number, sentence)], sorted by sentence."""
    token, position, first, last, ends, rows, path = [], [], [], [], [], [], []
    for (_, sentence), n in zip(tree, shared):
        for node in path[n:]:  # no later sentence contains these
            last[node] = len(token) - 1
        new = range(len(token), len(token) + len(sentence) - n)
        path = [*path[:n], *new]
        if not rows or len(rows[-1]) + len(new) > length:
            rows.append(path[:n])
        start = (len(rows) - 1) * length + len(rows[-1])
        rows[-1].extend(new)
        token.extend(sentence[n:])
        position.extend(range(n, len(sentence)))
        first.extend(range(start, start + len(new)))
        last.extend(new)
        ends.append(path[-1])
    for node in path:
        last[node] = len(token) - 1

    # A short row is padded with a node that attends only to itself. It is computed as node 0
    # and never read.
    nowhere = len(token)
    padded = [row + [nowhere] * (length - len(row)) for row in rows]
    token, position, first, ends, last, rows, sentence = (
        torch.tensor(values, dtype=torch.long, device=device)
        for values in (token, position, first, ends, [*last, nowhere], padded, [s for s, _ in tree])
    )
    looking, at = rows[:, None, :, None], rows[:, None, None, :]
    mask = (at <= looking) & (looking <= last[at])
    mask = torch.zeros_like(mask, dtype=torch.float).masked_fill_(~mask, -torch.inf)
    return Piece(token, position, rows * (rows < nowhere), mask, first, ends, sentence)
