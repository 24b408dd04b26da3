"""Canaries: what we use of other libraries beyond their documented calls. A test that fails names what has moved."""

import ast
from pathlib import Path

import lightning
import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoConfig, AutoModelForCausalLM

from highrank.base.errors import UserError
from highrank.model import torch_internals, transformers_internals
from highrank.model.backbones import empty_model, load_backbone, model_config
from highrank.model.tiny import DECODERS, ENCODERS
from highrank.train import lightning_internals

ROOT = Path(__file__).parents[2]


def tiny(name):
    spec = {"name": f"tiny_{name}", "dtype": "float32"}
    return load_backbone(spec, None).model


class Recorder(nn.Module):
    """Stands in for a decoder: notes the arguments that its pre-hook sees."""

    def __init__(self, module):
        super().__init__()
        self.calls = []
        module.register_forward_pre_hook(self.note, with_kwargs=True)

    def note(self, module, args, kwargs):
        self.calls.append(transformers_internals.by_name(module, args, kwargs))


@pytest.mark.parametrize("name", DECODERS)
def test_transformers_passes_a_cache_under_the_name_of_the_argument(name):
    model = tiny(name)
    body = model.base_model
    seen = Recorder(body)
    model.generate(input_ids=torch.tensor([[5, 6]]), max_new_tokens=3, do_sample=False, pad_token_id=0)
    lengths = [call["input_ids"].shape[1] for call in seen.calls]
    assert lengths == [2, 1, 1]
    for call in seen.calls:
        cache = transformers_internals.cache_of(call)
        assert cache is not None
        assert call[transformers_internals.cache_name(body)] is cache
    assert cache.get_seq_length() == 4


@pytest.mark.parametrize("name", DECODERS)
def test_transformers_returns_the_cache_and_takes_it_back(name):
    model = tiny(name)
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        whole = model(input_ids=ids, use_cache=False).logits
        start = model(input_ids=ids[:, :2], use_cache=True)
        cache = transformers_internals.cache_of(start)
        cache.batch_select_indices(torch.tensor([0]))
        rest = model(
            input_ids=ids[:, 2:], **transformers_internals.with_cache(model, {"use_cache": True}, cache)
        ).logits
    torch.testing.assert_close(rest, whole[:, 2:])


def test_a_decoder_of_either_name_is_understood():
    class Old(nn.Module):
        def forward(self, input_ids, past_key_values=None):
            return None

    class New(nn.Module):
        def forward(self, input_ids, cache=None):
            return None

    for module, name in ((Old(), "past_key_values"), (New(), "cache")):
        assert transformers_internals.cache_name(module) == name
        named = transformers_internals.by_name(module, (1, 2), {})
        assert named == {"input_ids": 1, name: 2}
        assert transformers_internals.cache_of(named) == 2
        assert transformers_internals.with_cache(module, {"past_key_values": 3, "cache": 4}, 5) == {name: 5}
    assert transformers_internals.cache_of({"input_ids": 1, "cache": None}) is None
    with pytest.raises(UserError, match="takes its key-value cache as cache or past_key_values, got Linear with input"):
        transformers_internals.cache_name(nn.Linear(1, 1))


@pytest.mark.parametrize("name", [*DECODERS, "bert", "roberta"])  # which names none: one unit
def test_transformers_names_the_classes_of_blocks(name):
    kind = "classify" if name in ENCODERS else "generate"
    model = empty_model(model_config({"name": f"tiny_{name}"}, None), kind)
    blocks = transformers_internals.block_names(model)
    assert sum(type(module).__name__ in blocks for module in model.modules()) >= 2


def test_transformers_keeps_experts_in_two_parameters_and_gates_apart():
    config = AutoConfig.for_model(
        "mixtral", hidden_size=8, intermediate_size=6, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        num_local_experts=3, vocab_size=16,
    )  # fmt: skip
    layer = AutoModelForCausalLM.from_config(config).model.layers[0].mlp
    assert not transformers_internals.is_experts(layer)
    experts = layer.experts
    assert transformers_internals.is_experts(experts)
    both = torch.randn(5, 12)
    expected = torch.nn.functional.silu(both[:, :6]) * both[:, 6:]
    torch.testing.assert_close(transformers_internals.gated(experts, both), expected)


def test_transformers_names_tied_weights():
    assert transformers_internals.tied_weights(tiny("gpt2")) == {"lm_head.weight"}
    assert transformers_internals.tied_weights(tiny("llama")) == set()


