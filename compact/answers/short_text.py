"""Short texts ("nephew", names, sequences), and answers of unknown kind."""

from __future__ import annotations

import re
from dataclasses import dataclass

from compact.answers import number
from compact.answers.base import Domain, register_domain
from compact.answers.date import Date
from compact.answers.number import bare_number, match_by_value
from compact.answers.reading import (
    ARTICLE,
    LONGEST_ANSWER,
    parts,
    plain_text,
    read,
    statements,
    unwrap,
    visible,
)
from compact.text.steps import find_markers

_VERB = re.compile(r"\b(?:is|are|was|were)\s+")
_OWNER = re.compile(r"^.*?\w\]?'s?\s+")
_OF = re.compile(r"\s+of\s.*$", re.DOTALL)
_LABEL = re.compile(r"\W*\(?([A-Ja-j])\)(?=\W|$)")
_NOT = re.compile(r"\b(?:not|never|no)\b|n['’]t\b")
_REASON = re.compile(r"(?:,?\s+(?:since|because|as)\s|\s\().*$", re.DOTALL)
_MOST_WORDS = 2


_NAME = re.compile(r"\[([^][]{1,40})\]|(?<!\w)\(([A-Z])\)")
_ARTICLE = re.compile(rf"\b{ARTICLE}")
_BETWEEN = re.compile(
    r"(?<=\d)(?:\s*,\s*|\s+and\s+)(?=[-−–]?\d)|(?<=\b[a-z])(?:\s*,\s*|\s+and\s+)(?=[a-z]\b)"
)
_COLON = re.compile(r"(?<=\d)\s*:\s*(?=\d)")


def _text(answer: str) -> str:
    """Returns plain text without articles and without the brackets around names in a prompt.

    A list of numbers or letters is written in one way: "3,5" becomes "3, 5".
    """
    text, before = " ".join(answer.split()), None
    while text != before:  # an article may have stood between brackets
        before = text
        text = plain_text(_NAME.sub(r"\1\2", text)).replace(", and ", " and ")
        text = _COLON.sub(":", _BETWEEN.sub(", ", _ARTICLE.sub("", text)))
    return text


def _cores(text: str) -> list[str]:
    """Returns a statement and its shorter forms: "bob is al's nephew", "al's nephew", "nephew"."""
    if _NOT.search(text):  # "bob is not al's nephew" says nothing of the kind
        return [text]
    clauses = _VERB.split(text)
    # "Al is a sage and Bo is a fool" has no shorter form.
    said = clauses[-1] if len(clauses) <= 2 else text
    owned = _OWNER.sub("", said)
    short = (said, owned, _OF.sub("", owned))
    bare = _REASON.sub("", text)
    without_reason = _cores(plain_text(bare)) if bare != text else []
    return [text, *map(plain_text, short), *without_reason]


@register_domain("text")
@dataclass(frozen=True)
class ShortText(Domain):
    """Short texts, compared without case, articles, quotes and signs around them.

    A statement matches its shorter form: "Bob is Alice's nephew." and "nephew" match.
    """

    @classmethod
    def recognise(cls, gold: str | None, prompt: str) -> ShortText | None:
        """Accepts every text."""
        return None if gold is None else cls()

    def normalise(self, answer: str) -> str:
        """Returns the plain text."""
        return _text(answer)

    def extract(self, completion: str) -> str | None:
        """Returns the sentence after the last answer marker, else the last sentence."""
        text = visible(completion)
        for part in parts(text):
            for sentence in statements(part.text):
                return _text(sentence) or None
        found = statements(text)
        return (_text(found[-1]) or None) if found else None

    def matches(self, a: str | None, b: str | None) -> bool:
        """Compares the texts, or one text with the shorter forms of the other."""
        if a is None or b is None:
            return False
        x, y = _text(a), _text(b)
        return bool(x and y) and (x == y or (y in _cores(x)) or (x in _cores(y)))


@register_domain("general")
@dataclass(frozen=True)
class General(Domain):
    """Answers of unknown kind: numbers and dates by value, anything else as plain text."""

    @classmethod
    def recognise(cls, gold: str | None, prompt: str) -> General | None:
        """Accepts everything."""
        return cls()

    def normalise(self, answer: str) -> str:
        """Returns the date, the number, the letter of a choice, or else plain text."""
        plain = plain_text(answer)
        label = _LABEL.match(unwrap(answer[:LONGEST_ANSWER])) or _LABEL.match(plain)
        if label:
            return label[1].lower()
        every = (kind(text) for text in (answer, plain) for kind in (Date().bare, bare_number))
        return next((found for found in every if found), plain)

    def extract(self, completion: str) -> str | None:
        """Returns the answer after the last answer marker, else the last number or date.

        A completion of one or two words is the answer itself.
        """
        text = visible(completion)
        found = [] if find_markers(text) else statements(text)
        if len(found) == 1 and len(found[0].split()) <= _MOST_WORDS:
            return self.normalise(found[0]) or None
        return read(self, completion)

    def stated(self, sentence: str) -> str | None:
        """Returns an option label at the start, a bare date, a number or a date, in this order."""
        label = _LABEL.match(sentence)
        if label:
            return label[1].lower()
        return Date().bare(sentence) or number.stated(sentence) or Date().stated(sentence) or None

    def opening(self, sentence: str) -> str | None:
        """Returns the label, date or number at the start of a sentence."""
        begins = _LABEL.match(sentence) or number.opening(sentence) or Date().bare(sentence)
        return self.stated(sentence) if begins else None

    def final(self, sentence: str) -> str | None:
        """Returns the last number of a sentence, or the last date if it has no number."""
        last = number.final(sentence)
        return last or Date().final(sentence) or last

    def matches(self, a: str | None, b: str | None) -> bool:
        """Compares as numbers if both are numbers, else in normal form."""
        return match_by_value(self, a, b)
