"""Shared by all domains: finds where a completion states its answer, and simplifies texts."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple, Protocol

from compact.text.numbers import plain_fractions, without_scales
from compact.text.steps import ABBREVIATION, find_markers, thought_end

_ANSWER_END = re.compile(r"</answer>", re.IGNORECASE)
_SPECIAL = re.compile(r"<\|[^|<>\n]{0,40}\|>|</?s>|<(?:eos|bos|pad|end_of_turn)>|<\|")
_WORD = re.compile(r"[^\W_]")
MOST_MARKERS = 5
"""Most answer markers that are tried, starting with the last."""
LONGEST_ANSWER = 2000
"""Most characters read of an answer, bare or after a marker."""

_FRACTION = re.compile(r"\\[dt]?frac\s?(?:\{([^{}]{1,200})\}|(\w))\s?(?:\{([^{}]{1,200})\}|(\w))")
_POWER_OF_TEN = re.compile(
    r"(?<=\d)\s?(?:\\times|\\cdot|[×x*·])\s?10\s?(?:\^|\*\*)\s?\{?\s?([-+−]?)(\d{1,12})\s?\}?"
)
# "negative 5", and "minus 5" where nothing stands before that it could be taken from
_NEGATIVE = re.compile(
    r"\bnegative\s(?=\d)|(?:(?<![\w)]\s)(?<![\w)])|(?<=\b(?:is|be)\s))minus\s(?=\d)",
    re.IGNORECASE,
)
_WRAP = re.compile(
    r"\\(?:boxed|fbox|mbox|text(?:bf|it|rm|sf|tt)?|math(?:rm|bf|it|sf|tt)|emph|operatorname)"
    r"\s?\{([^{}]*)\}"
)
_BOLD = re.compile(r"(?<![\w)])\*\*([^*\n]{0,80}[^*\n:])\*\*(?![\w(]|\s*:)")
_OPEN, _CLOSE = "\ue000", "\ue001"  # stand for the signs of bold type while sentences are cut
_MARKED = re.compile(f"{_OPEN}([^{_OPEN}{_CLOSE}]*){_CLOSE}")
_FACTORIAL = re.compile(r"([\w)])!")  # "!" in a box; in a sentence it may end the sentence
_IN_JSON = re.compile(
    r'[\s:]{0,4}(?:"([^"\n]{1,500})"\s*(?:[,}\]]|\Z)|(-?\d[\d.]{0,40})\s*(?:,\s*"|\}))'
)
_THIN = re.compile(r"(?<=\d)(?:\\[,;:]|[\u202f\u2009\u00a0~'’])(?=\d{3}(?!\d))")
_DEGREES = re.compile(r"\^\s?(?:\{\s?\\circ\s?\}|\\circ\b)")
_SPACE = re.compile(r"\\(?:quad|qquad|[,;: ])|~|\xa0")
_DROPPED = re.compile(
    r"\\(?:left|right|displaystyle|[!()\[\]])(?![a-z])"
    r"|(?<!\d)\*\*+|\*\*+(?!\s?\d)|__+|`|(?m:^)[ \t]*(?:#{1,6}|>)[ \t]*"
)
_CURRENCY = re.compile(r"(?:\b(?:US|A|C|NZ|HK|S)(?=\$\d))?\\?[$€£¥₹]|\bRs\.?\s?(?=\d)")
_EMPHASIS = re.compile(r"(?<![\w*)}])\*(?=\w)|(?<=[\w.!?)])\*(?![\w*({\\ ])")

# A sentence ends at a new line or at ".!?;" before a space; not inside decimals, "A.J." or "3! * 2"
_END = re.compile(r"\n|(?:[.?;]|!(?!\s{0,3}[-+*/=×)^])){1,9}[\"'”’)\]*_\ue001]{0,9}(?=\s|$)")
_INITIAL = re.compile(r"(?:^|[\s.(\ue000])[A-Z]$")


class Part(NamedTuple):
    """The text after an answer marker.

    Attributes:
        text: the rest of the completion, or the content of a box.
        direct: whether the answer itself comes first ("The answer is"), see `Marker`.
        boxed: whether the text is the content of a box.
    """

    text: str
    direct: bool
    boxed: bool


class Sentence(NamedTuple):
    """A sentence of a completion, unwrapped.

    Attributes:
        text: the sentence.
        bold: what it has in bold type, behind its last "=".
    """

    text: str
    bold: tuple[str, ...]


def visible(completion: str) -> str:
    """Returns the part of a completion that can state the answer.

    That is the text after the last `</think>`, or the whole text if nothing follows it. Special
    tokens become new lines.
    """
    return _SPECIAL.sub("\n", completion[thought_end(completion) :])


# What follows "The answer is" in a remark about an answer that was stated before. "Rounded to 7"
# and "in dollars 7" are remarks only where they have no answer.
_JUDGED = re.compile(
    r"\s*(?:indeed\s+|also\s+|now\s+)?(?:correct|right|verified|confirmed|consistent|reasonable"
    r"|clear|supported)\b[^:]*",
    re.IGNORECASE,
)
_REMARK = re.compile(
    r"\W*(?:rounded|in\s+(?:dollars|cents|the)|(?:as\s+)?(?:above|shown|given\s+above))\b[^:]*",
    re.IGNORECASE,
)


def parts(text: str) -> Iterator[Part]:
    """Yields the text after each answer marker, last marker first, at most `MOST_MARKERS`."""
    markers = find_markers(text)
    for i, marker in enumerate(islice(reversed(markers), MOST_MARKERS), 1):
        if i < len(markers) and marker.direct and _judges(text, marker.end):
            continue
        boxed = text.endswith("boxed", marker.start, marker.end)
        inside = braced(text, marker.end) if boxed else None
        rest = inside if inside is not None else text[marker.end : marker.end + LONGEST_ANSWER]
        rest = _ANSWER_END.split(rest, maxsplit=1)[0]
        value = _IN_JSON.match(rest)
        rest = (value[1] or value[2]) if value else rest
        if _WORD.search(rest):
            yield Part(rest, marker.direct, boxed)


def _judges(text: str, start: int) -> bool:
    """Whether a sentence says something about the answer: "The answer is correct."."""
    sentence = next(sentences(text[start : start + 200].split("\n")[0]), "")
    return bool(_JUDGED.fullmatch(sentence))


def stated_answer(completion: str) -> str | None:
    """Returns the first sentence after the last answer marker, None without a marker.

    It is in no domain's normal form.
    """
    said = (sentence for part in parts(visible(completion)) for sentence in statements(part.text))
    return next(said, None)


class Reader(Protocol):
    """How a domain reads a sentence: each method returns the answer, or None if there is none.

    "" means that the sentence names an answer that does not count ("B or E"); the search then ends.
    """

    def normalise(self, answer: str) -> str:
        """Returns the comparable form of an answer, or plain text if it is no such answer."""

    def stated(self, sentence: str) -> str | None:
        """Returns the answer of a sentence that states it, as after "The answer is"."""

    def opening(self, sentence: str) -> str | None:
        """Returns the answer at the start of a sentence."""

    def final(self, sentence: str) -> str | None:
        """Returns the last answer that a sentence of a rationale names."""

    def states(self, step: str) -> bool:
        """Returns whether a sentence gives the answer ("So it is (B)"), not only mentions one."""


def read(reader: Reader, completion: str) -> str | None:
    """Returns the final answer of a completion as a domain reads it, None if there is none.

    The last marker decides. After "The answer is", the next sentence states the answer; if it names
    none ("The correct answer is the following:"), a later sentence may be the answer. After
    "Answer:", the answer may come directly or at the end of a paragraph of reasoning. If no
    sentence after a marker names an answer, the first sentence after the last marker is the answer.
    Without a marker, the last sentence that states an answer counts ("B.", "So it is (B)"), else
    the last one that names one. Questions are ignored.
    """
    text = visible(completion)
    said = ""
    for part in parts(text):
        part_text = _FACTORIAL.sub(r"\1 factorial", part.text) if part.boxed else part.text
        lines = [_statements(line) for line in part_text.split("\n")]
        lines = [line for line in lines if line]
        if not lines:
            continue
        first = lines[0][0].text
        if part.direct:
            answer = reader.stated(first)
            following = [sentence.text for line in lines for sentence in line][1:]
        else:
            answer = reader.opening(first)
            following = []
            for line in lines:
                answer = _last(reader, line) if answer is None else answer
        if answer is None and part.direct and _REMARK.fullmatch(first):
            continue
        for sentence in following:
            answer = reader.opening(sentence) if answer is None else answer
        if answer is not None:
            return answer or None
        said = said or first
        if part.direct:
            break
    if said:
        return reader.normalise(said) or None
    return _last(reader, _statements(text)) or None


def _last(reader: Reader, found: list[Sentence]) -> str | None:
    """Returns the answer of the last sentence that states one, else of the last that names one."""
    for named in (False, True):
        for sentence in reversed(found):
            if named or reader.states(sentence.text):
                answer = reader.final(sentence.text)
                if answer is not None:
                    bold = {b for text in sentence.bold if (b := reader.final(text))}
                    return bold.pop() if len(bold) == 1 else answer
    return None


def _statements(text: str) -> list[Sentence]:
    """Returns the sentences of a text, unwrapped, without questions."""
    found = []
    for sentence in sentences(unwrap(_BOLD.sub(rf"{_OPEN}\1{_CLOSE}", text))):
        plain = sentence.replace(_OPEN, "").replace(_CLOSE, "")
        if not is_question(plain):
            bold = _MARKED.findall(sentence, sentence.rfind("=") + 1)
            found.append(Sentence(plain, tuple(bold)))
    return found


def statements(text: str) -> list[str]:
    """Returns the sentences of a text, unwrapped, without questions."""
    return [sentence.text for sentence in _statements(text)]


def braced(text: str, start: int) -> str | None:
    """Returns the content of the braces that open at `start`, None if none open or close."""
    depth = 0
    opened = re.compile(r"\s?\{").match(text, start)
    if not opened:
        return None
    for brace in re.compile(r"\\[{}]|[{}]").finditer(
        text, opened.end() - 1, opened.end() + LONGEST_ANSWER
    ):
        depth += {"{": 1, "}": -1}.get(brace.group(), 0)
        if depth == 0:
            return text[opened.end() : brace.start()]
    return None


def unwrap(text: str) -> str:
    """Returns a text without LaTeX and Markdown around its words and numbers.

    A LaTeX fraction becomes a/b, a power of ten becomes an exponent, and currency signs are
    removed, so that numbers can be read directly. Other mathematics keeps its commands.
    """
    text = _THIN.sub("", plain_fractions(text.replace("{,}", ",")))
    text = without_scales(_NEGATIVE.sub("-", text))
    if "\\" in text or "^" in text or "×" in text or "·" in text:
        text = text.replace("\\%", "%").replace("\\!", "")
        text = _POWER_OF_TEN.sub(r"e\1\2", _DEGREES.sub("°", text)).replace("e−", "e-")
        for _ in range(3):  # a box around text around a fraction
            text = _WRAP.sub(r"\1", _FRACTION.sub(_as_ratio, text))
    text = _EMPHASIS.sub("", _DROPPED.sub("", _CURRENCY.sub("", _SPACE.sub(" ", text))))
    return text.replace("\\{", "{").replace("\\}", "}")


def _as_ratio(found: re.Match[str]) -> str:
    """Returns a LaTeX fraction as a/b, with a space after a whole number before it (1 1/2)."""
    top, bottom = found[1] or found[2], found[3] or found[4]
    if not (re.fullmatch(r"[-−]?\d+(?:\.\d+)?", top.strip()) and bottom.strip().isdigit()):
        return f"({top})/({bottom})"
    before = found.string[found.start() - 1 : found.start()] if found.start() else ""
    return f"{' ' if before.isdigit() else ''}{top.strip()}/{bottom.strip()}"


def sentences(text: str) -> Iterator[str]:
    """Yields the sentences of a text that have a letter or a digit, in order, stripped.

    A new line ends a sentence; the full stop of an abbreviation or of an initial does not.
    """
    start = 0
    for end in _END.finditer(text):
        before = text[max(start, end.start() - 12) : end.start()]
        if end.group()[0] == "." and (ABBREVIATION.search(before) or _INITIAL.search(before)):
            rest = text[end.end() : end.end() + 2].strip()
            if rest:
                continue
        sentence = text[start : end.end()].strip()
        start = end.end()
        if _WORD.search(sentence):
            yield sentence
    if _WORD.search(last := text[start:].strip()):
        yield last


def is_question(sentence: str) -> bool:
    """Whether a sentence is a question ("25 x 14 = ?"), which states no answer."""
    return sentence.rstrip("\"'”’)]*_ ").endswith("?")


# "a" before one letter, or before "and", is a letter itself: "B A C", "A and C".
ARTICLE = (
    r"(?:(?:the|an)\s+(?=[\w\"'“‘(\[{*`$\\√])|a\s+(?=[\d\"'“‘(\[{*`$\\√]"
    r"|(?!(?:and|or|is|are|was|but|then|to|before|after|because|since)\b)[^\W\d_]{2}))"
)
_FRONT = re.compile(rf"^(?:\.(?!\d)|[\s,:;!?()\[\]{{}}\"'`*_\\#>]|{ARTICLE})+")


def plain_text(text: str) -> str:
    """Returns a text in lower case, without wrappers, leading articles, or signs around it."""
    plain, before = text[:LONGEST_ANSWER], None
    while plain != before:  # what stood behind an article may be a wrapper again
        before = plain
        words = " ".join(unwrap(plain).lower().split())
        plain = _FRONT.sub("", words.translate(_QUOTES)).rstrip(_AROUND)
    return plain


_QUOTES = str.maketrans("“”‘’", "\"\"''")
_AROUND = " .,:;!?()[]{}\"'`*_\\#"
