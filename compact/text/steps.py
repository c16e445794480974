"""Splits a rationale into reasoning steps and finds where its answer part begins."""

from __future__ import annotations

import re
from typing import NamedTuple


class Step(NamedTuple):
    """One reasoning step: `text` is the rationale's text[start:end], without space around it."""

    start: int
    end: int
    text: str


# "The answer is 7", "So the final answer is: 7", "Answer: 7", "#### 7", "\boxed{7}". A connective
# in front belongs to the answer part: "Therefore," alone would be an empty step.
_MARKER = re.compile(
    r"(?:\b(?:so|therefore|thus|hence|finally|consequently),?\s+)?"
    r"(?:\bthe\s+)?\b(?:final\s+)?answer\s+is\b"
    r"|(?:\bfinal\s+)?\banswer\s*:"
    r"|####"
    r"|\\boxed\b",
    re.IGNORECASE,
)

# Spans in which nothing is cut. A single $...$ is LaTeX only when its inside looks like it, since
# rationales are full of dollar amounts ("$7 + $17 = $24").
_LATEX = re.compile(
    r"\\\(.*?\\\)|\\\[.*?\\\]|\$\$.*?\$\$|\\begin\{(\w+\*?)\}.*?\\end\{\1\}"
    r"|\$(?=[^$\n]*[\\^_])[^$\n]*\$",
    re.DOTALL,
)

_ABBREVIATION = re.compile(
    r"(?:\b(?:mr|mrs|ms|dr|st|jr|sr|vs|approx|fig|eq|e\.g|i\.e|[ap]\.m))$", re.IGNORECASE
)
_LIST_NUMBER = re.compile(r"(?:^|\n)\s*(?:step\s+)?\d{1,2}$", re.IGNORECASE)

# A cut stands where the match ends. After a sentence no small letter follows ("3 lbs. of coffee").
_CUT = re.compile(
    r"\n+"
    r"|[.!?;]+[\"')\]]*\s+(?=[^a-z\s])"
    r"|[.!?](?=[A-Z][a-z])"
    r"|\s+(?=(?i:step\s+\d))"
    r"|,\s+(?=(?:so(?!\s+(?:that|many|much|far)\b)|then|therefore|thus|hence|consequently|finally)\b)"
)
_CONTENT = re.compile(r"\w")


def find_marker(text: str) -> int:
    r"""Returns the character offset of the last answer marker, len(text) where there is none.

    The last one, because a rationale may say "The answer is 25 x 14 = ? The answer is 350".
    """
    start = len(text)
    for match in _MARKER.finditer(text):
        start = match.start()
    return start


def split_steps(text: str) -> list[Step]:
    """Splits what stands before the answer marker into steps, in order; at least one.

    Cuts are newlines, sentence ends (not within decimals, abbreviations, list numbers or LaTeX),
    "Step n" and connectives after a comma (", so", ", then"). A text without anything before its
    marker is one step as a whole.

    Raises:
        ValueError: if the text has nothing but white space.
    """
    if not text.strip():
        raise ValueError("split_steps: text must not be empty")
    end = find_marker(text)
    if not _CONTENT.search(text, 0, end):
        end = len(text)
    latex = [match.span() for match in _LATEX.finditer(text, 0, end)]
    steps: list[Step] = []
    start = 0
    for match in _CUT.finditer(text, 0, end):
        cut = match.end()
        if any(a < cut < b for a, b in latex) or _is_no_sentence_end(text, start, match):
            continue
        _add(steps, text, start, cut)
        start = cut
    _add(steps, text, start, end)
    return steps or [_trim(text, 0, end)]


def _is_no_sentence_end(text: str, start: int, match: re.Match[str]) -> bool:
    """Whether the cut is only the full stop of an abbreviation or of a list number."""
    if match.group()[0] != ".":
        return False
    before = text[start : match.start()]
    return bool(_ABBREVIATION.search(before) or _LIST_NUMBER.search(before))


def _trim(text: str, start: int, end: int) -> Step:
    piece = text[start:end]
    left = start + len(piece) - len(piece.lstrip())
    right = end - (len(piece) - len(piece.rstrip()))
    return Step(left, right, text[left:right])


def _add(steps: list[Step], text: str, start: int, end: int) -> None:
    """Appends text[start:end] unless it holds punctuation only, which joins the step before it."""
    step = _trim(text, start, end)
    if _CONTENT.search(step.text):
        steps.append(step)
    elif step.text and steps:
        last = steps.pop()
        steps.append(_trim(text, last.start, end))
