"""RandLoRA against its formula and PEFT's, its bases bit for bit, and what a step keeps."""

import pytest
import torch
from torch import nn

from highrank.base.registry import load
from highrank.model.method import Site

pytestmark = pytest.mark.parity


def longhand(adapter, lambda_, gamma):
    """The sum of s λ_ij c (A_i ⊙ γ_j)ᵀ over all i and j, c the next column of all bases."""
    A, B = adapter.shared_tensors.A, adapter.shared_tensors.B
    r, bases = lambda_.shape
    m, M = sorted((adapter.in_features, adapter.out_features))
    columns = iter([B[:M, j, i] for j in range(bases) for i in range(r)])
    delta = sum(
        adapter.cfg.scaling * lambda_[i, j] * torch.outer(next(columns), A[i, 0, :m] * gamma[j])
        for i in range(r)
        for j in range(bases)
    )
    return delta if adapter.out_features >= adapter.in_features else delta.T


FIELDS = [{"r": 4}, {"r": 5, "alpha": 3.0}, {"r": 16}, {"r": 20}, {"r": 1, "projection_prng_key": 5}]


@pytest.mark.parametrize("tokens", [7, 14])  # the longer input has the update built
@pytest.mark.parametrize("fields", FIELDS, ids=str)
def test_formula(layer, agree_with_formula, fields, tokens):
    layer.x, layer.dy = layer.x.repeat(2, 1)[:tokens], layer.dy.repeat(2, 1)[:tokens]
    adapter = layer.adapter("randlora", **fields)
    agree_with_formula(adapter, lambda W, **parameters: W + longhand(adapter, **parameters))


@pytest.mark.parametrize("fields", [*FIELDS, {"r": 4, "dropout": 0.5}], ids=str)
def test_peft(layer, agree_with_peft, fields):
    peft = pytest.importorskip("peft")
    theirs = {"r": fields["r"], "randlora_alpha": fields.get("alpha", 20 * fields["r"])}
    theirs |= {
        "randlora_dropout": fields.get("dropout", 0.0),
        "projection_prng_key": fields.get("projection_prng_key", 0),
    }
    config = peft.RandLoraConfig(**theirs, target_modules=["fc"])
    names = {"lambda_": "randlora_lambda", "gamma": "randlora_gamma"}
    agree_with_peft(layer.adapter("randlora", **fields), config, names)


def wide(fields, dtype=torch.float64):
    """An adapter on a weight with fewer rows than columns, and its weight, input and ∂y."""
    cls, rng = load("methods", "randlora"), torch.Generator().manual_seed(0)
    cfg = cls.config(**fields)
    adapter = cls(24, 16, cfg, cls.shared([(16, 24)], cfg).to(dtype)).to(dtype)
    W, x, dy = (torch.randn(shape, generator=rng, dtype=dtype) for shape in ((16, 24), (7, 24), (7, 16)))
    adapter.reset_parameters(W, Site("w", 0, lambda: []))
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=rng, dtype=dtype))
    return adapter, W, x, dy


@pytest.mark.parametrize("repeats", [1, 3])
@pytest.mark.parametrize("fields", [{"r": 4}, {"r": 5}], ids=str)
def test_peft_on_a_wide_weight(fields, repeats):
    peft = pytest.importorskip("peft")
    adapter, W, x, dy = wide(fields)
    x, dy = x.repeat(repeats, 1).requires_grad_(), dy.repeat(repeats, 1)
    model = nn.Sequential()
    model.add_module("fc", nn.Linear(24, 16, bias=False, dtype=torch.float64))
    model.fc.load_state_dict({"weight": W})
    config = peft.RandLoraConfig(r=fields["r"], randlora_alpha=20 * fields["r"], target_modules=["fc"])
    theirs = peft.get_peft_model(model, config).double()
    fc = theirs.base_model.model.fc
    parameters = [fc.randlora_lambda["default"], fc.randlora_gamma["default"]]
    with torch.no_grad():
        for parameter, ours in zip(parameters, adapter.parameters(), strict=True):
            parameter.copy_(ours)
    y, expected = adapter(x, W), theirs(x)
    near = {"rtol": 1e-9, "atol": 1e-10}  # fp64 sums of a few dozen terms in another order
    torch.testing.assert_close(y, expected, **near)
    gradients = torch.autograd.grad((y * dy).sum(), [x, *adapter.parameters()])
    for actual, wanted in zip(gradients, torch.autograd.grad((expected * dy).sum(), [x, *parameters]), strict=True):
        torch.testing.assert_close(actual, wanted, **near)
    torch.testing.assert_close(adapter.effective_weight(W), theirs.merge_and_unload().fc.weight, **near)
    torch.testing.assert_close(adapter.effective_weight(W), W + longhand(adapter, *adapter.parameters()), **near)


