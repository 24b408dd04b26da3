import pytest

pytestmark = pytest.mark.parity


def test_formula(layer, agree_with_formula):
    agree_with_formula(layer.adapter("lora", r=3, alpha=4.5), lambda W, A, B: W + 4.5 / 3 * B @ A)


def test_default_alpha_is_twice_r(layer, agree_with_formula):
    agree_with_formula(layer.adapter("lora", r=5), lambda W, A, B: W + 2 * B @ A)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_peft(layer, agree_with_peft, dropout):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=3, lora_alpha=4.5, lora_dropout=dropout, target_modules=["fc"])
    adapter = layer.adapter("lora", r=3, alpha=4.5, dropout=dropout)
    agree_with_peft(adapter, config, {"A": "lora_A", "B": "lora_B"})


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"r": 0}, "r"),
        ({"alpha": 0.0}, "alpha"),
        ({"dropout": 1.0}, "dropout"),
    ],
)
def test_bad_fields_are_named(refused, fields, named):
    refused("lora", fields, named)
