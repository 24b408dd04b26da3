"""What each protocol makes of a worked example of each task, token by token, and the promise that a version means.

The golden file holds texts instead of numbers: the byte tokenizer maps each token to one byte or special token and back,
so a text with its special tokens *is* the list of ids. To remake it after raising a protocol's version:

    HIGHRANK_REMAKE=1 pytest tests/tasks/test_protocols.py
"""

import dataclasses
import functools
import json
import os
from pathlib import Path

import pytest

from highrank.base.errors import UserError
from highrank.base.files import digest
from highrank.config.build import protocol_for
from highrank.config.words import compose_run
from highrank.data.encoding import IGNORED, encode, encode_prompt
from highrank.model.tiny import tiny_tokenizer

GOLDEN = Path(__file__).parent.parent / "fixtures" / "protocols.json"
PROTOCOLS = ("clean", "llm_adapters", "hyperadapt", "hira", "peft_metamath")
TASKS = {
    "glue": {"member": "rte"},
    "commonsense170k": {"member": "boolq"},
    "math10k": {},
    "metamath": {},
    "gsm8k": {},
    "convai2": {},
    "wordmath": {},
    "jsonl": {},
}


@functools.cache
def protocol(name, task, *words):
    words = [f"protocol={name}", *words]
    if task == "jsonl":
        words += [f"task.train={GOLDEN}", f"task.test={GOLDEN}"]
    return compose_run([f"task={task}", *words]).protocol


def shown(ids):
    tokenizer = tiny_tokenizer()
    text = tokenizer.decode(ids)
    assert tokenizer(text, add_special_tokens=False).input_ids == list(ids)  # nothing is lost in the writing
    return text


def made(name, task):
    """What goes into a model: the training tokens, those among them with a loss, the tokens before an answer."""
    record, rules = task.train()[0], protocol(name, task.name)
    target = rules.max_target_length and 1000
    rules = dataclasses.replace(rules, max_length=1000, max_target_length=target)  # a byte is a token here
    if task.kind != "generate":
        encoded = encode(record, rules, tiny_tokenizer(encoder=True))
        return {"train": shown(encoded.input_ids), "label": encoded.labels}
    encoded = encode(record, rules, tiny_tokenizer())
    labels = [label for label in encoded.labels if label != IGNORED]
    assert all(label in (IGNORED, token) for token, label in zip(encoded.input_ids, encoded.labels, strict=True))
    assert encoded.labels[len(encoded.labels) - len(labels) :] == labels  # the loss covers an unbroken end
    return {
        "train": shown(encoded.input_ids),
        "loss_on": shown(labels),
        "evaluation": shown(encode_prompt(record, rules, tiny_tokenizer())),
    }


def golden(section, key, found):
    """Returns what is pinned under a key; with HIGHRANK_REMAKE set, pins what was found."""
    pinned = json.loads(GOLDEN.read_text())
    if os.environ.get("HIGHRANK_REMAKE"):
        pinned[section][key] = found
        GOLDEN.write_text(json.dumps(pinned, indent=1, sort_keys=True, ensure_ascii=False) + "\n")
    return pinned[section].get(key)


@pytest.mark.parametrize("name", PROTOCOLS)
@pytest.mark.parametrize("task", TASKS)
def test_tokens_and_labels(make, name, task):
    found = made(name, make(task, **TASKS[task]))
    assert found == golden("tokens", f"{name}/{task}", found)


@pytest.mark.parametrize("name", PROTOCOLS)
def test_a_protocol_changes_only_with_its_version(name):
    """If this fails, raise `version` in the protocol's YAML, then remake the golden file."""
    rules = [protocol(name, task) for task in ("glue", "commonsense170k", "math10k", "convai2", "jsonl")]
    key = f"{name} version {rules[0].version}"
    found = digest([dataclasses.asdict(rule) for rule in rules])
    assert found == golden("versions", key, found), f"{key} is pinned to other values: raise its version"


def test_the_published_differences():
    """The table of differences between the protocols, one line each."""
    adapters = protocol("llm_adapters", "commonsense170k")
    assert (adapters.num_beams, adapters.do_sample, adapters.max_new_tokens, adapters.max_length) == (4, False, 32, 256)
    assert (adapters.joint, adapters.mask_prompt, adapters.eos, adapters.too_long) == (True, False, True, "cut")
    assert adapters.template != adapters.eval_template
    assert protocol("llm_adapters", "math10k").max_new_tokens == 256
    hyper = protocol("hyperadapt", "commonsense170k")
    assert (hyper.do_sample, hyper.temperature, hyper.top_p, hyper.top_k) == (True, 0.05, 0.4, 40)
    assert (hyper.max_length, hyper.max_new_tokens, hyper.num_beams) == (256, 32, 1)
    assert protocol("hyperadapt", "math10k").max_new_tokens == protocol("hyperadapt", "math10k").max_length == 512
    assert protocol("hyperadapt", "glue").max_length == 128
    hira = protocol("hira", "commonsense170k")
    assert (hira.bos, hira.eval_bos, hira.eos, hira.mask_prompt) == (False, True, False, True)
    assert (hira.max_length, hira.max_target_length, hira.max_new_tokens, hira.num_beams) == (256, 16, 16, 4)
    assert (hira.selection, hira.num_validation, hira.validate_every) == ("best", 120, 80)
    assert protocol("hira", "math10k").max_length == 155
    talk = protocol("hira", "convai2")
    assert (talk.length_penalty, talk.no_repeat_ngram, talk.max_new_tokens) == (0.9, 4, 32)
    assert protocol("clean", "gsm8k").answer_rule == "strict"


def test_a_value_on_the_command_line_wins_over_the_familys():
    assert protocol("hyperadapt", "math10k", "protocol.max_length=64").max_length == 64


def test_a_plugin_may_bring_a_family_of_its_own():
    values = {**vars(compose_run(["task=wordmath"]).protocol), "families": {"medical": {"max_length": 99}}}
    given = {key: value for key, value in values.items() if key != "max_length"}
    assert protocol_for(given, "medical").max_length == 99
    with pytest.raises(UserError, match=r"unknown family, got families.medical; it is one of: commonsense, dialogue, "):
        protocol_for(given, "glue")
