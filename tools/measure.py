"""Time, and operations counted: what the bench measures with."""

import collections
import statistics
import time
from functools import partial

import torch
from torch.utils._python_dispatch import TorchDispatchMode


def seconds(action):
    start = time.perf_counter()
    action()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


class Operations(TorchDispatchMode):
    """Counts tensor operations by name, and the matrix products of the linear layers by their
    shapes and type: {(M, K, N, dtype): how many}."""

    def __init__(self):
        super().__init__()
        self.products, self.names = collections.Counter(), collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            a, b = args[-2:]
            self.products[(*a.shape, b.shape[1], a.dtype)] += 1
        self.names[func.overloadpacket.__name__] += not func.is_view
        return func(*args, **(kwargs or {}))

    @property
    def flop(self):
        """Multiplications and additions in the linear layers."""
        return sum(2 * m * k * n * count for (m, k, n, _), count in self.products.items())

    @property
    def launches(self):
        """How many of the operations compute something: on a GPU each of these is a kernel to be
        launched, some are two."""
        free = "empty", "empty_like", "_unsafe_view", "empty_strided", "new_empty"
        return sum(count for name, count in self.names.items() if name not in free)


def compare(ways, repeats, device):
    """Runs steps in turn: {name: {seconds, operations, plain_seconds}}, medians over the repeats.

    operations: multiplications and additions in the linear layers. plain_seconds: what the same
    matrix products take alone, one after the other.
    """
    counted, warm, times = {}, set(), collections.defaultdict(list)
    for name, (step, _) in ways.items():
        with Operations() as counted[name]:
            took = seconds(step)
        if took < 3:  # its memory and its caches are another's by the time of its next turn
            warm.add(name)
    pairs = {}
    for m, k, n, dtype in set().union(*(c.products for c in counted.values())):
        make = partial(torch.randn, device=device, dtype=dtype)
        pairs[m, k, n, dtype] = make(m, k), make(n, k).T

    def products_alone(counts):
        for shape, count in counts.items():
            for _ in range(count):
                torch.mm(*pairs[shape])

    for _ in range(repeats):
        for name, (step, _) in ways.items():
            if name in warm:
                step()
            times[name].append(seconds(step))
            times[name, "alone"].append(seconds(partial(products_alone, counted[name].products)))
    median = {key: statistics.median(values) for key, values in times.items()}
    return {
        name: {
            "seconds": median[name],
            "operations": c.flop,
            "plain_seconds": median[name, "alone"],
        }
        for name, c in counted.items()
    }
