"""Methods that are special cases of one another, in fp64: whole weights, outputs and gradients."""

import pytest
import torch
from moved import move

from highrank.base.registry import available, load
from highrank.model.method import Site

N, K = 24, 16
ROUNDING = {"rtol": 1e-12, "atol": 1e-12}  # the same fp64 numbers, summed in another order


@pytest.fixture
def W():
    return torch.randn(N, K, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.fixture
def x():
    return torch.randn(5, K, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def make(name, W, **kwargs):
    """Returns an adapter at its start, in W's dtype."""
    cls = load("methods", name)
    cfg = cls.config(**kwargs)
    shared = cls.shared([(N, K)], cfg)
    adapter = cls(K, N, cfg, None if shared is None else shared.to(W.dtype)).to(W.dtype)
    adapter.reset_parameters(W, Site(name="w", seed=0, neighbours=lambda: [W]))
    return adapter


def fill(adapter, **values):
    with torch.no_grad():
        for key, value in values.items():
            adapter.get_parameter(key).copy_(value)
    return adapter


def draw(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def assert_same(first, second, W, x):
    torch.testing.assert_close(first.effective_weight(W), second.effective_weight(W), **ROUNDING)
    torch.testing.assert_close(first(x, W), second(x, W), **ROUNDING)


def test_hyperadapt_is_hira_with_A_a_minus1_and_B_b_1(W, x):
    a, b = draw(N), draw(K)
    hyperadapt = fill(make("hyperadapt", W), a=a, b=b)
    A, B = torch.stack([a, -torch.ones(N)], dim=1), torch.stack([b, torch.ones(K)])
    assert_same(hyperadapt, fill(make("hira", W, r=2), A=A, B=B), W, x)


def test_hira_with_R_1_is_lora_with_scaling_1(W, x):
    A, B = draw(N, 3), draw(3, K)
    hira = fill(make("hira", W, r=3, R="ones"), A=A, B=B)
    assert_same(hira, fill(make("lora", W, r=3, alpha=3.0), A=B, B=A), W, x)


def test_hilora_with_r2_0_is_hira(W, x):
    A, B = draw(N, 3), draw(3, K)
    hilora = fill(make("hilora", W, r1=3, r2=0), A=A, B=B)
    assert_same(hilora, fill(make("hira", W, r=3), A=A, B=B), W, x)


def test_hilora_with_r1_0_is_lora(W, x):
    A, B = draw(N, 3), draw(3, K)
    hilora = fill(make("hilora", W, r1=0, r2=3, s=0.5), L1=A, L2=B)
    assert_same(hilora, fill(make("lora", W, r=3, alpha=1.5), A=B, B=A), W, x)


def test_dora_with_m_the_norm_of_V_is_lora(W, x):
    A, B = draw(3, K), draw(N, 3)
    lora = fill(make("lora", W, r=3), A=A, B=B)
    dora = fill(make("dora", W, r=3), A=A, B=B, m=lora.effective_weight(W).norm(dim=1))
    assert_same(dora, lora, W, x)


def test_boft_with_R_0_is_ia3_and_hyperadapt_with_b_1(W, x):
    s = draw(N)
    boft = fill(make("boft", W), s=s)
    assert_same(boft, fill(make("hyperadapt", W), a=s), W, x)
    assert_same(boft, fill(make("ia3", W, side="out"), l=s[:, None]), W, x)


def test_full_rank_trunc_and_lone_smooth_are_w0(W, x):
    A, B = draw(N, 3), draw(3, K)
    hira = fill(make("hira", W, r=3), A=A, B=B)
    for kwargs in ({"R": "w0_trunc", "R_rank": K}, {"R": "w0_smooth"}):
        assert_same(fill(make("hira", W, r=3, **kwargs), A=A, B=B), hira, W, x)


@pytest.mark.parametrize(
    ("name", "neutral"),
    [("lora", "B"), ("hira", "A"), ("vera", "lambda_b"), ("boft", "R"), ("mora", "M")],
    ids=lambda value: value,
)
def test_a_neutral_factor_is_the_base(W, x, name, neutral):
    adapter = make(name, W)
    for key, parameter in adapter.named_parameters():
        if key not in (neutral, *adapter.no_decay):
            torch.nn.init.normal_(parameter)
    assert torch.equal(adapter.effective_weight(W), W)


@pytest.mark.parametrize("name", [m for m in available("methods") if load("methods", m).family.changes_weights])
def test_merged_and_unmerged_agree_in_fp32(W, x, name):
    W, x = W.float(), x.float()
    adapter = make(name, W, **load("methods", name).examples[0])
    move(adapter, 0.1, seed=0)
    y, merged = adapter(x, W), x @ adapter.effective_weight(W).T
    assert (y - merged).norm() <= 1e-5 * merged.norm()  # fp32 sums of a few dozen terms


@pytest.mark.parametrize("shape", [(4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336)])
def test_lora_of_rank_1_counts_as_hyperadapt(shape):
    n, k = shape
    lora, hyperadapt = load("methods", "lora"), load("methods", "hyperadapt")
    assert lora.num_trainable(k, n, lora.config(r=1)) == hyperadapt.num_trainable(k, n, hyperadapt.config()) == n + k
