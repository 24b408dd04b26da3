"""From records to metrics: cut-off, validation, leak audit, decoding, ranking, and independence of the batch size."""

import hashlib
import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import lightning
import pytest
import torch
from highrank.tasks.convai2 import ConvAI2, dialogue_metrics
from tokenizers.processors import ByteLevel

from highrank.base.errors import UserError
from highrank.config.run_config import RunConfig
from highrank.data.answers import RULES
from highrank.data.batches import EvalData, TrainingData, hold_out
from highrank.data.encoding import IGNORED, encode, encode_prompt
from highrank.data.protocol import Protocol
from highrank.data.scoring import evaluate_rows, metrics
from highrank.data.task import Example, LabelledText
from highrank.model.backbones import load_backbone
from highrank.model.tiny import tiny_tokenizer
from highrank.train.devices import quiet
from highrank.train.evaluation import predict
from highrank.train.module import FineTuner
from highrank.train.objectives import OBJECTIVES

PLAIN = Protocol(name="plain", version=1, template="{instruction}=", max_length=40)


def example(question, output="out", answer="1", **fields):
    return Example(question, question, output, answer, **fields)


def stub(train, kind="generate", measures=("accuracy",), **fields):
    return SimpleNamespace(
        name="stub", kind=kind, train=lambda: train, metrics=measures, metric=measures[0], max_new_tokens=4, **fields
    )


def data(task, protocol=PLAIN, eval_batch_size=4):
    return TrainingData(task, protocol, tiny_tokenizer(task.kind != "generate"), 2, eval_batch_size, seed=0)


def eval_data(task, protocol=PLAIN):
    trained_on, _ = hold_out(task.train(), protocol)
    return EvalData(task, protocol, tiny_tokenizer(task.kind != "generate"), trained_on)


def test_long_examples_are_dropped_and_counted():
    found = data(stub([example("q" * 10), example("q" * 50)]))
    assert (len(found.examples), dict(found.cut_off), found.num_skipped) == (1, {"left_out": 1}, 1)


def rows_with_long_ones(lengths):
    """Returns six rows as jsonl has them, of which those that a protocol with num_validation=4 holds out have these lengths."""
    held = [int(r.id) for r in hold_out([example(str(i)) for i in range(6)], replace(PLAIN, num_validation=4))[1]]
    own = dict(zip(held, lengths, strict=True))
    return [{"instruction": f"{i}", "output": "o" * own.get(i, 1)} for i in range(6)]


def test_held_out_rows_that_are_all_too_long_are_found_before_training():
    rules = replace(PLAIN, num_validation=4)
    some = data(
        stub([example(row["instruction"], row["output"]) for row in rows_with_long_ones([1, 60, 60, 60])]), rules
    )
    assert (len(some.validation), len(some.held_out), len(some.val_dataloader().dataset)) == (4, 1, 1)
    none = [example(row["instruction"], row["output"]) for row in rows_with_long_ones([60] * 4)]
    with pytest.raises(
        UserError, match=r"the held-out examples must hold one within the protocol's cut-off, got 4, all too"
    ):
        data(stub(none), rules)


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
    assert row.cut == "marker_lost"  # "=" is gone, and the model learns to answer all the same
    assert encode(example("q", "abc"), rules, tiny_tokenizer()).cut == "cut"


def test_an_encoders_text_is_cut_and_counted():
    found = data(stub([LabelledText("a", "x" * 80, 1), LabelledText("b", "x", 0, "y")], kind="classify"))
    assert dict(found.cut_off) == {"cut": 1, "left_out": 0}


def test_an_encoders_text_is_cut_to_what_its_model_takes():
    tokenizer = tiny_tokenizer(encoder=True)
    tokenizer.model_max_length = 10
    row = encode(LabelledText("a", "x" * 20, 1), PLAIN, tokenizer)
    assert (len(row.input_ids), row.cut) == (10, "cut")
    assert encode(LabelledText("a", "x" * 8, 1), PLAIN, tokenizer).cut == ""


