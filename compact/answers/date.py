"""Dates and times of day: "05/01/2020", "May 1, 2020", "2020-05-01", "3:30 pm"."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from compact.answers.base import Domain, register_domain
from compact.answers.reading import LONGEST_ANSWER, plain_text, read, unwrap

_MONTHS = [
    *("jan", "feb", "mar", "apr", "may", "jun"),
    *("jul", "aug", "sep", "oct", "nov", "dec"),
]
_MONTH = (
    r"(?P<{0}>jan(?:uary)?|feb(?:ruary)?|mar(?:ch)?|apr(?:il)?|may|june?|july?|aug(?:ust)?"
    r"|sept?(?:ember)?|oct(?:ober)?|nov(?:ember)?|dec(?:ember)?)\.?"
)
_DAY = r"(?P<{0}>\d{{1,2}})(?:st|nd|rd|th)?"
_DATE = re.compile(
    r"(?<![\w/.])(?:"
    r"(?P<year>\d{4})(?P<cut>[-/.])(?P<month>\d{1,2})(?P=cut)(?P<day>\d{1,2})(?:T[\d:.]*Z?)?"
    r"|(?P<first>\d{1,2})(?P<cut2>[-/.])(?P<second>\d{1,2})(?P=cut2)(?P<year2>\d{4}|\d{2})"
    rf"|{_MONTH.format('name')}\s{{0,3}}{_DAY.format('day3')}(?:,?\s{{0,3}}(?P<year3>\d{{4}}))?"
    rf"|{_DAY.format('day4')}\s(?:of\s)?{_MONTH.format('name4')}"
    r"(?:,?\s{0,3}(?P<year4>\d{4}))?"
    r"|(?P<hour>\d{1,2}):(?P<minute>[0-5]\d)(?::(?P<seconds>[0-5]\d))?(?:\s?(?P<half>[ap])\.?m\b)?"
    r"|(?P<hour2>1[0-2]|0?[1-9])\s?(?P<half2>[ap])\.?m\b"
    r")(?![\w/:])",
    re.IGNORECASE,
)
_DAY_OF_WEEK = re.compile(
    r"[^\w-]*(?:(?:the|on|at) )?(?:(?:mon|tue|wed|thu|fri|sat|sun)[a-z]*[., ]+)?(?:the )?\W{0,3}",
    re.IGNORECASE,
)
# "one day before 05/02/2020": a date that another one is reckoned from.
_RECKONED = re.compile(
    rf"\b(?:before|after|from|since|until|than)\s(?:the\s)?{_DATE.pattern}", re.IGNORECASE
)
_DAY_FIRST = re.compile(r"\bDD\s?[-/.]\s?MM\s?[-/.]\s?YY", re.IGNORECASE)
_BRACKETS = re.compile(r"(?<=\s)\([^()]*\)")
_TIME = re.compile(r"(\d\d:\d\d(?::\d\d)?)(?: ([ap]m))?")


@register_domain("date")
@dataclass(frozen=True)
class Date(Domain):
    """Dates, in the form 2020-05-01, and times of day, in the form 03:30 pm.

    If a date can be read in two ways, the month comes first, unless the prompt asks for DD/MM/YYYY.
    A date without a year ("May 1") is 05-01 and matches only a date without a year. Up to 12:59, a
    time without am or pm matches the same time with either.

    Attributes:
        day_first: whether 05/01/2020 is 5 January.
    """

    day_first: bool = False

    @classmethod
    def of_prompt(cls, prompt: str) -> Date:
        """Returns the dates of a prompt, which may ask for the day first."""
        return cls(day_first=bool(_DAY_FIRST.search(prompt)))

    @classmethod
    def recognise(cls, gold: str | None, prompt: str) -> Date | None:
        """Accepts a text that is one date or one time."""
        domain = cls.of_prompt(prompt)
        return domain if gold is not None and domain.bare(gold) is not None else None

    def bare(self, answer: str) -> str | None:
        """Returns the normal form of a text that is one date or time, with or without a weekday."""
        text = unwrap(answer[:LONGEST_ANSWER]).strip(" .,:;!?()[]{}\"'\n\t")
        text = text[weekday.end() :] if (weekday := _DAY_OF_WEEK.match(text)) else text
        found = _DATE.match(text)
        if found and not text[found.end() :].strip(" .,m"):
            return self._form(found)
        normal = re.fullmatch(r"(\d\d)-(\d\d)", text)  # our own form of a date without a year
        return text if normal and _is_day(int(normal[1]), int(normal[2])) else None

    def dates(self, text: str) -> Iterator[str]:
        """Yields the dates and times of an unwrapped text, in normal form."""
        for found in _DATE.finditer(text):
            form = self._form(found)
            if form is not None:
                yield form

    def _form(self, found: re.Match[str]) -> str | None:
        if found["hour"] or found["hour2"]:
            half = found["half"] or found["half2"]
            return _time(
                int(found["hour"] or found["hour2"]), found["minute"], found["seconds"], half
            )
        name = found["name"] or found["name4"]
        year = found["year"] or found["year2"] or found["year3"] or found["year4"]
        if found["first"]:
            month, day = int(found["first"]), int(found["second"])
            if (self.day_first and day <= 12) or month > 12:
                month, day = day, month
        else:
            month = _MONTHS.index(name[:3].lower()) + 1 if name else int(found["month"])
            day = int(found["day"] or found["day3"] or found["day4"])
        if not _is_day(month, day):
            return None
        if year is not None and len(year) == 2:
            year = ("19" if int(year) >= 70 else "20") + year
        return f"{year}-{month:02}-{day:02}" if year else f"{month:02}-{day:02}"

    def normalise(self, answer: str) -> str:
        """Returns the date ("5/1/2020" -> "2020-05-01"), or plain text if it is not a date."""
        plain = plain_text(answer)
        return self.bare(answer) or self.bare(plain) or plain

    def extract(self, completion: str) -> str | None:
        """Returns the date after the last answer marker, else the last date."""
        return read(self, completion)

    def stated(self, sentence: str) -> str | None:
        """Returns the date at the start, else the first that no other is reckoned from."""
        first = self.opening(sentence)
        if first is not None:
            return first
        return next(self.dates(_RECKONED.sub(" ", sentence)), None) or next(
            self.dates(sentence), None
        )

    def opening(self, sentence: str) -> str | None:
        """Returns the date at the start of a sentence; a weekday may come before it."""
        found = _DATE.search(sentence)
        if not found or not _DAY_OF_WEEK.fullmatch(sentence[: found.start()]):
            return None
        return self._form(found)

    def final(self, sentence: str) -> str | None:
        """Returns the last date."""
        every = list(self.dates(_BRACKETS.sub(" ", sentence))) or list(self.dates(sentence))
        return every[-1] if every else None

    def matches(self, a: str | None, b: str | None) -> bool:
        """Compares normal forms; a time without am or pm matches either."""
        if a is None or b is None:
            return False
        x, y = self.normalise(a), self.normalise(b)
        if x == y:
            return True
        left, right = _TIME.fullmatch(x), _TIME.fullmatch(y)
        return bool(
            left and right and left[1] == right[1] and (left[2] is None or right[2] is None)
        )


def _is_day(month: int, day: int) -> bool:
    return 1 <= month <= 12 and 1 <= day <= 31


def _time(hour: int, minute: str | None, seconds: str | None, half: str | None) -> str | None:
    """Returns "03:30 pm", with seconds if there are any but 00 ("03:30:15 pm").

    For hours 13 to 23 and 0, am or pm follows from the hour.
    """
    if hour > 23 or (half and not 1 <= hour <= 12):
        return None
    if half is None and (hour > 12 or hour == 0):
        half = "p" if hour else "a"
    hour = hour % 12 or 12
    exact = f":{seconds}" if int(seconds or 0) else ""
    return f"{hour:02}:{minute or '00'}{exact}" + (f" {half.lower()}m" if half else "")
