"""Which domain a problem belongs to, and domains of users."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest

from compact.answers import (
    DOMAINS,
    Choice,
    Date,
    Domain,
    domain_names,
    find_domain,
    get_domain,
    register_domain,
)
from compact.answers.base import unified

OPTIONS = "Which?\n(A) 12\n(B) yes\n(C) 05/01/2020"


@pytest.mark.parametrize(
    ("gold", "prompt", "name"),
    [
        ("12", "", "number"),
        ("12", OPTIONS, "choice"),
        ("yes", "", "yes_no"),
        ("yes", OPTIONS, "choice"),
        ("05/01/2020", "", "date"),
        ("05/01/2020", OPTIONS, "choice"),
        ("3/4", "", "number"),
        ("3:30 pm", "", "date"),
        ("B", "", "choice"),
        ("(c)", "", "choice"),
        ("e", "", "text"),
        ("-i", "", "text"),
        ("3,7", "", "math"),
        ("3,7", "Sort them.", "text"),
        ("(D)", OPTIONS, "text"),
        (r"\frac{1}{2}", "", "number"),
        (r"\frac{\pi}{2}", "", "math"),
        (r"\sqrt{2}", "", "math"),
        ("(3, 4)", "", "math"),
        ("x^2", "", "math"),
        ("2x", "", "math"),
        ("New York", "", "text"),
        ("J. K. Rowling", "", "text"),
        ("16 square feet", "", "number"),
        ("-3.5", "", "number"),
        ("1,000", "", "number"),
        (None, OPTIONS, "choice"),
        (None, "How many?", "general"),
    ],
)
def test_the_domain_follows_gold_and_prompt(gold: str | None, prompt: str, name: str) -> None:
    assert find_domain(gold, prompt).name == name


def test_a_named_domain_is_taken() -> None:
    assert find_domain("12", OPTIONS, "number").name == "number"
    assert find_domain("12", "", "math").name == "math"
    assert find_domain("05/01/2020", "in DD/MM/YYYY", "date") == Date(day_first=True)
    assert get_domain("choice") is Choice


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("12", "", "numbers"),
            "answer_type must be one of .*number.* got 'numbers'",
        ),
        (("blue", "", "number"), "expected an answer of the domain 'number', found 'blue'"),
        (("(D)", OPTIONS, "choice"), "the domain 'choice', found '\\(D\\)' with the prompt"),
        (("  ", "", None), "gold: expected an answer or None"),
    ],
)
def test_bad_input_is_named(arguments: tuple[str, str, str | None], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_domain(*arguments)


@pytest.mark.parametrize(
    "prompt",
    [
        "Which?\n(A) one\n(B) two, three\n(C) four",
        "Which?\nA) one\nB) two, three\nC) four",
        "Which?\nA. one\nB. two, three\nC. four\n",
        "Which?\na. one\nb. two, three\nc. four\n",
        "Which? Answer Choices: (a) one (b) two, three (c) four",
        "Which? Answer Choices: (A) one, (B) two, three, (C) four",
        "Which? A) one B) two, three C) four",
        "Which of (A) and (B)?\n(A) one\n(B) two, three\n(C) four",
        "Which?\n(A)\none\n(B)\ntwo, three\n(C)\nfour\nAnswer with a letter.",
        "Which?\n**A.** one\n**B.** two, three\n**C.** four",
        "Which?\n[A] one\n[B] two, three\n[C] four",
        "Which?\nA.one\nB.two, three\nC.four",
        "Which?\nA - one\nB - two, three\nC - four",
        r"Which? $\textbf{(A)}\ one \qquad \textbf{(B)}\ two, three \qquad\textbf{(C)}\ four$",
        "Which?\n(A) one\n(B) two, three\n(C) four\nReply with (A), (B) or (C)",
        "Which? A)one B)two, three C)four\nAnswer with the letter A), B), or C)",
    ],
)
def test_options_of_a_prompt(prompt: str) -> None:
    expected = Choice((("A", "one"), ("B", "two, three"), ("C", "four")))
    assert find_domain("(B)", prompt) == expected


def test_labels_inside_of_options_are_no_options() -> None:
    prompt = "How much?\n(A) (a) 5 volts, (b) 3 volts\n(B) (a) 7 volts, (b) 2 volts"
    domain = find_domain("(A)", prompt)
    assert isinstance(domain, Choice) and domain.letters == "AB"


@pytest.mark.parametrize(
    "prompt",
    [
        *("Vitamin A. Then vitamin C.", "f(a) is 3", "(A) only one", "", "Find f(a) + f(b)"),
        *("P(A) + P(B) is 1.", "Give P(A) and P(B)."),
    ],
)
def test_prompts_without_options(prompt: str) -> None:
    assert find_domain(None, prompt).name == "general"


@pytest.mark.parametrize(
    ("prompt", "completions", "name"),
    [
        (OPTIONS, ["The answer is (A).", "The answer is 12."], "choice"),
        (OPTIONS, ["So it is (A).", "(B)"], "choice"),
        ("Points (a) and (b) lie on a line.", ["The answer is 7.", "#### 8"], "number"),
        ("Mr. A. Smith met Mrs. B. Jones.", ["The answer is 7.", "#### 7"], "number"),
        (OPTIONS, ["The answer is 7."], "choice"),
        ("Does it float?", ["So the answer is yes, it floats.", "The answer is no."], "yes_no"),
        ("Does it float?", ["**Yes**, it would.", "No, it can't.", "Wood floats."], "yes_no"),
        ("How many?", ["So 3 + 4 = 7.", "It is 8.", "No, 9."], "general"),
    ],
)
def test_completions_tell_the_domain_where_no_gold_answer_does(
    prompt: str, completions: list[str], name: str
) -> None:
    assert find_domain(None, prompt, completions=completions).name == name


@dataclass(frozen=True)
class Even(Domain):
    """A domain of a user: numbers by whether they are even."""

    @classmethod
    def recognise(cls, gold: str | None, prompt: str) -> Even | None:
        return cls() if gold and gold.isdigit() else None

    def normalise(self, answer: str) -> str:
        return answer.strip()[-1:]

    def extract(self, completion: str) -> str | None:
        return completion or None


@pytest.mark.usefixtures("own_registries")
def test_domains_of_users_are_asked_first() -> None:
    assert register_domain("even")(Even) is Even
    assert domain_names() == [
        *("even", "choice", "yes_no", "date", "number", "math", "text", "general"),
    ]
    assert find_domain("12") == Even() and Even().matches("12", "2")
    assert find_domain("12", "", "number").name == "number"
    register_domain("even")(Even)  # the module was imported again
    with pytest.raises(ValueError, match="answer_type 'even' is already taken by .*Even"):
        register_domain("even")(Choice)
    with pytest.raises(TypeError, match="expected a subclass of Domain"):
        register_domain("odd")(int)  # type: ignore[type-var]
    with pytest.raises(ValueError, match="name must be text"):
        register_domain(" ")(Even)


@pytest.mark.usefixtures("own_registries")
def test_no_registered_domain_is_left_untried() -> None:
    """One of this package too that `BUILT_IN` does not list yet."""
    inside = type("Inside", (Even,), {"__module__": "compact.answers.inside"})
    register_domain("inside")(inside)
    assert domain_names()[0] == "inside" and set(domain_names()) == set(DOMAINS)
    assert isinstance(find_domain("12"), inside)


@pytest.mark.parametrize("gold", [None, "nephew", "cousin"])
def test_the_order_of_rationales_does_not_decide_which_answers_are_equal(gold: str | None) -> None:
    """Two longer forms match the short one, but not each other."""
    domain = get_domain("text")()
    texts = ["al's nephew", "bo's nephew", "nephew", "uncle", "bo is not al's nephew"]
    for answers in itertools.permutations(texts):
        found = dict(zip(answers, unified(answers, domain, gold), strict=True))
        assert [found[text] for text in texts] == ["nephew"] * 3 + texts[3:]
    assert unified(["nephew", None], domain, "bo's nephew") == ["bo's nephew", None]