def test_cut_texts_are_counted_in_evaluation_too():
    found = eval_data(stub([LabelledText("a", "y", 1)], kind="classify"))
    records = [LabelledText("b", "x" * 80, 1), LabelledText("c", "x", 1)]
    rows, measured = evaluate_rows(found, "set", records, [1, 0])
    assert [row["cut"] for row in rows] == [True, False]
    assert (measured["cut"], measured["n"]) == (1, 2)


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
    batch = next(
        iter(TrainingData(stub([example("q"), example("qqqq")]), PLAIN, tokenizer, 2, 2, 0).train_dataloader())
    )
    ends = (batch["labels"] == tokenizer.eos_token_id).sum(1)
    assert ends.tolist() == [1, 1]


CHAT = "{% for message in messages %}<|im_start|>{{ message.content }}{% endfor %}"


@pytest.mark.parametrize("joint", [False, True])
def test_a_tokenizer_made_for_chats_alone_gets_the_protocols_text(joint):
    """No opening token, a chat template: the prompt is the protocol's, and its end is the tokenizer's end of a turn."""
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = ByteLevel()
    tokenizer.bos_token, tokenizer.chat_template = None, CHAT
    row = encode(example("q"), replace(PLAIN, joint=joint), tokenizer)
    assert tokenizer.decode(row.input_ids) == "q=out</s>"


@pytest.mark.parametrize("joint", [False, True])
def test_a_tokenizer_that_ends_every_text_does_not_end_the_prompt(joint):
    rules, closing = replace(PLAIN, joint=joint), tiny_tokenizer(encoder=True)
    assert closing("q").input_ids[-1] == closing.eos_token_id
    for protocol in (rules, replace(rules, eos=False)):
        assert encode(example("q"), protocol, closing) == encode(example("q"), protocol, tiny_tokenizer())
    assert encode_prompt(example("q"), rules, closing) == encode_prompt(example("q"), rules, tiny_tokenizer())
    said = example("q</s>")  # unless it is in the text
    assert encode_prompt(said, replace(rules, template="{instruction}"), closing)[-1] == closing.eos_token_id


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
    found = eval_data(stub(train))
    records = [example("how many apples ?"), example("how many plums?"), example("how many figs?")]
    rows, measured = evaluate_rows(found, "set", records, ["The answer is 1", "The answer is 1", "2"])
    assert [row["leaked"] for row in rows] == [True, False, False]
    assert (measured["n"], measured["leaked"], measured["n_clean"]) == (3, 1, 2)
    assert measured["accuracy"] == pytest.approx(200 / 3)
    assert measured["accuracy_clean"] == 50


def test_a_test_file_given_as_training_data_is_warned_about():
    records = [example("a b"), example("c d")]
    with pytest.warns(UserWarning, match="all 2 questions of set occur in the training data"):
        evaluate_rows(eval_data(stub(records)), "set", records, ["1", "1"])


def test_both_rules_and_their_unparsed_shares_are_reported():
    records = [example("a", answer="12"), example("b", answer="3")]
    outputs = ["12 in all. The answer is 12. Then 5", "about 3"]
    rows, measured = evaluate_rows(eval_data(stub([example("t")])), "set", records, outputs)
    assert rows[0]["parsed"] == "12"
    assert (rows[0]["parsed_llm_adapters"], rows[0]["correct_llm_adapters"]) == ("5", False)
    assert (measured["accuracy"], measured["unparsed"]) == (50, 50)
    assert (measured["accuracy_llm_adapters"], measured["unparsed_llm_adapters"]) == (50, 0)
    assert {"id", "prompt", "output", "parsed", "gold", "correct", "leaked"} <= rows[0].keys()
    json.dumps(rows)


def test_hiras_second_number_stands_beside_its_first():
    rules = replace(PLAIN, answer_rule="hira")
    records = [example("a", answer="12"), example("b", answer="3")]
    rows, measured = evaluate_rows(
        eval_data(stub([example("t")]), rules), "set", records, ["so 12", "The answer is: 3"]
    )
    assert [row["parsed"] for row in rows] == [None, "3"]
    assert (measured["accuracy"], measured["accuracy_hira_last_digits"], measured["unparsed"]) == (50, 100, 50)
    chosen = [example("c", answer="yes", choices=("yes", "no"))]
    _, measured = evaluate_rows(eval_data(stub([example("t")]), rules), "set", chosen, ["yes"])
    assert "accuracy_hira_last_digits" not in measured


def test_an_output_is_cut_at_the_protocols_stop_texts():
    rules = replace(PLAIN, stop=["Q:"], answer_rule="llm_adapters")
    rows, _ = evaluate_rows(eval_data(stub([example("t")]), rules), "set", [example("a")], ["1 Q: and 7"])
    assert (rows[0]["output"], rows[0]["text"], rows[0]["parsed"]) == ("1 Q: and 7", "1 ", "1")


