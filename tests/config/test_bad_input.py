"""Bad input: one clear error, exit status 2, before any weight loads, and nothing written."""

import json
import os
import subprocess
import sys

import pytest

from highrank.cli import main
from highrank.train import build

pytestmark = pytest.mark.integration

BAD = [
    ("method=hria", "method: unknown name, got method=hria; did you mean 'hira'"),
    ("r=0", "hira: r must be >= 1, got r=0"),
    ("r=abc", "hira: r must be of type int, got r=abc"),
    ("r=1.5", "hira: r must be of type int, got r=1.5"),
    ("method=hyperadapt r=16", "hyperadapt has no field 'r'; it has: sides, init_std"),
    ("method=lora R=w0", "lora has no field 'R'; it has: r, alpha, dropout, scaling, init, lr_ratio"),
    ("method=sum", "sum: parts must be given, got none"),
    ("method=sum parts=[hria]", "sum: a part is a method, got parts=hria; did you mean 'hira'"),
    ("method=sum parts=[hira] parts.hira.rr=8", "hira has no field 'rr'; it has: r, R,"),
    (
        "method=sum parts=[hira,lora] parts.dora.r=8",
        "parts: a field belongs to what is in the list, got parts.dora with parts=[hira,lora]",
    ),
    ("method=sum parts.hira.r=x", "hira: r must be of type int, got r=x"),
    ("method=sum parts.hira.r=0", "hira: r must be >= 1, got r=0"),
    ("method=lora parts.hira.r=8", "lora has no field 'parts.hira.r'"),
    ("method=hira r.x=3", "hira: r must be of type int, got r={'x': 3}"),
    ("task.n_train=[1,2] task.n_train.x=3", "config: invalid literal for int"),
    ("placement=qvk", "placement: unknown set or part, got placement=qvk; did you mean 'qv' or 'qk' or 'qkv'"),
    ("placement=[q,gates]", "got placement=gates; did you mean 'gate'"),
    ("placement=[]", "at least one part is needed"),
    ("model=tiny_gpt2 placement=gate", "gpt2 has no part gate, got placement=gate; it has: q, k, v, o, up, down"),
    ("model=tiny_llama layers=5-9", "the model has layers 0-1, got layers=5-9"),
    ("model=tiny_llama architecture={blocks:nowhere,q:q_proj} placement=q", "must match at least one weight"),
    ("model=tiny_phi3 fused=fused", "fused=fused adapts a fused matrix whole, got a placement without gate"),
    ("fused=maybe", "fused is auto, fused or split, got fused=maybe"),
    ("method=boft block_size=7 model=tiny_llama", "block_size must divide in_features, got block_size=7"),
    (
        "method=boft butterfly_factor=4 model=tiny_llama",
        "butterfly_factor must be such that 4 * 2^(butterfly_factor - 1) divides in_features, got butterfly_factor=4 for a weight of shape (8, 16); at most butterfly_factor=3",
    ),
    ("R=w0_trunc", "R=w0_trunc needs a rank, got R_rank=None; add R_rank=128"),
    ("R=w0_trunc R_rank=99 model=tiny_llama", "R_rank must be <= min(out, in)"),
    ("R=w1", "hira: R must be one of"),
    ("placment=qkv", "did you mean 'placement'"),
    ("learning_rate=1", "no core key is called 'learning_rate'"),
    ("task.n_trian=5", "wordmath has no field 'n_trian'; it has:"),
    ("model.dtpye=float32", "model: unknown key, got model.dtpye; did you mean 'dtype'"),
    ("model.dtype=int8", "dtype is one of auto, float32, bfloat16, float16, got model.dtype=int8"),
    ("model=llama3_8", "model: unknown name, got model=llama3_8; did you mean 'llama3_8b'"),
    ("task=wordmth", "task: unknown name, got task=wordmth; did you mean 'wordmath'"),
    ("protocol=cleen", "protocol: unknown name, got protocol=cleen; did you mean 'clean'"),
    ("lr=-1", "run: lr must be a positive number, got lr=-1"),
    ("head_lr=0", "run: head_lr must be a positive number, got head_lr=0"),
    (
        "head_lr=1e-2 model=tiny_llama",
        "head_lr is the rate of a new head, which this model does not get, got head_lr=0.01",
    ),
    ("lr=fast", "config: Value 'fast' of type 'str' could not be converted to Float, got lr=fast"),
    ("schedule=step", "schedule is one of constant, linear, cosine, got schedule=step"),
    ("optimizer=lion", "optimizer is one of adamw, adam, sgd, got optimizer=lion"),
    ("batch_size=0", "batch_size must be >= 1, got batch_size=0"),
    ("max_steps=0", "max_steps must be >= 1"),
    ("epochs=0", "epochs must be > 0"),
    ("warmup_ratio=2", "warmup_ratio must be in [0, 1]"),
    ("path=/does/not/exist", "path must be an existing folder, got path=/does/not/exist"),
    ("model=tiny_bert", "a text-generating task needs a causal language model, got bert"),
    ("task.n_train=0", "n_train must be >= 1, got n_train=0"),
    ("trainer.acelerator=cpu", "trainer: unknown key, got trainer.acelerator; did you mean 'accelerator'"),
    ("trainer.max_steps=3", "trainer: max_steps is set by the run, got trainer.max_steps=3; use max_steps"),
    ("trainer.log_every_n_steps=5", "log_every_n_steps is set by the run, got trainer.log_every_n_steps=5; every step"),
    ("+trainer.fast_dev_run=true", "fast_dev_run is set by the run, got trainer.fast_dev_run=True; use max_steps=1"),
    ("trainer.val_check_interval=2", "val_check_interval=2; use protocol.validate_every"),
    ("trainer.precision=bf16-true", "got trainer.precision=bf16-true; use model.dtype"),
    ("trainer.precision=64-true", "got trainer.precision=64-true; use model.dtype"),
    ("trainer.precision=8", "precision is one of 32-true, 32, 16-mixed, bf16-mixed, got trainer.precision=8"),
    ("hira", "give key=value, got hira"),
    ("~r=4", "command line: a key cannot be taken away, got ~r=4; give it a value"),
    ("hydra.x=y", "command line: Hydra only composes the config, so its own keys change nothing, got hydra.x=y"),
    ("hydra/launcher=basic", "command line: Hydra only composes the config"),
    ("method=null", "method: unknown name, got method=null"),
    ("+method=null", "method: unknown name, got method=null"),
    ("task=null", "task: unknown name, got task=null"),
    ("model=null", "model: unknown name, got model=null"),
    ("protocol=null", "protocol: unknown name, got protocol=null"),
    ("trainer=null", "trainer: unknown name, got trainer=null"),
    ("method.name=null", "method: a name is a text, got method.name=None"),
    ("epochs=inf", "epochs must be > 0 and finite, got epochs=inf"),
    ("epochs=nan", "epochs must be > 0 and finite, got epochs=nan"),
    ("weight_decay=inf", "weight_decay must be a finite number >= 0, got weight_decay=inf"),
    ("seed=4294967296", "seed must be in [0, 4294967295], got seed=4294967296"),
    ("method=lora alpha=nan", "lora: alpha must be a finite number, got alpha=nan"),
    (
        "method=lora_xs r=5000 model=llama3_8b dry_run=true",
        "got r=5000 for a weight of shape (1024, 4096); at most r=1024",
    ),
    ("method=abba s=1e308", "abba: s must be a number that fp32 holds, got s=1e+308"),
    ("method=lora init=pissa alpha=1e-320", "lora: alpha must be a number that fp32 holds, got alpha="),
    ("method=shira mask_seed=100000000000000000000", "shira: mask_seed must be a number of 64 bits, got mask_seed=1"),
    ("method=vera projection_prng_key=-9999999999999999999", "vera: projection_prng_key must be a number of 64 bits"),
    ("method=sum parts.lora.r=99999999999999999999", "lora: r must be a number of 64 bits, got r=9"),
    ("task.data_seed=99999999999999999999", "data_seed must be a number of 64 bits"),
    ("seed=99999999999999999999", "seed must be in [0, 4294967295], got seed=9"),
    ("method=lora dropout=inf", "lora: dropout must be a finite number, got dropout=inf"),
    ("protocol.temperature=nan", "protocol: temperature must be a finite number, got temperature=nan"),
    ("protocol.families=3", "families is a mapping of a family to its keys, got families=3"),
    ("model.wheel=3", "model: wheel must be a mapping with package, version, sha256 and gguf or folder, or null, got"),
    ("model.attention=foo", "model: attention is one of eager, sdpa, flash_attention_2, or null, got model.attention"),
    ("model.dtype=[a]", "dtype is one of auto, float32, bfloat16, float16, got model.dtype=['a']"),
    ("model.shape={model_type:foo}", "shape must be a config that transformers knows, got model.shape="),
    ("model.name=tiny_foo", "model: unknown tiny model, got model.name=tiny_foo; it is one of: tiny_llama, "),
    ("model=tiny_llama model.name=foo", "model: its config.json is needed, got model=foo"),
    ("model=hf:no/such", "model: its config.json is needed, got model=hf:no/such and no answer from"),
    ("placement=5", "placement: give a set such as fc_qkv, or a list such as [q,down], got placement=5"),
    ("placement=null", "or a list such as [q,down], got placement=None"),
    ("placement=[[q]]", "placement: unknown set or part, got placement=['q']"),
    ("layers=[a]", "layers: give all, an index, a range like 4-11 or a list of indices, got layers=['a']"),
    ("layers=1.5", "got layers=1.5"),
    ("layers=null", "got layers=None"),
    ("architecture=foo", "architecture: a map of parts to paths is needed, got architecture=foo"),
    ("architecture={blocks:x,q:5}", "architecture: a path is a text, got q=5"),
    (
        "model=tiny_llama architecture={blocks:layers,q:input_layernorm} placement=q",
        "an adapted module is a linear layer (Linear, Conv1D or a quantised one), got model.layers.0.input_layernorm=",
    ),
    ("r={", "config:"),
    *(
        (
            f"task={task} model={model} protocol=hira",
            f"protocol hira: it has no prompt for tasks of the family {family}, got protocol=hira; these have one: clean, "
            "hyperadapt, llm_adapters, peft_metamath; or give protocol.template=",
        )
        for task, model, family in (("images", "tiny_vit", "images"), ("ruler", "tiny_llama", "long_context"))
    ),
]


