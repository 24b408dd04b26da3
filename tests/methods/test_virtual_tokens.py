"""Virtual tokens and prefixes against PEFT's on a tiny Llama, in fp64: logits, loss, every gradient, greedy decoding."""

import copy

import pytest
import torch
import torch.nn.functional as F

from highrank.base.registry import load
from highrank.model.adapters import attach
from highrank.model.backbones import load_backbone

pytestmark = pytest.mark.parity

IDS = torch.tensor([[5, 6, 7, 8, 9, 10], [50, 60, 70, 80, 90, 100]])
TOLERANCE = {"rtol": 1e-9, "atol": 1e-10}  # fp64 sums of a few dozen terms in another order


def tiny_llama():
    return load_backbone({"name": "tiny_llama", "dtype": "float32"}, None).model.double()


def prefix_layout(P):
    """(L, 2, g, p, d_h) as PEFT keeps it, (p, L, 2, g, d_h) in one row per position."""
    return P.permute(3, 0, 1, 2, 4).flatten(1)


def greedy(model, num_tokens):
    """Token by token, each from the whole sequence: with transformers 5.24, PEFT 0.21.2 puts its tokens in front of every
    step that has a cache."""
    ids = IDS
    for _ in range(num_tokens):
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
    return ids


MLP = {f"L{i + 1}.{kind}": f"mlp_head.{2 * i}.{kind}" for i in range(3) for kind in ("weight", "bias")}
CASES = {
    "prompt_tuning": ("PromptTuningConfig", {}, {"P": "embedding.weight"}, {}),
    "p_tuning": (
        "PromptEncoderConfig",
        {"encoder_hidden_size": 5},
        {"Z": "embedding.weight", **MLP},
        {"hidden_size": 5},
    ),
    "prefix": ("PrefixTuningConfig", {}, {"P": "embedding.weight"}, {}),
}


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # raised inside PEFT
@pytest.mark.filterwarnings("ignore:.*past_key_values. is deprecated:FutureWarning")  # so is this
@pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning")
@pytest.mark.parametrize("method", CASES)
def test_peft(method):
    peft = pytest.importorskip("peft")
    theirs_cls, theirs_fields, names, fields = CASES[method]
    base = tiny_llama()
    config = getattr(peft, theirs_cls)(task_type="CAUSAL_LM", num_virtual_tokens=4, **theirs_fields)
    theirs = peft.get_peft_model(copy.deepcopy(base), config).double().eval()
    cls = load("methods", method)
    adapters = attach(base, [], cls, cls.config(num_virtual_tokens=4, **fields))
    ours = adapters.module.double()
    torch.manual_seed(0)
    parameters = dict(theirs.prompt_encoder["default"].named_parameters())
    layout = prefix_layout if method == "prefix" else lambda tensor: tensor
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            parameter.normal_()
            parameters[names[name]].copy_(layout(parameter))
    assert len(parameters) == len(names) == len(list(ours.parameters()))

    mask = torch.ones_like(IDS)
    out = base(input_ids=IDS, attention_mask=mask, use_cache=False).logits
    expected = theirs(input_ids=IDS, attention_mask=mask).logits[:, -6:]
    torch.testing.assert_close(out, expected, **TOLERANCE)

    for found in (out, expected):
        F.cross_entropy(found[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()).backward()
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(layout(parameter.grad), parameters[names[name]].grad, **TOLERANCE)

    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(base.generate(input_ids=IDS, attention_mask=mask, **settings), greedy(theirs, 6))


def test_prompt_tuning_is_the_base_on_longer_embeddings():
    """Longhand: the model itself, given the virtual tokens' embeddings and then the tokens'."""
    base = tiny_llama()
    plain = copy.deepcopy(base)
    cls = load("methods", "prompt_tuning")
    P = attach(base, [], cls, cls.config(num_virtual_tokens=4)).module.double().P
    embeddings = torch.cat([P.expand(2, -1, -1), plain.get_input_embeddings()(IDS)], dim=1)
    torch.testing.assert_close(base(input_ids=IDS).logits, plain(inputs_embeds=embeddings).logits[:, 4:], **TOLERANCE)


def test_p_tuning_network():
    base = tiny_llama()
    cls = load("methods", "p_tuning")
    ours = attach(base, [], cls, cls.config(num_virtual_tokens=4, hidden_size=5)).module.double()
    relu = lambda x: x * (x > 0)  # noqa: E731
    first, second, third = ((m.weight, m.bias) for m in (ours.L1, ours.L2, ours.L3))
    hidden = relu(relu(ours.Z @ first[0].T + first[1]) @ second[0].T + second[1])
    torch.testing.assert_close(ours.embeddings(), hidden @ third[0].T + third[1], **TOLERANCE)
