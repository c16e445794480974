"""One of several options: "(B)", "B) field", "option B", or the option's own text."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from compact.answers import number
from compact.answers.base import Alternative, Domain, register_domain
from compact.answers.mathematics import tidy
from compact.answers.number import bare_number, free_numbers, same_number
from compact.answers.reading import LONGEST_ANSWER, plain_text, read, unwrap
from compact.text.numbers import NUMBER_WORDS, parse_number
from compact.text.steps import concludes

LETTERS = "ABCDEFGHIJ"
_FRONT = r"(?:\*\*|__|\$|\\text(?:bf|rm|it)?\{)"
_BACK = r"(?:\*\*|__|\})?"
# Forms of option labels in a prompt, most reliable first: "(A) x", "A) x", "A. x", "A: x", "[A] x".
# A label may be bold.
_LABELS = tuple(
    re.compile(form.replace("@", f"([{letters}])"), re.MULTILINE)
    for form in (
        rf"^[ \t]*{_FRONT}{{0,2}}\(@\){_BACK}",
        rf"^[ \t]*{_FRONT}{{0,2}}@\){_BACK}",
        rf"^[ \t]*{_FRONT}{{0,2}}@[.:](?:{_BACK}(?=\s)|\*\*)",
        r"^[ \t]*\[@\]",
        r"^[ \t]*@[.:](?=\S)",
        r"^[ \t]*@[ ][-–][ ]",
        rf"(?:(?<!\w)|(?=\\)){_FRONT}{{0,2}}\(@\){_BACK}",
        rf"(?<![\w(]){_FRONT}{{0,2}}@\){_BACK}",
        rf"(?<![\w(.]){_FRONT}{{0,2}}@[.:](?:{_BACK}(?=\s)|\*\*)",
        r"(?<!\w)\[@\]",
    )
    for letters in ("A-Z", "a-z")
)
_GOLD = re.compile(
    r"[\s.,:;!?()\[\]{}\"'`*_#]*(?:(?:option|choice)\W+)?([A-Za-z])[\s.,:;!?()\[\]{}\"'`*_#]*",
    re.IGNORECASE,
)
_IS_LABEL = re.compile(r"[A-Z]|[a-z]\)|option|choice")
_RATIO = re.compile(r"(?<=\d)\s*(?::|\bto\b)\s*(?=\d)")
_MOST_WORDS = 3
"""Most words of a sentence that is the value of an option and no more: "about 30 days"."""


class Mention(NamedTuple):
    """A place where a sentence names an option."""

    start: int
    end: int
    letter: str


# A letter in brackets or after "option" is a label anywhere in a sentence.
_LABEL = re.compile(
    r"\(([A-Za-z])\)|(?<![\w'(/-])([A-Za-z])\)|\b(?i:option|choice)s?:?\s\(?([A-Z])\b\)?"
)
# So is a capital alone, except the words "A" and "I" and letters of names ("vitamin C", "A.J.").
_CAPITAL = re.compile(r"(?<![\w'./-])([A-Z])(?![\w'/-]|\.\w)")
_NOT = re.compile(r"\W*not\b", re.IGNORECASE)
# "(E), not (C)": what is denied inside a sentence.
_DENIED = re.compile(
    r"\b(?:not|rather than|instead of|over)\W+(?:(?:option|choice)\W+)?$", re.IGNORECASE
)
_WORD = {
    "A": re.compile(
        r"\s+(?!(?:is|was|because|since|as|and|or|which|that|would|with|but|makes|fits)\b)[a-z]"
    ),
    "I": re.compile(r"\s+(?!(?:is|because|since)\b)[a-z]"),
}
"""What follows "A" and "I" where they are words and no labels: "A dog", "I think"."""
# At the start of an answer a letter alone is a label: "B", "B.", "b", "C: 55%".
_IN_FRONT = re.compile(
    r"[^\w(]*(?:\(([A-Za-z])\)|(?:(?i:option|choice)\W{1,3})?"
    r"(?:([A-Z])(?![\w'/-]|\.\w)|([a-z])(?=[).:]|\W*$)))\)?"
)
# "so B is the correct answer", "which makes the field the best choice"
_CHOSEN = re.compile(
    r"\b(?:correct|right|best|final|likely|plausible|suitable|appropriate|accurate|logical)\s+"
    r"(?:answer|option|choice)\b|\b(?:option|choice|answer)\s+\(?[A-Z]\)?\s+is\s+(?:the\s+)?"
    r"(?:correct|right|best|true)\b",
    re.IGNORECASE,
)
# What stands beside the text of an option must not make it a part of a longer word or expression.
_BEFORE = r"(?<![\w./+^-])(?<!\d,)"
_BEHIND = r"(?![\w^]|[.,/-]\w|\s?[*/+=]\s?[\w(])"
_SO = re.compile(r"^\W*(?:so|thus|therefore|hence),?\s", re.IGNORECASE)
_IS_RIGHT = re.compile(
    r"\W*(?:option\s|choice\s)?\W{0,3}[A-Z]\b\)?"
    r"[^,;]{0,60}?\bis\s(?:the\s)?(?:correct|best|right|answer|most\s\w+)\b",
    re.IGNORECASE,
)
_OR = re.compile(
    r"\W{0,3},\s?(?=\(?[A-Z]\b[),]*(?:\s*$|[,.]|\s(?:and|or)\b))"  # "A, B, and C"
    r"|[^\w(]*\b(?:or|and)\s+(?:(?:option|choice)\s)?|\s?[/&]\s?"
)


def _is_word(letter: str, rest: str) -> bool:
    """Whether a capital alone is the word "A" or "I", by what follows it."""
    return letter in _WORD and bool(_WORD[letter].match(rest))


def _places(option: str, sentence: str) -> Iterator[tuple[int, int]]:
    """Yields where the text of an option stands whole in a sentence; a number, by its value."""
    if parse_number(option) is not None:
        for found in free_numbers(sentence):
            if same_number(found.group(), option):
                yield found.span()
    elif option:
        for found in re.finditer(rf"{_BEFORE}{re.escape(option)}{_BEHIND}", sentence):
            yield found.span()


@lru_cache(maxsize=4096)
def _value(text: str) -> str | None:
    r"""Returns the number or expression that a text is, without unit and typesetting, else None."""
    if not re.search(r"\d|\\|π", text) and not NUMBER_WORDS.match(text):
        return None
    expression = _RATIO.sub(":", tidy(text)).replace(" ", "").lower()
    return bare_number(text) or expression or None


def _is_number(value: str | None) -> bool:
    return value is not None and parse_number(value) is not None


def read_options(prompt: str) -> tuple[tuple[str, str], ...]:
    """Returns the options of a prompt as (letter, text in plain form), () if it has none."""
    return tuple((letter, plain_text(text)) for letter, text in written_options(prompt))


def written_options(prompt: str) -> tuple[tuple[str, str], ...]:
    """Returns the options of a prompt as (letter, text as written), () if it has none."""
    return tuple((option.letter, prompt[option.start : option.end]) for option in _find(prompt))


class _Written(NamedTuple):
    """An option in a prompt: where its label begins, and where its text begins and ends."""

    label: int
    start: int
    end: int
    letter: str


def _find(prompt: str) -> list[_Written]:
    """Returns the options of a prompt, [] if it has none.

    The options are the last sequence of labels of one form that starts at A and has a text behind
    every label; "Reply with (A), (B) or (C)" has none. Labels at the start of a line have priority,
    so that "(A) (a) 5 volts, (b) 3 volts" is option A. The text of an option is its first line that
    is not empty.
    """
    for label in _LABELS:
        for run in reversed(_runs(label.finditer(prompt))):
            ends = [found.start() for found in run[1:]] + [len(prompt)]
            options = [_written(prompt, *pair) for pair in zip(run, ends, strict=True)]
            texts = [prompt[option.start : option.end].strip(" ,.;:$") for option in options]
            if not any(text in ("", "and", "or") for text in texts):
                return options
    return []


def _runs(labels: Iterable[re.Match[str]]) -> list[list[re.Match[str]]]:
    """Returns the sequences of labels that start at A, of two or more."""
    runs: list[list[re.Match[str]]] = []
    for found in labels:
        if found[1] in "Aa":
            runs.append([found])
        elif runs and ord(found[1]) == ord(runs[-1][-1][1]) + 1:
            runs[-1].append(found)
    return [run for run in runs if len(run) > 1]


def _written(prompt: str, label: re.Match[str], end: int) -> _Written:
    """Returns the option of a label; `end` is where the next label begins."""
    rest = prompt[label.end() : end]
    start = label.end() + len(rest) - len(rest.lstrip())
    text = rest.strip().split("\n", 1)[0].strip()
    return _Written(label.start(), start, start + len(text), label[1].upper())


@register_domain("choice")
@dataclass(frozen=True)
class Choice(Domain):
    """One of several options; the normal form is the letter.

    A letter has priority over a text: "C) 55%" is C, even if 55% is the text of another option. If
    a completion names several options in turn, the last one that it states as the answer counts. A
    statement that joins two options ("B or E") states none.

    Attributes:
        options: (letter, plain text) of every option, () if the prompt has none.
    """

    options: tuple[tuple[str, str], ...] = ()

    @classmethod
    def recognise(cls, gold: str | None, prompt: str) -> Choice | None:
        """Accepts the letter or text of an option; only a letter if the prompt has no options."""
        domain = cls.of_prompt(prompt)
        if gold is None:
            return domain if domain.options else None
        if not _GOLD.fullmatch(unwrap(gold)):
            # A text that begins with a letter ("J. K. Rowling") must be the text of that option.
            front = domain._in_front(unwrap(gold))
            texts = dict(domain.options)
            shown = plain_text(unwrap(gold)[front.end :]) if front else plain_text(gold)
            if shown not in ([texts.get(front.letter)] if front else texts.values()):
                return None
        elif not domain.options and not _IS_LABEL.search(unwrap(gold)):
            return None  # "e" and "x" may be mathematics
        return domain if domain.normalise(gold) in domain.letters else None

    @classmethod
    def of_prompt(cls, prompt: str) -> Choice:
        """Returns the choice between the options of the prompt."""
        return cls(read_options(prompt))

    @property
    def letters(self) -> str:
        """The letters that can be chosen."""
        return "".join(letter for letter, _ in self.options) or LETTERS

    def normalise(self, answer: str) -> str:
        """Returns the letter ("(b)." -> "B", "the field" -> "B"), or plain text without one."""
        text = unwrap(answer[:LONGEST_ANSWER])
        plain = plain_text(text)
        found = _GOLD.fullmatch(text) or _GOLD.fullmatch(plain)
        if found and found[1].upper() in self.letters:
            return found[1].upper()
        for letter, option in self.options:
            if plain == option:
                return letter
        front = self._in_front(text) or self._in_front(plain)
        return front.letter if front else self._of_value(text) or plain

    def extract(self, completion: str) -> str | None:
        """Returns the option after the last answer marker, else the last option that is named.

        Words that are no option are no answer, for they may mean one; a letter that is none is.
        """
        found = read(self, completion)
        return found if found is not None and re.fullmatch("[A-Za-z]", found) else None

    def alternatives(self, gold: str | None, prompt: str) -> tuple[Alternative, ...]:
        """Returns the options of the prompt with their text; () if an option has no text."""
        found = tuple(Alternative(*option) for option in written_options(prompt))
        return found if all(option.text for option in found) else ()

    def question(self, prompt: str) -> str:
        """Returns the prompt without its options, if something is left."""
        options = _find(prompt)
        if not options:
            return prompt
        before, after = prompt[: options[0].label].rstrip(), prompt[options[-1].end :].strip()
        return "\n".join(part for part in (before, after) if part) or prompt

    def states(self, step: str) -> bool:
        """Whether a step announces an answer, is an option and no more, or concludes an option.

        A step that only mentions an option, or rejects one, states nothing.
        """
        if super().states(step):
            return True
        text = unwrap(step)
        plain = plain_text(text)
        front = self._in_front(text)
        rest = plain_text(text[front.end :].lstrip(" -–—:")) if front else plain
        if plain and (not rest or rest in [option for _, option in self.options]):
            return True
        named = list(self._labels(text, _LABEL)) or self._texts(text)
        named = named or list(self._labels(text, _CAPITAL))
        return bool(_CHOSEN.search(text)) or (bool(named) and concludes(text))

    def stated(self, sentence: str) -> str | None:
        """Returns the first option, "" if the sentence joins it to another one or denies it."""
        if _NOT.match(sentence) and not self._text_in_front(sentence):
            return ""
        mention = self._stated(sentence)
        return mention.letter if mention else self._of_value(sentence, prose=True)

    def opening(self, sentence: str) -> str | None:
        """Returns the option whose label or whole text is at the start of a sentence."""
        front = self._in_front(sentence)
        if front:
            return self.stated(sentence)
        return self._text_in_front(sentence)

    def final(self, sentence: str) -> str | None:
        """Returns the last option of a sentence; "not (C)" counts only if there is no other.

        Letters have priority over texts.
        """
        mentions = list(self._labels(sentence, _LABEL))
        claim = _SO.sub("", sentence)
        front = self._in_front(claim)
        if front and _IS_RIGHT.match(claim):  # "A is the best answer, while D is dry."
            return front.letter
        front = self._in_front(sentence)
        mentions = mentions or ([front] if front else []) or self._texts(sentence)
        mentions = mentions or list(self._labels(sentence, _CAPITAL))
        meant = [m for m in mentions if not _DENIED.search(sentence[: m.start][-24:])]
        if mentions:
            return max(meant or mentions, key=lambda mention: mention.start).letter
        return self._of_value(sentence) if len(sentence.split()) <= _MOST_WORDS else None

    def _in_front(self, sentence: str) -> Mention | None:
        """Returns the label at the start of a sentence, None if the sentence starts with a word."""
        found = _IN_FRONT.match(sentence)
        if not found:
            return None
        letter = (found[1] or found[2] or found[3]).upper()
        if letter not in self.letters:
            return None
        if found[2] and _is_word(letter, sentence[found.end() :]):
            return None
        return Mention(found.start(), found.end(), letter)

    def _text_in_front(self, sentence: str) -> str | None:
        """Returns the option whose whole text is at the start of a sentence."""
        texts = self._texts(sentence)
        return texts[0].letter if texts and not sentence[: texts[0].start].strip(" \"'") else None

    def _of_value(self, text: str, *, prose: bool = False) -> str | None:
        r"""Returns the option of the same value, if exactly one has it.

        "30" is the option "30 days", and "3 to 4" is "3:4". With `prose`, the number may stand in a
        sentence, if every option is a number.
        """
        values = {letter: _value(option) for letter, option in self.options}
        value = _value(text)
        if prose and value not in values.values() and all(map(_is_number, values.values())):
            value = number.stated(text) or None
        equal = [] if value is None else [name for name, v in values.items() if v == value]
        return equal[0] if len(equal) == 1 else None

    def _labels(self, sentence: str, pattern: re.Pattern[str]) -> Iterator[Mention]:
        for found in pattern.finditer(sentence):
            letter = next(group for group in found.groups() if group).upper()
            word = pattern is _CAPITAL and _is_word(letter, sentence[found.end() :])
            if letter in self.letters and not word:
                yield Mention(found.start(), found.end(), letter)

    def _texts(self, sentence: str) -> list[Mention]:
        """Returns the mentions of options by text, in order, without those inside a longer one."""
        plain = " ".join(sentence.lower().split())
        found: list[Mention] = []
        for letter, option in sorted(self.options, key=lambda pair: -len(pair[1])):
            for start, end in _places(option, plain):
                if not any(m.start <= start and end <= m.end for m in found):
                    found.append(Mention(start, end, letter))
                    break
        return sorted(found)

    def _stated(self, sentence: str) -> Mention | None:
        """Returns the option that the sentence after a marker states as the answer.

        The letter of the result is "" if the sentence joins two options.
        """
        front = self._in_front(sentence)
        labels = [front] if front else list(self._labels(sentence, _LABEL))
        texts = [] if labels else self._texts(sentence)
        mentions = labels or texts or list(self._labels(sentence, _CAPITAL))
        if not mentions:
            return None
        first = mentions[0]
        if not texts:
            joined = _OR.match(sentence, self._end_of_option(sentence, first))
            other = self._in_front(sentence[joined.end() :][:40]) if joined else None
            if other and other.letter != first.letter:
                return Mention(first.start, first.end, "")
        return first

    def _end_of_option(self, sentence: str, mention: Mention) -> int:
        """Returns where a label ends, including the option's text if it follows the label."""
        text = dict(self.options).get(mention.letter, "")
        rest = sentence[mention.end :]
        behind = rest.lstrip(" :.-")
        if text and behind.lower().startswith(text):
            return mention.end + len(rest) - len(behind) + len(text)
        return mention.end
