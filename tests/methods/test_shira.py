"""SHiRA against its formula and PEFT's; where its entries lie, and what a step keeps."""

import pytest
import torch

from highrank.base.registry import load
from highrank.model.method import Site


def dense(adapter, v):
    """S(v), entry by entry."""
    n, k = adapter.out_features, adapter.in_features
    S = [[torch.zeros((), dtype=v.dtype) for _ in range(k)] for _ in range(n)]
    for t, place in enumerate(adapter.places.tolist()):
        S[place // k][place % k] = v[t]
    return torch.stack([torch.stack(row) for row in S])


@pytest.mark.parametrize("fields", [{"r": 2}, {"r": 1, "mask": "wm"}, {"r": 9, "mask_seed": 7}], ids=str)
def test_formula(layer, agree_with_formula, fields):
    adapter = layer.adapter("shira", **fields)
    agree_with_formula(adapter, lambda W, v: W + dense(adapter, v))


# What a generator starts with that is given no seed, as PEFT's is by default.
@pytest.mark.parametrize(("theirs", "ours"), [(7, 7), (None, torch.Generator().initial_seed())])
@pytest.mark.parametrize("r", [2, 9])
@pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # PyTorch, on PEFT's sparse matrix
def test_peft(layer, agree_with_peft, r, theirs, ours):
    peft = pytest.importorskip("peft")
    adapter = layer.adapter("shira", r=r, mask_seed=ours)
    config = peft.ShiraConfig(r=r, random_seed=theirs, target_modules=["fc"])
    indices = layer.peft(config).base_model.model.fc.shira_indices["default"]
    assert indices.tolist() == [(adapter.places // 16).tolist(), (adapter.places % 16).tolist()]
    agree_with_peft(adapter, config, {"v": "shira_weight"})


def test_wm_takes_the_largest_weights(layer):
    adapter = layer.adapter("shira", r=2, mask="wm")
    largest = sorted(range(24 * 16), key=lambda place: -layer.W.flatten()[place].abs())[:80]
    assert adapter.places.tolist() == sorted(largest)


def test_random_places_are_a_function_of_the_seeds():
    cls = load("methods", "shira")

    def places(site_seed, mask_seed=None):
        adapter = cls(16, 24, cls.config(r=2, mask_seed=mask_seed))
        adapter.reset_parameters(torch.zeros(24, 16), Site("w", site_seed, lambda: []))
        assert len(set(adapter.places.tolist())) == len(adapter.v)
        return adapter.places.tolist()

    assert places(3) == places(3) != places(4)
    assert places(3, mask_seed=5) == places(4, mask_seed=5) != places(3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_keeps_no_matrix(dtype):
    """For backward it keeps x, v and the places beside W."""
    cls = load("methods", "shira")
    adapter = cls(16, 24, cls.config(r=2))
    W = torch.randn(24, 16, dtype=dtype)
    adapter.reset_parameters(W, Site("w", 0, lambda: []))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        adapter(torch.randn(5, 16, dtype=dtype, requires_grad=True), W)
    own = [t for t in kept if t.shape == W.shape and t.data_ptr() != W.data_ptr()]
    assert sum(t.untyped_storage().nbytes() for t in own) <= dtype.itemsize  # one zero


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"r": 0}, "r"),
        ({"r": 10}, "r"),
        ({"r": 2, "mask": "snip"}, "mask"),
        ({"r": 2, "mask": "wm", "mask_seed": 1}, "mask_seed"),
    ],
)
def test_bad_fields_are_named(refused, fields, named):
    refused("shira", fields, named)
