"""metamath: trained on MetaMathQA, tested on GSM8K.

Source: Yu et al. 2023 (arXiv 2309.12284), `meta-math/MetaMathQA` on the Hub, MIT; 395,000 rows with query, response, type
and original_question, made from the train sets of GSM8K and MATH. Test: see gsm8k.
File: `MetaMathQA-395K.json` (or MetaMathQA.json, .jsonl, .parquet).
One record: "If Billy has 4 marbles and buys twice as many, how many has he?" -> "Billy buys 2*4 = 8 marbles. ... The answer
is: 12".
With `task.max_chars=1300` training leaves out longer problems, as PEFT's method comparison does.
Metric: accuracy in percent on GSM8K's 1,319 problems. HiRA's Table 3 prints 70.81 for Llama-3-8B, r=32 (LoRA 65.89).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from highrank.plugin import DataConfig, Example, FileTask, Source, UserError, load, register_task, text_of

GET = "the file is on the Hub at meta-math/MetaMathQA"
NAMES = ("MetaMathQA-395K.json", "MetaMathQA.json", "MetaMathQA.jsonl", "MetaMathQA.parquet")


@dataclass(frozen=True, kw_only=True)
class MetaMathConfig(DataConfig):
    max_chars: int | None = None
    """Longest training example, in characters of query and response with a space between; longer ones are left out."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_chars is not None and self.max_chars < 1:
            raise UserError(f"task metamath: max_chars must be >= 1, got max_chars={self.max_chars}")


@register_task(config=MetaMathConfig)
class MetaMath(FileTask):
    kind = "generate"
    family = "math"
    version = 1
    folders = ("", "dataset", "arithmetic", "metamath")
    max_new_tokens = 256

    def __init__(self, cfg: MetaMathConfig, seed: int):
        super().__init__(cfg, seed)
        self.gsm8k: Any = load("tasks", "gsm8k")(cfg, seed)

    def train_parts(self) -> Mapping[str, Source]:
        return {"train": Source(NAMES, GET, 395_000, hub="meta-math/MetaMathQA")}

    def test_parts(self) -> Mapping[str, Source]:
        return self.gsm8k.test_parts()

    def wanted(self, example: Example) -> bool:
        limit = self.cfg.max_chars
        return limit is None or len(f"{example.instruction} {example.output}") <= limit

    def record(self, row: Any, part: str, record_id: str) -> Example:
        if part == "gsm8k":
            return self.gsm8k.record(row, part, record_id)
        query, response = text_of(row, "query"), text_of(row, "response")
        return Example(record_id, query, response, response.rpartition("The answer is: ")[2].strip())
