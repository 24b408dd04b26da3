"""MiSS against its three formulas and PEFT's; its ranks, and what a step keeps."""

import pytest
import torch

from highrank.base.errors import UserError
from highrank.base.registry import load

pytestmark = pytest.mark.parity

N, K = 24, 16


def tiled(W, D):
    rows = [[D[i % len(D), o % D.shape[1]] for i in range(K)] for o in range(N)]
    return W + torch.stack([torch.stack(row) for row in rows])


def bat(W, D):
    r = D.shape[-1]
    rows = []
    for i in range(N // r):
        blocks = [W[i * r : (i + 1) * r, j * r : (j + 1) * r] for j in range(K // r)]
        rows.append(torch.cat([block + block @ D[i] + D[i] for block in blocks], dim=1))
    return torch.cat(rows)


CASES = [
    ({"r": 4}, tiled, {"init_weights": True}),
    ({"r": 7}, tiled, {"init_weights": True}),
    ({"r": 16}, tiled, {"init_weights": True}),
    ({"r": 5, "dropout": 0.5}, None, {"init_weights": True, "miss_dropout": 0.5}),
    ({"r": 4, "type": "mini", "mini_r": 6}, tiled, {"init_weights": "mini", "mini_r": 6}),
    ({"r": 6, "type": "mini"}, tiled, {"init_weights": "mini", "mini_r": 1}),
    ({"r": 8, "type": "bat"}, bat, {"init_weights": "bat"}),
    ({"r": 2, "type": "bat"}, bat, {"init_weights": "bat"}),
    ({"r": 1, "type": "bat"}, bat, {"init_weights": "bat"}),
]


@pytest.mark.parametrize(
    ("fields", "formula"),
    [case[:2] for case in CASES if case[1]],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_formula(layer, agree_with_formula, fields, formula):
    agree_with_formula(layer.adapter("miss", **fields), formula)


@pytest.mark.parametrize(("fields", "theirs"), [case[::2] for case in CASES], ids=str)
def test_peft(layer, agree_with_peft, fields, theirs):
    peft = pytest.importorskip("peft")
    if "dropout" in fields:  # theirs drops inputs after they are filled up to a multiple of r
        fields, theirs = {**fields, "r": 4}, {**theirs, "r": 4}
    config = peft.MissConfig(**{"r": fields["r"], **theirs}, target_modules=["fc"])
    agree_with_peft(layer.adapter("miss", **fields), config, {"D": "miss_block"})


@pytest.mark.parametrize("r", [4, 7])
def test_plain_is_lora_with_a_row_of_unit_matrices(layer, r):
    miss, lora = layer.adapter("miss", r=r), layer.adapter("lora", r=r, alpha=r)
    with torch.no_grad():
        lora.A.copy_(torch.eye(r).repeat(1, K)[:, :K])
        lora.B.copy_(miss.D.T)
    near = {"rtol": 1e-12, "atol": 1e-12}  # fp64 sums in another order
    torch.testing.assert_close(miss.effective_weight(layer.W), lora.effective_weight(layer.W), **near)
    torch.testing.assert_close(miss(layer.x, layer.W, layer.bias), lora(layer.x, layer.W, layer.bias), **near)


@pytest.mark.parametrize(
    ("fields", "rank"),
    [({"r": 5}, 5), ({"r": 6, "type": "mini", "mini_r": 4}, 4), ({"r": 2, "type": "bat"}, 16)],
    ids=str,
)
def test_ranks(layer, fields, rank):
    delta = layer.adapter("miss", **fields).effective_weight(layer.W) - layer.W
    assert torch.linalg.matrix_rank(delta) == rank


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("fields", "numbers"),
    [({"r": 4}, 5 * 4), ({"r": 4, "type": "mini", "mini_r": 2}, 5 * 4), ({"r": 4, "type": "bat"}, 0)],
)
def test_a_step_keeps_the_summed_inputs_or_x(dtype, fields, numbers):
    """Beside x, W and D (and its copy in 16 bits)."""
    cls = load("methods", "miss")
    adapter = cls(K, N, cls.config(**fields))
    torch.nn.init.normal_(adapter.D)
    W, x, kept = torch.randn(N, K, dtype=dtype), torch.randn(5, K, dtype=dtype, requires_grad=True), {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t):
        adapter(x, W)
    known = {t.data_ptr() for t in (x, W, adapter.D)}
    own = [t for pointer, t in kept.items() if pointer not in known and t.numel() != adapter.D.numel()]
    assert sum(t.numel() for t in own) == numbers


# Of PEFT's comparison
COUNTS = {"r=64": 7_340_032, "type=mini r=64 mini_r=64": 229_376, "type=bat r=64": 7_340_032}


@pytest.mark.parametrize(("words", "trainable"), COUNTS.items())
def test_counts(params, words, trainable):
    assert params(f"model=llama3.2_3b placement=qv method=miss {words}").trainable == trainable


def test_count_on_llama3_8b(params):
    assert params("model=llama3_8b placement=all method=miss").trainable == 64 * 32 * (
        2 * 4096 + 2 * 1024 + 2 * 14336 + 4096
    )


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"r": 0}, "r"),
        ({"r": 17}, "r"),
        ({"r": 4, "type": "bone"}, "type"),
        ({"r": 4, "type": "mini", "mini_r": 0}, "mini_r"),
        ({"r": 4, "type": "mini", "mini_r": 5}, "mini_r"),
        ({"r": 4, "mini_r": 2}, "mini_r"),
        ({"r": 3, "type": "bat"}, "r"),
        ({"r": 16, "type": "bat"}, "r"),
        ({"r": 4, "dropout": 1.0}, "dropout"),
        ({"r": 4, "type": "bat", "dropout": 0.1}, "dropout"),
    ],
)
def test_bad_fields_are_named(refused, fields, named):
    refused("miss", fields, named)


@pytest.mark.parametrize(
    ("fields", "nearest"),
    [({"r": 5, "type": "bat"}, "4 or 8"), ({"r": 4, "type": "mini", "mini_r": 5}, "4 or 6")],
    ids=str,
)
def test_the_nearest_sizes_are_named(fields, nearest):
    cls = load("methods", "miss")
    with pytest.raises(UserError, match=f"the nearest that do: {nearest}$"):
        cls.validate(K, N, cls.config(**fields))
