"""Whatever the text: an answer in normal form or None, in time linear in its length."""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable

import hypothesis.strategies as st
import pytest
from hypothesis import example, given, settings

from compact.answers import (
    Choice,
    Date,
    Domain,
    General,
    Mathematics,
    Number,
    ShortText,
    YesNo,
    domain_names,
    find_domain,
)

OPTIONS = (("A", "dog"), ("B", "the cat"), ("C", "cat"), ("D", "7"))
DOMAINS: list[Domain] = [
    Choice(OPTIONS),
    Choice(),
    YesNo(),
    Date(),
    Date(day_first=True),
    Number(),
    Mathematics(),
    ShortText(),
    General(),
]
SIZE = 12_000
PATTERNS = [
    *(
        "=",
        "(",
        ")",
        " ",
        "\n",
        "1",
        "\\",
        "{",
        "}",
        "*",
        "#",
        "$",
        "/",
        ".",
        "-",
        "_",
        "`",
        "\xa0",
    ),
    *(
        "\\boxed{",
        "\\boxed",
        "\\frac{",
        "\\frac{1}{",
        "\\text{",
        "\\(",
        "\\[",
        "$x_",
        "1,111,",
        "1/",
    ),
    *(
        "#### ",
        "####\n",
        "####7",
        "answer",
        "The answer is ",
        "Answer:",
        "Answer\n",
        "final ",
        "so ",
    ),
    *(
        "Mr. ",
        "A. ",
        "(A) ",
        "A or B ",
        "the cat ",
        "1:1 ",
        "5/1/2020 ",
        "May ",
        "not ",
        "1e9",
        "9^",
    ),
    *(
        "twenty-",
        "six and ",
        "</think>",
        "<think>",
        "<|",
        "<s>",
        "[a]",
        "is ",
        "'s ",
        "the ",
        '"',
        "?",
    ),
    *("1 + ", "x = ", "most likely ", "the answer to the question ", "1! ", "\\left", "**", "**7 "),
    *("1 a ", "1, ", "2 to ", "**a** ", "<<1", "x = 1, ", "1 (2", "not really ", "A) ", "[A] "),
    *("not think that ", '"answer": "', '"7", ', "1-", "2^", "(A)\n", "$\\textbf{(", "before May "),
]


def best_time(call: Callable[[str], object], text: str) -> float:
    """Returns the least seconds of two calls, of this thread's own time: other tests run beside."""
    times = []
    for _ in range(2):
        start = time.thread_time()
        call(text)
        times.append(time.thread_time() - start)
    return min(times)


def read_all(text: str) -> None:
    """Reads and normalises a text in every domain, behind a marker and without one."""
    end = "x 7 yes (A)"
    for domain in (DOMAINS[0], YesNo(), Date(), Mathematics(), ShortText(), General()):
        domain.extract(text + end)
        domain.extract("The answer is " + text + end)
        domain.normalise(text)
    find_domain("x" + text, text)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_time_is_linear(pattern: str) -> None:
    """Twice the text takes at most three times as long: four times, nine (quadratic: sixteen)."""
    text = (pattern * SIZE)[:SIZE]
    quarter, whole = (best_time(read_all, piece) for piece in (text[: SIZE // 4], text))
    assert whole < max(9 * quarter, 0.3), f"{quarter:.3f} s for a quarter, {whole:.3f} s for all"


@pytest.mark.parametrize("pattern", ["=", "(", "\\boxed{", " ", "1", ".", "**", "1,111,", "Mr. "])
def test_sixty_thousand_characters(pattern: str) -> None:
    start = time.thread_time()
    read_all((pattern * 60_000)[:60_000])
    assert time.thread_time() - start < 10


@pytest.mark.parametrize(
    "digits", ["1e9999999999", "1e-9999999999", "9" * 60_000, "1/" + "9" * 5000]
)
def test_huge_numbers_are_text(digits: str) -> None:
    """Their digits are never written out, and nothing raises."""
    start = time.thread_time()
    for domain in DOMAINS:
        found = domain.extract(f"The answer is {digits}.")
        assert found is None or len(found) <= 2100
        assert len(domain.normalise(digits)) <= 2100
        assert not domain.matches(found, "7")
    assert find_domain(digits).name != "number"
    assert time.thread_time() - start < 5


_PIECES = st.sampled_from(
    ["The answer is", "Answer:", " ", "\n", ".", "?", "7", "-3", "1/2", "1,450", "$", "%", "x"]
    + ["(A)", "B)", "C", "cat", "the ", "a ", "yes", "No", "True", "not ", "5/1/2020", "May 1"]
    + [
        "3:30",
        " pm",
        "\\boxed{",
        "}",
        "\\frac{1}{2}",
        "\\sqrt",
        "=",
        " or ",
        "**",
        "`",
        "'s",
        "[",
        "]",
    ]
    + ["#### ", "six", "one", " is ", "of", "</think>", "<|im_end|>", "é", "(", ")", "!", '"', ","]
)
TEXTS = st.one_of(st.text(max_size=40), st.lists(_PIECES, max_size=12).map("".join))


@settings(max_examples=400)
@given(TEXTS)
def test_what_is_extracted_is_in_normal_form(text: str) -> None:
    """It has content, is its own normal form and matches itself."""
    for domain in DOMAINS:
        found = domain.extract(text)
        if found is not None:
            assert found.strip()
            assert domain.normalise(found) == found
            assert domain.matches(found, found)


@settings(max_examples=400)
@given(TEXTS, TEXTS)
@example("0[\n]0", "")
def test_normal_forms_and_matches(a: str, b: str) -> None:
    """Normalising twice changes nothing, and matching does not depend on the order."""
    for domain in DOMAINS:
        normal = domain.normalise(a)
        assert domain.normalise(normal) == normal
        if not isinstance(domain, Mathematics):
            assert domain.matches(a, b) is domain.matches(b, a)
        assert not domain.matches(a, None) and not domain.matches(None, b)


def test_domains_are_values() -> None:
    """They can be sent to another process, compared and used as keys."""
    for domain in DOMAINS:
        assert pickle.loads(pickle.dumps(domain)) == domain
        assert hash(domain) == hash(pickle.loads(pickle.dumps(domain)))
    assert {domain.name for domain in DOMAINS} == set(domain_names())
