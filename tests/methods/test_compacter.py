"""Compacter against its equations written out, in fp64: Kronecker products made whole, logits and every gradient."""

import math

import pytest
import torch
from moved import move
from torch.utils._python_dispatch import TorchDispatchMode

from highrank.base.errors import UserError
from highrank.base.registry import load
from highrank.model.adapters import attach
from highrank.model.backbones import load_backbone

pytestmark = pytest.mark.parity

IDS = torch.tensor([[5, 6, 7, 8, 9, 10], [50, 60, 70, 80, 90, 100]])
TOLERANCE = {"rtol": 1e-9, "atol": 1e-10}  # fp64 sums of a few dozen terms in another order


def adapted(name="compacter", dtype="float32", **fields):
    base = load_backbone({"name": "tiny_llama", "dtype": dtype}, None).model
    cls = load("methods", name)
    return attach(base, [], cls, cls.config(**fields))


def moved(**fields):
    adapters = adapted(**fields)
    adapters.model.double()
    move(adapters, 0.5, seed=0)
    return adapters


def summed(A, s, t):
    """Σ_i A_i ⊗ (s_i t_iᵀ), eq. 5."""
    return sum(torch.kron(A[i], torch.outer(s[i], t[i])) for i in range(len(A)))


def as_bottleneck(adapters):
    """Returns the parameters of `bottleneck` that are Compacter's, functions of Compacter's own."""
    A, made = adapters.module.A, {}
    for key, network in adapters.module.networks.items():
        made[f"networks.{key}.D"] = summed(A, network.Ds, network.Dt).T
        made[f"networks.{key}.U"] = summed(A, network.Us, network.Ut).T
        made[f"networks.{key}.c"], made[f"networks.{key}.e"] = network.c, network.e
    return made


@pytest.mark.parametrize(
    "fields",
    [
        {"reduction": 4},
        {"reduction": 4, "form": "feedforward", "n": 2, "activation": "silu"},
        {"reduction": 2, "form": "parallel", "s": 1.5},
        {"reduction": 16, "n": 1},
    ],
)
def test_compacter_is_bottleneck_with_sums_of_kronecker_products(fields):
    ours, whole = moved(**fields), adapted("bottleneck", **{k: v for k, v in fields.items() if k != "n"})
    whole.model.double()
    made = as_bottleneck(ours)
    assert made.keys() == dict(whole.module.named_parameters()).keys()
    found = ours.model(input_ids=IDS).logits
    found.square().mean().backward()
    gradients = {name: parameter.grad for name, parameter in ours.module.named_parameters()}
    leaves = list(dict(ours.module.named_parameters()).values())
    with torch.no_grad():
        for name, parameter in whole.module.named_parameters():
            parameter.copy_(made[name])
    expected = whole.model(input_ids=IDS).logits
    torch.testing.assert_close(found, expected, **TOLERANCE)
    expected.square().mean().backward()
    theirs = [parameter.grad for _, parameter in whole.module.named_parameters()]
    pulled = torch.autograd.grad([made[name] for name, _ in whole.module.named_parameters()], leaves, theirs)
    for (name, gradient), right in zip(gradients.items(), pulled, strict=True):
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(gradient, right, **TOLERANCE)


@pytest.mark.parametrize("form", ["houlsby", "feedforward", "parallel"])
def test_starts_near_the_base(form):
    adapters = adapted(form=form, reduction=4)
    with torch.no_grad():
        found = adapters.model(input_ids=IDS).logits
        with adapters.disabled():
            # where d is 16 and an activation behind a norm a hundred times what it is added to; the next test has a real width
            torch.testing.assert_close(adapters.model(input_ids=IDS).logits, found, rtol=0, atol=1e-5)


def test_the_start_is_below_rounding_at_a_real_width():
    method = load("methods", "compacter")
    torch.manual_seed(0)
    network = method.network(576, 576, method.config())
    network.start()
    h = torch.randn(1000, 576)
    with torch.no_grad():
        added = network(h, 1e-4 * torch.randn(4, 4, 4))
    assert 0 < added.norm() < torch.finfo(torch.float32).eps * h.norm()


def test_the_start_is_that_of_the_reference_code():
    module = adapted(reduction=2, n=2).module
    assert 0.5e-4 < module.A.std() < 2e-4
    (network, *_) = module.networks.values()
    assert network.c.abs().max() == network.e.abs().max() == 0
    for factor, width in ((network.Ds, 8), (network.Dt, 4), (network.Us, 4), (network.Ut, 8)):
        assert factor.shape == (2, width)
        bound = math.sqrt(2) * math.sqrt(6 / (width + 1))  # xavier_uniform_ of a column of `width`, gain √2
        assert 0.4 * bound < factor.abs().max() <= bound


def test_one_A_for_the_whole_model():
    adapters = adapted(reduction=4)
    assert [name for name, _ in adapters.module.named_parameters() if "networks" not in name] == ["A"]
    assert adapters.module.A.shape == (4, 4, 4)
    assert len(adapters.module.networks) == 4


def test_no_matrix_of_the_bottleneck_is_made():
    """Nothing as large as D, forward or backward: of (16, 8), and 12 tokens of width 16 are as large at most."""
    adapters, sizes = moved(reduction=1, n=4), []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            sizes.extend(t.numel() for t in (out if isinstance(out, tuple) else (out,)) if isinstance(t, torch.Tensor))
            return out

    (network, *_) = adapters.module.networks.values()
    h = torch.randn(1, 3, 16, dtype=torch.float64, requires_grad=True)
    with Sizes():
        network(h, adapters.module.A).sum().backward()
    assert max(sizes) <= max(4**3, h.numel()) < 16 * 16


@pytest.mark.parametrize(("fields", "named"), [({"n": 0}, "n"), ({"reduction": 0}, "reduction"), ({"s": 0.0}, "s")])
def test_bad_fields_are_named(fields, named):
    with pytest.raises(UserError, match=rf"^compacter: .*\b{named}="):
        load("methods", "compacter").config(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"reduction": 4, "n": 3}, "got n=3 for 4, 16; the nearest that do: 2 or 4"),
        ({"reduction": 8}, "got n=4 for 2, 16; the nearest that do: 2"),
        ({"reduction": 5}, "got reduction=5; the nearest that do: 4"),  # 8 is not for n = 4
    ],
)
def test_what_does_not_divide_names_what_does(fields, message):
    with pytest.raises(UserError, match=f"^compacter: .*{message}$"):
        adapted(**fields)


def test_counts(params):
    d, m, layers = 4096, 256, 32
    of_one = 2 * (d + m) + m + d
    assert params("model=llama3_8b method=compacter").trainable == layers * 2 * of_one + 64
    assert params("model=llama3_8b method=compacter form=feedforward n=8").trainable == layers * of_one + 512
    # The paper's 4 L (k + d) + n³, and the biases
    assert layers * 2 * of_one + 64 == 4 * layers * (d + m) + 4**3 + 2 * layers * (m + d)