@pytest.mark.parametrize(("words", "message"), BAD)
def test_bad_input(run_cli, tmp_path, monkeypatch, words, message):
    def no_weights(*args, **kwargs):
        raise AssertionError("weights were asked for")

    monkeypatch.setattr(build, "load_backbone", no_weights)
    status, out, err = run_cli(*words.split())
    assert status == 2
    assert message in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1  # one line
    assert "Traceback" not in out + err
    assert not (tmp_path / "outputs").exists()


def test_the_trainers_arguments_are_lightnings():
    """They are listed by name so that a dry run need not import Lightning."""
    import inspect

    import lightning

    from highrank.config.trainer_keys import OWN_TRAINER_KEYS, TRAINER_KEYS

    names = set(inspect.signature(lightning.Trainer.__init__).parameters) - {"self"}
    assert set(TRAINER_KEYS) | set(OWN_TRAINER_KEYS) == names


@pytest.mark.parametrize("words", [["experiment=null"], ["+experiment=null"], ["+method=lora"], ["seed=4294967295"]])
def test_words_that_are_fine(words):
    from highrank.config.words import compose_run

    compose_run(["model=tiny_llama", *words])


def test_one_run_has_one_hash():
    """However its placement or precision is spelled."""
    from highrank.config.words import compose_run

    def run(*words):
        return compose_run(["model=tiny_llama", *words])

    assert run("placement=[v,q]").hash == run("placement=qv").hash
    assert run("placement=[q]").name == run("placement=q").name
    assert run("placement=[down,o]").hash == run("placement=[o,down]").hash
    assert run("placement=[down,o]").core.placement == ["o", "down"]
    assert run("placement=[q,k,v,o,gate,up,down]").hash != run("placement=all").hash
    assert run("trainer.precision=32").hash == run().hash
    assert run().hash == run("head_lr=null").hash != run("head_lr=3e-2").hash


