"""A run keeps its hash when its method gets a new field: what was run is not run again, what was saved is read."""

import dataclasses

import pytest
from omegaconf import OmegaConf

from highrank.config.build import build
from highrank.config.run_config import config_hash, with_later
from highrank.config.words import compose_run

BEFORE = {
    "method=hyperadapt model.dtype=bfloat16": "ca0fb9c2908c6214084f50b7c5a192f6d2cc84bfe9658744367fdc5e2b848e3c",
    "method=hira model.dtype=bfloat16": "a6341389d5d582acd3881371c0ed61ba02220ba90f3d4488dcef0b321b9eeabd",
    "method=lora model.dtype=bfloat16": "8fe345258819d7a851f5d76ef39a40c3aa2c1e5e3fc219eb8ae9cae0852dfaf2",
    "method=lora r=4 alpha=3 model.dtype=bfloat16": "fab6b81ff539a21c7745cfea4e9af60acf9e3ddca6300c88adf3325daaef6168",
    "method=lora model=tiny_llama": "22ba695268e467655450b573e65480479b7b29fb9a1393770f907e7462794066",
}
"""As printed by the first versions of these methods."""
YOUNGER = {
    "method=hyperadapt model.dtype=bfloat16": {"sides": "a", "init_std": 0.1},
    "method=lora model.dtype=bfloat16": {"scaling": "rs", "init": "pissa", "lr_ratio": 16},
}


@pytest.mark.parametrize("words", BEFORE)
def test_a_hash_is_what_it_was(words):
    assert compose_run(words.split()).hash == BEFORE[words]


def test_a_core_key_that_is_younger_counts_where_it_is_given():
    words = ["method=lora", "protocol.num_validation=8"]
    runs = [compose_run([*words, *more]) for more in ([], ["patience=3"], ["patience=3", "min_delta=0.1"])]
    assert len({run.hash for run in runs}) == 3
    saved = {key: value for key, value in runs[0].resolved.items() if key not in ("patience", "min_delta", "logger")}
    assert config_hash(saved) == runs[0].hash
    assert build(OmegaConf.create(saved)).core == runs[0].core
    assert compose_run([*words, "logger=csv"]).hash == runs[0].hash


@pytest.mark.parametrize("words", YOUNGER)
def test_a_config_from_before_a_field_is_read(words):
    run = compose_run(words.split())
    later = {f.name for f in dataclasses.fields(run.method.config) if f.metadata.get("later")}
    assert later == YOUNGER[words].keys()
    method = {key: value for key, value in run.resolved["method"].items() if key not in later}
    saved = {**run.resolved, "method": method}
    assert config_hash(saved) == run.hash
    assert build(OmegaConf.create(saved)).method_cfg == run.method_cfg
    assert with_later(saved) == run.resolved


def test_so_it_is_for_the_parts_of_a_sum():
    run = compose_run(["method=sum", "parts=[hira,lora]"])
    lora = {"r": 16, "alpha": None, "dropout": 0.0}
    saved = {**run.resolved, "method": {"name": "sum", "parts": {**run.resolved["method"]["parts"], "lora": lora}}}
    assert saved != run.resolved
    assert config_hash(saved) == run.hash
    assert build(OmegaConf.create(saved)).method_cfg == run.method_cfg
    assert with_later(saved) == run.resolved
    assert compose_run(["method=sum", "parts=[hira,lora]", "parts.lora.scaling=rs"]).hash != run.hash


@pytest.mark.parametrize(("words", "field"), [(words, field) for words, fields in YOUNGER.items() for field in fields])
def test_another_value_is_another_run(words, field):
    assert compose_run([*words.split(), f"{field}={YOUNGER[words][field]}"]).hash != BEFORE[words]
