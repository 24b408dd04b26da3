"""HighRank as a library: two steps in a plain loop, in HF Trainer, TRL and another's LightningModule are those of a run."""

import copy
import math
import pickle
import shutil
import subprocess
import sys
from contextlib import nullcontext

import lightning
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, Trainer, TrainingArguments

import highrank
from highrank.base.errors import UserError
from highrank.cli import main
from highrank.config.words import compose_run
from highrank.data.batches import TrainingData
from highrank.data.encoding import within
from highrank.model.backbones import load_backbone
from highrank.model.language import context_length
from highrank.model.tiny import tiny_config
from highrank.model.weight_adapters import AdaptedLinear
from highrank.train.devices import quiet

pytestmark = pytest.mark.integration

RATE, DECAY = 0.02, 0.1
BETA, EPS = 1.0, 1e-4  # of DPO; below this eps AdamW turns the rounding of small gradients into whole steps
WORDS = [
    *("model=tiny_llama", "task.n_train=8", "task.n_test=2", "batch_size=4", "max_steps=2", "eval_test=false"),
    *(f"lr={RATE}", f"weight_decay={DECAY}", "schedule=constant", "warmup_ratio=0"),
]
TRL_SAYS = pytest.mark.filterwarnings("ignore:`.*gradient_checkpointing.*` is deprecated:FutureWarning")
METHODS = {"hira": {"r": 2}, "hyperadapt": {}, "lora": {"r": 2, "lr_ratio": 4.0}, "prefix": {"num_virtual_tokens": 2}}


def tiny(name="llama", kind="generate"):
    return load_backbone({"name": f"tiny_{name}", "dtype": "float32"}, None, kind).model


@pytest.fixture(scope="module", params=METHODS)
def case(request, tmp_path_factory):
    """A method, its fields, our own run of two steps, and the batches of these."""
    name, folder = request.param, tmp_path_factory.mktemp("own") / "run"
    words = [*WORDS, f"method={name}", *(f"{key}={value}" for key, value in METHODS[name].items())]
    assert main(["run", *words, f"run_dir={folder}"]) == 0
    run, backbone = compose_run(words), load_backbone({"name": "tiny_llama", "dtype": "float32"}, None)
    positions = context_length(backbone.model, backbone.tokenizer) - METHODS[name].get("num_virtual_tokens", 0)
    data = TrainingData(run.make_task(), within(run.protocol, positions), backbone.tokenizer, 4, 4, 0)
    return name, METHODS[name], folder, list(data.train_dataloader())


def attached(case):
    name, fields, _, _ = case
    model = tiny()
    return model.train(), highrank.attach(model, name, **fields)


def optimizer(adapters, eps=1e-8):
    return torch.optim.AdamW(adapters.parameter_groups(lr=RATE, weight_decay=DECAY), eps=eps)


def assert_trained_alike(case, model, adapters):
    """Compares every parameter with our own run's, and the loss of both trained models."""
    _, _, folder, batches = case
    expected, found = load_file(folder / "adapter" / "adapter.safetensors"), adapters.state_dict()
    assert expected.keys() == found.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor, rtol=0, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}")
    own = highrank.load(folder).model
    with torch.no_grad():
        for batch in batches:
            torch.testing.assert_close(model.eval()(**batch).loss, own(**batch).loss, rtol=0, atol=1e-5)


def assert_only_adapters_moved(model, adapters, before):
    """Compares every parameter with what it was: all that trains has moved, the base has not by a bit."""
    trained = {id(parameter) for _, parameter in adapters.named_parameters()}
    for key, parameter in model.named_parameters():
        assert torch.equal(parameter, before[key]) != (id(parameter) in trained), key


def test_a_plain_loop(case):
    model, adapters = attached(case)
    steps = optimizer(adapters)
    for batch in case[3]:
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_([p for _, p in adapters.named_parameters()], 1.0)
        steps.step()
        steps.zero_grad()
    assert_trained_alike(case, model, adapters)