def test_scores_of_labels():
    task = stub([], "classify", ("matthews", "accuracy", "f1"), num_labels=2)
    rows = [{"output": o, "gold": g, "correct": o == g, "leaked": False} for o, g in [(1, 1), (0, 0), (1, 0), (1, 1)]]
    found = metrics(task, rows)
    assert found["matthews"] == pytest.approx(57.735, abs=1e-3)  # (TP TN - FP FN) / sqrt(3 * 2 * 2 * 1) = 2 / sqrt 12
    assert found["f1"] == pytest.approx(80)
    for n in (len(rows), 1043):  # one class only
        many = [{**rows[i % len(rows)], "output": 1} for i in range(n)]
        assert metrics(task, many)["matthews"] == 0
    values = stub([], "regress", ("pearson", "spearman"))
    rows = [{"output": o, "gold": g, "leaked": False} for o, g in [(0.0, 1.0), (1.0, 2.0), (3.0, 2.5)]]
    assert metrics(values, rows)["spearman"] == pytest.approx(100, abs=1e-3)  # torchmetrics adds an epsilon
    assert metrics(values, [{**row, "output": 1.0} for row in rows])["pearson"] == 0  # constant: undefined


def test_a_prediction_that_is_no_number_is_wrong_and_counted():
    values, nan, inf = stub([], "regress", ("pearson", "spearman")), float("nan"), float("inf")

    def scores(outputs, golds):
        rows = zip(outputs, golds, strict=True)
        return metrics(values, [{"output": o, "gold": g, "leaked": False} for o, g in rows])

    golds = [0.0, 1.0, 2.0, 3.0, 4.0]
    found = scores([0.0, 1.0, 2.0, nan, inf], golds)
    assert found == {**scores([0.0, 1.0, 2.0, 0.0, 0.0], golds), "not_finite": 2}  # the lowest for the highest
    assert found["pearson"] < scores([0.0, 1.0, 2.0], golds[:3])["pearson"]
    assert "not_finite" not in scores([0.0, 1.0], golds[:2])
    assert scores([nan] * 5, golds) == {"n": 5, "pearson": 0.0, "spearman": 0.0, "not_finite": 5, "leaked": 0}
    task = stub([], "classify", ("matthews", "f1", "accuracy"), num_labels=2)

    def classes(outputs):
        rows = zip(outputs, [1, 0, 1, 0], strict=True)
        return metrics(task, [{"output": o, "gold": g, "correct": o == g, "leaked": False} for o, g in rows])

    assert classes([1, 0, -1, -1]) == {**classes([1, 0, 0, 1]), "not_finite": 2}


def test_no_class_and_no_option_is_made_of_nan():
    logits = torch.tensor([[0.0, 1.0], [float("nan"), 1.0], [1.0, 0.0]])
    found = OBJECTIVES["classify"].answers(lambda: SimpleNamespace(logits=logits), {}, None, {}, 0)
    assert found == [1, -1, 0]
    record = example("q", answer="a", choices=("a", "b"), options=("a", "b"))
    rules = replace(PLAIN, choose="likelihood")
    rows, found = evaluate_rows(eval_data(stub([example("p")]), rules), "set", [record], [{0: float("nan"), 1: -3.0}])
    assert (rows[0]["parsed"], rows[0]["correct"]) == (None, False)
    assert (found["accuracy"], found["unparsed"], found["not_finite"]) == (0, 100, 1)


def test_dialogue_metrics_say_what_they_cannot_compute(monkeypatch):
    monkeypatch.setitem(sys.modules, "nltk", None)
    task = ConvAI2(ConvAI2.config(), 0)
    rows = [{"output": " i like cats . ", "gold": ["no", "i like cats ."], "leaked": False}]
    with (
        pytest.warns(UserWarning, match="BERTScore is not computed: give a model folder"),
        pytest.warns(UserWarning, match="METEOR is not computed"),
    ):
        found = metrics(task, rows)
    assert (found["bleu"], found["rouge_l"], found["token_f1"]) == pytest.approx((100, 100, 100))
    assert "average" not in found


