"""Shared autograd functions give what the plain operations give, in every regime they choose between."""

import pytest
import torch
import torch.nn.functional as F
from moved import move
from torch.autograd import gradcheck

from highrank.base.registry import available, load
from highrank.model import kernels
from highrank.model.kernels import ScaledWeightLinear, low_rank_linear, rebuilt_linear, row_scaled, scales_weight
from highrank.model.method import Site

N, K, R = 6, 4, 2


def rand(*shape):
    return torch.randn(
        *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)), requires_grad=True
    )


@pytest.mark.parametrize("shape", [(K,), (5, K), (2, 3, K)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_low_rank_linear(shape, with_bias):
    x, W, A, B = rand(*shape), rand(N, K).detach(), rand(R, K), rand(N, R)
    bias = rand(N) if with_bias else None
    plain = F.linear(x, W, bias) + 0.7 * F.linear(F.linear(x, A), B)
    torch.testing.assert_close(low_rank_linear(x, W, A, B, 0.7, bias), plain)
    with torch.no_grad():
        torch.testing.assert_close(low_rank_linear(x, W, A, B, 0.7, bias), plain)
    assert gradcheck(lambda x, A, B, bias: low_rank_linear(x, W, A, B, 0.7, bias), (x, A, B, bias))


@pytest.mark.parametrize("with_bias", [True, False])
def test_low_rank_linear_with_a_start(with_bias):
    x, W, A, B = rand(2, 5, K), rand(N, K).detach(), rand(R, K), rand(N, R)
    start, bias = (rand(R, K).detach(), rand(N, R).detach()), rand(N) if with_bias else None
    plain = F.linear(x, W + 0.7 * (B @ A - start[1] @ start[0]), bias)
    torch.testing.assert_close(low_rank_linear(x, W, A, B, 0.7, bias, start), plain)
    with torch.no_grad():
        torch.testing.assert_close(low_rank_linear(x, W, A, B, 0.7, bias, start), plain)
    assert gradcheck(lambda x, A, B, bias: low_rank_linear(x, W, A, B, 0.7, bias, start), (x, A, B, bias))


def test_low_rank_linear_of_an_input_without_gradient():
    x, W, A, B = rand(5, K).detach(), rand(N, K).detach(), rand(R, K), rand(N, R)
    assert gradcheck(lambda A, B: low_rank_linear(x, W, A, B, 0.7), (A, B))


def test_low_rank_linear_of_a_transposed_weight_and_a_strided_input():
    """GPT-2's Conv1D gives W as a transposed view; x may be a slice."""
    x, W, A, B = rand(5, 2 * K), rand(K, N).detach().t(), rand(R, K), rand(N, R)
    assert gradcheck(lambda x, A, B: low_rank_linear(x[:, ::2], W, A, B, 0.7), (x, A, B))


@pytest.mark.parametrize("shape", [(K,), (5, K), (2, 3, K)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_rebuilt_linear(shape, with_bias):
    """W ⊙ (v wᵀ), of which W is an operand without a gradient."""
    x, W, v, w = rand(*shape), rand(N, K).detach(), rand(N), rand(K)
    bias = rand(N) if with_bias else None

    def gradients(G, W, v, w):
        G.mul_(W)
        return None, G @ w, v @ G

    def product(x, v, w, bias):
        update = lambda W, v, w: W * torch.outer(v, w)  # noqa: E731
        return rebuilt_linear(x, W, update, gradients, (W, v, w), bias, lambda key, W, build: build())

    plain = F.linear(x, W + W * torch.outer(v, w), bias)
    torch.testing.assert_close(product(x, v, w, bias), plain)
    with torch.no_grad():
        torch.testing.assert_close(product(x, v, w, bias), plain)
    assert gradcheck(product, (x, v, w, bias))
    for frozen in range(3):
        inputs = [t.detach() if i == frozen else t for i, t in enumerate((x, v, w))]
        assert gradcheck(product, (*inputs, bias))


@pytest.mark.filterwarnings("ignore")  # torch's own, inside its compiler
def test_rebuilt_linear_of_W_is_captured_whole():
    """Dynamo refuses a tensor that an autograd function is given twice: W as the weight and as an operand."""
    x, W, v = rand(5, K), rand(N, K).detach(), rand(N)

    def product(x, v):
        update = lambda W, v: v[:, None] * W  # noqa: E731
        gradients = lambda G, W, v: (None, (G * W).sum(1))  # noqa: E731
        return rebuilt_linear(x, W, update, gradients, (W, v), None, lambda key, W, build: build())

    expected = torch.autograd.grad(product(x, v).square().sum(), [x, v])
    compiled = torch.compile(product, backend="aot_eager", fullgraph=True)
    for found, right in zip(torch.autograd.grad(compiled(x, v).square().sum(), [x, v]), expected, strict=True):
        torch.testing.assert_close(found, right)
    torch._dynamo.reset()


@pytest.mark.parametrize("zero", [False, True], ids=["no zero", "a zero"])
@pytest.mark.parametrize("with_bias", [True, False])
def test_row_scaled(with_bias, zero):
    z, scale = rand(3, 5, N), rand(N)
    if zero:
        scale = scale.detach().index_fill(0, torch.tensor([2]), 0).requires_grad_()
    bias = rand(N) if with_bias else None
    plain = scale * z if bias is None else scale * z + bias
    torch.testing.assert_close(row_scaled(z.clone(), scale, bias), plain)
    assert gradcheck(lambda z, scale, bias: row_scaled(z.clone(), scale, bias), (z, scale, bias))


@pytest.mark.parametrize("with_bias", [True, False])
def test_scaled_weight_linear(with_bias):
    x, W, a, b = rand(40, K), rand(N, K).detach(), rand(N), rand(K)
    bias = rand(N) if with_bias else None
    plain = a * F.linear(b * x, W) if bias is None else a * F.linear(b * x, W) + bias
    torch.testing.assert_close(ScaledWeightLinear.apply(x, W, a, b, bias), plain)
    assert gradcheck(lambda x, a, b, bias: ScaledWeightLinear.apply(x, W, a, b, bias), (x, a, b, bias))


def test_hyperadapt_chooses_by_the_number_of_tokens_and_never_divides_by_zero():
    W, one = torch.randn(N, K), torch.ones
    assert scales_weight(torch.randn(40, K), W, one(N), one(K))
    assert not scales_weight(torch.randn(2, K), W, one(N), one(K))
    assert not scales_weight(torch.randn(40, K), W, torch.tensor([1.0, 0, 1, 1, 1, 1]), one(K))
    assert not scales_weight(torch.randn(40, K), W, one(N), torch.tensor([1.0, 0, 1, 1]))
    for tokens in (2, 40):  # in 16 bits a scaled activation would be rounded back
        assert scales_weight(torch.randn(tokens, K).bfloat16(), W.bfloat16(), one(N), one(K))
    assert not scales_weight(torch.randn(40, K).bfloat16(), W.bfloat16(), torch.tensor([1.0, 0, 1, 1, 1, 1]), one(K))


@pytest.mark.parametrize("tokens", [2, 40])
@pytest.mark.parametrize("zero", [False, True], ids=["no zero", "zeros"])
def test_hyperadapt_gradients_in_both_regimes(tokens, zero):
    cls = load("methods", "hyperadapt")
    adapter = cls(K, N, cls.config()).double()
    W, x = rand(N, K).detach(), rand(tokens, K)
    adapter.reset_parameters(W, Site("w", 0, lambda: [W]))
    with torch.no_grad():
        adapter.a.add_(0.3 * torch.randn(N))
        adapter.b.add_(0.3 * torch.randn(K))
        if zero:
            adapter.a[1] = adapter.b[2] = 0
    y = adapter(x, W)
    found = torch.autograd.grad(y.sin().sum(), [x, adapter.a, adapter.b])
    plain = F.linear(x, adapter.a[:, None] * W * adapter.b)
    expected = torch.autograd.grad(plain.sin().sum(), [x, adapter.a, adapter.b])
    torch.testing.assert_close(y, plain)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


WEIGHT_METHODS = [m for m in sorted(available("methods")) if load("methods", m).family.changes_weights]


OTHER_DTYPES = (torch.complex64, torch.float8_e4m3fn, torch.int8)
CASES = [(method, held) for method in WEIGHT_METHODS for held in OTHER_DTYPES]
CASES.remove(("dora", torch.complex64))  # whose definition has no complex form


@pytest.mark.parametrize(("method", "held"), CASES, ids=str)
def test_other_dtypes_fall_back_to_the_definition_and_say_so_once(method, held):
    cls = load("methods", method)
    cfg = cls.config(**cls.examples[0])
    adapter = cls(8, 8, cfg, cls.shared([(8, 8)], cfg))
    torch.manual_seed(0)
    W = (3 * torch.randn(8, 8)).to(held)
    plain = W if W.is_complex() else W.float()
    adapter.reset_parameters(plain.real if W.is_complex() else plain, Site("w", 0, lambda: [plain.float()]))
    move(adapter, 0.1)
    x = torch.randn(30, 8, dtype=held if W.is_complex() else torch.float32, requires_grad=True)
    kernels._tell.cache_clear()
    with pytest.warns(UserWarning, match=f"got an input of {x.dtype} on a weight of {held}"):
        y = adapter(x, W, torch.ones(8))
    again = adapter(x, W, torch.ones(8))  # and no second time: a warning would be an error
    expected = F.linear(x, adapter.effective_weight(plain).to(x.dtype), torch.ones(8, dtype=x.dtype))
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(again, expected)
    wanted = [x, *(p for p in adapter.parameters() if p.requires_grad)]
    for found, right in zip(
        torch.autograd.grad(y.abs().sum(), wanted), torch.autograd.grad(expected.abs().sum(), wanted), strict=True
    ):
        torch.testing.assert_close(found, right)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize(("size", "least"), [(1e-3, 0.42), (3e-3, 0.98)])
def test_small_updates_of_hyperadapt_reach_a_16_bit_output(size, least, mode):
    """The share of the exact change of y that y changes by: activations scaled in bf16 gave 0.1 to 0.18 at 1e-3."""
    generator = torch.Generator().manual_seed(0)
    n, k = 192, 256
    W = (torch.randn(n, k, generator=generator) / k**0.5).bfloat16()
    x = torch.randn(512, k, generator=generator).bfloat16()
    cls = load("methods", "hyperadapt")
    adapter = cls(k, n, cls.config())
    with torch.no_grad():
        adapter.a.copy_(1 + size * torch.randn(n, generator=generator))
        adapter.b.copy_(1 + size * torch.randn(k, generator=generator))
    adapter.train(mode == "train")
    with torch.set_grad_enabled(mode == "train"):
        found = (adapter(x, W).double() - F.linear(x, W).double()).detach()
    exact = x.double() @ adapter.delta_weight(W).double().detach().T
    assert float((found * exact).sum() / exact.square().sum()) >= least


@pytest.mark.parametrize(("n", "k", "r"), [(24, 16, 2), (37, 50, 5), (70, 130, 33), (128, 64, 128)])
@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_one", [True, False])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_hadamard(n, k, r, base, dtype, with_one, device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    rng = torch.Generator().manual_seed(0)
    W, A, B = (torch.randn(*shape, generator=rng) for shape in ((n, k), (n, r), (r, k)))
    W = W.to(base)
    found = kernels.hadamard(W.to(device), A.to(device), B.to(device), with_one, dtype)
    assert (found.dtype, found.shape, found.device.type) == (dtype, W.shape, device)
    exact = W.double() * (A.double() @ B.double() + with_one)
    error = 1e-6 * W.double().abs() * (A.double().abs() @ B.double().abs() + with_one)  # sums of r products in fp32
    if dtype == torch.bfloat16:
        error += 2**-8 * exact.abs()  # rounded once
    assert bool(((found.cpu().double() - exact).abs() <= error).all())


def test_hadamard_reads_a_transposed_weight():
    W, A, B = rand(K, N).T.detach().float(), rand(N, R).detach().float(), rand(R, K).detach().float()
    for device in ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]:
        found = kernels.hadamard(W.to(device), A.to(device), B.to(device), False, torch.float32).cpu()
        torch.testing.assert_close(found, W * (A @ B))
