"""The linear probe: logistic regression on image features, as CoOp compares with.

Its L2 strength is chosen on the few-shot validation images as CoOp does it: the best of seven
powers of a hundred, then eight steps of bisection around it.
"""

import torch
import torch.nn.functional as F


def logistic_regression(features, labels, n_classes, c):
    """The minimum of  c * sum of cross-entropies + |weight|^2 / 2  (scikit-learn's C): weight
    (C, D), bias (C,). features: (N, D), labels: (N,)."""
    features = features.double()
    weight = features.new_zeros(n_classes, features.shape[1], requires_grad=True)
    bias = features.new_zeros(n_classes, requires_grad=True)
    solver = torch.optim.LBFGS(
        [weight, bias],
        max_iter=1000,
        history_size=20,
        tolerance_grad=1e-7,
        tolerance_change=1e-12,
        line_search_fn="strong_wolfe",
    )

    def objective():
        solver.zero_grad()
        loss = F.cross_entropy(features @ weight.T + bias, labels)
        loss = loss + weight.square().sum() / (2 * c * len(labels))
        loss.backward()
        return loss

    solver.step(objective)
    return weight.detach().float(), bias.detach().float()


def linear_probe(features, labels, val_features, val_labels, n_classes):
    """(weight, bias, c) with the c that does best on the validation images."""
    tried = {}  # exponent -> (accuracy, weight, bias)

    def accuracy(exponent):
        if exponent not in tried:
            weight, bias = logistic_regression(features, labels, n_classes, 10.0**exponent)
            right = (val_features @ weight.T + bias).argmax(dim=-1) == val_labels
            tried[exponent] = right.float().mean().item(), weight, bias
        return tried[exponent][0]

    best = max((6, 4, 2, 0, -2, -4, -6), key=accuracy)
    left, right = best - 1, best + 1
    for _ in range(8):
        if accuracy(left) < accuracy(right):
            left = (left + right) / 2
        else:
            right = (left + right) / 2
    # CoOp ends with the last step's better half; this with the best of all tried, and the first of
    # equals: few validation images make many of these.
    exponent = max(tried, key=accuracy)
    return *tried[exponent][1:], 10.0**exponent
