"""Prompt tuning: trained embeddings in front of every sequence.

    E' = [P; E]

| symbol | shape  | start                                                        | trained |
| ------ | ------ | ------------------------------------------------------------ | ------- |
| E      | (T, d) | the tokens' embeddings                                       | no      |
| P      | (p, d) | N(0, 1), p tokens of the vocabulary, or a text repeated to p | yes     |

Trainable: p d for the whole model. The output differs from the base's at the start, and there is no merged weight.

Source: Lester et al., "The Power of Scale for Parameter-Efficient Prompt Tuning", arXiv 2104.08691, section 2 (and 3.2
for the starts).
Reference code: huggingface/peft 0.21, tuners/prompt_tuning/model.py (embedding.weight = P).
N(0, 1) is that code's default and far larger than a language model's embeddings: sample_vocab starts within their scale.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from highrank.plugin import PeftForm, UserError, VirtualTokens, register_method

STARTS = ("random", "sample_vocab", "text")


@dataclass(frozen=True, kw_only=True)
class PromptTuningConfig:
    num_virtual_tokens: int = 20
    """p, trained positions in front of the sequence."""
    start: str = "random"
    """Start of P: random, sample_vocab or text."""
    start_text: str | None = None
    """The text for start=text; its tokens are repeated, or cut, to p."""

    def __post_init__(self) -> None:
        if self.num_virtual_tokens < 1:
            raise UserError(
                f"prompt_tuning: num_virtual_tokens must be >= 1, got num_virtual_tokens={self.num_virtual_tokens}"
            )
        if self.start not in STARTS:
            raise UserError(f"prompt_tuning: start is one of {', '.join(STARTS)}, got start={self.start}")
        if (self.start == "text") != bool(self.start_text):
            raise UserError(
                f"prompt_tuning: start_text goes with start=text, got start={self.start}, start_text={self.start_text!r}"
            )


@register_method(config=PromptTuningConfig)
class PromptTuning(VirtualTokens):
    examples = ({"num_virtual_tokens": 3}, {"start": "sample_vocab"}, {"start": "text", "start_text": "Answer:"})
    peft = PeftForm(
        type="PROMPT_TUNING",
        fields={"num_virtual_tokens": "num_virtual_tokens"},
        ignored=("prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs"),
        also_reads=("P_TUNING",),
    )

    def __init__(self, model: Any, cfg: PromptTuningConfig):
        super().__init__(model, cfg)
        self.P = nn.Parameter(torch.empty(cfg.num_virtual_tokens, model.get_input_embeddings().embedding_dim))

    def reset_parameters(self, model: Any, tokenizer: Any) -> None:
        if self.cfg.start == "random":
            nn.init.normal_(self.P)
            return
        table = model.get_input_embeddings().weight
        if self.cfg.start == "sample_vocab":
            chosen = torch.randint(len(table), (len(self.P),))
        else:
            if tokenizer is None:
                raise UserError("prompt_tuning: start=text needs the model's tokenizer, got tokenizer=None")
            text = torch.tensor(tokenizer(self.cfg.start_text).input_ids)
            chosen = text[torch.arange(len(self.P)) % len(text)]
        with torch.no_grad():
            self.P.copy_(table[chosen.to(table.device)])

    def embeddings(self) -> Tensor:
        return self.P

    @classmethod
    def num_trainable(cls, model: Any, cfg: PromptTuningConfig) -> int:
        return cfg.num_virtual_tokens * model.get_input_embeddings().embedding_dim
