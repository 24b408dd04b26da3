"""HiRA against its formula with every R, and PEFT's; what a step keeps, and small updates on a 16-bit base."""

import pytest
import torch
import torch.nn.functional as F

from highrank.base.registry import load
from highrank.model.method import Site

pytestmark = pytest.mark.parity


def test_formula(layer, agree_with_formula):
    agree_with_formula(layer.adapter("hira", r=3), lambda W, A, B: W + W * (A @ B))


def test_peft(layer, agree_with_peft):
    peft = pytest.importorskip("peft")
    config = peft.HiraConfig(r=3, target_modules=["fc"])
    agree_with_peft(layer.adapter("hira", r=3), config, {"A": "hira_B", "B": "hira_A"})


def R_uniform(layer):
    return torch.rand(layer.W.shape, generator=torch.Generator().manual_seed(3)).double()


def R_scaled(layer):
    return torch.randn(layer.W.shape, generator=torch.Generator().manual_seed(3)).double() * layer.W.std()


def R_trunc(layer):
    U, S, Vt = torch.linalg.svd(layer.W)
    return sum(S[i] * torch.outer(U[:, i], Vt[i]) for i in range(4))


def R_smooth(layer):
    before, W, after = layer.neighbours
    return (before + W + after) / 3


@pytest.mark.parametrize(
    ("kwargs", "R"),
    [
        ({"R": "random_uniform"}, R_uniform),
        ({"R": "random_scaled"}, R_scaled),
        ({"R": "w0_trunc", "R_rank": 4}, R_trunc),
        ({"R": "w0_smooth"}, R_smooth),
        ({"R": "ones"}, lambda layer: torch.ones_like(layer.W)),
    ],
    ids=lambda value: value["R"] if isinstance(value, dict) else "",
)
def test_other_choices_of_R(layer, agree_with_formula, kwargs, R):
    agree_with_formula(layer.adapter("hira", r=3, **kwargs), lambda W, A, B: W + R(layer) * (A @ B))


def test_random_R_depends_on_the_seed_of_its_site_alone(layer):
    cls = load("methods", "hira")
    adapter = cls(16, 24, cls.config(r=2, R="random_uniform"))
    drawn = []
    for seed, global_seed in [(3, 0), (3, 1), (4, 0)]:
        torch.manual_seed(global_seed)
        adapter.reset_parameters(layer.W, Site(name="w", seed=seed, neighbours=list))
        drawn.append(adapter.R.clone())
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saves_nothing_large_but_references(layer, dtype):
    """Backward keeps x, W, A and B themselves: no (n, k) product, and no copy."""
    adapter = layer.adapter("hira", r=3).float()
    x, W = layer.x.to(dtype).requires_grad_(), layer.W.to(dtype)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        adapter(x, W)
    assert set(kept) == {t.data_ptr() for t in (x, W, adapter.A, adapter.B)}


def test_official_numerics_round_the_factor_to_bf16(layer):
    """The published code computes W ⊙ (A B + 1) under bf16 autocast."""
    adapter = layer.adapter("hira", r=3, official_numerics=True).float()
    W, x = layer.W.bfloat16(), layer.x.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        published = W * (adapter.A @ adapter.B + 1)
        expected = F.linear(x, published, layer.bias.bfloat16())
    assert published.dtype == torch.bfloat16
    assert torch.equal(adapter(x, W, layer.bias.bfloat16()), expected)
    adapter(x, W).float().square().sum().backward()
    assert adapter.A.grad.isfinite().all()
    assert adapter.B.grad.isfinite().all()


def test_a_small_update_survives_a_bf16_base_unless_official():
    """At |A B| about 1e-3 bf16 rounds 1 + A B to 1 nearly everywhere, and with it the update away."""
    rng = torch.Generator().manual_seed(0)
    W, x = torch.randn(64, 64, generator=rng).bfloat16(), torch.eye(64).bfloat16()
    cls = load("methods", "hira")
    surviving = {}
    for official in (False, True):
        adapter = cls(64, 64, cls.config(r=8, official_numerics=official))
        torch.manual_seed(0)
        adapter.reset_parameters(W, Site(name="w", seed=0, neighbours=list))
        torch.nn.init.normal_(adapter.A, std=1e-3 / (adapter.B.std().item() * 8**0.5))
        surviving[official] = (adapter.delta_weight(W) != 0).float().mean().item()
        with torch.no_grad():
            adapter.A.mul_(20)  # now large enough to see in a bf16 output, where x = I reads W' off
            torch.testing.assert_close(
                adapter(x, W).float(), adapter.effective_weight(W).T.float(), rtol=2**-7, atol=1e-6
            )  # two roundings to bf16
    assert surviving[False] == 1
    assert surviving[True] < 0.1


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"r": 0}, "r"),
        ({"R": "w1"}, "R"),
        ({"R": "w0_trunc"}, "R_rank"),
        ({"R": "w0_trunc", "R_rank": 0}, "R_rank"),
        ({"R": "w0_trunc", "R_rank": 17}, "R_rank"),
        ({"R_rank": 4}, "R_rank"),
        ({"R": "ones", "official_numerics": True}, "official_numerics"),
    ],
)
def test_bad_fields_are_named(refused, fields, named):
    refused("hira", fields, named)
