"""Every task over hand-made rows: examples, counts, bad data; and over the real files where HIGHRANK_DATA has them."""

import json
import os

import pytest

from highrank.base.errors import UserError
from highrank.base.registry import available, load
from highrank.data import leak
from highrank.data.answers import RULES
from highrank.data.sources import MissingData
from highrank.data.task import Example

CASES = [(name, fields) for name in sorted(available("tasks")) for fields in load("tasks", name).examples]
GLUE = [fields["member"] for fields in load("tasks", "glue").examples]


@pytest.mark.parametrize(("name", "fields"), CASES)
def test_the_contract(make, name, fields):
    task = make(name, **fields)
    assert task.family.isidentifier()  # a key in protocols
    if not task.has_data:
        pytest.skip("the folder of hand-made rows has none of this task")
    assert task.train()
    assert task.num_train is None or task.num_train >= 1
    for examples in task.test().values():
        for example in examples:
            if isinstance(example, Example):
                assert not example.choices or example.answer in example.choices
                assert len(example.options) <= len(example.choices)
            elif task.kind.startswith("classify"):
                assert 0 <= example.label < task.num_labels
    for source in task.sources():
        assert source["rows"] >= 1
        assert len(source["sha256"]) == 64


def test_glue_labels_and_texts(make):
    cola, stsb, mrpc = (make("glue", member=m).train() for m in ("cola", "stsb", "mrpc"))
    assert [(e.text, e.label) for e in cola] == [("The sailors rode.", 1), ('The "sailors rode the.', 0)]
    assert [(e.text, e.text_pair, e.label) for e in stsb] == [("A.", "B.", 5.0), ("A.", "C.", 0.5)]
    assert (mrpc[0].text, mrpc[0].text_pair, mrpc[0].label) == ("A b .", "B a .", 1)
    assert list(make("glue", member="mnli").test()) == ["mnli_matched", "mnli_mismatched"]
    assert [e.label for e in make("glue", member="rte").train()] == [1, 0]
    assert make("glue", member="stsb").kind == "regress"


RAW = {
    "boolq": (
        {"question": "is the sky blue", "answer": True, "passage": "..."},
        "Please answer the following question with true or false, question: is the sky blue?\n\nAnswer format: true/false",
        "true",
    ),
    "piqa": (
        {"goal": "open a jar", "sol1": "twist", "sol2": "throw", "label": 0},
        "Please choose the correct solution to the question: open a jar\n\nSolution1: twist\n\nSolution2: throw\n\n"
        "Answer format: solution1/solution2",
        "solution1",
    ),
    "siqa": (
        {"context": "Al ran.", "question": "Why?", "answerA": "x", "answerB": "y", "answerC": "z", "label": "3"},
        "Please choose the correct answer to the question: Al ran. Why?\n\nAnswer1: x Answer2: y Answer3: z\n\n"
        "Answer format: answer1/answer2/answer3",
        "answer3",
    ),
    "hellaswag": (
        {"activity_label": "Run", "ctx": "A man", "endings": ["a", "b", "c", "d"], "label": "1"},
        "Please choose the correct ending to complete the given sentence: Run: A man\n\nEnding1: a Ending2: b Ending3: c "
        "Ending4: d\n\nAnswer format: ending1/ending2/ending3/ending4",
        "ending2",
    ),
    "winogrande": (
        {"sentence": "Al saw Bo so _ ran.", "option1": "Al", "option2": "Bo", "answer": "2"},
        "Please choose the correct answer to fill in the blank to complete the given sentence: Al saw Bo so _ ran.\n\n"
        "Option1: Al Option2: Bo Answer format: option1/option2",
        "option2",
    ),
    "arc_e": (
        {"question": "Hot?", "choices": {"text": ["a", "b", "c"], "label": ["1", "2", "3"]}, "answerKey": "2"},
        "Please choose the correct answer to the question: Hot?\n\nAnswer1: a Answer2: b Answer3: c\n\n"
        "Answer format: answer1/answer2/answer3",
        "answer2",
    ),
    "obqa": (
        {"question_stem": "Sun", "choices": {"text": list("abcd"), "label": list("ABCD")}, "answerKey": "D"},
        "Please choose the correct answer to the question: Sun\n\nAnswer1: a Answer2: b Answer3: c Answer4: d\n\n"
        "Answer format: answer1/answer2/answer3/answer4",
        "answer4",
    ),
}


