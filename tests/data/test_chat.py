"""Conversations: the tokenizer's template, what is learned of it, and rows that hold none."""

import json
from dataclasses import replace

import pytest

from highrank.base.errors import UserError
from highrank.base.registry import load
from highrank.cli import main
from highrank.data import token_cache
from highrank.data.batches import EvalData
from highrank.data.chat import prompt_of, stop_tokens
from highrank.data.encoding import IGNORED, encode, encode_prompt
from highrank.data.protocol import Protocol
from highrank.data.token_cache import cached_encoding
from highrank.model.backbones import load_backbone
from highrank.model.tiny import tiny_tokenizer

TURN = "<s>{{ m.role }}\n{{ m.content }}</s>\n"
ASKS = "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
PLAIN = "{% for m in messages %}" + TURN + "{% endfor %}" + ASKS
MARKED = (
    "{% for m in messages %}<s>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}</s>"
    "{% endgeneration %}\n{% else %}{{ m.content }}</s>\n{% endif %}{% endfor %}" + ASKS
)
FORGETS = "{% for m in messages %}{% if loop.last or m.role != 'assistant' %}" + TURN + "{% endif %}{% endfor %}" + ASKS
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + PLAIN
RULES = Protocol(name="plain", version=1, template="{instruction}=", max_length=400)
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "2 + 2?"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "And 3 + 3?"},
    {"role": "assistant", "content": "It is 6"},
]


def tokenizer(template=PLAIN):
    found = tiny_tokenizer()
    found.chat_template = template
    return found


def examples(tmp_path, *rows, **fields):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    cls = load("tasks", "jsonl")
    return cls(cls.config(train=str(tmp_path / "rows.jsonl"), **fields), 0).train()


def learned(row, tokens):
    """The pieces of text that carry a loss."""
    pieces, before = [], False
    for token, label in zip(row.input_ids, row.labels, strict=True):
        assert label in (IGNORED, token)
        if label != IGNORED:
            pieces = [*pieces[:-1], [*pieces[-1], token]] if before else [*pieces, [token]]
        before = label != IGNORED
    return [tokens.decode(piece) for piece in pieces]


@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_the_loss_is_on_what_the_assistant_says(tmp_path, template):
    tokens = tokenizer(template)
    (talk,) = examples(tmp_path, {"messages": TALK})
    row = encode(talk, RULES, tokens)
    assert row.input_ids == tokens.apply_chat_template(TALK, return_dict=False)
    assert learned(row, tokens) == ["4</s>", "It is 6</s>"]
    assert learned(encode(talk, RULES, tokens, evaluation=True), tokens) == ["It is 6</s>"]
    assert learned(encode(talk, replace(RULES, mask_prompt=False), tokens), tokens) == [tokens.decode(row.input_ids)]
    prompt = encode_prompt(talk, RULES, tokens)
    assert prompt == tokens.apply_chat_template(TALK[:-1], add_generation_prompt=True, return_dict=False)
    assert row.input_ids[: len(prompt)] == prompt  # what is trained on is what is asked
    assert prompt_of(talk, tokens) == tokens.decode(prompt)
    assert prompt_of(talk, tokens).endswith("<s>user\nAnd 3 + 3?</s>\n<s>assistant\n")
    assert stop_tokens(talk, tokens) == [tokens.eos_token_id]


@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_of_prompt_and_completion_only_the_completion_is_learned(tmp_path, template):
    tokens = tokenizer(template)
    row = {"prompt": TALK[:4], "completion": TALK[4:]}
    (talk,) = examples(tmp_path, row)
    assert (talk.given, talk.output, talk.answer) == (4, "It is 6", "It is 6")
    assert learned(encode(talk, RULES, tokens), tokens) == ["It is 6</s>"]
    longer = {"prompt": TALK[:2], "completion": TALK[2:]}
    assert learned(encode(*examples(tmp_path, longer), RULES, tokens), tokens) == ["4</s>", "It is 6</s>"]
    (text,) = examples(tmp_path, {"prompt": "2 + 2?", "completion": "4"})
    assert (text.instruction, text.output, text.messages) == ("2 + 2?", "4", ())
    assert learned(encode(text, RULES, tokens), tokens) == ["4</s>"]


def test_fields_may_have_other_names_and_an_answer_of_their_own(tmp_path):
    row = {"chat": TALK, "gold": 6, "id": "x"}
    (talk,) = examples(tmp_path, row, fields={"messages": "chat", "answer": "gold"})
    assert (talk.id, talk.answer, talk.output, len(talk.messages)) == ("x", "6", "It is 6", 4)
    assert talk.question == "Be brief.\n2 + 2?\n4\nAnd 3 + 3? "  # what the leak audit looks for