class Steps(lightning.LightningModule):
    """Trains one number on nothing."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(1, 1)

    def training_step(self, batch, index):
        return self.layer(batch).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Saves(lightning.pytorch.callbacks.Callback):
    """Keeps a checkpoint from the start of each batch."""

    def __init__(self):
        self.checkpoints, self.places = [], []

    def on_train_batch_start(self, trainer, module, batch, index):
        trainer.save_checkpoint("nowhere.ckpt")

    def on_save_checkpoint(self, trainer, module, checkpoint):
        self.places.append(lightning_internals.before_this_batch(checkpoint))
        self.checkpoints.append(checkpoint)


@pytest.fixture
def trainer(monkeypatch):
    trainer = lightning.Trainer(
        accelerator="cpu", devices=1, max_steps=3, logger=False, enable_checkpointing=False, callbacks=[Saves()],
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    monkeypatch.setattr(trainer.strategy, "save_checkpoint", lambda *args, **kwargs: None)
    return trainer


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated")
@pytest.mark.filterwarnings("ignore:.*is smaller than the logging interval")
def test_lightning_counts_batches_where_a_checkpoint_rewinds_them(trainer):
    trainer.fit(Steps(), torch.utils.data.DataLoader(torch.zeros(3, 1)))
    saves = trainer.callbacks[0]
    assert saves.places == [0, 1, 2]
    for n, checkpoint in enumerate(saves.checkpoints):
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        assert set(checkpoint["loops"]) == {"fit_loop"}
        assert progress["current"] == {"ready": n, "started": n, "processed": n, "completed": n}
        assert progress["total"] == progress["current"]
        assert progress["is_last_batch"] is False


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated")
def test_lightning_asks_its_connector_for_signal_handlers(trainer):
    asked = []
    lightning_internals.leave_signals_alone(trainer)
    quiet = trainer._signal_connector.register_signal_handlers
    trainer._signal_connector.register_signal_handlers = lambda: asked.append(quiet())
    trainer.fit(Steps(), torch.utils.data.DataLoader(torch.zeros(3, 1)))
    assert asked == [None]


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated")
def test_lightning_logs_by_the_number_of_batches_that_stepped(trainer):
    trainer.fit(Steps(), torch.utils.data.DataLoader(torch.zeros(3, 1)))
    loop = trainer.fit_loop.epoch_loop
    assert loop._batches_that_stepped == trainer.global_step == 3
    loop._batches_that_stepped = 7
    lightning_internals.count_logged_steps(trainer)
    assert loop._batches_that_stepped == 3


def test_torch_tells_whether_the_cpu_has_tiles():
    flags = Path("/proc/cpuinfo")
    if not flags.is_file():
        pytest.skip("only Linux lists what its CPU can do")
    assert torch_internals.has_bf16_tiles() is ("amx_bf16" in flags.read_text())


def test_torch_counts_writes_to_a_tensor():
    tensor = torch.zeros(2)
    before = torch_internals.version_of(tensor)
    tensor.add_(1)
    assert torch_internals.version_of(tensor) == before + 1


def test_torch_makes_a_tensor_without_storage():
    class Shape(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            with torch_internals.as_plain_tensors():
                return func(*args, **(kwargs or {}))

        @classmethod
        def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
            raise AssertionError("asked for its entries")

    tensor = torch_internals.tensor_without_storage(Shape, (2, 3), torch.bfloat16, torch.device("cpu"))
    assert (type(tensor), tuple(tensor.shape), tensor.dtype) == (Shape, (2, 3), torch.bfloat16)


def test_torch_keeps_pre_hooks_by_function():
    calls = []
    layer, hook = nn.Linear(1, 1), lambda module, args: calls.append(1)
    for _ in range(2):
        torch_internals.hook_once(layer, hook)
    layer(torch.zeros(1))
    assert calls == [1]


def test_torch_reads_the_list_that_ddp_leaves_out(monkeypatch):
    module = nn.Linear(1, 1)
    torch_internals.leave_out_of_ddp(module, ["weight", "bias"])
    (name,) = [key for key, value in vars(module).items() if value == ["weight", "bias"]]
    source = (Path(torch.__file__).parent / "nn" / "parallel" / "distributed.py").read_text()
    assert f'hasattr(module, "{name}")' in source
    assert callable(DistributedDataParallel._set_params_and_buffers_to_ignore_for_model)


def private_names_of_others(tree):
    """Yields `x._name` where neither x nor the file defines it, and imports from private modules."""
    ours = {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)}
    ours |= {n.target.id for n in ast.walk(tree) if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
            if ast.unparse(node.value) not in ("self", "cls", "os") and node.attr not in ours:
                yield ast.unparse(node)
        elif isinstance(node, ast.ImportFrom) and "._" in (node.module or ""):
            yield node.module


def test_private_names_of_others_stand_in_three_files():
    homes = {f"{library}_internals.py" for library in ("torch", "lightning", "transformers")}
    files = [f for folder in ("src/highrank", "methods", "tasks") for f in (ROOT / folder).rglob("*.py")]
    found = {file.name: list(private_names_of_others(ast.parse(file.read_text()))) for file in files}
    assert {name: names for name, names in found.items() if names and name not in homes} == {}
    assert "trainer._signal_connector" in found["lightning_internals.py"]  # the search finds what it should
