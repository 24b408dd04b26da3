"""The test loss: nats per token of the gold answers, token by token, before and after training and in `highrank eval`."""

import json
import math
import shutil
from dataclasses import replace
from types import SimpleNamespace

import lightning
import pytest
import torch

from highrank.cli import main
from highrank.config.run_config import RunConfig
from highrank.config.words import compose_run
from highrank.data.batches import EvalData, TrainingData
from highrank.data.protocol import Protocol
from highrank.data.scoring import evaluate_rows, gold_loss
from highrank.data.task import Example
from highrank.model.backbones import load_backbone
from highrank.model.tiny import tiny_tokenizer
from highrank.train import evaluation, module
from highrank.train.build import build_model
from highrank.train.devices import quiet
from highrank.train.evaluation import gold_losses
from highrank.train.module import FineTuner

PLAIN = Protocol(name="plain", version=1, template="{instruction}=", eval_template="Now {instruction}:", max_length=40)
RECORDS = [
    Example(str(i), "word " * (i % 4) + str(i), "is " * (i % 3) + str(7 * i), str(7 * i), references=("x", "y"))
    for i in range(9)
]
WORDS = ["model=tiny_llama", "method=lora", "r=2", "batch_size=4", "max_steps=4", "lr=0.05"]


def stub(records=RECORDS):
    return SimpleNamespace(
        name="stub",
        kind="generate",
        train=lambda: records,
        metrics=("accuracy",),
        metric="accuracy",
        max_new_tokens=4,
    )


def tuner(task, protocol, model="tiny_llama"):
    backbone = load_backbone({"name": model, "dtype": "float32"}, None)
    with torch.no_grad():  # a random model of usual scale finds every token as likely
        for parameter in backbone.model.parameters():
            parameter.mul_(6)
    adapters = SimpleNamespace(model=backbone.model, num_positions=0)
    return FineTuner(adapters, task, tiny_tokenizer(), RunConfig(), 1, protocol).eval()


def make_trainer():
    return lightning.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)


def losses(protocol, records=RECORDS, batch_size=4, tuned=None, outputs=None):
    task = stub(records)
    data = EvalData(task, protocol, tiny_tokenizer(), records)
    with quiet():
        return gold_losses(
            make_trainer(),
            tuned or tuner(task, protocol),
            data,
            "set",
            records,
            outputs or [""] * len(records),
            batch_size,
        )


def longhand(model, prompt, answer):
    """The nats of an answer's tokens, one after the other, each from all tokens before it."""
    total = 0.0
    for i, token in enumerate(answer):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + answer[:i]])).logits[0, -1].double()
        total += float(logits.logsumexp(0) - logits[token])
    return total


def tokens(record, eos=True):
    tokenizer = tiny_tokenizer()
    answer = tokenizer(record.output, add_special_tokens=False).input_ids
    return tokenizer(f"{record.instruction}=").input_ids, answer + [tokenizer.eos_token_id] * eos


@pytest.mark.parametrize("model", ["tiny_llama", "tiny_gpt2"])
@pytest.mark.parametrize("batch_size", [1, 4, 9])
def test_the_loss_is_that_of_the_gold_answer_token_by_token(model, batch_size):
    tuned = tuner(stub(), PLAIN, model)
    found = losses(PLAIN, batch_size=batch_size, tuned=tuned)
    for record, loss in zip(RECORDS, found, strict=True):
        prompt, answer = tokens(record)
        assert loss == {
            "nats": pytest.approx(longhand(tuned.model, prompt, answer), rel=1e-5),
            "target_tokens": len(answer),
        }
    assert len({round(loss["nats"] / loss["target_tokens"], 3) for loss in found}) > 5


def test_prompts_that_are_trained_on_are_no_part_of_the_answer():
    assert losses(replace(PLAIN, mask_prompt=False)) == losses(PLAIN)


