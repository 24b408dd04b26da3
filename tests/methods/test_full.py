"""Full fine-tuning against its formula, and its copy of the base."""

import pytest
import torch

from highrank.base.registry import load
from highrank.model.method import Site

pytestmark = pytest.mark.parity


def test_formula(layer, agree_with_formula):
    agree_with_formula(layer.adapter("full"), lambda W, weight: weight)


def test_copies_the_base_in_fp32(layer):
    cls, W = load("methods", "full"), layer.W.bfloat16()
    adapter = cls(*reversed(W.shape), cls.config())
    adapter.reset_parameters(W, Site(name="w", seed=0, neighbours=list))
    assert adapter.weight.dtype == torch.float32
    assert torch.equal(adapter.weight, W.float())
    assert torch.equal(adapter.delta_weight(W), torch.zeros(W.shape))