def test_unknown_command(capsys):
    from highrank.cli import COMMANDS, main

    assert main(["reprot"]) == 2
    assert "unknown command, got reprot; did you mean 'report' or 'export'?" in capsys.readouterr().err
    assert main(["x"]) == 2
    assert f"unknown command, got x; it is one of: {', '.join(sorted(COMMANDS))}" in capsys.readouterr().err


def test_a_model_without_a_source_lists_what_was_tried(run_cli, tmp_path, monkeypatch):
    monkeypatch.setenv("HIGHRANK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    status, _, err = run_cli("model=llama3_8b", "max_steps=1")
    assert status == 2
    assert "Hugging Face cache (no " in err
    assert "Hub meta-llama/Meta-Llama-3-8B (HF_HUB_OFFLINE is set)" in err
    assert "path=<folder>" in err
    assert not (tmp_path / "outputs").exists()


def test_an_existing_run_directory_of_another_config(run_cli, tmp_path):
    folder = tmp_path / "mine"
    words = ["model=tiny_llama", "max_steps=1", "task.n_train=4", "task.n_test=2", f"run_dir={folder}"]
    assert run_cli(*words, "r=2")[0] == 0
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    status, _, err = run_cli(*words, "r=3")
    assert status == 2
    assert f"an existing run directory keeps its config, got run_dir={folder}" in err
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before
    status, out, _ = run_cli(*words, "r=2")  # the same config is finished: nothing runs again
    assert status == 0
    assert "nothing was run again" in out
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before
    assert json.loads((folder / "results.json").read_text())["status"] == "done"


def test_an_adapter_whose_training_was_interrupted_is_not_used(run_cli, tmp_path, capsys):
    folder = tmp_path / "run"
    words = ["model=tiny_llama", "max_steps=2", "batch_size=2", "task.n_train=8", "task.n_test=2", f"run_dir={folder}"]
    assert run_cli(*words)[0] == 0
    results = json.loads((folder / "results.json").read_text())
    (folder / "results.json").write_text(json.dumps({**results, "status": "interrupted", "steps": 1}))
    for command in (["merge", str(folder), "--out", str(tmp_path / "out")], ["eval", str(folder)]):
        assert main(command) == 2
        assert (
            "an adapter is used when its training is over, got status=interrupted at step 1 of 2"
            in capsys.readouterr().err
        )


def test_another_config_in_a_run_directory_is_refused_with_the_difference(run_cli, tmp_path):
    folder = tmp_path / "run"
    words = ["model=tiny_llama", "max_steps=1", "batch_size=2", "task.n_train=8", "task.n_test=2", f"run_dir={folder}"]
    assert run_cli(*words)[0] == 0
    status, _, err = run_cli(*words, "lr=0.25", "r=3")
    assert status == 2
    assert "lr=0.005 instead of 0.25" in err
    assert "method.r=" in err
    assert "batch_size" not in err


def test_a_reader_that_goes_away_is_no_error():
    """As in `highrank help | head`."""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-c", "import sys; from highrank.cli import main; sys.exit(main(['help']))"],
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")
