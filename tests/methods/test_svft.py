"""SVFT against its formula; where its entries lie, whatever signs the singular vectors have."""

import pytest
import torch

from highrank.base.errors import UserError
from highrank.base.registry import load
from highrank.model.method import Site

NEAR = {"rtol": 1e-9, "atol": 1e-10}  # fp64 products of a few dozen terms in another order


def svd(W):
    U, S, Vt = torch.linalg.svd(W, full_matrices=False)
    for i in range(len(S)):
        if U[U[:, i].abs().argmax(), i] < 0:
            U[:, i], Vt[i] = -U[:, i], -Vt[i]
    return U, S, Vt


def places_of(adapter):
    q = len(adapter.Vt)
    if adapter.cfg.pattern == "plain":
        return [(i, i) for i in range(q)]
    return [(place // q, place % q) for place in adapter.places.tolist()]


def on(W, **fields):
    """A trained-looking adapter on W."""
    cls = load("methods", "svft")
    cfg = cls.config(**fields)
    cls.validate(W.shape[1], W.shape[0], cfg)
    adapter = cls(W.shape[1], W.shape[0], cfg).to(W.dtype)
    adapter.reset_parameters(W, Site("w", 3, lambda: []))
    torch.manual_seed(1)
    torch.nn.init.normal_(adapter.m, std=0.2)
    return adapter


FIELDS = [
    {"pattern": "plain"},
    {"pattern": "banded", "d": 1},
    {"pattern": "banded", "d": 15},
    {"pattern": "random", "d": 0},
    {"pattern": "random", "d": 3},
]


@pytest.mark.parity
@pytest.mark.parametrize("repeats", [1, 4])  # of the longer input the update is built
@pytest.mark.parametrize("fields", FIELDS, ids=str)
def test_formula(layer, agree_with_formula, fields, repeats):
    """The sum of m_ij u_i v_jᵀ."""
    layer.x, layer.dy = layer.x.repeat(repeats, 1), layer.dy.repeat(repeats, 1)
    adapter = layer.adapter("svft", **fields)
    U, _, Vt = svd(layer.W)
    places = places_of(adapter)
    agree_with_formula(
        adapter, lambda W, m: W + sum(m[t] * torch.outer(U[:, i], Vt[j]) for t, (i, j) in enumerate(places))
    )


@pytest.mark.parametrize("d", [1, 4, 15])
def test_banded_is_the_band(layer, d):
    assert places_of(layer.adapter("svft", pattern="banded", d=d)) == [
        (i, j) for i in range(16) for j in range(16) if i - d <= j <= i + d
    ]


def test_top_k_takes_the_best_aligned_pairs_of_a_square_weight(layer):
    W = layer.W[:16]
    adapter = on(W, pattern="top_k", d=2)
    U, _, Vt = svd(W)
    alignment = {(i, j): abs(float(U[:, i] @ Vt[j])) for i in range(16) for j in range(16)}
    best = sorted(alignment, key=alignment.get, reverse=True)[: len(adapter.m)]
    assert places_of(adapter) == sorted(best)
    longhand = sum(m * torch.outer(U[:, i], Vt[j]) for m, (i, j) in zip(adapter.m, places_of(adapter), strict=True))
    torch.testing.assert_close(adapter.effective_weight(W), W + longhand, **NEAR)


def test_random_places_are_a_function_of_the_site(layer):
    cls = load("methods", "svft")

    def places(seed):
        adapter = cls(16, 24, cls.config(pattern="random", d=2))
        adapter.reset_parameters(layer.W.float(), Site("w", seed, lambda: []))
        assert len(set(adapter.places.tolist())) == len(adapter.m)
        return adapter.places.tolist()

    assert places(3) == places(3) != places(4)


def test_signs_of_the_singular_vectors_are_fixed(layer, monkeypatch):
    """Another library may return either sign of a pair."""
    expected = on(layer.W, pattern="banded", d=1)
    svd = torch.linalg.svd

    def flipped(W, full_matrices):
        U, S, Vt = svd(W, full_matrices=full_matrices)
        signs = torch.ones(len(S), dtype=W.dtype)
        signs[::3] = -1
        return U * signs, S, Vt * signs[:, None]

    monkeypatch.setattr(torch.linalg, "svd", flipped)
    adapter = on(layer.W, pattern="banded", d=1)
    assert torch.equal(adapter.U, expected.U)
    assert torch.equal(adapter.Vt, expected.Vt)


@pytest.mark.parametrize("fields", FIELDS[:2] + FIELDS[4:] + [{"pattern": "top_k", "d": 1}], ids=str)
def test_singular_vectors_of_close_singular_values_are_those_in_fp64(layer, fields):
    """In fp32 they depend on the order of its sums, so on the machine, and m is saved without them."""
    U, _, Vt = svd(layer.W[:16])
    W = ((U * torch.linspace(1, 1 + 1e-4, 16, dtype=torch.float64)) @ Vt).float()
    cls = load("methods", "svft")
    narrow, wide = (cls(16, 16, cls.config(**fields)).to(dtype) for dtype in (torch.float32, torch.float64))
    for adapter in (narrow, wide):
        adapter.reset_parameters(W, Site("w", 3, lambda: []))
    assert torch.equal(narrow.U, wide.U.float())
    assert torch.equal(narrow.Vt, wide.Vt.float())
    assert places_of(narrow) == places_of(wide)


@pytest.mark.parity
def test_plain_changes_the_singular_values_alone(layer):
    adapter = on(layer.W)
    U, S, Vt = svd(layer.W)
    W = adapter.effective_weight(layer.W)
    torch.testing.assert_close(U.T @ W @ Vt.T, torch.diag(S + adapter.m), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(torch.linalg.svdvals(W), (S + adapter.m).abs().sort(descending=True).values, **NEAR)


@pytest.mark.parity
def test_with_every_diagonal_it_is_any_update_in_the_span(layer):
    """(IA)³ on the inputs, for one: its update W (diag(l) - 1) has the columns' space of W."""
    ia3, adapter = layer.adapter("ia3", side="in"), on(layer.W, pattern="banded", d=15)
    with torch.no_grad():
        delta = ia3.effective_weight(layer.W) - layer.W
        adapter.m.copy_((adapter.U.T @ delta @ adapter.Vt.T).flatten())
    torch.testing.assert_close(adapter.effective_weight(layer.W), ia3.effective_weight(layer.W), **NEAR)
    torch.testing.assert_close(
        adapter(layer.x, layer.W, layer.bias), ia3(layer.x, layer.W, layer.bias), rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [5, 50])
@pytest.mark.parametrize("fields", FIELDS[:2], ids=str)
def test_a_step_keeps_no_matrix(layer, dtype, tokens, fields):
    """Built, it keeps x and m; for few tokens the inputs' coordinates, and what the adapter has."""
    W = layer.W.to(dtype)
    adapter = on(layer.W.float(), **fields)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        x = torch.randn(tokens, 16, dtype=dtype, requires_grad=True)
        adapter(x, W)
    known = {t.data_ptr() for t in (x, W, adapter.m, *adapter.buffers())}
    assert [t.shape for t in kept if t.data_ptr() not in known] == [x.shape] * (tokens == 5)


def test_counts(params):
    found = params("model=llama3_8b placement=qv method=svft")
    assert found.trainable == 32 * (4096 + 1024)
    assert found.frozen_extra == 32 * (4096 * 8192 + 1024 * 5120)
    found = params("model=llama3_8b placement=qv method=svft pattern=random d=12")
    assert found.trainable == 32 * ((4096 + 1024) * 25 - 2 * 12 * 13)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"pattern": "diagonal"}, "pattern"),
        ({"d": 1}, "d"),
        ({"pattern": "banded"}, "d"),
        ({"pattern": "banded", "d": -1}, "d"),
        ({"pattern": "banded", "d": 16}, "d"),
        ({"pattern": "top_k", "d": 1}, "pattern"),
    ],
)
def test_bad_fields_are_named(refused, fields, named):
    refused("svft", fields, named)


def test_the_largest_d_is_named():
    cls = load("methods", "svft")
    with pytest.raises(UserError, match=r"at most d=15$"):
        cls.validate(16, 24, cls.config(pattern="random", d=16))
