"""Where a rationale is cut into steps, where its answer begins, and which tokens that makes."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import given

from compact.data import Problem, Rationale
from compact.lab.zoo_student import build_tokenizer
from compact.passes.encode import encode_problem
from compact.text.steps import find_marker, split_steps


def texts(text: str) -> list[str]:
    """The steps' texts."""
    return [step.text for step in split_steps(text)]


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("First line\nSecond line\n\nThird line", ["First line", "Second line", "Third line"]),
        ("He has 3. She has 4! Do they? Yes.", ["He has 3.", "She has 4!", "Do they?", "Yes."]),
        ("It costs 3.50 dollars. Twice is 7.00.", ["It costs 3.50 dollars.", "Twice is 7.00."]),
        ("That is 1,450.75 in all. Good.", ["That is 1,450.75 in all.", "Good."]),
        ("Then 2.5.Next is 3.", ["Then 2.5.", "Next is 3."]),
        ("A person.2. Buying 3.5 of it.3. So", ["A person.", "2. Buying 3.5 of it.", "3. So"]),
        ("一共有18个。拿走2个！剩下16个", ["一共有18个。", "拿走2个！", "剩下16个"]),
        (
            "Mr. Smith buys 3 lbs. of coffee. He pays.",
            ["Mr. Smith buys 3 lbs. of coffee.", "He pays."],
        ),
        ("At 3 p.m. Tom left. It rained.", ["At 3 p.m. Tom left.", "It rained."]),
        (
            r"We have $\frac{1}{2}. Then x_1$ left. Good.",
            [r"We have $\frac{1}{2}. Then x_1$ left.", "Good."],
        ),
        (r"See \(a = 1. B\) here. Yes.", [r"See \(a = 1. B\) here.", "Yes."]),
        (r"\[a. B; C\] holds. Now: D", [r"\[a. B; C\] holds.", "Now: D"]),
        (
            "\\begin{align}a\nb\nc\\end{align}\nDone",
            ["\\begin{align}a\nb\nc\\end{align}", "Done"],
        ),
        ("$5 each. With $7 it is $12. Then", ["$5 each.", "With $7 it is $12.", "Then"]),
        ("Step 1: add. Step 2: halve", ["Step 1: add.", "Step 2: halve"]),
        ("we add step 1: 3 step 2: 4", ["we add", "step 1: 3", "step 2: 4"]),
        ("1. Add them. 2. Halve it.", ["1. Add them.", "2. Halve it."]),
        (
            "Tom adds 3, so 4 + 3 = 7, then halves it",
            ["Tom adds 3,", "so 4 + 3 = 7,", "then halves it"],
        ),
        ("He ran so that he won, so many cheered", ["He ran so that he won, so many cheered"]),
        ("He ran, therefore he won, hence this", ["He ran,", "therefore he won,", "hence this"]),
        ("One; Two", ["One;", "Two"]),
        ('He said "no." Then left.', ['He said "no."', "Then left."]),
        ("Wait ... What", ["Wait ...", "What"]),
        ("Add.\n---\nHalve.", ["Add.\n---", "Halve."]),
        ("<think>\nAdd.\n</think>\n\nHalve.", ["Add.\n</think>", "Halve."]),
        ("<thinking>\nAdd.\n</Thinking>\nThe answer is 7", ["Add.\n</Thinking>"]),
        ("<think>Add.\nHalve.</think>", ["<think>Add.", "Halve.</think>"]),
        ("<thinker>\nAdd.", ["<thinker>", "Add."]),
    ],
)
def test_steps(text: str, steps: list[str]) -> None:
    """Newlines, sentence ends, "Step n", connectives; nothing inside decimals, names or LaTeX."""
    assert texts(text) == steps


