"""Loss, optimizer and schedule of the one LightningModule."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM

from highrank.base.registry import load
from highrank.config.run_config import RunConfig
from highrank.data.encoding import IGNORED
from highrank.model.adapters import attach
from highrank.model.backbones import load_backbone
from highrank.model.placement import resolve
from highrank.model.tiny import DECODERS, tiny_config
from highrank.train.loss import TokenCrossEntropy, language_model_loss
from highrank.train.module import FineTuner
from highrank.train.objectives import OBJECTIVES
from highrank.train.optimizer import make_optimizer

SOFT_CAPPED = {
    **{k: v for k, v in tiny_config("gemma").items() if k != "model_type"},
    "model_type": "gemma2",
    "final_logit_softcapping": 0.05,  # tight enough to bend the logits of a tiny model
    "head_dim": 8,
}
SCALED = {
    **{k: v for k, v in tiny_config("llama").items() if k != "model_type"},
    "model_type": "granite",
    "logits_scaling": 3.0,
}
MODELS = [tiny_config(name) for name in DECODERS] + [SOFT_CAPPED, SCALED]


def batch():
    torch.manual_seed(0)
    ids = torch.randint(4, 260, (3, 12))
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    labels = ids.clone()
    labels[:, :5] = IGNORED
    labels[1, 9:] = IGNORED
    labels[2, 7] = IGNORED  # a hole in the middle
    return ids, mask, labels


@pytest.mark.parametrize("config", MODELS, ids=lambda c: c["model_type"])
def test_loss_at_supervised_positions_is_the_models_own(config):
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config)).eval()
    ids, mask, labels = batch()
    own = model(input_ids=ids, attention_mask=mask, labels=labels).loss
    own.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    loss, num_targets = language_model_loss(model, ids, mask, labels)
    loss.backward()
    assert num_targets == int((labels[:, 1:] != IGNORED).sum())
    torch.testing.assert_close(loss, own, rtol=1e-6, atol=1e-6)
    for name, parameter in model.named_parameters():
        # The same sums in another order, in fp32.
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-6)


def test_the_head_sees_supervised_positions_only():
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**tiny_config("llama")))
    seen = []
    model.lm_head.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    ids, mask, labels = batch()
    _, num_targets = language_model_loss(model, ids, mask, labels)
    assert seen == [(num_targets, 260)]
    assert not model.lm_head._forward_pre_hooks  # and the model is as it was


def tuner(method="hyperadapt", kind="generate", fields=None, **core):
    model = load_backbone(
        {"name": "tiny_llama" if kind == "generate" else "tiny_bert", "dtype": "float32"}, None, kind
    ).model
    cls = load("methods", method)
    heads = [] if kind == "generate" else ["classifier"]
    adapters = attach(model, resolve(model, "qkv"), cls, cls.config(**(fields or {})), heads=heads)
    settings = RunConfig(**{"lr": 1e-2, **core})

    class Stub:
        pass

    task = Stub()
    task.kind = kind
    return FineTuner(adapters, task, None, settings, total_steps=10)


def test_no_copy_of_the_head_per_prompt():
    module = tuner().eval()
    largest = 0

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            largest = max([largest, *(t.numel() for t in tree_leaves(out) if torch.is_tensor(t))])
            return out

    with Sizes(), torch.no_grad():
        module.model(input_ids=batch()[0][:, :4].repeat(4, 1), use_cache=True, logits_to_keep=1)
    assert largest <= module.model.get_output_embeddings().weight.numel()  # for 12 prompts


@pytest.mark.parametrize("method", ["hyperadapt", "dora", "boft"])
def test_weight_decay_spares_what_rests_at_one(method):
    """Decay pulls to 0; a factor whose neutral value is 1 would be pulled away from the base."""
    module = tuner(method, weight_decay=0.5)
    optimizer = make_optimizer(module.adapters, module.core)
    decayed = {id(p) for g in optimizer.param_groups if g["weight_decay"] for p in g["params"]}
    spared = {id(p) for g in optimizer.param_groups if not g["weight_decay"] for p in g["params"]}
    names = {id(p): n.rpartition(".")[2] for n, p in module.adapters.named_parameters()}
    assert {names[i] for i in spared} == set(module.adapters.method.no_decay)
    assert not decayed & spared
    assert len(decayed | spared) == len(names)

    before = module.adapters.state_dict()
    for _, parameter in module.adapters.named_parameters():
        parameter.grad = torch.zeros_like(parameter)
    before = {name: tensor.clone() for name, tensor in before.items()}
    optimizer.step()
    for name, tensor in module.adapters.state_dict().items():
        if name.rpartition(".")[2] in module.adapters.method.no_decay:
            assert torch.equal(tensor, before[name])


def test_heads_decay_their_matrix_but_not_their_bias():
    module = tuner("lora", "classify", weight_decay=0.1)
    groups = make_optimizer(module.adapters, module.core).param_groups
    named = dict(module.adapters.named_parameters())
    in_group = {d: {id(p) for g in groups if bool(g["weight_decay"]) == d for p in g["params"]} for d in (True, False)}
    assert id(named["classifier.weight"]) in in_group[True]
    assert id(named["classifier.bias"]) in in_group[False]


@pytest.mark.parametrize(
    ("method", "fields"),
    [("lora", {"r": 2, "lr_ratio": 16.0}), ("sum", {"parts": {"hira": {"r": 2}, "lora": {"r": 2, "lr_ratio": 16.0}}})],
)
def test_a_parameter_may_learn_at_a_multiple_of_the_rate(method, fields):
    """One step of SGD with gradients of 1 moves every parameter by its rate: LoRA+'s B by 16 times A's."""
    module = tuner(method, fields=fields, optimizer="sgd", max_grad_norm=0, warmup_ratio=0, schedule="constant")
    before = {name: p.detach().clone() for name, p in module.adapters.named_parameters()}
    optimizer = module.configure_optimizers()["optimizer"]
    for _, parameter in module.adapters.named_parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    faster = {name for name in before if name.endswith("B") and ("lora" in name or method == "lora")}
    assert 0 < len(faster) < len(before)
    for name, parameter in module.adapters.named_parameters():
        rate = 0.16 if name in faster else 1e-2
        torch.testing.assert_close(parameter.detach(), before[name] - rate, rtol=0, atol=1e-6)


@pytest.mark.parametrize("method", ["lora", "hyperadapt", "full"])
def test_a_head_may_have_a_rate_of_its_own(method):
    """One step of SGD with gradients of 1 moves every parameter by its rate."""
    module = tuner(
        method, "classify", optimizer="sgd", head_lr=0.5, max_grad_norm=0, warmup_ratio=0, schedule="constant"
    )
    before = {name: p.detach().clone() for name, p in module.adapters.named_parameters()}
    optimizer = module.configure_optimizers()["optimizer"]
    for _, parameter in module.adapters.named_parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    heads = {name for name in before if name.startswith("classifier.")}
    assert heads == {"classifier.weight", "classifier.bias"}
    for name, parameter in module.adapters.named_parameters():
        rate = 0.5 if name in heads else 1e-2
        torch.testing.assert_close(parameter.detach(), before[name] - rate, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("core", "expected"),
    [
        ({"schedule": "constant"}, [1, 1, 1, 1, 1]),
        ({"schedule": "constant", "warmup_steps": 2}, [0, 0.5, 1, 1, 1]),
        ({"schedule": "linear"}, [1, 0.9, 0.8, 0.7, 0.6]),
        ({"schedule": "linear", "warmup_ratio": 0.2}, [0, 0.5, 1, 0.875, 0.75]),
        ({"schedule": "cosine"}, [0.5 * (1 + torch.cos(torch.tensor(t * torch.pi / 10)).item()) for t in range(5)]),
    ],
)
def test_schedules(core, expected):
    module = tuner(**{"warmup_ratio": 0.0, **core})
    found = module.configure_optimizers()
    rates = []
    for _ in range(5):
        rates.append(found["optimizer"].param_groups[0]["lr"] / 1e-2)
        found["optimizer"].step()
        found["lr_scheduler"]["scheduler"].step()
    assert rates == pytest.approx(expected, abs=1e-6)


def test_losses_of_classes_and_values():
    module = tuner("lora", "classify")
    ids = torch.tensor([[1, 9, 8, 2], [1, 7, 6, 2]])
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.tensor([0.0, 1.0])}
    module.eval()
    logits = module.model(input_ids=ids, attention_mask=batch["attention_mask"]).logits
    torch.testing.assert_close(module.loss(batch)[0], F.cross_entropy(logits, torch.tensor([0, 1])))
    module.objective = OBJECTIVES["regress"]
    module.model.classifier = torch.nn.Linear(16, 1)
    logits = module.model(input_ids=ids, attention_mask=batch["attention_mask"]).logits
    torch.testing.assert_close(module.loss(batch)[0], ((logits.squeeze(-1) - batch["labels"]) ** 2).mean())


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 2**-8)]
)
def test_cross_entropy_in_chunks_is_cross_entropy(dtype, tolerance):
    """37 rows: two whole chunks and a rest. bf16 keeps the gradient in bf16, one rounding; the loss is fp32 throughout."""
    torch.manual_seed(0)
    logits, targets = (3 * torch.randn(37, 50)).to(dtype), torch.randint(0, 50, (37,))
    ours, plain = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    loss = TokenCrossEntropy.apply(ours, targets)
    expected = F.cross_entropy(plain.to(torch.promote_types(dtype, torch.float32)), targets)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    (2 * loss).backward()
    (2 * expected).backward()
    torch.testing.assert_close(ours.grad, plain.grad, rtol=tolerance, atol=tolerance / 37)
