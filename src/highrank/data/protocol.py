"""A protocol: every choice of how examples become tokens and outputs become scores, as one hashed value."""

import dataclasses

from highrank.base.errors import UserError
from highrank.base.files import digest
from highrank.data.answers import RULES


@dataclasses.dataclass(frozen=True)
class Protocol:
    """How examples become tokens and outputs become answers; a YAML in configs/protocol is one instance.

    A YAML may hold `families: {math: {max_length: 512}, ...}`: values for tasks of one family. What is given outside
    `families` (in the file or on the command line) wins.
    """

    name: str
    version: int
    """Raised whenever the tokens, the decoding or the answer rule change."""
    template: str
    """Prompt with {instruction}; the target follows directly."""
    template_with_input: str | None = None
    """Prompt with {instruction} and {input}, for examples that have one; default: both as one instruction."""
    eval_template: str | None = None
    """Prompt in evaluation; default: as in training."""
    eval_template_with_input: str | None = None
    eos: bool = True
    """Whether targets end in the end-of-text token and train on it."""
    bos: bool = True
    """Whether the tokenizer's own special tokens open the prompt."""
    eval_bos: bool | None = None
    """The same in evaluation; default: as in training."""
    joint: bool = False
    """Whether prompt and target are tokenised as one text, so that a token may span the border."""
    mask_prompt: bool = True
    """Whether the loss covers target tokens only."""
    max_length: int = 512
    """Most tokens of prompt and target in training; evaluation prompts are never cut."""
    max_target_length: int | None = None
    """Most tokens of the target; then max_length is the prompt's alone."""
    too_long: str = "drop"
    """drop: longer examples are left out of training; cut: their last tokens are. Both are counted."""
    max_new_tokens: int | None = None
    """Longest output in tokens; default: the task's own."""
    do_sample: bool = False
    """Whether outputs are sampled; temperature, top_p and top_k apply only then."""
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    """Tokens to sample from; 0 for all."""
    num_beams: int = 1
    """Beams of the search; 1 is greedy."""
    length_penalty: float = 1.0
    """Exponent of the length by which beam scores are divided."""
    no_repeat_ngram: int = 0
    """Size of the n-grams that may not occur twice in an output; 0 allows all."""
    stop: list[str] = dataclasses.field(default_factory=list)
    """Texts at which an output is cut."""
    choose: str = "generate"
    """How questions with choices are answered: generate, or likelihood (the target with the highest log-probability)."""
    answer_rule: str = "strict"
    """How outputs are read for the headline accuracy; a second rule is always reported beside it."""
    num_validation: int = 0
    """Training examples held out for validation, never test examples."""
    validation_seed: int = 0
    """Draws them."""
    selection: str = "last"
    """Which weights are evaluated: last, or best (lowest validation loss)."""
    validate_every: int = 80
    """Optimizer steps between validations."""

    def __post_init__(self) -> None:
        def need(ok: bool, key: str, rule: str) -> None:
            if not ok:
                raise UserError(f"protocol {self.name}: {key} {rule}, got {key}={getattr(self, key)!r}")

        for key in ("template", "eval_template"):
            need("{instruction}" in (getattr(self, key) or self.template), key, "needs {instruction}")
        for key in ("template_with_input", "eval_template_with_input"):
            text = getattr(self, key)
            need(
                text is None or ("{instruction}" in text and "{input}" in text), key, "needs {instruction} and {input}"
            )
        for key in ("max_length", "num_beams", "validate_every"):
            need(getattr(self, key) >= 1, key, "must be >= 1")
        for key in ("max_target_length", "max_new_tokens"):
            need(getattr(self, key) is None or getattr(self, key) >= 1, key, "must be >= 1")
        for key in ("top_k", "no_repeat_ngram", "num_validation"):
            need(getattr(self, key) >= 0, key, "must be >= 0")
        need(self.temperature > 0, "temperature", "must be > 0")
        need(0 < self.top_p <= 1, "top_p", "must be in (0, 1]")
        need(self.too_long in ("drop", "cut"), "too_long", "is drop or cut")
        need(self.choose in ("generate", "likelihood"), "choose", "is generate or likelihood")
        need(self.selection in ("last", "best"), "selection", "is last or best")
        need(self.selection == "last" or self.num_validation > 0, "num_validation", "must be >= 1 for selection=best")
        need(self.answer_rule in RULES, "answer_rule", f"is one of {', '.join(RULES)}")

    @property
    def hash(self) -> str:
        return digest(dataclasses.asdict(self))
