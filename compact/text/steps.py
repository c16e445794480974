"""Splits a rationale into reasoning steps and finds the start of its answer part."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple


class Step(NamedTuple):
    """One reasoning step; `text` is the rationale's text[start:end], stripped."""

    start: int
    end: int
    text: str


# The words that announce the answer. A connective before them belongs to the answer part, because
# "Therefore," alone would be an empty step. So do the signs of a Markdown heading or of bold type.
_KIND = (
    r"(?:(?:most\s+|more\s+)?(?:final|correct|right|best|likely|probable|appropriate|accurate"
    r"|suitable|reasonable|logical|plausible|closest|overall|short)[\s_]+)"
)
_NOUN = rf"(?:{_KIND}{{0,2}}answer(?:\s+choice)?|{_KIND}{{1,2}}(?:option|choice))"
_TOPIC = r"(?:\s+to\s+(?:the|this|your)\s+(?:\w{1,20}\s+)?(?:question|problem|puzzle|riddle))?"
_VERB = r"(?:is|would\s+be|must\s+be|should\s+be|will\s+be)\b"
_SIGNS = r"[*_#>\s:$({\[\\]"  # allowed between "The answer is" and "\boxed"
_MARKER = re.compile(
    # "The answer is 7", "So the most likely answer is: **7", "The answer is $\boxed{7}$"
    r"(?P<direct>(?:\b(?:so|therefore|thus|hence|finally|consequently),?\s+)?"
    rf"(?:\bthe\s+)?\b{_NOUN}{_TOPIC}\s+{_VERB}(?:{_SIGNS}{{1,20}}boxed\b)?"
    r"|theansweris|<answer>"
    # "\boxed{7}"
    r"|\\boxed\b"
    # "#### 7", but not "#### 2. Add them" or "#### Step 2", which are headings
    r"|####(?![ \t]*\d{1,2}[.)][ \t])"
    r"(?=[ \t]*[-−+$\\(]{0,3}[\d.]|[ \t]{0,9}[^\s#][^\n#]{0,60}\n?\Z|[ \t]{0,9}\Z))"
    # "Answer: 7", "**Final Answer:** 7", "**Answer**: 7", "final_answer": 7
    rf"|[*_#\"]{{0,6}}[ \t]?\b(?:the\s+)?{_NOUN}{_TOPIC}[*_\"]{{0,3}}\s?:"
    # "### Answer" and "**Final answer**" on a line of their own
    rf"|(?m:^)[*_#]{{0,6}}[ \t]?{_NOUN}[*_]{{0,3}}[ \t]{{0,3}}(?m:$)",
    re.IGNORECASE,
)

# The words that open a conclusion.
_CONCLUSION = re.compile(
    r"\W*(?:and\s+)?(?:so|therefore|thus|hence|consequently|accordingly|finally|overall|ultimately"
    r"|in\s+(?:conclusion|summary|short)|as\s+a\s+(?:result|consequence)"
    r"|(?:this|which|that|it)\s+(?:means|implies|makes|shows|confirms|indicates|suggests|follows)"
    r"|we\s+(?:can\s+)?(?:conclude|infer|choose|select)|making)\b",
    re.IGNORECASE,
)

# LaTeX is never cut. A single $...$ is LaTeX only if it contains \, ^ or _, because rationales have
# many dollar amounts ("$7 + $17 = $24").
_LATEX = re.compile(
    r"\\\((?:[^\\]|\\[^()])*\\\)|\\\[(?:[^\\]|\\[^\[\]])*\\\]|\$\$.*?\$\$"
    r"|\\begin\{(?P<environment>\w+\*?)\}"
    r"|\$(?=[^$\n]*[\\^_])[^$\n]*\$",
    re.DOTALL,
)
_LATEX_END = re.compile(r"\\end\{(\w+\*?)\}")

ABBREVIATION = re.compile(
    r"(?:\b(?:mr|mrs|ms|dr|st|jr|sr|vs|approx|fig|eq|e\.g|i\.e|[ap]\.m"
    r"|jan|feb|apr|jun|jul|aug|sept?|oct|nov|dec))$",
    re.IGNORECASE,
)
_LIST_NUMBER = re.compile(r"(?:^|\n)\s*(?:step\s+)?\d{1,2}$", re.IGNORECASE)

# A cut is at the end of a match. There is no cut before a lower-case letter ("3 lbs. of coffee").
# A run of signs or spaces is tried from its start only, so that the time is linear in its length.
_CUT = re.compile(
    r"\n+"
    r"|(?<![.!?;])[.!?;]+[\"')\]]*\s+(?=[^a-z\s])"
    r"|[.!?](?=[A-Z][a-z])|(?<=[^\W\d])[.!?](?=\d{1,2}[.)]\s?[A-Z(])|[。！？]+"
    r"|(?<!\s)\s+(?=(?i:step\s+\d))"
    r"|,\s+(?=(?:so(?!\s+(?:that|many|much|far)\b)|then|therefore|thus|hence|consequently|finally)\b)"
)
# The first word character of a text, if matched at its start. The tags of a thought are no words.
_CONTENT = re.compile(r"(?:[^\w<]|<(?!/?think(?:ing)?>)|</?think(?:ing)?>)*\w", re.IGNORECASE)


