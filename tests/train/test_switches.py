"""torch.compile, activation checkpointing, accumulation: they change cost, not results."""

import math

import pytest
import torch
from moved import move

from highrank.base.registry import available, load
from highrank.config.run_config import RunConfig
from highrank.model.adapters import attach
from highrank.model.backbones import load_backbone
from highrank.model.placement import resolve
from highrank.train.module import FineTuner

COMPILE_WARNS = pytest.mark.filterwarnings(  # torch's own, inside its compiler
    "ignore:.*should not be instantiated:DeprecationWarning", "ignore:.*script_method.*:DeprecationWarning"
)


class Generate:
    kind = "generate"


def tuner(method, layers="all", **core):
    model = load_backbone({"name": "tiny_llama", "dtype": "float32"}, None).model
    cls = load("methods", method)
    adapters = attach(model, resolve(model, "all", layers), cls, cls.config(**cls.examples[0]))
    move(adapters, 0.05, seed=5)
    module = FineTuner(adapters, Generate(), None, RunConfig(lr=1e-3, **core), 10)
    return module.train()


def batch(rows=4, length=12):
    torch.manual_seed(0)
    ids = torch.randint(4, 260, (rows, length))
    labels = ids.clone()
    labels[:, :5] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def gradients(module, *batches):
    module.zero_grad()
    for one in batches:
        loss, _ = module.loss(one)
        (loss / len(batches)).backward()
    return {name: parameter.grad.clone() for name, parameter in module.adapters.named_parameters()}


def weight_methods():
    return [name for name in sorted(available("methods")) if load("methods", name).family.changes_weights]


@pytest.mark.parametrize("method", weight_methods())
def test_activation_checkpointing_gives_the_same_gradients(method):
    """The same operations on the same numbers, done twice: bit for bit."""
    plain, checkpointed = tuner(method), tuner(method, checkpoint_activations=True)
    expected = gradients(plain, batch())
    for name, found in gradients(checkpointed, batch()).items():
        assert torch.equal(found, expected[name]), name


def test_activation_checkpointing_keeps_less():
    def kept(module):
        seen = {}
        with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.setdefault(t.untyped_storage().data_ptr(), t), id):
            module.loss(batch(8, 64))
        return sum(t.untyped_storage().nbytes() for t in seen.values())

    assert kept(tuner("hira", checkpoint_activations=True)) < 0.6 * kept(tuner("hira"))


@COMPILE_WARNS
@pytest.mark.parametrize("method", weight_methods())
def test_capture_by_torch_compile_gives_the_same_gradients(method):
    """Dynamo and AOTAutograd capture forward and backward of every method, whole: one graph per layer."""
    adapters = tuner(method).adapters
    layer = adapters.layers["model.layers.0.mlp.up_proj"]
    x = torch.randn(5, 16, requires_grad=True)
    wanted = [x, *(p for p in layer.parameters() if p.requires_grad)]
    expected = torch.autograd.grad(layer(x).square().sum(), wanted)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for found, right in zip(torch.autograd.grad(compiled(x).square().sum(), wanted), expected, strict=True):
        # The captured graph may sum in another order: a few fp32 roundings of the largest entry.
        torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-5 * right.abs().max().item())
    torch._dynamo.reset()


@COMPILE_WARNS
def test_a_compiled_step_gives_the_same_gradients(monkeypatch):
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **kwargs: real(f, backend="aot_eager", **kwargs))
    expected = gradients(tuner("hira"), batch())
    for name, found in gradients(tuner("hira", compile=True), batch()).items():
        torch.testing.assert_close(found, expected[name], rtol=1e-4, atol=1e-5 * expected[name].abs().max().item())
    torch._dynamo.reset()


@pytest.mark.parametrize("method", weight_methods())
def test_accumulated_halves_are_the_whole(method):
    whole = batch(4)
    halves = [{key: value[rows] for key, value in whole.items()} for rows in (slice(0, 2), slice(2, 4))]
    expected = gradients(tuner(method), whole)
    for name, found in gradients(tuner(method), *halves).items():
        torch.testing.assert_close(found, expected[name], rtol=1e-4, atol=1e-5 * expected[name].abs().max().item())


@pytest.mark.parametrize("parts", [2, 3, 4, 8])
def test_a_batch_in_parts_is_the_whole(parts):
    """The mean over the batch's targets, not the mean of the parts' means; the third row has more targets."""
    whole = batch(5)
    whole["labels"][2, :5] = whole["input_ids"][2, :5]
    module = tuner("hira")
    expected_loss, expected_count = module.loss(whole)
    expected = gradients(module, whole)
    module.zero_grad()
    loss, count = module.loss_by_rows(whole, math.ceil(5 / parts))
    loss.backward()
    assert count == expected_count
    torch.testing.assert_close(loss, expected_loss, rtol=1e-6, atol=0)
    for name, parameter in module.adapters.named_parameters():
        torch.testing.assert_close(
            parameter.grad, expected[name], rtol=1e-4, atol=1e-5 * expected[name].abs().max().item()
        )


def test_a_batch_in_parts_keeps_no_activations():
    def kept(module, loss):
        seen = {}
        with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.setdefault(t.untyped_storage().data_ptr(), t), id):
            loss(batch(8, 64))
        return sum(t.untyped_storage().nbytes() for t in seen.values())

    module = tuner("hira")
    assert kept(module, lambda whole: module.loss_by_rows(whole, 1)) < 0.05 * kept(module, module.loss)


@COMPILE_WARNS
def test_generation_is_never_compiled():
    module = tuner("hira", compile=True)
    assert "forward" not in module.model.base_model.__dict__
    with module.compiled():
        assert "forward" in module.model.base_model.__dict__
    assert "forward" not in module.model.base_model.__dict__


@pytest.mark.parametrize("checkpointed", [False, True])
def test_the_blocks_below_the_first_adapted_one_run_once_and_without_a_graph(checkpointed):
    module = tuner("hira", layers="1", checkpoint_activations=checkpointed)
    in_graph = {"below": [], "above": []}
    for name, block in zip(in_graph, module.model.model.layers, strict=True):
        block.mlp.register_forward_pre_hook(lambda mlp, args, name=name: in_graph[name].append(args[0].requires_grad))
    module.loss(batch())[0].backward()
    assert in_graph == {"below": [False], "above": [True] * (1 + checkpointed)}
