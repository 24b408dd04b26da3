"""OFT against its formula and PEFT's, as a BOFT, and what a step keeps."""

import math

import pytest
import torch

from highrank.base.registry import load

pytestmark = pytest.mark.parity


def skew(theta, b):
    S, place = torch.zeros(b, b, dtype=theta.dtype), 0
    for i in range(b):
        for j in range(i + 1, b):
            S[i, j], S[j, i] = theta[place], -theta[place]
            place += 1
    return S


def dense(theta, k, b, terms):
    """R as a k x k matrix; terms=None is exact."""
    eye, blocks = torch.eye(b, dtype=theta.dtype), []
    for g in range(k // b):
        S = skew(theta[g % len(theta)], b)
        if terms is None:
            R = (eye - S) @ torch.linalg.inv(eye + S)
        else:
            powers = [torch.linalg.matrix_power(S, i) for i in range(terms)]
            R = eye + 2 * sum(powers[1:-1]) + powers[-1]
        blocks.append(R)
    return torch.block_diag(*blocks)


CASES = [
    ({"block_size": 4}, 4, 5),
    ({"block_size": 16, "terms": 4}, 16, 4),
    ({"block_size": 2, "terms": 9}, 2, 9),
    ({"block_size": 0, "block_num": 2}, 8, 5),
    ({"block_size": 4, "block_share": True}, 4, 5),
    ({"block_size": 4, "neumann": False}, 4, None),
    ({"block_size": 8, "block_share": True, "neumann": False}, 8, None),
]


@pytest.mark.parametrize(("fields", "b", "terms"), CASES, ids=str)
def test_formula(layer, agree_with_formula, fields, b, terms):
    agree_with_formula(layer.adapter("oft", **fields), lambda W, theta: W @ dense(theta, 16, b, terms).T)


@pytest.mark.parametrize(("fields", "b", "terms"), CASES, ids=str)
def test_peft(layer, agree_with_peft, fields, b, terms):
    peft = pytest.importorskip("peft")
    theirs = {
        "oft_block_size": fields["block_size"],
        "r": fields.get("block_num", 0),
        "block_share": fields.get("block_share", False),
        "use_cayley_neumann": terms is not None,
        "num_cayley_neumann_terms": terms or 5,
    }
    config = peft.OFTConfig(**theirs, target_modules=["fc"])
    agree_with_peft(layer.adapter("oft", **fields), config, {"theta": "oft_R"})


def test_exact_is_boft_with_one_factor(layer):
    """With R = S and s = 1; the series turns the other way."""
    exact, series = (layer.adapter("oft", block_size=4, **form) for form in ({"neumann": False}, {"terms": 60}))
    boft = layer.adapter("boft", block_size=4, butterfly_factor=1)
    with torch.no_grad():
        exact.theta.mul_(0.5)
        series.theta.copy_(-exact.theta)
        boft.R.copy_(torch.stack([skew(theta, 4) for theta in exact.theta])[None])
        boft.s.fill_(1)
    for adapter in (exact, series):
        expected, actual = boft.effective_weight(layer.W), adapter.effective_weight(layer.W)
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)  # fp64; ‖S‖^60 is below 1e-12 of it
        y, y_boft = adapter(layer.x, layer.W, layer.bias), boft(layer.x, layer.W, layer.bias)
        torch.testing.assert_close(y, y_boft, rtol=1e-9, atol=1e-9)


def test_exact_keeps_the_lengths_of_rows(layer):
    adapter = layer.adapter("oft", block_size=8, neumann=False)
    torch.testing.assert_close(adapter.effective_weight(layer.W).norm(dim=1), layer.W.norm(dim=1), rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_keeps_x_and_the_blocks(dtype):
    cls = load("methods", "oft")
    adapter = cls(64, 48, cls.config(block_size=4)).requires_grad_()
    torch.nn.init.normal_(adapter.theta, std=0.1)
    W, x = torch.randn(48, 64, dtype=dtype), torch.randn(100, 64, dtype=dtype, requires_grad=True)
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t):
        adapter(x, W)
    of_tokens = [t for t in kept.values() if t.numel() >= x.numel()]
    assert {t.data_ptr() for t in of_tokens} <= {x.data_ptr()}
    assert all(math.prod(t.shape) <= 64 * 4 for t in kept.values() if t.data_ptr() not in (x.data_ptr(), W.data_ptr()))


def test_counts(params):
    # PEFT's comparison has r=32: blocks of 96 inputs
    assert params("model=llama3.2_3b placement=qv method=oft block_size=0 block_num=32").trainable == 8_171_520
    assert params("model=llama3_8b placement=qv method=oft").trainable == 32 * 2 * 4096 * 31 // 2


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"block_size": -1}, "block_size"),
        ({"block_size": 0}, "block_size"),
        ({"block_num": 4}, "block_num"),
        ({"block_size": 1}, "block_size"),
        ({"block_size": 32}, "block_size"),
        ({"block_size": 0, "block_num": 16}, "block_num"),
        ({"block_size": 4, "terms": 3}, "terms"),
        ({"block_size": 4, "terms": 6, "neumann": False}, "terms"),
        ({"block_size": 4, "terms": 10**9}, "terms"),
    ],
)
def test_bad_fields_are_named(refused, fields, named):
    refused("oft", fields, named)


@pytest.mark.parametrize(("fields", "nearest"), [({"block_size": 5}, "4 or 8"), ({"block_size": 32}, "16")], ids=str)
def test_the_nearest_sizes_are_named(fields, nearest):
    cls = load("methods", "oft")
    with pytest.raises(Exception, match=f"the nearest that do: {nearest}$"):
        cls.validate(16, 24, cls.config(**fields))