@pytest.mark.parametrize("part", RAW)
def test_original_rows_are_put_into_the_same_words(make, part):
    row, instruction, answer = RAW[part]
    example = make("commonsense170k").record(row, part, "id")
    assert (example.instruction, example.answer) == (instruction, answer)
    assert example.output == f"the correct answer is {answer}"


def test_a_scorer_looks_for_five_answers_and_ranking_compares_those_of_the_question(make):
    example = make("commonsense170k").test()["siqa"][0]
    assert example.choices == ("answer1", "answer2", "answer3", "answer4", "answer5")
    assert example.options == tuple(f"the correct answer is answer{i}" for i in (1, 2, 3))


def test_commonsense_trains_together_or_alone(make):
    assert len(make("commonsense170k").train()) == 32
    alone = make("commonsense170k", member="boolq", sets=["boolq", "piqa"])
    assert (len(alone.train()), list(alone.test())) == (4, ["boolq", "piqa"])


def test_a_mixture_is_refused_unless_whole(make):
    task = make("commonsense170k", allow_partial=False)
    with pytest.raises(UserError, match=r"boolq must have its published 9427 rows, got 4 in .*allow_partial=true"):
        task.train()
    noted = make("commonsense170k").sources()
    assert noted[0] | {"sha256": ""} == {
        "name": "commonsense/boolq/train.json.gz",
        "sha256": "",
        "rows": 4,
        "expected": 9427,
    }


def test_a_missing_part_is_recorded(make, tmp_path, folder):
    (tmp_path / "boolq").mkdir()
    for split in ("train", "test"):
        source = folder / "commonsense" / "boolq" / f"{split}.json.gz"
        (tmp_path / "boolq" / source.name).write_bytes(source.read_bytes())
    with pytest.raises(MissingData, match=r"piqa/train\.json .*LLM-Adapters"):
        make("commonsense170k", data=str(tmp_path), allow_partial=False, member="piqa").train()
    task = make("commonsense170k", data=str(tmp_path))
    assert {"name": "piqa/train.json", "sha256": None, "rows": 0, "expected": 16113} in task.sources()
    assert list(task.test()) == ["boolq"]


def test_gsm8k_reads_both_layouts(make):
    train = make("gsm8k").train()
    assert [e.answer for e in train] == ["12", "1000", "3.5"]
    assert train[0].output == "He has 4*3 = 12.\nThe answer is: 12"
    for rule in RULES.values():
        assert rule.judge(train[0].output, "12") == ("12", True)
    assert [e.answer for e in make("gsm8k").test()["gsm8k"]] == ["3.0", "3.5"]


def test_math_sets(make):
    task = make("math10k")
    assert list(task.test()) == ["addsub", "singleeq", "gsm8k", "aqua", "multiarith", "svamp"]
    letter = task.test()["aqua"][0]
    assert (letter.answer, letter.choices) == ("A", tuple("ABCDE"))
    parts = make("math10k", train_set="parts").train()
    assert parts[3].output == "(1.0+1.0) = 2. The answer is 2."
    assert parts[4].instruction == "3 + 1? Answer Choices: (A) 4 (B) 5"
    assert parts[4].output == "3+1=4\nThe answer is (A)."


def test_math_tests_in_their_original_layouts(make, tmp_path):
    rows = {
        "gsm8k": {"question": "1 + 1?", "answer": "1+1 = 2.\n#### 2"},
        "AQuA": {"question": "3 + 1?", "options": ["A)4", "B)5"], "rationale": "3+1=4", "correct": "A"},
    }
    for name, row in rows.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "test.jsonl").write_text(json.dumps(row))
    found = make("math10k", data=str(tmp_path)).test()
    assert [(e.instruction, e.answer) for e in found["gsm8k"]] == [("1 + 1?", "2")]
    letter = found["aqua"][0]
    assert (letter.instruction, letter.answer) == ("3 + 1? Answer Choices: (A) 4 (B) 5", "A")
    assert letter.options[letter.choices.index("A")] == "The answer is (A)."


