"""What every method promises, on one tiny weight. A new file in methods/ is tested here without being named."""

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from moved import move
from torch.autograd import gradcheck
from torch.func import functional_call

from highrank.base.registry import available, load
from highrank.model.method import Site

pytestmark = pytest.mark.contract

N, K = 24, 16

WEIGHT_METHODS = [name for name in available("methods") if load("methods", name).family.changes_weights]
CASES = [
    pytest.param(name, kwargs, id="-".join([name, *(f"{key}={value}" for key, value in kwargs.items())]))
    for name in WEIGHT_METHODS
    for kwargs in load("methods", name).examples
]
# Reading order: dtype of W and x, dtype of the parameters, error allowed relative to the largest entry.
# fp64 and fp32: a few dozen roundings of 1e-16 and 6e-8. bf16: three roundings (W', y, the sum) of 2^-9, doubled for luck.
DTYPES = [
    pytest.param(torch.float64, torch.float64, 1e-12, id="fp64"),
    pytest.param(torch.float32, torch.float32, 1e-5, id="fp32"),
    pytest.param(torch.bfloat16, torch.float32, 2**-6, id="bf16-base"),
]


def weight(dtype=torch.float32):
    return torch.randn(N, K, generator=torch.Generator().manual_seed(1)).to(dtype)


def build(name, kwargs, W, dtype=torch.float32, seed=0, moved=True):
    """Returns an adapter on W, away from its start if `moved`."""
    cls = load("methods", name)
    cfg = cls.config(**kwargs)
    cls.validate(K, N, cfg)
    shared = cls.shared([(N, K)], cfg)
    adapter = cls(K, N, cfg, None if shared is None else shared.to(dtype)).to(dtype)
    torch.manual_seed(seed)
    adapter.reset_parameters(W, Site(name="w", seed=0, neighbours=lambda: [W, W.flip(0)]))
    if moved:
        move(adapter, 0.1)
    return adapter


def inputs(dtype=torch.float32, shape=(5, K)):
    rng = torch.Generator().manual_seed(2)
    return torch.randn(shape, generator=rng).to(dtype), torch.randn(N, generator=rng).to(dtype)


def assert_near(actual, expected, error):
    """Compares whole tensors; `error` is relative to the largest expected entry."""
    expected = expected.double()
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=error * max(1.0, expected.abs().max().item()))


def gradients(adapter, y, x):
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(3)).to(y.dtype)
    return torch.autograd.grad((y * weights).sum(), [x, *adapter.parameters()])


@pytest.mark.parametrize(("name", "kwargs"), CASES)
def test_starts_at_the_base(name, kwargs):
    W = weight()
    adapter = build(name, kwargs, W, moved=False)
    if adapter.exact_at_init:
        assert_near(adapter.effective_weight(W), W, 2e-7)  # one rounding, of DoRA's m / ‖W_i‖
        x, bias = inputs()
        assert_near(adapter(x, W, bias), F.linear(x, W, bias), 1e-6)  # sums in another order


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(("base", "dtype", "error"), DTYPES)
@pytest.mark.parametrize(("name", "kwargs"), CASES)
def test_forward_is_effective_weight(name, kwargs, base, dtype, error, train):
    W = weight(base)
    adapter = build(name, kwargs, W, dtype).train(train)
    effective = adapter.effective_weight(W)
    assert effective.dtype == torch.promote_types(base, dtype)
    for shape in [(K,), (5, K), (2, 3, K)]:
        x, bias = inputs(base, shape)
        for c in (bias, None):
            expected = F.linear(x.double(), effective.double(), None if c is None else c.double())
            with torch.no_grad():
                first, second = adapter(x, W, c), adapter(x, W, c)  # in eval the second call reads the cache
            with_grad = adapter(x, W, c)
            for y in (first, second, with_grad):
                assert y.dtype == base
                assert_near(y, expected, error)


