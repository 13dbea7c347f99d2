"""Sentences that begin alike, laid out so that nothing is computed twice.

The sentences of a prompt form a tree, as they begin alike, and so may the names in them:

    SOS a photo of a -- red -- star EOT         A place of the tree is a token with what stands
                     |      \\- ring EOT         before it. Attention is causal, so what the encoder
                      \\- blue -- ring EOT       computes there is the same for all its sentences.

Places are numbered depth first. `last[j]` is the last place below place j in the tree, so j stands
before i, or is i, exactly if j <= i <= last[j].

All but attention works on places, one by one. Attention works on *rows* of neighbouring sentences:
a row that begins in the middle of the tree repeats the path to its first sentence. A mask keeps the
sentences of a row apart.

Letters in shapes: P places, N sentences, R rows, L places in a row.
"""

import os
from dataclasses import dataclass, fields, replace
from itertools import pairwise

import torch

# In a row of L places, each costs attention over L others, and this much for moving it there and
# back. (Measured; a wide range is as good.)
MOVING = 40


@dataclass
class Piece:
    """Sentences that are encoded together, all on one device."""

    token: torch.Tensor  # (P,): what stands at each place, an index into a table of embeddings
    position: torch.Tensor  # (P,): how many tokens stand before it
    rows: torch.Tensor  # (R, L): the places that attention works on
    sees: torch.Tensor  # (R, 1, L, L): 0 where one place of a row looks at another, else -inf
    first: torch.Tensor  # (P,): where in the flattened rows a place stands first
    ends: torch.Tensor  # (N,): the place of each sentence's EOT
    sentence: torch.Tensor  # (N,): which sentence that is

    def moved(self, tokens, sentences):
        """A copy with that much added to its tokens and to its sentences' numbers."""
        return replace(self, token=self.token + tokens, sentence=self.sentence + sentences)


def join(pieces):
    """Several pieces as one. Their rows must be equally long."""
    if len(pieces) == 1:
        return pieces[0]
    columns = {field.name: [getattr(p, field.name) for p in pieces] for field in fields(Piece)}
    places, in_rows = 0, 0
    for i, piece in enumerate(pieces):
        for name, offset in (("rows", places), ("ends", places), ("first", in_rows)):
            columns[name][i] = columns[name][i] + offset
        places, in_rows = places + len(piece.token), in_rows + piece.rows.numel()
    return Piece(**{name: torch.cat(parts) for name, parts in columns.items()})


def in_batches(pieces, at_once):
    """The pieces joined, a list: in each batch at most `at_once` sentences, or a single piece."""
    batches, n = [], at_once
    for piece in pieces:
        n += len(piece.sentence)
        if n > at_once:
            batches.append([])
            n = len(piece.sentence)
        batches[-1].append(piece)
    return [join(batch) for batch in batches]


def pack(trees, device=None):
    """One `Piece` per tree, the rows of all equally long.

    trees: of each, {number: sentence}; a sentence is a list of ints, SOS first and EOT last.
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
    """The length of row at which attention costs least. Long rows hold fewer places twice, short
    ones compute less of what the mask hides. sizes: of each tree, [(tokens, shared prefix)]."""
    longest = max(size for tree in sizes for size, _ in tree)
    whole = max(sum(size - n for size, n in tree) for tree in sizes)
    tries = {min(int(longest * 1.1**power), whole) for power in range(40)}

    def cost(length):
        n_rows = 0
        for tree in sizes:
            load = length  # of the last row, so that the first sentence starts one
            for size, n in tree:  # as `_lay_out` fills them
                load += size - n
                if load > length:
                    n_rows, load = n_rows + 1, size
        return n_rows * length * (MOVING + length)

    return min(sorted(tries), key=cost)


def _lay_out(tree, shared, length, device):
    """The piece of one tree. tree: [(number, sentence)], sorted by sentence."""
    token, position, first, last, ends, rows, path = [], [], [], [], [], [], []
    for (_, sentence), n in zip(tree, shared):
        for place in path[n:]:  # the tree goes on without these
            last[place] = len(token) - 1
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
    for place in path:
        last[place] = len(token) - 1

    # A short row ends in a place that only itself sees, computed as place 0 and never read.
    nowhere = len(token)
    padded = [row + [nowhere] * (length - len(row)) for row in rows]
    token, position, first, ends, last, rows, sentence = (
        torch.tensor(values, dtype=torch.long, device=device)
        for values in (token, position, first, ends, [*last, nowhere], padded, [s for s, _ in tree])
    )
    looking, at = rows[:, None, :, None], rows[:, None, None, :]
    sees = (at <= looking) & (looking <= last[at])
    sees = torch.zeros_like(sees, dtype=torch.float).masked_fill_(~sees, -torch.inf)
    return Piece(token, position, rows * (rows < nowhere), sees, first, ends, sentence)
