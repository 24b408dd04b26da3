"""From records to metrics: cut-off, validation, leak audit, decoding, ranking, and independence of the batch size."""

import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import lightning
import pytest
import torch

from highrank.answers import RULES
from highrank.backbones import load_backbone, tiny_tokenizer
from highrank.config import RunConfig
from highrank.data import TaskData, hold_out
from highrank.dialogue import dialogue_metrics
from highrank.encoding import encode
from highrank.errors import UserError
from highrank.loss import IGNORED
from highrank.module import FineTuner
from highrank.protocol import Protocol
from highrank.run import predict, quiet
from highrank.scoring import evaluate_rows, metrics
from highrank.task import Example, LabelledText

PLAIN = Protocol(name="plain", version=1, template="{instruction}=", max_length=40)


def example(question, output="out", answer="1", **fields):
    return Example(question, question, output, answer, **fields)


def stub(train, kind="generate", measures=("accuracy",), **fields):
    return SimpleNamespace(
        name="stub", kind=kind, train=lambda: train, metrics=measures, metric=measures[0], max_new_tokens=4, **fields
    )


def data(task, protocol=PLAIN, eval_batch_size=4):
    return TaskData(task, protocol, tiny_tokenizer(task.kind != "generate"), 2, eval_batch_size, seed=0)


def test_long_examples_are_dropped_and_counted():
    found = data(stub([example("q" * 10), example("q" * 50)]))
    assert (len(found.examples), dict(found.cut_off), found.num_skipped) == (1, {"left_out": 1}, 1)


def test_long_examples_are_cut_and_a_lost_answer_is_counted():
    rules = replace(PLAIN, too_long="cut")
    train = [example("q" * 10), example("q" * 36, output="longer"), example("q" * 50)]
    found = data(stub(train), rules)
    assert dict(found.cut_off) == {"cut": 1, "answer_lost": 1, "left_out": 1}  # nothing is left to learn from the last
    assert [len(row.input_ids) for row in found.examples] == [16, 40]
    whole = data(stub(train), replace(rules, mask_prompt=False))
    assert dict(whole.cut_off) == {"cut": 1, "answer_lost": 1, "left_out": 0}


def test_a_limit_of_its_own_for_the_target():
    rules = replace(PLAIN, too_long="cut", max_length=4, max_target_length=2, eos=False)
    row = encode(example("qqqqqq", "abc"), rules, tiny_tokenizer())
    assert len(row.input_ids) == 6
    assert row.labels[:4] == [IGNORED] * 4


def test_an_encoders_text_is_cut_and_counted():
    found = data(stub([LabelledText("a", "x" * 80, 1), LabelledText("b", "x", 0, "y")], kind="classify"))
    assert dict(found.cut_off) == {"cut": 1, "left_out": 0}


def test_a_training_set_that_is_too_long_altogether():
    with pytest.raises(UserError, match="1 examples, all too long for max_length=40"):
        data(stub([example("q" * 50)]))


def test_an_end_of_text_token_must_exist():
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="eos=true needs a tokenizer with an end-of-text token"):
        encode(example("q"), PLAIN, tokenizer)


def test_an_end_of_text_token_that_also_pads_is_trained_on():
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    batch = next(iter(TaskData(stub([example("q"), example("qqqq")]), PLAIN, tokenizer, 2, 2, 0).train_dataloader()))
    ends = (batch["labels"] == tokenizer.eos_token_id).sum(1)
    assert ends.tolist() == [1, 1]


def test_an_input_has_its_own_template():
    rules = replace(PLAIN, template_with_input="{instruction}|{input}=", eval_template="E{instruction}=")
    tokenizer = tiny_tokenizer()
    row = example("q", input="i")
    assert tokenizer.decode(encode(row, rules, tokenizer).input_ids) == "<s>q|i=out</s>"
    assert tokenizer.decode(encode(row, rules, tokenizer, evaluation=True).input_ids) == "<s>Eq\ni=out</s>"


def test_validation_is_held_out_with_all_copies():
    train = [example(f"q{i // 2}") for i in range(20)]  # every question twice
    kept, held = hold_out(train, replace(PLAIN, num_validation=4))
    assert len(held) == 4
    assert not {e.question for e in kept} & {e.question for e in held}
    assert hold_out(train, PLAIN) == (train, [])
    with pytest.raises(UserError, match="num_validation=20 of 20"):
        hold_out(train, replace(PLAIN, num_validation=20))


def test_leaked_questions_are_marked_counted_and_set_apart():
    train = [example("How many  apples?"), example("How many pears?")]
    found = data(stub(train))
    records = [example("how many apples ?"), example("how many plums?"), example("how many figs?")]
    rows, measured = evaluate_rows(found, "set", records, ["The answer is 1", "The answer is 1", "2"])
    assert [row["leaked"] for row in rows] == [True, False, False]
    assert (measured["n"], measured["leaked"], measured["n_clean"]) == (3, 1, 2)
    assert measured["accuracy"] == pytest.approx(200 / 3)
    assert measured["accuracy_clean"] == 50