def test_metamath_leaves_out_what_is_longer_than_asked(make, tmp_path):
    rows = [{"query": "q" * n, "response": "The answer is: 1"} for n in (3, 4)]
    (tmp_path / "MetaMathQA.json").write_text(json.dumps(rows))
    limit = len("qqq The answer is: 1")
    assert [len(e.instruction) for e in make("metamath", data=str(tmp_path), max_chars=limit).train()] == [3]
    assert len(make("metamath", data=str(tmp_path), max_chars=limit + 1).train()) == 2
    with pytest.raises(UserError, match="a training set is needed, got none of 2 examples"):
        make("metamath", data=str(tmp_path), max_chars=1).train()


def test_winogrande_is_rebuilt_from_all_its_training_sizes(make, monkeypatch):
    import datasets

    asked = []
    row = {"sentence": "Al saw Bo so _ ran.", "option1": "Al", "option2": "Bo", "answer": "2"}

    def load_dataset(repo, subset, **kwargs):
        asked.append((repo, subset, kwargs["split"]))
        return [row]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.delenv("HIGHRANK_DATA", raising=False)
    task = make("commonsense170k", data=None, member="winogrande", sets=["winogrande"])
    assert len(task.train()) == 6
    assert asked == [
        ("allenai/winogrande", f"winogrande_{size}", "train") for size in ("xs", "s", "m", "l", "xl", "debiased")
    ]
    asked.clear()
    assert len(task.test()["winogrande"]) == 1
    assert asked == [("allenai/winogrande", "winogrande_xl", "validation")]


def test_an_answer_of_zero_is_an_answer(make, tmp_path):
    (tmp_path / "own.jsonl").write_text(json.dumps({"instruction": "1 - 1?", "output": "1 - 1 = 0.", "answer": 0}))
    assert make("jsonl", train=str(tmp_path / "own.jsonl")).train()[0].answer == "0"


def test_dialogues(make):
    rows = make("convai2").test()["convai2"]
    assert [row.output for row in rows] == ["i am well .", "i read .", "hello"]
    assert rows[1].instruction == (
        "P: i read twenty books a year . [SEP] P: i like cats . [SEP] Q: hello , how are you ? [SEP] R: i am well . "
        "[SEP] Q: what do you do ?"
    )
    assert rows[2].instruction == "P: i ski . [SEP] Q: hi"  # nothing of the dialogue before


def test_neighbours_with_one_context_share_their_references():
    import importlib

    merged = importlib.import_module("highrank.tasks.convai2").merged
    rows = [Example(str(i), context, out, out) for i, (context, out) in enumerate([("a", "x"), ("a", "y"), ("b", "z")])]
    assert [(e.instruction, e.references) for e in merged(rows)] == [("a", ("x", "y")), ("b", ("z",))]


def test_a_sample_is_drawn_once_and_for_all(make):
    few = make("commonsense170k", n_train=5, n_test=2, data_seed=1)
    assert few.train() == make("commonsense170k", n_train=5, n_test=2, data_seed=1).train()
    assert few.train() != make("commonsense170k", n_train=5, data_seed=2).train()
    assert {len(rows) for rows in few.test().values()} == {2}
    assert few.num_train == 5


