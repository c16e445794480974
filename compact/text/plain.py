r"""Writes the mathematics of a text in plain signs: no LaTeX, no Markdown, + - * / ^ and brackets.

The meaning stays: "18 \div \frac{2}{3}" becomes "18 / ((2)/(3))", "1½" becomes "(1+1/2)".
"""

from __future__ import annotations

import re

from compact.text.numbers import plain_fractions
from compact.text.units import unit_of

# What a word does to the numbers beside it: "5 squared" is all of an expression, "half of 10" too.
ACTS_BACK = (
    "plus|minus|divided|multiplied|mod|modulo|choose|squared|cubed|factorial|halves"
    "|(?:third|quarter|fourth|fifth|sixth|seventh|eighth|ninth|tenth|hundred|thousand|million"
    "|billion|trillion|dozen)s?"
)
ACTS_ON = (
    "over|square|cube|root|sqrt|log|ln|exp|sin|cos|tan|gcd|lcm|less|more|fewer|remainder|negative"
    "|twice|thrice|double|triple|half"
)
CONJUNCTIONS = (
    "and|or|so|then|while|whereas|but|where|when|if|since|because|thus|hence|therefore|giving|gives"
    "|which|leaving|let"
)
_SPEAKS = re.compile(rf"\b(?:{ACTS_BACK}|{ACTS_ON}|{CONJUNCTIONS})\b", re.IGNORECASE)

# fmt: off
SIGNS = {
    "×": "*", "·": "*", "⋅": "*", "∙": "*", "∗": "*", r"\times": "*", r"\cdot": "*",
    "÷": "/", "⁄": "/", r"\div": "/", "−": "-", "–": "-", "²": "^2", "³": "^3",
    r"\approx": "≈", "[": "(", "]": ")", "{": "(", "}": ")",
    r"^(\circ)": "°", r"^\circ": "°", r"\$": "$", r"\%": "%", "&": " ",
}
"""Sign of mathematics -> how a computation writes it."""
# fmt: on
_LATEX_SPACES = re.compile(r"\\(?:left|right|[,;!() ])")
_LATEX_BREAKS = re.compile(
    r"\\(?:Rightarrow|implies|iff|quad|qquad|therefore|\\|[\[\]]|(?:begin|end)\{\w{1,20}\*?\})"
)
_BOLD = re.compile(r"(?<!\d)\*\*|\*\*(?!\s*\d)")  # Markdown; between digits it means a power
_LATEX_TEXT = re.compile(r"\\(?:text(?:bf|rm|it)?|math(?:rm|bf|it)|boxed)\s*\{([^{}]*)\}")
CALCULATOR = re.compile(r"<<[^<>]*>>")  # 2 + 3 = <<2+3=5>>5
_LATEX_FRACTION = re.compile(r"\\[dt]?frac\s*(?:\{([^{}]+)\}\s*\{([^{}]+)\}|(\d)(\d))")
_LATEX_MIXED = re.compile(r"(?<![\d.])(\d+) ?\\[dt]?frac\s?(?:\{(\d+)\}\s?\{(\d+)\}|(\d)(\d))")
_DIVISOR = re.compile(r"(÷|\\div|/|\^) ?(\([^()]{1,40}\)/\([^()]{1,40}\)|(?<=[÷v]) ?\d+/\d+)")
_POWER = re.compile(r"(?<=[\d)]) ?\*\* ?(?=[\d(-])")
_MIXED = re.compile(r"(?<![\d./])(\d+) +(\d+)/(\d+)(?![\d.])(\s?%)?")  # 1 1/2
_ORDINAL = re.compile(r"(?<=\d/)(\d+)(?:st|nd|rd|th)s?\b")  # 1/4th
_THOUSANDS = re.compile(r"(?<=\d)(?:,\\[!,]|,|\{,\}|[\u00a0\u202f'’])(?=\d{3}(?!\d))")
_BULLET = re.compile(r"^\s*[-*•]\s+(?=[-\d$A-Za-z(\\])")  # a space follows, so it is no minus sign
LIST_NUMBER = re.compile(
    r"^[\s#>]*(?:\d{1,2}[.):]+\s|[(\[]\d{1,2}[)\]][.:]?\s+(?![-+*/=^×·÷])"
    r"|(?:step|part|fact|clue|case|question|q)\s*\d{1,2}(?:[.):]\s?|\s|$)"
    r"|\(?[a-z]\)\s)",
    re.IGNORECASE,
)
_REMARK = re.compile(r"(?<=\d) ?\(([A-Za-z][A-Za-z ,'’-]{2,60})\)")  # 54 (in total)
_COUNT = re.compile(r"(?<=\d) \(\d+(?: [A-Za-z'’-]+){1,8}\)")  # 4 (3 balls in a box)
_SQUARE = re.compile(r"(?<![A-Za-z])([A-Za-z]{2,12})\^(?:[23]|\([23]\))(?!\d)")  # 21 cm^2


def plain(text: str) -> str:
    """Removes LaTeX, Markdown, list numbers and thousands separators; writes signs as + - * / ^.

    A fraction that divides is put in brackets, and so is a mixed number. A remark in brackets, such
    as "(in total)", loses the brackets. Areas and volumes lose their exponents.
    """
    text = _LATEX_TEXT.sub(r"\1", _BOLD.sub("", text.replace(r"\*", "*")))
    text = _LATEX_MIXED.sub(r"\1 \2\4/\3\5", _THOUSANDS.sub("", CALCULATOR.sub("", text)))
    text = _LATEX_FRACTION.sub(r"(\1\3)/(\2\4)", plain_fractions(text))
    text = _LATEX_BREAKS.sub(" ; ", _LATEX_SPACES.sub(" ", _DIVISOR.sub(r"\1(\2)", text)))
    for sign, written in SIGNS.items():
        text = text.replace(sign, written)
    text = _POWER.sub("^", LIST_NUMBER.sub("", _BULLET.sub("", text)))
    text = _SQUARE.sub(_without_power, _REMARK.sub(_without_brackets, _COUNT.sub(" ; ", text)))
    return _MIXED.sub(_as_sum, _ORDINAL.sub(r"\1", text))


def _as_sum(mixed: re.Match[str]) -> str:
    """Writes the mixed number "1 1/2" as "(1+1/2)"; "10 3/2" is not a mixed number."""
    whole, above, below, percent = mixed.groups(default="")
    if float(above) >= float(below):
        return mixed.group()
    return f"({whole}{percent}+{above}{percent}/{below})"


def _without_brackets(remark: re.Match[str]) -> str:
    """Removes the brackets of "54 (in total)", but not of "9 (half of them)"."""
    return remark.group() if _SPEAKS.search(remark[1]) else f" {remark[1]} "


def _without_power(power: re.Match[str]) -> str:
    """Removes the exponent of a unit of length; of anything else it is a power."""
    unit = unit_of(power[1])
    return power[1] if unit is not None and unit[0] == "length" else power.group()
