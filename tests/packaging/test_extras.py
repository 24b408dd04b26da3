"""The base and each extra, installed by itself from the built wheel, do what they promise; without it, it is asked for.

Minutes each, and they need the package index: HIGHRANK_EXTRAS=1 pytest -n 0 tests/packaging/test_extras.py
An extra's environment is a layer on the base's, so that pip fetches what the extra adds and nothing else.
Not tried: METEOR's numbers (NLTK's data are on no package index), Slurm itself (submitit's local executor stands for it),
a GPU, a Ray cluster of several machines.
"""

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from build_wheel import ROOT

pytestmark = [
    pytest.mark.packaging,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(
        os.environ.get("HIGHRANK_EXTRAS") != "1",
        reason="installs an environment per extra from the package index: HIGHRANK_EXTRAS=1",
    ),
]

TINY = ["model=tiny_llama", "task.n_train=16", "task.n_test=4", "batch_size=4", "max_steps=4", "r=2"]
PERSONA = """1 your persona: i like cats.
2 hello, how are you?\ti am well.
3 what do you do?\ti read.
"""
OWN_TASK = """task: tiny_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_target: label
doc_to_choice: ["four", "seven"]
metric_list: [{{metric: acc}}]
"""
SENTENCEPIECE_MODEL = """
import io, sys
from pathlib import Path
from sentencepiece import SentencePieceTrainer
from transformers import AutoModelForCausalLM, LlamaConfig
sizes = {"vocab_size": 40, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
AutoModelForCausalLM.from_config(LlamaConfig(**sizes)).save_pretrained(sys.argv[1])
raw = io.BytesIO()
lines = iter(["one plus two is three", " ".join("abcdefghijklmnopqrstuvwxyz")])
SentencePieceTrainer.train(sentence_iterator=lines, model_writer=raw, vocab_size=40, model_type="bpe", minloglevel=2)
(Path(sys.argv[1]) / "tokenizer.model").write_bytes(raw.getvalue())
"""
TINY_MODEL = """
import sys
from highrank.model.backbones import load_backbone
tiny = load_backbone({"name": "tiny_llama", "dtype": "float32"}, None)
tiny.model.save_pretrained(sys.argv[1])
tiny.tokenizer.save_pretrained(sys.argv[1])
"""
HPARAMS = """
import sys
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
assert EventAccumulator(sys.argv[1]).Reload().PluginTagToContent("hparams")
"""
SWEEP_ON_SUBMITIT = """
import sys
from highrank.cli import main
from highrank.sweep import launch
launch.LAUNCHERS["slurm"] = lambda jobs: launch.Slurm(jobs, cluster="local")
sys.exit(main(sys.argv[1:]))
"""


