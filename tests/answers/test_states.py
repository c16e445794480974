"""Which steps state an answer, and the answers that can be chosen."""

from __future__ import annotations

import pytest

from compact.answers import Alternative, Choice, Domain, YesNo, find_domain

CHOICE = find_domain("B", "Where?\n(A) sea\n(B) The green field.\n(C) 55%")
YES_NO = find_domain("True", "Is it?")
NUMBER = find_domain("7", "3 + 4?")


@pytest.mark.parametrize(
    ("domain", "step", "states"),
    [
        (CHOICE, "The answer is (B).", True),
        (CHOICE, "So the most likely answer is the sea.", True),
        (CHOICE, "Therefore, cows stand on the green field.", True),
        (CHOICE, "so B is correct.", True),
        (CHOICE, "This means option A can be chosen.", True),
        (CHOICE, "Option C is the correct choice.", True),
        (CHOICE, "(B) the green field", True),
        (CHOICE, "B.", True),
        (CHOICE, "the sea.", True),
        (CHOICE, "Grass grows on the green field.", False),
        (CHOICE, "Option A is incorrect because cows cannot swim.", False),
        (CHOICE, "Therefore, cows eat grass.", False),
        (CHOICE, "A cow eats grass.", False),
        (YES_NO, "The answer is False", True),
        (YES_NO, "No, it cannot.", True),
        (YES_NO, "Yes", True),
        (YES_NO, "Therefore, the statement is likely false.", True),
        (YES_NO, "The claim is true.", True),
        (YES_NO, "No country has two kings.", False),
        (YES_NO, "A true friend would help.", False),
        (YES_NO, "Therefore, it is not possible.", False),
        (NUMBER, "3 + 4 = 7", False),
        (NUMBER, "So the answer is 7.", True),
    ],
)
def test_what_states_an_answer(domain: Domain, step: str, states: bool) -> None:
    """A cue, an option alone, or an option as a conclusion; no mention and no rejection."""
    assert domain.states(step) is states


def test_alternatives_are_written_as_in_the_data() -> None:
    """Letters with the text of the prompt; the words and the case of a yes / no answer."""
    prompt = "Where?\n(A) The Sea\n(B) a field"
    assert Choice.recognise("A", prompt).alternatives("A", prompt) == (
        Alternative("A", "The Sea"),
        Alternative("B", "a field"),
    )
    assert Choice().alternatives("A", "Where?") == ()
    for gold, texts in (
        ("False", ("True", "False")),
        ("no.", ("yes", "no")),
        ("YES", ("YES", "NO")),
    ):
        found = YesNo().alternatives(gold, "")
        assert [option.text for option in found] == list(texts)
        assert [option.name for option in found] == ["yes", "no"]
    assert YesNo().alternatives(None, "") == () and NUMBER.alternatives("7", "3 + 4?") == ()


def test_the_question_without_its_options() -> None:
    """What stands before and after the list; a prompt of options alone stays."""
    prompt = "Where?\n(A) sea\n(B) field\nGive the letter."
    assert CHOICE.question(prompt) == "Where?\nGive the letter."
    assert CHOICE.question("Where? A) sea B) field") == "Where?"
    assert CHOICE.question("(A) sea\n(B) field") == "(A) sea\n(B) field"
    assert CHOICE.question("Where?") == YES_NO.question("Where?") == "Where?"
