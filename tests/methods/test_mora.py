"""MoRA against its formulas written out one number at a time."""

import math

import pytest
import torch

from highrank.base.registry import load
from highrank.model.method import Site

pytestmark = pytest.mark.parity


def update(M, kind, n, k):
    """Returns ΔW (n, k): column c is ΔW e_c, each e_c sent through compress, M and decompress by hand."""
    side = len(M)
    blocks = math.ceil(k / side)
    columns = []
    for c in range(k):
        padded = [1.0 if i % k == c else 0.0 for i in range(blocks * side)]
        parts = [padded[i * side : (i + 1) * side] for i in range(blocks)]
        if kind == 1:
            parts = [[sum(part[j] for part in parts) for j in range(side)]]
        else:
            parts = [turn(part, i) for i, part in enumerate(parts)]
        outputs = [sum(M[row, j] * part[j] for j in range(side)) for part in parts for row in range(side)]
        columns.append(torch.stack([outputs[i % len(outputs)] for i in range(n)]))
    return torch.stack(columns, dim=1)


def turn(part, i):
    half = len(part) // 2
    turned = list(part)
    for j in range(half):
        angle = i * 10000 ** (-2 * j / len(part))
        turned[j] = part[j] * math.cos(angle) - part[j + half] * math.sin(angle)
        turned[j + half] = part[j + half] * math.cos(angle) + part[j] * math.sin(angle)
    return turned


@pytest.mark.parametrize("kind", [1, 6])
@pytest.mark.parametrize("r", [1, 2, 3, 8, 30])  # r = 30: one block, filled with more than one copy of x
def test_formula(layer, agree_with_formula, kind, r):
    agree_with_formula(layer.adapter("mora", r=r, type=kind), lambda W, M: W + update(M, kind, *W.shape))


def adapter(n, k, **fields):
    cls = load("methods", "mora")
    made = cls(k, n, cls.config(**fields)).double()
    made.reset_parameters(torch.zeros(n, k), Site(name="w", seed=0, neighbours=list))
    torch.manual_seed(0)
    torch.nn.init.normal_(made.M)
    return made


@pytest.mark.parametrize("kind", [1, 6])
@pytest.mark.parametrize(("n", "k"), [(5, 23), (23, 5), (40, 3), (3, 40), (1, 3)])
def test_shapes_that_do_not_divide(n, k, kind):
    made = adapter(n, k, r=2, type=kind)
    x = torch.randn(4, k, dtype=torch.float64)
    expected = update(made.M, kind, n, k)
    # fp64 sums of a few dozen terms in another order
    torch.testing.assert_close(made.effective_weight(torch.zeros(n, k)), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(made(x, torch.zeros(n, k).double()), x @ expected.T, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("kind", "r", "side"), [(1, 4, 45), (6, 4, 44), (1, 8, 64), (6, 8, 64)])
def test_ranks(kind, r, side):
    """Sharing is held to rank r̂; rotation fills all 256 dimensions with the same r̂² numbers."""
    made = adapter(256, 256, r=r, type=kind)
    assert made.M.shape == (side, side)
    rank = torch.linalg.matrix_rank(made.delta_weight(torch.zeros(256, 256)).double(), rtol=1e-6)
    assert rank == (side if kind == 1 else 256)


def test_rotation_drops_the_inputs_whose_outputs_are_cut():
    delta = adapter(8, 100, r=1).delta_weight(torch.zeros(8, 100))  # r̂ = 10: one block of outputs
    assert delta[:, :10].count_nonzero() == 80
    assert delta[:, 10:].count_nonzero() == 0


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"r": 0}, "r"),
        ({"type": 2}, "type"),
        ({"dropout": 1.0}, "dropout"),
    ],
)
def test_bad_fields_are_named(refused, fields, named):
    refused("mora", fields, named)