BAD = [
    ("glue", {"member": "colla"}, "unknown member, got member=colla; did you mean 'cola'"),
    ("commonsense170k", {"member": "arc"}, "unknown member"),
    ("commonsense170k", {"sets": ["arc-c"]}, "unknown sets, got sets=arc-c; did you mean 'arc_c'"),
    ("math10k", {"train_set": "9k"}, "unknown train_set"),
    ("gsm8k", {"n_test": 0}, "n_test must be >= 1"),
    ("gsm8k", {"data": "/no/such/folder"}, "data=/no/such/folder"),
    ("convai2", {"bert": "/no/model"}, "bert is a model folder with config.json, got bert=/no/model"),
    ("metamath", {"max_chars": 0}, "max_chars must be >= 1, got max_chars=0"),
    ("jsonl", {"train": "no.jsonl"}, "train must be an existing file, got task.train='no.jsonl'"),
    ("jsonl", {"fields": {"question": "q"}}, "got fields.question"),
    ("jsonl", {"fields": {"output": "reply"}}, "row 1 must have the field 'reply', got instruction, input, output"),
    ("jsonl", {"choices": ["yes", "no"]}, "row 1: answer must be one of yes, no, got answer='Paris'"),
]


@pytest.mark.parametrize(("name", "fields", "message"), BAD)
def test_bad_fields(make, name, fields, message):
    with pytest.raises(UserError) as error:
        make(name, **fields).sources()
    assert message in str(error.value)


BAD_ROWS = [
    ("glue", {"member": "cola"}, "CoLA/train.tsv", "a\t2\t\tx\n", "row 1: label must be one of 0, 1"),
    (
        "commonsense170k",
        {"member": "boolq"},
        "boolq/train.json",
        [{"instruction": "Answer format: true/false", "output": "", "answer": "maybe"}],
        "row 1: answer must be one of true, false, got answer='maybe'",
    ),
    ("math10k", {}, "math_10k.json", [{"instruction": "x"}], "row 1 must have the field 'answer', got instruction"),
    ("gsm8k", {}, "gsm8k/train.jsonl", '{"question": "x", "answer": "5"}', "answer must end in '#### <number>'"),
    ("convai2", {}, "train_self_original_no_cands.txt", "hello", "a line must start with its number"),
    (
        "convai2",
        {},
        "train_self_original_no_cands.txt",
        "1 your persona: i ski.",
        "train must hold an example, got none",
    ),
    (
        "glue",
        {"member": "stsb"},
        "STS-B/train.tsv",
        "sentence1\tsentence2\tscore\na\tb\t5.5",
        "row 1: score must be in [0, 5], got 5.5",
    ),
]
BAD_TEST_ROWS = [
    ("math10k", "AQuA/test.json", "answer must be A to E, got answer='F'"),
    ("math10k", "SVAMP/test.json", "answer must be a number, got answer='F'"),
    ("commonsense170k", "piqa/test.json", "answer must be one of solution1, solution2, got answer='F'"),
]


@pytest.mark.parametrize(("name", "path", "message"), BAD_TEST_ROWS)
def test_answers_outside_a_sets_range(make, tmp_path, name, path, message):
    row = {"instruction": "x? Answer format: solution1/solution2", "output": "", "answer": "F"}
    (tmp_path / path).parent.mkdir(parents=True)
    (tmp_path / path).write_text(json.dumps([row]))
    with pytest.raises(UserError) as error:
        make(name, data=str(tmp_path)).test()
    assert f"row 1: {message} in {tmp_path / path}" in str(error.value)


@pytest.mark.parametrize(("name", "fields", "path", "rows", "message"), BAD_ROWS)
def test_bad_rows_name_file_row_and_field(make, tmp_path, name, fields, path, rows, message):
    (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / path).write_text(rows if isinstance(rows, str) else json.dumps(rows))
    with pytest.raises(UserError) as error:
        make(name, data=str(tmp_path), **fields).train()
    assert message in str(error.value)
    assert str(tmp_path / path) in str(error.value)


NO_TEXT = {
    "null": "got {field}=null",
    "NaN": "got {field}=nan",
    "1e400": "got {field}=inf",
    "-Infinity": "got {field}=-inf",
    '["item"]': "got {field}=['item']",
    '{"a": 1}': "got {field}={{'a': 1}}",
    '"half \\ud83d"': "{field} must be whole characters",
}


FIELDS = ("q", "output", "input", "answer", "id")
MAY_BE_NULL = FIELDS[2:]


