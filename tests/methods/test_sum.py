"""Sums of methods against the methods themselves, in fp64, and against their formulas written out."""

import pytest
import torch
from torch.func import functional_call

from highrank.base.errors import UserError
from highrank.base.registry import available, load
from highrank.config.words import compose_run
from highrank.model.method import Method, Site
from highrank.sweep.grid import expand
from highrank.train.saved import words_of

ROUNDING = {"rtol": 1e-12, "atol": 1e-12}  # the same fp64 numbers, summed in another order


def test_hira_and_lora_are_hilora(layer):
    """From the same start, through a step: outputs, gradients and weights."""
    names = {"parts.hira.A": "A", "parts.hira.B": "B", "parts.lora.B": "L1", "parts.lora.A": "L2"}
    ours = layer.adapter("sum", parts={"hira": {"r": 2}, "lora": {"r": 3, "alpha": 1.5}})
    theirs = layer.adapter("hilora", r1=2, r2=3, s=0.5)
    start = load("methods", "hilora")(16, 24, theirs.cfg).double()
    alike = load("methods", "sum")(16, 24, ours.cfg).double()
    for adapter in (start, alike):
        torch.manual_seed(4)
        adapter.reset_parameters(layer.W, Site("w", 0, lambda: []))
    for name, parameter in ours.named_parameters():
        assert torch.equal(alike.get_parameter(name), start.get_parameter(names[name]))
        with torch.no_grad():
            parameter.copy_(theirs.get_parameter(names[name]))
    results = []
    for adapter in (ours, theirs):
        y = adapter(layer.x, layer.W, layer.bias)
        (y * layer.dy).sum().backward()
        results.append((y, adapter.effective_weight(layer.W)))
    torch.testing.assert_close(*results, **ROUNDING)
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs.get_parameter(names[name]).grad, **ROUNDING)


ALONE = {"lora": {"r": 2}, "hira": {"r": 2}, "hyperadapt": {}, "vera": {"r": 4}, "dora": {"r": 2}, "shira": {"r": 1}}


@pytest.mark.parametrize("name", ALONE)
def test_one_part_is_that_method(layer, name):
    ours, theirs = layer.adapter("sum", parts={name: ALONE[name]}), layer.adapter(name, **ALONE[name])
    for key, parameter in theirs.named_parameters():
        assert torch.equal(ours.get_parameter(f"parts.{name}.{key}"), parameter)
    assert torch.equal(ours(layer.x, layer.W, layer.bias), theirs(layer.x, layer.W, layer.bias))
    assert torch.equal(ours.effective_weight(layer.W), theirs.effective_weight(layer.W))
    assert ours.no_decay == tuple(f"parts.{name}.{key}" for key in theirs.no_decay)


@pytest.mark.parametrize("names", [["hyperadapt", "lora"], ["lora", "hyperadapt"]])
def test_hyperadapt_and_lora(layer, agree_with_formula, names):
    def weight(W, **p):
        scaled = torch.diag(p["parts.hyperadapt.a"]) @ W @ torch.diag(p["parts.hyperadapt.b"])
        return scaled + 2 * p["parts.lora.B"] @ p["parts.lora.A"]

    agree_with_formula(layer.adapter("sum", parts=names), weight)


def test_three_that_need_the_weight_and_one_that_does_not(layer, agree_with_formula):
    adapter = layer.adapter("sum", parts={"hira": {"r": 2}, "vera": {"r": 4}, "lora": {"r": 2}, "hyperadapt": {}})
    drawn = adapter.parts["vera"].shared_tensors

    def weight(W, **p):
        hira = W * (p["parts.hira.A"] @ p["parts.hira.B"])
        vera = torch.diag(p["parts.vera.lambda_b"]) @ drawn.B @ torch.diag(p["parts.vera.lambda_d"]) @ drawn.A
        lora = 2 * p["parts.lora.B"] @ p["parts.lora.A"]
        return hira + vera + lora + W * torch.outer(p["parts.hyperadapt.a"], p["parts.hyperadapt.b"])

    agree_with_formula(adapter, weight)


PARTS = [
    name
    for name in sorted(available("methods"))
    if load("methods", name).family is Method.family and name not in ("sum", "hira")
]


@pytest.mark.parametrize("name", PARTS)
def test_every_method_of_this_kind_can_be_a_part(layer, agree_with_formula, name):
    """W' is the sum of both updates, and so are outputs and gradients."""
    fields = load("methods", name).examples[0]
    adapter = layer.adapter("sum", parts={"hira": {"r": 2}, name: fields})
    alone = layer.adapter(name, **fields)
    hira = layer.adapter("hira", r=2)

    def weight(W, **p):
        def of(part, start):
            own = {f"part.{key.removeprefix(start)}": value for key, value in p.items() if key.startswith(start)}
            return functional_call(Effective(part), own, (W,))

        return of(hira, "parts.hira.") + of(alone, f"parts.{name}.") - W

    agree_with_formula(adapter, weight)


