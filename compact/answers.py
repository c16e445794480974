"""Final answers: taking them out of a completion, normalising them, comparing them."""

from __future__ import annotations

import re

from compact.text.numbers import NUMBER, format_number, parse_number
from compact.text.steps import find_marker

_LATEX_FRACTION = re.compile(r"\\[dt]?frac\{([^{}]+)\}\{([^{}]+)\}")
_LATEX_WRAP = re.compile(r"\\(?:boxed|text|mathrm|mathbf)\s*\{([^{}]*)\}")
_AFTER_MARKER = re.compile(
    r"(?:.*?\banswer\s+is\b|.*?\banswer\s*:|####|(?=\\boxed))[\s:]*", re.IGNORECASE | re.DOTALL
)
_END_OF_ANSWER = re.compile(r"\n|[.!?;](?=\s|$)|<\|")


def normalise_answer(text: str) -> str:
    """Returns the comparable form of an answer.

    A text with exactly one number becomes that number ("$1,450.0" -> "1450", "7 apples" -> "7");
    any other becomes lower case without surrounding punctuation ("(B)." -> "b").
    """
    plain = _LATEX_FRACTION.sub(r"\1/\2", text)
    plain = _LATEX_WRAP.sub(r"\1", plain).replace("\\$", "").replace("$", "").replace("\\%", "%")
    numbers = NUMBER.findall(plain)
    if len(numbers) == 1:
        number = parse_number(numbers[0])
        if number is not None:
            return format_number(number)
    return " ".join(plain.lower().split()).strip(" .,:;!?()[]{}\"'`*\\")


def extract_answer(completion: str) -> str | None:
    """Returns the normalised final answer of a completion, None where there is none.

    After an answer marker, the answer is read from the rest of that sentence, behind its last "=":
    its first number, else its text. Without a marker it is the last number of the completion.
    """
    marker = find_marker(completion)
    if marker == len(completion):
        numbers = NUMBER.findall(completion)
        return normalise_answer(numbers[-1]) if numbers else None
    start = _AFTER_MARKER.match(completion, marker)
    rest = completion[start.end() if start else marker :]
    end = _END_OF_ANSWER.search(rest)
    answer = rest[: end.start()] if end else rest
    answer = normalise_answer(answer.rsplit("=", 1)[-1])
    numbers = NUMBER.findall(answer)
    if len(numbers) > 1:
        answer = normalise_answer(numbers[0])
    return answer or None


def answers_match(a: str | None, b: str | None) -> bool:
    """Whether two answers are the same after normalising; numbers up to 1e-6 of their size."""
    if a is None or b is None:
        return False
    a, b = normalise_answer(a), normalise_answer(b)
    if a == b:
        return True
    x, y = parse_number(a), parse_number(b)
    if x is None or y is None:
        return False
    return abs(x - y) <= max(abs(x), abs(y), 1) / 10**6