@pytest.fixture
def wordnet(monkeypatch):
    """NLTK with a WordNet in which a dog is a hound, and words split at spaces."""
    nltk = pytest.importorskip("nltk")
    from nltk.corpus import wordnet

    synset = SimpleNamespace(
        lemmas=lambda: [SimpleNamespace(name=lambda: "dog"), SimpleNamespace(name=lambda: "hound")]
    )
    monkeypatch.setattr(nltk, "word_tokenize", str.split)
    monkeypatch.setitem(vars(wordnet), "synsets", lambda word: [synset] if word in ("dog", "hound") else [])
    return vars(wordnet)


def meteor(output, *references):
    with pytest.warns(UserWarning, match="BERTScore"):
        return dialogue_metrics([output], [references])["meteor"]


def test_meteor(wordnet):
    """As NLTK has it: F = 10 P R / (R + 9 P), less a penalty of 0.5 (chunks / matches)^3; P of the output, R of a reference."""
    whole = pytest.approx(100 * (1 - 0.5 / 4**3))  # four matches, one chunk
    assert meteor("i walk dog .", "i walk dog .") == whole
    assert meteor("i walk hound .", "i walk dog .") == whole  # a synonym
    assert meteor("i walked dog .", "i walk dog .") == whole  # a stem
    assert meteor("i walk dog .", "no", "i walk dog .") == whole  # the nearest reference
    assert meteor("dog i", "i see dog .") == pytest.approx(
        100 * 10 * 0.5 / (0.5 + 9) * 0.5
    )  # P = 1, R = 0.5, two chunks
    assert meteor("", "no") == 0


def test_meteor_without_wordnet_is_named_not_guessed(wordnet, monkeypatch):
    def missing(word):
        raise LookupError("wordnet")

    monkeypatch.setitem(wordnet, "synsets", missing)
    with (
        pytest.warns(UserWarning, match=r"METEOR is not computed \(LookupError\).*nltk\.downloader wordnet punkt_tab"),
        pytest.warns(UserWarning, match="BERTScore"),
    ):
        assert "meteor" not in dialogue_metrics(["i ski"], [["i read"]])


def test_the_average_of_table_2_counts_bertscore_three_times(wordnet, tmp_path):
    backbone = load_backbone({"name": "tiny_bert", "dtype": "float32"}, None, "classify", 2)
    backbone.model.bert.save_pretrained(tmp_path)
    backbone.tokenizer.save_pretrained(tmp_path)
    found = dialogue_metrics(["i like cats ."], [["i like dogs ."]], str(tmp_path))
    parts = ("bleu", "bert_f1", "bert_recall", "bert_precision", "meteor", "rouge_l")
    assert found["average"] == pytest.approx(sum(found[key] for key in parts) / 6)


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


def tuner(task, protocol, tokenizer, model="tiny_llama"):
    backbone = load_backbone({"name": model, "dtype": "float32"}, None)
    with torch.no_grad():  # a random model of usual scale answers every question alike
        for parameter in backbone.model.parameters():
            parameter.mul_(6)
    adapters = SimpleNamespace(model=backbone.model, num_positions=0)
    return FineTuner(adapters, task, tokenizer, RunConfig(), 1, protocol).eval()


def outputs(protocol, records, batch_size, model="tiny_llama"):
    task = stub([example("t")])
    found = eval_data(task, protocol)
    with quiet():
        trainer = lightning.Trainer(
            accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False
        )
        return predict(trainer, tuner(task, protocol, found.tokenizer, model), found, "set", records, batch_size)[0]


RECORDS = [example("word " * (i % 7) + str(i)) for i in range(33)]


@pytest.mark.parametrize("beams", [1, 4])
def test_the_batch_size_changes_no_prediction(beams):
    rules = replace(PLAIN, max_new_tokens=6, num_beams=beams)
    alone = outputs(rules, RECORDS, 1)
    assert len(set(alone)) > 3
    assert outputs(rules, RECORDS, 8) == alone
    assert outputs(rules, RECORDS, 32) == alone


def test_the_batch_size_changes_no_prediction_of_a_model_with_learned_positions():
    rules = replace(PLAIN, max_new_tokens=6)
    alone = outputs(rules, RECORDS, 1, "tiny_gpt2")
    assert len(set(alone)) > 3
    assert outputs(rules, RECORDS, 8, "tiny_gpt2") == alone
    assert outputs(rules, RECORDS, 32, "tiny_gpt2") == alone