class Environment:
    """A fresh environment with the wheel and at most one extra, and an empty home."""

    def __init__(self, folder, wheel, extra=None, base=None):
        self.folder, self.python = folder, folder / "venv" / "bin" / "python"
        subprocess.run([sys.executable, "-m", "venv", str(folder / "venv")], check=True)
        if base is not None:
            (site,) = folder.glob("venv/lib/python*/site-packages")
            (below,) = base.folder.glob("venv/lib/python*/site-packages")
            (site / "base.pth").write_text(f"{below}\n")
        ours = ("PYTHON", "HIGHRANK_", "HF_", "XDG_", "OMP_")
        env = {key: value for key, value in os.environ.items() if not key.startswith(ours)}
        self.env = env | {"HOME": str(folder), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        wanted = f"{wheel}[{extra}]" if extra else str(wheel)
        self.run("-m", "pip", "install", "--quiet", "-c", str(ROOT / "constraints.txt"), wanted)
        self.env["PYTHONPATH"] = str(ROOT / "tests" / "offline")  # from here on without a network

    def run(self, *words, expect=0):
        done = subprocess.run(
            [str(self.python), *map(str, words)],
            cwd=self.folder, env=self.env, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == expect, done.stdout + done.stderr
        return done

    def highrank(self, *words, expect=0):
        command = "import sys; from highrank.cli import main; sys.exit(main())"
        return self.run(
            "-P", "-c", command, *words, expect=expect
        )  # -P: as the installed `highrank`, which sees no cwd

    def results(self, name):
        return json.loads((self.folder / name / "results.json").read_text())


@pytest.fixture(scope="module")
def base(wheel, tmp_path_factory):
    """The base alone, with one finished run in the folder `run`."""
    environment = Environment(tmp_path_factory.mktemp("base"), wheel)
    environment.highrank("run", *TINY, "method=hira", "placement=fc_qkv", "analyze=true", "run_dir=run")
    return environment


@pytest.fixture
def layer(base, wheel, tmp_path):
    return lambda extra: Environment(tmp_path, wheel, extra, base)


def json_of(out):
    """Returns the object that a command prints last."""
    return json.loads("{" + out.split("{", 1)[1])


def swept(folder):
    with (folder / "table.csv").open() as file:
        return [(row["r"], row["status"]) for row in csv.DictReader(file)]


def test_base_holds_no_extra(base):
    code = "import sys; from importlib.util import find_spec; print([n for n in sys.argv[1:] if find_spec(n)])"
    modules = ["peft", "nltk", "lm_eval", "ray", "submitit", "torchao", "bitsandbytes", "wandb", "mlflow", "trl"]
    assert base.run("-c", code, *modules).stdout.strip() == "[]"


def test_base_main_job(base):
    assert base.results("run")["status"] == "done"
    assert (base.folder / "run" / "adapter" / "adapter.safetensors").is_file()


def test_base_merge_eval_analyze(base):
    base.highrank("merge", "run", "--out", "merged", "--force")
    assert (base.folder / "merged" / "model.safetensors").is_file()
    found = json_of(base.highrank("eval", "run").stdout)
    assert found["accuracy"] == base.results("run")["metrics"]["final"]["accuracy"]
    base.highrank("analyze", "run")
    assert list((base.folder / "run" / "analysis").glob("*.png"))


def test_base_export_and_import(base):
    base.highrank("run", *TINY, "method=lora", "run_dir=lora")
    base.highrank("export", "lora", "--format", "peft", "--out", "peft")
    base.highrank("import", "peft", "--out", "imported", *TINY)
    assert (base.folder / "imported" / "adapter" / "adapter.safetensors").is_file()


def test_base_sweep_and_report(base):
    base.highrank("run", "-m", *TINY[:-1], "r=2,4", "method=lora", "sweep_dir=sweep")
    assert swept(base.folder / "sweep") == [("2", "done"), ("4", "done")]
    base.highrank("report", "sweep")
    assert list((base.folder / "sweep").rglob("*.html"))
    for run in json.loads((base.folder / "sweep" / "sweep.json").read_text())["cells"]:
        base.run("-c", HPARAMS, base.folder / "sweep" / run["run"])


def test_base_tensorboard_reads_runs_and_images(base):
    said = base.run("-m", "tensorboard.main", "--inspect", "--logdir", "run").stdout
    assert "train/loss" in said
    assert "images" in said


def test_base_reads_a_tokenizer_model(base):
    base.run("-c", SENTENCEPIECE_MODEL, "pieces")
    base.highrank("run", *TINY, "model=hf:someone/pieces", "path=pieces", "method=lora", "run_dir=on_pieces")
    assert base.results("on_pieces")["status"] == "done"


@pytest.mark.parametrize(
    ("words", "extra"),
    [
        (["run", *TINY, "model.quantize=int8"], "quant"),
        (["run", *TINY, "model.quantize=nf4"], "quant"),
        (["run", *TINY, "model=smollm2_135m", "model.quantize=int8"], "quant"),  # before its weights are looked for
        (["run", "-m", *TINY, "seed=0,1", "launcher=ray"], "ray"),
        (["run", "-m", *TINY, "seed=0,1", "launcher=slurm"], "slurm"),
        (["run", *TINY, "logger=wandb"], "wandb"),
        (["run", *TINY, "logger=mlflow"], "mlflow"),
        (["eval", "run", "--engine", "lm_eval", "--tasks", "x"], "eval"),
    ],
)
def test_without_an_extra_one_line_asks_for_it(base, words, extra):
    said = base.highrank(*words, expect=2).stderr.strip().splitlines()
    assert said[-1].startswith("error: ")
    assert f"highrank[{extra}]" in said[-1]
    assert "Traceback" not in " ".join(said)


def talk(environment):
    """Trains and scores a dialogue; returns the metrics' names and what was said on stderr."""
    data = environment.folder / "data" / "convai2"
    data.mkdir(parents=True)
    for split in ("train", "valid"):
        (data / f"{split}_self_original_no_cands.txt").write_text(PERSONA)
    words = [
        "task=convai2",
        f"task.data={data.parent}",
        "task.allow_partial=true",
        "method=lora",
        "max_steps=1",
        "r=2",
    ]
    said = environment.highrank("run", "model=tiny_llama", *words, "run_dir=talk").stderr
    return environment.results("talk")["metrics"]["final"]["sets"]["convai2"].keys(), said


def test_base_dialogue_scores_all_but_meteor(base):
    found, said = talk(base)
    assert {"bleu", "rouge_l", "token_f1", "distinct_1", "distinct_2"} <= found
    assert "METEOR is not computed (ModuleNotFoundError)" in said


def test_dialogue(layer):
    """With the extra it is NLTK's data alone that METEOR lacks."""
    found, said = talk(layer("dialogue"))
    assert {"bleu", "rouge_l"} <= found
    assert "METEOR is not computed (LookupError)" in said


def test_eval(layer, base):
    environment = layer("eval")
    rows = environment.folder / "rows.jsonl"
    rows.write_text("".join(json.dumps({"question": f"{i} + 2 =", "label": i % 2}) + "\n" for i in range(4)))
    tasks = environment.folder / "tasks"
    tasks.mkdir()
    (tasks / "tiny_choice.yaml").write_text(OWN_TASK.format(file=rows))
    run = base.folder / "run"
    options = ["--engine", "lm_eval", "--tasks", "tiny_choice", "--include", tasks]
    out = environment.highrank("eval", run, *options).stdout
    assert 0 <= json_of(out)["tiny_choice"]["acc,none"] <= 1


def test_quant(layer):
    environment = layer("quant")
    environment.run("-c", SENTENCEPIECE_MODEL, "pieces")
    for kind in ("int8", "int4", "nf4"):
        words = ["model=hf:someone/pieces", "path=pieces", f"model.quantize={kind}", f"run_dir={kind}"]
        environment.highrank("run", *TINY, *words, "method=hira")
        assert environment.results(kind)["status"] == "done"


def test_ray(layer):
    environment = layer("ray")
    environment.highrank("run", "-m", *TINY[:-1], "r=2,4", "method=lora", "launcher=ray", "jobs=2", "sweep_dir=sweep")
    assert swept(environment.folder / "sweep") == [("2", "done"), ("4", "done")]


def test_slurm(layer):
    environment = layer("slurm")
    words = ["run", "-m", *TINY[:-1], "r=2,4", "method=lora", "launcher=slurm", "jobs=2", "sweep_dir=sweep"]
    environment.run("-c", SWEEP_ON_SUBMITIT, *words)
    assert swept(environment.folder / "sweep") == [("2", "done"), ("4", "done")]


@pytest.mark.parametrize(
    ("name", "left"), [("wandb", "wandb/offline-run-*/*.wandb"), ("mlflow", "mlruns/*/*/meta.yaml")]
)
def test_loggers(layer, name, left):
    environment = layer(name)
    environment.env["WANDB_MODE"] = "offline"
    environment.highrank("run", *TINY, "method=lora", f"logger={name}", "run_dir=run")
    assert environment.results("run")["logged"]["to"] == name
    assert list((environment.folder / "run").glob(left))


def test_trl(layer):
    """What the page on the library does with TRL, on a tiny model."""
    environment = layer("trl")
    environment.run("-c", TINY_MODEL, "path/to/model")
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "library.md").read_text(), re.DOTALL)
    environment.run("-c", "\n".join([blocks[0], *(block for block in blocks if "from trl import" in block)]))
    for name in ("sft", "dpo"):
        assert (environment.folder / name / "checkpoint-2").is_dir()


def test_bench(layer):
    shape = ["--hidden=32", "--inter=64", "--heads=2", "--kv-heads=1", "--vocab=64", "--layers=1", "--batch=2"]
    words = [*shape, "--sequence=8", "--device=cpu", "--warmups=0", "--rounds=1", "--methods=lora", "--r=2"]
    script = Path(ROOT) / "experiments" / "benchmarks" / "step_cost.py"
    out = layer("bench").run(script, *words).stdout
    assert "PEFT" in out
    assert "PEFT is not installed" not in out
