"""Answer rules: from a generated text to the answer that it gives, and whether that answer is right.

A rule is a pair of pure readers, one for questions with fixed choices ("true", "answer3", "B") and one for questions
with a number, and its own idea of when two numbers are equal. Rules named after a protocol read as its published
scorer does, flaws included; `strict` reads only an answer that the text states as one. Both are always reported.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

NUMBER = r"-?\d[\d,]*(?:\.\d+)?(?:/\d+)?"


def first_choice(text: str, choices: Sequence[str]) -> str | None:
    """Returns the choice that occurs first, wherever and inside whatever word: "not true" reads as true, "Bob" as B.

    Source: LLM-Adapters `commonsense_evaluate.py` and `evaluate.py`, HiRA's evaluation.
    """
    match = re.search("|".join(map(re.escape, choices)), text)
    return match[0] if match else None


def stated_choice(text: str, choices: Sequence[str]) -> str | None:
    """Returns the choice after the last "answer is", or the choice that is the whole text."""
    letters = all(len(choice) == 1 for choice in choices)
    flags = 0 if letters else re.IGNORECASE
    options = "|".join(map(re.escape, choices))
    stated = re.findall(rf"(?:[Aa]nswer is)[^\w]{{0,4}}({options})\b", text, flags)
    alone = re.fullmatch(rf"\W*({options})\W*", text, flags)
    answer = stated[-1] if stated else alone[1] if alone else None
    return answer if answer is None or letters else next(c for c in choices if c.lower() == answer.lower())


def last_number(text: str) -> str | None:
    """Returns the last number, commas deleted beforehand: "5-4" ends in -4, "1/3" in 3, "at 10:30" in 30.

    Source: LLM-Adapters `evaluate.py`.
    """
    numbers = re.findall(r"-?\d+\.?\d*", text.replace(",", ""))
    return numbers[-1] if numbers else None


def stated_number(text: str) -> str | None:
    """Returns the number after the last "answer is" or "####", or the number that is the whole text; no commas."""
    stated = re.findall(rf"(?:[Aa]nswer is|####)[^\w-]{{0,4}}({NUMBER})", text)
    alone = re.fullmatch(rf"[^\w-]*({NUMBER})\W*", text)
    number = stated[-1] if stated else alone[1] if alone else None
    return None if number is None else number.replace(",", "")


def number_after_colon(text: str) -> str | None:
    """Returns the first number after the last "The answer is: "; of "1,234,567" only "1,234".

    Source: the GSM8K scorer of HiRA's repository.
    """
    _, marker, rest = text.rpartition("The answer is: ")
    match = re.search(r"[\-+]?\d*[\.,/]?\d+", rest) if marker else None
    return None if match is None else match[0].replace(",", "")


def number_after_delimiter(text: str) -> str | None:
    """Returns what follows the last of the first delimiter that occurs, if that is nothing but a number.

    Source: the MetaMathQA benchmark of PEFT's method comparison.
    """
    for delimiter in ("The answer is: ", "The answer is ", "#### "):
        if delimiter in text:
            rest = text.rpartition(delimiter)[2].strip(" .!?$%\n").replace(",", "")
            return rest if value(rest) is not None else None
    return None


def last_digits(text: str) -> str | None:
    """Returns the last run of digits: "3.50" ends in 50, "1,234" in 234, "-7" in 7.

    Source: the second number that the GSM8K scorer of HiRA's repository reports.
    """
    runs = re.findall(r"\d+", text)
    return runs[-1] if runs else None


def value(text: str) -> Fraction | None:
    """Returns an integer, decimal or fraction as an exact number, else None."""
    try:
        return Fraction(text.replace(",", "").strip())
    except (ValueError, ZeroDivisionError):
        return None


def within_thousandth(answer: str, gold: str) -> bool:
    """Whether the numbers differ by at most 0.001."""
    return abs(float(answer) - float(value(gold) or 0)) <= 0.001


def equal_rounded(answer: str, gold: str) -> bool:
    """Whether the answer, rounded to an integer (halves to even), is the gold number: 3.5 counts as 4, 12.50 as 12."""
    number = value(answer)
    return number is not None and round(number) == value(gold)


def equal_value(answer: str, gold: str) -> bool:
    """Whether the numbers are equal, or the answer is the gold number rounded to the decimals shown, at least two."""
    number, wanted = value(answer), value(gold)
    if number is None or wanted is None:
        return False
    decimals = len(answer.partition(".")[2])
    return abs(number - wanted) <= Fraction(1, 10**6) or (decimals >= 2 and number == round(wanted, decimals))


def equal_digits(answer: str, gold: str) -> bool:
    """Whether the digits are those in which the gold number ends, written without commas or a fraction of zero."""
    return answer == last_digits(re.sub(r"\.0+$", "", gold.replace(",", "")))


@dataclass(frozen=True)
class Rule:
    """How one scorer reads answers."""

    choice: Callable[[str, Sequence[str]], str | None]
    number: Callable[[str], str | None]
    equal: Callable[[str, str], bool]

    def judge(self, text: str, gold: str, choices: Sequence[str] = ()) -> tuple[str | None, bool]:
        """Returns the answer in a text, None if there is none, and whether it is right.

        With `choices` it is one of them; otherwise a number if `gold` is one, else the text itself.
        """
        if choices:
            answer = self.choice(text, choices)
            return answer, answer == gold
        if value(gold) is None:
            answer = text.strip() or None
            return answer, answer is not None and answer.rstrip(".").casefold() == gold.strip().rstrip(".").casefold()
        answer = self.number(text)
        return answer, answer is not None and self.equal(answer, gold)


def judge_all(text: str, answers: Sequence[str]) -> tuple[list[str] | None, bool]:
    """Returns the words and numbers of a text without regard to case, None if it has none, and whether they are all of the
    answers and nothing else, in any order. "and" between them is none of them."""
    listed = [word for word in re.findall(r"[^\s,;.]+", text.casefold()) if word != "and"]
    return listed or None, sorted(listed) == sorted(answer.casefold() for answer in answers)


RULES = {
    "strict": Rule(stated_choice, stated_number, equal_value),
    "llm_adapters": Rule(first_choice, last_number, within_thousandth),
    "hira": Rule(first_choice, number_after_colon, equal_rounded),
    "hira_last_digits": Rule(first_choice, last_digits, equal_digits),
    "peft_metamath": Rule(stated_choice, number_after_delimiter, equal_value),
}


def reported(primary: str, chooses: bool = False) -> tuple[str, ...]:
    """Returns the rule of a protocol and those reported beside it: strict, or beside strict the published one; HiRA's
    scorer has a second one of its own, for numbers, so not where `chooses`, where the answer is one of some choices."""
    second = ("hira_last_digits",) if primary == "hira" and not chooses else ()
    return (primary, *second, "llm_adapters" if primary == "strict" else "strict")


SECONDARY = ("_clean", *(f"_{rule}" for rule in RULES))
"""How the names of metrics end that are not the headline rule's over the whole set."""
COUNTS = ("n", "leaked", "cut", "not_finite", "loss_left_out", "loss_cut", "loss_not_finite")
"""Metrics of a test set that count examples."""