@pytest.mark.parametrize("method", ["lora", "prompt_tuning", "prefix"])
def test_its_mean_over_tokens_is_the_training_loss(method):
    words = ["model=tiny_llama", f"method={method}", "task.n_train=8"]
    run = compose_run(words)
    task = run.make_task()
    backbone, adapters = build_model(run, task)
    records = task.train()
    tuned = FineTuner(adapters, task, backbone.tokenizer, run.core, 1, run.protocol)
    data = TrainingData(task, run.protocol, backbone.tokenizer, 8, 8, seed=0)
    with torch.no_grad():
        expected, n = tuned.eval().loss(next(iter(data.train_dataloader())))
    with quiet():
        found = gold_losses(
            make_trainer(),
            tuned,
            EvalData(task, run.protocol, backbone.tokenizer, records),
            "set",
            records,
            [""] * len(records),
            3,
        )
    assert sum(loss["target_tokens"] for loss in found) == n
    assert sum(loss["nats"] for loss in found) / n == pytest.approx(float(expected), rel=1e-5)


def measured(found):
    data = EvalData(stub(), PLAIN, tiny_tokenizer(), ())
    return evaluate_rows(data, "set", RECORDS[: len(found)], ["1"] * len(found), found)


def test_the_set_has_the_mean_over_all_tokens():
    rows, metrics = measured([gold_loss(2.0, 4, cut=False), gold_loss(1.0, 1, cut=False)])
    assert [(row["nats"], row["target_tokens"]) for row in rows] == [(2.0, 4), (1.0, 1)]
    assert metrics["loss"] == 3 / 5
    assert metrics["perplexity"] == math.exp(3 / 5)
    assert not {"loss_left_out", "loss_cut", "loss_not_finite"} & metrics.keys()


@pytest.mark.parametrize(("too_long", "counted"), [("drop", "loss_left_out"), ("cut", "loss_cut")])
def test_an_answer_that_does_not_fit_is_counted(too_long, counted):
    prompt, answer = tokens(RECORDS[0])
    records = [RECORDS[0], replace(RECORDS[0], id="long", output=RECORDS[0].output + "!?")]
    rules = replace(PLAIN, max_length=len(prompt) + len(answer), too_long=too_long)
    tuned = tuner(stub(), rules)
    short, long = losses(rules, records, tuned=tuned)
    assert short["nats"] == pytest.approx(longhand(tuned.model, prompt, answer), rel=1e-5)
    if too_long == "drop":
        assert long == {"nats": None, "target_tokens": 0}
    else:
        kept = tokens(records[1])[1][: len(answer)]
        assert long == {
            "nats": pytest.approx(longhand(tuned.model, prompt, kept), rel=1e-5),
            "target_tokens": len(answer),
            "target_cut": True,
        }
    _, metrics = measured([short, long])
    assert metrics[counted] == 1
    left = [loss for loss in (short, long) if loss["target_tokens"]]
    assert metrics["loss"] == sum(loss["nats"] for loss in left) / sum(loss["target_tokens"] for loss in left)


def test_where_nothing_fits_there_is_no_loss():
    found = losses(replace(PLAIN, max_length=1))
    _, metrics = measured(found)
    assert metrics["loss_left_out"] == len(RECORDS)
    assert not {"loss", "perplexity"} & metrics.keys()


def test_a_loss_that_is_no_number_is_counted_and_never_averaged_away():
    rows, metrics = measured([gold_loss(float("nan"), 4, cut=False), gold_loss(1.0, 1, cut=False)])
    assert rows[0]["nats"] is None
    assert metrics["loss_not_finite"] == 1
    assert not {"loss", "perplexity"} & metrics.keys()