@pytest.mark.parametrize(("base", "dtype", "error"), DTYPES)
@pytest.mark.parametrize(("name", "kwargs"), CASES)
def test_gradients_are_those_of_effective_weight(name, kwargs, base, dtype, error):
    W = weight(base)
    adapter = build(name, kwargs, W, dtype)
    x, bias = inputs(base, (2, 3, K))
    actual = gradients(adapter, adapter(x.requires_grad_(), W, bias), x)
    wide = build(name, kwargs, W, dtype).double()
    if wide.shared_tensors is not None:
        wide.shared_tensors.double()
    x = x.detach().double().requires_grad_()
    expected = gradients(wide, F.linear(x, wide.effective_weight(W.double()), bias.double()), x)
    for a, e in zip(actual, expected, strict=True):
        assert_near(a, e, 4 * error)  # the backward pass rounds as often again, and sums over tokens


@pytest.mark.parametrize(("name", "kwargs"), CASES)
def test_gradcheck(name, kwargs):
    W = weight(torch.float64)
    adapter = build(name, kwargs, W, torch.float64)
    if not adapter.exact_gradient:
        pytest.skip("the method stops a gradient on purpose; its parity test holds the longhand form")
    x, bias = inputs(torch.float64, (2, 2, K))
    names = [key for key, _ in adapter.named_parameters()]

    def forward(x, bias, *values):
        return functional_call(adapter, dict(zip(names, values, strict=True)), (x, W, bias))

    values = [p.detach().clone().requires_grad_() for p in adapter.parameters()]
    assert gradcheck(forward, (x.requires_grad_(), bias.requires_grad_(), *values), fast_mode=True)


@pytest.mark.parametrize(("name", "kwargs"), CASES)
def test_trains_its_parameters_and_nothing_else(name, kwargs):
    W = weight()
    adapter = build(name, kwargs, W)
    x, bias = inputs()
    y = adapter(x, W, bias)
    leaves, nodes, seen = set(), [y.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves.add(id(node.variable))
        nodes.extend(parent for parent, _ in node.next_functions)
    assert leaves == {id(p) for p in adapter.parameters()}
    y.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in adapter.parameters())
    assert all(p.dtype == torch.float32 for p in adapter.parameters())
    assert set(adapter.no_decay) <= {key for key, _ in adapter.named_parameters()}


@pytest.mark.parametrize(("name", "kwargs"), CASES)
def test_frozen_inputs_need_no_gradient(name, kwargs):
    """A parameter may be frozen, and x need no gradient, without breaking the backward pass of the others."""
    W = weight()
    adapter = build(name, kwargs, W)
    x, bias = inputs()
    expected = gradients(adapter, adapter(x.requires_grad_(), W, bias), x)[1:]
    for (key, parameter), gradient in zip(adapter.named_parameters(), expected, strict=True):
        alone = copy.deepcopy(adapter).requires_grad_(False)
        alone.get_parameter(key).requires_grad_(True)
        y = alone(x.detach(), W, bias)
        weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(3))
        (y * weights).sum().backward()
        assert_near(alone.get_parameter(key).grad, gradient, 1e-6)  # same products, perhaps in another order
        assert parameter.grad is None


@pytest.mark.parametrize(("name", "kwargs"), CASES)
def test_no_tokens(name, kwargs):
    """An expert may get none."""
    W = weight()
    adapter = build(name, kwargs, W)
    x, bias = inputs(shape=(0, K))
    y = adapter(x.requires_grad_(), W, bias)
    assert y.shape == (0, N)
    assert not any(g.any() for g in gradients(adapter, y, x))


@pytest.mark.parametrize(("name", "kwargs"), CASES)
def test_counts(name, kwargs):
    """Buffers named `*_cache` are derived from W to save time, and are not counted."""
    cls = load("methods", name)
    adapter = build(name, kwargs, weight())
    assert sum(p.numel() for p in adapter.parameters()) == cls.num_trainable(K, N, adapter.cfg)
    frozen = [b for key, b in adapter.named_buffers() if not key.endswith("_cache")]
    assert sum(b.numel() for b in frozen) == cls.num_frozen_extra(K, N, adapter.cfg)
    shapes = [(N, 7), (5, K), (N, K)]
    shared = cls.shared(shapes, adapter.cfg)
    numbers = 0 if shared is None else sum(b.numel() for b in shared.buffers())
    assert numbers == cls.num_frozen_shared(shapes, adapter.cfg)
    assert shared is None or not list(shared.parameters())