@pytest.mark.parametrize(
    ("field", "value"), [(f, v) for f in FIELDS for v in NO_TEXT if v != "null" or f not in MAY_BE_NULL]
)
def test_what_is_no_text_is_refused_by_file_row_and_field(make, tmp_path, field, value):
    row = {"q": '"x"', "output": '"y"', field: value}
    file = tmp_path / "own.jsonl"
    file.write_text('{"q": "a", "output": "b"}\n{' + ", ".join(f'"{k}": {v}' for k, v in row.items()) + "}\n")
    with pytest.raises(UserError) as error:
        make("jsonl", train=str(file), fields={"instruction": "q"}).train()
    message = str(error.value)
    assert message.startswith(f"task jsonl: row 2: {field} must be ")
    assert NO_TEXT[value].format(field=field) in message
    assert f" in {file}; " in message
    message.encode()


def test_numbers_and_truth_values_are_texts_as_json_writes_them(make, tmp_path):
    rows = '{"instruction": 12, "output": true, "input": 0.5, "answer": false, "id": 7}\n'
    (tmp_path / "own.jsonl").write_text(rows)
    (found,) = make("jsonl", train=str(tmp_path / "own.jsonl")).train()
    assert found == Example("7", "12", "true", "false", "0.5")


@pytest.mark.parametrize("value", ["true", '"true"'])
def test_choices_are_compared_as_the_file_writes_them(tmp_path, value):
    from highrank.config.words import compose_run

    (tmp_path / "own.jsonl").write_text(f'{{"instruction": "x", "output": {value}}}')
    for choices in ("[true,false]", "['true','false']"):
        run = compose_run(["task=jsonl", f"task.train={tmp_path / 'own.jsonl'}", f"task.choices={choices}"])
        assert run.task_cfg.choices == ["true", "false"]
        (found,) = run.task(run.task_cfg, 0).train()
        assert (found.answer, found.choices) == ("true", ("true", "false"))
    numbers = compose_run(["task=jsonl", "task.choices=[1,2.5,yes]"])
    assert numbers.task_cfg.choices == ["1", "2.5", "yes"]
    with pytest.raises(UserError, match=r"choices must be a text, or a number, true or false, got choices=null"):
        compose_run(["task=jsonl", "task.choices=[1,null]"])


PUBLISHED = [
    ("math10k", {}, "math_10k.json", {"instruction": None, "output": "", "answer": "1"}, "instruction"),
    ("math10k", {}, "math_10k.json", {"instruction": "x", "output": ["y"], "answer": "1"}, "output"),
    ("gsm8k", {}, "gsm8k/train.jsonl", {"question": None, "answer": "#### 1"}, "question"),
    ("metamath", {}, "MetaMathQA-395K.json", {"query": None, "response": "The answer is: 1"}, "query"),
    (
        "commonsense170k",
        {"member": "piqa"},
        "piqa/train.json",
        {"goal": None, "sol1": "", "sol2": "", "label": 0},
        "goal",
    ),
    ("commonsense170k", {"member": "boolq"}, "boolq/train.json", {"question": "x", "answer": None}, "answer"),
]


@pytest.mark.parametrize(("name", "fields", "path", "row", "field"), PUBLISHED)
def test_so_it_is_in_every_task(make, tmp_path, name, fields, path, row, field):
    (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / path).write_text(json.dumps([row] if path.endswith(".json") else row))
    with pytest.raises(UserError, match=rf"row 1: {field} must be a text, or a number, true or false, got {field}="):
        make(name, data=str(tmp_path), **fields).train()


def test_a_record_of_a_plugin_that_holds_no_text_is_refused(make, tmp_path, monkeypatch):
    from highrank.base.registry import load

    monkeypatch.setattr(load("tasks", "jsonl"), "record", lambda self, row, part, id: Example(id, row["a"], "y", "y"))
    (tmp_path / "own.jsonl").write_text('{"a": ["x"]}')
    with pytest.raises(UserError, match=r"row 1: instruction must be a text, or a number, true or false, got"):
        make("jsonl", train=str(tmp_path / "own.jsonl")).train()


