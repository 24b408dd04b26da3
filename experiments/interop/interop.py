"""Largest logit difference between an adapter here and in PEFT, both ways, per method, on tiny random models in fp32.

    python experiments/interop/interop.py

Every trained number is drawn at random, so that nothing is at its start. `export`: our run, written for PEFT and loaded
by it, against our own model. `import`: an adapter that PEFT made and saved, read here, against PEFT's own model.
"""

import sys
import tempfile
import warnings
from importlib.metadata import version
from pathlib import Path

import peft
import torch

from highrank.base.files import write_atomic
from highrank.config.words import compose_run
from highrank.interop.peft import export_run, import_adapter
from highrank.model.backbones import load_backbone
from highrank.train.build import build_model
from highrank.train.results import RunDirectory
from highrank.train.saved import load_run

MODELS = ("tiny_llama", "tiny_qwen2", "tiny_gpt2", "tiny_phi3")
IDS = torch.randint(3, 260, (4, 24), generator=torch.Generator().manual_seed(0))
METHODS = {
    "lora": (["r=4", "placement=all"], "LoraConfig", {"r": 4}),
    "dora": (["r=4", "placement=all"], "LoraConfig", {"r": 4, "use_dora": True}),
    "vera": (["r=8", "placement=all"], "VeraConfig", {"r": 8}),
    "boft": (["placement=all"], "BOFTConfig", {}),
    "hira": (["r=4", "placement=all"], "HiraConfig", {"r": 4}),
    "hyperadapt": (["placement=all"], None, {}),
    "prompt_tuning": (["num_virtual_tokens=8"], "PromptTuningConfig", {"num_virtual_tokens": 8}),
    "p_tuning": (
        ["num_virtual_tokens=8"],
        "PromptEncoderConfig",
        {"num_virtual_tokens": 8, "encoder_hidden_size": 16},
    ),
    "prefix": (["num_virtual_tokens=8"], "PrefixTuningConfig", {"num_virtual_tokens": 8}),
}
LACKING = {("boft", "tiny_gpt2"): "no Conv1D"}


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits[:, -IDS.shape[1] :]


def base(model):
    return load_backbone({"name": model, "dtype": "float32"}, None).model


def shake(parameters):
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=rng))


def exported(model, method, words, folder):
    """Returns max |difference| of a run of ours in PEFT."""
    run = compose_run([f"model={model}", f"method={method}", *words, "task.n_train=8", f"run_dir={folder / 'run'}"])
    backbone, adapters = build_model(run, run.make_task())
    shake(p for _, p in adapters.named_parameters())
    directory = RunDirectory(run)
    directory.open()
    adapters.save(directory.path / "adapter")
    directory.write(status="done", model={"name": model, **vars(backbone.source)})
    theirs = peft.PeftModel.from_pretrained(base(model), export_run(directory.path, folder / "peft"))
    return difference(logits(theirs), logits(backbone.model), model)


def imported(model, config, fields, folder):
    """Returns max |difference| of an adapter of PEFT's here."""
    target = {} if "num_virtual_tokens" in fields else {"target_modules": "all-linear"}
    theirs = peft.get_peft_model(base(model), getattr(peft, config)(task_type="CAUSAL_LM", **fields, **target))
    shake(p for name, p in theirs.named_parameters() if p.requires_grad and "vera_A" not in name)
    theirs.save_pretrained(folder / "theirs", save_embedding_layers=False)
    words = [f"model={model}", "task.n_train=8"]
    _, backbone, _ = load_run(import_adapter(folder / "theirs", folder / "imported", words))
    return difference(logits(backbone.model), logits(theirs), model)


def difference(found, expected, model):
    assert (expected - logits(base(model))).abs().max() > 1e-3  # the adapter does something
    return f"{(found - expected).abs().max():.1e}"


def main():
    warnings.simplefilter("ignore")
    rows = []
    for method, (words, config, fields) in METHODS.items():
        for direction in ("export", "import"):
            cells = []
            for model in MODELS:
                with tempfile.TemporaryDirectory() as folder:
                    if reason := LACKING.get((method, model)):
                        cells.append(reason)
                    elif direction == "export":
                        cells.append(exported(model, method, words, Path(folder)))
                    else:
                        cells.append(imported(model, config, fields, Path(folder)) if config else "-")
            rows.append(f"| {method} | {direction} | {' | '.join(cells)} |")
            print(rows[-1], file=sys.stderr)
    packages = ", ".join(f"{name} {version(name)}" for name in ("peft", "transformers", "torch"))
    head = f"| method | direction | {' | '.join(MODELS)} |\n| --- | --- |{' --- |' * len(MODELS)}\n"
    table = f"{head}{chr(10).join(rows)}\n\n{packages}; logits of size {logits(base(MODELS[0])).abs().max():.2f}\n"
    write_atomic(Path(__file__).parent / "results" / "interop.md", table.encode())
    print(table)


if __name__ == "__main__":
    main()
