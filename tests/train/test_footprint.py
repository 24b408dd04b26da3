"""Memory estimated by the plan: by hand on a tiny model, and that it moves as the run's settings do."""

import pytest
import torch

from highrank.config.words import compose_run
from highrank.model.tiny import DECODERS, ENCODERS
from highrank.train.footprint import PROGRAM
from highrank.train.plan import make_plan

GLIBC, TCMALLOC = 2.0, 1.4
TINY = ("model=tiny_llama", "model.dtype=float32", "task.n_train=8", "task.n_test=3", "batch_size=4")


@pytest.fixture(autouse=True)
def plain_machine(monkeypatch):
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)


def planned(*words):
    run = compose_run([*TINY, *words])
    return run, make_plan(run, run.make_task())


def memory(*words):
    return planned(*words)[1].memory_bytes


def test_by_hand():
    run, plan = planned("method=lora", "r=2")
    hidden, inner, keys, layers, vocabulary, new = 16, 32, 8, 2, 260, run.make_task().max_new_tokens
    shapes = [(hidden, hidden)] * 2 + [(keys, hidden)] * 2 + [(inner, hidden)] * 2 + [(hidden, inner)]
    texts = run.make_task().train()
    longest = max(len(run.protocol.template) + len(t.instruction) + len(t.output) for t in texts) / 4
    target = max(len(t.output) for t in texts) / 4
    touched = layers * sum(n + k for n, k in shapes)
    training = 4 * longest * touched + 2 * 4 * target * vocabulary
    evaluation = 3 * (longest * touched / layers + (longest + new) * 2 * keys * layers)
    found = plan.memory_bytes
    assert found["program"] == PROGRAM
    assert found["weights"] == 4 * plan.params.total
    assert found["adapters"] == (4 + 16 * GLIBC) * plan.params.trainable
    assert found["training"] == int(training * 4 * GLIBC)
    assert found["evaluation"] == int(evaluation * 4 * GLIBC)
    held = found["program"] + found["weights"] + found["adapters"]
    assert found["peak"] == held + max(found["training"], found["evaluation"])


def test_training():
    usual = memory("method=lora")["training"]
    assert memory("method=lora", "batch_size=8")["training"] == pytest.approx(2 * usual, rel=1e-6)
    assert memory("method=lora", "checkpoint_activations=true")["training"] < usual
    assert memory("method=lora", "packing=true")["training"] < usual
    assert memory("method=lora", "model.dtype=bfloat16")["training"] == pytest.approx(usual / 2, rel=1e-6)
    assert memory("method=lora", "protocol.mask_prompt=false")["training"] > usual
    assert memory("method=full")["adapters"] > memory("method=lora")["adapters"]


def test_evaluation():
    usual = memory("method=lora")["evaluation"]
    assert memory("method=lora", "eval_batch_size=1")["evaluation"] == pytest.approx(usual / 3, rel=1e-6)
    assert memory("method=lora", "eval_batch_size=3")["evaluation"] == usual  # the test set has no more
    assert memory("method=lora", "protocol.max_new_tokens=500")["evaluation"] > usual
    assert memory("method=prefix", "num_virtual_tokens=9")["evaluation"] > usual
    assert memory("method=lora", "eval_test=false")["evaluation"] == 0
    assert memory("method=lora", "eval_test=false", "protocol.num_validation=2")["evaluation"] > 0


@pytest.mark.parametrize("name", [*DECODERS, *ENCODERS, "t5"])
def test_other_models(name):
    task = "glue/rte" if name in ENCODERS else "wordmath"
    run = compose_run([f"model=tiny_{name}", f"task={task}", "task.n_train=8", "method=lora", "dry_run=true"])
    found = make_plan(run, run.make_task()).memory_bytes
    assert all(size > 0 for size in found.values())


def test_on_a_gpu_the_program_is_elsewhere(monkeypatch):
    on_cpu = memory("method=lora")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    found = memory("method=lora")
    assert found["program"] == 0
    assert found["training"] == pytest.approx(on_cpu["training"] / GLIBC, rel=1e-6)
    assert memory("method=lora", "trainer.accelerator=cpu") == on_cpu


def test_with_another_allocator(monkeypatch):
    usual = memory("method=lora")["training"]
    monkeypatch.setenv("LD_PRELOAD", "/usr/lib/libtcmalloc_minimal.so.4")
    assert memory("method=lora")["training"] == pytest.approx(usual * TCMALLOC / GLIBC, rel=1e-6)
