"""Runs scored by lm-evaluation-harness on a task of our own: the same numbers as counted longhand."""

import builtins
import json

import pytest
import torch
import torch.nn.functional as F

from highrank.base.errors import UserError
from highrank.cli import main
from highrank.interop.lm_eval import evaluate_runs
from highrank.train.saved import load_run

ROWS = [("2 + 2 =", 0), ("a b c", 1), ("the sum of 3 and 4", 0), ("x", 1), ("how many", 0), ("14 less 9", 1)]
CHOICES = [" four", " seven apples"]
TASK = """\
task: tiny_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_target: label
doc_to_choice: ["four", "seven apples"]
metric_list: [{{metric: acc}}]
"""


@pytest.fixture
def own_task(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "tasks"
    folder.mkdir()
    rows = "".join(json.dumps({"question": q, "label": label}) + "\n" for q, label in ROWS)
    (folder / "rows.jsonl").write_text(rows)
    (folder / "tiny_choice.yaml").write_text(TASK.format(file=folder / "rows.jsonl"))
    return folder


@torch.no_grad()
def accuracy(folder):
    """Longhand: the option whose tokens have the higher total log-probability behind the question."""
    _, backbone, _ = load_run(folder)
    model, correct = backbone.model.eval(), 0
    for question, label in ROWS:
        scores = []
        for choice in CHOICES:
            prompt = backbone.tokenizer(question).input_ids
            target = backbone.tokenizer(choice, add_special_tokens=False).input_ids
            log_probs = F.log_softmax(model(torch.tensor([prompt + target])).logits[0], -1)
            scores.append(sum(float(log_probs[len(prompt) - 1 + i, t]) for i, t in enumerate(target)))
        correct += max(range(2), key=scores.__getitem__) == label
    return correct / len(ROWS)


@pytest.mark.filterwarnings("ignore")  # the harness and its dependencies have their own
def test_the_harness_scores_runs_on_one_base(make_run, own_task, capsys):
    pytest.importorskip("lm_eval")
    words = {"a": ["method=lora", "r=4"], "b": ["method=prompt_tuning"], "c": ["method=hira", "r=4"]}
    runs = [make_run("model=tiny_llama", *own, name=name, scale=0.5)[0] for name, own in words.items()]
    options = ["--engine", "lm_eval", "--tasks", "tiny_choice", "--include", str(own_task)]
    assert main(["eval", *map(str, runs), *options]) == 0
    found = json.loads("{" + capsys.readouterr().out.split("{", 1)[1])
    got = [found[str(run)]["tiny_choice"]["acc,none"] for run in runs]
    assert got == pytest.approx([accuracy(run) for run in runs])
    (limited,) = evaluate_runs(runs[:1], ["tiny_choice"], limit=2, include=own_task).values()
    assert limited["tiny_choice"]["acc,none"] in (0, 0.5, 1)
    with pytest.raises(UserError, match=r"unknown task of the harness, got nowhere"):
        evaluate_runs(runs, ["nowhere"], include=own_task)


def test_without_the_extra_it_is_named(make_run, monkeypatch, capsys):
    run, *_ = make_run("model=tiny_llama", "method=lora")
    plain = builtins.__import__

    def without(name, *args, **kwargs):
        if name.split(".")[0] == "lm_eval":
            raise ModuleNotFoundError("No module named 'lm_eval'")
        return plain(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    assert main(["eval", str(run), "--engine", "lm_eval", "--tasks", "x"]) == 2
    assert "pip install 'highrank[eval]'" in capsys.readouterr().err
