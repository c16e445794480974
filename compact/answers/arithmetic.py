r"""Computes sums that are written as an answer: "2^{10}", "4 \cdot 3", "(1 + 2) / 4"."""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable
from fractions import Fraction

from compact.text.plain import SIGNS

_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_TIMES = re.compile(r"(?<=\d)\s?x\s?(?=\d)")
_SUM = re.compile(r"[-+\d.()*/ ]{1,80}")
_RANGE = re.compile(r"\d+(?:[-/]\d+)+")  # "3-5", "1/7/2020"
_LARGEST = 64
"""Most digits of a base, and largest exponent, of a power that is computed."""
_OPERATIONS: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def value_of(text: str) -> Fraction | None:
    """Returns the value of a text that consists of numbers, + - * / ^ and brackets, else None."""
    plain = _THOUSANDS.sub("", text.strip(" .,:;="))
    for sign, simple in SIGNS.items():
        plain = plain.replace(sign, simple)
    plain = _TIMES.sub("*", plain).replace("^", "**").strip()
    if not _SUM.fullmatch(plain) or _RANGE.fullmatch(plain):
        return None
    try:
        return _value(ast.parse(plain, mode="eval").body)
    except (SyntaxError, ValueError, ArithmeticError, RecursionError, MemoryError):
        return None


def _value(node: ast.expr) -> Fraction:
    """Returns the value of a parsed sum.

    Raises:
        ValueError: it has something that is not computed, such as a call ("3(4)").
    """
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        return Fraction(repr(node.value))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_value(node.operand)
    if isinstance(node, ast.BinOp):
        left, right = _value(node.left), _value(node.right)
        if type(node.op) in _OPERATIONS:
            return _OPERATIONS[type(node.op)](left, right)
        size = max(abs(left.numerator), left.denominator)
        small = size < 10**_LARGEST and right.denominator == 1 and abs(right) <= _LARGEST
        if isinstance(node.op, ast.Pow) and small:
            return Fraction(left ** int(right))
    raise ValueError("not a sum")
