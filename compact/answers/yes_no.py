"""Yes or no, true or false."""

from __future__ import annotations

import re
from dataclasses import dataclass

from compact.answers.base import Alternative, Domain, register_domain
from compact.answers.reading import LONGEST_ANSWER, plain_text, read, unwrap
from compact.text.steps import concludes

_WORDS = r"(?P<negated>not\s+)?(?P<word>yes|no(?!\.\s(?:of\b|\d))|true|false)\b"
# At the start, or after an option label: "Yes, it is", "B) False".
_IN_FRONT = re.compile(rf"[^\w(]*(?:\(?[A-J][).:]+\s*)?\W{{0,9}}{_WORDS}", re.IGNORECASE)
# Inside a sentence "no" is a word like any other ("there is no evidence"), unless it ends a clause.
_FILLED = r"(?:(?!only\b)(?:be|quite|\w{2,}ly)\s+)*"
_DOUBTED = r"(?:(?:think|believe|seem|appear|look|sound|find|say|hold)s?\s+)"
_INSIDE = re.compile(
    r"(?:\b|n(?=['’]t))"
    rf"(?P<negated>(?:not|n?['’]t|cannot|never|hardly|far\s+from)\s+{_FILLED}"
    rf"(?:{_DOUBTED}(?:that\s+)?(?:(?:it|this|that|the\s+\w+)\s+(?:is|was|to)\s+)?(?:to\s+)?{_FILLED})?)?"
    r"(?<!the )(?P<word>yes|true|false|(?<!or )no(?=,|\W*$))\b",
    re.IGNORECASE,
)
# "true rather than false": what is denied.
_CONTRAST = re.compile(
    r"\b(?:rather\s+than|instead\s+of|as\s+opposed\s+to)\s+(?:yes|no|true|false)\b", re.IGNORECASE
)
# "neither true nor false" and "yes or no" state neither.
_BOTH = re.compile(
    r"\b(?:(?:neither|either|both)\s+)?(?:yes\s+(?:n?or|and)\s+no|no\s+(?:n?or|and)\s+yes"
    r"|true\s+(?:n?or|and)\s+false|false\s+(?:n?or|and)\s+true)\b",
    re.IGNORECASE,
)

_PAIRS = {"yes": ("yes", "no"), "true": ("true", "false")}
_PAIRS |= {"no": _PAIRS["yes"], "false": _PAIRS["true"]}
# The word as a sentence ("No, it cannot"), not as a part of one ("No country has"), or as the value
# of the question ("the statement is false").
_ALONE = re.compile(
    rf"[^\w(]*(?:\(?[A-J][).:]+\s*)?\W{{0,9}}{_WORDS}"
    r"(?:\W*(?:$|(?<=[,.:;!—–]\s))|\s-\s"
    r"|\s(?:it|he|she|they|we|you|this|that|because|since|as)\b)",
    re.IGNORECASE,
)
_CLAIM = re.compile(
    r"\b(?:statement|claim|question|answer|premise|it|this|that)\s+(?:is|was|must be|would be)\s+"
    r"(?:\w+ly\s+)?(?:not\s+)?(?:yes|no|true|false)\b",
    re.IGNORECASE,
)


def _value(found: re.Match[str]) -> str:
    positive = found["word"].lower() in ("yes", "true")
    return "yes" if positive != bool(found["negated"]) else "no"


def _values(sentence: str) -> list[str]:
    """Returns the values inside a sentence, in order."""
    return [_value(found) for found in _INSIDE.finditer(_CONTRAST.sub(" ", sentence))]


@register_domain("yes_no")
@dataclass(frozen=True)
class YesNo(Domain):
    """Yes and true are one answer ("yes"), no and false the other ("no")."""

    @classmethod
    def recognise(cls, gold: str | None, prompt: str) -> YesNo | None:
        """Accepts yes, no, true or false alone, in any case."""
        known = gold is not None and plain_text(gold) in ("yes", "no", "true", "false")
        return cls() if known else None

    def normalise(self, answer: str) -> str:
        """Returns "yes" or "no" if the text starts with such a word, else plain text."""
        text = plain_text(answer)
        found = _ALONE.match(unwrap(answer[:LONGEST_ANSWER])) or _ALONE.match(text)
        return _value(found) if found else text

    def extract(self, completion: str) -> str | None:
        """Returns the value after the last answer marker.

        Without a marker, it is the value of the last sentence that states one, else of the last one
        that starts with a value or has yes, true or false inside.
        """
        found = read(self, completion)
        return found if found in ("yes", "no") else None

    def alternatives(self, gold: str | None, prompt: str) -> tuple[Alternative, ...]:
        """Returns yes and no in the words and the case of the gold answer; () without one."""
        word = plain_text(gold or "")
        if word not in _PAIRS:
            return ()
        written = unwrap(gold or "").strip(" .")
        case = str.upper if written.isupper() else str.title if written.istitle() else str.lower
        yes, no = _PAIRS[word]
        return (Alternative("yes", case(yes)), Alternative("no", case(no)))

    def states(self, step: str) -> bool:
        """Whether a step announces an answer, begins with one ("No, ..."), or concludes one."""
        if super().states(step) or _ALONE.match(step) or _CLAIM.search(step):
            return True
        return concludes(step) and bool(_INSIDE.search(step))

    def stated(self, sentence: str) -> str | None:
        """Returns the value at the start of a sentence, else the first one inside it."""
        said = _BOTH.sub(" ", sentence)
        front = _IN_FRONT.match(said)
        return _value(front) if front else next(iter(_values(said)), None)

    def opening(self, sentence: str) -> str | None:
        """Returns the value at the start of a sentence, as a word of its own."""
        front = _ALONE.match(sentence)
        return _value(front) if front else None

    def final(self, sentence: str) -> str | None:
        """Returns the value at the start of a sentence, else the last one inside it."""
        said = _BOTH.sub(" ", sentence)
        return self.opening(said) or next(reversed(_values(said)), None)