def test_ids_are_distinct(make, tmp_path):
    rows = [{"id": "a", "instruction": "x", "output": "y"}] * 2
    (tmp_path / "own.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(UserError, match="ids must be distinct, got 'a' twice"):
        make("jsonl", train=str(tmp_path / "own.jsonl")).train()


REAL = {  # published sizes, wherever the file is there
    ("glue", "cola"): (8_551, {"cola": 1_043}),
    ("glue", "sst2"): (67_349, {"sst2": 872}),
    ("glue", "mrpc"): (3_668, {"mrpc": 408}),
    ("glue", "stsb"): (5_749, {"stsb": 1_500}),
    ("glue", "rte"): (2_490, {"rte": 277}),
    ("commonsense170k", "boolq"): (9_427, {"boolq": 3_270, "piqa": 1_838, "siqa": 1_954, "hellaswag": 10_042}),
    ("commonsense170k", "arc_e"): (2_251, {"arc_e": 2_376, "winogrande": 1_267, "obqa": 500}),
    ("gsm8k", None): (7_473, {"gsm8k": 1_319}),
}


@pytest.mark.skipif("HIGHRANK_DATA" not in os.environ, reason="HIGHRANK_DATA names no folder with the real files")
@pytest.mark.parametrize(("name", "member"), REAL)
def test_published_sizes(name, member):
    num_train, sets = REAL[name, member]
    cls = load("tasks", name)
    fields = ({"member": member} if member else {}) | ({"sets": list(sets)} if name == "commonsense170k" else {})
    task = cls(cls.config(**fields), 0)
    try:
        assert len(task.train()) == num_train == task.num_train
        assert {set_name: len(rows) for set_name, rows in task.test().items()} == sets
    except MissingData as error:
        pytest.skip(str(error))


EVERY = [("glue", {"member": m}) for m in GLUE]
EVERY += [
    ("math10k", {"train_set": "parts", "sets": ["addsub", "singleeq", "gsm8k", "aqua", "multiarith", "svamp", "mawps"]})
]
EVERY += [(name, {}) for name in ("commonsense170k", "gsm8k", "metamath", "convai2")]
PARTIAL = {
    ("train", "winogrande"): "XL alone of six sizes",
    ("train", "aqua-train"): "dev in place of 1,000 train rows",
}


@pytest.mark.skipif("HIGHRANK_DATA" not in os.environ, reason="HIGHRANK_DATA names no folder with the real files")
@pytest.mark.parametrize(("name", "fields"), EVERY)
def test_every_file_that_is_there_has_its_published_size(name, fields):
    cls = load("tasks", name)
    task = cls(cls.config(**fields), 0)
    parts = [("train", *item) for item in task.train_parts().items()] + [
        ("test", *i) for i in task.test_parts().items()
    ]
    present = [(split, part, source) for split, part, source in parts if task.has_file(source)]
    if not present:
        pytest.skip(f"no file of {name} {fields}")
    for split, part, source in present:
        if (split, part) in PARTIAL:
            with pytest.raises(UserError, match="must have its published"):
                task.load(source, part)
        else:
            assert len(task.load(source, part)) == (source.rows or 0)


@pytest.mark.skipif("HIGHRANK_DATA" not in os.environ, reason="HIGHRANK_DATA names no folder with the real files")
def test_known_leaks_of_mawps():
    """What LLM-Adapters' MAWPS train file shares with the tests of math10k, as its authors warn."""
    cls = load("tasks", "math10k")
    task = cls(cls.config(train_set="parts", allow_partial=True, sets=[*KNOWN_LEAKS]), 0)
    seen = leak.questions(task.train())
    for name, examples in task.test().items():
        assert (sum(leak.found(examples, seen)), len(examples)) == KNOWN_LEAKS[name]


KNOWN_LEAKS = {
    "addsub": (327, 395),
    "singleeq": (416, 508),
    "multiarith": (452, 600),
    "mawps": (28, 238),
    "svamp": (0, 1_000),
    "gsm8k": (0, 1_319),
    "aqua": (0, 254),
}