@pytest.mark.parametrize(
    ("text", "answer_part"),
    [
        ("3 + 4 = 7\nThe answer is 7", "The answer is 7"),
        ("3 + 4 = 7. So the final answer is: 7.", "So the final answer is: 7."),
        ("3 + 4 = 7. Therefore, the answer is 7.", "Therefore, the answer is 7."),
        ("Sum.\nAnswer: 7", "Answer: 7"),
        ("Sum.\nFinal Answer: 7", "Final Answer: 7"),
        ("Sum.\n#### 7", "#### 7"),
        (r"Sum. So \boxed{7}", r"\boxed{7}"),
        ("The answer is 25 x 14 = ? We get 350. THE ANSWER IS 350", "THE ANSWER IS 350"),
        ('{"steps": "3 + 4 = 7", "answer": 7}', '"answer": 7}'),
        ("<think>Maybe the answer is 7?</think> It is **6**.", ""),
        ("<think>Maybe the answer is 7?</think> Sum. The answer is 6", "The answer is 6"),
        ("<think>Sum. The answer is 7</think>\n", "The answer is 7</think>\n"),
        ("<think>Sum. The answer is 7", "The answer is 7"),
        ("No marker here", ""),
        ("An answer issue", ""),
    ],
)
def test_marker(text: str, answer_part: str) -> None:
    """The last marker, with the connective in front of it; the end of the text without one."""
    assert text[find_marker(text) :] == answer_part
    assert split_steps(text)[-1].end <= max(find_marker(text), 1)


@pytest.mark.parametrize("name", ["answer", "final_answer", "Final Answer"])
def test_a_field_of_json_is_a_marker(name: str) -> None:
    """It may come first: then the whole text is read."""
    text = f'{{"{name}": 12, "steps": 3}}'
    assert find_marker(text) == 1
    assert texts(text) == [text]


def test_a_thought_is_cut_into_steps_too() -> None:
    """An answer that the text only thinks of does not end the steps."""
    text = "<think>\nMaybe the answer is 7? No: 3 + 5 = 9.</think>\n\nTom has 3 + 5 = 9. So **6**."
    assert texts(text) == [
        "Maybe the answer is 7?",
        "No: 3 + 5 = 9.</think>",
        "Tom has 3 + 5 = 9.",
        "So **6**.",
    ]


def test_text_without_steps_before_the_marker_is_one_step() -> None:
    """An answer alone is still something to score."""
    assert texts("The answer is 7") == ["The answer is 7"]
    assert texts("...\nThe answer is 7") == ["The answer is 7"]


@pytest.mark.parametrize("text", ["", " \n\t"])
def test_nothing_to_split(text: str) -> None:
    """White space is no rationale."""
    with pytest.raises(ValueError, match="text must not be empty"):
        split_steps(text)


_PIECES = st.sampled_from(
    ["Tom", " has", " 3.5", " apples", ".", " ", "\n", ", so", "$x_1$", "\\(", "\\)", "Step 2"]
    + ["The answer is", " 7", "!", "…", "é", "####", "1.", "\\boxed{", "}"]
)


@given(st.lists(_PIECES, min_size=1, max_size=30).map("".join).filter(str.strip))
def test_steps_are_spans_in_order(text: str) -> None:
    """Whatever the text: trimmed, disjoint, at least one, no word before the marker lost."""
    steps = split_steps(text)
    assert steps
    end = 0
    for step in steps:
        assert end <= step.start < step.end <= len(text)
        assert step.text == text[step.start : step.end] == step.text.strip()
        assert not any(letter.isalnum() for letter in text[end : step.start])
        end = step.end
    if end <= (marker := find_marker(text)):
        assert not any(letter.isalnum() for letter in text[end:marker])


def test_token_spans_hold_the_steps() -> None:
    """The tokens of a span read as its step, the marker's token opens the answer part."""
    tokenizer = build_tokenizer()
    completion = (
        "Mia starts with 3 apples.\nMia buys 4 more, so 3 + 4 = 7. Mia loses 2: 7 - 2 = 5.\n"
        "The answer is 5"
    )
    problem = Problem("q", "Mia has 3 apples.", "5", (Rationale("t", completion, 1),))
    encoded = encode_problem(problem, tokenizer, max_length=200).rationales[0]
    assert encoded.step_texts == (
        "Mia starts with 3 apples.",
        "Mia buys 4 more,",
        "so 3 + 4 = 7.",
        "Mia loses 2: 7 - 2 = 5.",
    )
    found = [tokenizer.decode(encoded.ids[a:b]).strip() for a, b in encoded.steps]
    assert tuple(found) == encoded.step_texts
    assert tokenizer.decode(encoded.ids[encoded.marker :]).startswith("The answer is 5")