BAD = [
    ([], "messages must be a list of messages, got messages=[]"),
    ("text", "messages must be a list of messages, got messages=text"),
    (["text"], "messages[0] must have role and content, got text"),
    ([{"role": "user"}], "messages[0] must have role and content"),
    (
        [TALK[1], {"role": "bot", "content": "x"}],
        "messages[1].role is one of system, user, assistant, tool, got role=bot",
    ),
    (
        [TALK[1], {"role": "assistant", "content": None}],
        "messages[1].content must be a text, or a number, true or false, got",
    ),
    ([TALK[1], {"role": "assistant", "content": ["x"]}], "messages[1].content must be a text"),
    ([TALK[1], {**TALK[2], "tool_calls": [1]}], "messages[1] must have nothing but role and content, got tool_calls"),
    (
        TALK[:4],
        "messages must begin with another's turn and end with the assistant's, got system, user, assistant, user",
    ),
    (TALK[2:], "messages must begin with another's turn and end with the assistant's, got assistant, user, assistant"),
]


@pytest.mark.parametrize(("messages", "message"), BAD)
def test_a_row_that_is_no_conversation_is_named(tmp_path, messages, message):
    with pytest.raises(UserError) as error:
        examples(tmp_path, {"messages": TALK}, {"messages": messages})
    assert f"row 2: {message}" in str(error.value)
    assert str(tmp_path / "rows.jsonl") in str(error.value)


def test_a_template_that_will_not_do_is_told_before_training(tmp_path):
    (talk,) = examples(tmp_path, {"messages": TALK})
    with pytest.raises(UserError, match=r"the beginning of a conversation must be written as within the whole"):
        encode(talk, RULES, tokenizer(FORGETS))
    single = examples(tmp_path, {"messages": TALK[1:3]})[0]
    assert learned(encode(single, RULES, tokenizer(FORGETS)), tokenizer()) == ["4</s>"]
    with pytest.raises(
        UserError, match=r"got system, user, assistant, user, assistant \(System role not supported\) in train-1"
    ):
        encode(talk, RULES, tokenizer(NO_SYSTEM))
    with pytest.raises(UserError, match=r"a conversation needs a tokenizer that has one, got none"):
        encode(talk, RULES, tiny_tokenizer())


def test_the_cut_off(tmp_path):
    tokens = tokenizer()
    (talk,) = examples(tmp_path, {"messages": TALK})
    size = len(encode(talk, RULES, tokens).input_ids)
    assert encode(talk, replace(RULES, max_length=size - 1), tokens) is None
    cut = encode(talk, replace(RULES, max_length=size - 4, too_long="cut"), tokens)
    assert (cut.cut, learned(cut, tokens)) == ("cut", ["4</s>", "It is"])
    lost = encode(talk, replace(RULES, max_length=20, too_long="cut"), tokens)
    assert (lost.cut, learned(lost, tokens)) == ("answer_lost", [])


def test_the_token_cache_keeps_every_turn(tmp_path, monkeypatch):
    monkeypatch.setenv("HIGHRANK_CACHE", str(tmp_path))
    monkeypatch.setattr(token_cache, "MIN_EXAMPLES", 1)
    found = examples(tmp_path, {"messages": TALK}, {"instruction": "1?", "output": "1"})
    for template in (PLAIN, MARKED):  # another template is another entry
        tokens = tokenizer(template)
        rows = [encode(example, RULES, tokens) for example in found]
        calls = []
        for _ in range(2):
            assert cached_encoding(found, RULES, tokens, lambda: calls.append(1) or rows) == rows  # noqa: B023
        assert calls == [1]


def test_an_answer_is_over_where_the_template_ends_a_turn(tmp_path):
    tokens = tokenizer(PLAIN.replace("</s>", "<unk>"))
    (talk,) = examples(tmp_path, {"messages": TALK})
    assert stop_tokens(talk, tokens) == sorted([tokens.unk_token_id, tokens.eos_token_id])
    task = load("tasks", "jsonl")
    data = EvalData(task(task.config(), 0), RULES, tokens)
    (batch,) = data.dataloader("test", [talk], 1)
    assert batch["stop"].tolist() == stop_tokens(talk, tokens)
    assert batch["input_ids"][0].tolist() == encode_prompt(talk, RULES, tokens)


def test_a_run_on_conversations(tmp_path, monkeypatch):
    backbone = load_backbone({"name": "tiny_llama", "dtype": "float32"}, None)
    backbone.tokenizer.chat_template = PLAIN
    backbone.model.save_pretrained(tmp_path / "base")
    backbone.tokenizer.save_pretrained(tmp_path / "base")
    rows = [
        {"messages": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": f"{i}"}]} for i in range(8)
    ]
    for name, own in (("train", rows[:6]), ("test", rows[6:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in own))
    monkeypatch.chdir(tmp_path)
    words = [
        "model=hf:own",
        "path=base",
        "model.dtype=float32",
        "method=lora",
        "r=2",
        "lr=1e-2",
        "max_steps=2",
        "batch_size=2",
    ]
    words += [
        "task=jsonl",
        "task.train=train.jsonl",
        "task.test=test.jsonl",
        "protocol.max_new_tokens=3",
        "run_dir=run",
    ]
    assert main(["run", *words]) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert (results["metrics"]["final"]["sets"]["test"]["n"], results["tokens"]["skipped_examples"]) == (2, 0)
    (first, _) = map(json.loads, (tmp_path / "run" / "predictions" / "test.jsonl").read_text().splitlines())
    assert first["prompt"] == "<s>user\n6?</s>\n<s>assistant\n"
    assert main(["eval", "run"]) == 0