@pytest.mark.parametrize("key", [0, 7])
def test_bases_are_peft_bit_for_bit(key):
    peft = pytest.importorskip("peft")
    shapes = [(24, 16), (8, 40), (20, 24)]
    model = nn.Sequential(*(nn.Linear(k, n) for n, k in shapes))
    config = peft.RandLoraConfig(r=5, projection_prng_key=key, target_modules=["0", "1", "2"])
    theirs = peft.get_peft_model(model, config).base_model
    cls = load("methods", "randlora")
    ours = cls.shared(shapes, cls.config(r=5, projection_prng_key=key))
    assert torch.equal(ours.A, theirs.randlora_A["default"].float())
    assert torch.equal(ours.B, theirs.randlora_B["default"].float())


def test_with_one_basis_on_a_wide_weight_it_is_vera():
    adapter, W, x, _ = wide({"r": 16})
    vera = load("methods", "vera")
    shared = nn.Module()
    shared.A, shared.B = adapter.shared_tensors.B[:, 0].T, adapter.shared_tensors.A[:, 0].T
    other = vera(24, 16, vera.config(r=16), shared).double()
    with torch.no_grad():
        other.lambda_b.copy_(adapter.gamma[0])
        other.lambda_d.copy_(adapter.cfg.scaling * adapter.lambda_[:, 0])
    near = {"rtol": 1e-11, "atol": 1e-11}  # fp64 sums in another order
    torch.testing.assert_close(adapter.effective_weight(W), other.effective_weight(W), **near)
    torch.testing.assert_close(adapter(x, W), other(x, W), **near)


def test_the_update_has_full_rank(layer):
    delta = layer.adapter("randlora", r=5).effective_weight(layer.W) - layer.W
    assert torch.linalg.matrix_rank(delta) == 16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(24, 16), (16, 24)])
@pytest.mark.parametrize("tokens", [64, 4])
def test_a_step_keeps_no_matrix(dtype, shape, tokens):
    """Beside x, W and γ it keeps s λ; for few tokens the bases, which the model has, and what passes between two products."""
    cls, (n, k) = load("methods", "randlora"), shape
    cfg = cls.config(r=4)
    adapter = cls(k, n, cfg, cls.shared([shape], cfg))
    torch.nn.init.normal_(adapter.lambda_)
    torch.nn.init.normal_(adapter.gamma)
    W, x, kept = torch.randn(n, k, dtype=dtype), torch.randn(tokens, k, dtype=dtype, requires_grad=True), {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t):
        adapter(x, W)
    known = {t.data_ptr() for t in (x, W, adapter.gamma, *adapter.shared_tensors.buffers())}
    own = sorted(t.numel() for pointer, t in kept.items() if pointer not in known)
    assert own == [4 * 4] + [tokens * 16] * (tokens == 4 and n < k)


def test_counts(params):
    found = params("model=llama3.2_3b placement=qv method=randlora")
    assert found.trainable == 9_289_728  # as PEFT's comparison has it
    assert found.frozen_extra == 32 * 3072 + 3072 * 96 * 32
    found = params("model=llama3_8b placement=qv method=randlora r=16")
    assert found.trainable == 32 * (256 * (16 + 4096) + 64 * (16 + 1024))


@pytest.mark.parametrize(
    ("fields", "named"), [({"r": 0}, "r"), ({"alpha": 0.0}, "alpha"), ({"dropout": 1.0}, "dropout")]
)
def test_bad_fields_are_named(refused, fields, named):
    refused("randlora", fields, named)