@pytest.mark.parametrize(("name", "kwargs"), CASES)
def test_bf16_is_finite_and_autocast_close(name, kwargs):
    W = weight()
    adapter = build(name, kwargs, W)
    x, bias = inputs(shape=(2, 3, K))
    expected = gradients(adapter, adapter(x.requires_grad_(), W, bias), x)
    with torch.autocast("cpu", torch.bfloat16):
        y, frozen = adapter(x, W, bias), F.linear(x, W, bias)
        assert y.dtype == frozen.dtype
        with torch.no_grad():
            evaluated = copy.deepcopy(adapter).eval()(x, W, bias)
    assert y.isfinite().all()
    assert_near(y, adapter(x, W, bias), 2**-5)  # inputs and weights are rounded too, each to 2^-9
    assert_near(evaluated, y, 2**-6)
    actual = gradients(adapter, y, x)
    for a, e in zip(actual, expected, strict=True):
        assert a.isfinite().all()
        assert_near(a, e, 2**-4)  # as above, forward and backward


@pytest.mark.parametrize(("name", "kwargs"), CASES)
def test_cache_sees_changes(name, kwargs):
    W = weight()
    adapter = build(name, kwargs, W).eval()
    x, bias = inputs()
    for parameter in adapter.parameters():
        with torch.no_grad():
            adapter(x, W, bias)
            parameter.add_(0.1 * torch.randn_like(parameter))
            y = adapter(x, W, bias)
        assert_near(y, F.linear(x, adapter.effective_weight(W), bias), 1e-5)  # fp32, sums in another order
    with torch.inference_mode():
        assert_near(adapter(x, W, bias), y, 1e-6)
    adapter.train()
    assert not adapter._cache


@pytest.mark.parametrize(("name", "kwargs"), CASES)
def test_save_and_load(name, kwargs):
    W = weight()
    adapter, other = build(name, kwargs, W), build(name, kwargs, W, seed=7)
    state = adapter.state_dict()
    assert state.keys() == dict(adapter.named_parameters()).keys()
    other.load_state_dict(state)
    x, bias = inputs()
    assert torch.equal(adapter(x, W, bias), other(x, W, bias))
    assert torch.equal(adapter.effective_weight(W), copy.deepcopy(adapter).effective_weight(W))


@pytest.mark.parametrize(("name", "kwargs"), CASES)
def test_one_adapter_used_twice_sums_gradients(name, kwargs):
    W = weight(torch.float64)
    adapter = build(name, kwargs, W, torch.float64)
    x, bias = inputs(torch.float64, (2, 3, K))
    parameters = list(adapter.parameters())
    first, second = (torch.autograd.grad(adapter(part, W, bias).square().sum(), parameters) for part in x)
    both = torch.autograd.grad(sum(adapter(part, W, bias).square().sum() for part in x), parameters)
    for a, b, total in zip(first, second, both, strict=True):
        assert_near(a + b, total, 1e-12)  # fp64, sums in another order


@pytest.mark.parametrize(("name", "kwargs"), CASES)
def test_delta_weight(name, kwargs):
    W = weight()
    adapter = build(name, kwargs, W)
    delta = adapter.delta_weight(W)
    assert delta.dtype == torch.float32
    W = W.double()
    adapter.double()
    if adapter.shared_tensors is not None:
        adapter.shared_tensors.double()
    assert_near(delta, adapter.effective_weight(W) - W, 1e-6)  # the update itself is made of fp32 parameters


@pytest.mark.parametrize("name", ["lora", "lora_xs", "dora", "vera", "mora"])
def test_dropout_acts_on_the_update_in_training_only(name):
    W = weight()
    plain, dropping = build(name, {"r": 4}, W), build(name, {"r": 4, "dropout": 0.5}, W)
    x, bias = inputs()
    assert not torch.allclose(plain(x, W, bias), dropping(x, W, bias))
    assert torch.equal(plain.eval()(x, W, bias), dropping.eval()(x, W, bias))
    start = build(name, {"r": 4, "dropout": 0.5}, W, moved=False)
    assert_near(start(x, W, bias), F.linear(x, W, bias), 1e-6)  # DoRA's m / ‖W_i‖ is rounded


@pytest.mark.parametrize("name", available("methods"))
def test_configs_are_frozen_and_keyword_only(name):
    config = load("methods", name).config
    assert config.__dataclass_params__.frozen
    assert all(field.kw_only for field in dataclasses.fields(config))
