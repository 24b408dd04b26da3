"""What is longer than a model's positions is found before training, counted, and never an IndexError."""

import json
import re
from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from highrank.config.words import compose_run
from highrank.data.encoding import encode_text, within
from highrank.data.task import LabelledText
from highrank.model.backbones import empty_model
from highrank.model.language import UNLIMITED, context_length
from highrank.model.tiny import tiny_config, tiny_tokenizer

pytestmark = pytest.mark.integration

SHORT = 48


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def row(n):
    return {"instruction": "p" * n, "output": "a"}


@pytest.fixture
def gpt2(tmp_path):
    """A GPT-2 of 48 positions, which are learned: one more is an IndexError."""
    config = AutoConfig.for_model(**{**tiny_config("gpt2"), "n_positions": SHORT})
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "gpt2")
    tiny_tokenizer().save_pretrained(tmp_path / "gpt2")
    return tmp_path / "gpt2"


@pytest.fixture
def run_on(gpt2, tmp_path, run_cli):
    def run(train, test, *words):
        files = {"train": write(tmp_path / "train.jsonl", train), "test": write(tmp_path / "test.jsonl", test)}
        fields = [f"task.{part}={path}" for part, path in files.items()]
        fields += ["protocol.max_new_tokens=8", "protocol.template='{instruction}'"]
        words = ["model=hf:org/short", f"path={gpt2}", "task=jsonl", *fields, "max_steps=2", "batch_size=2", *words]
        status, out, err = run_cli(*words, f"run_dir={tmp_path / 'run'}")
        results = tmp_path / "run" / "results.json"
        return status, out, err, json.loads(results.read_text()) if results.is_file() else {}

    return run


@pytest.mark.parametrize("method", ["lora", "prompt_tuning", "prefix"])
def test_training_rows_beyond_the_positions_are_left_out_and_counted(run_on, method):
    virtual = ["num_virtual_tokens=10"] if method != "lora" else ["placement=qv"]
    rows = [row(5), row(30), row(40), row(60), row(70)]
    status, _, err, results = run_on(rows, [row(6)], f"method={method}", *virtual)
    assert status == 0, err
    # <s> + prompt + answer + </s> within 48 positions, less the virtual ones
    assert results["tokens"]["cut_off"]["left_out"] == (2 if method == "lora" else 3)


def test_what_the_plan_can_tell_it_tells(run_on):
    rows = [row(5), row(400)]
    status, out, err, _ = run_on(rows, [row(5)], "method=lora", "placement=qv", "dry_run=true")
    assert status == 0, err
    assert "1 of 2 training examples are longer than the model's 48 positions" in " ".join(out.split())


@pytest.mark.parametrize(
    ("n", "words", "message"),
    [
        (44, [], r"must fit the model's 48 positions, got 53 tokens at .* too many at 1 of 2; lower protocol.max_new"),
        (30, ["method=prompt_tuning", "num_virtual_tokens=10"], r"must fit the model's 38 positions, got 39 tokens"),
        (5, ["method=prefix", "num_virtual_tokens=45"], r"48 positions must hold a prompt, got num_virtual_tokens=45"),
        (5, ["protocol.max_new_tokens=60"], r"48 positions must hold a prompt, .*protocol.max_new_tokens=60; lower"),
        (44, ["eval_before=false"], r"must fit the model's 48 positions, got 53 tokens"),
    ],
)
def test_prompts_that_do_not_fit_are_refused_before_training(run_on, n, words, message):
    method = [] if any(word.startswith("method=") for word in words) else ["method=lora", "placement=qv"]
    status, _, err, results = run_on([row(5)], [row(5), row(n)], *method, *words)
    assert status == 2
    assert "Traceback" not in err
    assert re.search(message, " ".join(err.split())), err
    assert "metrics" not in results


def test_without_an_evaluation_long_prompts_do_not_matter(run_on):
    status, _, err, _ = run_on([row(5)], [row(60)], "method=lora", "placement=qv", "eval_test=false")
    assert status == 0, err


def test_an_encoders_texts_are_cut_to_its_positions():
    """RoBERTa numbers its positions from behind the padding token's number on, so that it has fewer than it seems."""
    config = AutoConfig.for_model(**{**tiny_config("roberta"), "max_position_embeddings": 34})
    model = AutoModelForSequenceClassification.from_config(config)
    positions = context_length(model)
    protocol = within(compose_run(["model=tiny_llama"]).protocol, positions)
    row = encode_text(LabelledText("a", "t" * 90, 1), protocol, tiny_tokenizer(True))
    assert (len(row.input_ids), row.cut) == (positions, "cut")
    model(input_ids=torch.tensor([row.input_ids]))
    longer = torch.tensor([[*row.input_ids, 5]])
    with pytest.raises((IndexError, RuntimeError), match="out of"):
        model(input_ids=longer)


@pytest.mark.parametrize(
    ("fields", "positions"),
    [
        ({"model_type": "gpt2", "n_positions": 99}, 99),
        ({"model_type": "llama", "max_position_embeddings": 99}, 99),
        ({"model_type": "opt", "max_position_embeddings": 99}, 99),
        ({"model_type": "mpt", "max_seq_len": 99}, 99),
        ({"model_type": "bloom"}, UNLIMITED),
        ({"model_type": "roberta", "max_position_embeddings": 514}, 512),
        ({"model_type": "gemma3", "text_config": {"model_type": "gemma3_text", "max_position_embeddings": 99}}, 99),
    ],
)
def test_positions_of_models(fields, positions):
    model = empty_model(AutoConfig.for_model(**fields), "classify" if fields["model_type"] == "roberta" else "generate")
    assert context_length(model) == positions
    assert context_length(model, tiny_tokenizer()) == (positions if positions < UNLIMITED else 1024)


def test_a_protocol_within_the_positions():
    protocol = compose_run(["model=tiny_llama"]).protocol
    assert within(protocol, 10**9) == protocol
    assert within(protocol, 40).max_length == 40
    apart = within(replace(protocol, max_length=100, max_target_length=30), 80)
    assert (apart.max_length, apart.max_target_length) == (50, 30)
    assert within(replace(protocol, max_length=100, max_target_length=90), 80).max_length == 1