_THOUGHT_END = re.compile(r"</think(?:ing)?>", re.IGNORECASE)


def thought_end(text: str) -> int:
    """Returns where the answer of a model that thinks aloud begins: after the last `</think>`.

    0 if there is none, or no word follows it.
    """
    end = max((found.end() for found in _THOUGHT_END.finditer(text)), default=0)
    return end if _CONTENT.match(text, end) else 0


class Marker(NamedTuple):
    """An answer marker text[start:end].

    After a `direct` marker ("The answer is", a box, "####") the answer itself follows. After other
    markers ("Answer:", a heading) a sentence or a whole paragraph may come first.
    """

    start: int
    end: int
    direct: bool


@lru_cache(maxsize=16)  # steps, answer and options of a text each ask for them
def find_markers(text: str) -> tuple[Marker, ...]:
    """Returns every answer marker of a text, in order; those of a finished thought do not count."""
    found = _MARKER.finditer(text, thought_end(text))
    return tuple(Marker(*match.span(), match["direct"] is not None) for match in found)


def find_marker(text: str) -> int:
    r"""Returns the character offset of the last answer marker, len(text) if there is none.

    The last marker counts because a text may say "The answer is 25 x 14 = ? The answer is 350".
    """
    markers = find_markers(text)
    return markers[-1].start if markers else len(text)


def concludes(step: str) -> bool:
    """Whether a step begins with the words of a conclusion ("Therefore", "This means")."""
    return bool(_CONCLUSION.match(step))


def split_steps(text: str) -> list[Step]:
    """Splits the text before the answer marker into steps, in order; returns at least one.

    Cuts are newlines, sentence ends (not within decimals, abbreviations, list numbers or LaTeX),
    "Step n" and connectives after a comma (", so", ", then"). If nothing comes before the marker,
    the whole text is one step.

    Raises:
        ValueError: if the text is only white space.
    """
    if not text.strip():
        raise ValueError("split_steps: text must not be empty")
    end = find_marker(text)
    if not _CONTENT.match(text, 0, end):
        end = len(text)
    latex = _latex(text, end)
    inside = next(latex, None)
    spans: list[tuple[int, int]] = []
    start = 0
    for match in _CUT.finditer(text, 0, end):
        cut = match.end()
        while inside is not None and inside[1] <= cut:
            inside = next(latex, None)
        if (inside is not None and inside[0] < cut) or _is_no_sentence_end(text, start, match):
            continue
        _add(spans, text, start, cut)
        start = cut
    _add(spans, text, start, end)
    spans = spans or [_trim(text, 0, end)]
    return [Step(left, right, text[left:right]) for left, right in spans]


def _latex(text: str, end: int) -> Iterator[tuple[int, int]]:
    """Yields the spans of LaTeX in text[:end], in order; an environment without an end is none."""
    ends: dict[str, list[int]] = {}
    for match in _LATEX_END.finditer(text, 0, end):
        ends.setdefault(match[1], []).append(match.end())
    at = 0
    while found := _LATEX.search(text, at, end):
        at = found.end()
        name = found["environment"]
        if name is not None:
            later = ends.get(name, [])
            place = bisect_right(later, at)
            if place == len(later):
                continue
            at = later[place]
        yield found.start(), at


def _is_no_sentence_end(text: str, start: int, match: re.Match[str]) -> bool:
    """Whether the cut is at the full stop of an abbreviation or of a list number."""
    if match.group()[0] != ".":
        return False
    # The last 40 characters are enough. "x" replaces earlier text, so that no line starts there.
    near = max(start, match.start() - 40)
    before = ("x" if near > start else "") + text[near : match.start()]
    return bool(ABBREVIATION.search(before) or _LIST_NUMBER.search(before))


def _trim(text: str, start: int, end: int) -> tuple[int, int]:
    piece = text[start:end]
    left = start + len(piece) - len(piece.lstrip())
    return left, max(left, end - (len(piece) - len(piece.rstrip())))


def _add(spans: list[tuple[int, int]], text: str, start: int, end: int) -> None:
    """Appends text[start:end] as a step; punctuation or tags of a thought join the previous one."""
    left, right = _trim(text, start, end)
    if _CONTENT.match(text, left, right):
        spans.append((left, right))
    elif left < right and spans:
        spans[-1] = (spans[-1][0], right)