def trainer(case, model, adapters, folder):
    arguments = TrainingArguments(
        folder,
        max_steps=2,
        per_device_train_batch_size=1,  # of batches that are made already
        lr_scheduler_type="constant",
        train_sampling_strategy="sequential",
        save_steps=1,
        report_to=[],
        use_cpu=True,
        remove_unused_columns=False,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    return Trainer(
        model,
        arguments,
        train_dataset=case[3],
        data_collator=lambda rows: dict(rows[0]),
        optimizers=(optimizer(adapters), None),
    )


def test_hf_trainer_trains_saves_and_goes_on(case, tmp_path):
    model, adapters = attached(case)
    trainer(case, model, adapters, tmp_path).train()
    assert_trained_alike(case, model, adapters)
    again, others = attached(case)
    trainer(case, again, others, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    for key, tensor in adapters.state_dict().items():
        torch.testing.assert_close(others.state_dict()[key], tensor, rtol=0, atol=0)


class Theirs(lightning.LightningModule):
    """A LightningModule that knows nothing of this package but its optimizer's groups."""

    def __init__(self, model, adapters):
        super().__init__()
        self.model, self.adapters = model, adapters

    def training_step(self, batch, index):
        return self.model(**batch).loss

    def configure_optimizers(self):
        return optimizer(self.adapters)


def test_the_lightning_module_of_another(case, tmp_path):
    model, adapters = attached(case)
    module = Theirs(model, adapters)
    settings = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False}
    with quiet():
        theirs = lightning.Trainer(
            **settings, max_steps=2, gradient_clip_val=1.0, default_root_dir=tmp_path, enable_model_summary=False
        )
        theirs.fit(module, DataLoader(case[3], batch_size=None))
    assert_trained_alike(case, model, adapters)
    again = Theirs(*attached(case))
    saved = next(tmp_path.rglob("*.ckpt"))
    again.load_state_dict(torch.load(saved, weights_only=True)["state_dict"])
    assert_trained_alike(case, again.model, again.adapters)


def trl_settings(folder, name, **others):
    return {
        "output_dir": str(folder),
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "lr_scheduler_type": "constant",
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": name != "prefix",  # TRL's default, of which a prefix says that it cannot
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        **others,
    }


def assert_losses(trainer, expected):
    found = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", ["hira", "hyperadapt", "prefix"], indirect=True)
@TRL_SAYS
def test_trl_sft_trainer(case, tmp_path):
    trl = pytest.importorskip("trl")
    name, _, folder, batches = case
    model, adapters = attached(case)
    before = {key: parameter.detach().clone() for key, parameter in model.named_parameters()}
    rows = [
        {key: row[batch["attention_mask"][i].bool()].tolist() for key, row in (("input_ids", ids), ("labels", labels))}
        for batch in batches
        for i, (ids, labels) in enumerate(zip(batch["input_ids"], batch["labels"], strict=True))
    ]
    trainer = trl.SFTTrainer(
        model,
        trl.SFTConfig(**trl_settings(tmp_path, name)),
        train_dataset=Dataset.from_list(rows),
        processing_class=load_backbone({"name": "tiny_llama", "dtype": "float32"}, None).tokenizer,
        optimizers=(optimizer(adapters), None),
    )
    trainer.train()
    assert_losses(trainer, [event.value for event in EventAccumulator(str(folder)).Reload().Scalars("train/loss")])
    assert_only_adapters_moved(model, adapters, before)
    assert_trained_alike(case, model, adapters)


def log_probability(model, batch):
    """Returns log p(completion | prompt) of every row of a batch of TRL's."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    tokens = batch["input_ids"][:, 1:, None]
    each = logits.log_softmax(-1).gather(-1, tokens).squeeze(-1)
    return (each * batch["completion_mask"][:, 1:]).sum(1)


def dpo_loss(model, adapters, batch):
    """The loss of the DPO paper, written down; its reference is the model with the adapters off."""
    with torch.no_grad(), adapters.disabled():
        reference = log_probability(model, batch)
    chosen, rejected = (log_probability(model, batch) - reference).chunk(2)
    return -torch.nn.functional.logsigmoid(BETA * (chosen - rejected)).mean()


def started(name, **fields):
    """Returns a model with adapters that differ from the base from the start, so that the reference matters."""
    model = tiny().train()
    adapters = highrank.attach(model, name, **fields)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, parameter in adapters.named_parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.5)
    return model, adapters


@pytest.mark.parametrize(
    ("name", "reference"),
    [("hira", "adapters off"), ("hyperadapt", "adapters off"), ("prefix", "adapters off"), ("hira", "a copy")],
)
@TRL_SAYS
def test_trl_dpo_trainer(name, reference, tmp_path):
    trl = pytest.importorskip("trl")
    model, adapters = started(name, **METHODS[name])
    before = {key: parameter.detach().clone() for key, parameter in model.named_parameters()}
    pairs = [{"prompt": f"{i} plus 2 is ", "chosen": f"{i + 2}.", "rejected": f"not {i}."} for i in range(8)]
    off = reference == "adapters off"
    with adapters.disabled() if off else nullcontext():
        trainer = trl.DPOTrainer(
            model,
            None if off else tiny(),
            trl.DPOConfig(**trl_settings(tmp_path, name, beta=BETA, precompute_ref_log_probs=off)),
            train_dataset=Dataset.from_list(pairs),
            processing_class=load_backbone({"name": "tiny_llama", "dtype": "float32"}, None).tokenizer,
            optimizers=(optimizer(adapters, EPS), None),
        )
    batches = list(trainer.get_train_dataloader())
    trainer.train()
    assert_only_adapters_moved(model, adapters, before)

    plain, others = started(name, **METHODS[name])
    steps, losses = optimizer(others, EPS), []
    for batch in batches:
        loss = dpo_loss(plain, others, batch)
        loss.backward()
        losses.append(loss.item())
        torch.nn.utils.clip_grad_norm_([p for _, p in others.named_parameters()], 1.0)
        steps.step()
        steps.zero_grad()
    assert abs(losses[0] - math.log(2)) > 1e-3  # what it would be if the reference were the adapters at the start
    assert_losses(trainer, losses)
    for key, tensor in others.state_dict().items():
        torch.testing.assert_close(adapters.state_dict()[key], tensor, rtol=0, atol=1e-5)


def test_a_saved_adapter_comes_back_on_a_model(case, tmp_path):
    _, _, folder, batches = case
    own = highrank.load(folder)
    own.adapters.save(tmp_path)
    for place in (tmp_path, folder / "adapter"):
        model = tiny()
        adapters = highrank.load_adapter(model, place)
        assert not any(module.training for module in model.modules())
        with torch.no_grad():
            assert torch.equal(model(**batches[0]).logits, own.model(**batches[0]).logits)
        adapters.unload()
        highrank.attach(model, "hira", r=2)  # free again


def test_what_can_be_done_with_adapters():
    model, ids = tiny(), torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        base = model(ids).logits
        adapters = highrank.attach(model, "hira", placement="qv", layers=1, r=2, seed=3)
        names = list(adapters.by_view)
        assert names == ["model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.v_proj"]
        for _, parameter in adapters.named_parameters():
            parameter.add_(0.1)
        acting = model(ids).logits
        with adapters.disabled():
            assert torch.equal(model(ids).logits, base)
        W = model.get_submodule(names[0]).base.weight.clone()
        delta = adapters.delta_weight(names[0])
        assert torch.equal(delta, adapters.delta_weight(adapters.views[0]))
        adapters.merge()
        torch.testing.assert_close(model.get_submodule(names[0]).base.weight, W + delta)
        torch.testing.assert_close(model(ids).logits, acting)
        adapters.unmerge()
        assert torch.equal(model.get_submodule(names[0]).base.weight, W)
    assert adapters.num_trainable() == sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_copy_of_an_adapted_model_is_its_own(name):
    model, ids = tiny(name), torch.tensor([[5, 6, 7, 8]])
    adapters = highrank.attach(model, "lora", placement="down", r=2)
    other = copy.deepcopy(model)
    with torch.no_grad():
        before = model(ids).logits
        assert torch.equal(other(ids).logits, before)
        for layer in other.modules():
            if isinstance(layer, AdaptedLinear):
                layer.base.weight.zero_()
        assert not torch.equal(other(ids).logits, before)
        assert torch.equal(model(ids).logits, before)
    pickle.loads(pickle.dumps(other))
    assert adapters.model is model


def test_a_config_object_says_the_same_as_a_name_and_fields():
    from highrank.methods.hira import HiRAConfig

    by_name = highrank.attach(tiny(), "hira", r=3)
    by_config = highrank.attach(tiny(), HiRAConfig(r=3))
    for key, tensor in by_name.state_dict().items():
        assert torch.equal(by_config.state_dict()[key], tensor)


def test_an_encoder_alone_has_no_head_and_a_classifier_trains_its_own():
    alone = AutoModel.from_config(AutoConfig.for_model(**tiny_config("bert")))
    assert highrank.attach(alone, "lora", r=2).extra == []
    masked = AutoModelForMaskedLM.from_config(AutoConfig.for_model(**tiny_config("bert")))
    assert highrank.attach(masked, "lora", r=2).extra == []  # its head is the embeddings again
    classifier = highrank.attach(tiny("bert", "classify"), "lora", r=2)
    assert classifier.extra == ["classifier.weight", "classifier.bias"]


def test_methods_are_named_with_one_line_each_and_remain_a_package():
    names = highrank.methods()
    assert names["hira"] == "HiRA: the Hadamard product of a frozen R and a low-rank matrix."
    assert {"hyperadapt", "lora", "full", "prefix"} <= names.keys()
    assert all(names.values())
    assert highrank.methods.__name__ == "highrank.methods"


def test_importing_it_imports_nothing_else():
    code = "import highrank, sys; dir(highrank); highrank.__version__; print([m for m in sys.modules if m.startswith('highrank')])"
    code += "; print('torch' in sys.modules, highrank.attach.__module__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    modules, others = done.stdout.splitlines()
    assert modules == "['highrank']"
    assert others == "False highrank.library"


def peft_model():
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(tiny(), peft.LoraConfig(r=2, target_modules=["q_proj"]))


def without_weights():
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**tiny_config("llama")))


BAD = {
    "method": (tiny, {"method": "hirra"}, "unknown name, got method=hirra; did you mean 'hira'"),
    "not a method": (tiny, {"method": 3}, "method is a name or a method's config object, got method=3"),
    "field": (tiny, {"rr": 2}, "hira has no field 'rr'; it has: r, .*did you mean 'r'"),
    "type": (tiny, {"r": "two"}, "hira: r must be of type int, got r=two"),
    "value": (tiny, {"method": "boft", "block_size": 5}, "block_size must divide in_features, got block_size=5"),
    "placement": (tiny, {"placement": "fc_qv"}, "unknown set or part, got placement=fc_qv; did you mean 'fc_qkv'"),
    "no such part": (lambda: tiny("gpt2"), {"placement": "gate"}, "gpt2 has no part gate"),
    "layers": (tiny, {"layers": "5"}, "the model has layers 0-1, got layers=5"),
    "no model": (lambda: torch.nn.Linear(2, 2), {}, "the model is a transformers model, got Linear"),
    "a path": (lambda: "path/to/model", {}, "the model is a transformers model, got str; give what from_pretrained"),
    "compiled": (
        lambda: torch.compile(tiny(), backend="eager"),
        {},
        "adapters go on before torch.compile, got a compiled model",
    ),
    "no weights": (without_weights, {}, "must hold its weights, got none at model.embed_tokens.weight"),
    "PEFT's": (peft_model, {}, r"must not be wrapped by PEFT, got PeftModel at its top; .*model\.unload\(\)"),
    "what PEFT wraps": (
        lambda: peft_model().base_model.model,
        {},
        "must not be wrapped by PEFT, got .* at model.layers.0",
    ),
}


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # raised inside PEFT
@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_said_in_one_line_and_changes_nothing(case):
    make, arguments, message = BAD[case]
    model = make()
    parameters = dict(model.named_parameters()) if isinstance(model, torch.nn.Module) else {}
    before = {name: parameter.requires_grad for name, parameter in parameters.items()}
    with pytest.raises(UserError, match=message) as error:
        highrank.attach(model, **arguments)
    assert "\n" not in str(error.value)
    assert {name: parameter.requires_grad for name, parameter in parameters.items()} == before


@pytest.mark.parametrize("first", ["hira", "prefix"])
def test_a_model_has_adapters_once(first, tmp_path):
    model = tiny()
    adapters = highrank.attach(model, first)
    adapters.save(tmp_path)
    for again in (lambda: highrank.attach(model, "lora"), lambda: highrank.load_adapter(model, tmp_path)):
        with pytest.raises(UserError, match=r"has adapters already, got some at .*adapters.unload\(\)"):
            again()
    adapters.unload()
    highrank.attach(model, "lora")


def test_a_wrong_name_of_a_weight_gives_the_nearest():
    adapters = highrank.attach(tiny(), "hira", r=2)
    with pytest.raises(UserError, match="no weight of this name is adapted, got q_proj"):
        adapters.delta_weight("q_proj")
    with pytest.raises(UserError, match="prefix changes no weights"):
        highrank.attach(tiny(), "prefix").delta_weight("q_proj")


def test_what_is_no_finished_run_is_not_loaded(tmp_path, run_cli):
    with pytest.raises(UserError, match=r"a run directory holds config\.yaml, got .*, which has no results\.json"):
        highrank.load(tmp_path)
    status, out, _ = run_cli(*WORDS, "r=2")
    folder = out.splitlines()[-1]
    assert status == 0
    with pytest.raises(UserError, match="a saved adapter is used as it was trained, got r=3"):
        highrank.load(folder, "r=3")
    with pytest.raises(UserError, match=r"a saved adapter has adapter\.json, got none"):
        highrank.load_adapter(tiny(), folder)
    with pytest.raises(UserError, match=r"must be the one trained on, got no weight for \(16, 16\) at model.layers.0"):
        highrank.load_adapter(tiny("gpt2"), f"{folder}/adapter")
    shutil.copytree(folder, tmp_path / "early", ignore=shutil.ignore_patterns("adapter"))
    with pytest.raises(UserError, match=r"holds adapter/adapter\.json, got .*has the run finished training"):
        highrank.load(tmp_path / "early")
    other = tiny()
    with torch.no_grad():
        other.model.layers[0].self_attn.q_proj.weight.mul_(2)
    with pytest.raises(UserError, match="the base model is not the one the adapter was trained on"):
        highrank.load_adapter(other, f"{folder}/adapter")
    highrank.attach(other, "hira", r=2)  # nothing of the other one is left on it
