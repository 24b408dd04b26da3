"""metamath: trained on MetaMathQA, tested on GSM8K.

Source: Yu et al. 2023 (arXiv 2309.12284), `meta-math/MetaMathQA` on the Hub, MIT; 395,000 rows with query, response, type
and original_question, made from the train sets of GSM8K and MATH. Test: see gsm8k.
File: `MetaMathQA-395K.json` (or MetaMathQA.json, .jsonl, .parquet).
One record: "If Billy has 4 marbles and buys twice as many, how many has he?" -> "Billy buys 2*4 = 8 marbles. ... The answer
is: 12".
Metric: accuracy in percent on GSM8K's 1,319 problems. HiRA's Table 3 prints 70.81 for Llama-3-8B, r=32 (LoRA 65.89).
"""

from collections.abc import Mapping
from typing import Any

from highrank.registry import load, register_task
from highrank.sources import Source
from highrank.task import DataConfig, Example, FileTask

GET = "the file is on the Hub at meta-math/MetaMathQA"
NAMES = ("MetaMathQA-395K.json", "MetaMathQA.json", "MetaMathQA.jsonl", "MetaMathQA.parquet")


@register_task(config=DataConfig)
class MetaMath(FileTask):
    kind = "generate"
    family = "math"
    version = 1
    max_new_tokens = 256

    def __init__(self, cfg: DataConfig, seed: int):
        super().__init__(cfg, seed)
        self.gsm8k: Any = load("tasks", "gsm8k")(cfg, seed)

    def train_parts(self) -> Mapping[str, Source]:
        return {"train": Source(NAMES, GET, 395_000, hub="meta-math/MetaMathQA")}

    def test_parts(self) -> Mapping[str, Source]:
        return self.gsm8k.test_parts()

    def record(self, row: Any, part: str, id: str) -> Example:
        if part == "gsm8k":
            return self.gsm8k.record(row, part, id)
        answer = row["response"].rpartition("The answer is: ")[2].strip()
        return Example(id, row["query"], row["response"], answer)
