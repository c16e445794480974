r"""Mathematical objects: "6\sqrt{2}", intervals, tuples, expressions, matrices (math-verify)."""

from __future__ import annotations

import re
from dataclasses import dataclass

from compact.answers import number
from compact.answers.base import Domain, register_domain
from compact.answers.number import SEVERAL_EQUATIONS, bare_number, same_number
from compact.answers.pool import checked_apart
from compact.answers.reading import (
    LONGEST_ANSWER,
    Part,
    braced,
    parts,
    plain_text,
    sentences,
    statements,
    visible,
)
from compact.text.numbers import parse_number

# Signs of mathematics: an operator, a command, a bracket with a digit, an unknown (2x).
_SYMBOLS = re.compile(r"[\\^_=+*/$√π∞<>≤≥|]|[(\[{][^)\]}]{0,200}\d|\d[a-zA-Z]\b|[a-z]\s?-\s?\d")
_FORMULA = re.compile(
    r"\$\$?[^$]{1,1000}\$\$?|\\\((?:[^\\]|\\[^()]){1,1000}\\\)|\\\[(?:[^\\]|\\[^\[\]]){1,1000}\\\]"
)
_WRAPPED = re.compile(
    r"\s*(?:\$\$(?P<two>[^$]+)\$\$|\$(?P<one>[^$]+)\$|\\\((?P<round>.+?)\\\)"
    r"|\\\[(?P<square>.+?)\\\])\s*[.,;]?\s*",
    re.DOTALL,
)
_SPACING = re.compile(
    r"\\(?:left|right|displaystyle|bigl?|bigr?)(?![a-z])|(?<!\\)\\[,;:! ]|~|\\q?quad\b"
)
_TEXT = re.compile(r"\\(?:text|mbox|mathrm|textbf|mathbf)\s?\{\s?([^{}]*?)\s?\}")
_ROOT = re.compile(r"√\s?(?:(\w+)|\(([^()]*)\))")
_UNICODE = str.maketrans(
    {"²": "^2", "³": "^3", "∞": r"\infty ", "∪": r"\cup ", "≤": r"\le ", "≥": r"\ge "}
    | {"·": r"\cdot ", "π": r"\pi "}
)
_UNITS = re.compile(
    r"(?<=[\w)}])(?:\\[,;: ]|~|\s)*\\(?:text|mathrm|mbox)\s?\{\s*"
    r"(?!(?:or|and|million|billion|thousand)\b)[a-zA-Z./]+(?:\s[a-z]+)?\s*\}(?:\s?\^\s?\{?\d\}?)?\s*$"
)
_ARROW = re.compile(r"->|→|⟶|⇌|\\(?:(?:long)?rightarrow|rightleftharpoons|to)(?![a-zA-Z])")
_AND = re.compile(r"\s*(?:(?:,(?!\d{3}(?!\d))|;)\s*(?:and\s+|or\s+)?|\b(?:and|or)\b)\s*")
_UNKNOWN = re.compile(r"([a-zA-Z])\s?=\s?")
_ORDERED = re.compile(
    r"\b(?:order(?:ed|ing)?|sort(?:ed|ing)?|sequence|ascending|descending|arrange|permutation"
    r"|coordinates?|pairs?|tuple|triples?|respectively)\b",
    re.IGNORECASE,
)
_BOLD = re.compile(r"(?<!\d)\*\*|\*\*(?!\s?\d)|`")


def tidy(expression: str) -> str:
    r"""Returns an expression without typesetting: "$\dfrac12\,$." -> "\frac{1}{2}"."""
    text, before = _ROOT.sub(r"\\sqrt{\1\2}", expression[:LONGEST_ANSWER].translate(_UNICODE)), ""
    while text != before:  # dollars around a box around a text, each with signs around it
        before = text
        text = _BOLD.sub("", text).strip().strip("*_ ")
        whole = _WRAPPED.fullmatch(text)
        if whole:
            text = next(group for group in whole.groups() if group is not None).strip()
        if text.startswith("\\boxed"):
            inside = braced(text, len("\\boxed"))
            text = inside if inside is not None else text
        text = _SPACING.sub("", _UNITS.sub("", text))
        text = text.replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac")
        text = re.sub(r"\\frac\s?(\w)\s?(\w)(?!\w)", r"\\frac{\1}{\2}", text)
        text = _TEXT.sub(r"\1", text).replace("$", "").replace("−", "-")
        text = " ".join(text.split()).rstrip(".,;:! ").lstrip(":;,= ")
    return text


def check(a: str, b: str) -> bool:
    """Whether math-verify accepts two expressions as equal, with either of them as the gold one.

    math-verify may hang on some expressions. Its own time limit uses SIGALRM, which works only in
    the main thread and cannot stop compiled code. So this runs in a process of `CheckerPool`.
    """
    from math_verify import parse, verify

    x, y = (parse(f"${text}$", parsing_timeout=None) for text in (a, b))
    if not x or not y:
        return False
    return bool(verify(x, y, timeout_seconds=None) or verify(y, x, timeout_seconds=None))