def test_generation_stops_at_the_end_of_text():
    rules = replace(PLAIN, max_new_tokens=50)
    module = tuner(stub([]), rules, tiny_tokenizer())
    steps = []

    def ends_after_three(head, args, logits):
        steps.append(len(logits))
        logits[..., module.tokenizer.eos_token_id] += 1e4 * (len(steps) > 3)
        return logits

    module.model.lm_head.register_forward_hook(ends_after_three)
    batch = next(iter(eval_data(stub([example("t")]), rules).dataloader("set", RECORDS[:4], 4)))
    module.predict_step(batch)
    assert steps == [4] * 4  # of 50, for all four rows at once


def test_sampling_is_seeded_and_leaves_the_random_state_alone():
    rules = replace(PLAIN, max_new_tokens=6, do_sample=True, temperature=2.0, top_p=0.9, top_k=40)
    found = eval_data(stub([example("t")]), rules)
    batch = next(iter(found.dataloader("set", RECORDS, 4)))
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
    rows, measured = evaluate_rows(eval_data(stub([example("t")]), rules), "set", records, found)
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
    from highrank.train.selection import KeepBest

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


TINY = ["method=lora", "r=1", "model=tiny_llama", "placement=q", "eval_before=false", "max_steps=1", "batch_size=1"]


def test_a_run_on_its_own_test_file_is_warned_of_and_says_what_it_read(run_cli, tmp_path):
    file = tmp_path / "rows.jsonl"
    rows = [{"instruction": f"{i} + 1?", "output": f"The answer is {i + 1}."} for i in range(3)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["task=jsonl", f"task.train={file}", f"task.test={file}", f"run_dir={tmp_path / 'run'}"]
    with pytest.warns(UserWarning, match="leak audit: all 3 questions of test occur in the training data"):
        status, _, err = run_cli(*TINY, *words)
    assert status == 0, err
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["metrics"]["final"]["sets"]["test"]["leaked"] == 3
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert [(s["sha256"], s["rows"]) for s in results["data"]] == [(digest, 3)] * 2


def test_validation_counts_what_was_used_and_a_run_without_ends_before_training(run_cli, tmp_path, monkeypatch):
    file = tmp_path / "rows.jsonl"
    words = ["task=jsonl", f"task.train={file}", f"task.test={file}", "eval_test=false", "protocol.num_validation=4"]
    rules = ["protocol.template='{instruction}='", "protocol.max_length=20"]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows_with_long_ones([1, 60, 1, 60])))
    status, _, err = run_cli(*TINY, *words, *rules, f"run_dir={tmp_path / 'run'}")
    assert status == 0, err
    assert json.loads((tmp_path / "run" / "results.json").read_text())["validation"]["n"] == 2
    monkeypatch.setattr(FineTuner, "training_step", lambda *args: pytest.fail("it trains"))
    file.write_text("".join(json.dumps(row) + "\n" for row in rows_with_long_ones([60] * 4)))
    status, _, err = run_cli(*TINY, *words, *rules, f"run_dir={tmp_path / 'other'}")
    assert status == 2
    assert "the held-out examples must hold one within the protocol's cut-off, got 4, all too long" in err


def test_a_run_counts_what_its_cut_off_took(run_cli, tmp_path):
    rows = [{"instruction": "q" * n, "output": "word " * m} for n, m in ((2, 1), (20, 1), (2, 20))]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "test.jsonl").write_text(json.dumps({"instruction": "?", "output": "word"}))
    words = ["task=jsonl", f"task.train={tmp_path / 'rows.jsonl'}", f"task.test={tmp_path / 'test.jsonl'}"]
    rules = ["protocol.template='{instruction}='", "protocol.max_length=20", "protocol.max_new_tokens=2"]
    cut = ["protocol.too_long=cut", "protocol.mask_prompt=false"]
    for name, more, expected, said in (
        ("drop", [], {"left_out": 2}, "2 left out"),
        ("cut", cut, {"cut": 1, "answer_lost": 1, "left_out": 0}, "1 answer lost"),
    ):
        status, out, err = run_cli(*TINY, *words, *rules, *more, f"run_dir={tmp_path / name}")
        assert status == 0, err
        assert json.loads((tmp_path / name / "results.json").read_text())["tokens"]["cut_off"] == expected
        assert said in out