def test_what_likelihood_ranking_has_computed_is_not_computed_again(monkeypatch):
    rules = replace(PLAIN, choose="likelihood", eval_template=None, eos=False)
    choices = ("yes", "no")
    asked = [Example(str(i), f"q{'u' * i}", "no", "no", choices=choices, options=choices) for i in range(3)]
    reasoned = replace(asked[0], id="reasoned", output="so no")  # what is learned is not among the options
    records = [*asked, reasoned]
    tuned = tuner(stub(), rules)
    with quiet():
        data = EvalData(stub(), rules, tiny_tokenizer(), ())
        outputs, _ = evaluation.predict(make_trainer(), tuned, data, "set", records, 4)
    real, computed = module.example_losses, []

    def counting(model, ids, *more):
        computed.append(len(ids))
        return real(model, ids, *more)

    monkeypatch.setattr(module, "example_losses", counting)
    found = losses(rules, records, tuned=tuned, outputs=outputs)
    assert computed == [1]
    for record, loss in zip(records, found, strict=True):
        prompt, answer = tokens(record, eos=False)
        assert loss["target_tokens"] == len(answer)
        assert loss["nats"] == pytest.approx(longhand(tuned.model, prompt, answer), rel=1e-4)
    computed.clear()
    losses(replace(rules, eval_template="Now {instruction}:"), records, tuned=tuned, outputs=outputs)
    assert computed == [4]  # what is ranked stands after another prompt than what is learned


def test_of_a_conversation_it_is_the_last_turn():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}"
        "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
    )
    turns = (("user", "2 + 2?"), ("assistant", "4"), ("user", "And 3 + 3?"))
    record = Example("talk", "2 + 2?", "It is 6", "6", messages=turns)
    row = EvalData(stub([record]), replace(PLAIN, max_length=400), tokenizer, ()).gold(record)
    answer = [token for token, label in zip(row.input_ids, row.labels, strict=True) if label == token]
    assert tokenizer.decode(answer) == "It is 6</s>"


def read(folder, name="results.json"):
    return json.loads((folder / name).read_text())


def rows_of(folder, name):
    return [json.loads(line) for line in (folder / "predictions" / f"{name}.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "run"
    assert main(["run", *WORDS, "task.n_train=16", "task.n_test=5", f"run_dir={folder}"]) == 0
    return folder


def test_a_run_has_it_before_and_after_training_and_eval_has_it_again(finished, capsys):
    found = read(finished)["metrics"]
    for when, name in (("before", "wordmath.before"), ("final", "wordmath")):
        rows, metrics = rows_of(finished, name), found[when]["sets"]["wordmath"]
        loss = sum(row["nats"] for row in rows) / sum(row["target_tokens"] for row in rows)
        assert metrics["loss"] == found[when]["loss"] == pytest.approx(loss)
        assert metrics["perplexity"] == pytest.approx(math.exp(loss))
    assert found["final"]["loss"] < found["before"]["loss"]
    assert list(found["final"])[:2] == ["sets", "accuracy"]  # the headline comes first
    capsys.readouterr()
    assert main(["eval", str(finished)]) == 0
    assert json.loads(capsys.readouterr().out) == found["final"]


def test_it_is_shown_in_nats(finished, capsys):
    assert main(["run", *WORDS, "task.n_train=16", "task.n_test=5", f"run_dir={finished}"]) == 0
    said = " ".join(capsys.readouterr().out.replace("│", "").split())
    assert f"loss {read(finished)['metrics']['final']['loss']:.4f}" in said
    assert "perplexity" not in said


def test_a_run_begun_before_there_was_a_test_loss_goes_on_with_what_it_has(finished, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "run")
    results = read(folder)
    before = {"sets": {"wordmath": {"n": 5, "accuracy": 0.0, "leaked": 0}}, "accuracy": 0.0}
    results |= {"status": "interrupted", "metrics": {"before": before}}
    (folder / "results.json").write_text(json.dumps(results))
    assert main(["run", *WORDS, "task.n_train=16", "task.n_test=5", f"run_dir={folder}"]) == 0
    found = read(folder)["metrics"]
    assert found["before"] == before
    assert found["final"] == read(finished)["metrics"]["final"]