@register_domain("math")
@dataclass(frozen=True)
class Mathematics(Domain):
    """Mathematical objects, compared by math-verify in either order.

    Equal texts and numbers are decided directly. Everything else is checked in a separate process.
    A check that takes more than ten seconds is killed, and the answers do not match.
    """

    @classmethod
    def recognise(cls, gold: str | None, prompt: str) -> Mathematics | None:
        """Accepts an expression: a text with digits, operators, brackets or commands.

        So are several numbers, unless the prompt asks for an order.
        """
        if gold is None or len(gold) > LONGEST_ANSWER:
            return None
        if _solutions(tidy(gold)):
            return None if _ORDERED.search(prompt) else cls()
        return cls() if _SYMBOLS.search(gold) or bare_number(gold) is not None else None

    def normalise(self, answer: str) -> str:
        """Returns a number in normal form, any other expression without typesetting."""
        text = tidy(answer)
        symbols = _SYMBOLS.search(text.replace("\\frac", ""))
        return (None if symbols else bare_number(text)) or text

    def extract(self, completion: str) -> str | None:
        """Returns the expression after the last answer marker, else the last formula or number."""
        text = visible(completion)
        for part in parts(text):
            stated = _stated(part)
            if stated:
                return self.normalise(stated) or None
        formulas = list(_FORMULA.finditer(text))
        if formulas:
            last = formulas[-1].group()
            said = last.rpartition("=")[2]
            said = said if said == last else said.removesuffix("\\]").removesuffix("\\)")
            return self.normalise(said) or None
        numbers = [found for s in statements(text) if (found := number.final(s)) is not None]
        return (numbers[-1] or None) if numbers else None

    def decide(self, a: str | None, b: str | None) -> bool | None:
        """Returns the result of `matches`, or None if only math-verify can decide."""
        if a is None or b is None:
            return False
        x, y = self.normalise(a), self.normalise(b)
        if not x or not y:
            return False
        if x == y or x.replace(" ", "") == y.replace(" ", ""):
            return True
        if _ARROW.search(x) or _ARROW.search(y):  # math-verify would compare the left sides only
            return _reaction(x) == _reaction(y)
        same = same_number(x, y)
        if same is not None:
            return same
        several = _solutions(x), _solutions(y)
        if all(several):
            return _equal(*several)
        if _is_words(x) or _is_words(y):
            return plain_text(x) == plain_text(y)
        return None

    def matches(self, a: str | None, b: str | None) -> bool:
        """Compares as mathematical objects.

        Raises:
            RuntimeError: the checker process could not be started.
        """
        decided = self.decide(a, b)
        if decided is not None or a is None or b is None:
            return bool(decided)
        return checked_apart(check, self.normalise(a), self.normalise(b))


def _reaction(text: str) -> str:
    """Returns a reaction, or any text with arrows, without spaces and signs of typesetting."""
    return re.sub(r"[\s_{}$]", "", _ARROW.sub("->", text))


def _solutions(text: str) -> list[str]:
    """Returns the numbers of "3, 7" or "x = 3 or x = 7" by size, [] for any other text."""
    texts = _AND.split(text)
    unknowns = {found[1] if found else "" for found in map(_UNKNOWN.match, texts)}
    if len(texts) < 2 or len(unknowns - {""}) > 1 or re.search(r"[()\[\]{}]", text):
        return []
    found = [bare_number(_UNKNOWN.sub("", t, count=1)) for t in texts if len(t) <= 40]
    if len(found) < len(texts) or None in found or any(re.search(r"[a-z]{2}", t) for t in texts):
        return []
    return sorted((n for n in found if n is not None), key=lambda n: parse_number(n) or 0)


def _equal(a: list[str], b: list[str]) -> bool:
    """Whether two lists of numbers are equal."""
    return len(a) == len(b) and all(same_number(x, y) for x, y in zip(a, b, strict=True))


def _is_words(text: str) -> bool:
    """Whether a text is prose ("does not exist"): math-verify would multiply its letters."""
    return not _SYMBOLS.search(text) and bool(re.search(r"[a-z]{3,}", text, re.IGNORECASE))


def _stated(part: Part) -> str:
    """Returns the expression that a part states: its box, its first formula, or its first line."""
    if part.boxed:
        return part.text
    line = next((s for s in part.text.split("\n") if re.search(r"[\w\\]", s)), "")
    if SEVERAL_EQUATIONS.search(line):
        return next(sentences(line), line)
    formula = _FORMULA.search(part.text if line.strip() in ("\\[", "$$") else line)
    if formula:
        expression = formula.group()
        return expression if _is_relation(expression) else expression.rpartition("=")[2]
    sentence = next(sentences(line), line)
    return sentence if _is_relation(sentence) else sentence.rpartition("=")[2]


def _is_relation(text: str) -> bool:
    """Whether "=" is part of the answer: an equation such as y = 2x + 3, or none at all."""
    left, equals, right = text.strip("$\\()[] ").partition("=")
    return not equals or ("=" not in right and bool(re.search(r"[a-zA-Z]", right)))
