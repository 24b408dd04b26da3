"""Ours against a reference, in fp64: output, all gradients, one AdamW step, and the weight after it.

What every method's tests share besides: refused fields, and counts on models of which only the shapes are known.
"""

import functools

import pytest
import torch
from moved import move
from torch import nn

from highrank.base.errors import UserError
from highrank.base.registry import load
from highrank.config.words import compose_run
from highrank.model.backbones import empty_model, model_config
from highrank.model.method import Site
from highrank.train.build import adapted_views
from highrank.train.plan import Params, count

N, K, TOKENS = 24, 16, 7
# fp64 sums of a few dozen terms in another order; the AdamW step divides by |gradient| and may magnify it
TOLERANCE = {"rtol": 1e-9, "atol": 1e-10}


class Layer:
    """One frozen weight with a bias, an input, and its neighbours in the layers before and after."""

    def __init__(self):
        rng = torch.Generator().manual_seed(0)
        draw = lambda *shape: torch.randn(*shape, generator=rng, dtype=torch.float64)  # noqa: E731
        self.W, self.bias, self.x, self.dy = draw(N, K), draw(N), draw(TOKENS, K), draw(TOKENS, N)
        self.neighbours = [draw(N, K), self.W, draw(N, K)]

    def adapter(self, name, **kwargs):
        """Returns a trained-looking adapter: every parameter moved from its start."""
        cls = load("methods", name)
        cfg = cls.config(**kwargs)
        shared = cls.shared([(N, K)], cfg)
        adapter = cls(K, N, cfg, None if shared is None else shared.double()).double()
        torch.manual_seed(1)
        adapter.reset_parameters(self.W, Site(name="w", seed=3, neighbours=lambda: self.neighbours))
        move(adapter, 0.2)
        return adapter

    def peft(self, config):
        """Returns this layer as PEFT wraps it."""
        peft = pytest.importorskip("peft")
        model = nn.Sequential()
        model.add_module("fc", nn.Linear(K, N, dtype=torch.float64))
        model.fc.load_state_dict({"weight": self.W, "bias": self.bias})
        return peft.get_peft_model(model, config).double()


@pytest.fixture
def layer():
    return Layer()


@pytest.fixture
def agree(layer):
    def check(adapter, forward, parameters, merged):
        """`forward(x)`, `parameters` under our names (any shape of the same order) and `merged()` are the reference's."""
        ours = dict(adapter.named_parameters())
        assert parameters.keys() == ours.keys()
        with torch.no_grad():
            for key, parameter in parameters.items():
                parameter.copy_(ours[key].view_as(parameter))
        optimizers = [torch.optim.AdamW(p.values(), lr=0.01, weight_decay=0.1) for p in (ours, parameters)]
        x, x_ref = layer.x.clone().requires_grad_(), layer.x.clone().requires_grad_()
        torch.manual_seed(5)  # for dropout
        y = adapter(x, layer.W, layer.bias)
        torch.manual_seed(5)
        y_ref = forward(x_ref)
        torch.testing.assert_close(y, y_ref, **TOLERANCE)
        (y * layer.dy).sum().backward()
        (y_ref * layer.dy).sum().backward()
        torch.testing.assert_close(x.grad, x_ref.grad, **TOLERANCE)
        for key, parameter in parameters.items():
            torch.testing.assert_close(ours[key].grad, parameter.grad.view_as(ours[key]), **TOLERANCE)
        for optimizer in optimizers:
            optimizer.step()
        for key, parameter in parameters.items():
            torch.testing.assert_close(ours[key], parameter.view_as(ours[key]), **TOLERANCE)
        torch.testing.assert_close(adapter.effective_weight(layer.W), merged(), **TOLERANCE)

    return check


@pytest.fixture
def agree_with_formula(layer, agree):
    def check(adapter, weight):
        """`weight(W, **parameters)` writes W' out longhand."""
        parameters = {key: p.detach().clone().requires_grad_() for key, p in adapter.named_parameters()}
        effective = lambda: weight(layer.W, **parameters)  # noqa: E731
        agree(adapter, lambda x: x @ effective().T + layer.bias, parameters, effective)

    return check


@pytest.fixture
def agree_with_peft(layer, agree):
    def check(adapter, config, names):
        """`names` maps ours to PEFT's, e.g. {"A": "lora_A"}."""
        model = layer.peft(config)
        trainable = {key: p for key, p in model.named_parameters() if p.requires_grad}
        parameters = {ours: next(p for key, p in trainable.items() if theirs in key) for ours, theirs in names.items()}
        assert len(trainable) == len(parameters)
        agree(adapter, model, parameters, lambda: model.merge_and_unload().fc.weight)

    return check


@pytest.fixture
def refused():
    """Holds that a weight of (N, K) refuses `fields`, and that the message names method and field."""

    def check(name, fields, named):
        cls = load("methods", name)
        with pytest.raises(UserError) as error:
            cls.validate(K, N, cls.config(**fields))
        message = str(error.value)
        assert message.startswith(f"{name}: ")
        assert f"{named}=" in message

    return check


@functools.cache
def _model_of(name, kind):
    run = compose_run([f"model={name}"])
    return empty_model(model_config(run.model, None), kind, 2)


@pytest.fixture(scope="session")
def params():
    """Counts what `words` adapt, from the model's public shapes."""

    def counted(words) -> Params:
        run = compose_run(words.split())
        kind = "classify" if run.model["name"] == "roberta_large" else "generate"
        model = _model_of(run.model["name"], kind)
        return count(model, adapted_views(run, model), run.method, run.method_cfg)

    return counted
