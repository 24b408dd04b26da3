"""Hand-made rows in every layout that people have, written as a data folder."""

import gzip
import json

import pytest


def _write(file, text):
    file.parent.mkdir(parents=True, exist_ok=True)
    raw = text.encode()
    file.write_bytes(gzip.compress(raw) if file.suffix == ".gz" else raw)


def choose(question, options, answer):
    listed = " ".join(f"{o.capitalize()}: thing {o[-1]}" for o in options)
    instruction = f"Please choose: {question}\n\n{listed}\n\nAnswer format: {'/'.join(options)}"
    return {"instruction": instruction, "input": "", "output": f"the correct answer is {answer}", "answer": answer}


def boolean(question, answer):
    text = (
        f"Please answer the following question with true or false, question: {question}?\n\nAnswer format: true/false"
    )
    return {"instruction": text, "input": "", "output": f"the correct answer is {answer}", "answer": answer}


def problem(question, answer):
    return {"instruction": question, "input": "", "output": "a model's rationale. The answer is 0.", "answer": answer}


COMMONSENSE = {
    "boolq": ("", 0),
    "piqa": ("solution", 2),
    "social_i_qa": ("answer", 3),
    "hellaswag": ("ending", 4),
    "winogrande": ("option", 2),
    "ARC-Easy": ("answer", 4),
    "ARC-Challenge": ("answer", 5),
    "openbookqa": ("answer", 4),
}
GSM8K = [
    {"question": "Tom has 4 bags of 3. How many?", "answer": "He has 4*3 = <<4*3=12>>12.\n#### 12"},
    {"question": "Ann had $1,200 and spent $200. How much is left?", "answer": "1,200-200 = 1,000.\n#### 1,000"},
    {"question": "Half of 7?", "answer": "7/2 = 3.5.\n#### 3.5"},
]
PERSONA = """1 your persona: i read twenty books a year.
2 your persona: i like cats.
3 hello, how are you?\ti am well.
4 what do you do?\ti read.
1 your persona: i ski.
2 hi\thello
"""


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A data folder with a few rows of every set."""
    root = tmp_path_factory.mktemp("data")
    for name, (word, n) in COMMONSENSE.items():
        for split in ("train", "test"):
            options = [f"{word}{i + 1}" for i in range(n)]
            rows = [
                choose(f"{split} {name} {i}", options, options[i % n]) if n else boolean(f"{split} {i}", "true")
                for i in range(4)
            ]
            _write(root / "commonsense" / name / f"{split}.json.gz", json.dumps(rows))
    for name in ("AddSub", "SingleEq", "MultiArith", "SVAMP", "mawps"):
        _write(root / "arithmetic" / name / "test.json", json.dumps([problem(f"{name} 1 + 1?", "2.0")]))
    leaked = problem("Half  of 7 ?", "3.5")
    _write(root / "arithmetic/gsm8k/test.json", json.dumps([problem("6 / 2?", "3.0"), leaked]))
    aqua = "2 + 2? Answer Choices: (A) 4 (B) 5 (C) 6 (D) 7 (E) 8"
    _write(root / "arithmetic/AQuA/test.json", json.dumps([problem(aqua, "A")]))
    lines = "\r\n".join(json.dumps(row) for row in GSM8K)
    _write(root / "arithmetic/gsm8k/train.jsonl.gz", f"\ufeff{lines}\r\n")  # with a BOM and CRLF
    mawps = {"original_text": "MAWPS asks 1 + 1 ?", "equation": "X=(1.0+1.0)", "ans": 2.0}
    _write(root / "arithmetic/mawps/trainset.json", json.dumps([mawps]))
    dev = {"question": "3 + 1?", "options": ["A)4", "B)5"], "rationale": "3+1=4", "correct": "A"}
    _write(root / "arithmetic/AQuA/dev.jsonl", json.dumps(dev))
    _write(root / "math_10k.json", json.dumps([problem("5 + 5?", "10"), problem("Half of 7?", "3.5")]))
    meta = {"query": "What is 2 + 3?", "response": "2 + 3 = 5. The answer is: 5", "type": "x", "original_question": "y"}
    _write(root / "MetaMathQA-395K.json", json.dumps([meta]))
    for split in ("train", "valid"):
        _write(root / "convai2" / f"{split}_self_original_no_cands.txt", PERSONA)
    tsv = {
        "CoLA": (None, ["gj04\t1\t\tThe sailors rode.", 'gj04\t0\t*\tThe "sailors rode the.']),
        "SST-2": ("sentence\tlabel", ["fine film \t1", "dull film \t0"]),
        "MRPC": ("Quality\t#1 ID\t#2 ID\t#1 String\t#2 String", ["1\t1\t2\tA b .\tB a .", "0\t3\t4\tA .\tC ."]),
        "STS-B": (
            "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore",
            ["0\tm\tf\ty\t1\tn\tn\tA.\tB.\t5.000", "1\tm\tf\ty\t1\tn\tn\tA.\tC.\t0.500"],
        ),
        "QNLI": ("index\tquestion\tsentence\tlabel", ["0\tQ?\tS.\tentailment", "1\tQ?\tT.\tnot_entailment"]),
        "RTE": ("index\tsentence1\tsentence2\tlabel", ["0\tA.\tB.\tnot_entailment", "1\tA.\tC.\tentailment"]),
        "QQP": ("id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate", ["0\t1\t2\tA?\tB?\t1", "1\t3\t4\tA?\tC?\t0"]),
        "MNLI": ("index\tsentence1\tsentence2\tgold_label", ["0\tA.\tB.\tneutral", "1\tA.\tC.\tcontradiction"]),
    }
    for name, (header, rows) in tsv.items():
        for split in ("train", *(("dev_matched", "dev_mismatched") if name == "MNLI" else ("dev",))):
            _write(root / "glue" / name / f"{split}.tsv", "\n".join([*([header] if header else []), *rows]) + "\n")
    rows = [{"instruction": "Name it.", "input": "The capital of France.", "output": "Paris"}]
    _write(root / "own.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    return root


@pytest.fixture
def make(folder):
    """Returns a function that builds a task over the folder: make("glue", member="rte")."""
    from highrank.base.registry import load

    def build(name, **fields):
        cls = load("tasks", name)
        if name == "jsonl":
            fields = {"train": str(folder / "own.jsonl"), "test": str(folder / "own.jsonl"), **fields}
        elif name not in ("wordmath", "ruler", "images"):
            fields = {"data": str(folder), "allow_partial": True, **fields}
        return cls(cls.config(**fields), seed=0)

    return build
