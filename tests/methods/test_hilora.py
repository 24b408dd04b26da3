"""HiLoRA against its formula; without either part it is PEFT's HiRA or LoRA."""

import pytest

pytestmark = pytest.mark.parity


def test_formula(layer, agree_with_formula):
    adapter = layer.adapter("hilora", r1=2, r2=3, s=0.5)
    agree_with_formula(adapter, lambda W, A, B, L1, L2: W + W * (A @ B) + 0.5 * L1 @ L2)


def test_no_additive_part_is_hira_in_peft(layer, agree_with_peft):
    peft = pytest.importorskip("peft")
    config = peft.HiraConfig(r=3, target_modules=["fc"])
    agree_with_peft(layer.adapter("hilora", r1=3, r2=0), config, {"A": "hira_B", "B": "hira_A"})


def test_no_hadamard_part_is_lora_in_peft(layer, agree_with_peft):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=3, lora_alpha=1.5, target_modules=["fc"])
    agree_with_peft(layer.adapter("hilora", r1=0, r2=3, s=0.5), config, {"L1": "lora_B", "L2": "lora_A"})


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"r1": -1}, "r1"),
        ({"r2": -1}, "r2"),
        ({"r1": 0, "r2": 0}, "r1"),
        ({"s": 0.0}, "s"),
    ],
)
def test_bad_fields_are_named(refused, fields, named):
    refused("hilora", fields, named)
