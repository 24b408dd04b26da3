"""Answer rules on strings that trip scorers."""

import pytest

from highrank.data.answers import RULES, reported

BOOL, ENDINGS, LETTERS = ("true", "false"), ("ending1", "ending2", "ending3", "ending4"), tuple("ABCDE")
CHOICES = [
    # text, choices, llm_adapters reads, strict reads
    ("the correct answer is true", BOOL, "true", "true"),
    ("The correct answer is: True.", BOOL, None, "true"),
    ("true", BOOL, "true", "true"),
    ("not true", BOOL, "true", None),
    ("It is untrue, so the correct answer is false", BOOL, "true", "false"),
    ("the correct answer is not false", BOOL, "false", None),
    ("the answer is true or false? the answer is false", BOOL, "true", "false"),
    ("ending3", ENDINGS, "ending3", "ending3"),
    ("the correct answer is ending12", ENDINGS, "ending1", None),
    ("Ending2", ENDINGS, None, "ending2"),
    ("", ENDINGS, None, None),
    ("The answer is (C).", LETTERS, "C", "C"),
    ("Answer: B", LETTERS, "A", None),
    ("Bob has 3. The answer is (D).", LETTERS, "B", "D"),
    ("Each costs 2. The answer is A. Now the answer is B", LETTERS, "E", "B"),
    ("the answer is a secret", LETTERS, None, None),
    ("(E)", LETTERS, "E", "E"),
]
NUMBERS = [
    # text, gold, (llm_adapters reads, right), (strict reads, right)
    ("4 + 5 = 9. The answer is 9.", "9", ("9.", True), ("9", True)),
    ("The answer is 9. Then 2 more.", "9.0", ("2", False), ("9", True)),
    ("The answer is $1,234.50", "1234.5", ("1234.50", True), ("1234.50", True)),
    ("5-4", "1", ("-4", False), (None, False)),
    ("The answer is 1/3", "0.3333333333333333", ("3", False), ("1/3", True)),
    ("The answer is 1.83", "1.8333333333333335", ("1.83", False), ("1.83", True)),
    ("The answer is 1.8", "1.8333333333333335", ("1.8", False), ("1.8", False)),
    ("The answer is 8.0005", "8", ("8.0005", True), ("8.0005", False)),
    ("at 10:30", "10", ("30", False), (None, False)),
    ("#### -7", "-7", ("-7", True), ("-7", True)),
    ("The answer is **12**.", "12", ("12", True), ("12", True)),
    ("72", "72.0", ("72", True), ("72", True)),
    ("it is 12 m^2", "12", ("2", False), (None, False)),
    ("no idea", "3", (None, False), (None, False)),
    ("The answer is 1/0", "0", ("0", True), ("1/0", False)),
]
HIRA = [
    ("so The answer is: 18", "18", ("18", True)),
    ("The answer is 18", "18", (None, False)),
    ("The answer is: 5 The answer is: 6", "6", ("6", True)),
    ("The answer is: 1,234,567", "1234567", ("1234", False)),
    ("The answer is: 3.5", "4", ("3.5", True)),
    ("The answer is: 12.50", "12", ("12.50", True)),
    ("The answer is: 6/2", "3", ("6/2", True)),
    ("The answer is: none", "3", (None, False)),
]
HIRA_DIGITS = [
    ("12 and then 18", "18.0", ("18", True)),
    ("The answer is: 18 in 3 steps", "18", ("3", False)),
    ("1,234", "1,234", ("234", False)),
    ("1234", "1,234", ("1234", True)),
    ("-7", "7", ("7", True)),
    ("3.50", "3.5", ("50", False)),
    ("3.5", "3.5", ("5", True)),
    ("none", "3", (None, False)),
]
PEFT = [
    ("The answer is: 18.", "18", ("18", True)),
    ("The answer is $1,200", "1200", ("1200", True)),
    ("#### 1/2", "0.5", ("1/2", True)),
    ("The answer is: 18 apples", "18", (None, False)),
    ("18", "18", (None, False)),
]


@pytest.mark.parametrize(("text", "choices", "faithful", "strict"), CHOICES)
def test_choices(text, choices, faithful, strict):
    for rule, expected in (("llm_adapters", faithful), ("hira", faithful), ("strict", strict)):
        for gold in choices:
            assert RULES[rule].judge(text, gold, choices) == (expected, expected == gold)


@pytest.mark.parametrize(("text", "gold", "faithful", "strict"), NUMBERS)
def test_numbers(text, gold, faithful, strict):
    assert RULES["llm_adapters"].judge(text, gold) == faithful
    assert RULES["strict"].judge(text, gold) == strict


@pytest.mark.parametrize(
    ("rule", "text", "gold", "expected"),
    [
        *(("hira", *case) for case in HIRA),
        *(("hira_last_digits", *case) for case in HIRA_DIGITS),
        *(("peft_metamath", *case) for case in PEFT),
    ],
)
def test_numbers_of_one_protocol(rule, text, gold, expected):
    assert RULES[rule].judge(text, gold) == expected


def test_a_text_is_compared_as_a_whole():
    assert RULES["strict"].judge(" Paris. ", "paris") == ("Paris.", True)
    assert RULES["strict"].judge("  ", "paris") == (None, False)


def test_strict_is_reported_beside_every_other_rule():
    assert reported("hira", chooses=True) == ("hira", "strict")
    assert reported("hira") == ("hira", "hira_last_digits", "strict")  # its scorer reports two numbers for a number
    assert reported("strict") == ("strict", "llm_adapters")