class Effective(torch.nn.Module):
    def __init__(self, part):
        super().__init__()
        self.part = part

    def forward(self, W):
        return self.part.effective_weight(W)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_keeps_no_matrix(dtype):
    cls = load("methods", "sum")
    adapter = cls(16, 24, cls.config(parts={"hira": {"r": 2}, "hyperadapt": {}, "lora": {"r": 2}}))
    W = torch.randn(24, 16, dtype=dtype)
    adapter.reset_parameters(W, Site("w", 0, lambda: []))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        adapter(torch.randn(5, 16, dtype=dtype, requires_grad=True), W)
    assert not [t for t in kept if t.shape in (W.shape, W.shape[::-1]) and t.data_ptr() != W.data_ptr()]


def test_dropout_of_a_part_acts_in_training_alone(layer):
    adapter = layer.adapter("sum", parts={"hira": {"r": 2}, "lora": {"r": 2, "dropout": 0.5}})
    plain = layer.adapter("sum", parts={"hira": {"r": 2}, "lora": {"r": 2}})
    plain.load_state_dict(adapter.state_dict())
    assert not torch.equal(adapter(layer.x, layer.W), plain(layer.x, layer.W))
    assert torch.equal(adapter.eval()(layer.x, layer.W), plain.eval()(layer.x, layer.W))


def test_counts(params):
    def of(method):
        return params(f"model=llama3_8b method={method}")

    both, hilora = of("sum parts=[hira,lora] parts.hira.r=20 parts.lora.r=12"), of("hilora r1=20 r2=12")
    assert both.trainable == hilora.trainable == 56_623_104
    vera = of("vera r=64")
    found = of("sum parts=[hyperadapt,vera] parts.vera.r=64")
    assert found.trainable == vera.trainable + of("hyperadapt").trainable
    assert found.frozen_extra == vera.frozen_extra
    random = of("sum parts=[lora,hira] parts.hira.R=random_uniform")
    assert random.frozen_extra == of("hira R=random_uniform").frozen_extra


SPELLINGS = [
    ["parts=[hira,lora]", "parts.hira.r=8"],
    ["parts.hira.r=8", "parts.lora={}"],
    ["parts={hira:{r:8},lora:{}}"],
    ["method.parts.hira.r=8", "method.parts.lora={}"],
]


@pytest.mark.parametrize("words", SPELLINGS)
def test_words(words):
    run = compose_run(["method=sum", *words])
    assert run.method_cfg == load("methods", "sum").config(parts={"hira": {"r": 8}, "lora": {}})
    assert compose_run(words_of(run)).hash == run.hash == compose_run(["method=sum", *SPELLINGS[0]]).hash


def test_axes_within_parts():
    cells = expand(["method=lora,sum", "parts.hira.r=4,8", "parts.lora.alpha=3"]).cells
    assert [cell.axes for cell in cells] == [
        {"method": "lora"},
        {"method": "sum", "parts.hira.r": 4},
        {"method": "sum", "parts.hira.r": 8},
    ]
    assert [cell.run.method_cfg.parts["lora"].alpha for cell in cells[1:]] == [3.0, 3.0]


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([], "at least one part is needed, got parts=[]"),
        ("lora", "parts is a list of different methods, got parts=lora"),
        (5, "parts is a list of different methods, got parts=5"),
        (["lora", "lora"], "parts is a list of different methods, got parts=['lora', 'lora']"),
        (["bitfit"], "a part changes a weight that stays as it is, and is no sum itself, got parts=bitfit"),
        (["full"], "got parts=full"),
        (["lora", "lorra"], "a part is a method, got parts=lorra; did you mean 'lora'"),
        ({4: {}}, "a part is a method, got parts=4; it is one of: abba"),
        ([None], "a part is a method, got parts=None; it is one of: abba"),
        ({"sum": {"parts": ["lora"]}}, "got parts=sum"),
        ({"lora": 3}, "a part's fields are given by name, got parts.lora=3"),
        ({"vera": {"dropout": 0.1}, "hira": {}}, "got parts.vera.dropout=0.1 beside hira"),
    ],
)
def test_bad_parts(parts, message):
    with pytest.raises(UserError) as error:
        load("methods", "sum").config(parts=parts)
    assert str(error.value).startswith("sum: ")
    assert message in str(error.value)


@pytest.mark.parametrize("key", ["rank", 4])
def test_a_field_that_a_part_lacks_is_named(key):
    with pytest.raises(UserError, match=rf"^lora has no field '{key}'; it has: r, alpha"):
        load("methods", "sum").config(parts={"lora": {key: 4}})


def test_a_part_that_does_not_fit_a_weight_says_so():
    cls = load("methods", "sum")
    with pytest.raises(UserError, match=r"^shira: .*got r=10 for a weight of shape \(24, 16\)"):
        cls.validate(16, 24, cls.config(parts={"lora": {}, "shira": {"r": 10}}))
