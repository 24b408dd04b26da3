"""One CUDA device: the numbers of the CPU for every method, whole runs, resume, quantised bases, FSDP2 on one device."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from moved import move
from near import check_same, near, results, saved
from safetensors.torch import load_file
from torch.testing import assert_close

from highrank.base.errors import UserError
from highrank.base.registry import available, load
from highrank.cli import main
from highrank.model.adapters import attach
from highrank.model.backbones import load_backbone
from highrank.model.placement import resolve
from highrank.model.quantised import KINDS, dequantise_model
from highrank.train.loss import language_model_loss
from highrank.train.module import FineTuner

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.integration,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DEVICE = "cuda"
HERE, ROOT = Path(__file__).parent, Path(__file__).parents[2]
CASES = [
    pytest.param(name, fields, id="-".join([name, *(f"{key}={value}" for key, value in fields.items())]))
    for name in available("methods")
    for fields in load("methods", name).examples
]
WORDS = [
    *("model=tiny_llama", "task.n_train=29", "task.n_test=5", "batch_size=2", "eval_batch_size=2", "lr=1e-2"),
    *("epochs=2", "accumulate=2", "max_grad_norm=0.1", "protocol.num_validation=3", "protocol.selection=best"),
]
ADAPTER = Path("adapter", "adapter.safetensors")


def adapted(method, fields, dtype="float32", quantize=None):
    """Returns adapters away from their start on a tiny model, made on the CPU."""
    backbone = load_backbone({"name": "tiny_qwen2", "dtype": dtype, "quantize": quantize}, None)
    cls = load("methods", method)
    views = resolve(backbone.model, "all") if cls.family.changes_weights else []
    cfg = cls.config(**fields)
    try:
        cls.family.count(backbone.model, views, cls, cfg, 0)
    except UserError as error:  # an example for other sizes
        pytest.skip(str(error))
    adapters = attach(backbone.model, views, cls, cfg, tokenizer=backbone.tokenizer)
    move(adapters, 0.05, seed=1)
    return adapters


def step(adapters, device):
    """Returns the loss, all gradients, and the parameters after a step of SGD, on the CPU."""
    ids = torch.randint(4, 260, (2, 11), generator=torch.Generator().manual_seed(0)).to(device)
    model = adapters.model.to(device).train()
    loss, _ = language_model_loss(model, ids, torch.ones_like(ids), ids)
    loss.backward()
    parameters = dict(adapters.named_parameters())
    assert {parameter.device.type for parameter in parameters.values()} == {device}
    gradients = {name: parameter.grad.cpu() for name, parameter in parameters.items()}
    torch.optim.SGD(parameters.values(), lr=0.1).step()
    return loss.detach().cpu(), gradients, {name: parameter.detach().cpu() for name, parameter in parameters.items()}


@pytest.mark.usefixtures("wide")
@pytest.mark.parametrize(("name", "fields"), CASES)
def test_a_step_is_that_of_the_cpu(name, fields):
    expected = step(adapted(name, fields), "cpu")
    for found, wanted in zip(step(adapted(name, fields), DEVICE), expected, strict=True):
        assert_close(found, wanted, rtol=1e-3, atol=1e-5)  # fp32 sums in another order, magnified by small differences


@pytest.mark.usefixtures("wide")
@pytest.mark.parametrize(("name", "fields"), CASES)
def test_a_step_on_a_16_bit_base_is_near_that_of_the_cpu(name, fields):
    loss, gradients, _ = step(adapted(name, fields, "bfloat16"), DEVICE)
    expected, exact, _ = step(adapted(name, fields, "bfloat16"), "cpu")
    assert_close(loss, expected, rtol=0, atol=5e-2)
    found, wanted = (torch.cat([g.flatten().double() for g in all_.values()]) for all_ in (gradients, exact))
    assert float((found - wanted).norm() / wanted.norm()) < 0.1  # 2^-8 per rounding, over a few dozen of them


def run(folder, *words):
    assert main(["run", *WORDS, *words, f"run_dir={folder}"]) == 0
    return folder


@pytest.fixture(scope="module")
def on_gpu(tmp_path_factory):
    return run(tmp_path_factory.mktemp("gpu") / "run", "trainer=gpu")


def check_near(folder, other, atol):
    """Two runs have the same adapter to `atol`, the same answers, and losses up to the order of their sums."""
    for name, tensor in load_file(other / ADAPTER).items():
        assert_close(load_file(folder / ADAPTER)[name], tensor, rtol=0, atol=atol)
    for file in (other / "predictions").iterdir():
        assert saved(folder / "predictions" / file.name) == near(saved(file))


def test_a_run_is_that_of_the_cpu(on_gpu, tmp_path):
    check_near(on_gpu, run(tmp_path / "cpu", "trainer=cpu"), 1e-4)
    assert results(on_gpu)["memory"]["peak_cuda_bytes"] > 0


@pytest.mark.parametrize("method", ["hira", "hyperadapt", "lora", "dora"])
def test_a_run_is_the_same_again_and_after_a_stop(tmp_path, method):
    words = ["trainer=gpu", f"method={method}"]
    whole = run(tmp_path / "whole", *words)
    check_same(run(tmp_path / "again", *words), whole)
    folder = tmp_path / "stopped"
    command = [sys.executable, str(HERE / "disturbed.py"), "0", "stop", *WORDS, *words, f"run_dir={folder}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=400)
    assert done.returncode == 143, done.stderr
    run(folder, *words)
    assert results(folder)["resumed"] == ["going on from last.ckpt, step 4"]
    check_same(folder, whole)


def test_the_weights_in_shards_on_one_device(on_gpu, tmp_path):
    folder = run(tmp_path / "fsdp", "trainer=fsdp", "trainer.accelerator=gpu", "trainer.devices=1")
    check_near(folder, on_gpu, 1e-5)


def test_checkpointed_activations_leave_the_numbers(on_gpu, tmp_path):
    check_near(run(tmp_path / "run", "trainer=gpu", "checkpoint_activations=true"), on_gpu, 1e-4)


def test_16_bits(tmp_path):
    """Autocast over a base in 32 bits, and a base in 16: both learn."""
    for words in (["trainer=gpu_bf16"], ["trainer=gpu", "model.dtype=bfloat16"]):
        folder = run(tmp_path / words[-1], *words, "eval_before=true")
        found = results(folder)
        assert found["status"] == "done"
        metrics = found["metrics"]
        assert metrics["final"]["loss"] < metrics["before"]["loss"]


@pytest.mark.usefixtures("wide")
@pytest.mark.filterwarnings("ignore:.*Enum subclass.*")
@pytest.mark.parametrize("method", ["hira", "hyperadapt", "lora", "dora", "boft"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_on_a_quantised_base_is_that_of_its_dequantised_weights(kind, method):
    pytest.importorskip(KINDS[kind])
    fields = load("methods", method).examples[0]
    expected = adapted(method, fields, quantize=kind)
    dequantise_model(expected.model)
    found = step(adapted(method, fields, quantize=kind), DEVICE)
    for one, other in zip(found, step(expected, "cpu"), strict=True):
        # nf4's own product on a GPU computes in the input's type from a table of 16 numbers
        assert_close(one, other, rtol=1e-2, atol=1e-4)


@pytest.mark.usefixtures("wide")
@pytest.mark.filterwarnings("ignore:.*Enum subclass.*")
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_on_a_quantised_base(tmp_path, kind):
    if importlib.util.find_spec(KINDS[kind]) is None:
        pytest.skip(f"{KINDS[kind]} is not installed (extra quant)")
    folder = run(tmp_path / "run", "trainer=gpu", f"model.quantize={kind}", "method=hira")
    assert results(folder)["status"] == "done"


def test_memory_that_runs_out_is_told_and_a_batch_in_parts_goes_on(tmp_path, monkeypatch):
    """In the second step, as the device itself says it."""
    real = FineTuner.loss

    def loss(self, batch):
        if self.trainer.global_step == 1 and len(batch["input_ids"]) > 4:
            torch.zeros(torch.cuda.mem_get_info()[1], dtype=torch.uint8, device="cuda")  # there is no such block
        return real(self, batch)

    monkeypatch.setattr(FineTuner, "loss", loss)
    words = ["trainer=gpu", "batch_size=16", "task.n_train=64", "auto_microbatch=true", "eval_before=false"]
    found = results(run(tmp_path / "run", *words))
    assert (found["status"], found["parts"]) == ("done", 4)