def test_a_test_file_given_as_training_data_is_warned_about():
    records = [example("a b"), example("c d")]
    with pytest.warns(UserWarning, match="all 2 questions of set occur in the training data"):
        evaluate_rows(data(stub(records)), "set", records, ["1", "1"])


def test_both_rules_and_their_unparsed_shares_are_reported():
    records = [example("a", answer="12"), example("b", answer="3")]
    outputs = ["12 in all. The answer is 12. Then 5", "about 3"]
    rows, measured = evaluate_rows(data(stub([example("t")])), "set", records, outputs)
    assert rows[0]["parsed"] == "12"
    assert (rows[0]["parsed_llm_adapters"], rows[0]["correct_llm_adapters"]) == ("5", False)
    assert (measured["accuracy"], measured["unparsed"]) == (50, 50)
    assert (measured["accuracy_llm_adapters"], measured["unparsed_llm_adapters"]) == (50, 0)
    assert {"id", "prompt", "output", "parsed", "gold", "correct", "leaked"} <= rows[0].keys()
    json.dumps(rows)


def test_an_output_is_cut_at_the_protocols_stop_texts():
    rules = replace(PLAIN, stop=["Q:"], answer_rule="llm_adapters")
    rows, _ = evaluate_rows(data(stub([example("t")]), rules), "set", [example("a")], ["1 Q: and 7"])
    assert (rows[0]["output"], rows[0]["text"], rows[0]["parsed"]) == ("1 Q: and 7", "1 ", "1")


def test_scores_of_labels():
    task = stub([], "classify", ("matthews", "accuracy", "f1"), num_labels=2)
    rows = [{"output": o, "gold": g, "correct": o == g, "leaked": False} for o, g in [(1, 1), (0, 0), (1, 0), (1, 1)]]
    found = metrics(task, rows)
    assert found["matthews"] == pytest.approx(57.735, abs=1e-3)  # (TP TN - FP FN) / sqrt(3 * 2 * 2 * 1) = 2 / sqrt 12
    assert found["f1"] == pytest.approx(80)
    assert metrics(task, [{**row, "output": 1} for row in rows])["matthews"] == 0  # one class only
    values = stub([], "regress", ("pearson", "spearman"))
    rows = [{"output": o, "gold": g, "leaked": False} for o, g in [(0.0, 1.0), (1.0, 2.0), (3.0, 2.5)]]
    assert metrics(values, rows)["spearman"] == pytest.approx(100, abs=1e-3)  # torchmetrics adds an epsilon
    assert metrics(values, [{**row, "output": 1.0} for row in rows])["pearson"] == 0  # constant: undefined


def test_dialogue_metrics_say_what_they_cannot_compute(monkeypatch):
    monkeypatch.setitem(sys.modules, "nltk", None)
    task = stub([], "generate", ("dialogue",), cfg=SimpleNamespace(bert=None))
    rows = [{"output": " i like cats . ", "gold": ["no", "i like cats ."], "leaked": False}]
    with (
        pytest.warns(UserWarning, match="BERTScore is not computed: give a model folder"),
        pytest.warns(UserWarning, match="METEOR is not computed"),
    ):
        found = metrics(task, rows)
    assert (found["bleu"], found["rouge_l"], found["token_f1"]) == pytest.approx((100, 100, 100))
    assert "average" not in found


def test_bertscore_takes_a_local_model_and_the_nearest_reference(tmp_path, monkeypatch):
    backbone = load_backbone({"name": "tiny_bert", "dtype": "float32"}, None, "classify", 2)
    backbone.model.bert.save_pretrained(tmp_path)
    backbone.tokenizer.save_pretrained(tmp_path)
    monkeypatch.setitem(sys.modules, "nltk", None)
    with pytest.warns(UserWarning, match="METEOR"):
        found = dialogue_metrics(["i ski .", "hm"], [["no", "i ski ."], ["i read ."]], str(tmp_path))
    assert 0 < found["bert_f1"] <= 100
    with pytest.warns(UserWarning, match="METEOR"):
        same = dialogue_metrics(["i ski ."], [["no", "i ski ."]], str(tmp_path))
    assert [same[key] for key in ("bert_precision", "bert_recall", "bert_f1")] == pytest.approx([100] * 3, abs=1e-3)


def tuner(task, protocol, tokenizer):
    backbone = load_backbone({"name": "tiny_llama", "dtype": "float32"}, None)
    with torch.no_grad():  # a random model of usual scale answers every question alike
        for parameter in backbone.model.parameters():
            parameter.mul_(6)
    adapters = SimpleNamespace(model=backbone.model)
    return FineTuner(adapters, task, tokenizer, RunConfig(), 1, protocol).eval()


def outputs(protocol, records, batch_size):
    task = stub([example("t")])
    found = data(task, protocol, batch_size)
    with quiet():
        trainer = lightning.Trainer(
            accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False
        )
        return predict(trainer, tuner(task, protocol, found.tokenizer), found, records)


