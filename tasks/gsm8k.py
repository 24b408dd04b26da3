"""gsm8k: grade-school word problems with people's worked answers, on their own train set.

Source: Cobbe et al. 2021 (arXiv 2110.14168), github.com/openai/grade-school-math, MIT; train 7,473, test 1,319.
Files: `gsm8k/train.jsonl` and `test.jsonl` with question, answer; parquet; or `openai/gsm8k` on the Hub. LLM-Adapters'
`gsm8k/test.json` (same questions in another order) will do for the test.
One record: "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May. How many clips
did Natalia sell altogether in April and May?" -> "Natalia sold 48/2 = 24 clips in May.\\nNatalia sold 48+24 = 72 clips
altogether in April and May.\\nThe answer is: 72". The calculator marks <<48/2=24>> are taken out, and the original's
last line "#### 72" says "The answer is: 72", which every answer rule reads.
Metric: accuracy in percent. PEFT's method comparison (MetaMathQA, Llama-3.2-3B) prints 51.3 for HiRA r=32, 47.8 for LoRA.
"""

import re
from collections.abc import Mapping
from typing import Any

from highrank.data.answers import value
from highrank.plugin import DataConfig, Example, FileTask, Source, register_task, text_of

GET = "the files are in github.com/openai/grade-school-math under grade_school_math/data"
TRAIN = Source(("gsm8k/train.jsonl", "gsm8k/train.parquet"), GET, 7_473, hub="openai/gsm8k:main")
TEST = Source(
    ("gsm8k/test.jsonl", "gsm8k/test.parquet", "gsm8k/test.json"), GET, 1_319, hub="openai/gsm8k:main", split="test"
)


def gsm8k_record(row: Mapping[str, Any], record_id: str) -> Example:
    """Returns one problem, from the original's fields or LLM-Adapters'.

    Raises:
        ValueError: if the answer is no number.
    """
    if "instruction" in row:
        question, output, answer = (text_of(row, name) for name in ("instruction", "output", "answer"))
    else:
        steps, marker, answer = text_of(row, "answer").rpartition("#### ")
        if not marker:
            raise ValueError("answer must end in '#### <number>'")
        question, answer = text_of(row, "question"), answer.strip().replace(",", "")
        output = re.sub(r"<<.*?>>", "", steps).strip() + f"\nThe answer is: {answer}"
    if value(answer) is None:
        raise ValueError(f"answer must be a number, got answer={answer!r}")
    return Example(record_id, question, output, answer)


@register_task(config=DataConfig)
class GSM8K(FileTask):
    kind = "generate"
    family = "math"
    version = 1
    folders = ("", "dataset", "ft-training_set", "arithmetic")
    max_new_tokens = 256

    def train_parts(self) -> Mapping[str, Source]:
        return {"train": TRAIN}

    def test_parts(self) -> Mapping[str, Source]:
        return {"gsm8k": TEST}

    def record(self, row: Any, part: str, record_id: str) -> Example:
        return gsm8k_record(row, record_id)