RECORDS = [example("word " * (i % 7) + str(i)) for i in range(33)]


@pytest.mark.parametrize("beams", [1, 4])
def test_the_batch_size_changes_no_prediction(beams):
    rules = replace(PLAIN, max_new_tokens=6, num_beams=beams)
    alone = outputs(rules, RECORDS, 1)
    assert len(set(alone)) > 3
    assert outputs(rules, RECORDS, 8) == alone
    assert outputs(rules, RECORDS, 32) == alone


def test_sampling_is_seeded_and_leaves_the_random_state_alone():
    rules = replace(PLAIN, max_new_tokens=6, do_sample=True, temperature=2.0, top_p=0.9, top_k=40)
    found = data(stub([example("t")]), rules)
    batch = next(iter(found.eval_dataloader(RECORDS)))
    before = torch.get_rng_state()
    tuned = tuner(found.task, rules, found.tokenizer)
    torch.set_rng_state(before)
    tuned.predict_step(batch)
    assert torch.equal(torch.get_rng_state(), before)
    first = outputs(rules, RECORDS[:8], 4)
    assert outputs(rules, RECORDS[:8], 4) == first
    assert outputs(replace(rules, do_sample=False), RECORDS[:8], 4) != first


def test_likelihood_ranking_picks_the_likelier_target_whatever_the_batch_size():
    rules = replace(PLAIN, choose="likelihood", eos=False)
    choices = ("yes", "no", "maybe")
    records = [example(f"q{'u' * i}", answer="no", choices=choices, options=choices) for i in range(5)]
    found = outputs(rules, records, 32)
    module = tuner(stub([]), rules, tiny_tokenizer())
    for record, scores in zip(records, found, strict=True):
        assert sorted(scores) == [0, 1, 2]
        for place, choice in enumerate(choices):
            prompt = tiny_tokenizer()(f"{record.instruction}=").input_ids
            ids = prompt + tiny_tokenizer()(choice, add_special_tokens=False).input_ids
            with torch.no_grad():
                logs = module.model(torch.tensor([ids])).logits[0].log_softmax(-1)
            expected = sum(float(logs[t - 1, ids[t]]) for t in range(len(prompt), len(ids)))
            assert scores[place] == pytest.approx(expected, abs=1e-3)
    one_by_one = outputs(rules, records, 1)
    assert [max(s, key=s.get) for s in one_by_one] == [max(s, key=s.get) for s in found]
    rows, measured = evaluate_rows(data(stub([example("t")]), rules), "set", records, found)
    assert rows[0]["parsed"] == choices[max(found[0], key=found[0].get)]
    assert measured["unparsed"] == 0


def test_every_rule_is_one_that_a_protocol_may_name():
    for rule in RULES:
        assert replace(PLAIN, answer_rule=rule)
    with pytest.raises(UserError, match="answer_rule is one of"):
        replace(PLAIN, answer_rule="lenient")


BAD = [
    ({"template": "x"}, "template needs"),
    ({"template_with_input": "{input}"}, "template_with_input needs"),
    ({"temperature": 0.0}, "temperature must be > 0"),
    ({"top_p": 0.0}, "top_p must be in"),
    ({"num_beams": 0}, "num_beams must be >= 1"),
    ({"too_long": "crop"}, "too_long is drop or cut"),
    ({"selection": "best"}, "num_validation must be >= 1 for selection=best"),
    ({"selection": "first"}, "selection is last or best"),
    ({"choose": "guess"}, "choose is generate or likelihood"),
]


@pytest.mark.parametrize(("fields", "message"), BAD)
def test_bad_protocols(fields, message):
    with pytest.raises(UserError, match=message):
        replace(PLAIN, **fields)


WORDS = [
    "method=lora",
    "r=2",
    "model=tiny_bert",
    "placement=qv",
    "task=glue/rte",
    "eval_before=false",
    "max_steps=3",
    "batch_size=1",
]


def test_the_weights_with_the_lowest_validation_loss_are_evaluated(run_cli, folder, monkeypatch):
    from highrank.selection import KeepBest

    kept = []
    monkeypatch.setattr(KeepBest, "on_fit_end", lambda self, *args: kept.append((self.step, self.loss)))
    words = [f"task.data={folder}", "task.allow_partial=true", "protocol.num_validation=1", "protocol.selection=best"]
    status, _, err = run_cli(*WORDS, *words, "protocol.validate_every=1")
    assert status == 0, err
    assert kept[0][0] in (1, 2, 3)


def test_a_member_is_chosen_with_a_slash_and_missing_data_stops_before_weights(run_cli, tmp_path):
    status, _, err = run_cli(*WORDS, f"task.data={tmp_path}")
    assert status == 2
    assert "RTE/train.tsv (or .gz) is needed" in err
    status, _, err = run_cli(*WORDS[:-4], "task=glue/rtee", f"task.data={tmp_path}")
    assert status == 2
    assert "unknown member, got member=rtee" in err
